/*-------------------------------------------------------------------------
 *
 * json_tree.h
 *	  JSON values made from any bytes.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * test/fuzz/json_tree.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_FUZZ_JSON_TREE_H
#define IDEMPOTENCY_FUZZ_JSON_TREE_H

#include "fuzz.h"

#include "lib/stringinfo.h"
#include "utils/jsonb.h"

typedef enum TreeType
{
	TREE_NULL,
	TREE_TRUE,
	TREE_FALSE,
	TREE_NUMBER,
	TREE_STRING,
	TREE_ARRAY,
	TREE_OBJECT
} TreeType;

typedef struct Tree
{
	TreeType	type;
	StringInfoData text;		/* of a string, in UTF-8 */
	bool		negative;		/* a number is sign, digits, power of ten */
	char		digits[24];
	int			exponent;
	int			n;				/* members or elements */
	struct Tree **values;
	StringInfoData *names;		/* of members, no name twice, in jsonb's order */
} Tree;

/* What is left of an input; once it has ended there are zeros. */
typedef struct Bytes
{
	const uint8 *data;
	size_t		size;
} Bytes;

/* How to write down a value that has many ways to be written */
typedef enum Spelling
{
	SPELL_PLAIN,
	SPELL_OTHERWISE				/* members backwards, numbers and strings
								 * differently, white space */
} Spelling;

extern Tree *tree_from_bytes(Bytes *bytes, bool object);
extern Tree *tree_without(const Tree *tree, const char *name);
extern bool tree_change(Tree *tree, int *leaf);
extern bool tree_regroup(Tree *tree);
extern Jsonb *tree_to_jsonb(const Tree *tree, Spelling spelling);
extern Jsonb *jsonb_from_text(const char *data, size_t size);

#endif							/* IDEMPOTENCY_FUZZ_JSON_TREE_H */
