/*-------------------------------------------------------------------------
 *
 * launcher.h
 *	  The launcher of the background workers.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/process/launcher.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_LAUNCHER_H
#define IDEMPOTENCY_LAUNCHER_H

extern void launcher_register(void);
extern bool worker_send_away(Oid dbid);
extern void worker_may_return(Oid dbid, bool dropped);

#endif							/* IDEMPOTENCY_LAUNCHER_H */
