/*-------------------------------------------------------------------------
 *
 * call_sweep.c
 *	  Going through the ledger of calls for what nobody else comes to do.
 *
 * A worker does it in each of its passes.  It writes down what became of the
 * transactions that called Stripe, while that is known (for rows that the
 * recorder did not get to because it, or the server, stopped), and settles calls
 * that an event which came in tells of (kept_events.c).
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/events/call_sweep.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/xlog.h"
#include "catalog/pg_type_d.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"

#include "base/lock_limit.h"
#include "base/parameters.h"
#include "base/result_row.h"
#include "base/subtransaction.h"
#include "calls/call_transactions.h"
#include "calls/stripe_fate.h"
#include "calls/stripe_ledger.h"
#include "events/call_sweep.h"
#include "events/kept_events.h"
#include "ledger/expiry.h"
#include "ledger/ledger_search.h"

/* How long a row's lock is waited for, in milliseconds. */
#define LOCK_TIMEOUT_MS 10

/* Columns of find_calls, the key first. */
enum
{
	F_KEY, F_CALLERS = LEDGER_MAX_KEYS, F_CALLERS_SYSTEM, F_OPEN, F_NCOLUMNS
};

/* $1 to $3: the key after which to search, $4: this database system */
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

/* It has the rows of find_calls, and of the views stripe_unknown and stripe_orphans. */
static const LedgerIndex open_index = {"stripe_idempotency_keys_open_idx", false};

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
 * Is there anything to be written down about these transactions?  Not about those
 * of another database system: that they are not known is final.
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

/* Is the outcome of a call unknown, and nobody at it? */
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
	bool		isnull[F_NCOLUMNS];
	Datum		values[F_NCOLUMNS];
	Candidate  *candidate;
	LedgerHit	hit;
	int			i;

	for (i = 0; i < F_NCOLUMNS; i++)
		values[i] = SPI_getbinval(tuple, desc, i + 1, &isnull[i]);
	memset(&hit, 0, sizeof(hit));
	for (i = 0; i < LEDGER_MAX_KEYS; i++)
		hit.key[i] = SPI_datumTransfer(values[F_KEY + i], false, -1);

	candidate = new_candidate(work, !isnull[F_CALLERS] && !isnull[F_CALLERS_SYSTEM] &&
							  fate_is_news(DatumGetArrayTypeP(values[F_CALLERS]),
										   (uint64) DatumGetInt64(values[F_CALLERS_SYSTEM])),
							  !isnull[F_OPEN] && DatumGetBool(values[F_OPEN]));
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
	Parameters	p;

	ledger_search_begin(&p, cursor, &stripe_calls);
	parameter_int64(&p, (int64) GetSystemIdentifier());
	parameter_int64(&p, batch->max_rows);
	parameter_int64(&p, ledger_search_offset(cursor));
	owner_select(&find_calls, work->rel->rd_rel->relowner, p.values, consider_tuple, work);
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
 * Do what can be done about some calls.
 *
 * To be called in a transaction with an active snapshot, again and again until
 * it is finished.  Each row is looked at once: what cannot be done now, or raises
 * an error, is for the next time around.  It waits for nobody.
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
