/*-------------------------------------------------------------------------
 *
 * settle_by_hand.c
 *	  Settling calls to Stripe whose outcome wasn't known, and the fate of
 *	  the transactions that made them.
 *
 * Whoever has found out what Stripe did, a person or a function that has asked
 * Stripe, settles the operation.  It happens in that transaction, on the latest
 * row, and never against something definitive that is recorded: what Stripe
 * answered stands.
 *
 * An orphan is an operation that Stripe has carried out, or may have, for
 * transactions all of which rolled back.  Acknowledging it says that somebody
 * has seen to it.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/calls/settle_by_hand.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type_d.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"

#include "base/arguments.h"
#include "base/compat.h"
#include "base/errors.h"
#include "base/result_row.h"
#include "calls/call_transactions.h"
#include "calls/settle_by_hand.h"
#include "calls/stripe_fate.h"
#include "calls/stripe_record.h"

PG_FUNCTION_INFO_V1(idempotency_stripe_settle);
PG_FUNCTION_INFO_V1(idempotency_stripe_acknowledge);

#define SETTLED_AS_MADE(value) \
	"CASE WHEN $6 OPERATOR(pg_catalog.=) 'not_executed' THEN NULL ELSE " value " END"

/*
 * $4, $5: token and outcome that were seen.  The answer that left it unknown isn't
 * replayed as that of what is known now, nor as one about another object.
 */
static OwnerStatement settle = {
	"UPDATE idempotency.stripe_idempotency_keys SET outcome = $6::idempotency.outcome,"
	" uncertain = false, recorded_at = $8,"
	" resource_id = " SETTLED_AS_MADE("COALESCE($7, resource_id)") ","
	" resource_type = " SETTLED_AS_MADE(OF_RESOURCE("resource_type", "$7", "$13")) ","
	" resource_status = " "$14" ","
	" livemode = COALESCE($15, livemode), http_status = NULL, error = $17,"
	" response = CASE WHEN $16 IS NOT NULL THEN " WITHOUT_SECRET("$16")
	" WHEN response OPERATOR(pg_catalog.?) 'error' OR $7 OPERATOR(pg_catalog.<>) resource_id"
	" THEN NULL ELSE " SETTLED_AS_MADE("response") " END,"
	" first_sent_at = CASE WHEN $6 OPERATOR(pg_catalog.=) 'not_executed' THEN NULL"
	" ELSE first_sent_at END,"
	" lease = NULL, lease_expires_at = NULL, caller_life = NULL, caller_vxid = NULL,"
	" settled = pg_catalog.jsonb_build_object('was', $9, 'by', $10, 'at', $8, 'note', $11,"
	" 'evidence', $12)"
	STRIPE_WHERE_KEY
	" AND token OPERATOR(pg_catalog.=) $4"
	" AND outcome OPERATOR(pg_catalog.=) $5::idempotency.outcome",
	17, {TEXTOID, TEXTOID, TEXTOID, INT8OID, TEXTOID, TEXTOID, TEXTOID, TIMESTAMPTZOID,
	TEXTOID, TEXTOID, TEXTOID, JSONBOID, TEXTOID, TEXTOID, BOOLOID, JSONBOID, JSONBOID}
};

static OwnerStatement acknowledge = {
	"UPDATE idempotency.stripe_idempotency_keys SET acknowledged ="
	" pg_catalog.jsonb_build_object('by', $4, 'at', $5, 'note', $6)"
	STRIPE_WHERE_KEY " AND acknowledged IS NULL",
	6, {TEXTOID, TEXTOID, TEXTOID, TEXTOID, TIMESTAMPTZOID, TEXTOID}
};

/*
 * Is exactly this recorded for good?  Raises IK002 where something else is.
 */
static bool
is_recorded_so(Operation *op, LedgerRow *row, const CallResult *result)
{
	StripeOutcome stored = stripe_recorded_outcome(row);
	char	   *resource_id = stripe_row_string(row, S_RESOURCE_ID);

	if (stored == result->outcome &&
		(result->resource_id == NULL ||
		 (resource_id != NULL && strcmp(resource_id, result->resource_id) == 0)))
		return true;
	ereport(ERROR,
			(errcode(ERRCODE_CONTRADICTS_RECORD),
			 errmsg("outcome of Stripe operation %s is recorded already",
					describe_operation(op)),
			 errdetail("It is %s, with resource %s.", stripe_outcome_name(stored),
					   resource_id == NULL ? "none" : resource_id)));
	return false;				/* keep compiler quiet */
}

/*
 * May an operation that is not recorded for good be settled so?  Raises IK002
 * if not.
 */
static void
check_settlement(Operation *op, LedgerRow *row, const CallResult *result, TimestampTz now)
{
	if (stripe_row_is_held(row, now))
		ereport(ERROR,
				(errcode(ERRCODE_CONTRADICTS_RECORD),
				 errmsg("Stripe operation %s is in progress", describe_operation(op)),
				 errhint("Wait for its outcome, or until its lease has lapsed.")));

	/* a copied database has both modes' operations, with the same keys */
	if (livemodes_differ(result->livemode, stripe_row_livemode(row)))
		ereport(ERROR,
				(errcode(ERRCODE_CONTRADICTS_RECORD),
				 errmsg("Stripe operation %s was begun in %s mode", describe_operation(op),
						stripe_row_livemode(row) == LIVEMODE_LIVE ? "live" : "test"),
				 errdetail("The response is of the other mode.")));
}

/*
 * Settle an operation that is unknown, or was never recorded.
 *
 * Returns false where exactly that is recorded already.  Raises IK002 where
 * something else is, where it is still in progress, or where the object is of the
 * other mode, and IK003 where it was never claimed.
 */
bool
settle_operation(Operation *op, const Settlement *settlement)
{
	const CallResult *result = &settlement->result;
	Relation	rel;
	int			races = 0;

	rel = ledger_open(&stripe_calls, RowExclusiveLock, false);
	for (;;)
	{
		LedgerRow	row;
		TimestampTz now;
		char	   *resource_id;
		Parameters	p;

		ledger_look_latest(&stripe_calls, rel, op->key, &row);
		now = GetCurrentTimestamp();
		if (row.found != FOUND_ROW)
			stripe_refuse_unclaimed(op);

		if (stripe_row_is_final(&row) && is_recorded_so(op, &row, result))
		{
			ledger_close(rel);
			return false;
		}
		check_settlement(op, &row, result, now);

		resource_id = stripe_row_string(&row, S_RESOURCE_ID);
		parameters_begin(&p, op->key, lengthof(op->key));
		parameter_datum(&p, row.values[S_TOKEN]);
		parameter_outcome(&p, stripe_recorded_outcome(&row));
		parameter_outcome(&p, result->outcome);
		parameter_string(&p, result->resource_id);
		parameter_timestamp(&p, now);
		parameter_outcome(&p, stripe_row_outcome(&row));
		parameter_string(&p, settlement->by);
		parameter_string(&p, settlement->note);
		parameter_pointer(&p, settlement->evidence);
		parameter_string(&p, result->resource_type);
		parameter_string(&p, result->resource_status);
		parameter_livemode(&p, result->livemode);
		parameter_pointer(&p, result->response);
		parameter_pointer(&p, result->error);
		if (ledger_execute_latest(rel, &settle, p.values, p.nulls, NULL, NULL, 0) > 0)
		{
			stripe_notify_settled(op, result->outcome, result->resource_id != NULL ?
								  result->resource_id :
								  result->outcome == STRIPE_NOT_EXECUTED ? NULL : resource_id);
			ledger_close(rel);
			return true;
		}
		ledger_lost_race(&stripe_calls, &races);
	}
}

/* The session's user, for the record. */
static const char *
session_user_name(void)
{
	return GetUserNameFromId(GetSessionUserId(), false);
}

/* The status of an answer that would have had this outcome, for the one rule. */
#define STATUS_COMPLETED	200
#define STATUS_FAILED		400

/*
 * The object that a settlement brings.  It has to say what the settlement says:
 * what an answer means is made out as for an answer that came by itself.
 */
static void
settle_with_response(Operation *op, CallResult *settled, Jsonb *response)
{
	Relation	rel;
	CallResult	result;

	if (!JB_ROOT_IS_OBJECT(response))
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("%s must be a JSON object", "response")));
	if (settled->outcome == STRIPE_NOT_EXECUTED)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("an operation that was not executed has no response")));

	rel = ledger_open(&stripe_calls, RowExclusiveLock, false);
	stripe_read_answer_of(rel, op, 0, response,
						  settled->outcome == STRIPE_FAILED ? STATUS_FAILED : STATUS_COMPLETED,
						  NULL, &result);
	ledger_close(rel);
	if (result.outcome != settled->outcome ||
		(result.error != NULL) != (settled->outcome == STRIPE_FAILED))
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("response contradicts outcome \"%s\"", stripe_outcome_name(settled->outcome)),
				 settled->outcome == STRIPE_FAILED ?
				 errhint("Of a refusal it is {\"error\": ...}, as Stripe sent it; leave it out if you do not have it.") :
				 errhint("It is the object that was made, as Stripe shows it.")));
	if (settled->resource_id != NULL && result.resource_id != NULL &&
		strcmp(settled->resource_id, result.resource_id) != 0)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("response contradicts resource_id \"%s\"", settled->resource_id),
				 errdetail("Its id is \"%s\".", result.resource_id)));

	if (settled->resource_id != NULL)
		result.resource_id = settled->resource_id;
	result.response = response;
	result.http_status = 0;
	*settled = result;
}

/* A note by a person, or NULL. */
static const char *
note_argument(FunctionCallInfo fcinfo, int argno)
{
	return PG_ARGISNULL(argno) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(argno));
}

static void
operation_arguments(Operation *op, FunctionCallInfo fcinfo, int account_argno)
{
	text	   *type = argument_text(fcinfo, 0, "operation_type");
	text	   *id = argument_text(fcinfo, 1, "operation_id");
	text	   *account = argument_text(fcinfo, account_argno, "account");

	operation_init(op, text_to_cstring(type), text_to_cstring(id), text_to_cstring(account));
}

/*
 * stripe_settle(operation_type, operation_id, outcome, resource_id, note,
 *				 account, response)
 */
Datum
idempotency_stripe_settle(PG_FUNCTION_ARGS)
{
	static const int sized[] = {6};
	Operation	op;
	Settlement	settlement;
	CallResult *result = &settlement.result;

	PreventCommandDuringRecovery("idempotency.stripe_settle()");

	operation_arguments(&op, fcinfo, 5);
	if (PG_ARGISNULL(2))
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("%s must not be null", "outcome")));
	check_size(fcinfo, sized, lengthof(sized), "response");
	memset(&settlement, 0, sizeof(settlement));
	result->livemode = LIVEMODE_UNKNOWN;
	result->outcome = stripe_outcome_by_name(enum_label(PG_GETARG_DATUM(2)));
	if (!stripe_is_definitive(result->outcome) && result->outcome != STRIPE_NOT_EXECUTED)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("outcome must be \"completed\", \"failed\" or \"not_executed\"")));
	if (!PG_ARGISNULL(3))
	{
		if (result->outcome == STRIPE_NOT_EXECUTED)
			ereport(ERROR,
					(errcode(ERRCODE_BAD_ARGUMENT),
					 errmsg("an operation that was not executed has no resource")));
		check_label(VARDATA_ANY(PG_GETARG_TEXT_PP(3)), VARSIZE_ANY_EXHDR(PG_GETARG_TEXT_PP(3)),
					false, "resource_id");
		result->resource_id = text_to_cstring(PG_GETARG_TEXT_PP(3));
	}
	if (!PG_ARGISNULL(6))
		settle_with_response(&op, result, PG_GETARG_JSONB_P(6));
	settlement.note = note_argument(fcinfo, 4);
	settlement.by = session_user_name();

	(void) settle_operation(&op, &settlement);

	PG_RETURN_BOOL(true);
}

/*
 * stripe_acknowledge(operation_type, operation_id, note, account)
 */
Datum
idempotency_stripe_acknowledge(PG_FUNCTION_ARGS)
{
	Operation	op;
	const char *note;
	Relation	rel;
	LedgerRow	row;
	const char *problem = NULL;
	StripeOutcome outcome;
	Parameters	p;

	PreventCommandDuringRecovery("idempotency.stripe_acknowledge()");

	(void) argument_text(fcinfo, 2, "note");
	note = note_argument(fcinfo, 2);
	operation_arguments(&op, fcinfo, 3);

	rel = ledger_open(&stripe_calls, RowExclusiveLock, false);
	ledger_look_latest(&stripe_calls, rel, op.key, &row);
	if (row.found != FOUND_ROW)
		stripe_refuse_unclaimed(&op);

	outcome = stripe_row_outcome(&row);
	switch (callers_fate(row.isnull[S_CALLERS] ? NULL : DatumGetArrayTypeP(row.values[S_CALLERS]),
						 row.isnull[S_CALLERS_SYSTEM] ? 0 :
						 (uint64) DatumGetInt64(row.values[S_CALLERS_SYSTEM]), NULL))
	{
		case CALLERS_COMMITTED:
			problem = gettext_noop("A transaction that called it, or was given its result, has committed.");
			break;
		case CALLERS_OPEN:
			problem = gettext_noop("A transaction that called it, or was given its result, is still open.");
			break;
		default:
			if (stripe_row_is_held(&row, GetCurrentTimestamp()))
				problem = gettext_noop("It is in progress.");
			else if (outcome == STRIPE_FAILED || outcome == STRIPE_NOT_EXECUTED)
				problem = gettext_noop("Stripe did not execute it.");
			else if (outcome == STRIPE_MISMATCH)
				problem = gettext_noop("Stripe knows its key from another request.");
			break;
	}
	if (problem != NULL)
		ereport(ERROR,
				(errcode(ERRCODE_CONTRADICTS_RECORD),
				 errmsg("Stripe operation %s is no orphan", describe_operation(&op)),
				 errdetail_internal("%s", _(problem))));

	/* where it was acknowledged before, the first note stays */
	parameters_begin(&p, op.key, lengthof(op.key));
	parameter_string(&p, session_user_name());
	parameter_timestamp(&p, GetCurrentTimestamp());
	parameter_string(&p, note);
	(void) ledger_execute_latest(rel, &acknowledge, p.values, p.nulls, NULL, NULL, 0);
	ledger_close(rel);

	PG_RETURN_BOOL(true);
}
