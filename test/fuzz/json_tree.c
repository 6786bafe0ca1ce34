/*-------------------------------------------------------------------------
 *
 * json_tree.c
 *	  JSON values made from any bytes.
 *
 * A fuzzer that has to discover JSON's syntax first gets nowhere, so here
 * every input is a value.  It is kept as a tree of our own, so that a target
 * knows the right result without asking jsonb, and can write the value in two
 * ways that mean the same.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * test/fuzz/json_tree.c
 *
 *-------------------------------------------------------------------------
 */
#include "json_tree.h"

#include "fmgr.h"
#include "mb/pg_wchar.h"
#include "utils/builtins.h"
#include "utils/json.h"
#include "utils/memutils.h"

#define MAX_DEPTH 24

/* Characters that have a meaning to some parser on the way. */
static const char *const characters[] = {
	"a", "b", "[", "]", "&", "=", "%", "+", " ", "\"", "\\", "/", "\n", "\x01", "\x7f", "0", "~", ".", "#",
	"\xc3\xa9", "\xe2\x82\xac", "\xf0\x9f\x98\x80", "_", ";"
};

static const char *const names[] = {"a", "b", "id", "params", "ig", "error", "object", "amount"};

static uint8
next_byte(Bytes *bytes)
{
	if (bytes->size == 0)
		return 0;
	bytes->size--;
	return *bytes->data++;
}

static void
take_string(Bytes *bytes, StringInfo text)
{
	int			n = next_byte(bytes) % 12;

	while (n-- > 0)
		appendStringInfoString(text, characters[next_byte(bytes) % lengthof(characters)]);
}

static int
compare_names(const StringInfoData *a, const StringInfoData *b)
{
	return a->len != b->len ? a->len - b->len : memcmp(a->data, b->data, a->len);
}

/* Insert a member in its place, unless its name exists already. */
static void
add_member(Tree *tree, const StringInfoData *name, Tree *value)
{
	int			i = 0;
	int			cmp = 1;

	while (i < tree->n && (cmp = compare_names(&tree->names[i], name)) < 0)
		i++;
	if (i < tree->n && cmp == 0)
		return;
	memmove(tree->names + i + 1, tree->names + i, (tree->n - i) * sizeof(*tree->names));
	memmove(tree->values + i + 1, tree->values + i, (tree->n - i) * sizeof(*tree->values));
	tree->names[i] = *name;
	tree->values[i] = value;
	tree->n++;
}

static Tree *
make_tree(Bytes *bytes, bool object, int depth)
{
	Tree	   *tree = palloc0(sizeof(Tree));
	uint8		byte = next_byte(bytes);
	int			n;

	tree->type = object ? TREE_OBJECT : (TreeType) (byte % 7);
	if (depth >= MAX_DEPTH && tree->type >= TREE_ARRAY)
		tree->type = TREE_NULL;

	/* a deep value needs few bytes: most containers have one element */
	n = byte / 7 % 8;
	switch (tree->type)
	{
		case TREE_NUMBER:
			tree->negative = (n & 1) != 0;
			tree->exponent = (int) next_byte(bytes) % 60 - 30;
			if (n == 7)
				tree->exponent *= 40;
			n = 1 + next_byte(bytes) % 20;
			for (int i = 0; i < n; i++)
				tree->digits[i] = '0' + next_byte(bytes) % 10;
			break;
		case TREE_STRING:
			initStringInfo(&tree->text);
			take_string(bytes, &tree->text);
			break;
		case TREE_ARRAY:
		case TREE_OBJECT:
			tree->values = palloc(8 * sizeof(Tree *));
			tree->names = palloc(8 * sizeof(StringInfoData));
			for (int i = 0; i < n; i++)
			{
				if (tree->type == TREE_ARRAY)
					tree->values[tree->n++] = make_tree(bytes, false, depth + 1);
				else
				{
					uint8		which = next_byte(bytes);
					StringInfoData name;

					initStringInfo(&name);
					if (which % 4 == 0)
						take_string(bytes, &name);
					else
						appendStringInfoString(&name, names[which / 4 % lengthof(names)]);
					add_member(tree, &name, make_tree(bytes, false, depth + 1));
				}
			}
			break;
		default:
			break;
	}
	return tree;
}

/* Take a value from the bytes: any, or an object. */
Tree *
tree_from_bytes(Bytes *bytes, bool object)
{
	return make_tree(bytes, object, 1);
}

/* A copy without the members of this name. */
Tree *
tree_without(const Tree *tree, const char *name)
{
	Tree	   *result = palloc(sizeof(Tree));

	*result = *tree;
	if (tree->type != TREE_OBJECT)
		return result;
	result->values = palloc(8 * sizeof(Tree *));
	result->names = palloc(8 * sizeof(StringInfoData));
	result->n = 0;
	for (int i = 0; i < tree->n; i++)
	{
		if (strcmp(tree->names[i].data, name) != 0)
			add_member(result, &tree->names[i], tree->values[i]);
	}
	return result;
}

/*
 * Change the leaf of this number a little; *leaf counts down.  Returns false if
 * there are fewer.
 */
bool
tree_change(Tree *tree, int *leaf)
{
	if (tree->type >= TREE_ARRAY && tree->n > 0)
	{
		for (int i = 0; i < tree->n; i++)
		{
			if (tree_change(tree->values[i], leaf))
				return true;
		}
		return false;
	}
	if ((*leaf)-- > 0)
		return false;
	switch (tree->type)
	{
		case TREE_NULL:
		case TREE_TRUE:
			tree->type = TREE_FALSE;
			break;
		case TREE_FALSE:
			tree->type = TREE_TRUE;
			break;
		case TREE_NUMBER:
			if (tree->exponent % 2 == 0)
				tree->exponent++;
			else
				tree->negative = !tree->negative;
			break;
		case TREE_STRING:
			appendStringInfoChar(&tree->text, 'a');
			break;
		case TREE_ARRAY:
			tree->type = TREE_OBJECT;
			break;
		case TREE_OBJECT:
			tree->type = TREE_ARRAY;
			break;
	}
	return true;
}

/*
 * Move what follows an array within an array into the inner one.  Returns false
 * if there is no such place.
 */
bool
tree_regroup(Tree *tree)
{
	for (int i = 0; tree->type >= TREE_ARRAY && i < tree->n; i++)
	{
		Tree	   *inner = tree->values[i];

		if (tree->type == TREE_ARRAY && inner->type == TREE_ARRAY && inner->n < 7 && i + 1 < tree->n)
		{
			inner->values[inner->n++] = tree->values[i + 1];
			tree->n--;
			memmove(tree->values + i + 1, tree->values + i + 2, (tree->n - i - 1) * sizeof(*tree->values));
			return true;
		}
		if (tree_regroup(inner))
			return true;
	}
	return false;
}

static void
write_string(StringInfo out, const StringInfoData *text, Spelling spelling)
{
	if (spelling == SPELL_PLAIN)
	{
		escape_json(out, text->data);
		return;
	}

	/* every character by its number */
	appendStringInfoChar(out, '"');
	for (const unsigned char *p = (const unsigned char *) text->data; *p != '\0'; p += pg_utf_mblen(p))
	{
		pg_wchar	c = utf8_to_unicode(p);

		if (c >= 0x10000)
			appendStringInfo(out, "\\u%04x\\u%04X", 0xd800 + ((c - 0x10000) >> 10), 0xdc00 + ((c - 0x10000) & 0x3ff));
		else
			appendStringInfo(out, "\\u%04x", c);
	}
	appendStringInfoChar(out, '"');
}

static void
write_tree(StringInfo out, const Tree *tree, Spelling spelling)
{
	const char *digits;

	switch (tree->type)
	{
		case TREE_NULL:
			appendStringInfoString(out, "null");
			break;
		case TREE_TRUE:
			appendStringInfoString(out, "true");
			break;
		case TREE_FALSE:
			appendStringInfoString(out, "false");
			break;
		case TREE_NUMBER:
			if (tree->negative)
				appendStringInfoChar(out, '-');
			digits = tree->digits + strspn(tree->digits, "0");
			if (*digits == '\0')
				digits--;
			if (spelling == SPELL_PLAIN)
				appendStringInfo(out, "%se%d", digits, tree->exponent);
			else
				appendStringInfo(out, "%c.%s00E%+d", digits[0], digits + 1,
								 tree->exponent + (int) strlen(digits) - 1);
			break;
		case TREE_STRING:
			write_string(out, &tree->text, spelling);
			break;
		case TREE_ARRAY:
			appendStringInfoChar(out, '[');
			for (int i = 0; i < tree->n; i++)
			{
				if (i > 0)
					appendStringInfoString(out, spelling == SPELL_PLAIN ? "," : " ,\n");
				write_tree(out, tree->values[i], spelling);
			}
			appendStringInfoChar(out, ']');
			break;
		case TREE_OBJECT:
			appendStringInfoChar(out, '{');
			for (int i = 0; i < tree->n; i++)
			{
				int			m = spelling == SPELL_PLAIN ? i : tree->n - 1 - i;

				if (i > 0)
					appendStringInfoString(out, spelling == SPELL_PLAIN ? "," : "\t, ");
				write_string(out, &tree->names[m], spelling);
				appendStringInfoChar(out, ':');
				write_tree(out, tree->values[m], spelling);
			}
			appendStringInfoChar(out, '}');
			break;
	}
}

Jsonb *
tree_to_jsonb(const Tree *tree, Spelling spelling)
{
	StringInfoData out;

	initStringInfo(&out);
	write_tree(&out, tree, spelling);
	return DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(out.data)));
}

/* The input itself as JSON, or NULL. */
Jsonb *
jsonb_from_text(const char *data, size_t size)
{
	MemoryContext context = CurrentMemoryContext;
	char	   *text = pnstrdup(data, size);
	Jsonb	   *volatile json = NULL;

	if (strlen(text) != size || pg_encoding_verifymbstr(PG_UTF8, text, (int) size) != (int) size)
		return NULL;
	PG_TRY();
	{
		json = DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(text)));
	}
	PG_CATCH();
	{
		MemoryContextSwitchTo(context);
		FlushErrorState();
	}
	PG_END_TRY();
	return json;
}
