/*-------------------------------------------------------------------------
 *
 * stripe_effect.h
 *	  What an event or an object of Stripe's says about a call.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/stripe/stripe_effect.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_STRIPE_EFFECT_H
#define IDEMPOTENCY_STRIPE_EFFECT_H

#include "utils/jsonb.h"

#include "stripe/stripe_outcome.h"
#include "stripe/webhook_event.h"

/* How an event or an object was found to be about a call. */
typedef enum FoundBy
{
	BY_KEY,						/* the call's request caused the event */
	BY_METADATA,				/* its key is among the object's metadata */
	BY_OBJECT					/* the row knows the object's id */
} FoundBy;

extern const char *const found_by_names[];

/*
 * "request" is what the row has: method, path and parameters.  Where nothing is
 * said, the outcome is STRIPE_UNKNOWN.
 */
extern StripeOutcome outcome_of_event(const WebhookEvent *event, FoundBy found_by, Jsonb *request);
extern bool request_makes_object(Jsonb *request, const WebhookEvent *event);
extern StripeOutcome outcome_of_object(JsonbContainer *object, Jsonb *request);

#endif							/* IDEMPOTENCY_STRIPE_EFFECT_H */
