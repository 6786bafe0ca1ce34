/*-------------------------------------------------------------------------
 *
 * launcher.c
 *	  The launcher of the background workers.
 *
 * One process, connected to no database, that starts a short-lived worker
 * (worker.c) in each database that has the extension, whenever one is due there.
 * All that it knows is in the table of databases (worker_table.c), so it may die
 * at any time: the postmaster starts it again, and it goes on from the table.
 * It never waits for anything to have happened; each time it wakes it looks at
 * what is: who is due, who is running, how many may run.  So a start that failed
 * is simply still due.
 *
 * It wakes when a worker has ended, when CREATE EXTENSION has committed, on a
 * reload, and when the next worker is due.  Every ten seconds it reads
 * pg_database.  A database of which nothing is known is looked at by a worker,
 * one a second at most, and only if it has statistics, that is, has been used.
 *
 * Workers are short-lived because RENAME, or a copy of the database, waits only
 * five seconds for other processes to leave it.  DROP DATABASE need not wait: our
 * processes are sent away (drop_database.c).
 *
 * It also sees to Stripe's answers that nobody waits for any more
 * (abandoned_orders.c); it does so first, so that no error of the rest keeps it
 * from that.
 *
 * Errors are left to the postmaster, too: it starts the launcher again after
 * LAUNCHER_RESTART_SECS.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/process/launcher.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <signal.h>

#include "access/genam.h"
#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/pg_database.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/proc.h"
#include "tcop/tcopprot.h"
#include "utils/backend_status.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "base/clock.h"
#include "base/compat.h"
#include "base/settings.h"
#include "process/abandoned_orders.h"
#include "process/background_process.h"
#include "process/launcher.h"
#include "process/worker_table.h"

#define LAUNCHER_RESTART_SECS 5

/* How often pg_database is read, and the longest sleep. */
#define REFRESH_MS (10 * 1000L)

/* Between two looks into databases of which nothing is known. */
#define PROBE_USECS USECS_PER_SEC

/* How long to wait after there was no slot for a worker, and how often to log it. */
#define NO_SLOT_USECS (5 * USECS_PER_SEC)
#define NO_SLOT_LOG_USECS USECS_PER_HOUR

PGDLLEXPORT void idempotency_launcher_main(Datum arg);

/* Workers that this launcher has asked for, by entry of the table. */
static struct
{
	BackgroundWorkerHandle *handle;
	Oid			dbid;
}			asked[MAX_DATABASES];

static TimestampTz no_slot_logged = 0;
static bool full_logged = false;
static TimestampTz last_probe = 0;

/* ---------- DROP DATABASE ---------- */

/*
 * A database is about to be dropped: end our worker there, and keep the launcher
 * from asking for another.  Only a superuser may end a superuser's process, which
 * is why DROP DATABASE ... WITH (FORCE) by its owner cannot do that itself.
 * Returns false if there is no worker any more.
 */
bool
worker_send_away(Oid dbid)
{
	Database   *db;
	bool		running = false;

	worker_table_lock(LW_EXCLUSIVE);
	db = worker_table_find(dbid);
	if (db != NULL)
	{
		db->held = true;

		/* while we hold the lock, it cannot have ended */
		running = db->pid != 0;
		if (running)
			kill(db->pid, SIGTERM);
	}
	worker_table_unlock();
	return running;
}

/*
 * The database has been dropped, or stays after all.
 */
void
worker_may_return(Oid dbid, bool dropped)
{
	Database   *db;

	worker_table_lock(LW_EXCLUSIVE);
	db = worker_table_find(dbid);
	if (db != NULL && !dropped)
		db->held = false;
	else if (db != NULL && db->pid == 0)
		worker_table_forget(db);
	worker_table_wake_launcher();
	worker_table_unlock();
}

/* ---------- which databases there are ---------- */

typedef struct Listed
{
	Oid			dbid;
	bool		connectable;
	bool		used;			/* has statistics */
} Listed;

static int
compare_listed(const void *a, const void *b)
{
	Oid			dbid1 = ((const Listed *) a)->dbid;
	Oid			dbid2 = ((const Listed *) b)->dbid;

	return dbid1 < dbid2 ? -1 : dbid1 > dbid2;
}

static Listed *
list_databases(int *n)
{
	MemoryContext context = CurrentMemoryContext;
	Listed	   *list;
	int			room = 64;
	Relation	rel;
	TableScanDesc scan;
	HeapTuple	tuple;

	list = palloc(room * sizeof(Listed));
	*n = 0;

	StartTransactionCommand();
	(void) GetTransactionSnapshot();
	rel = table_open(DatabaseRelationId, AccessShareLock);
	scan = table_beginscan_catalog(rel, 0, NULL);
	while ((tuple = heap_getnext(scan, ForwardScanDirection)) != NULL)
	{
		Form_pg_database form = (Form_pg_database) GETSTRUCT(tuple);

		if (*n == room)
		{
			room *= 2;
			list = repalloc(list, room * sizeof(Listed));
		}
		list[*n].dbid = form->oid;

		list[*n].connectable = form->datallowconn && !form->datistemplate &&
			form->datconnlimit != DATCONNLIMIT_INVALID_DB;
		list[*n].used = pgstat_fetch_stat_dbentry(form->oid) != NULL;
		(*n)++;
	}
	table_endscan(scan);
	table_close(rel, AccessShareLock);
	CommitTransactionCommand();
	MemoryContextSwitchTo(context);

	qsort(list, *n, sizeof(Listed), compare_listed);
	return list;
}

/* Bring the table in line with pg_database. */
static void
refresh(void)
{
	Listed	   *list;
	Listed		key;
	uint32		serial;
	bool		full = false;
	int			n;
	int			i;

	worker_table_lock(LW_SHARED);
	serial = worker_table->serial;
	worker_table_unlock();

	list = list_databases(&n);

	worker_table_lock(LW_EXCLUSIVE);
	for (i = 0; i < worker_table->used; i++)
	{
		Database   *db = &worker_table->entries[i];

		if (!OidIsValid(db->dbid))
			continue;
		key.dbid = db->dbid;
		if (bsearch(&key, list, n, sizeof(Listed), compare_listed) != NULL ||
			db->pid != 0 || db->starting)
			continue;

		/* one added since pg_database was read may be newer than that */
		if (db->serial <= serial)
			worker_table_forget(db);
	}
	for (i = 0; i < n; i++)
	{
		Database   *db = worker_table_find(list[i].dbid);

		if (db == NULL && list[i].connectable && list[i].used)
		{
			db = worker_table_add(list[i].dbid, false);
			if (db == NULL)
				full = true;
		}
		if (db != NULL)
			db->startable = list[i].connectable &&
				(list[i].used || db->known == DATABASE_WITH);
	}
	worker_table_unlock();
	pfree(list);

	if (full && !full_logged)
		ereport(LOG,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("idempotency launcher: expired rows are removed in %d databases and no more",
						MAX_DATABASES)));
	full_logged = full;
}

/* ---------- workers ---------- */

/*
 * See what became of the workers that were asked for.  One that ended before it
 * came to its entry has failed: the server's log says why.
 */
static void
reap(void)
{
	int			i;

	for (i = 0; i < MAX_DATABASES; i++)
	{
		pid_t		pid;

		if (asked[i].handle == NULL ||
			GetBackgroundWorkerPid(asked[i].handle, &pid) != BGWH_STOPPED)
			continue;

		worker_table_lock(LW_EXCLUSIVE);
		if (worker_table->entries[i].dbid == asked[i].dbid && worker_table->entries[i].starting)
		{
			Database   *db = &worker_table->entries[i];

			db->starting = false;
			db->planned = NO_SLOT_USECS;
			db->next_run = GetCurrentTimestamp() + db->planned;
		}
		worker_table_unlock();

		pfree(asked[i].handle);
		asked[i].handle = NULL;
	}
}

static bool
ask_for_worker(int index, Oid dbid)
{
	MemoryContext context;
	bool		registered;

	/* the handle outlives this round */
	context = MemoryContextSwitchTo(TopMemoryContext);
	registered = background_start("worker", dbid, &asked[index].handle);
	MemoryContextSwitchTo(context);
	asked[index].dbid = dbid;
	if (!registered)
		asked[index].handle = NULL;
	return registered;
}

/*
 * Choose the database that is most overdue, if one more worker may run, and mark
 * it as starting.  Returns its entry, or -1; *sleep is when the next one is due,
 * in microseconds, if that is sooner.
 */
static int
choose_database(TimestampTz now, Oid *dbid, int64 *sleep)
{
	int			running = 0;
	int			due = -1;
	bool		probe_due = is_over(last_probe, PROBE_USECS, now);
	int			i;

	worker_table_lock(LW_EXCLUSIVE);
	for (i = 0; i < worker_table->used; i++)
	{
		Database   *db = &worker_table->entries[i];
		int64		wait;

		if (!OidIsValid(db->dbid))
			continue;
		if (db->pid != 0 || db->starting)
		{
			running++;
			continue;
		}
		if (!db->startable || db->known == DATABASE_WITHOUT || db->held)
			continue;

		/* if the clock was set back, do not wait until it is there again */
		if (db->next_run > now + db->planned)
			db->next_run = now + db->planned;

		wait = db->next_run - now;
		if (db->known == DATABASE_UNKNOWN && !probe_due)
			wait = Max(wait, last_probe + PROBE_USECS - now);
		if (wait > 0)
			*sleep = Min(*sleep, wait);
		else if (asked[i].handle == NULL &&
				 (due < 0 || db->next_run < worker_table->entries[due].next_run))
			due = i;
	}

	/* if as many run as may, the end of one wakes us */
	if (running >= setting_max_workers)
		due = -1;
	if (due >= 0)
	{
		Database   *db = &worker_table->entries[due];

		*dbid = db->dbid;
		db->starting = true;
		if (db->known == DATABASE_UNKNOWN)
			last_probe = now;
	}
	worker_table_unlock();
	return due;
}

/* There was no slot for a worker in a database that was chosen. */
static void
note_no_slot(int entry, Oid dbid, TimestampTz now)
{
	int			i;

	worker_table_lock(LW_EXCLUSIVE);
	for (i = 0; i < worker_table->used; i++)
	{
		Database   *db = &worker_table->entries[i];

		if (i == entry && db->dbid == dbid)
			db->starting = false;
		if (OidIsValid(db->dbid) && db->known == DATABASE_WITH && db->startable &&
			db->pid == 0 && !db->starting && db->next_run <= now)
			db->outcome = RUN_NO_SLOT;
	}
	worker_table_unlock();

	if (!is_over(no_slot_logged, NO_SLOT_LOG_USECS, now))
		return;
	no_slot_logged = now;
	ereport(LOG,
			(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
			 errmsg("idempotency launcher: out of background worker slots"),
			 errdetail("Expired rows are removed as soon as there is one."),
			 errhint("Consider increasing \"max_worker_processes\".")));
}

/*
 * Ask for a worker in each database that is due, the most overdue first, as far
 * as idempotency.max_workers allows.  Returns the milliseconds after which to
 * look again.
 */
static long
start_workers(void)
{
	for (;;)
	{
		TimestampTz now = GetCurrentTimestamp();
		int64		sleep = REFRESH_MS * 1000;
		Oid			dbid;
		int			entry = choose_database(now, &dbid, &sleep);

		if (entry < 0)
			return sleep / 1000 + 1;
		if (!ask_for_worker(entry, dbid))
		{
			note_no_slot(entry, dbid, now);
			return NO_SLOT_USECS / 1000;
		}
	}
}

static void
launcher_exit(int code, Datum arg)
{
	worker_table_lock(LW_EXCLUSIVE);
	worker_table->launcher_pid = 0;
	worker_table_unlock();
}

/* Enter the table, and take up what an earlier launcher has left there. */
static void
launcher_enter(void)
{
	int			i;

	worker_table_lock(LW_EXCLUSIVE);
	worker_table->launcher_pid = MyProcPid;
	worker_table->launcher_proc = MY_PROC_NUMBER;
	for (i = 0; i < worker_table->used; i++)
		worker_table->entries[i].starting = false;
	worker_table_unlock();
	before_shmem_exit(launcher_exit, (Datum) 0);
}

void
idempotency_launcher_main(Datum arg)
{
	MemoryContext context;
	TimestampTz last_refresh = 0;
	uint32		wait_event;
	bool		refresh_now = true;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnection(NULL, NULL, 0);
	pgstat_report_appname("idempotency launcher");
	wait_event = WAIT_EVENT_NEW("IdempotencyLauncherMain");

	launcher_enter();
	context = AllocSetContextCreate(TopMemoryContext, "idempotency launcher",
									ALLOCSET_DEFAULT_SIZES);
	MemoryContextSwitchTo(context);

	for (;;)
	{
		TimestampTz now;
		long		sleep;
		long		sleep_left;

		CHECK_FOR_INTERRUPTS();
		if (ConfigReloadPending)
		{
			ConfigReloadPending = false;
			ProcessConfigFile(PGC_SIGHUP);
			refresh_now = true;
		}

		sleep_left = see_to_left_orders();

		now = GetCurrentTimestamp();
		if (refresh_now || is_over(last_refresh, REFRESH_MS * 1000, now))
		{
			pgstat_report_activity(STATE_RUNNING, "looking for databases");
			refresh();
			refresh_now = false;
			last_refresh = now;
		}
		reap();
		sleep = start_workers();
		pgstat_report_activity(STATE_IDLE, NULL);
		MemoryContextReset(context);

		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 Min(Min(sleep, sleep_left), REFRESH_MS), wait_event);
		ResetLatch(MyLatch);
	}
}

/* To be called while the library is preloaded. */
void
launcher_register(void)
{
	BackgroundWorker worker;

	background_describe(&worker, "launcher");
	worker.bgw_restart_time = LAUNCHER_RESTART_SECS;
	RegisterBackgroundWorker(&worker);
}
