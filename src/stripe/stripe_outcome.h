/*-------------------------------------------------------------------------
 *
 * stripe_outcome.h
 *	  What an answer of Stripe's says about the call.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/stripe/stripe_outcome.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_STRIPE_OUTCOME_H
#define IDEMPOTENCY_STRIPE_OUTCOME_H

/*
 * What Stripe did with a call: labels of the SQL type idempotency.outcome.  The
 * first is what a value that was only zeroed says: nothing.
 */
typedef enum StripeOutcome
{
	STRIPE_IN_PROGRESS,
	STRIPE_COMPLETED,
	STRIPE_FAILED,
	STRIPE_NOT_EXECUTED,
	STRIPE_UNKNOWN,
	STRIPE_MISMATCH
} StripeOutcome;

/* Does it say for good what Stripe did? */
static inline bool
stripe_is_definitive(StripeOutcome outcome)
{
	return outcome == STRIPE_COMPLETED || outcome == STRIPE_FAILED;
}

/* May a call be sent: labels of the SQL type idempotency.verdict */
typedef enum StripeVerdict
{
	STRIPE_CLAIMED,
	STRIPE_REPLAY,
	STRIPE_BUSY,				/* in_progress */
	STRIPE_OTHER_REQUEST,		/* mismatch */
	STRIPE_CANT_TELL			/* unknown */
} StripeVerdict;

/* What came back, if anything */
typedef struct StripeAnswer
{
	int			http_status;	/* 0: no answer */
	bool		sent;			/* did a byte of the request leave?  Only
								 * asked where there is no answer */
	bool		genuine;		/* is it Stripe's, and all of it?
								 * stripe_judge() says */
	const char *error_type;		/* of the body's error object, or NULL */
	const char *error_code;		/* likewise */
	bool		api_v2;
} StripeAnswer;

typedef struct StripeClass
{
	StripeOutcome outcome;
	bool		resend;			/* may the same key and bytes, sent again
								 * within the key's window, settle it? */
	bool		retry;			/* worth another attempt inside the same call? */
	const char *reason;			/* for people; marked for translation */
} StripeClass;

/* What Stripe says of another attempt, by Stripe-Should-Retry */
typedef enum StripeShouldRetry
{
	STRIPE_RETRY_UNSAID,
	STRIPE_RETRY_TRUE,
	STRIPE_RETRY_FALSE
} StripeShouldRetry;

extern StripeClass stripe_classify(const StripeAnswer *answer);
extern bool stripe_retry_at_once(const StripeAnswer *answer, const StripeClass *class,
								 StripeShouldRetry should_retry, bool replayed);
extern PGDLLEXPORT const char *stripe_outcome_name(StripeOutcome outcome);
extern StripeOutcome stripe_outcome_by_name(const char *name);
extern PGDLLEXPORT const char *stripe_verdict_name(StripeVerdict verdict);

#endif							/* IDEMPOTENCY_STRIPE_OUTCOME_H */
