/*-------------------------------------------------------------------------
 *
 * settle.c
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
 * src/settle.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type_d.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "storage/bufmgr.h"
#include "storage/itemptr.h"
#include "utils/array.h"
#include "utils/builtins.h"

#include "arguments.h"
#include "caller.h"
#include "compat.h"
#include "errors.h"
#include "result.h"
#include "settle.h"

PG_FUNCTION_INFO_V1(idempotency_stripe_settle);
PG_FUNCTION_INFO_V1(idempotency_stripe_acknowledge);

/* How much of the table settle_note_fates() looks at in one go. */
#define NOTE_BLOCKS 1024

/*
 * $4, $5: token and outcome that were seen.  The answer that left it unknown isn't
 * replayed as that of what is known now.
 */
static OwnerStatement settle = {
	"UPDATE idempotency.stripe_idempotency_keys SET outcome = $6::idempotency.outcome,"
	" uncertain = false, resource_id = CASE WHEN $6 OPERATOR(pg_catalog.=) 'not_executed'"
	" THEN NULL ELSE COALESCE($7, resource_id) END, recorded_at = $8,"
	" http_status = NULL, error = NULL,"
	" response = CASE WHEN response OPERATOR(pg_catalog.?) 'error' THEN NULL ELSE response END,"
	" first_sent_at = CASE WHEN $6 OPERATOR(pg_catalog.=) 'not_executed' THEN NULL"
	" ELSE first_sent_at END,"
	" lease = NULL, lease_expires_at = NULL, caller_life = NULL, caller_vxid = NULL,"
	" settled = pg_catalog.jsonb_build_object('was', $9, 'by', $10, 'at', $8, 'note', $11,"
	" 'evidence', $12)"
	STRIPE_WHERE_KEY
	" AND token OPERATOR(pg_catalog.=) $4"
	" AND outcome OPERATOR(pg_catalog.=) $5::idempotency.outcome",
	12, {TEXTOID, TEXTOID, TEXTOID, INT8OID, TEXTOID, TEXTOID, TEXTOID, TIMESTAMPTZOID,
	TEXTOID, TEXTOID, TEXTOID, JSONBOID}
};

static OwnerStatement acknowledge = {
	"UPDATE idempotency.stripe_idempotency_keys SET acknowledged ="
	" pg_catalog.jsonb_build_object('by', $4, 'at', $5, 'note', $6)"
	STRIPE_WHERE_KEY " AND acknowledged IS NULL",
	6, {TEXTOID, TEXTOID, TEXTOID, TEXTOID, TIMESTAMPTZOID, TEXTOID}
};

/* rows in a stretch of the table whose transactions' fate isn't written down */
static OwnerStatement find_callers = {
	"SELECT pg_catalog.array_agg(r.account), pg_catalog.array_agg(r.operation_type),"
	" pg_catalog.array_agg(r.operation_id) FROM (SELECT account, operation_type, operation_id"
	" FROM idempotency.stripe_idempotency_keys"
	" WHERE ctid OPERATOR(pg_catalog.>=) $1 AND ctid OPERATOR(pg_catalog.<) $2"
	" AND pg_catalog.cardinality(callers) OPERATOR(pg_catalog.>) 0 LIMIT $3) r",
	3, {TIDOID, TIDOID, INT8OID}
};

/*
 * Settle an operation that is unknown, or was never recorded.
 *
 * Returns false where exactly that is recorded already.  Raises IK002 where
 * something else is, or where it is still in progress, and IK003 where it was
 * never claimed.
 */
bool
settle_operation(Operation *op, const Settlement *settlement)
{
	const char *outcome = stripe_outcome_name(settlement->outcome);
	Relation	rel;
	int			races = 0;

	rel = ledger_open(&stripe_calls, RowExclusiveLock, false);
	for (;;)
	{
		LedgerRow	row;
		TimestampTz now;
		char	   *stored;
		char	   *resource_id;
		Datum		values[12];
		char		nulls[] = "            ";

		ledger_look_latest(&stripe_calls, rel, op->key, &row);
		now = GetCurrentTimestamp();
		if (row.found != FOUND_ROW)
			ereport(ERROR,
					(errcode(ERRCODE_BAD_ARGUMENT),
					 errmsg("Stripe operation %s was never claimed", describe_operation(op))));

		stored = enum_label(row.values[S_OUTCOME]);
		resource_id = stripe_row_string(&row, S_RESOURCE_ID);
		if (stripe_row_is_final(&row))
		{
			if (strcmp(stored, outcome) == 0 &&
				(settlement->resource_id == NULL ||
				 (resource_id != NULL && strcmp(resource_id, settlement->resource_id) == 0)))
			{
				ledger_close(rel);
				return false;
			}
			ereport(ERROR,
					(errcode(ERRCODE_CONTRADICTS_RECORD),
					 errmsg("outcome of Stripe operation %s is recorded already",
							describe_operation(op)),
					 errdetail("It is %s, with resource %s.", stored,
							   resource_id == NULL ? "none" : resource_id)));
		}
		if (stripe_row_is_held(&row, now))
			ereport(ERROR,
					(errcode(ERRCODE_CONTRADICTS_RECORD),
					 errmsg("Stripe operation %s is in progress", describe_operation(op)),
					 errhint("Wait for its outcome, or until its lease has lapsed.")));

		memcpy(values, op->key, sizeof(op->key));
		values[3] = row.values[S_TOKEN];
		values[4] = CStringGetTextDatum(stored);
		values[5] = CStringGetTextDatum(outcome);
		if (settlement->resource_id != NULL)
			values[6] = CStringGetTextDatum(settlement->resource_id);
		else
			nulls[6] = 'n';
		values[7] = TimestampTzGetDatum(now);
		values[8] = CStringGetTextDatum(stripe_row_outcome(&row));
		values[9] = CStringGetTextDatum(settlement->by);
		if (settlement->note != NULL)
			values[10] = CStringGetTextDatum(settlement->note);
		else
			nulls[10] = 'n';
		if (settlement->evidence != NULL)
			values[11] = JsonbPGetDatum(settlement->evidence);
		else
			nulls[11] = 'n';
		if (ledger_execute_latest(rel, &settle, values, nulls, NULL, NULL, 0) > 0)
		{
			stripe_notify_settled(op, outcome, settlement->resource_id != NULL ?
								  settlement->resource_id : resource_id);
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
 *				 account)
 */
Datum
idempotency_stripe_settle(PG_FUNCTION_ARGS)
{
	Operation	op;
	Settlement	settlement;
	char	   *outcome;

	PreventCommandDuringRecovery("idempotency.stripe_settle()");

	operation_arguments(&op, fcinfo, 5);
	if (PG_ARGISNULL(2))
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("%s must not be null", "outcome")));
	memset(&settlement, 0, sizeof(settlement));
	outcome = enum_label(PG_GETARG_DATUM(2));
	if (strcmp(outcome, "completed") == 0)
		settlement.outcome = STRIPE_COMPLETED;
	else if (strcmp(outcome, "failed") == 0)
		settlement.outcome = STRIPE_FAILED;
	else if (strcmp(outcome, "not_executed") == 0)
		settlement.outcome = STRIPE_NOT_EXECUTED;
	else
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("outcome must be \"completed\", \"failed\" or \"not_executed\"")));
	if (!PG_ARGISNULL(3))
	{
		if (settlement.outcome == STRIPE_NOT_EXECUTED)
			ereport(ERROR,
					(errcode(ERRCODE_BAD_ARGUMENT),
					 errmsg("an operation that was not executed has no resource")));
		check_label(VARDATA_ANY(PG_GETARG_TEXT_PP(3)), VARSIZE_ANY_EXHDR(PG_GETARG_TEXT_PP(3)),
					false, "resource_id");
		settlement.resource_id = text_to_cstring(PG_GETARG_TEXT_PP(3));
	}
	settlement.note = note_argument(fcinfo, 4);
	settlement.by = session_user_name();

	(void) settle_operation(&op, &settlement);

	PG_RETURN_VOID();
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
	const char *outcome;
	Datum		values[6];

	PreventCommandDuringRecovery("idempotency.stripe_acknowledge()");

	(void) argument_text(fcinfo, 2, "note");
	note = note_argument(fcinfo, 2);
	operation_arguments(&op, fcinfo, 3);

	rel = ledger_open(&stripe_calls, RowExclusiveLock, false);
	ledger_look_latest(&stripe_calls, rel, op.key, &row);
	if (row.found != FOUND_ROW)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("Stripe operation %s was never claimed", describe_operation(&op))));

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
			else if (strcmp(outcome, "failed") == 0 || strcmp(outcome, "not_executed") == 0)
				problem = gettext_noop("Stripe didn't execute it.");
			else if (strcmp(outcome, "mismatch") == 0)
				problem = gettext_noop("Stripe knows its key from another request.");
			break;
	}
	if (problem != NULL)
		ereport(ERROR,
				(errcode(ERRCODE_CONTRADICTS_RECORD),
				 errmsg("Stripe operation %s is no orphan", describe_operation(&op)),
				 errdetail_internal("%s", _(problem))));

	/* where it was acknowledged before, the first note stays */
	memcpy(values, op.key, sizeof(op.key));
	values[3] = CStringGetTextDatum(session_user_name());
	values[4] = TimestampTzGetDatum(GetCurrentTimestamp());
	values[5] = CStringGetTextDatum(note);
	(void) ledger_execute_latest(rel, &acknowledge, values, NULL, NULL, NULL, 0);
	ledger_close(rel);

	PG_RETURN_VOID();
}

/*
 * Write down what became of callers' transactions, while it is known: for rows
 * that the recorder didn't get to because it, or the server, stopped.
 *
 * Looks at a stretch of the table from block *position, at most max_rows rows
 * of it, and moves *position on, back to 0 at the end.  Returns the number of
 * rows looked at.  To be called in a transaction with an active snapshot, by
 * a worker, again and again; it doesn't wait for row locks.
 */
int
settle_note_fates(int max_rows, BlockNumber *position)
{
	Relation	rel;
	BlockNumber nblocks;
	ItemPointerData first;
	ItemPointerData last;
	Datum		values[3];
	Datum		columns[3];
	bool		isnull[3];
	Datum	   *keys[3];
	int			n = 0;
	int			i;

	rel = ledger_open(&stripe_calls, RowExclusiveLock, false);
	nblocks = RelationGetNumberOfBlocks(rel);
	if (*position >= nblocks)
		*position = 0;

	ItemPointerSet(&first, *position, FirstOffsetNumber);
	ItemPointerSet(&last, *position + NOTE_BLOCKS, FirstOffsetNumber);
	values[0] = PointerGetDatum(&first);
	values[1] = PointerGetDatum(&last);
	values[2] = Int64GetDatum(max_rows);
	if (ledger_execute(rel, &find_callers, values, NULL, columns, isnull, 3) > 0 && !isnull[0])
	{
		for (i = 0; i < 3; i++)
			deconstruct_array(DatumGetArrayTypeP(columns[i]), TEXTOID, -1, false, TYPALIGN_INT,
							  &keys[i], NULL, &n);
		for (i = 0; i < n; i++)
		{
			Operation	op;

			CHECK_FOR_INTERRUPTS();
			operation_init(&op, TextDatumGetCString(keys[1][i]),
						   TextDatumGetCString(keys[2][i]), TextDatumGetCString(keys[0][i]));
			(void) stripe_note_fate_run(rel, &op);
		}
	}

	/* a stretch with more rows than that is gone over again */
	if (n < max_rows)
		*position = *position + NOTE_BLOCKS < nblocks ? *position + NOTE_BLOCKS : 0;
	ledger_close(rel);

	return n;
}
