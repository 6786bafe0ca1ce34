/*-------------------------------------------------------------------------
 *
 * stripe_keys.h
 *	  The ledger of calls sent to Stripe, for its neighbours.
 *
 * src/stripe_keys.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_STRIPE_KEYS_H
#define IDEMPOTENCY_STRIPE_KEYS_H

#include "postgres.h"

#include "utils/rel.h"

extern Relation stripe_calls_open(LOCKMODE lockmode);

#endif							/* IDEMPOTENCY_STRIPE_KEYS_H */
