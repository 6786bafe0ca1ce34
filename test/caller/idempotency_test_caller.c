/*-------------------------------------------------------------------------
 *
 * idempotency_test_caller.c
 *	  A caller of Stripe for tests: uses the recorder as stripe_call() does.
 *
 * Its Stripe is the file "arrivals" in the data directory: each request that
 * arrives is a line with its idempotency key.  Stripe would execute each key
 * once.
 *
 * test/caller/idempotency_test_caller.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "fmgr.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"

#include "compat.h"
#include "debug_point.h"
#include "recorder.h"
#include "settle.h"

PG_MODULE_MAGIC;

PGDLLEXPORT Datum test_stripe_call(PG_FUNCTION_ARGS);
PGDLLEXPORT Datum test_note_fates(PG_FUNCTION_ARGS);

PG_FUNCTION_INFO_V1(test_stripe_call);
PG_FUNCTION_INFO_V1(test_note_fates);

static void
send_request(const StripeCallClaim *claim)
{
	FILE	   *file = fopen("arrivals", "a");

	if (file == NULL)
		elog(ERROR, "could not open file \"arrivals\": %m");
	fprintf(file, "%s\n", claim->idempotency_key);
	fclose(file);
}

static char *
describe(const StripeCallClaim *claim, const char *outcome)
{
	return psprintf("%s %s %s attempt %d generation %d %s %s %s",
					stripe_verdict_name(claim->verdict), outcome,
					claim->resource_id != NULL ? claim->resource_id : "-",
					claim->attempt, claim->generation,
					claim->method != NULL ? claim->method : "-",
					claim->path != NULL ? claim->path : "-",
					claim->body != NULL ? text_to_cstring((text *) claim->body) : "-");
}

/*
 * test_stripe_call(type, id, body, status, resource_id, room, resend, answer)
 *
 * status 200 and 402 are recorded as such, 0 as no answer, -1 as nothing sent;
 * the answer's body has a text of that length.
 */
Datum
test_stripe_call(PG_FUNCTION_ARGS)
{
	StripeCall	call;
	StripeCallClaim claim;
	StripeCallResult result;
	int			status = PG_GETARG_INT32(3);
	int			answer = PG_NARGS() > 7 ? PG_GETARG_INT32(7) : 0;

	memset(&call, 0, sizeof(call));
	call.operation_type = text_to_cstring(PG_GETARG_TEXT_PP(0));
	call.operation_id = text_to_cstring(PG_GETARG_TEXT_PP(1));
	call.account = "";
	call.method = "POST";
	call.path = "/v1/payment_intents";
	call.api_version = "2026-01-01.test";
	call.body = DatumGetByteaP(PG_GETARG_DATUM(2));
	call.request = DatumGetJsonbP(DirectFunctionCall1(jsonb_in,
													  CStringGetDatum(psprintf("{\"body\": \"%s\"}", text_to_cstring(PG_GETARG_TEXT_PP(2))))));
	call.livemode = 0;
	call.answer_room = PG_GETARG_INT32(5);
	call.resend = PG_GETARG_BOOL(6);

	DEBUG_POINT("call-begins");
	recorder_claim(&call, &claim);
	if (claim.verdict != STRIPE_CLAIMED)
		PG_RETURN_TEXT_P(cstring_to_text(describe(&claim, claim.outcome)));

	DEBUG_POINT("call-claimed");
	memset(&result, 0, sizeof(result));
	result.livemode = -1;
	if (status >= 0)
	{
		recorder_sending();
		DEBUG_POINT("call-sending");
		send_request(&claim);
		result.sent = true;
		DEBUG_POINT("call-sent");
	}

	if (status == 200)
	{
		char	   *padding = palloc(answer + 1);

		memset(padding, 'x', answer);
		padding[answer] = '\0';
		result.outcome = STRIPE_COMPLETED;
		result.http_status = 200;
		result.resource_type = "payment_intent";
		result.resource_id = PG_ARGISNULL(4) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(4));
		result.response = DatumGetJsonbP(DirectFunctionCall1(jsonb_in,
															 CStringGetDatum(psprintf("{\"object\": \"payment_intent\", \"text\": \"%s\"}", padding))));
		result.livemode = 0;
	}
	else if (status == 402)
	{
		result.outcome = STRIPE_FAILED;
		result.http_status = 402;
	}
	else
		result.outcome = status < 0 ? STRIPE_NOT_EXECUTED : STRIPE_UNKNOWN;

	claim.resource_id = unconstify(char *, result.resource_id);
	PG_RETURN_TEXT_P(cstring_to_text(describe(&claim, recorder_record(&result))));
}

/*
 * test_note_fates(max_rows): how many rows settle_calls() tries to do something
 * about until it is through, so many in one go.
 */
Datum
test_note_fates(PG_FUNCTION_ARGS)
{
	LedgerCursor cursor;
	SettleBatch batch;
	int			total = 0;

	memset(&cursor, 0, sizeof(cursor));
	memset(&batch, 0, sizeof(batch));
	batch.max_rows = PG_GETARG_INT32(0);
	batch.cursor = &cursor;
	do
	{
		settle_calls(&batch);
		total += batch.seen;
	} while (!batch.finished);
	PG_RETURN_INT32(total);
}
