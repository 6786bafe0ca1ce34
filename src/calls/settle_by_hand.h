/*-------------------------------------------------------------------------
 *
 * settle_by_hand.h
 *	  Settling calls to Stripe whose outcome wasn't known.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/calls/settle_by_hand.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_SETTLE_BY_HAND_H
#define IDEMPOTENCY_SETTLE_BY_HAND_H

#include "calls/stripe_ledger.h"

/* How an operation was settled; what isn't given is NULL. */
typedef struct Settlement
{
	CallResult	result;			/* completed, failed or not_executed */
	const char *by;				/* who, or what */
	const char *note;
	Jsonb	   *evidence;
} Settlement;

extern PGDLLEXPORT bool settle_operation(Operation *op, const Settlement *settlement);

#endif							/* IDEMPOTENCY_SETTLE_BY_HAND_H */
