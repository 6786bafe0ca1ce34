/*-------------------------------------------------------------------------
 *
 * worker_run.c
 *	  A worker's run: its entry in the table of databases, its place in the
 *	  pass, its transactions.
 *
 * A worker goes on with the pass where the last one has stopped, and stops
 * itself after SLICE_MS, so that a database can be renamed or copied.  What it
 * has to know and to tell is in the database's entry of the table
 * (worker_table.c); it says when the next is due:
 *
 *		after a slice				SLICE_GAP, in which others find the database
 *									without a worker
 *		after a pass				idempotency.expiry_interval after its
 *									beginning, but not before searching in vain
 *									took no more than 1 / SEARCH_SHARE of the time
 *		after a pass with an error	a delay that doubles, from MIN_BACKOFF to
 *									MAX_BACKOFF; also if the worker was
 *									terminated, or could not connect
 *
 * Each part has its place in its table, which moves on whatever comes of the
 * rows there: what cannot be done now is for the next time around.  A part that
 * fails, or gives up, is over for this pass, and goes on in the next one after
 * that place.  So does a part during which the worker died.
 *
 * A worker that finds no extension says so, unless CREATE EXTENSION has
 * committed since it came ("marks").
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/process/worker_run.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_extension_d.h"
#include "commands/extension.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "postmaster/bgworker.h"
#include "storage/ipc.h"
#include "storage/lmgr.h"
#include "utils/guc.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "base/clock.h"
#include "base/compat.h"
#include "base/lock_limit.h"
#include "base/settings.h"
#include "process/background_process.h"
#include "process/worker_run.h"
#include "process/worker_table.h"

/* From one stay in a database to the next within a pass. */
#define SLICE_GAP (300 * INT64CONST(1000))

/* Searching in vain may take one in so many seconds. */
#define SEARCH_SHARE 25

/* Between two tries after an error. */
#define MIN_BACKOFF (5 * USECS_PER_SEC)
#define MAX_BACKOFF (300 * USECS_PER_SEC)

/* How long to wait for DROP EXTENSION and its like. */
#define EXTENSION_LOCK_MS 1000

StaticAssertDecl(NPARTS <= DATABASE_PARTS, "the table of workers has too few places");

static bool wrote_result = false;

/* Where this worker's search has got to, which is past what it is at. */
static const LedgerPlace *searched = NULL;

/* ---------- the entry ---------- */

/*
 * The entry of our database, which cannot go while we are in it.  The lock is
 * held.
 */
Database *
worker_own_entry(void)
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

/* How long to wait after so many failures in a row. */
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
 * Enter the table.  Returns false if the database is being dropped, or has a
 * worker already.
 */
bool
worker_enter(Oid dbid)
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

/* ---------- the run ---------- */

/* Keep an error's text, as much of it as there is room for. */
void
run_keep_error(WorkerRun *run, const char *text)
{
	int			len = pg_mbcliplen(text, strlen(text), sizeof(run->error) - 1);

	memcpy(run->error, text, len);
	run->error[len] = '\0';
}

/* A part begins, or goes on. */
static void
run_begin_part(WorkerRun *run)
{
	if (run->part < NPARTS)
		ledger_cursor_resume(&run->cursor.at, &run->places[run->part]);
	run->cursor.refusals = 0;
}

/*
 * A part is over for this pass.  If it has come to the end of its table, it
 * begins at the start in the next one.
 */
void
run_end_part(WorkerRun *run, bool at_end)
{
	if (at_end)
		ledger_cursor_reset(&run->cursor.at);
	run->places[run->part] = run->cursor.at.place;
	run->part++;
	run_begin_part(run);
}

/*
 * Note the place of the part that the run is at, and which part that is.  The
 * lock is held.
 */
void
run_note_place(WorkerRun *run, Database *db)
{
	db->part = run->part;
	memcpy(db->places, run->places, sizeof(run->places));
	if (run->part < NPARTS)
		db->places[run->part] = run->cursor.at.place;
}

/* A pass begins, or goes on. */
void
run_begin(WorkerRun *run)
{
	Database   *db;

	memset(run, 0, sizeof(WorkerRun));
	INSTR_TIME_SET_CURRENT(run->started);
	run->outcome = RUN_DONE;

	worker_table_lock(LW_EXCLUSIVE);
	db = worker_own_entry();
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
	run_begin_part(run);
	searched = &run->cursor.at.place;
}

/* The run has ended: say what came of it and when the next is due. */
void
run_end(WorkerRun *run)
{
	Database   *db;
	bool		new_error;
	int			elapsed = (int) milliseconds_since(run->started);

	worker_table_lock(LW_EXCLUSIVE);
	db = worker_own_entry();
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
	run_note_place(run, db);
	db->pass_failed = db->pass_failed || run->failed;

	if (run->outcome == RUN_DONE && run->part < NPARTS)
	{
		/* the oldest that this run met stands for those it did not reach */
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

/* ---------- its transactions ---------- */

/*
 * Is the extension there, and does it stay until the end of the transaction?
 */
bool
run_lock_extension(void)
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

/*
 * Begin the transaction of a batch.  Returns false, and has ended it, if there is
 * nothing to do in this database.
 */
bool
run_begin_transaction(WorkerRun *run)
{
	background_begin();

	if (!run_lock_extension())
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

/* Other locks are waited for no longer than that either, in this transaction. */
void
run_limit_lock_waits(void)
{
	(void) set_config_option("lock_timeout", CppAsString2(EXTENSION_LOCK_MS), PGC_SUSET,
							 PGC_S_SESSION, GUC_ACTION_LOCAL, true, 0, false);
}

void
run_commit_transaction(void)
{
	PopActiveSnapshot();
	background_commit();
}
