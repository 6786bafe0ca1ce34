/*-------------------------------------------------------------------------
 *
 * subtransaction.h
 *	  One thing in a subtransaction, whose error is caught.
 *
 * src/subtransaction.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_SUBTRANSACTION_H
#define IDEMPOTENCY_SUBTRANSACTION_H

#include "postgres.h"

extern ErrorData *in_subtransaction(void (*work) (void *), void *arg);

#endif							/* IDEMPOTENCY_SUBTRANSACTION_H */
