/*-------------------------------------------------------------------------
 *
 * idempotency_test_caller.c
 *	  A caller of Stripe for tests: uses the recorder as stripe_call() does.
 *
 * Its Stripe is the file "arrivals" in the data directory: each request that
 * arrives is a line with its idempotency key.  Stripe would execute each key
 * once.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * test/caller/idempotency_test_caller.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <unistd.h>

#include "fmgr.h"
#include "miscadmin.h"
#include "postmaster/bgworker.h"
#include "storage/latch.h"
#include "tcop/tcopprot.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/wait_event.h"

#include "base/compat.h"
#include "base/debug_point.h"
#include "events/call_sweep.h"
#include "process/recorder_client.h"

PG_MODULE_MAGIC;

PGDLLEXPORT Datum test_stripe_call(PG_FUNCTION_ARGS);
PGDLLEXPORT Datum test_note_fates(PG_FUNCTION_ARGS);
PGDLLEXPORT Datum test_occupy_workers(PG_FUNCTION_ARGS);
PGDLLEXPORT void test_occupier_main(Datum arg);

PG_FUNCTION_INFO_V1(test_stripe_call);
PG_FUNCTION_INFO_V1(test_note_fates);
PG_FUNCTION_INFO_V1(test_occupy_workers);

#define OCCUPIED "debug_points/occupied"

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
describe(const StripeCallClaim *claim, StripeOutcome outcome)
{
	return psprintf("%s %s %s attempt %d generation %d %s %s %s",
					stripe_verdict_name(claim->verdict), stripe_outcome_name(outcome),
					claim->result.resource_id != NULL ? claim->result.resource_id : "-",
					claim->attempt, claim->generation,
					claim->send.method != NULL ? claim->send.method : "-",
					claim->send.path != NULL ? claim->send.path : "-",
					claim->send.body != NULL ? text_to_cstring((text *) claim->send.body) : "-");
}

/*
 * test_stripe_call(type, id, body, status, resource_id, room, resend, answer)
 *
 * A status of 200 or 402 is recorded as such, 0 as no answer, and -1 as nothing
 * sent; "answer" is the length of a text in the answer's body.
 */
Datum
test_stripe_call(PG_FUNCTION_ARGS)
{
	Operation	op;
	StripeCall	call;
	StripeCallClaim claim;
	CallResult	result;
	int			status = PG_GETARG_INT32(3);
	int			answer = PG_NARGS() > 7 ? PG_GETARG_INT32(7) : 0;

	memset(&call, 0, sizeof(call));
	operation_init(&op, text_to_cstring(PG_GETARG_TEXT_PP(0)),
				   text_to_cstring(PG_GETARG_TEXT_PP(1)), "");
	call.op = &op;
	call.send.method = "POST";
	call.send.path = "/v1/payment_intents";
	call.send.api_version = "2026-01-01.test";
	call.send.body = DatumGetByteaP(PG_GETARG_DATUM(2));
	call.request = DatumGetJsonbP(DirectFunctionCall1(jsonb_in,
													  CStringGetDatum(psprintf("{\"body\": \"%s\"}", text_to_cstring(PG_GETARG_TEXT_PP(2))))));
	call.send.livemode = LIVEMODE_TEST;
	call.answer_room = PG_GETARG_INT32(5);
	call.resend = PG_GETARG_BOOL(6);

	DEBUG_POINT("call-begins");
	recorder_claim(&call, &claim);
	if (claim.verdict != STRIPE_CLAIMED)
		PG_RETURN_TEXT_P(cstring_to_text(describe(&claim, claim.result.outcome)));

	DEBUG_POINT("call-claimed");
	memset(&result, 0, sizeof(result));
	result.livemode = LIVEMODE_UNKNOWN;
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
		result.livemode = LIVEMODE_TEST;
	}
	else if (status == 402)
	{
		result.outcome = STRIPE_FAILED;
		result.http_status = 402;
	}
	else
		result.outcome = status < 0 ? STRIPE_NOT_EXECUTED : STRIPE_UNKNOWN;

	claim.result.resource_id = result.resource_id;
	PG_RETURN_TEXT_P(cstring_to_text(describe(&claim, recorder_record(&result))));
}

/*
 * test_note_fates(max_rows): call settle_calls() for so many rows at a time
 * until it is through, and return how many it tried.
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

/*
 * A background process that does nothing as long as a file exists.
 */
void
test_occupier_main(Datum arg)
{
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();
	while (access(OCCUPIED, F_OK) == 0)
	{
		CHECK_FOR_INTERRUPTS();
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 20, WAIT_EVENT_PG_SLEEP);
		ResetLatch(MyLatch);
	}
}

/*
 * test_occupy_workers(): take all free slots for background processes, and
 * return how many there were.
 */
Datum
test_occupy_workers(PG_FUNCTION_ARGS)
{
	BackgroundWorker worker;
	int			n = 0;

	memset(&worker, 0, sizeof(worker));
	worker.bgw_flags = BGWORKER_SHMEM_ACCESS;
	worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
	worker.bgw_restart_time = BGW_NEVER_RESTART;
	strlcpy(worker.bgw_library_name, "idempotency_test_caller", sizeof(worker.bgw_library_name));
	strlcpy(worker.bgw_function_name, "test_occupier_main", sizeof(worker.bgw_function_name));
	strlcpy(worker.bgw_name, "occupier", sizeof(worker.bgw_name));
	strlcpy(worker.bgw_type, "occupier", sizeof(worker.bgw_type));
	while (RegisterDynamicBackgroundWorker(&worker, NULL))
		n++;
	PG_RETURN_INT32(n);
}
