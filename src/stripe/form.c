/*-------------------------------------------------------------------------
 *
 * form.c
 *	  Parameters as Stripe's API takes them: v1 application/x-www-form-urlencoded,
 *	  with nested names in brackets, v2 JSON.
 *
 *	{"a": {"b": 1}, "c": ["x", {"d": true}]}	a[b]=1&c[0]=x&c[1][d]=true
 *	null										name=		(unset)
 *	[]											name=		(set to empty)
 *	{}											nothing
 *
 * Stripe's libraries do the same, so the server gets what it is used to: arrays
 * are always indexed, a space is %20, and brackets are left as they are, in
 * values too.  The libraries disagree on null and on the empty array; here both
 * are sent, because a caller who writes them has a reason to.
 *
 * Numbers are written in full, without exponent, and a whole one without a
 * fraction, however it is spelled: 1990.00 and 1.99e3 are 1990 when requests
 * are compared, and Stripe, which refuses an amount with a decimal point, gets
 * what was compared.  A number with a fraction keeps its zeros, as jsonb shows
 * them: where Stripe accepts decimals (percent_off, unit_amount_decimal) 19.90
 * and 19.9 are the same to it, and metadata shows what was written.
 *
 * A name with brackets in it would be read as another name, so it is refused.
 *
 * jsonb sorts the names of an object and keeps no name twice: the order of the
 * result is that of jsonb, and the same for equal values.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/stripe/form.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "mb/pg_wchar.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/json.h"
#include "utils/numeric.h"

#include "base/compat.h"
#include "base/errors.h"
#include "stripe/form.h"

/* Depth of nested objects and arrays; Stripe's own reach about six. */
#define FORM_MAX_DEPTH 20

/*
 * Digits of a number before the decimal point, and after it: as many as
 * metadata accepts.  jsonb can hold 1e131071, which would be written out.
 */
#define FORM_MAX_DIGITS 500

typedef struct Form
{
	StringInfo	out;
	StringInfoData name;		/* of the value at hand, encoded */
	Size		max_size;
	Size		start;			/* of what is ours in out */
} Form;

static void encode_container(Form *form, JsonbContainer *container, int depth);

/*
 * Append text, percent-encoded as UTF-8.
 */
static void
append_encoded(StringInfo out, const char *text, int len)
{
	static const char hex[] = "0123456789ABCDEF";
	char	   *utf8 = pg_server_to_any(text, len, PG_UTF8);
	int			i;

	if (utf8 != text)
		len = strlen(utf8);

	for (i = 0; i < len; i++)
	{
		unsigned char c = utf8[i];

		if ((c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') ||
			(c >= '0' && c <= '9') || (c != '\0' && strchr("-._~[]", c) != NULL))
			appendStringInfoCharMacro(out, c);
		else
		{
			appendStringInfoCharMacro(out, '%');
			appendStringInfoCharMacro(out, hex[c >> 4]);
			appendStringInfoCharMacro(out, hex[c & 0x0f]);
		}
	}
}

static void
check_name(const char *name, int len)
{
	if (len == 0)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("name of a Stripe parameter must not be empty")));
	if (memchr(name, '[', len) != NULL || memchr(name, ']', len) != NULL)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("name of a Stripe parameter must not contain square brackets"),
				 errdetail("Stripe would read it as another name."),
				 errhint("Nest objects instead: {\"a\": {\"b\": 1}} is sent as a[b]=1.")));
}

static void
check_size(Size size, Size max_size)
{
	if (size > max_size)
		ereport(ERROR,
				(errcode(ERRCODE_TOO_LARGE),
				 errmsg("Stripe parameters are too large"),
				 errdetail("Encoded they have more than %zu bytes.", max_size)));
}

/*
 * Append a number.  Raises an error if it has too many digits, before it is
 * written out.
 */
static void
append_number(StringInfo out, Numeric number)
{
	Datum		trimmed = DirectFunctionCall1(numeric_trim_scale, NumericGetDatum(number));
	int			scale = DatumGetInt32(DirectFunctionCall1(numeric_scale, trimmed));
	Datum		size = DirectFunctionCall1(numeric_abs, trimmed);
	Datum		limit = DirectFunctionCall3(numeric_in, CStringGetDatum("1e" CppAsString2(FORM_MAX_DIGITS)),
											ObjectIdGetDatum(InvalidOid), Int32GetDatum(-1));

	if (DatumGetBool(DirectFunctionCall2(numeric_ge, size, limit)) ||
		scale > FORM_MAX_DIGITS)
		ereport(ERROR,
				(errcode(ERRCODE_TOO_LARGE),
				 errmsg("number in Stripe parameters has too many digits"),
				 errdetail("It may have %d before the decimal point and as many after it.",
						   FORM_MAX_DIGITS),
				 errhint("Pass it as a string.")));
	appendStringInfoString(out, DatumGetCString(DirectFunctionCall1(numeric_out,
																	scale == 0 ? trimmed : NumericGetDatum(number))));
}

/* Append name=value; the name is complete. */
static void
encode_scalar(Form *form, JsonbValue *value)
{
	StringInfo	out = form->out;

	if (out->len > form->start)
		appendStringInfoChar(out, '&');
	appendBinaryStringInfo(out, form->name.data, form->name.len);
	appendStringInfoChar(out, '=');

	switch (value->type)
	{
		case jbvNull:
			break;
		case jbvString:
			append_encoded(out, value->val.string.val, value->val.string.len);
			break;
		case jbvNumeric:
			append_number(out, value->val.numeric);
			break;
		case jbvBool:
			appendStringInfoString(out, value->val.boolean ? "true" : "false");
			break;
		default:
			elog(ERROR, "unexpected type of jsonb value: %d", (int) value->type);
	}

	check_size(out->len - form->start, form->max_size);
}

/*
 * A value whose name is complete but for this last part, which is in brackets
 * unless it is the first.
 */
static void
encode_member(Form *form, const char *part, int len, JsonbValue *value, int depth)
{
	int			name_len = form->name.len;

	if (name_len > 0)
		appendStringInfoChar(&form->name, '[');
	append_encoded(&form->name, part, len);
	if (name_len > 0)
		appendStringInfoChar(&form->name, ']');

	if (value->type == jbvBinary)
		encode_container(form, value->val.binary.data, depth + 1);
	else
		encode_scalar(form, value);

	form->name.len = name_len;
	form->name.data[name_len] = '\0';
}

static void
encode_container(Form *form, JsonbContainer *container, int depth)
{
	bool		is_array = JsonContainerIsArray(container);
	JsonbIterator *it;
	JsonbIteratorToken token;
	JsonbValue	value;
	JsonbValue	member;
	int			i = 0;

	if (depth > FORM_MAX_DEPTH)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("Stripe parameters are nested too deeply"),
				 errdetail("They may be nested %d levels deep.", FORM_MAX_DEPTH)));

	if (is_array && JsonContainerSize(container) == 0)
	{
		value.type = jbvNull;
		encode_scalar(form, &value);
		return;
	}

	it = JsonbIteratorInit(container);
	(void) JsonbIteratorNext(&it, &value, true);
	while ((token = JsonbIteratorNext(&it, &value, true)) != WJB_DONE)
	{
		if (token == WJB_ELEM)
		{
			char		part[MAXINT8LEN];

			pg_ltoa(i++, part);
			encode_member(form, part, strlen(part), &value, depth);
		}
		else if (token == WJB_KEY)
		{
			check_name(value.val.string.val, value.val.string.len);
			(void) JsonbIteratorNext(&it, &member, true);
			encode_member(form, value.val.string.val, value.val.string.len, &member, depth);
		}
	}
}

/*
 * Append an object's members as a form.  Raises IK003 for what cannot be
 * encoded, and IK007 if the result is larger than max_size bytes.
 */
void
form_encode(StringInfo out, Jsonb *params, Size max_size)
{
	Form		form;

	Assert(JB_ROOT_IS_OBJECT(params));

	form.out = out;
	form.max_size = max_size;
	form.start = out->len;
	initStringInfo(&form.name);
	encode_container(&form, &params->root, 1);
	pfree(form.name.data);
}

/* Append a name or a scalar as JSON. */
static void
append_json_scalar(StringInfo out, JsonbValue *value)
{
	switch (value->type)
	{
		case jbvNull:
			appendStringInfoString(out, "null");
			break;
		case jbvString:
			escape_json(out, pnstrdup(value->val.string.val, value->val.string.len));
			break;
		case jbvNumeric:
			append_number(out, value->val.numeric);
			break;
		case jbvBool:
			appendStringInfoString(out, value->val.boolean ? "true" : "false");
			break;
		default:
			elog(ERROR, "unexpected type of jsonb value: %d", (int) value->type);
	}
}

/*
 * Append an object as JSON: as jsonb shows it, except for the numbers.  Raises
 * the same errors.
 */
void
json_encode(StringInfo out, Jsonb *params, Size max_size)
{
	JsonbIterator *it = JsonbIteratorInit(&params->root);
	JsonbIteratorToken token;
	JsonbValue	value;
	StringInfoData json;
	bool		separate = false;
	char	   *utf8;

	initStringInfo(&json);
	while ((token = JsonbIteratorNext(&it, &value, false)) != WJB_DONE)
	{
		if (separate && token != WJB_END_ARRAY && token != WJB_END_OBJECT)
			appendStringInfoString(&json, ", ");
		separate = false;
		switch (token)
		{
			case WJB_BEGIN_ARRAY:
				appendStringInfoChar(&json, '[');
				break;
			case WJB_BEGIN_OBJECT:
				appendStringInfoChar(&json, '{');
				break;
			case WJB_KEY:
				append_json_scalar(&json, &value);
				appendStringInfoString(&json, ": ");
				break;
			default:
				if (token == WJB_END_ARRAY)
					appendStringInfoChar(&json, ']');
				else if (token == WJB_END_OBJECT)
					appendStringInfoChar(&json, '}');
				else
					append_json_scalar(&json, &value);
				separate = true;
				break;
		}
		check_size(json.len, max_size);
	}

	utf8 = pg_server_to_any(json.data, json.len, PG_UTF8);
	check_size(strlen(utf8), max_size);
	appendStringInfoString(out, utf8);
}

/*
 * Append one more member to a form.  Its name needs no encoding.
 */
void
form_append(StringInfo out, bool first, const char *name, const char *value)
{
	appendStringInfo(out, "%s%s=", first ? "" : "&", name);
	append_encoded(out, value, strlen(value));
}
