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

#include "storage/block.h"

#include "stripe_ledger.h"

/* How an operation was settled; what isn't given is NULL. */
typedef struct Settlement
{
	StripeOutcome outcome;		/* completed, failed or not_executed */
	const char *resource_id;

	/* of the object, where there is one */
	const char *resource_type;
	const char *resource_status;
	int			livemode;		/* 1, 0 or -1 */
	Jsonb	   *response;
	Jsonb	   *error;

	const char *by;				/* who, or what */
	const char *note;
	Jsonb	   *evidence;
} Settlement;

extern PGDLLEXPORT bool settle_operation(Operation *op, const Settlement *settlement);
extern PGDLLEXPORT int settle_note_fates(int max_rows, BlockNumber *position);

#endif							/* IDEMPOTENCY_SETTLE_H */
