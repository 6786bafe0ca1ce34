/*-------------------------------------------------------------------------
 *
 * expiry.c
 *	  Removal of what the ledgers no longer need.
 *
 * The work is done in batches, each of them one short transaction of a
 * background worker (worker.c) or of the caller of expire() (expire.c).  A batch
 * searches for the rows that are due and then removes them.
 *
 * The search reads the table itself, window by window, and remembers where it
 * got to (ledger_search.c).  (LIMIT n over a scan from the start would step over
 * all that was removed before, and an index on expires_at would have to be paid
 * for by every claim and would keep record() from being a HOT update.)  If rows
 * are kept for ever, it reads only those that are due, by an index.
 *
 * What the search finds are hints.  The removal is a statement of its own for
 * each row, by the whole key, that repeats the token and the condition: a row
 * that has been claimed or recorded meanwhile stays.
 *
 * Never in the way.  A row that another transaction has locked is passed over:
 * the search sees it in the row's header, and a statement that meets one all
 * the same gives up after LOCK_TIMEOUT_MS, and so does one that would wait
 * inside a user's trigger or foreign key.  So a batch waits for nobody while
 * it holds rows, and cannot be part of a deadlock for longer.  A claim of a key
 * that is being removed waits for the batch to commit, and a worker's batch stops
 * removing after BATCH_MS:
 *
 *		longest wait = BATCH_MS + one row's own triggers + LOCK_TIMEOUT_MS + commit
 *
 * where the worker's commit does not wait for the disk.  (If rows are on other
 * nodes, BATCH_ELSEWHERE_MS takes the place of BATCH_MS.)  A live key is never
 * waited for: its row is not touched.  (doc/performance.md has the measured
 * waits.)  The table is locked only as every statement locks it, and a worker
 * that cannot have that lock at once goes away.
 *
 * Rows that raise an error.  A user's trigger or foreign key may refuse the
 * removal.  The statements of a batch run in a subtransaction; if one of them
 * fails, those before it are done once more without it, and then those after it
 * are done: the row is skipped, counted and named.  Only after MAX_REFUSALS in a
 * row does a batch give up; the next begins after that row.
 *
 * Deferred constraints would fail at commit, outside of all that.  So a worker
 * has them checked at once (background_process.c).
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/ledger/expiry.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/multixact.h"
#include "access/xact.h"
#include "miscadmin.h"
#include "portability/instr_time.h"
#include "storage/proc.h"
#include "storage/procarray.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "base/clock.h"
#include "base/compat.h"
#include "base/lock_limit.h"
#include "base/parameters.h"
#include "base/subtransaction.h"
#include "ledger/expiry.h"
#include "ledger/ledger_search.h"

/* After that a worker's batch removes no more. */
#define BATCH_MS 5

/* The same where each removal is a message to another node. */
#define BATCH_ELSEWHERE_MS 50

/* How long a removal waits for a lock. */
#define LOCK_TIMEOUT_MS 10

/* Rows refused in a row before a batch gives up. */
#define MAX_REFUSALS 100

/* A row that the search has found. */
typedef struct Candidate
{
	LedgerHit	hit;
	TimestampTz since;
} Candidate;

typedef struct Work
{
	ExpiryBatch *batch;
	Relation	rel;
	TimestampTz cutoffs[EXPIRY_CUTOFFS];
	Candidate  *candidates;
	int			ncandidates;
	MemoryContext context;		/* theirs */
	instr_time	started;		/* removing */
} Work;

static void
note_oldest(TimestampTz *oldest, TimestampTz since)
{
	if (*oldest == 0 || since < *oldest)
		*oldest = since;
}

/* ---------- search ---------- */

/* Does another transaction have the row locked, or is changing it? */
bool
expiry_row_is_locked(TupleTableSlot *slot)
{
	HeapTupleHeader header = ExecFetchSlotHeapTuple(slot, false, NULL)->t_data;
	TransactionId xmax = HeapTupleHeaderGetRawXmax(header);

	if (header->t_infomask & HEAP_XMAX_INVALID)
		return false;
	if (header->t_infomask & HEAP_XMAX_IS_MULTI)
		return MultiXactIdIsRunning(xmax, HEAP_XMAX_IS_LOCKED_ONLY(header->t_infomask));
	return !TransactionIdIsCurrentTransactionId(xmax) && TransactionIdIsInProgress(xmax);
}

/* Is this row to be removed? */
static bool
consider_row(TupleTableSlot *slot, const LedgerPlace *place, void *arg)
{
	Work	   *work = arg;
	ExpiryBatch *batch = work->batch;
	Candidate  *candidate = &work->candidates[work->ncandidates];
	MemoryContext context;

	if (!batch->expiry->due(slot, work->cutoffs, &candidate->since))
		return true;

	note_oldest(&batch->oldest, candidate->since);
	if (expiry_row_is_locked(slot))
	{
		note_oldest(&batch->left, candidate->since);
		return true;
	}

	context = MemoryContextSwitchTo(work->context);
	ledger_hit_set(&candidate->hit, batch->expiry->ledger, slot, place);
	MemoryContextSwitchTo(context);
	return ++work->ncandidates < batch->max_rows;
}

static void
add_candidate(HeapTuple tuple, TupleDesc desc, void *arg)
{
	Work	   *work = arg;
	Candidate  *candidate = &work->candidates[work->ncandidates++];
	int			nkeys = work->batch->expiry->ledger->nkeys;
	bool		isnull;
	int			i;

	/* out of the statement's memory */
	for (i = 0; i < nkeys; i++)
		candidate->hit.key[i] = SPI_datumTransfer(SPI_getbinval(tuple, desc, i + 1, &isnull),
											  false, -1);
	candidate->hit.token = SPI_getbinval(tuple, desc, nkeys + 1, &isnull);
	candidate->since = DatumGetTimestampTz(SPI_getbinval(tuple, desc, nkeys + 2, &isnull));
	memset(&candidate->hit.place, 0, sizeof(candidate->hit.place));
	note_oldest(&work->batch->oldest, candidate->since);
}

/*
 * Search the entries of an index, up to the time of the first cutoff.  Those
 * without its flag come first.
 */
static bool
search_by_index(Work *work, Relation index)
{
	Expiry	   *expiry = work->batch->expiry;
	LedgerCursor *cursor = &work->batch->cursor->at;

	cursor->place.flag = cursor->place.flag || expiry->flag;
	while (ledger_search_index(work->rel, index, cursor, work->cutoffs[0], consider_row, work))
	{
		if (cursor->place.flag)
			return true;
		ledger_cursor_reset(cursor);
		cursor->place.flag = true;
	}
	return false;
}

static void
search_table(Work *work)
{
	ExpiryBatch *batch = work->batch;
	const LedgerIndex *description = batch->expiry->index;
	Relation	index = description == NULL ? NULL : ledger_index_open(work->rel, description);

	if (index != NULL)
	{
		batch->finished = search_by_index(work, index);
		index_close(index, NoLock);
	}
	else
		batch->finished = ledger_search_window(work->rel, &batch->cursor->at, consider_row, work);
}

/* The same by a SELECT, for a table that only the planner can read. */
static void
search_by_select(Work *work)
{
	ExpiryBatch *batch = work->batch;
	Ledger	   *ledger = batch->expiry->ledger;
	LedgerCursor *cursor = &batch->cursor->at;
	Parameters	p;
	int			i;

	ledger_search_begin(&p, cursor, ledger);
	for (i = 0; i < EXPIRY_CUTOFFS; i++)
		parameter_timestamp(&p, work->cutoffs[i]);
	parameter_int64(&p, batch->max_rows);
	parameter_int64(&p, ledger_search_offset(cursor));

	owner_select(&batch->expiry->find, work->rel->rd_rel->relowner, p.values,
				 add_candidate, work);

	batch->finished = work->ncandidates < batch->max_rows;
	if (work->ncandidates > 0)
		ledger_cursor_move(cursor, ledger, &work->candidates[work->ncandidates - 1].hit);
}

/* ---------- removal ---------- */

/* Removing the candidates from the first to before hi. */
typedef struct Removal
{
	Work	   *work;
	int			hi;
	int			reached;
	int64		removed;
	TimestampTz left;			/* oldest row left there, or 0 */
} Removal;

static bool
remove_one(Work *work, const Candidate *candidate)
{
	Expiry	   *expiry = work->batch->expiry;
	Parameters	p;
	int			i;

	parameters_begin(&p, candidate->hit.key, expiry->ledger->nkeys);
	parameter_datum(&p, candidate->hit.token);
	for (i = 0; i < EXPIRY_CUTOFFS; i++)
		parameter_timestamp(&p, work->cutoffs[i]);
	return ledger_execute(work->rel, &expiry->remove, p.values, NULL, NULL, NULL, 0) > 0;
}

/* In a subtransaction. */
static void
remove_some(void *arg)
{
	Removal    *removal = arg;
	Work	   *work = removal->work;
	bool		direct = work->batch->expiry->ledger->direct;
	int			users_timeout = LockTimeout;
	int			nestlevel = lock_limit_begin(users_timeout > 0 ?
											 Min(users_timeout, LOCK_TIMEOUT_MS) :
											 LOCK_TIMEOUT_MS);
	const char *back = direct ? NULL : begin_limit_elsewhere(users_timeout);

	for (; removal->reached < removal->hi; removal->reached++)
	{
		Candidate  *candidate = &work->candidates[removal->reached];

		CHECK_FOR_INTERRUPTS();
		if (work->batch->background && removal->reached > 0 &&
			milliseconds_since(work->started) > (direct ? BATCH_MS : BATCH_ELSEWHERE_MS))
			break;

		/* one that stays was changed meanwhile, or is kept by a trigger */
		if (remove_one(work, candidate))
			removal->removed++;
		else
			note_oldest(&removal->left, candidate->since);
	}
	end_limit_elsewhere(back);
	lock_limit_end(nestlevel);
}

/*
 * Remove the candidates from lo to before hi, but not those that a worker has no
 * time for any more.  Returns how far it got; or, with nothing done and *error
 * set, which of them failed.
 */
static int
try_remove(Work *work, int lo, int hi, ErrorData **error)
{
	ExpiryBatch *batch = work->batch;
	Removal		removal = {work, hi, lo, 0, 0};

	*error = NULL;
	if (lo == hi)
		return hi;

	/* nothing is held yet, or any more */
	if (lo == 0)
		INSTR_TIME_SET_CURRENT(work->started);

	*error = try_in_subtransaction(remove_some, &removal);
	if (*error == NULL)
	{
		batch->removed += removal.removed;
		if (removal.removed > 0)
			batch->cursor->refusals = 0;
		if (removal.left != 0)
			note_oldest(&batch->left, removal.left);
	}
	return removal.reached;
}

/* A row cannot be removed. */
static void
refuse(ExpiryBatch *batch, Candidate *candidate, ErrorData *error)
{
	note_oldest(&batch->left, candidate->since);
	if (error_is_about_locks(error))
		return;

	batch->refused++;
	if (batch->refusal == NULL)
		batch->refusal = psprintf("%s: %s",
								  ledger_describe_key(batch->expiry->ledger, candidate->hit.key),
								  error->message);
	if (++batch->cursor->refusals >= MAX_REFUSALS)
	{
		batch->cursor->refusals = 0;
		batch->gave_up = true;
	}
}

/*
 * Remove the candidates, but not those that cannot be.  Returns how far it got.
 */
static int
remove_candidates(Work *work)
{
	int			lo = 0;
	int			hi = work->ncandidates;
	ErrorData  *refusal = NULL; /* of the row hi */

	for (;;)
	{
		ErrorData  *error;
		int			reached = try_remove(work, lo, hi, &error);

		if (error != NULL)
		{
			/* those before it once more, and then without it */
			if (refusal != NULL)
				FreeErrorData(refusal);
			refusal = error;
			hi = reached;
			continue;
		}
		if (reached < hi || refusal == NULL)
			return reached;

		refuse(work->batch, &work->candidates[hi], refusal);
		FreeErrorData(refusal);
		refusal = NULL;
		lo = hi + 1;
		hi = work->ncandidates;
		if (work->batch->gave_up)
			return lo;
	}
}

/*
 * Do one batch in the current transaction.  Raises an error if it cannot be done,
 * after which the transaction has to be rolled back; the cursor may have moved.
 */
void
expiry_batch(ExpiryBatch *batch)
{
	Ledger	   *ledger = batch->expiry->ledger;
	Work		work;
	instr_time	started;
	MemoryContext context;
	MemoryContext old_context;
	int			reached;

	batch->finished = false;
	batch->removed = 0;
	batch->refused = 0;
	batch->oldest = 0;
	batch->left = 0;
	batch->searched = 0;
	batch->refusal = NULL;
	batch->gave_up = false;

	memset(&work, 0, sizeof(work));
	work.batch = batch;
	if (!batch->expiry->cutoffs(GetCurrentTimestamp(), work.cutoffs))
	{
		batch->finished = true;
		return;
	}

	context = AllocSetContextCreate(CurrentMemoryContext, "idempotency expiry",
									ALLOCSET_DEFAULT_SIZES);
	old_context = MemoryContextSwitchTo(context);
	work.context = context;
	work.candidates = MemoryContextAllocHuge(context, batch->max_rows * sizeof(Candidate));
	work.rel = ledger_open(ledger, RowExclusiveLock, batch->background);

	INSTR_TIME_SET_CURRENT(started);
	if (ledger->direct)
		search_table(&work);
	else
		search_by_select(&work);

	/* what it took to find nothing: a full batch was no search in vain */
	batch->searched = (int64) (milliseconds_since(started) * 1000 *
							   (1 - (double) work.ncandidates / batch->max_rows));

	if (work.ncandidates > 0)
	{
		LedgerPlace *place = &batch->cursor->at.place;

		/* if one of them ends the process, the next one steps over all of them */
		if (!ledger->direct)
			place->left += work.ncandidates;
		reached = remove_candidates(&work);
		if (reached < work.ncandidates)
		{
			ledger_cursor_move(&batch->cursor->at, ledger, &work.candidates[reached - 1].hit);
			batch->finished = false;
		}
		if (!ledger->direct)
			place->left -= work.ncandidates - reached + batch->removed;
	}

	ledger_close(work.rel);
	MemoryContextSwitchTo(old_context);
	if (batch->refusal != NULL)
		batch->refusal = pstrdup(batch->refusal);
	MemoryContextDelete(context);
}
