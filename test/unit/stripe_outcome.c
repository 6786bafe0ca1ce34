/*-------------------------------------------------------------------------
 *
 * stripe_outcome.c
 *	  Tests every row of what Stripe's answers mean, and that every possible
 *	  answer has a meaning.  Prints TAP.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * test/unit/stripe_outcome.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <stdio.h>

/* not PostgreSQL's, which is in the server */
#undef printf

#include "stripe/stripe_outcome.h"

#define COMPLETED STRIPE_COMPLETED
#define FAILED STRIPE_FAILED
#define NOT_EXECUTED STRIPE_NOT_EXECUTED
#define UNKNOWN STRIPE_UNKNOWN
#define MISMATCH STRIPE_MISMATCH

typedef struct Row
{
	const char *name;
	int			status;
	bool		sent;
	bool		genuine;		/* Stripe's, and all of it */
	const char *type;
	const char *code;
	StripeOutcome outcome;
	bool		resend;			/* may the same settle it? */
	bool		retry;			/* at once? */
	bool		api_v2;
} Row;

static const Row rows[] = {
	/* no answer */
	{"DNS failure, refused, connect timeout, TLS failure", 0, false, false, NULL, NULL, NOT_EXECUTED, true, true},
	{"timeout, reset, end of file after the first byte", 0, true, false, NULL, NULL, UNKNOWN, true, true},

	/* 2xx */
	{"200", 200, true, true, NULL, NULL, COMPLETED, false, false},
	{"201", 201, true, true, NULL, NULL, COMPLETED, false, false},
	{"299", 299, true, true, NULL, NULL, COMPLETED, false, false},
	{"200 with an error", 200, true, false, "api_error", NULL, UNKNOWN, true, true},
	{"200, cut or somebody else's", 200, true, false, NULL, NULL, UNKNOWN, true, true},
	{"204, likewise", 204, true, false, NULL, NULL, UNKNOWN, true, true},

	/* redirects */
	{"301", 301, true, false, NULL, NULL, UNKNOWN, true, false},
	{"302, as if it were Stripe's", 302, true, true, NULL, NULL, UNKNOWN, true, false},
	{"308", 308, true, true, NULL, NULL, UNKNOWN, true, false},

	/* refusals */
	{"400 idempotency_error", 400, true, true, "idempotency_error", NULL, MISMATCH, false, false},
	{"404 idempotency_error", 404, true, true, "idempotency_error", NULL, MISMATCH, false, false},
	{"409 idempotency_error", 409, true, true, "idempotency_error", NULL, MISMATCH, false, false},
	{"400", 400, true, true, "invalid_request_error", "parameter_missing", FAILED, false, false},
	{"404", 404, true, true, "invalid_request_error", "resource_missing", FAILED, false, false},
	{"400, cut or somebody else's", 400, true, false, NULL, NULL, UNKNOWN, true, true},
	{"404, cut or somebody else's", 404, true, false, NULL, NULL, UNKNOWN, true, true},
	{"401", 401, true, true, "invalid_request_error", NULL, NOT_EXECUTED, true, false},
	{"401, cut or somebody else's", 401, true, false, NULL, NULL, UNKNOWN, true, false},
	{"403", 403, true, true, "invalid_request_error", NULL, NOT_EXECUTED, true, false},
	{"403, cut or somebody else's", 403, true, false, NULL, NULL, UNKNOWN, true, false},
	{"404 idempotency_error, cut", 404, true, false, NULL, NULL, UNKNOWN, true, true},
	{"413, somebody else's", 413, true, false, NULL, NULL, UNKNOWN, true, true},
	{"499, somebody else's", 499, true, false, NULL, NULL, UNKNOWN, true, true},
	{"402 card_error", 402, true, true, "card_error", "card_declined", FAILED, false, false},
	{"402, cut or somebody else's", 402, true, false, NULL, NULL, UNKNOWN, true, true},
	{"410", 410, true, true, "invalid_request_error", NULL, FAILED, false, false},

	/* conflicts */
	{"409 in use", 409, true, true, "invalid_request_error", "idempotency_key_in_use", UNKNOWN, true, true},
	{"409 in use, as some fakes say it", 409, true, true, "idempotency_error", "idempotency_key_in_use", UNKNOWN, true, true},
	{"400 in use", 400, true, true, "idempotency_error", "idempotency_key_in_use", UNKNOWN, true, true},
	{"409", 409, true, true, "invalid_request_error", "lock_timeout", NOT_EXECUTED, true, true},
	{"409 without code", 409, true, true, "invalid_request_error", NULL, NOT_EXECUTED, true, true},
	{"409, cut or somebody else's", 409, true, false, NULL, NULL, UNKNOWN, true, true},

	/* not now */
	{"408", 408, true, false, NULL, NULL, UNKNOWN, true, true},
	{"424", 424, true, true, "api_error", NULL, UNKNOWN, true, false},
	{"429 rate limit", 429, true, true, "invalid_request_error", "rate_limit", NOT_EXECUTED, true, false},
	{"429, cut or somebody else's", 429, true, false, NULL, NULL, UNKNOWN, true, false},
	{"429 lock_timeout", 429, true, true, "invalid_request_error", "lock_timeout", NOT_EXECUTED, true, true},

	/* failures of Stripe's */
	{"500", 500, true, true, "api_error", NULL, UNKNOWN, false, true},
	{"500 of API v2", 500, true, true, "api_error", NULL, UNKNOWN, true, true, true},
	{"500, cut or somebody else's", 500, true, false, NULL, NULL, UNKNOWN, true, true},
	{"501", 501, true, false, NULL, NULL, UNKNOWN, true, true},
	{"502", 502, true, false, NULL, NULL, UNKNOWN, true, true},
	{"503", 503, true, true, "api_error", NULL, UNKNOWN, true, true},
	{"504", 504, true, false, NULL, NULL, UNKNOWN, true, true},
	{"599", 599, true, false, NULL, NULL, UNKNOWN, true, true},

	/* no status at all */
	{"100", 100, true, true, NULL, NULL, UNKNOWN, true, false},
	{"600", 600, true, true, NULL, NULL, UNKNOWN, true, false},
	{"-1", -1, true, true, NULL, NULL, UNKNOWN, true, false}
};

/* Stripe's headers, and whether another attempt is made at once. */
static const struct
{
	const char *name;
	int			status;
	bool		genuine;
	StripeShouldRetry should_retry;
	bool		replayed;
	bool		retry;
}			headers[] = {
	{"500", 500, true, STRIPE_RETRY_UNSAID, false, true},
	{"500, Stripe-Should-Retry: false", 500, true, STRIPE_RETRY_FALSE, false, false},
	{"500, Stripe-Should-Retry: true", 500, true, STRIPE_RETRY_TRUE, false, true},
	{"500, replayed", 500, true, STRIPE_RETRY_UNSAID, true, false},
	{"500, replayed, Stripe-Should-Retry: true", 500, true, STRIPE_RETRY_TRUE, true, false},
	{"500, cut, Stripe-Should-Retry: false", 500, false, STRIPE_RETRY_FALSE, false, true},
	{"424, Stripe-Should-Retry: true", 424, true, STRIPE_RETRY_TRUE, false, true},
	{"429, Stripe-Should-Retry: true", 429, true, STRIPE_RETRY_TRUE, false, true},
	{"400, Stripe-Should-Retry: true", 400, true, STRIPE_RETRY_TRUE, false, true},
	{"503, Stripe-Should-Retry: false", 503, true, STRIPE_RETRY_FALSE, false, false},
	{"200, Stripe-Should-Retry: false", 200, true, STRIPE_RETRY_FALSE, false, false},
	{"200, Stripe-Should-Retry: true", 200, true, STRIPE_RETRY_TRUE, false, false},
	{"200, cut, Stripe-Should-Retry: false", 200, false, STRIPE_RETRY_FALSE, false, true},
	{"200, cut, replayed", 200, false, STRIPE_RETRY_UNSAID, true, true},
	{"no answer, Stripe-Should-Retry: false", 0, false, STRIPE_RETRY_FALSE, false, true}
};

static int	ntests = 0;
static int	nfailed = 0;

static void
ok(bool good, const char *name, const char *what)
{
	printf("%sok %d - %s: %s\n", good ? "" : "not ", ++ntests, name, what);
	if (!good)
		nfailed++;
}

int
main(void)
{
	static const char *const types[] = {NULL, "idempotency_error", "card_error", "api_error", ""};
	static const char *const codes[] = {NULL, "idempotency_key_in_use", "lock_timeout", ""};
	bool		all_named = true;
	bool		others_are_harmless = true;
	int			status;
	int			i;

	for (i = 0; i < lengthof(rows); i++)
	{
		StripeAnswer answer = {rows[i].status, rows[i].sent, rows[i].genuine, rows[i].type, rows[i].code,
		rows[i].api_v2};
		StripeClass class = stripe_classify(&answer);

		ok(class.outcome == rows[i].outcome, rows[i].name, "outcome");
		ok(class.resend == rows[i].resend, rows[i].name, "resend");
		ok(class.retry == rows[i].retry, rows[i].name, "retry");
	}

	for (i = 0; i < lengthof(headers); i++)
	{
		StripeAnswer answer = {headers[i].status, true, headers[i].genuine, NULL, NULL, false};
		StripeClass class = stripe_classify(&answer);

		ok(stripe_retry_at_once(&answer, &class, headers[i].should_retry,
								headers[i].replayed) == headers[i].retry,
		   headers[i].name, "retry");
	}

	/* whatever comes */
	for (status = -2; status < 1002; status++)
	{
		int			type;
		int			code;
		int			flags;

		for (type = 0; type < lengthof(types); type++)
			for (code = 0; code < lengthof(codes); code++)
				for (flags = 0; flags < 8; flags++)
				{
					StripeAnswer answer = {status, (flags & 1) != 0, (flags & 2) != 0, types[type], codes[code],
					(flags & 4) != 0};
					StripeClass class = stripe_classify(&answer);

					if (class.reason == NULL || stripe_outcome_name(class.outcome) == NULL)
						all_named = false;

					/* no word of anybody else's is final, or frees the operation */
					if (!answer.genuine && answer.http_status != 0 &&
						(class.outcome == STRIPE_COMPLETED || class.outcome == STRIPE_FAILED ||
						 class.outcome == STRIPE_NOT_EXECUTED || !class.resend) &&
						class.outcome != STRIPE_MISMATCH)
						others_are_harmless = false;
				}
	}
	ok(all_named, "any answer", "has an outcome and a reason");
	ok(others_are_harmless, "an answer that isn't Stripe's", "is unknown, and may be sent again");

	printf("1..%d\n", ntests);
	return nfailed != 0;
}
