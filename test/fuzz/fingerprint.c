/*-------------------------------------------------------------------------
 *
 * fingerprint.c
 *	  Fuzz target: fingerprints of requests (src/base/fingerprint.c).
 *
 * Two values have the same fingerprint exactly if jsonb says that they are
 * equal.  One value written in two ways has one fingerprint, and ignoring
 * members gives the same as leaving them out.
 *
 * An input is any bytes (json_tree.c), or JSON if it begins with a brace.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * test/fuzz/fingerprint.c
 *
 *-------------------------------------------------------------------------
 */
#include "backend.h"

#include "base/fingerprint.h"
#include "json_tree.h"

typedef struct Fingerprint
{
	uint8		bytes[FINGERPRINT_LEN];
} Fingerprint;

static Fingerprint
compute(Jsonb *json, bool ignore)
{
	static const uint8 ns[] = "a namespace for nothing but this";
	static const char *const ignored[] = {"ig"};
	Fingerprint result;

	fingerprint_compute(json, ignored, ignore ? 1 : 0, ns, sizeof(ns), result.bytes);
	return result;
}

static bool
same(Fingerprint a, Fingerprint b)
{
	return memcmp(&a, &b, sizeof(a)) == 0;
}

/* The target, called by backend.c. */
int
fuzz_fingerprint(const uint8 *data, size_t size)
{
	Bytes		bytes = {data, size};
	Bytes		again = {data, size};
	Tree	   *tree;
	Tree	   *left;
	Tree	   *other;
	Jsonb	   *json;
	Jsonb	   *other_json;
	Fingerprint print;
	int			leaf;

	if (size > 0 && (data[0] == '{' || data[0] == '['))
	{
		const char *bar = memchr(data, '|', size);
		size_t		len = bar != NULL ? (size_t) (bar - (const char *) data) : size;

		/* two values with a bar between them */
		json = jsonb_from_text((const char *) data, len);
		if (json == NULL)
			return 0;
		print = compute(json, false);
		CHECK(same(print, compute(jsonb_from_text(JsonbToCString(NULL, &json->root, VARSIZE(json)),
												  strlen(JsonbToCString(NULL, &json->root, VARSIZE(json)))), false)));
		(void) compute(json, true);
		if (bar != NULL && (other_json = jsonb_from_text(bar + 1, size - len - 1)) != NULL)
			CHECK(same(print, compute(other_json, false)) ==
				  (compareJsonbContainers(&json->root, &other_json->root) == 0));
		return 0;
	}

	tree = tree_from_bytes(&bytes, false);
	json = tree_to_jsonb(tree, SPELL_PLAIN);
	print = compute(json, false);
	CHECK(print.bytes[0] == FINGERPRINT_VERSION);
	CHECK(same(print, compute(tree_to_jsonb(tree, SPELL_OTHERWISE), false)));

	/* ignored, and left out */
	left = tree_without(tree, "ig");
	for (int i = 0; left->type == TREE_OBJECT && i < left->n; i++)
	{
		if (strcmp(left->names[i].data, "params") == 0)
			left->values[i] = tree_without(left->values[i], "ig");
	}
	CHECK(same(compute(json, true), compute(tree_to_jsonb(left, SPELL_OTHERWISE), false)));

	/* the same values in the same order, grouped otherwise */
	other = tree_from_bytes(&again, false);
	if (tree_regroup(other))
		CHECK(!same(print, compute(tree_to_jsonb(other, SPELL_PLAIN), false)));

	/* one that differs in one place, and maybe not even there: 0 is -0 */
	leaf = size > 0 ? data[size - 1] % 8 : 0;
	if (tree_change(tree, &leaf))
	{
		other_json = tree_to_jsonb(tree, SPELL_OTHERWISE);
		CHECK(same(print, compute(other_json, false)) ==
			  (compareJsonbContainers(&json->root, &other_json->root) == 0));
	}

	/* another one, which may be equal */
	other = tree_from_bytes(&bytes, false);
	other_json = tree_to_jsonb(other, SPELL_PLAIN);
	CHECK(same(print, compute(other_json, false)) ==
		  (compareJsonbContainers(&json->root, &other_json->root) == 0));
	return 0;
}
