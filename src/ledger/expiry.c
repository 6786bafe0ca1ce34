/*-------------------------------------------------------------------------
 *
 * expiry.c
 *	  Removal of what the ledgers no longer need.
 *
 * The work is done in batches, each of them one short transaction of a
 * background worker (worker.c) or of the caller of expire().  A batch searches
 * the rows that are due and then removes them.
 *
 * The search reads the table itself, window by window, and remembers where it
 * got to (ledger_search.c).  (LIMIT n over a scan from the start would step over
 * all that was removed before, and an index on expires_at would have to be paid
 * for by every claim and would keep record() from being a HOT update.)  Of what is
 * kept for ever it reads no more than what is due, by an index.
 *
 * What the search finds are hints.  The removal is a statement of its own for
 * each row, by the whole key, that repeats the token and the condition: a row
 * that has been claimed or recorded meanwhile stays.
 *
 * Never in the way.  A row that another transaction has locked is passed over:
 * the search sees it in the row's header, and a statement that meets one all
 * the same gives up after LOCK_TIMEOUT_MS, and so does one that would wait
 * inside a user's trigger or foreign key.  So a batch waits for nobody while
 * it holds rows, and can't be part of a deadlock for longer.  Who claims a key
 * that is being removed waits for the batch to commit, and a batch of a worker
 * stops removing after BATCH_MS:
 *
 *		longest wait = BATCH_MS + one row's own triggers + LOCK_TIMEOUT_MS + commit
 *
 * where the worker's commit doesn't wait for the disk.  (Where rows are on other
 * nodes, BATCH_ELSEWHERE_MS takes the place of BATCH_MS.)  A live key is never
 * waited for: its row isn't touched.  (doc/performance.md has the measured
 * waits.)  On the table there are only locks that every statement takes, and a
 * worker that can't have them at once goes away.
 *
 * Rows that raise an error.  A user's trigger or foreign key may refuse the
 * removal.  The statements of a batch run in a subtransaction; where one of
 * them fails, those before it are done once more without it, and those after
 * it go on: the row is skipped, counted and named.  Only after MAX_REFUSALS in
 * a row does a batch give up; the next begins after that row.
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
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "portability/instr_time.h"
#include "storage/proc.h"
#include "storage/procarray.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"
#include "utils/tuplestore.h"

#include "base/clock.h"
#include "base/compat.h"
#include "base/errors.h"
#include "base/lock_limit.h"
#include "base/settings.h"
#include "base/subtransaction.h"
#include "ledger/expiry.h"
#include "ledger/ledger_search.h"

PG_FUNCTION_INFO_V1(idempotency_expire);

/* After that a worker's batch removes no more. */
#define BATCH_MS 5

/* The same where each removal is a message to another node. */
#define BATCH_ELSEWHERE_MS 50

/* How long a removal waits for a lock. */
#define LOCK_TIMEOUT_MS 10

/* Rows refused in a row before a batch gives up. */
#define MAX_REFUSALS 100

/* What is removed, in this order. */
Expiry	   *const expiries[] = {
	&request_expiry,
	&stripe_body_expiry,
	&stripe_expiry,
	&webhook_expiry,
};
const int	nexpiries = lengthof(expiries);

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
 * Entries of the index, whose time is that of the first cutoff.  Those without
 * its flag come first.
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

/* The same by a SELECT, for a table that the planner has to be asked about. */
static void
search_by_select(Work *work)
{
	ExpiryBatch *batch = work->batch;
	Ledger	   *ledger = batch->expiry->ledger;
	LedgerCursor *cursor = &batch->cursor->at;
	Datum		values[LEDGER_MAX_KEYS + EXPIRY_CUTOFFS + 2];
	int			n = ledger_search_keys(cursor, ledger, values);
	int			i;

	for (i = 0; i < EXPIRY_CUTOFFS; i++)
		values[n++] = TimestampTzGetDatum(work->cutoffs[i]);
	values[n++] = Int64GetDatum(batch->max_rows);
	values[n++] = Int64GetDatum(ledger_search_offset(cursor));

	owner_select(&batch->expiry->find, work->rel->rd_rel->relowner, values,
				 add_candidate, work);

	batch->finished = work->ncandidates < batch->max_rows;
	if (work->ncandidates > 0)
		ledger_cursor_move(cursor, ledger, &work->candidates[work->ncandidates - 1].hit);
}

/* ---------- removal ---------- */

/*
 * Remove the candidates from lo to before hi, but for those that a worker has
 * no time for any more.  Returns how far it got; or, with nothing done and
 * *error set, which of them failed.
 */
static int
try_remove(Work *work, int lo, int hi, ErrorData **error)
{
	ExpiryBatch *batch = work->batch;
	Ledger	   *ledger = batch->expiry->ledger;
	MemoryContext context = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;
	int			users_timeout = LockTimeout;
	const char *volatile back = NULL;
	volatile int reached = lo;
	volatile int64 removed = 0;
	volatile TimestampTz left = 0;

	*error = NULL;
	if (lo == hi)
		return hi;

	/* nothing is held yet, or any more */
	if (lo == 0)
		INSTR_TIME_SET_CURRENT(work->started);

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(context);

	PG_TRY();
	{
		int			nestlevel;

		nestlevel = lock_limit_begin(users_timeout > 0 ?
									 Min(users_timeout, LOCK_TIMEOUT_MS) : LOCK_TIMEOUT_MS);
		if (!ledger->direct)
			back = begin_limit_elsewhere(users_timeout);
		while (reached < hi)
		{
			Candidate  *candidate = &work->candidates[reached];
			Datum		values[LEDGER_MAX_KEYS + 1 + EXPIRY_CUTOFFS];
			int			n = 0;
			int			i;

			CHECK_FOR_INTERRUPTS();
			if (batch->background && reached > 0 &&
				milliseconds_since(work->started) >
				(ledger->direct ? BATCH_MS : BATCH_ELSEWHERE_MS))
				break;

			for (i = 0; i < ledger->nkeys; i++)
				values[n++] = candidate->hit.key[i];
			values[n++] = candidate->hit.token;
			for (i = 0; i < EXPIRY_CUTOFFS; i++)
				values[n++] = TimestampTzGetDatum(work->cutoffs[i]);

			if (ledger_execute(work->rel, &batch->expiry->remove, values, NULL,
							   NULL, NULL, 0) > 0)
				removed++;
			else if (left == 0 || candidate->since < left)
				left = candidate->since;	/* changed meanwhile, or kept by a
											 * trigger */
			reached++;
		}
		end_limit_elsewhere(back);
		lock_limit_end(nestlevel);

		ReleaseCurrentSubTransaction();
		MemoryContextSwitchTo(context);
		CurrentResourceOwner = owner;
	}
	PG_CATCH();
	{
		MemoryContextSwitchTo(context);
		*error = CopyErrorData();
		FlushErrorState();

		RollbackAndReleaseCurrentSubTransaction();
		MemoryContextSwitchTo(context);
		CurrentResourceOwner = owner;

		if (!error_is_about_one_row(*error))
			ReThrowError(*error);
	}
	PG_END_TRY();

	if (*error == NULL)
	{
		batch->removed += removed;
		if (removed > 0)
			batch->cursor->refusals = 0;
		if (left != 0)
			note_oldest(&batch->left, left);
	}
	return reached;
}

/* A row can't be removed. */
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
 * Remove the candidates, without those that can't be.  Returns how far it got.
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
 * Do one batch in the current transaction.  Raises an error where it can't be
 * done, after which the transaction has to be rolled back; the cursor may have
 * moved.
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

/* ---------- by hand ---------- */

/*
 * Remove at most max_rows rows of one kind, from where the last call of this
 * session got to, once around.  Returns how many there were.
 */
static int64
expire_by_hand(Expiry *expiry, ExpiryCursor *cursor, int max_rows)
{
	bool		from_start = ledger_cursor_at_start(&cursor->at);
	ExpiryBatch batch;
	int64		removed = 0;
	int64		refused = 0;
	char	   *refusal = NULL;

	batch.expiry = expiry;
	batch.background = false;
	batch.cursor = cursor;

	for (;;)
	{
		CHECK_FOR_INTERRUPTS();
		batch.max_rows = max_rows - removed;
		expiry_batch(&batch);
		removed += batch.removed;
		refused += batch.refused;
		if (refusal == NULL)
			refusal = batch.refusal;

		if (batch.finished)
			ledger_cursor_reset(&cursor->at);
		if (removed >= max_rows || batch.gave_up || (batch.finished && from_start))
			break;
		if (batch.finished)
		{
			/* once more, from the start: it counts what there is */
			from_start = true;
			refused = 0;
			refusal = NULL;
		}
	}

	if (refused > 0)
		ereport(WARNING,
				(errcode(ERRCODE_TRIGGERED_ACTION_EXCEPTION),
				 errmsg_plural("%lld row of \"idempotency.%s\" could not be removed",
							   "%lld rows of \"idempotency.%s\" could not be removed",
							   refused, (long long) refused, expiry->ledger->table),
				 errdetail("Row %s.", refusal),
				 errhint("A trigger or a foreign key on the table refuses it.")));
	return removed;
}

/*
 * expire(max_rows)
 */
Datum
idempotency_expire(PG_FUNCTION_ARGS)
{
	static ExpiryCursor cursors[lengthof(expiries)];
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	int			max_rows = PG_ARGISNULL(0) ? setting_expiry_batch_size : PG_GETARG_INT32(0);
	int			i;

	if (max_rows < 1 || max_rows > EXPIRY_MAX_BATCH_SIZE)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("max_rows must be from 1 to %d", EXPIRY_MAX_BATCH_SIZE)));
	PreventCommandDuringRecovery("idempotency.expire()");
	PreventCommandIfReadOnly("idempotency.expire()");

	InitMaterializedSRF(fcinfo, 0);
	for (i = 0; i < nexpiries; i++)
	{
		Datum		values[2];
		bool		nulls[2] = {false, false};

		values[0] = CStringGetTextDatum(expiries[i]->name);
		values[1] = Int64GetDatum(expire_by_hand(expiries[i], &cursors[i], max_rows));
		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
	}

	return (Datum) 0;
}
