/*-------------------------------------------------------------------------
 *
 * json_build.c
 *	  Building the text of a JSON object, member by member.
 *
 * json_begin() opens an object, the json_add functions append a member each, and
 * json_end() closes it.  An object inside it is opened and closed by hand.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/json_build.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type_d.h"
#include "utils/builtins.h"
#include "utils/datetime.h"
#include "utils/json.h"

#include "base/json_build.h"

/* Begin an object, in a buffer of its own. */
void
json_begin(StringInfo json)
{
	initStringInfo(json);
	appendStringInfoChar(json, '{');
}

/* The object is complete. */
void
json_end(StringInfo json)
{
	appendStringInfoChar(json, '}');
}

/* The object is complete: return it as jsonb. */
Jsonb *
json_end_jsonb(StringInfo json)
{
	json_end(json);
	return DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(json->data)));
}

/* Append a member's name; its value comes next. */
void
json_add_name(StringInfo json, const char *name)
{
	appendStringInfoString(json, json->len > 0 && json->data[json->len - 1] == '{' ? "" : ", ");
	escape_json(json, name);
	appendStringInfoString(json, ": ");
}

/* Append a string, or no member for a null pointer. */
void
json_add_string(StringInfo json, const char *name, const char *value)
{
	if (value == NULL)
		return;
	json_add_name(json, name);
	escape_json(json, value);
}

/* Append a value that is JSON already, or no member for a null pointer. */
void
json_add_json(StringInfo json, const char *name, const char *value)
{
	if (value == NULL)
		return;
	json_add_name(json, name);
	appendStringInfoString(json, value);
}

/* Append a number. */
void
json_add_int(StringInfo json, const char *name, int value)
{
	json_add_name(json, name);
	appendStringInfo(json, "%d", value);
}

/* Append a boolean. */
void
json_add_bool(StringInfo json, const char *name, bool value)
{
	json_add_json(json, name, value ? "true" : "false");
}

/* Append a moment as JSON has it: a string, in the session's time zone. */
void
json_add_time(StringInfo json, const char *name, TimestampTz value)
{
	char		buf[MAXDATELEN + 1];

	json_add_string(json, name,
					JsonEncodeDateTime(buf, TimestampTzGetDatum(value), TIMESTAMPTZOID, NULL));
}
