/*-------------------------------------------------------------------------
 *
 * backend.c
 *	  Fuzz targets that need a server around them: jsonb, palloc, ereport.
 *
 * jsonb's code cannot be linked outside of the server, so the fuzzer runs
 * inside one.  This is a library with the targets, the extension's files that
 * they test, and libFuzzer; test/fuzz/run makes a single-user server load it
 * and call its one SQL function.
 *
 *	fuzz(target text, arguments text[])
 *
 * The arguments are libFuzzer's, or without LIBFUZZER seconds, directory, seed.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * test/fuzz/backend.c
 *
 *-------------------------------------------------------------------------
 */
#include "backend.h"

#include "fmgr.h"
#include "mb/pg_wchar.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/memutils.h"

#include "catalog/pg_type_d.h"

/* the magic block is that of http.c, which answer.c includes */
PG_FUNCTION_INFO_V1(fuzz);

extern int	LLVMFuzzerRunDriver(int *argc, char ***argv, FuzzTarget target);

const char *const fuzz_tokens[] = {
	"{\"a\": 1}", "{\"error\": {\"type\": \"card_error\"}}", "idempotency_key_in_use", "\"id\": \"pi_1\"", "[", "{", "}",
	"HTTP/1.1 200 OK\r\n", "Request-Id: req_1\r\n", "Stripe-Should-Retry: true\r\n", "Idempotent-Replayed: true\r\n",
	"\r\n\r\n", "\\u0000", "1e131071", "1e-16383", "\\ud800", "lock_timeout", "idempotency_error", "\"livemode\": true",
	"\\udc00", "\\u0041", "1e131072", "-0.0e-99999999999", "true", "null", "[[", "]]", ",", ":", "\"\\\\\"",
	"rate_limit", "HTTP/1.1 409 Conflict\r\n", "\"params\": ", "\xff", NULL
};

static const struct
{
	const char *name;
	FuzzTarget	run;
}			targets[] = {

	{"form", fuzz_form},
	{"fingerprint", fuzz_fingerprint},
	{"answer", fuzz_answer},
	{"json_text", fuzz_json_text}
};

static FuzzTarget chosen;
static MemoryContext context;

static int
run_one(const uint8 *data, size_t size)
{
	MemoryContext before = MemoryContextSwitchTo(context);

	PG_TRY();
	{
		chosen(data, size);
	}
	PG_CATCH();
	{
		EmitErrorReport();
		CHECK(!"the target has raised an error");
	}
	PG_END_TRY();

	MemoryContextSwitchTo(before);
	MemoryContextReset(context);
	return 0;
}

/* fuzz(target, arguments) */
Datum
fuzz(PG_FUNCTION_ARGS)
{
	char	   *name = text_to_cstring(PG_GETARG_TEXT_PP(0));
	Datum	   *arguments;
	int			n;
	char	  **argv;

	CHECK(GetDatabaseEncoding() == PG_UTF8);
	for (size_t i = 0; i < lengthof(targets); i++)
	{
		if (strcmp(targets[i].name, name) == 0)
			chosen = targets[i].run;
	}
	if (chosen == NULL)
		elog(ERROR, "there is no target \"%s\"", name);
	context = AllocSetContextCreate(TopMemoryContext, "fuzz", ALLOCSET_DEFAULT_SIZES);

	deconstruct_array(PG_GETARG_ARRAYTYPE_P(1), TEXTOID, -1, false, TYPALIGN_INT, &arguments, NULL, &n);
	argv = palloc0((n + 2) * sizeof(char *));
	argv[0] = name;
	for (int i = 0; i < n; i++)
		argv[i + 1] = TextDatumGetCString(arguments[i]);
	n++;

#ifdef LIBFUZZER
	LLVMFuzzerRunDriver(&n, &argv, run_one);
#else
	CHECK(n == 4);
	fuzz_at_random(run_one, atoi(argv[1]), argv[2], strtoull(argv[3], NULL, 10));
#endif
	PG_RETURN_VOID();
}
