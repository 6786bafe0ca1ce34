/*-------------------------------------------------------------------------
 *
 * settle_event.h
 *	  What events of Stripe's say about calls that were sent to it.
 *
 * src/settle_event.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_SETTLE_EVENT_H
#define IDEMPOTENCY_SETTLE_EVENT_H

#include "postgres.h"

#include "stripe_ledger.h"
#include "webhook_event.h"

extern char *settle_by_event(const WebhookEvent *event);
extern bool settle_by_kept_events(const Datum *key, int64 claimed_token);
extern int	settle_kept_events(int max_events);
extern void settle_or_claim(StripeClaim *claim, Relation rel);

#endif							/* IDEMPOTENCY_SETTLE_EVENT_H */
