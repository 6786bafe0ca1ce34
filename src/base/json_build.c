/*-------------------------------------------------------------------------
 *
 * json_build.c
 *	  JSON objects, written member by member.
 *
 * Names and strings are escaped, and a value of NULL is a null.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/json_build.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/builtins.h"
#include "utils/json.h"

#include "base/json_build.h"

/* Begin an object, in a buffer of its own. */
void
json_build_begin(StringInfo json)
{
	initStringInfo(json);
	appendStringInfoChar(json, '{');
}

static void
add_name(StringInfo json, const char *name)
{
	/* no member ends with a brace that opens */
	if (json->data[json->len - 1] != '{')
		appendStringInfoString(json, ", ");
	escape_json(json, name);
	appendStringInfoString(json, ": ");
}

void
json_build_string(StringInfo json, const char *name, const char *value)
{
	add_name(json, name);
	if (value != NULL)
		escape_json(json, value);
	else
		appendStringInfoString(json, "null");
}

/* Something that is JSON already: a number, true or false, another object. */
void
json_build_text(StringInfo json, const char *name, const char *text)
{
	add_name(json, name);
	appendStringInfoString(json, text != NULL ? text : "null");
}

void
json_build_jsonb(StringInfo json, const char *name, Jsonb *value)
{
	add_name(json, name);
	if (value != NULL)
		(void) JsonbToCString(json, &value->root, VARSIZE(value));
	else
		appendStringInfoString(json, "null");
}

/* The object is complete; json->data is its text. */
void
json_build_end(StringInfo json)
{
	appendStringInfoChar(json, '}');
}

/* The same, and returns it as a jsonb. */
Jsonb *
json_build_end_jsonb(StringInfo json)
{
	json_build_end(json);
	return DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(json->data)));
}
