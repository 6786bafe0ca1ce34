/*-------------------------------------------------------------------------
 *
 * stripe_request.h
 *	  One call of Stripe's API: a request, its attempts, and the answer.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/send/stripe_request.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_STRIPE_REQUEST_H
#define IDEMPOTENCY_STRIPE_REQUEST_H

#include "portability/instr_time.h"
#include "utils/jsonb.h"
#include "utils/timestamp.h"

#include "base/arguments.h"
#include "send/api_key.h"
#include "stripe/stripe_answer.h"
#include "stripe/stripe_outcome.h"

/*
 * What is sent, in each attempt the same.
 */
typedef struct StripeRequest
{
	const char *method;			/* GET, POST or DELETE */
	const char *target;			/* path, with the query string if any */
	const char *account;		/* acted for, or empty */
	const char *version;		/* Stripe-Version */
	const char *idempotency_key;	/* or NULL */
	const char *content_type;	/* of the body */
	const char *body;			/* or NULL */
	int			body_len;
	void		(*sending) (void);	/* called before the first byte leaves, in
									 * each attempt, or NULL; must raise
									 * nothing */
	int			max_attempts;	/* 0: as idempotency.stripe_max_retries says,
								 * otherwise not more than this either */
	bool		sent_before;	/* may another call have sent the same? */
	bool		uncertain;		/* and may that have been executed? */
	TimestampTz resend_until;	/* when it mustn't be sent again any more; 0:
								 * any time */
} StripeRequest;

/* When a call has to be over. */
typedef struct StripeDeadline
{
	instr_time	start;
	int64		limit;			/* milliseconds from there */
	bool		of_statement;	/* statement_timeout or transaction_timeout is
								 * nearer than the call's own limit */
} StripeDeadline;

/* What came of it. */
typedef struct StripeReply
{
	CallResult	result;			/* of the last attempt, sent in any */
	const char *reason;			/* for people; marked for translation */
	bool		resend;			/* may the same, sent again, settle it? */
	bool		genuine;		/* is the last attempt's answer one of
								 * Stripe's, and all of it? */
	int			attempts;		/* that were begun */
	bool		replayed;		/* Stripe says that the answer is a saved one */
	StripeBody	body;			/* of the last attempt */
	double		ms;				/* how long it all took */
} StripeReply;

extern void exchange_deadline(StripeDeadline *deadline, Duration timeout);
extern void exchange(const StripeRequest *request, const ApiKey *key,
					 const StripeDeadline *deadline, StripeReply *reply);
extern void exchange_check_key(const ApiKey *key);
extern Jsonb *exchange_error(const char *type, const char *message, Jsonb *request);

#endif							/* IDEMPOTENCY_STRIPE_REQUEST_H */
