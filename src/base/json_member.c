/*-------------------------------------------------------------------------
 *
 * json_member.c
 *	  Members of JSON objects.
 *
 * What comes from outside may have any shape.  A member that does not exist, is
 * of another type, or belongs to something that is not an object (NULL
 * included) is just not found.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/json_member.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/json_member.h"

/* A member of any type.  Returns false if there is none. */
bool
json_member(JsonbContainer *object, const char *name, JsonbValue *value)
{
	return object != NULL && JsonContainerIsObject(object) &&
		getKeyJsonValueFromContainer(object, name, strlen(name), value) != NULL;
}

/* A string, palloc'd, or NULL. */
char *
json_string_member(JsonbContainer *object, const char *name)
{
	JsonbValue	value;

	if (!json_member(object, name, &value) || value.type != jbvString)
		return NULL;
	return pnstrdup(value.val.string.val, value.val.string.len);
}

/* An object, or NULL. */
JsonbContainer *
json_object_member(JsonbContainer *object, const char *name)
{
	JsonbValue	value;

	if (!json_member(object, name, &value) || value.type != jbvBinary ||
		!JsonContainerIsObject(value.val.binary.data))
		return NULL;
	return value.val.binary.data;
}

/* A boolean.  Returns false if there is none. */
bool
json_bool_member(JsonbContainer *object, const char *name, bool *value)
{
	JsonbValue	member;

	if (!json_member(object, name, &member) || member.type != jbvBool)
		return false;
	*value = member.val.boolean;
	return true;
}

/* A member other than null as a jsonb of its own, or NULL. */
Jsonb *
json_member_copy(JsonbContainer *object, const char *name)
{
	JsonbValue	value;

	if (!json_member(object, name, &value) || value.type == jbvNull)
		return NULL;
	return JsonbValueToJsonb(&value);
}
