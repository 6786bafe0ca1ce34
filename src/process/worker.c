/*-------------------------------------------------------------------------
 *
 * worker.c
 *	  The worker of one database, and the view of all.
 *
 * A pass goes through the ledgers and removes what has expired; at its end it
 * settles what can be settled meanwhile (PART_CALLS): it writes down how
 * transactions that called Stripe have ended, and settles calls that an event
 * tells of.  And it looks at some of the events that wait for a call, whether
 * they still have to (PART_EVENTS).
 *
 * A pass always comes to its end.  Each part has its place in its table, which
 * moves on whatever comes of the rows there: what can't be done now is for the
 * next time around.  A part that fails, or gives up, is over for this pass, and
 * goes on in the next one behind where that was.  So does one that the worker
 * didn't survive.
 *
 * A worker goes on with the pass where the last one has stopped, and stops
 * itself after SLICE_MS, so that a database can be renamed or copied.  What it
 * has to know and to tell is in the database's entry of the table
 * (worker_table.c); it says when the next is due:
 *
 *		after a slice				SLICE_GAP, in which others find the database
 *									without a worker
 *		after a pass				idempotency.expiry_interval after its beginning,
 *									but not before the search for nothing has
 *									taken no more than 1 / SEARCH_SHARE of the time
 *		after a pass with an error	a delay that doubles, from MIN_BACKOFF to
 *									MAX_BACKOFF; also where the worker was
 *									terminated, or couldn't connect
 *
 * Between batches it pauses for PAUSE_SHARE of the time that the last one took,
 * so that those who claim find processor, disk and WAL free.
 *
 * A worker that finds no extension says so, unless CREATE EXTENSION has
 * committed since it came ("marks").
 *
 * It obeys default_transaction_read_only.
 *
 * The statements, and with them triggers of the table, run with the rights of
 * the table's owner; nothing is left for the end of the transaction, which has
 * ours.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/process/worker.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <signal.h>

#include "access/htup_details.h"
#include "access/table.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/pg_authid_d.h"
#include "catalog/pg_database.h"
#include "catalog/pg_extension_d.h"
#include "commands/dbcommands.h"
#include "commands/extension.h"
#include "fmgr.h"
#include "funcapi.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "portability/instr_time.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/lmgr.h"
#include "storage/proc.h"
#include "tcop/tcopprot.h"
#include "utils/acl.h"
#include "utils/backend_status.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"
#include "utils/tuplestore.h"
#include "utils/varlena.h"

#include "base/clock.h"
#include "base/compat.h"
#include "base/lock_limit.h"
#include "base/notify.h"
#include "base/settings.h"
#include "base/subtransaction.h"
#include "events/call_sweep.h"
#include "events/kept_events.h"
#include "ledger/expiry.h"
#include "ledger/ledger_search.h"
#include "ledger/namespace.h"
#include "process/background_process.h"
#include "process/expire.h"
#include "process/worker_table.h"

/* Longest stay in a database. */
#define SLICE_MS 3000

/* From one stay to the next within a pass. */
#define SLICE_GAP (300 * INT64CONST(1000))

/* The pause after a batch, as a share of its own time. */
#define PAUSE_SHARE 3.0

/* Searching in vain may take one in so many seconds. */
#define SEARCH_SHARE 25

/* Between two tries after an error. */
#define MIN_BACKOFF (5 * USECS_PER_SEC)
#define MAX_BACKOFF (300 * USECS_PER_SEC)

/* How long to wait for DROP EXTENSION and its like. */
#define EXTENSION_LOCK_MS 1000

/* Rows and events that are settled in one transaction. */
#define SETTLE_BATCH 100

/* Events that are looked at in one pass. */
#define EVENTS_A_PASS 1000

/* The parts of a pass: one a kind of rows that expires, and these. */
#define PART_CALLS EXPIRY_KINDS
#define PART_EVENTS (EXPIRY_KINDS + 1)
#define NPARTS (EXPIRY_KINDS + 2)

StaticAssertDecl(NPARTS <= DATABASE_PARTS, "the table of workers has too few places");

PGDLLEXPORT void idempotency_worker_main(Datum arg);

static bool wrote_result = false;

/* Where this worker's search has got to, which is behind what it is at. */
static const LedgerPlace *searched = NULL;

/* ---------- the entry ---------- */

/*
 * The entry of our database, which can't go while we are in it.  The lock is
 * held.
 */
static Database *
own_entry(void)
{
	static Oid	dbid = InvalidOid;
	Database   *db;

	if (!OidIsValid(dbid))
		dbid = DatumGetObjectId(MyBgworkerEntry->bgw_main_arg);
	db = worker_table_find(dbid);
	if (db == NULL || db->pid != MyProcPid)
		elog(FATAL, "idempotency worker of database %u has lost its entry", dbid);
	return db;
}

static void
plan_next_run(Database *db, int64 delay)
{
	db->planned = delay;
	db->next_run = GetCurrentTimestamp() + delay;
}

/* After so many failures in a row */
static int64
backoff(int failures)
{
	return Min(MIN_BACKOFF << Min(failures - 1, 10), MAX_BACKOFF);
}

/*
 * The worker ends, and is no longer in the database (this runs after it has
 * left the list of processes).
 */
static void
leave(int code, Datum arg)
{
	Database   *db;

	worker_table_lock(LW_EXCLUSIVE);
	db = worker_table_find(DatumGetObjectId(arg));
	if (db != NULL && db->pid == MyProcPid)
	{
		db->pid = 0;
		if (!wrote_result)
		{
			/* what it was at may be why: that is over for this pass */
			if (db->pass_started != 0 && db->part < NPARTS)
			{
				if (db->part == PART_EVENTS)
					db->kept.left += SETTLE_BATCH;
				else if (searched != NULL)
					db->places[db->part] = *searched;
				db->part++;
				db->pass_failed = true;
			}
			db->outcome = RUN_FAILED;
			db->failures++;
			plan_next_run(db, backoff(db->failures));
			strlcpy(db->error, "the worker was terminated, or could not connect",
					DATABASE_ERROR_LEN);
			db->error_at = GetCurrentTimestamp();
		}
	}
	worker_table_unlock();
}

/*
 * Come into the entry.  Returns false where the database is being dropped, or
 * has a worker already.
 */
static bool
enter(Oid dbid)
{
	Database   *db;
	bool		entered = false;

	worker_table_lock(LW_EXCLUSIVE);
	db = worker_table_find(dbid);
	if (db != NULL && db->pid == 0 && !db->held)
	{
		db->starting = false;
		db->pid = MyProcPid;
		entered = true;
	}
	worker_table_unlock();

	if (entered)
		on_shmem_exit(leave, ObjectIdGetDatum(dbid));
	return entered;
}

/* ---------- a run ---------- */

typedef struct Run
{
	ExpiryCursor cursor;
	int			part;			/* that it is at */
	LedgerPlace places[DATABASE_PARTS]; /* of the others */
	KeptPlace	kept;
	instr_time	started;
	int64		removed;
	int64		refused;
	TimestampTz oldest;			/* seen in this run */
	RunOutcome	outcome;
	bool		failed;			/* one of the parts has */
	bool		without;		/* no extension here */
	uint32		marks;			/* when we came */
	char		error[DATABASE_ERROR_LEN];
} Run;

/* An error's text, as much of it as there is room for. */
static void
keep_error(Run *run, const char *text)
{
	int			len = pg_mbcliplen(text, strlen(text), sizeof(run->error) - 1);

	memcpy(run->error, text, len);
	run->error[len] = '\0';
}

/*
 * Is the extension there, and does it stay until the end of the transaction?
 */
static bool
lock_extension(void)
{
	Oid			extension = get_extension_oid("idempotency", true);
	int			nestlevel;

	if (!OidIsValid(extension))
		return false;

	nestlevel = lock_limit_begin(EXTENSION_LOCK_MS);
	LockDatabaseObject(ExtensionRelationId, extension, 0, AccessShareLock);
	lock_limit_end(nestlevel);

	return get_extension_oid("idempotency", true) == extension;
}

/* A part begins, or goes on. */
static void
begin_part(Run *run)
{
	if (run->part < NPARTS)
		ledger_cursor_resume(&run->cursor.at, &run->places[run->part]);
	run->cursor.refusals = 0;
}

/*
 * A part is over for this pass.  The next begins with the start of its table
 * where this one has come to the end.
 */
static void
end_part(Run *run, bool at_end)
{
	if (at_end)
		ledger_cursor_reset(&run->cursor.at);
	run->places[run->part] = run->cursor.at.place;
	run->part++;
	begin_part(run);
}

/* The place of the part that the run is at, and which one that is.  The lock is held. */
static void
note_place(Run *run, Database *db)
{
	db->part = run->part;
	memcpy(db->places, run->places, sizeof(run->places));
	if (run->part < NPARTS)
		db->places[run->part] = run->cursor.at.place;
}

/* A pass begins, or goes on. */
static void
begin_run(Run *run)
{
	Database   *db;

	memset(run, 0, sizeof(Run));
	INSTR_TIME_SET_CURRENT(run->started);
	run->outcome = RUN_DONE;

	worker_table_lock(LW_EXCLUSIVE);
	db = own_entry();
	run->marks = db->marks;
	if (db->pass_started == 0)
	{
		db->pass_started = GetCurrentTimestamp();
		db->part = 0;
		db->pass_failed = false;
		db->pass_searched = 0;
		db->pass_refused = 0;
		db->pass_unsettled = 0;
		db->pass_left = 0;
	}
	run->part = db->part;
	memcpy(run->places, db->places, sizeof(run->places));
	worker_table_unlock();
	begin_part(run);
	searched = &run->cursor.at.place;
}

/* What a batch has done, for the view and for whoever goes on. */
static void
note_batch(Run *run, ExpiryBatch *batch)
{
	Database   *db;

	run->removed += batch->removed;
	run->refused += batch->refused;
	if (batch->oldest != 0 && (run->oldest == 0 || batch->oldest < run->oldest))
		run->oldest = batch->oldest;
	if (batch->refusal != NULL && run->error[0] == '\0')
		keep_error(run, batch->refusal);
	if (batch->gave_up)
		run->failed = true;
	if (batch->finished || batch->gave_up)
		end_part(run, batch->finished);

	worker_table_lock(LW_EXCLUSIVE);
	db = own_entry();
	db->removed += batch->removed;
	db->pass_refused += batch->refused;
	db->pass_searched += batch->searched;
	if (batch->left != 0 && (db->pass_left == 0 || batch->left < db->pass_left))
		db->pass_left = batch->left;
	note_place(run, db);
	worker_table_unlock();
}

/*
 * Begin the transaction of a batch.  Returns false, and has ended it, where
 * there is nothing to do in this database.
 */
static bool
begin_batch(Run *run)
{
	background_begin();

	if (!lock_extension())
	{
		CommitTransactionCommand();
		run->without = true;
		return false;
	}
	if (!setting_expiry || XactReadOnly)
	{
		CommitTransactionCommand();
		run->outcome = !setting_expiry ? RUN_OFF : RUN_READ_ONLY;
		return false;
	}
	background_restrict();
	PushActiveSnapshot(GetTransactionSnapshot());
	return true;
}

static void
commit_batch(void)
{
	PopActiveSnapshot();
	background_commit();
}

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

/*
 * The batches of one kind of rows, until there are no more or the time is over.
 * Returns false where the run ends.
 */
static bool
run_expiry(Run *run, Expiry *todo, MemoryContext context)
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
		if (!begin_batch(run))
			return false;
		/* what is told of the batch has to outlive its transaction */
		MemoryContextSwitchTo(context);
		expiry_batch(&batch);
		commit_batch();
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
typedef struct Settled
{
	int			done;
	int			seen;			/* that could have been done */
	int			refused;
	char	   *refusal;
	bool		over;			/* with the part, for this pass */
	bool		at_end;			/* of its table */
} Settled;

/*
 * Who reads which namespace is in force computes it where that isn't written
 * down.  (A database without any has an error of its own.)
 */
static void
look_at_namespace(void *arg)
{
	Namespace	ns;

	namespace_in_force(&ns);
	namespace_write_down();
}

static void
settle_some_calls(Run *run, Settled *settled)
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
settle_some_events(Run *run, Settled *settled, int *looked_at)
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

/* What it has done, for the view and for whoever goes on. */
static void
note_settled(Run *run, Settled *settled, instr_time started)
{
	int64		elapsed = (int64) (milliseconds_since(started) * 1000);
	Database   *db;

	run->refused += settled->refused;
	if (settled->refusal != NULL && run->error[0] == '\0')
		keep_error(run, settled->refusal);
	if (settled->over)
		end_part(run, settled->at_end);

	worker_table_lock(LW_EXCLUSIVE);
	db = own_entry();
	db->pass_refused += settled->refused;
	db->pass_unsettled += settled->refused;

	/* what it took to find nothing that can be done */
	db->pass_searched += settled->seen == 0 ? elapsed :
		elapsed * (settled->seen - settled->done) / settled->seen;
	note_place(run, db);
	worker_table_unlock();
}

static void
send_notices_work(void *arg)
{
	send_kept_notices();
}

/*
 * Send what prepared transactions have left.  Where that fails it is logged when
 * it begins, shown, and left to the next worker.
 */
static void
send_notices(Run *run)
{
	static bool failed = false;
	ErrorData  *error = failed ? NULL : in_subtransaction(send_notices_work, NULL);
	char	   *text;
	const char *last;
	bool		is_new;

	if (error == NULL)
		return;
	failed = true;
	text = psprintf("could not send the notices of a prepared transaction: %s", error->message);
	worker_table_lock(LW_SHARED);
	last = own_entry()->error;
	is_new = last[0] == '\0' || strncmp(last, text, strlen(last)) != 0;
	worker_table_unlock();
	if (run->error[0] == '\0')
		keep_error(run, text);
	ereport(is_new && !error_is_about_locks(error) ? LOG : DEBUG1,
			(errcode(error->sqlerrcode), errmsg_internal("%s", text)));
	FreeErrorData(error);
}

/*
 * Settle what can be settled of calls or, with "events", look at events that
 * wait.  Returns false where the run ends.
 */
static bool
run_settling(Run *run, bool events, MemoryContext context)
{
	int			looked_at = 0;

	for (;;)
	{
		instr_time	started;
		Settled		settled;

		check_for_signals();
		MemoryContextReset(context);
		MemoryContextSwitchTo(context);

		pgstat_report_activity(STATE_RUNNING, "settling calls to Stripe");
		INSTR_TIME_SET_CURRENT(started);
		if (!begin_batch(run))
			return false;
		(void) set_config_option("lock_timeout", CppAsString2(EXTENSION_LOCK_MS), PGC_SUSET,
								 PGC_S_SESSION, GUC_ACTION_LOCAL, true, 0, false);
		/* what is told of it has to outlive its transaction */
		MemoryContextSwitchTo(context);
		if (events)
			settle_some_events(run, &settled, &looked_at);
		else
			settle_some_calls(run, &settled);
		commit_batch();
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
 * An error has ended the transaction.  "context" is where its text may be.
 */
static void
catch_error(Run *run, MemoryContext context)
{
	ErrorData  *error;

	HOLD_INTERRUPTS();
	MemoryContextSwitchTo(context);
	error = CopyErrorData();

	/* that somebody alters the table needn't be in the log */
	if (error->sqlerrcode != ERRCODE_LOCK_NOT_AVAILABLE)
		EmitErrorReport();
	AbortCurrentTransaction();
	MemoryContextSwitchTo(context);
	FlushErrorState();
	RESUME_INTERRUPTS();

	run->failed = true;
	keep_error(run, error->message);
}

/* It ends the work on one ledger, and not that on the next. */
static void
note_error(Run *run, MemoryContext context)
{
	catch_error(run, context);

	/* this pass is done with that one */
	end_part(run, false);
}

/*
 * The first thing that a worker does, in a transaction of its own, whatever
 * idempotency.expiry says: somebody waits for it.
 */
static void
run_notices(Run *run)
{
	background_begin();
	if (!lock_extension() || XactReadOnly)
	{
		CommitTransactionCommand();
		return;
	}
	background_restrict();
	PushActiveSnapshot(GetTransactionSnapshot());
	(void) set_config_option("lock_timeout", CppAsString2(EXTENSION_LOCK_MS), PGC_SUSET,
							 PGC_S_SESSION, GUC_ACTION_LOCAL, true, 0, false);
	send_notices(run);
	commit_batch();
}

/* Where the run has ended, say what came of it and when the next is due. */
static void
end_run(Run *run)
{
	Database   *db;
	bool		new_error;
	int			elapsed = (int) milliseconds_since(run->started);

	worker_table_lock(LW_EXCLUSIVE);
	db = own_entry();
	if (run->without)
	{
		if (db->marks == run->marks)
			db->known = DATABASE_WITHOUT;
		else
			db->next_run = 0;
		db->pass_started = 0;
		db->outcome = RUN_NONE;
		wrote_result = true;
		worker_table_unlock();
		return;
	}

	db->known = DATABASE_WITH;
	db->last_run = GetCurrentTimestamp();
	note_place(run, db);
	db->pass_failed = db->pass_failed || run->failed;

	if (run->outcome == RUN_DONE && run->part < NPARTS)
	{
		/* the oldest that this run met stands for those it didn't reach */
		db->oldest = run->oldest;
		if (db->pass_failed)
			run->outcome = RUN_FAILED;
		plan_next_run(db, SLICE_GAP);
	}
	else
	{
		TimestampTz now = db->last_run;
		int64		delay = setting_expiry_interval * USECS_PER_SEC;

		if (db->pass_failed)
			run->outcome = RUN_FAILED;
		else if (run->outcome == RUN_DONE && db->pass_refused > 0)
			run->outcome = RUN_REFUSED;
		db->failures = db->pass_failed ? db->failures + 1 : 0;
		if (db->pass_failed)
			delay = backoff(db->failures);
		else if (db->pass_started <= now)
			delay = Max(delay - (now - db->pass_started),
						db->pass_searched * (SEARCH_SHARE - 1));
		plan_next_run(db, Max(delay, SLICE_GAP));

		db->oldest = db->pass_left;
		db->refused = db->pass_refused;
		db->unsettled = db->pass_unsettled;
		db->pass_started = 0;
	}
	db->outcome = run->outcome;

	new_error = run->error[0] != '\0' && strcmp(run->error, db->error) != 0;
	if (run->error[0] != '\0')
	{
		strlcpy(db->error, run->error, DATABASE_ERROR_LEN);
		db->error_at = db->last_run;
	}
	worker_table_unlock();
	wrote_result = true;

	if (run->outcome == RUN_OFF || run->outcome == RUN_READ_ONLY)
		ereport(DEBUG1,
				(errmsg_internal("idempotency worker: nothing removed, %s is %s",
								 run->outcome == RUN_OFF ? "idempotency.expiry" :
								 "default_transaction_read_only",
								 run->outcome == RUN_OFF ? "off" : "on")));
	else
		ereport(run->refused > 0 && new_error ? LOG : DEBUG1,
				(errmsg("idempotency worker: %lld expired rows removed, %lld refused, in %d ms",
						(long long) run->removed, (long long) run->refused, elapsed),
				 run->refused > 0 ? errdetail("Row %s.", run->error) : 0));
}

void
idempotency_worker_main(Datum arg)
{
	Oid			dbid = DatumGetObjectId(arg);
	MemoryContext context;
	MemoryContext run_context;
	static Run	run;			/* leave() looks at it, whatever has become of the stack */

	if (!enter(dbid))
		proc_exit(0);

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnectionByOid(dbid, InvalidOid, 0);
	pgstat_report_appname("idempotency worker");
	background_fix_settings();
	/* what a crash takes back is removed again */
	background_set("synchronous_commit", "off");

	run_context = AllocSetContextCreate(TopMemoryContext, "idempotency worker",
										ALLOCSET_DEFAULT_SIZES);
	context = AllocSetContextCreate(TopMemoryContext, "idempotency worker batch",
									ALLOCSET_DEFAULT_SIZES);
	begin_run(&run);

	PG_TRY();
	{
		MemoryContextSwitchTo(context);
		run_notices(&run);
	}
	PG_CATCH();
	{
		catch_error(&run, run_context);
	}
	PG_END_TRY();

	while (run.part < NPARTS)
	{
		volatile bool more = false;
		volatile bool failed = false;

		PG_TRY();
		{
			more = run.part < EXPIRY_KINDS ?
				run_expiry(&run, expiry_kinds[run.part], context) :
				run_settling(&run, run.part == PART_EVENTS, context);
		}
		PG_CATCH();
		{
			note_error(&run, run_context);
			failed = true;
		}
		PG_END_TRY();
		if (!more && !failed)
			break;
	}

	end_run(&run);
	proc_exit(0);
}
