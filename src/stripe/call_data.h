/*-------------------------------------------------------------------------
 *
 * call_data.h
 *	  What is sent to Stripe, and what came of it.
 *
 * The same on the whole way of a call: from its arguments to the recorder, to
 * the row, to the request, and back.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/stripe/call_data.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_CALL_DATA_H
#define IDEMPOTENCY_CALL_DATA_H

#include "utils/jsonb.h"

#include "stripe/stripe_outcome.h"

/* Is it real money?  As Stripe's member "livemode" says. */
typedef enum Livemode
{
	LIVEMODE_UNKNOWN = -1,
	LIVEMODE_TEST = 0,
	LIVEMODE_LIVE = 1
} Livemode;

/* What is sent; pointers are NULL where there is nothing. */
typedef struct CallRequest
{
	const char *method;
	const char *path;			/* with its query string */
	const char *api_version;	/* Stripe-Version */
	bytea	   *body;			/* the exact bytes */
	Livemode	livemode;		/* of the API key */
} CallRequest;

/*
 * What came of it; pointers are NULL where there is nothing.  A result that was
 * only zeroed is one of STRIPE_IN_PROGRESS: it says nothing.
 */
typedef struct CallResult
{
	StripeOutcome outcome;
	bool		sent;			/* may a byte have left, in any attempt of this
								 * call? */
	int			http_status;	/* 0: no answer */
	const char *resource_id;	/* what was made, also by a refused call */
	const char *resource_type;
	const char *resource_status;	/* its member "status", where that is a
									 * string */
	const char *request_id;
	Jsonb	   *response;		/* the body, {"error": ...} included */
	Jsonb	   *error;			/* its error object */
	Livemode	livemode;		/* as the answer says */
} CallResult;

static inline Livemode
livemode_of(bool live)
{
	return live ? LIVEMODE_LIVE : LIVEMODE_TEST;
}

/* Are both known, and not the same? */
static inline bool
livemodes_differ(Livemode a, Livemode b)
{
	return a != LIVEMODE_UNKNOWN && b != LIVEMODE_UNKNOWN && a != b;
}

#endif							/* IDEMPOTENCY_CALL_DATA_H */
