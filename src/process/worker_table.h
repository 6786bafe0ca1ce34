/*-------------------------------------------------------------------------
 *
 * worker_table.h
 *	  What is known of the databases of this cluster.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/process/worker_table.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_WORKER_TABLE_H
#define IDEMPOTENCY_WORKER_TABLE_H

#include "datatype/timestamp.h"
#include "storage/lwlock.h"

#include "events/kept_events.h"
#include "ledger/ledger_search.h"

/* Entries; if there are more databases, those without the extension go. */
#define MAX_DATABASES 4096

#define DATABASE_ERROR_LEN 256

/* Parts of a worker's pass; see worker_run.h. */
#define DATABASE_PARTS 6

typedef enum DatabaseKnown
{
	DATABASE_UNKNOWN,			/* nobody has looked */
	DATABASE_WITHOUT,			/* it does not have the extension */
	DATABASE_WITH
} DatabaseKnown;

/* How a worker's last run ended. */
typedef enum RunOutcome
{
	RUN_NONE,
	RUN_DONE,
	RUN_OFF,					/* idempotency.expiry is off */
	RUN_READ_ONLY,				/* default_transaction_read_only is on */
	RUN_REFUSED,				/* done, but for rows that raised an error */
	RUN_FAILED,
	RUN_NO_SLOT					/* no background worker to be had */
} RunOutcome;

typedef struct Database
{
	Oid			dbid;			/* InvalidOid: the entry is free */
	uint32		serial;			/* of the table when it was added */
	DatabaseKnown known;
	uint32		marks;			/* counts CREATE EXTENSION; see worker_run.c */
	bool		startable;		/* takes connections, has been used */

	/* the worker */
	bool		starting;		/* asked for, but not there yet */
	int			pid;			/* 0: none */
	TimestampTz next_run;
	int64		planned;		/* how far ahead that was, in microseconds */
	bool		held;			/* being dropped */
	bool		notices;		/* has prepared transactions with notices, or
								 * had some since the server started */
	int			failures;		/* in a row */

	/* the pass through the ledgers, which may take several runs */
	int			part;			/* which one it is at */
	LedgerPlace places[DATABASE_PARTS]; /* where each goes on */
	TimestampTz pass_started;	/* 0: the next run begins one */
	bool		pass_failed;	/* one of its parts has */
	int64		pass_searched;	/* microseconds of searching in vain */
	int64		pass_refused;
	int64		pass_unsettled; /* of them */
	TimestampTz pass_left;		/* oldest row left, or 0 */

	/* where to look next for events that wait for their call */
	KeptPlace	kept;

	/* for the view */
	RunOutcome	outcome;
	TimestampTz last_run;		/* when a run ended last, or 0 */
	int64		removed;		/* in this server life */
	int64		refused;		/* in the last pass */
	int64		unsettled;		/* of them: not by what removes rows */
	TimestampTz oldest;			/* oldest row past its time and still there */
	TimestampTz error_at;
	char		error[DATABASE_ERROR_LEN];
} Database;

typedef struct WorkerTable
{
	int			launcher_pid;	/* 0: none */
	int			launcher_proc;
	uint32		serial;
	int			used;			/* entries from here on are free */
	Database	entries[MAX_DATABASES];
} WorkerTable;

/* NULL without shared memory; to be read and written under the lock */
extern WorkerTable *worker_table;

extern Size worker_table_size(void);
extern void worker_table_init(void *area);
extern void worker_table_attach(void *area, LWLockPadded *locks);

extern void worker_table_lock(LWLockMode mode);
extern void worker_table_unlock(void);
extern Database *worker_table_lock_own(LWLockMode mode);
extern Database *worker_table_find(Oid dbid);
extern Database *worker_table_add(Oid dbid, bool evict);
extern void worker_table_forget(Database *db);
extern void worker_table_wake_launcher(void);
extern void worker_table_call_launcher(void);

extern void worker_table_mark_at_commit(void);
extern void worker_table_note_use(void);
extern void worker_table_note_notices(void);
extern void worker_table_send_notices_soon(void);

extern void worker_table_read_kept_place(KeptPlace *place);
extern void worker_table_write_kept_place(const KeptPlace *place);

#endif							/* IDEMPOTENCY_WORKER_TABLE_H */
