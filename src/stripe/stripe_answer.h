/*-------------------------------------------------------------------------
 *
 * stripe_answer.h
 *	  What stands in Stripe's answers, and which answers are Stripe's.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/stripe/stripe_answer.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_STRIPE_ANSWER_H
#define IDEMPOTENCY_STRIPE_ANSWER_H

#include "utils/jsonb.h"

#include "stripe/call_data.h"
#include "stripe/stripe_outcome.h"

#define STRIPE_ID_MAX 255

/* A body, and what is known from it; pointers are NULL where there is nothing */
typedef struct StripeBody
{
	Jsonb	   *json;			/* all of it */
	Jsonb	   *error;			/* its error object */
	char	   *error_type;
	char	   *error_code;
	char	   *resource_id;	/* what was made, also by a refused call */
	char	   *resource_type;
	char	   *resource_status;	/* its member "status", where that is a string */
	Livemode	livemode;
} StripeBody;

/*
 * An answer as it has come, whichever way, and what is known of the call that it
 * belongs to.
 */
typedef struct StripeReceived
{
	int			http_status;	/* 0: no answer */
	bool		sent;			/* did a byte of the request leave? */
	bool		whole;			/* did all of the answer arrive? */
	const char *resource_id;	/* as somebody names it who has had the answer,
								 * or NULL */
	const char *method;			/* of the call, or NULL where it isn't known */
	const char *path;			/* likewise */
	bool		uncertain;		/* may an attempt before have been executed? */
	bool		overtaken;		/* has another attempt been made since? */
} StripeReceived;

extern char *stripe_object_status(JsonbContainer *object);
extern void stripe_read_body(Jsonb *json, StripeBody *body);
extern StripeClass stripe_judge(const StripeReceived *received, StripeBody *body,
								StripeAnswer *answer);
extern void stripe_body_result(const StripeBody *body, bool genuine, CallResult *result);

#endif							/* IDEMPOTENCY_STRIPE_ANSWER_H */
