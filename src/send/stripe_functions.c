/*-------------------------------------------------------------------------
 *
 * stripe_functions.c
 *	  SQL functions for the calls that an application sends to Stripe.
 *
 * The work is done in stripe_ledger.c; here are arguments and results, and the
 * decision who commits it.  What stripe_claim() and stripe_reopen() note must
 * be committed before anything is sent, so the recorder does it where there is
 * one.  Where none can run they commit with the caller, and must be a statement
 * of their own.  stripe_record() and its like belong to the caller's
 * transaction, with the rows that go with them.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/send/stripe_functions.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"

#include "base/arguments.h"
#include "base/compat.h"
#include "base/errors.h"
#include "base/result_row.h"
#include "base/settings.h"
#include "calls/stripe_claim.h"
#include "calls/stripe_record.h"
#include "events/kept_events.h"
#include "process/recorder_client.h"

PG_FUNCTION_INFO_V1(idempotency_stripe_idempotency_key);
PG_FUNCTION_INFO_V1(idempotency_stripe_claim);
PG_FUNCTION_INFO_V1(idempotency_stripe_record);
PG_FUNCTION_INFO_V1(idempotency_stripe_release);
PG_FUNCTION_INFO_V1(idempotency_stripe_extend);
PG_FUNCTION_INFO_V1(idempotency_stripe_reopen);
PG_FUNCTION_INFO_V1(idempotency_stripe_lookup);

/* Columns of stripe_claim_result. */
enum
{
	C_VERDICT, C_OUTCOME, C_IDEMPOTENCY_KEY, C_TOKEN, C_ATTEMPT, C_GENERATION,
	C_REQUEST, C_RESOURCE_ID, C_RESOURCE_TYPE, C_HTTP_STATUS, C_RESPONSE, C_ERROR,
	C_RETRY_AFTER, C_RESEND_UNTIL, C_LIVEMODE, C_RESOURCE_STATUS, C_NCOLUMNS
};

/* Columns of stripe_key_info. */
enum
{
	I_ACCOUNT, I_OPERATION_TYPE, I_OPERATION_ID, I_IDEMPOTENCY_KEY, I_GENERATION,
	I_ATTEMPT, I_OUTCOME, I_REQUEST, I_RESOURCE_ID, I_RESOURCE_TYPE, I_HTTP_STATUS,
	I_RESPONSE, I_ERROR, I_REQUEST_ID, I_LIVEMODE, I_CREATED_AT, I_CLAIMED_AT,
	I_LEASE_EXPIRES_AT, I_LAPSED, I_FIRST_SENT_AT, I_RESEND_UNTIL, I_RECORDED_AT,
	I_HISTORY, I_METHOD, I_PATH, I_API_VERSION, I_SETTLED, I_ACKNOWLEDGED,
	I_RECONCILED, I_RESOURCE_STATUS, I_NCOLUMNS
};

/* The arguments that name an operation. */
static void
get_operation(Operation *op, FunctionCallInfo fcinfo, int account_argno)
{
	text	   *type = argument_text(fcinfo, 0, "operation_type");
	text	   *id = argument_text(fcinfo, 1, "operation_id");
	text	   *account = argument_text(fcinfo, account_argno, "account");

	operation_init(op, text_to_cstring(type), text_to_cstring(id), text_to_cstring(account));
}

/*
 * Who commits?  Returns true for the recorder.  What is committed with the
 * caller's transaction isn't known to survive it, and a key must be known
 * before anything is sent with it.
 */
static bool
commits_by_recorder(const char *function)
{
	if (setting_stripe_ledger == STRIPE_LEDGER_RECORDER)
	{
		if (recorder_can_run())
		{
			PreventCommandIfReadOnly(function);
			return true;
		}
		if (IsTransactionBlock() || IsSubTransaction())
			ereport(ERROR,
					(errcode(ERRCODE_NOT_IN_TRANSACTION),
					 errmsg("%s cannot run inside a transaction block", function),
					 errdetail("What it notes must be committed before anything is sent to Stripe, and this transaction may still roll back."),
					 errhint("Add \"idempotency\" to shared_preload_libraries and restart the server, so that a process of its own can commit it; or run it as a statement of its own.")));
	}

	/* whatever synchronous_commit says: committed means on disk */
	ForceSyncCommit();
	return false;
}

static void
copy_column(ResultRow *result, int column, StripeClaim *claim, int source)
{
	result_copy(result, column, claim->row.values[source], claim->row.isnull[source]);
}

/*
 * stripe_claim(operation_type, operation_id, request, account, lease)
 */
Datum
idempotency_stripe_claim(PG_FUNCTION_ARGS)
{
	static const int sized[] = {2};
	static const int recorded[][2] = {
		{C_RESOURCE_ID, S_RESOURCE_ID}, {C_RESOURCE_TYPE, S_RESOURCE_TYPE},
		{C_HTTP_STATUS, S_HTTP_STATUS}, {C_RESPONSE, S_RESPONSE}, {C_ERROR, S_ERROR},
		{C_LIVEMODE, S_LIVEMODE}, {C_RESOURCE_STATUS, S_RESOURCE_STATUS}
	};
	Operation	op;
	StripeClaim claim;
	Duration	lease;
	ResultRow	result;
	int			i;

	PreventCommandDuringRecovery("idempotency.stripe_claim()");

	get_operation(&op, fcinfo, 3);
	lease = argument_duration(fcinfo, 4, "lease");
	check_size(fcinfo, sized, lengthof(sized), "request");

	memset(&claim, 0, sizeof(claim));
	claim.op = &op;
	claim.rules = stripe_rules();
	claim.request = argument_object(fcinfo, 2, "request");
	claim.lease = lease.given ? lease.usecs : (int64) setting_stripe_lease * USECS_PER_SEC;
	claim.send.livemode = LIVEMODE_UNKNOWN;

	if (commits_by_recorder("idempotency.stripe_claim()"))
		recorder_run_claim(&claim);
	else
	{
		Relation	rel = ledger_open(&stripe_calls, RowExclusiveLock, false);

		stripe_claim_init(&claim);
		claim.base.wait = true;
		settle_or_claim(&claim, rel);
		if (claim.verdict == STRIPE_CLAIMED)
			stripe_claim_fetch(&claim, rel);
		ledger_close(rel);
	}

	stripe_advise_reopen(&claim);

	result_begin(&result, fcinfo, C_NCOLUMNS);
	result_set_enum(&result, C_VERDICT, stripe_verdict_name(claim.verdict));
	result_set_enum(&result, C_OUTCOME, stripe_outcome_name(claim.outcome));
	if (claim.verdict == STRIPE_CLAIMED)
		result_set(&result, C_TOKEN, Int64GetDatum(claim.token));
	if (claim.verdict == STRIPE_BUSY)
		result_set(&result, C_RETRY_AFTER, Int32GetDatum(claim.retry_after));
	if (claim.known)
	{
		TimestampTz until = stripe_resend_until(&claim.row, claim.rules.resend_margin);

		copy_column(&result, C_IDEMPOTENCY_KEY, &claim, S_IDEMPOTENCY_KEY);
		copy_column(&result, C_ATTEMPT, &claim, S_ATTEMPT);
		copy_column(&result, C_GENERATION, &claim, S_GENERATION);
		copy_column(&result, C_REQUEST, &claim, S_REQUEST);
		if (until != 0)
			result_set(&result, C_RESEND_UNTIL, TimestampTzGetDatum(until));
		if (claim.verdict != STRIPE_CLAIMED)
		{
			for (i = 0; i < lengthof(recorded); i++)
				copy_column(&result, recorded[i][0], &claim, recorded[i][1]);
		}
	}

	PG_RETURN_DATUM(result_end(&result));
}

/*
 * stripe_record(operation_type, operation_id, token, resource_id, response,
 *				 http_status, request_id, account)
 */
Datum
idempotency_stripe_record(PG_FUNCTION_ARGS)
{
	static const int sized[] = {4};
	Operation	op;
	int64		token;
	Jsonb	   *response;
	int			http_status;
	CallResult	result;
	Relation	rel;
	StripeOutcome outcome;

	PreventCommandDuringRecovery("idempotency.stripe_record()");

	token = argument_token(fcinfo, 2);
	get_operation(&op, fcinfo, 7);
	check_size(fcinfo, sized, lengthof(sized), "response");
	if (!PG_ARGISNULL(3))
		check_label(VARDATA_ANY(PG_GETARG_TEXT_PP(3)), VARSIZE_ANY_EXHDR(PG_GETARG_TEXT_PP(3)),
					false, "resource_id");
	if (!PG_ARGISNULL(6))
		check_label(VARDATA_ANY(PG_GETARG_TEXT_PP(6)), VARSIZE_ANY_EXHDR(PG_GETARG_TEXT_PP(6)),
					false, "request_id");
	response = argument_object(fcinfo, 4, "response");
	http_status = PG_ARGISNULL(5) ? 0 : argument_http_status(fcinfo, 5, "http_status");

	rel = ledger_open(&stripe_calls, RowExclusiveLock, false);
	stripe_read_answer_of(rel, &op, token, response, http_status,
						  PG_ARGISNULL(3) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(3)), &result);
	if (!PG_ARGISNULL(6))
		result.request_id = text_to_cstring(PG_GETARG_TEXT_PP(6));
	outcome = stripe_record_run(rel, &op, token, &result, true);
	ledger_close(rel);

	PG_RETURN_DATUM(enum_datum(get_func_rettype(fcinfo->flinfo->fn_oid),
							   stripe_outcome_name(outcome)));
}

/*
 * stripe_release(operation_type, operation_id, token, account): nothing was
 * sent.
 */
Datum
idempotency_stripe_release(PG_FUNCTION_ARGS)
{
	Operation	op;
	int64		token;
	Relation	rel;
	int			races = 0;

	PreventCommandDuringRecovery("idempotency.stripe_release()");

	token = argument_token(fcinfo, 2);
	get_operation(&op, fcinfo, 3);

	rel = ledger_open(&stripe_calls, RowExclusiveLock, false);
	while (!stripe_release_run(rel, &op, token))
	{
		stripe_explain_refusal(rel, &op, token);
		ledger_lost_race(&stripe_calls, &races);
	}
	ledger_close(rel);

	PG_RETURN_BOOL(true);
}

/*
 * stripe_extend(operation_type, operation_id, token, lease, account)
 */
Datum
idempotency_stripe_extend(PG_FUNCTION_ARGS)
{
	Operation	op;
	int64		token;
	Duration	lease;
	Relation	rel;
	TimestampTz lease_expires_at;
	TimestampTz now;
	int			races = 0;

	PreventCommandDuringRecovery("idempotency.stripe_extend()");

	token = argument_token(fcinfo, 2);
	lease = argument_duration(fcinfo, 3, "lease");
	get_operation(&op, fcinfo, 4);

	rel = ledger_open(&stripe_calls, RowExclusiveLock, false);
	for (;;)
	{
		now = GetCurrentTimestamp();
		lease_expires_at = stripe_extend_run(rel, &op, token, lease.given ? lease.usecs : 0, now);
		if (lease_expires_at != 0)
			break;
		stripe_explain_refusal(rel, &op, token);
		ledger_lost_race(&stripe_calls, &races);
	}
	if (ledger_has_waited(&now))
	{
		/* the row is this transaction's now, so that once more is at once */
		lease_expires_at = stripe_extend_run(rel, &op, token, lease.given ? lease.usecs : 0, now);
		if (lease_expires_at == 0)
			elog(ERROR, "lost a row that this transaction has changed");
	}
	ledger_close(rel);

	PG_RETURN_TIMESTAMPTZ(lease_expires_at);
}

/*
 * stripe_reopen(operation_type, operation_id, account, force, from_generation)
 */
Datum
idempotency_stripe_reopen(PG_FUNCTION_ARGS)
{
	Operation	op;
	bool		force;
	int			from_generation;
	const char *user;
	char	   *key;

	PreventCommandDuringRecovery("idempotency.stripe_reopen()");

	get_operation(&op, fcinfo, 2);
	force = argument_bool(fcinfo, 3, "force");
	from_generation = PG_ARGISNULL(4) ? 0 : PG_GETARG_INT32(4);
	if (!PG_ARGISNULL(4) && from_generation < 1)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("from_generation must be at least 1")));
	user = GetUserNameFromId(GetSessionUserId(), false);

	if (commits_by_recorder("idempotency.stripe_reopen()"))
		key = recorder_run_reopen(&op, force, from_generation, user);
	else
	{
		Relation	rel = ledger_open(&stripe_calls, RowExclusiveLock, false);

		key = stripe_reopen_run(rel, &op, force, from_generation, user);
		ledger_close(rel);
	}

	PG_RETURN_TEXT_P(cstring_to_text(key));
}

/* ---------- display ---------- */

/*
 * stripe_idempotency_key(operation_type, operation_id, account)
 */
Datum
idempotency_stripe_idempotency_key(PG_FUNCTION_ARGS)
{
	Operation	op;
	LedgerRow	row;

	get_operation(&op, fcinfo, 2);
	if (ledger_lookup(&stripe_calls, op.key, &row))
		PG_RETURN_DATUM(row.values[S_IDEMPOTENCY_KEY]);

	PG_RETURN_TEXT_P(cstring_to_text(derive_stripe_key(op.ns.value, NAMESPACE_LEN, op.account,
													   op.type, op.id, 1)));
}

/*
 * stripe_lookup(operation_type, operation_id, account)
 */
Datum
idempotency_stripe_lookup(PG_FUNCTION_ARGS)
{
	static const struct
	{
		int			column;
		int			source;
	}			copied[] = {
		{I_ACCOUNT, S_ACCOUNT}, {I_OPERATION_TYPE, S_OPERATION_TYPE},
		{I_OPERATION_ID, S_OPERATION_ID}, {I_IDEMPOTENCY_KEY, S_IDEMPOTENCY_KEY},
		{I_GENERATION, S_GENERATION}, {I_ATTEMPT, S_ATTEMPT},
		{I_REQUEST, S_REQUEST}, {I_RESOURCE_ID, S_RESOURCE_ID},
		{I_RESOURCE_TYPE, S_RESOURCE_TYPE}, {I_HTTP_STATUS, S_HTTP_STATUS},
		{I_RESPONSE, S_RESPONSE}, {I_ERROR, S_ERROR}, {I_REQUEST_ID, S_REQUEST_ID},
		{I_LIVEMODE, S_LIVEMODE}, {I_CREATED_AT, S_CREATED_AT},
		{I_CLAIMED_AT, S_CLAIMED_AT}, {I_LEASE_EXPIRES_AT, S_LEASE_EXPIRES_AT},
		{I_FIRST_SENT_AT, S_FIRST_SENT_AT}, {I_RECORDED_AT, S_RECORDED_AT},
		{I_HISTORY, S_HISTORY}, {I_METHOD, S_METHOD}, {I_PATH, S_PATH},
		{I_API_VERSION, S_API_VERSION}, {I_SETTLED, S_SETTLED},
		{I_ACKNOWLEDGED, S_ACKNOWLEDGED}, {I_RECONCILED, S_RECONCILED},
		{I_RESOURCE_STATUS, S_RESOURCE_STATUS}
	};
	Operation	op;
	LedgerRow	row;
	ResultRow	result;
	StripeOutcome outcome;
	TimestampTz until;
	int			i;

	get_operation(&op, fcinfo, 2);
	if (!ledger_lookup(&stripe_calls, op.key, &row))
		PG_RETURN_NULL();

	result_begin(&result, fcinfo, I_NCOLUMNS);
	for (i = 0; i < lengthof(copied); i++)
		result_copy(&result, copied[i].column, row.values[copied[i].source],
					row.isnull[copied[i].source]);
	outcome = stripe_row_outcome(&row);
	result_set_enum(&result, I_OUTCOME, stripe_outcome_name(outcome));
	if (outcome == STRIPE_IN_PROGRESS)
		result_set(&result, I_LAPSED,
				   BoolGetDatum(!stripe_row_is_held(&row, GetCurrentTimestamp())));
	until = stripe_resend_until(&row, stripe_rules().resend_margin);
	if (until != 0)
		result_set(&result, I_RESEND_UNTIL, TimestampTzGetDatum(until));

	PG_RETURN_DATUM(result_end(&result));
}
