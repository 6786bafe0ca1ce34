/*-------------------------------------------------------------------------
 *
 * worker_pass.h
 *	  What a worker does in its database: a pass through the ledgers.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/process/worker_pass.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_WORKER_PASS_H
#define IDEMPOTENCY_WORKER_PASS_H

#include "process/worker_run.h"

extern bool worker_do_part(WorkerRun *run, MemoryContext context);

#endif							/* IDEMPOTENCY_WORKER_PASS_H */
