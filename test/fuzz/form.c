/*-------------------------------------------------------------------------
 *
 * form.c
 *	  Fuzz target: parameters as Stripe takes them (src/stripe/form.c).
 *
 * The encoding is decoded as a server does it: split at & and =, then names at
 * their brackets, then %.  The result has to be what was encoded: the same
 * leaves in the same order, with the same names and equal numbers, whole ones
 * without a fraction.  Only what has no encoding is an error.
 *
 * An input is any bytes (json_tree.c), or JSON if it begins with a brace.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * test/fuzz/form.c
 *
 *-------------------------------------------------------------------------
 */
#include "backend.h"

#include "utils/builtins.h"
#include "utils/numeric.h"

#include "base/errors.h"
#include "json_tree.h"
#include "stripe/form.h"

#define DEPTH 20
#define SIZE 2000
#define DIGITS 500

typedef struct Form
{
	char	   *rest;			/* what is left to decode, or NULL */
} Form;

static int
hex(char c)
{
	static const char digits[] = "0123456789ABCDEF";
	const char *p = strchr(digits, c);

	CHECK(c != '\0' && p != NULL);
	return p - digits;
}

/* Decode percent escapes in place. */
static void
decode(char *p)
{
	char	   *out = p;

	for (; *p != '\0'; p++)
	{
		CHECK((unsigned char) *p > ' ' && (unsigned char) *p < 127);
		CHECK(strchr("+&#;?", *p) == NULL);
		if (*p == '%')
		{
			*out++ = (char) (hex(p[1]) * 16 + hex(p[2]));
			p += 2;
		}
		else
			*out++ = *p;
	}
	*out = '\0';
}

/* Check that the next name and value are these. */
static void
expect(Form *form, char *const *path, int depth, const Tree *leaf)
{
	char	   *pair = strsep(&form->rest, "&");
	char	   *value;

	CHECK(pair != NULL);
	value = strchr(pair, '=');
	CHECK(value != NULL);
	*value++ = '\0';

	for (int i = 0; i < depth; i++)
	{
		char	   *end = pair + strcspn(pair, "[]");
		char		bracket = *end;

		CHECK(bracket == (i == 0 ? (depth > 1 ? '[' : '\0') : ']'));
		*end = '\0';
		decode(pair);
		CHECK(strcmp(pair, path[i]) == 0);
		pair = end + (bracket != '\0');
		if (i > 0 && i + 1 < depth)
			CHECK(*pair++ == '[');
	}
	CHECK(*pair == '\0');

	decode(value);
	switch (leaf->type)
	{
		case TREE_NULL:
		case TREE_ARRAY:
			CHECK(*value == '\0');
			break;
		case TREE_TRUE:
			CHECK(strcmp(value, "true") == 0);
			break;
		case TREE_FALSE:
			CHECK(strcmp(value, "false") == 0);
			break;
		case TREE_STRING:
			CHECK(strcmp(value, leaf->text.data) == 0);
			break;
		case TREE_NUMBER:
			{
				char	   *in = psprintf("%s%se%d", leaf->negative ? "-" : "", leaf->digits, leaf->exponent);
				Datum		a;
				Datum		b;

				CHECK(strspn(value, "-0123456789.") == strlen(value));
				CHECK(strchr(value, '.') == NULL || strpbrk(strchr(value, '.'), "123456789") != NULL);
				CHECK(*value != '-' || strpbrk(value, "123456789") != NULL);
				a = DirectFunctionCall3(numeric_in, CStringGetDatum(in), ObjectIdGetDatum(InvalidOid), Int32GetDatum(-1));
				b = DirectFunctionCall3(numeric_in, CStringGetDatum(value), ObjectIdGetDatum(InvalidOid), Int32GetDatum(-1));
				CHECK(DatumGetBool(DirectFunctionCall2(numeric_eq, a, b)));
				break;
			}
		case TREE_OBJECT:
			CHECK(!"an object is no leaf");
	}
}

static void
expect_tree(Form *form, char **path, int depth, const Tree *tree)
{
	char		number[16];

	if (tree->type == TREE_OBJECT || (tree->type == TREE_ARRAY && tree->n > 0))
	{
		for (int i = 0; i < tree->n; i++)
		{
			snprintf(number, sizeof(number), "%d", i);
			path[depth] = tree->type == TREE_OBJECT ? tree->names[i].data : number;
			expect_tree(form, path, depth + 1, tree->values[i]);
		}
	}
	else
		expect(form, path, depth, tree);
}

/* Does a number have more digits than allowed, before or after the point? */
static bool
is_long(const Tree *tree)
{
	const char *digits = tree->digits + strspn(tree->digits, "0");
	int			len = strlen(digits);
	int			zeros = 0;

	if (len == 0)
		return false;
	while (digits[len - 1 - zeros] == '0')
		zeros++;
	return len + tree->exponent > DIGITS || -(tree->exponent + zeros) > DIGITS;
}

static bool
has_long(const Tree *tree)
{
	if (tree->type == TREE_NUMBER)
		return is_long(tree);
	for (int i = 0; i < tree->n; i++)
	{
		if (has_long(tree->values[i]))
			return true;
	}
	return false;
}

/* Is this a value that has no encoding? */
static bool
is_bad(const Tree *tree, int depth)
{
	if (tree->type < TREE_ARRAY)
		return false;
	if (depth > DEPTH)
		return true;
	for (int i = 0; i < tree->n; i++)
	{
		if (tree->type == TREE_OBJECT &&
			(tree->names[i].len == 0 || strpbrk(tree->names[i].data, "[]") != NULL))
			return true;
		if (is_bad(tree->values[i], depth + 1))
			return true;
	}
	return false;
}

/* Encode.  Returns the SQLSTATE of an error, or 0. */
static int
encode(StringInfo out, Jsonb *json, Size max_size)
{
	MemoryContext context = CurrentMemoryContext;
	volatile int error = 0;

	PG_TRY();
	{
		form_encode(out, json, max_size);
	}
	PG_CATCH();
	{
		error = geterrcode();
		MemoryContextSwitchTo(context);
		FlushErrorState();
	}
	PG_END_TRY();
	return error;
}

/* The target, called by backend.c. */
int
fuzz_form(const uint8 *data, size_t size)
{
	StringInfoData out;
	StringInfoData again;
	Bytes		bytes = {data, size};
	Form		form = {NULL};
	char	   *path[DEPTH + 8];
	Tree	   *tree;
	int			error;

	initStringInfo(&out);
	if (size > 0 && data[0] == '{')
	{
		Jsonb	   *json = jsonb_from_text((const char *) data, size);

		if (json == NULL)
			return 0;
		error = encode(&out, json, SIZE);
		CHECK(error == 0 || error == ERRCODE_BAD_ARGUMENT || error == ERRCODE_TOO_LARGE);
		CHECK(error != 0 || out.len <= SIZE);
		return 0;
	}

	tree = tree_from_bytes(&bytes, true);
	appendStringInfoString(&out, "before");
	error = encode(&out, tree_to_jsonb(tree, SPELL_PLAIN), SIZE);
	if (error == ERRCODE_TOO_LARGE)
	{
		CHECK(out.len - 6 > SIZE || has_long(tree));
		return 0;
	}
	CHECK(error == (is_bad(tree, 1) ? ERRCODE_BAD_ARGUMENT : 0));
	if (error != 0)
		return 0;
	CHECK(!has_long(tree));

	form.rest = out.len > 6 ? out.data + 6 : NULL;
	expect_tree(&form, path, 0, tree);
	CHECK(form.rest == NULL && strncmp(out.data, "before", 6) == 0);

	/* what is equal is sent with the same names, in the same order */
	initStringInfo(&again);
	CHECK(encode(&again, tree_to_jsonb(tree, SPELL_OTHERWISE), PG_INT32_MAX) == 0);
	form.rest = again.len > 0 ? again.data : NULL;
	expect_tree(&form, path, 0, tree);
	CHECK(form.rest == NULL);
	return 0;
}
