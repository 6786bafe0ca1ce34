/*-------------------------------------------------------------------------
 *
 * stripe_fate.h
 *	  What became of the transactions behind a call.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/calls/stripe_fate.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_STRIPE_FATE_H
#define IDEMPOTENCY_STRIPE_FATE_H

#include "access/transam.h"

#include "calls/stripe_ledger.h"

extern void stripe_adopt_run(Relation rel, Operation *op, int64 token,
							 FullTransactionId xid);
extern bool stripe_note_fate_run(Relation rel, Operation *op);

#endif							/* IDEMPOTENCY_STRIPE_FATE_H */
