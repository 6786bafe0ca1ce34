/*-------------------------------------------------------------------------
 *
 * background_process.h
 *	  What all background processes have in common.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/process/background_process.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_BACKGROUND_PROCESS_H
#define IDEMPOTENCY_BACKGROUND_PROCESS_H

#include "postmaster/bgworker.h"

extern void background_describe(BackgroundWorker *worker, const char *kind);
extern bool background_start(const char *kind, Oid dbid, BackgroundWorkerHandle **handle);
extern void background_set(const char *name, const char *value);
extern void background_fix_settings(void);
extern void background_begin(void);
extern void background_restrict(void);
extern void background_commit(void);

#endif							/* IDEMPOTENCY_BACKGROUND_PROCESS_H */
