/*-------------------------------------------------------------------------
 *
 * worker_run.h
 *	  A worker's run.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/process/worker_run.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_WORKER_RUN_H
#define IDEMPOTENCY_WORKER_RUN_H

#include "portability/instr_time.h"

#include "events/kept_events.h"
#include "ledger/expiry.h"
#include "process/expire.h"
#include "process/worker_table.h"

/* Rows and events that are settled in one transaction. */
#define SETTLE_BATCH 100

/* The parts of a pass: one for each kind of rows that expires, and these. */
#define PART_CALLS EXPIRY_KINDS
#define PART_EVENTS (EXPIRY_KINDS + 1)
#define NPARTS (EXPIRY_KINDS + 2)

typedef struct WorkerRun
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
} WorkerRun;

extern bool worker_enter(Oid dbid);
extern Database *worker_own_entry(void);

extern void run_begin(WorkerRun *run);
extern void run_keep_error(WorkerRun *run, const char *text);
extern void run_end_part(WorkerRun *run, bool at_end);
extern void run_note_place(WorkerRun *run, Database *db);
extern void run_end(WorkerRun *run);

extern bool run_lock_extension(void);
extern bool run_begin_transaction(WorkerRun *run);
extern void run_limit_lock_waits(void);
extern void run_commit_transaction(void);

#endif							/* IDEMPOTENCY_WORKER_RUN_H */
