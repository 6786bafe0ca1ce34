/*-------------------------------------------------------------------------
 *
 * webhook_event.h
 *	  What an event of Stripe's says.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/stripe/webhook_event.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_WEBHOOK_EVENT_H
#define IDEMPOTENCY_WEBHOOK_EVENT_H

#include "utils/jsonb.h"
#include "utils/timestamp.h"
#include "utils/uuid.h"

/* An event; a pointer is NULL if the event does not say. */
typedef struct WebhookEvent
{
	Jsonb	   *json;
	char	   *id;
	char	   *type;
	char	   *account;		/* connected account, "" for one's own */
	bool		connected;		/* may it be about another account? */
	char	   *api_version;
	char	   *object_type;	/* what it is about */
	char	   *object_id;
	JsonbContainer *object;		/* and its state then; a thin event has none */
	char	   *request_id;		/* the call that caused it */
	char	   *idempotency_key;
	char	   *metadata_key;	/* one of our keys among the object's metadata */
	char	   *reference;
	char	   *checkout_session_id;
	pg_uuid_t  *order_id;
	pg_uuid_t  *correlation_id;
	bool		livemode_known;
	bool		livemode;
	bool		created_known;
	TimestampTz created;
} WebhookEvent;

typedef enum WebhookBody
{
	WEBHOOK_BODY_EVENT,
	WEBHOOK_BODY_NOT_JSON,
	WEBHOOK_BODY_NOT_AN_EVENT
} WebhookBody;

extern WebhookBody webhook_body_parse(const char *body, size_t len, WebhookEvent *event);
extern bool webhook_event_read(Jsonb *json, WebhookEvent *event);
extern bool is_stripe_key(const char *key);
extern char *key_in_metadata(JsonbContainer *metadata);

#endif							/* IDEMPOTENCY_WEBHOOK_EVENT_H */
