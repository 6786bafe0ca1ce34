/*-------------------------------------------------------------------------
 *
 * webhooks.h
 *	  The ledger of events received from Stripe, for its neighbours.
 *
 * src/webhooks.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_WEBHOOKS_H
#define IDEMPOTENCY_WEBHOOKS_H

#include "postgres.h"

#include "ledger.h"

/*
 * Which events may be removed, as a condition on stripe_webhook_events; "moment"
 * is an SQL expression for now less idempotency.webhook_retention.
 *
 * Only what was processed: an event that is received, claimed or failed still
 * has to be, however old it is.  It counts from the receipt: Stripe can send
 * an event again for 30 days after it has made it, and a row that is gone by then
 * would be processed a second time.
 */
#define WEBHOOK_EVENT_IS_EXPIRED(moment) \
	"success AND received_at OPERATOR(pg_catalog.<=) " moment

extern Ledger webhook_events;

extern Relation webhook_events_open(LOCKMODE lockmode);

#endif							/* IDEMPOTENCY_WEBHOOKS_H */
