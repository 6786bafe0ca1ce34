/*-------------------------------------------------------------------------
 *
 * stripe_outcome.c
 *	  What an answer of Stripe's says about the call.
 *
 * One table, read from the top; the first rule that fits an answer decides.
 * Where an answer can be read in two ways, the rule takes the one that can't
 * lead to a second charge: "unknown" is the outcome of whatever isn't sure,
 * and the last rule catches all that no other names.
 *
 * Between Stripe and whoever asks there may be proxies, gateways and firewalls,
 * and each of them may answer in Stripe's place after Stripe has executed the
 * request: because the answer took too long, because it didn't like it, or
 * because it has sent the request again by itself and was refused that time.  So
 * no status says by itself that nothing was done, and no success counts by its
 * status alone: what isn't genuine (stripe_answer.c) is unknown.
 *
 * A rule's last two flags mean:
 *
 * resend	The same key and the same bytes, sent again within the time that
 *			Stripe remembers keys, may settle the call.  It is safe at any rate;
 *			where the flag is off it is useless.
 * retry	Doing so at once, inside the same call and after a short pause, is
 *			worth it.  This is the answer to begin with: Stripe-Should-Retry,
 *			true or false, overrules it (as in stripe-node, -python and -ruby),
 *			except where the answer isn't genuine, since that header speaks of
 *			an answer of Stripe's that arrived; and an answer with Idempotent-Replayed: true
 *			is what any further attempt would bring, so it ends them all.
 *
 * The sources named below are Stripe's documentation (docs.stripe.com) and the
 * source of its client libraries.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/stripe/stripe_outcome.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "stripe/stripe_outcome.h"

typedef enum Condition
{
	ANY,
	YES,
	NO
} Condition;

typedef struct OutcomeRule
{
	int			first_status;	/* both included */
	int			last_status;
	Condition	sent;
	Condition	genuine;
	Condition	api_v2;
	const char *error_type;		/* NULL: any */
	const char *error_code;		/* NULL: any */
	StripeClass class;
} OutcomeRule;

static const OutcomeRule outcome_rules[] = {
	/* no byte left, so there is nothing that Stripe could have done */
	{
		0, 0, NO, ANY, ANY, NULL, NULL,
		{STRIPE_NOT_EXECUTED, true, true, gettext_noop("nothing was sent")}
	},

	/*
	 * Timeout, reset or end of file.  error-low-level, "Network errors": same
	 * key and same parameters until there is an answer.
	 */
	{
		0, 0, ANY, ANY, ANY, NULL, NULL,
		{STRIPE_UNKNOWN, true, true, gettext_noop("the request was sent and no answer came")}
	},

	/* api/errors, "HTTP status code summary": 200, everything worked */
	{
		200, 299, ANY, YES, ANY, NULL, NULL,
		{STRIPE_COMPLETED, false, false, gettext_noop("Stripe executed the request")}
	},

	/*
	 * Most likely it is done, and the id was in the part that got lost; or
	 * something on the way has answered.  What Stripe has answered is saved
	 * under the key (api/idempotent_requests), so the same key fetches it.
	 */
	{
		200, 299, ANY, ANY, ANY, NULL, NULL,
		{STRIPE_UNKNOWN, true, true, gettext_noop("a success without Stripe's object: the same key fetches it")}
	},

	/* no documented answer, and never followed: it would lead the secret away */
	{
		300, 399, ANY, ANY, ANY, NULL, NULL,
		{STRIPE_UNKNOWN, true, false, gettext_noop("a redirect is not an answer of Stripe")}
	},

	/*
	 * The first request with this key is still running, and may succeed
	 * (stripe-terminal-android#470).  The live body has status 409 and type
	 * invalid_request_error (stripity-stripe#564), so the code decides,
	 * before the type does: several stand-ins for Stripe say
	 * idempotency_error here.
	 */
	{
		400, 499, ANY, ANY, ANY, NULL, "idempotency_key_in_use",
		{STRIPE_UNKNOWN, true, true, gettext_noop("a request with the same key is still running at Stripe")}
	},

	/*
	 * The key was first used with other parameters or at another endpoint
	 * (api/errors, idempotency_error).  Status 400 on the live API
	 * (stripe-ruby#503, #598); stripe-node Error.js and stripe-python
	 * _api_requestor.py look for the type at 400 and 404.  No other status
	 * gives the type another meaning.
	 */
	{
		400, 499, ANY, ANY, ANY, "idempotency_error", NULL,
		{STRIPE_MISMATCH, false, false, gettext_noop("Stripe has seen another request with the same key")}
	},

	/*
	 * Something on the way refuses credentials, rights or pace.  Stripe may
	 * have had the request all the same (see above); at once the same would
	 * be refused again.
	 */
	{
		401, 401, ANY, NO, ANY, NULL, NULL,
		{STRIPE_UNKNOWN, true, false, gettext_noop("the refusal of something on the way to Stripe")}
	},
	{
		403, 403, ANY, NO, ANY, NULL, NULL,
		{STRIPE_UNKNOWN, true, false, gettext_noop("the refusal of something on the way to Stripe")}
	},
	{
		429, 429, ANY, NO, ANY, NULL, NULL,
		{STRIPE_UNKNOWN, true, false, gettext_noop("the refusal of something on the way to Stripe")}
	},

	/*
	 * Refused before the endpoint ran.  error-low-level, "Content errors": no
	 * result is saved without a valid API key.  The same key and bytes may go
	 * out again once the API key is right.
	 */
	{
		401, 401, ANY, ANY, ANY, NULL, NULL,
		{STRIPE_NOT_EXECUTED, true, false, gettext_noop("Stripe refused the API key")}
	},

	/* api/errors: the API key has no permission for this request */
	{
		403, 403, ANY, ANY, ANY, NULL, NULL,
		{STRIPE_NOT_EXECUTED, true, false, gettext_noop("the API key is not allowed to make this request")}
	},

	/*
	 * api/errors: the parameters were valid and the request failed, as by
	 * card_error.  Saved under the key; the objects that exist now are in the
	 * error object (payment_intent, setup_intent, charge).
	 */
	{
		402, 402, ANY, YES, ANY, NULL, NULL,
		{STRIPE_FAILED, false, false, gettext_noop("Stripe declined the request")}
	},
	/*
	 * rate-limits, "Object lock timeouts": another request held the object.
	 * Safe to send again (stripe-ruby api_requestor.rb, should_retry?, which
	 * with stripe-go is the one to do so unasked).
	 */
	{
		429, 429, ANY, ANY, ANY, NULL, "lock_timeout",
		{STRIPE_NOT_EXECUTED, true, true, gettext_noop("another request holds the object at Stripe")}
	},

	/*
	 * rate-limits: the limiter runs before the idempotency layer, nothing is
	 * executed or saved.  No client library sends again unasked.
	 */
	{
		429, 429, ANY, ANY, ANY, NULL, NULL,
		{STRIPE_NOT_EXECUTED, true, false, gettext_noop("Stripe limits the rate of requests")}
	},

	/*
	 * Not an answer of Stripe's (api/errors doesn't list it): something on
	 * the way gave up waiting for the request (RFC 9110, 15.5.9), and doesn't
	 * know how much of it went on.
	 */
	{
		408, 408, ANY, ANY, ANY, NULL, NULL,
		{STRIPE_UNKNOWN, true, true, gettext_noop("something on the way to Stripe gave up waiting")}
	},

	/*
	 * api/errors: a dependency of Stripe's failed.  How far the request got
	 * and whether this is saved isn't documented.  No client library sends
	 * again unasked.
	 */
	{
		424, 424, ANY, ANY, ANY, NULL, NULL,
		{STRIPE_UNKNOWN, true, false, gettext_noop("a service that Stripe depends on failed")}
	},

	/* cut, or somebody else's */
	{
		400, 499, ANY, NO, ANY, NULL, NULL,
		{STRIPE_UNKNOWN, true, true, gettext_noop("a refusal without Stripe's error object")}
	},

	/*
	 * error-low-level, "Content errors": a conflict with another request is
	 * not saved.  stripe-node, -python and -ruby send again.
	 */
	{
		409, 409, ANY, ANY, ANY, NULL, NULL,
		{STRIPE_NOT_EXECUTED, true, true, gettext_noop("the request conflicts with another one at Stripe")}
	},

	/*
	 * error-low-level, "Content errors": invalid, and saved if execution had
	 * begun; a corrected request needs a new key.
	 */
	{
		400, 499, ANY, ANY, ANY, NULL, NULL,
		{STRIPE_FAILED, false, false, gettext_noop("Stripe refused the request")}
	},

	/*
	 * error-low-level, "Server errors": indeterminate, and saved, so that the
	 * same key brings back the same 500 whatever Stripe does with the object
	 * later; a new key is advised against.  Only a look at Stripe's objects
	 * or an event settles it.  Still the libraries (stripe-node, -python,
	 * -ruby) send again, and so do we inside the call: where the failure came
	 * before execution began nothing is saved, and the second attempt is the
	 * one that works.  A saved 500 costs one attempt, it comes back marked as
	 * replayed.  API v2 executes again what has failed.
	 */
	{
		500, 500, ANY, YES, NO, NULL, NULL,
		{STRIPE_UNKNOWN, false, true, gettext_noop("Stripe failed in the middle: the same key brings the same answer")}
	},

	/* api/errors: something went wrong on Stripe's end, or on the way to it */
	{
		500, 599, ANY, ANY, ANY, NULL, NULL,
		{STRIPE_UNKNOWN, true, true, gettext_noop("Stripe or something on the way to it failed")}
	},

	/* no final HTTP status at all */
	{
		PG_INT32_MIN, PG_INT32_MAX, ANY, ANY, ANY, NULL, NULL,
		{STRIPE_UNKNOWN, true, false, gettext_noop("this is not an answer of Stripe")}
	}
};

static bool holds(Condition condition, bool value);
static bool is_or_any(const char *wanted, const char *value);

/*
 * Say what an answer means for the call.
 *
 * Takes any answer whatsoever, raises nothing and allocates nothing; the
 * reason is a constant string, for _() where it is shown.
 */
StripeClass
stripe_classify(const StripeAnswer *answer)
{
	const OutcomeRule *rule = outcome_rules;

	/* the last rule fits everything */
	while (answer->http_status < rule->first_status ||
		   answer->http_status > rule->last_status ||
		   !holds(rule->sent, answer->sent) ||
		   !holds(rule->genuine, answer->genuine) ||
		   !holds(rule->api_v2, answer->api_v2) ||
		   !is_or_any(rule->error_type, answer->error_type) ||
		   !is_or_any(rule->error_code, answer->error_code))
	{
		rule++;
		Assert(rule < outcome_rules + lengthof(outcome_rules));
	}

	return rule->class;
}

/*
 * Is another attempt inside the same call worth it, after a short pause?
 * "replayed" is Idempotent-Replayed: true.
 */
bool
stripe_retry_at_once(const StripeAnswer *answer, const StripeClass *class,
					 StripeShouldRetry should_retry, bool replayed)
{
	/* what these two headers say is said of an answer of Stripe's */
	if (answer->http_status == 0 || !answer->genuine)
		return class->retry;

	/* any further attempt brings the same */
	if (replayed)
		return false;

	/* nothing is left to be settled, or nothing that this request could */
	if (class->outcome == STRIPE_COMPLETED || class->outcome == STRIPE_MISMATCH)
		return false;

	switch (should_retry)
	{
		case STRIPE_RETRY_TRUE:
			return true;
		case STRIPE_RETRY_FALSE:
			return false;
		case STRIPE_RETRY_UNSAID:
			break;
	}
	return class->retry;
}

/* In the order of the enum. */
static const char *const outcome_names[] = {
	"in_progress", "completed", "failed", "not_executed", "unknown", "mismatch"
};

/*
 * Give an outcome's label in the SQL type idempotency.outcome.
 */
const char *
stripe_outcome_name(StripeOutcome outcome)
{
	if ((int) outcome < 0 || (int) outcome >= lengthof(outcome_names))
		elog(ERROR, "unrecognized Stripe outcome: %d", (int) outcome);
	return outcome_names[outcome];
}

/*
 * Find the outcome that has a label.
 */
StripeOutcome
stripe_outcome_by_name(const char *name)
{
	int			i;

	for (i = 0; i < lengthof(outcome_names); i++)
	{
		if (strcmp(outcome_names[i], name) == 0)
			return (StripeOutcome) i;
	}

	elog(ERROR, "unrecognized Stripe outcome: \"%s\"", name);
	return STRIPE_UNKNOWN;		/* keep compiler quiet */
}

/*
 * Give a verdict's label in the SQL type idempotency.verdict.
 */
const char *
stripe_verdict_name(StripeVerdict verdict)
{
	switch (verdict)
	{
		case STRIPE_CLAIMED:
			return "claimed";
		case STRIPE_REPLAY:
			return "replay";
		case STRIPE_BUSY:
			return "in_progress";
		case STRIPE_OTHER_REQUEST:
			return "mismatch";
		case STRIPE_CANT_TELL:
			return "unknown";
	}

	elog(ERROR, "unrecognized verdict: %d", (int) verdict);
	return NULL;				/* keep compiler quiet */
}

static bool
holds(Condition condition, bool value)
{
	return condition == ANY || value == (condition == YES);
}

static bool
is_or_any(const char *wanted, const char *value)
{
	return wanted == NULL || (value != NULL && strcmp(wanted, value) == 0);
}
