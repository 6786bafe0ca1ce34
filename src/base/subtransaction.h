/*-------------------------------------------------------------------------
 *
 * subtransaction.h
 *	  Doing something in a subtransaction, and catching its error.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/subtransaction.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_SUBTRANSACTION_H
#define IDEMPOTENCY_SUBTRANSACTION_H

extern ErrorData *in_subtransaction(void (*work) (void *), void *arg);
extern PGDLLEXPORT ErrorData *try_in_subtransaction(void (*work) (void *), void *arg);
extern bool error_is_about_one_row(const ErrorData *error);
extern bool error_is_about_locks(const ErrorData *error);

#endif							/* IDEMPOTENCY_SUBTRANSACTION_H */
