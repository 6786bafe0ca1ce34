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
#include "ledger/ledger_search.h"

/* How an operation was settled; what isn't given is NULL. */
typedef struct Settlement
{
	CallResult	result;			/* completed, failed or not_executed */
	const char *by;				/* who, or what */
	const char *note;
	Jsonb	   *evidence;
} Settlement;

/* Some rows of the ledger, which is the work of one transaction. */
typedef struct SettleBatch
{
	int			max_rows;
	LedgerCursor *cursor;		/* moved on */

	/* what came of it */
	bool		finished;		/* the end of the table */
	int			seen;			/* rows with which something could be done */
	int			settled;		/* and was */
	int			refused;		/* rows that raised an error */
	char	   *refusal;		/* which was the first, and why */
} SettleBatch;

extern PGDLLEXPORT bool settle_operation(Operation *op, const Settlement *settlement);
extern PGDLLEXPORT void settle_calls(SettleBatch *batch);

#endif							/* IDEMPOTENCY_SETTLE_BY_HAND_H */
