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

#include "stripe_effect.h"
#include "stripe_ledger.h"
#include "webhook_event.h"

/* What was found out about a call; a pointer is NULL where there is nothing. */
typedef struct Finding
{
	const char *outcome;		/* completed or failed */
	const char *object_id;
	const char *object_type;
	const char *object_status;
	int			livemode;		/* 1, 0 or -1 */
	const char *request_id;
	Jsonb	   *response;
	Jsonb	   *error;
	const char *by;				/* who, or what, says so */
	Jsonb	   *evidence;
} Finding;

extern bool may_be_of_account(const WebhookEvent *event, const char *account);
extern char *settle_by_event(const WebhookEvent *event);
extern bool settle_by_kept_events(const Datum *key, int64 claimed_token, bool only_look);
extern int	settle_kept_events(int max_events);
extern bool finding_of_event(const WebhookEvent *event, FoundBy found_by, Jsonb *request,
							 Finding *finding);
extern bool settle_by_finding(const Datum *key, int64 token, const Finding *finding);
extern void settle_or_claim(StripeClaim *claim, Relation rel);

#endif							/* IDEMPOTENCY_SETTLE_EVENT_H */
