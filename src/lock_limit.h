/*-------------------------------------------------------------------------
 *
 * lock_limit.h
 *	  Waiting for locks no longer than we want to.
 *
 * src/lock_limit.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_LOCK_LIMIT_H
#define IDEMPOTENCY_LOCK_LIMIT_H

#include "postgres.h"

extern bool within_lock_timeout(int timeout_ms, bool heed_users_limit,
								void (*work) (void *), void *arg);

#endif							/* IDEMPOTENCY_LOCK_LIMIT_H */
