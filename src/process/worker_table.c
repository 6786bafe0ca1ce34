/*-------------------------------------------------------------------------
 *
 * worker_table.c
 *	  What is known of the databases of this cluster.
 *
 * A table in shared memory, by database OID: whether the extension is there,
 * the worker, and what the view idempotency.workers shows.  One lock guards all
 * of it, and only the launcher and its workers take it more than once a session.
 * It is searched in order, which takes microseconds.
 *
 * Whether a database has the extension is found out once.  CREATE EXTENSION says
 * so when it has committed, and so does the first use of a ledger in each
 * session, in case that word was lost (in a prepared transaction).  Databases of
 * which nothing is known (copies by TEMPLATE, or all of them after a crash) are
 * looked at by a worker.
 *
 * So that a restart does not mean looking at a thousand databases again, what is
 * known is written to a file when the server is shut down, beside the
 * statistics, and read and removed when it starts.  The file counts only if
 * nobody can have created the extension in between: it names the shutdown
 * checkpoint that it was written after, and pg_control says whether that is still
 * the latest.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/process/worker_table.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <unistd.h>

#include "access/xact.h"
#include "catalog/pg_control.h"
#include "common/controldata_utils.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "port/pg_crc32c.h"
#include "storage/fd.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/proc.h"
#include "utils/timestamp.h"

#include "base/clock.h"
#include "process/worker_table.h"

#define KNOWN_FILE PGSTAT_STAT_PERMANENT_DIRECTORY "/idempotency.databases"
#define KNOWN_MAGIC 0x1de30001

PG_FUNCTION_INFO_V1(idempotency_created);

typedef struct KnownHeader
{
	uint32		magic;
	int			n;
	XLogRecPtr	checkpoint;
	pg_crc32c	crc;			/* of the entries */
} KnownHeader;

typedef struct KnownEntry
{
	Oid			dbid;
	DatabaseKnown known;
} KnownEntry;

/* From one worker that sends notices to the next. */
#define NOTICES_GAP USECS_PER_SEC

WorkerTable *worker_table = NULL;

static LWLock *lock = NULL;
static bool mark_at_commit = false;

void
worker_table_lock(LWLockMode mode)
{
	LWLockAcquire(lock, mode);
}

void
worker_table_unlock(void)
{
	LWLockRelease(lock);
}

/* The entry of a database, or NULL.  The lock is held. */
Database *
worker_table_find(Oid dbid)
{
	int			i;

	for (i = 0; i < worker_table->used; i++)
	{
		if (worker_table->entries[i].dbid == dbid)
			return &worker_table->entries[i];
	}
	return NULL;
}

/*
 * Lock the table and return the entry of this process's database; or return NULL,
 * with nothing locked, if there is none, or no table.
 */
Database *
worker_table_lock_own(LWLockMode mode)
{
	Database   *db;

	if (worker_table == NULL)
		return NULL;
	worker_table_lock(mode);
	db = worker_table_find(MyDatabaseId);
	if (db == NULL)
		worker_table_unlock();
	return db;
}

/*
 * A new entry for a database that has none.  If the table is full, it takes the
 * place of a database without the extension if "evict" says so; otherwise this
 * returns NULL.  The lock is held in exclusive mode.
 */
Database *
worker_table_add(Oid dbid, bool evict)
{
	Database   *entry = NULL;
	int			i;

	for (i = 0; i < worker_table->used && entry == NULL; i++)
	{
		if (!OidIsValid(worker_table->entries[i].dbid))
			entry = &worker_table->entries[i];
	}
	if (entry == NULL && worker_table->used < MAX_DATABASES)
		entry = &worker_table->entries[worker_table->used++];
	for (i = 0; i < worker_table->used && entry == NULL && evict; i++)
	{
		Database   *db = &worker_table->entries[i];

		if (db->known == DATABASE_WITHOUT && db->pid == 0 && !db->starting)
			entry = db;
	}
	if (entry == NULL)
		return NULL;

	memset(entry, 0, sizeof(Database));
	entry->dbid = dbid;
	entry->serial = ++worker_table->serial;
	return entry;
}

/* Take an entry out.  The lock is held in exclusive mode. */
void
worker_table_forget(Database *db)
{
	db->dbid = InvalidOid;
	while (worker_table->used > 0 &&
		   !OidIsValid(worker_table->entries[worker_table->used - 1].dbid))
		worker_table->used--;
}

/* Wake the launcher.  The lock is held.  Waking it in vain does no harm. */
void
worker_table_wake_launcher(void)
{
	if (worker_table->launcher_pid != 0)
		SetLatch(&ProcGlobal->allProcs[worker_table->launcher_proc].procLatch);
}

/* The same if the lock is not held. */
void
worker_table_call_launcher(void)
{
	worker_table_lock(LW_SHARED);
	worker_table_wake_launcher();
	worker_table_unlock();
}

/*
 * This database has the extension.  "created": since just now, so that what a
 * worker found before does not count.
 */
static void
mark(bool created)
{
	Database   *db;

	worker_table_lock(LW_EXCLUSIVE);
	db = worker_table_find(MyDatabaseId);
	if (db == NULL)
		db = worker_table_add(MyDatabaseId, true);
	if (db != NULL)
	{
		if (created)
			db->marks++;
		if (created || db->known != DATABASE_WITH)
		{
			db->known = DATABASE_WITH;
			db->startable = true;
			db->next_run = 0;
			db->failures = 0;
			worker_table_wake_launcher();
		}
	}
	worker_table_unlock();
}

static void
at_xact_event(XactEvent event, void *arg)
{
	if (!mark_at_commit)
		return;

	if (event == XACT_EVENT_COMMIT)
	{
		mark_at_commit = false;
		mark(true);
	}
	else if (event == XACT_EVENT_ABORT || event == XACT_EVENT_PREPARE)
		mark_at_commit = false;
}

/*
 * The last thing that CREATE EXTENSION does.  (That a savepoint may undo it does
 * not matter: a worker looks and finds nothing.)
 */
Datum
idempotency_created(PG_FUNCTION_ARGS)
{
	worker_table_mark_at_commit();
	PG_RETURN_VOID();
}

void
worker_table_mark_at_commit(void)
{
	static bool registered = false;

	if (worker_table == NULL)
		return;
	if (!registered)
	{
		RegisterXactCallback(at_xact_event, NULL);
		registered = true;
	}
	mark_at_commit = true;
}

/* A ledger of this database is being used: the extension is there. */
void
worker_table_note_use(void)
{
	static bool noted = false;

	if (noted || worker_table == NULL)
		return;
	noted = true;
	mark(false);
}

/*
 * A transaction of this database is being prepared that leaves notices for a
 * worker.
 */
void
worker_table_note_notices(void)
{
	Database   *db = worker_table_lock_own(LW_EXCLUSIVE);

	if (db == NULL)
		return;
	db->notices = true;
	worker_table_unlock();
}

/*
 * A prepared transaction of this database has committed: if it may have left
 * notices, a worker comes now, or a second after the last one.  After a restart
 * that is not known, and the next pass finds them.  Raises no error.
 */
void
worker_table_send_notices_soon(void)
{
	Database   *db = worker_table_lock_own(LW_EXCLUSIVE);

	if (db == NULL)
		return;
	if (db->notices && db->failures == 0)
	{
		TimestampTz now = GetCurrentTimestamp();

		db->next_run = Min(db->next_run, is_over(db->last_run, NOTICES_GAP, now) ? now :
						   db->last_run + NOTICES_GAP);
		worker_table_wake_launcher();
	}
	worker_table_unlock();
}

/*
 * Where this database goes on with events that wait for their call.  Both leave
 * alone what they are given if there is no entry.
 */
void
worker_table_read_kept_place(KeptPlace *place)
{
	Database   *db = worker_table_lock_own(LW_SHARED);

	if (db == NULL)
		return;
	*place = db->kept;
	worker_table_unlock();
}

void
worker_table_write_kept_place(const KeptPlace *place)
{
	Database   *db = worker_table_lock_own(LW_EXCLUSIVE);

	if (db == NULL)
		return;
	db->kept = *place;
	worker_table_unlock();
}

/* ---------- across a restart ---------- */

/*
 * The checkpoint that the server was shut down with; InvalidXLogRecPtr if it was
 * not shut down, or not as a primary.
 */
static XLogRecPtr
shutdown_checkpoint(void)
{
	bool		crc_ok;
	ControlFileData *control = get_controlfile(DataDir, &crc_ok);
	XLogRecPtr	checkpoint = InvalidXLogRecPtr;

	if (crc_ok && control->state == DB_SHUTDOWNED)
		checkpoint = control->checkPoint;
	pfree(control);
	return checkpoint;
}

static bool
read_known(FILE *file, XLogRecPtr checkpoint)
{
	KnownHeader header;
	KnownEntry *entries;
	pg_crc32c	crc;
	int			i;

	if (fread(&header, sizeof(header), 1, file) != 1 ||
		header.magic != KNOWN_MAGIC || header.n < 0 || header.n > MAX_DATABASES)
		return false;

	entries = palloc(Max(header.n, 1) * sizeof(KnownEntry));
	INIT_CRC32C(crc);
	if (fread(entries, sizeof(KnownEntry), header.n, file) != header.n)
		return false;
	COMP_CRC32C(crc, entries, header.n * sizeof(KnownEntry));
	FIN_CRC32C(crc);
	if (!EQ_CRC32C(crc, header.crc))
		return false;

	if (header.checkpoint != checkpoint)
		return true;
	for (i = 0; i < header.n; i++)
	{
		Database   *db = worker_table_add(entries[i].dbid, false);

		if (db != NULL)
			db->known = entries[i].known;
	}
	return true;
}

/*
 * The postmaster starts: nobody else is there yet, and whatever is wrong with
 * the file means no more than that the databases are looked at.
 */
static void
load_known(void)
{
	FILE	   *file = AllocateFile(KNOWN_FILE, PG_BINARY_R);
	XLogRecPtr	checkpoint;

	if (file == NULL)
	{
		if (errno != ENOENT)
		{
			ereport(LOG,
					(errcode_for_file_access(),
					 errmsg("could not read file \"%s\": %m", KNOWN_FILE)));
			/* the next one could not take its place */
			unlink(KNOWN_FILE);
		}
		return;
	}

	checkpoint = shutdown_checkpoint();
	if (checkpoint != InvalidXLogRecPtr && !read_known(file, checkpoint))
		ereport(LOG,
				(errcode(ERRCODE_DATA_CORRUPTED),
				 errmsg("ignoring invalid data in file \"%s\"", KNOWN_FILE)));
	FreeFile(file);
	unlink(KNOWN_FILE);
}

/*
 * The postmaster ends: everybody else is gone, and the shutdown checkpoint is
 * written.
 */
static void
save_known(int code, Datum arg)
{
	KnownHeader header;
	KnownEntry *entries;
	FILE	   *file;
	int			i;

	if (code != 0 || worker_table == NULL)
		return;

	header.magic = KNOWN_MAGIC;
	header.n = 0;
	header.checkpoint = shutdown_checkpoint();
	if (header.checkpoint == InvalidXLogRecPtr)
		return;

	entries = palloc0(Max(worker_table->used, 1) * sizeof(KnownEntry));
	for (i = 0; i < worker_table->used; i++)
	{
		Database   *db = &worker_table->entries[i];

		if (OidIsValid(db->dbid) && db->known != DATABASE_UNKNOWN)
		{
			entries[header.n].dbid = db->dbid;
			entries[header.n++].known = db->known;
		}
	}
	INIT_CRC32C(header.crc);
	COMP_CRC32C(header.crc, entries, header.n * sizeof(KnownEntry));
	FIN_CRC32C(header.crc);

	file = AllocateFile(KNOWN_FILE ".tmp", PG_BINARY_W);
	if (file == NULL)
	{
		ereport(LOG,
				(errcode_for_file_access(),
				 errmsg("could not write file \"%s\": %m", KNOWN_FILE ".tmp")));
		return;
	}
	if (fwrite(&header, sizeof(header), 1, file) != 1 ||
		fwrite(entries, sizeof(KnownEntry), header.n, file) != header.n)
	{
		ereport(LOG,
				(errcode_for_file_access(),
				 errmsg("could not write file \"%s\": %m", KNOWN_FILE ".tmp")));
		FreeFile(file);
		unlink(KNOWN_FILE ".tmp");
		return;
	}
	if (FreeFile(file) != 0)
	{
		ereport(LOG,
				(errcode_for_file_access(),
				 errmsg("could not write file \"%s\": %m", KNOWN_FILE ".tmp")));
		unlink(KNOWN_FILE ".tmp");
		return;
	}
	(void) durable_rename(KNOWN_FILE ".tmp", KNOWN_FILE, LOG);
}

/* ---------- shared memory ---------- */

Size
worker_table_size(void)
{
	return sizeof(WorkerTable);
}

void
worker_table_init(void *area)
{
	worker_table = area;
	if (!IsUnderPostmaster)
		load_known();
}

void
worker_table_attach(void *area, LWLockPadded *locks)
{
	worker_table = area;
	lock = &locks[0].lock;
	if (!IsUnderPostmaster)
		on_shmem_exit(save_known, (Datum) 0);
}
