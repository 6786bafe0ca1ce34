/*-------------------------------------------------------------------------
 *
 * webhook_ledger.h
 *	  The ledger of events received from Stripe.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/events/webhook_ledger.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_WEBHOOK_LEDGER_H
#define IDEMPOTENCY_WEBHOOK_LEDGER_H

#include "base/arguments.h"
#include "ledger/expiry.h"
#include "ledger/ledger.h"
#include "stripe/webhook_event.h"

/* Columns of stripe_webhook_events: E_TOKEN is the number of "token". */
#define EVENT_COLUMNS(FIRST, NEXT) \
	FIRST(TOKEN, token) \
	NEXT(RECEIVED_AT, received_at) \
	NEXT(CLAIMED_AT, claimed_at) \
	NEXT(LEASE_EXPIRES_AT, lease_expires_at) \
	NEXT(PROCESSED_AT, processed_at) \
	NEXT(CREATED, created) \
	NEXT(LEASE, lease) \
	NEXT(ATTEMPTS, attempts) \
	NEXT(SUCCESS, success) \
	NEXT(LIVEMODE, livemode) \
	NEXT(ORDER_ID, order_id) \
	NEXT(CORRELATION_ID, correlation_id) \
	NEXT(ACCOUNT, account) \
	NEXT(STRIPE_EVENT_ID, stripe_event_id) \
	NEXT(CONSUMER, consumer) \
	NEXT(EVENT_TYPE, event_type) \
	NEXT(API_VERSION, api_version) \
	NEXT(OBJECT_TYPE, object_type) \
	NEXT(OBJECT_ID, object_id) \
	NEXT(REQUEST_ID, request_id) \
	NEXT(IDEMPOTENCY_KEY, idempotency_key) \
	NEXT(REFERENCE, reference) \
	NEXT(CHECKOUT_SESSION_ID, checkout_session_id) \
	NEXT(ERROR_MESSAGE, error_message) \
	NEXT(PENDING_KEY, pending_key) \
	NEXT(PAYLOAD_SNAPSHOT, payload_snapshot) \
	NEXT(PAYLOAD, payload) \
	NEXT(NEXT_ATTEMPT_AT, next_attempt_at) \
	NEXT(RECLAIMED, reclaimed)

#define EVENT_COLUMN_NUMBER(id, name) E_##id,

enum
{
	EVENT_COLUMNS(EVENT_COLUMN_NUMBER, EVENT_COLUMN_NUMBER)
	E_NCOLUMNS
};

#define SELECT_EVENT \
	EVENT_COLUMNS(LEDGER_SELECT_FIRST, LEDGER_SELECT_NEXT) \
	" FROM idempotency.stripe_webhook_events"

/* What a claim writes, or the receipt of an event that nobody claims. */
typedef struct EventWrite
{
	const Datum *key;			/* account, event, consumer */
	int64		token;
	TimestampTz now;
	bool		received_only;
	Duration	lease;
	const char *pending_key;	/* how it may settle a call later, or NULL */
	const WebhookEvent *event;	/* NULL: as stored */
	bytea	   *payload;		/* its body */
	const char *again_by;		/* who has it run again, or NULL */
} EventWrite;

/* What came of an event. */
typedef struct EventResult
{
	bool		success;
	const char *message;		/* of an error, or NULL */
	NullableDatum reference;
	NullableDatum order_id;
	NullableDatum correlation_id;

	/* set when it is recorded */
	TimestampTz next_attempt_at;	/* infinity: the event is dead */
	int			attempts;
} EventResult;

extern Ledger webhook_events;
extern Expiry webhook_expiry;

extern Relation webhook_events_open(LOCKMODE lockmode);
extern char *describe_event(const Datum *key);

extern bool webhook_row_insert(Relation rel, const EventWrite *write);
extern bool webhook_row_take(Relation rel, const EventWrite *write, int64 seen_token,
							 int attempt);
extern void webhook_row_renew(Relation rel, const EventWrite *write, TimestampTz now);
extern bool webhook_row_record(Relation rel, const Datum *key, int64 token,
							   EventResult *result);
extern void webhook_find_relatives(Relation rel, const Datum *key, const WebhookEvent *event,
								   Datum *values, bool *isnull);

#endif							/* IDEMPOTENCY_WEBHOOK_LEDGER_H */
