/*-------------------------------------------------------------------------
 *
 * json_text.c
 *	  Fuzz target: turning JSON into jsonb (src/base/json_text.c).
 *
 * The code accepts exactly what PostgreSQL's parser calls JSON.  jsonb_in()
 * accepts the result, and so does the code itself, a second time.  If
 * jsonb_in() accepts the text as it is, both results are equal.  PostgreSQL's
 * parser recurses, so it is not given what is nested too deeply.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * test/fuzz/json_text.c
 *
 *-------------------------------------------------------------------------
 */
#include "backend.h"

#include "common/jsonapi.h"
#include "fmgr.h"
#include "mb/pg_wchar.h"
#include "utils/builtins.h"

#include "base/json_text.h"
#include "json_tree.h"

#if PG_VERSION_NUM >= 170000
#define make_json_lexer(json, len) makeJsonLexContextCstringLen(NULL, json, len, PG_UTF8, false)
#else
#define make_json_lexer(json, len) makeJsonLexContextCstringLen(json, len, PG_UTF8, false)
#endif

/* An upper bound of the depth: brackets in strings count, too. */
static int
depth_at_most(const char *data, size_t size)
{
	int			depth = 0;

	for (size_t i = 0; i < size; i++)
		depth += data[i] == '[' || data[i] == '{';
	return depth;
}

/* The target, called by backend.c. */
int
fuzz_json_text(const uint8 *data, size_t size)
{
	const char *body = (const char *) data;
	char	   *copy = pnstrdup(body, size);
	bool		shallow = depth_at_most(body, size) <= JSON_DEPTH_MAX;
	char	   *text = json_text_for_jsonb(body, size);
	char	   *again;
	Jsonb	   *json;
	Jsonb	   *as_it_is;

	if (shallow)
	{
		bool		valid = pg_encoding_verifymbstr(PG_UTF8, body, size) == (int) size &&
			pg_parse_json(make_json_lexer(copy, size), &nullSemAction) == JSON_SUCCESS;

		CHECK((text != NULL) == valid);
	}
	json = json_read(body, size);
	CHECK((text != NULL) == (json != NULL));
	if (text == NULL)
		return 0;

	again = json_text_for_jsonb(text, strlen(text));
	CHECK(again != NULL && strcmp(again, text) == 0);
	CHECK(strlen(text) <= 2 * size + 2);

	if (shallow && (as_it_is = jsonb_from_text(body, size)) != NULL)
		CHECK(compareJsonbContainers(&as_it_is->root, &json->root) == 0);
	return 0;
}
