/*-------------------------------------------------------------------------
 *
 * webhooks.h
 *	  The ledger of events received from Stripe, for its neighbours.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/events/webhooks.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_WEBHOOKS_H
#define IDEMPOTENCY_WEBHOOKS_H

#include "ledger/ledger.h"

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

/* Columns of stripe_webhook_events. */
enum
{
	E_TOKEN, E_RECEIVED_AT, E_CLAIMED_AT, E_LEASE_EXPIRES_AT, E_PROCESSED_AT,
	E_CREATED, E_LEASE, E_ATTEMPTS, E_SUCCESS, E_LIVEMODE, E_ORDER_ID,
	E_CORRELATION_ID, E_ACCOUNT, E_STRIPE_EVENT_ID, E_CONSUMER, E_EVENT_TYPE,
	E_API_VERSION, E_OBJECT_TYPE, E_OBJECT_ID, E_REQUEST_ID, E_IDEMPOTENCY_KEY,
	E_REFERENCE, E_CHECKOUT_SESSION_ID, E_ERROR_MESSAGE, E_PENDING_KEY,
	E_PAYLOAD_SNAPSHOT, E_PAYLOAD, E_NEXT_ATTEMPT_AT, E_RECLAIMED, E_NCOLUMNS
};

#define EVENT_COLUMNS \
	"SELECT token, received_at, claimed_at, lease_expires_at, processed_at," \
	" created, lease, attempts, success, livemode, order_id," \
	" correlation_id, account, stripe_event_id, consumer, event_type," \
	" api_version, object_type, object_id, request_id, idempotency_key," \
	" reference, checkout_session_id, error_message, pending_key," \
	" payload_snapshot, payload, next_attempt_at, reclaimed" \
	" FROM idempotency.stripe_webhook_events"

extern Ledger webhook_events;

extern Relation webhook_events_open(LOCKMODE lockmode);

#endif							/* IDEMPOTENCY_WEBHOOKS_H */
