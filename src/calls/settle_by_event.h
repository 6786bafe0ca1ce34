/*-------------------------------------------------------------------------
 *
 * settle_by_event.h
 *	  What Stripe's events say about calls that were sent to it.
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

/* A call that an event may settle. */
typedef enum CallColumn
{
	CALL_ACCOUNT, CALL_TYPE, CALL_ID, CALL_TOKEN, CALL_OUTCOME, CALL_LEASE_EXPIRES_AT,
	CALL_KEY, CALL_RESOURCE_ID, CALL_REQUEST, CALL_CALLER_LIFE, CALL_CALLER_VXID,
	CALL_LIVEMODE, CALL_SENT,
	CALL_NCOLUMNS
} CallColumn;

typedef struct CallRow
{
	Datum		values[CALL_NCOLUMNS];
	bool		isnull[CALL_NCOLUMNS];
} CallRow;

/* What was found out about a call; what is not known is NULL. */
typedef struct Finding
{
	CallResult	result;			/* completed or failed, or nothing was found */
	const char *by;				/* who, or what, says so */
	Jsonb	   *evidence;
} Finding;

extern bool may_be_of_account(const WebhookEvent *event, const char *account);
extern bool finding_of_event(const WebhookEvent *event, FoundBy found_by, Jsonb *request,
							 Finding *finding);

extern char *settle_by_event(const WebhookEvent *event);
extern bool settle_by_finding(const Datum *key, int64 token, const Finding *finding);

extern bool find_call_to_settle(Relation rel, const Datum *key, CallRow *call);
extern bool settle_call_by_event(Relation rel, CallRow *call, const WebhookEvent *event,
								 int64 claimed_token, bool only_look);

#endif							/* IDEMPOTENCY_SETTLE_BY_EVENT_H */
