/*-------------------------------------------------------------------------
 *
 * settle.h
 *	  Settling calls to Stripe whose outcome wasn't known.
 *
 * src/settle.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_SETTLE_H
#define IDEMPOTENCY_SETTLE_H

#include "ledger_search.h"
#include "stripe_ledger.h"

/* How an operation was settled; what isn't given is NULL. */
typedef struct Settlement
{
	StripeOutcome outcome;		/* completed, failed or not_executed */
	const char *resource_id;
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

#endif							/* IDEMPOTENCY_SETTLE_H */
