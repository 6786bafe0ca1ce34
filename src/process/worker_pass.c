/*-------------------------------------------------------------------------
 *
 * worker_pass.c
 *	  What a worker does in its database: a pass through the ledgers.
 *
 * A pass removes what has expired; then it settles what can be settled
 * meanwhile (PART_CALLS): it writes down how transactions that called Stripe
 * have ended, and settles calls that an event tells of.  At last it looks at
 * some of the events that wait for a call, whether they still have to
 * (PART_EVENTS).
 *
 * A pass always comes to its end (worker_run.c), which may take several workers.
 * Between batches a worker pauses for PAUSE_SHARE of the time that the last one
 * took, so that claims find processor, disk and WAL free.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/process/worker_pass.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "pgstat.h"
#include "portability/instr_time.h"
#include "postmaster/interrupt.h"
#include "storage/latch.h"
#include "utils/backend_status.h"
#include "utils/guc.h"
#include "utils/memutils.h"

#include "base/clock.h"
#include "base/compat.h"
#include "base/settings.h"
#include "base/subtransaction.h"
#include "events/call_sweep.h"
#include "events/kept_events.h"
#include "ledger/expiry.h"
#include "ledger/ledger_search.h"
#include "ledger/namespace.h"
#include "process/expire.h"
#include "process/worker_pass.h"
#include "process/worker_table.h"

/* Longest stay in a database. */
#define SLICE_MS 3000

/* The pause after a batch, as a share of its own time. */
#define PAUSE_SHARE 3.0

/* Events that are looked at in one pass. */
#define EVENTS_A_PASS 1000

/* Leave the processor, the disk and the WAL to others for a while. */
static void
pause_after(instr_time started)
{
	static uint32 wait_event = 0;
	double		pause = milliseconds_since(started) * PAUSE_SHARE;

	if (wait_event == 0)
		wait_event = WAIT_EVENT_NEW("IdempotencyExpiryPause");
	if (pause < 1)
		return;
	(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
					 (long) pause, wait_event);
	ResetLatch(MyLatch);
}

/* Before each batch */
static void
check_for_signals(void)
{
	CHECK_FOR_INTERRUPTS();
	if (ConfigReloadPending)
	{
		ConfigReloadPending = false;
		ProcessConfigFile(PGC_SIGHUP);
	}
}

/* Note what a batch has done, for the view and for whoever goes on. */
static void
note_batch(WorkerRun *run, ExpiryBatch *batch)
{
	Database   *db;

	run->removed += batch->removed;
	run->refused += batch->refused;
	if (batch->oldest != 0 && (run->oldest == 0 || batch->oldest < run->oldest))
		run->oldest = batch->oldest;
	if (batch->refusal != NULL && run->error[0] == '\0')
		run_keep_error(run, batch->refusal);
	if (batch->gave_up)
		run->failed = true;
	if (batch->finished || batch->gave_up)
		run_end_part(run, batch->finished);

	worker_table_lock(LW_EXCLUSIVE);
	db = worker_own_entry();
	db->removed += batch->removed;
	db->pass_refused += batch->refused;
	db->pass_searched += batch->searched;
	if (batch->left != 0 && (db->pass_left == 0 || batch->left < db->pass_left))
		db->pass_left = batch->left;
	run_note_place(run, db);
	worker_table_unlock();
}

/*
 * The batches of one kind of rows, until there are no more or the time is over.
 * Returns false if the run ends.
 */
static bool
run_expiry(WorkerRun *run, Expiry *todo, MemoryContext context)
{
	char		activity[128];

	snprintf(activity, sizeof(activity), "removing expired rows of idempotency.%s (%s)",
			 todo->ledger->table, todo->name);

	for (;;)
	{
		ExpiryBatch batch;
		instr_time	started;

		check_for_signals();
		MemoryContextReset(context);
		MemoryContextSwitchTo(context);

		pgstat_report_activity(STATE_RUNNING, activity);
		INSTR_TIME_SET_CURRENT(started);
		memset(&batch, 0, sizeof(batch));
		batch.expiry = todo;
		batch.max_rows = setting_expiry_batch_size;
		batch.background = true;
		batch.cursor = &run->cursor;
		if (!run_begin_transaction(run))
			return false;
		/* what is told of the batch has to outlive its transaction */
		MemoryContextSwitchTo(context);
		expiry_batch(&batch);
		run_commit_transaction();
		MemoryContextSwitchTo(context);
		note_batch(run, &batch);
		pgstat_report_stat(true);
		pgstat_report_activity(STATE_IDLE, NULL);

		if (milliseconds_since(run->started) > SLICE_MS)
			return false;

		pause_after(started);
		if (batch.finished || batch.gave_up)
			return true;
	}
}

/* What a batch of the settling has done. */
typedef struct SettledBatch
{
	int			done;
	int			seen;			/* that could have been done */
	int			refused;
	char	   *refusal;
	bool		over;			/* with the part, for this pass */
	bool		at_end;			/* of its table */
} SettledBatch;

/*
 * As long as it is not written down which namespace is in force, every reader
 * computes it.  (A database without any has an error of its own.)
 */
static void
look_at_namespace(void *arg)
{
	Namespace	ns;

	namespace_in_force(&ns);
	namespace_write_down();
}

static void
settle_some_calls(WorkerRun *run, SettledBatch *settled)
{
	SettleBatch batch;

	if (ledger_cursor_at_start(&run->cursor.at))
		(void) try_in_subtransaction(look_at_namespace, NULL);

	memset(&batch, 0, sizeof(batch));
	batch.max_rows = SETTLE_BATCH;
	batch.cursor = &run->cursor.at;
	settle_calls(&batch);
	settled->done = batch.settled;
	settled->seen = batch.seen;
	settled->refused = batch.refused;
	settled->refusal = batch.refusal;
	settled->over = settled->at_end = batch.finished;
}

/* "looked_at" counts those of this pass, as far as this worker knows. */
static void
settle_some_events(WorkerRun *run, SettledBatch *settled, int *looked_at)
{
	KeptBatch	batch;

	memset(&batch, 0, sizeof(batch));
	batch.max_events = SETTLE_BATCH;
	batch.place = &run->kept;
	worker_table_read_kept_place(&run->kept);
	settle_kept_events(&batch);
	worker_table_write_kept_place(&run->kept);
	settled->done = batch.forgotten;
	settled->seen = batch.seen;
	settled->refused = batch.refused;
	settled->refusal = batch.refusal;
	*looked_at += batch.seen;
	settled->over = batch.finished || *looked_at >= EVENTS_A_PASS;
	settled->at_end = true;
}

/* Note what it has done, for the view and for whoever goes on. */
static void
note_settled(WorkerRun *run, SettledBatch *settled, instr_time started)
{
	int64		elapsed = (int64) (milliseconds_since(started) * 1000);
	Database   *db;

	run->refused += settled->refused;
	if (settled->refusal != NULL && run->error[0] == '\0')
		run_keep_error(run, settled->refusal);
	if (settled->over)
		run_end_part(run, settled->at_end);

	worker_table_lock(LW_EXCLUSIVE);
	db = worker_own_entry();
	db->pass_refused += settled->refused;
	db->pass_unsettled += settled->refused;

	/* what it took to find nothing that can be done */
	db->pass_searched += settled->seen == 0 ? elapsed :
		elapsed * (settled->seen - settled->done) / settled->seen;
	run_note_place(run, db);
	worker_table_unlock();
}

/*
 * Settle what can be settled of calls or, with "events", look at events that
 * wait.  Returns false if the run ends.
 */
static bool
run_settling(WorkerRun *run, bool events, MemoryContext context)
{
	int			looked_at = 0;

	for (;;)
	{
		instr_time	started;
		SettledBatch settled;

		check_for_signals();
		MemoryContextReset(context);
		MemoryContextSwitchTo(context);

		pgstat_report_activity(STATE_RUNNING, "settling calls to Stripe");
		INSTR_TIME_SET_CURRENT(started);
		if (!run_begin_transaction(run))
			return false;
		run_limit_lock_waits();
		/* what is told of it has to outlive its transaction */
		MemoryContextSwitchTo(context);
		if (events)
			settle_some_events(run, &settled, &looked_at);
		else
			settle_some_calls(run, &settled);
		run_commit_transaction();
		MemoryContextSwitchTo(context);
		note_settled(run, &settled, started);
		pgstat_report_stat(true);
		pgstat_report_activity(STATE_IDLE, NULL);

		if (milliseconds_since(run->started) > SLICE_MS)
			return false;
		pause_after(started);
		if (settled.over)
			return true;
	}
}

/*
 * Do the part that the run is at.  Returns false if the run ends.  "context" is
 * for what has to outlive a transaction.
 */
bool
worker_do_part(WorkerRun *run, MemoryContext context)
{
	if (run->part < EXPIRY_KINDS)
		return run_expiry(run, expiry_kinds[run->part], context);
	return run_settling(run, run->part == PART_EVENTS, context);
}
