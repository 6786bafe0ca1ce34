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
 * A worker goes through the ledger from time to time (settle_calls).
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/calls/settle_by_hand.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/pg_type_d.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"

#include "base/arguments.h"
#include "base/compat.h"
#include "base/errors.h"
#include "base/lock_limit.h"
#include "base/result_row.h"
#include "base/subtransaction.h"
#include "calls/call_transactions.h"
#include "calls/settle_by_event.h"
#include "calls/settle_by_hand.h"
#include "calls/stripe_fate.h"
#include "calls/stripe_record.h"
#include "ledger/expiry.h"
#include "ledger/ledger_search.h"

PG_FUNCTION_INFO_V1(idempotency_stripe_settle);
PG_FUNCTION_INFO_V1(idempotency_stripe_acknowledge);

/* How long a row's lock is waited for, in milliseconds. */
#define LOCK_TIMEOUT_MS 10

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

/* $1 to $3: the key behind which to search, $4: this database system */
static OwnerStatement find_calls = {
	"SELECT account, operation_type, operation_id, callers, callers_system,"
	" (" OUTCOME_IS("unknown") " OR (" OUTCOME_IS("in_progress")
	" AND idempotency.stripe_has_lapsed(lease_expires_at, caller_life, caller_vxid)))"
	" FROM idempotency.stripe_idempotency_keys"
	" WHERE ROW(account, operation_type, operation_id) OPERATOR(pg_catalog.>) ROW($1, $2, $3)"
	" AND ((pg_catalog.cardinality(callers) OPERATOR(pg_catalog.>) 0"
	" AND callers_system OPERATOR(pg_catalog.=) $4)"
	" OR " OUTCOME_IS("unknown") " OR " OUTCOME_IS("in_progress") ")"
	" ORDER BY account, operation_type, operation_id LIMIT $5 OFFSET $6",
	6, {TEXTOID, TEXTOID, TEXTOID, INT8OID, INT8OID, INT8OID}
};

/* It has the rows of find_calls, and those of the views stripe_unknown and stripe_orphans. */
static const LedgerIndex open_index = {"stripe_idempotency_keys_open_idx", false};

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
				 errhint("Of a refusal it is {\"error\": ...}, as Stripe sent it; leave it out if you don't have it.") :
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
				problem = gettext_noop("Stripe didn't execute it.");
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

/* ---------- what nobody else comes to do ---------- */

/* A call with which something may be done. */
typedef struct Candidate
{
	LedgerHit	hit;
	bool		fate;			/* of its callers is known, and not written down */
	bool		open;			/* an event may tell what came of it */
} Candidate;

typedef struct Work
{
	SettleBatch *batch;
	Relation	rel;
	MemoryContext context;
	TimestampTz now;
	Oid			unknown;		/* labels of the outcome */
	Oid			in_progress;
	Candidate  *candidates;
	int			ncandidates;
	int			nrows;			/* of a SELECT */
} Work;

/* One of them, and whether anything came of it. */
typedef struct Step
{
	Relation	rel;
	Candidate  *candidate;
	bool		done;
} Step;

/*
 * Is there anything to be written down about these transactions?  Not of those
 * of another database system: that they aren't known is final.
 */
static bool
fate_is_news(ArrayType *callers, uint64 system)
{
	CallersFate fate;

	if (ArrayGetNItems(ARR_NDIM(callers), ARR_DIMS(callers)) == 0 ||
		system != GetSystemIdentifier())
		return false;
	fate = callers_fate(callers, system, NULL);
	return fate == CALLERS_COMMITTED || fate == CALLERS_ROLLED_BACK;
}

static Candidate *
new_candidate(Work *work, bool fate, bool open)
{
	Candidate  *candidate;

	if (!fate && !open)
		return NULL;
	candidate = &work->candidates[work->ncandidates++];
	candidate->fate = fate;
	candidate->open = open;
	return candidate;
}

/* Is nobody at a call whose outcome isn't known? */
static bool
is_open(TupleTableSlot *slot, Work *work)
{
	bool		isnull;
	Oid			outcome = DatumGetObjectId(slot_getattr(slot, S_OUTCOME + 1, &isnull));
	LedgerRow	row;

	if (outcome == work->unknown)
		return true;
	if (outcome != work->in_progress)
		return false;

	slot_getallattrs(slot);
	memcpy(row.values, slot->tts_values, S_NCOLUMNS * sizeof(Datum));
	memcpy(row.isnull, slot->tts_isnull, S_NCOLUMNS * sizeof(bool));
	return !stripe_row_is_held(&row, work->now);
}

static bool
consider_row(TupleTableSlot *slot, const LedgerPlace *place, void *arg)
{
	Work	   *work = arg;
	bool		callers_isnull;
	bool		system_isnull;
	Datum		callers = slot_getattr(slot, S_CALLERS + 1, &callers_isnull);
	Datum		system = slot_getattr(slot, S_CALLERS_SYSTEM + 1, &system_isnull);
	Candidate  *candidate;

	candidate = new_candidate(work, !callers_isnull && !system_isnull &&
							  fate_is_news(DatumGetArrayTypeP(callers),
										   (uint64) DatumGetInt64(system)),
							  is_open(slot, work));
	if (candidate != NULL && expiry_row_is_locked(slot))
		work->ncandidates--;
	else if (candidate != NULL)
	{
		MemoryContext context = MemoryContextSwitchTo(work->context);

		ledger_hit_set(&candidate->hit, &stripe_calls, slot, place);
		MemoryContextSwitchTo(context);
	}
	return work->ncandidates < work->batch->max_rows;
}

static void
consider_tuple(HeapTuple tuple, TupleDesc desc, void *arg)
{
	Work	   *work = arg;
	bool		isnull[6];
	Datum		values[6];
	Candidate  *candidate;
	LedgerHit	hit;
	int			i;

	for (i = 0; i < lengthof(values); i++)
		values[i] = SPI_getbinval(tuple, desc, i + 1, &isnull[i]);
	for (i = 0; i < 3; i++)
		hit.key[i] = SPI_datumTransfer(values[i], false, -1);
	memset(&hit.place, 0, sizeof(hit.place));

	candidate = new_candidate(work, !isnull[3] && !isnull[4] &&
							  fate_is_news(DatumGetArrayTypeP(values[3]),
										   (uint64) DatumGetInt64(values[4])),
							  !isnull[5] && DatumGetBool(values[5]));
	if (candidate != NULL)
		candidate->hit = hit;

	/* the last one is where the search goes on */
	work->nrows++;
	ledger_cursor_move(work->batch->cursor, &stripe_calls, &hit);
}

static void
search_table(Work *work)
{
	SettleBatch *batch = work->batch;
	Relation	index = ledger_index_open(work->rel, &open_index);

	if (index != NULL)
	{
		batch->finished = ledger_search_index(work->rel, index, batch->cursor, DT_NOEND,
											  consider_row, work);
		index_close(index, NoLock);
	}
	else
		batch->finished = ledger_search_window(work->rel, batch->cursor, consider_row, work);
}

static void
search_by_select(Work *work)
{
	SettleBatch *batch = work->batch;
	LedgerCursor *cursor = batch->cursor;
	Datum		values[6];
	int			n = ledger_search_keys(cursor, &stripe_calls, values);

	values[n++] = Int64GetDatum((int64) GetSystemIdentifier());
	values[n++] = Int64GetDatum(batch->max_rows);
	values[n++] = Int64GetDatum(ledger_search_offset(cursor));
	owner_select(&find_calls, work->rel->rd_rel->relowner, values, consider_tuple, work);
	batch->finished = work->nrows < batch->max_rows;
}

/* In a subtransaction */
static void
settle_call(void *arg)
{
	Step	   *step = arg;
	Datum	   *key = step->candidate->hit.key;
	int			nestlevel = lock_limit_begin(LOCK_TIMEOUT_MS);
	Operation	op;

	op.account = TextDatumGetCString(key[0]);
	op.type = TextDatumGetCString(key[1]);
	op.id = TextDatumGetCString(key[2]);
	memcpy(op.key, key, sizeof(op.key));

	step->done = false;
	if (step->candidate->fate)
		step->done = stripe_note_fate_run(step->rel, &op);
	if (step->candidate->open && settle_open_call(key))
		step->done = true;
	lock_limit_end(nestlevel);
}

/*
 * Do what can be done about some calls: write down what became of their
 * callers' transactions, while it is known (for rows that the recorder didn't
 * get to because it, or the server, stopped), and settle those that an event
 * tells of.
 *
 * To be called in a transaction with an active snapshot, by a worker, again and
 * again until it is finished.  Each row is looked at once: what can't be done
 * now, or raises an error, is for the next time around.  It waits for nobody.
 */
void
settle_calls(SettleBatch *batch)
{
	Work		work;
	int			i;

	memset(&work, 0, sizeof(work));
	work.batch = batch;
	work.context = CurrentMemoryContext;
	work.now = GetCurrentTimestamp();
	work.candidates = palloc(batch->max_rows * sizeof(Candidate));
	work.rel = ledger_open(&stripe_calls, RowExclusiveLock, false);

	batch->seen = 0;
	batch->settled = 0;
	batch->refused = 0;
	batch->refusal = NULL;
	if (stripe_calls.direct)
	{
		Oid			type = TupleDescAttr(RelationGetDescr(work.rel), S_OUTCOME)->atttypid;

		work.unknown = DatumGetObjectId(enum_datum(type, "unknown"));
		work.in_progress = DatumGetObjectId(enum_datum(type, "in_progress"));
		search_table(&work);
	}
	else
		search_by_select(&work);

	/* if one of them ends the process, the next one steps over all of them */
	if (!stripe_calls.direct)
		batch->cursor->place.left += work.nrows;

	for (i = 0; i < work.ncandidates; i++)
	{
		Step		step = {work.rel, &work.candidates[i], false};
		ErrorData  *error;

		CHECK_FOR_INTERRUPTS();
		error = try_in_subtransaction(settle_call, &step);
		batch->seen++;
		if (error == NULL)
			batch->settled += step.done;
		else if (!error_is_about_locks(error))
		{
			batch->refused++;
			if (batch->refusal == NULL)
				batch->refusal = psprintf("%s: %s",
										  ledger_describe_key(&stripe_calls, step.candidate->hit.key),
										  error->message);
		}
	}

	if (!stripe_calls.direct)
		batch->cursor->place.left -= batch->settled;
	ledger_close(work.rel);
}
