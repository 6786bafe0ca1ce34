/*-------------------------------------------------------------------------
 *
 * settle_by_event.h
 *	  What events of Stripe's say about calls that were sent to it.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/calls/settle_by_event.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_SETTLE_BY_EVENT_H
#define IDEMPOTENCY_SETTLE_BY_EVENT_H

#include "calls/stripe_claim.h"
#include "ledger/derived_key.h"
#include "stripe/stripe_effect.h"
#include "stripe/webhook_event.h"

/* Where to go on with the events that wait for their call. */
typedef struct KeptPlace
{
	char		key[STRIPE_KEY_MAX + 1];	/* the last one's pending key */
	int			left;			/* events with this key that were looked at
								 * and still wait */
} KeptPlace;

/* Some of them, which is the work of one transaction. */
typedef struct KeptBatch
{
	int			max_events;
	KeptPlace  *place;			/* moved on */

	/* what came of it */
	bool		finished;		/* there are no more: the place is the start */
	int			seen;
	int			forgotten;		/* those that wait no longer */
	int			refused;		/* those that raised an error */
	char	   *refusal;		/* which was the first, and why */
} KeptBatch;

/* What was found out about a call; a pointer is NULL where there is nothing. */
typedef struct Finding
{
	CallResult	result;			/* completed or failed, or nothing was found */
	const char *by;				/* who, or what, says so */
	Jsonb	   *evidence;
} Finding;

extern bool may_be_of_account(const WebhookEvent *event, const char *account);
extern char *settle_by_event(const WebhookEvent *event);
extern bool settle_by_kept_events(const Datum *key, int64 claimed_token, bool only_look);
extern bool settle_open_call(const Datum *key);
extern void settle_kept_events(KeptBatch *batch);
extern void settle_kept_events_idly(int max_events);
extern bool finding_of_event(const WebhookEvent *event, FoundBy found_by, Jsonb *request,
							 Finding *finding);
extern bool settle_by_finding(const Datum *key, int64 token, const Finding *finding);
extern void settle_or_claim(StripeClaim *claim, Relation rel);

#endif							/* IDEMPOTENCY_SETTLE_BY_EVENT_H */
