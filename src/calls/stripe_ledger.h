/*-------------------------------------------------------------------------
 *
 * stripe_ledger.h
 *	  The ledger of calls to Stripe: its columns, and what a row says.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/calls/stripe_ledger.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_STRIPE_LEDGER_H
#define IDEMPOTENCY_STRIPE_LEDGER_H

#include "utils/jsonb.h"

#include "base/parameters.h"
#include "ledger/derived_key.h"
#include "ledger/ledger.h"
#include "ledger/namespace.h"
#include "stripe/call_data.h"
#include "stripe/stripe_answer.h"

/*
 * API v1 prunes keys once they are at least this old.
 * https://docs.stripe.com/api/idempotent_requests
 */
#define STRIPE_KEY_RETENTION_USECS (24 * USECS_PER_HOUR)

/* API v2 keeps them longer: https://docs.stripe.com/api-v2-overview */
#define STRIPE_V2_KEY_RETENTION_USECS (30 * USECS_PER_DAY)

/* Columns of stripe_idempotency_keys. */
enum
{
	S_TOKEN, S_CREATED_AT, S_CLAIMED_AT, S_LEASE_EXPIRES_AT, S_FIRST_SENT_AT,
	S_RECORDED_AT, S_LEASE, S_ATTEMPT, S_GENERATION, S_HTTP_STATUS, S_OUTCOME,
	S_UNCERTAIN, S_LIVEMODE, S_ACCOUNT, S_OPERATION_TYPE, S_OPERATION_ID,
	S_IDEMPOTENCY_KEY, S_RESOURCE_ID, S_RESOURCE_TYPE, S_REQUEST_ID,
	S_FINGERPRINT, S_PAST_TOKENS, S_REQUEST, S_RESPONSE, S_ERROR, S_HISTORY,
	S_METHOD, S_PATH, S_API_VERSION, S_BODY, S_CALLER_LIFE, S_CALLER_VXID,
	S_CALLERS, S_CALLERS_SYSTEM, S_SETTLED, S_ACKNOWLEDGED,
	S_RECONCILED, S_RESOURCE_STATUS,
	S_NCOLUMNS
};

/* In statements: the whole key, which is $1 to $3 in each. */
#define STRIPE_WHERE_KEY \
	" WHERE account OPERATOR(pg_catalog.=) $1" \
	" AND operation_type OPERATOR(pg_catalog.=) $2" \
	" AND operation_id OPERATOR(pg_catalog.=) $3"

/*
 * The secret of an endpoint for webhooks is told once, to whoever has made the
 * endpoint, and has no place in a table.
 */
#define WITHOUT_SECRET(response) \
	"CASE WHEN (" response " OPERATOR(pg_catalog.->>) 'object'::pg_catalog.text)" \
	" OPERATOR(pg_catalog.=) 'webhook_endpoint'" \
	" THEN " response " OPERATOR(pg_catalog.-) 'secret'::pg_catalog.text" \
	" WHEN (" response " OPERATOR(pg_catalog.->>) 'object'::pg_catalog.text)" \
	" OPERATOR(pg_catalog.=) 'v2.core.event_destination'" \
	" THEN " response " OPERATOR(pg_catalog.#-) '{webhook_endpoint,signing_secret}'::pg_catalog.text[]" \
	" ELSE " response " END"

/*
 * What is known of the object that an operation has made, with the $n of an
 * answer: that of another object, or of none, says nothing about this one.
 */
#define OF_RESOURCE(column, id, value) \
	"CASE WHEN " id " OPERATOR(pg_catalog.<>) resource_id THEN " value \
	" ELSE COALESCE(" value ", " column ") END"

#define OUTCOME_IS(label) "outcome OPERATOR(pg_catalog.=) '" label "'::idempotency.outcome"

/* One operation, its arguments checked. */
typedef struct Operation
{
	char	   *account;
	char	   *type;
	char	   *id;
	Datum		key[LEDGER_MAX_KEYS];
	Namespace	ns;
} Operation;

/* What of the caller's settings its operations go by. */
typedef struct StripeRules
{
	int64		resend_margin;	/* microseconds */
	const char *compare_ignore; /* list of names */
} StripeRules;

extern Ledger stripe_calls;

extern PGDLLEXPORT void operation_init(Operation *op, const char *type, const char *id, const char *account);
extern char *describe_operation(Operation *op);
extern StripeRules stripe_rules(void);

extern bool stripe_has_lapsed(NullableDatum lease_expires_at, NullableDatum caller_life,
							  NullableDatum caller_vxid, TimestampTz now);
extern bool stripe_row_is_final(LedgerRow *row);
extern bool stripe_row_is_held(LedgerRow *row, TimestampTz now);
extern bool stripe_caller_gone(LedgerRow *row);
extern StripeOutcome stripe_recorded_outcome(LedgerRow *row);
extern StripeOutcome stripe_row_outcome(LedgerRow *row);
extern Livemode stripe_row_livemode(LedgerRow *row);
extern void stripe_row_request(LedgerRow *row, CallRequest *request);
extern void stripe_row_result(LedgerRow *row, StripeOutcome outcome, CallResult *result);
extern TimestampTz stripe_resend_until(LedgerRow *row, int64 margin);
extern bool stripe_resend_may_settle(LedgerRow *row, int64 margin, TimestampTz now);
extern char *stripe_row_string(LedgerRow *row, int column);

extern void stripe_row_received(LedgerRow *row, StripeReceived *received);

extern void stripe_refuse_unclaimed(Operation *op);
extern void stripe_refuse_token(Operation *op, LedgerRow *row);
extern void stripe_notify_settled(Operation *op, StripeOutcome outcome, const char *resource_id);

/* $1 to $4 of what is done with a token. */
static inline void
stripe_token_parameters(Operation *op, int64 token, Parameters *p)
{
	parameters_begin(p, op->key, lengthof(op->key));
	parameter_int64(p, token);
}

static inline void
parameter_livemode(Parameters *parameters, Livemode livemode)
{
	parameter_nullable(parameters, BoolGetDatum(livemode == LIVEMODE_LIVE),
					   livemode == LIVEMODE_UNKNOWN);
}

static inline void
parameter_outcome(Parameters *parameters, StripeOutcome outcome)
{
	parameter_string(parameters, stripe_outcome_name(outcome));
}

#endif							/* IDEMPOTENCY_STRIPE_LEDGER_H */
