/*-------------------------------------------------------------------------
 *
 * lock_limit.h
 *	  Limiting how long we wait for locks.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/lock_limit.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_LOCK_LIMIT_H
#define IDEMPOTENCY_LOCK_LIMIT_H

extern int	lock_limit_begin(int timeout_ms);
extern void lock_limit_end(int nestlevel);
extern bool within_lock_timeout(int timeout_ms, bool heed_users_limit, bool elsewhere,
								void (*work) (void *), void *arg);
extern const char *begin_limit_elsewhere(int users_timeout);
extern void end_limit_elsewhere(const char *back);

#endif							/* IDEMPOTENCY_LOCK_LIMIT_H */
