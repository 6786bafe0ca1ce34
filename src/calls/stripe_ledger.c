/*-------------------------------------------------------------------------
 *
 * stripe_ledger.c
 *	  The ledger of calls to Stripe: its columns, and what a row says.
 *
 * One row of stripe_idempotency_keys is one operation, for ever: Stripe forgets
 * a key after a day, and a forgotten row would be a second charge.  Its state
 * is its outcome:
 *
 *	in_progress				claimed, and held
 *	completed, failed		final, until a failed one is reopened
 *	not_executed			free: Stripe did nothing, or was never asked
 *	unknown					it may or may not have happened
 *	mismatch				Stripe knows the key from another request
 *
 * Who holds an operation in progress?  An application that sends by itself
 * holds it until lease_expires_at.  A call that a backend sends has no lease
 * but names its caller (call_transactions.c) and is held while that is there;
 * after that every reader takes the row for unknown.
 *
 * What may still happen at Stripe is bounded by three columns.  first_sent_at
 * is when the first request of this generation may have left: a claim sets it,
 * because the caller sends right after.  Until 24 hours later, less
 * idempotency.stripe_resend_margin, the same key and bytes are safe to send
 * again; past that nothing is (verdict unknown).  "uncertain" remembers that an
 * earlier attempt of this generation ended without a definitive answer, so that
 * a later one that wasn't executed doesn't make the operation free.
 * past_tokens are the tokens of the last attempts before this one of this
 * generation: they used the same key, so a late answer of theirs is as good as
 * any, where none is recorded yet.
 *
 * A generation is one idempotency key.  Reopening starts the next; the one
 * before goes to "history".
 *
 * Everything here runs with plain C arguments, in the caller's backend as well
 * as in the recorder, and decides on the latest committed rows: what happened
 * at Stripe doesn't depend on a snapshot.  Only a claim in the caller's own
 * transaction follows that transaction's isolation.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/calls/stripe_ledger.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type_d.h"
#include "utils/builtins.h"

#include "base/arguments.h"
#include "base/errors.h"
#include "base/json_build.h"
#include "base/json_member.h"
#include "base/notify.h"
#include "base/result_row.h"
#include "base/settings.h"
#include "calls/call_transactions.h"
#include "calls/stripe_ledger.h"
#include "stripe/api_path.h"
#include "stripe/stripe_answer.h"

PG_FUNCTION_INFO_V1(idempotency_stripe_has_lapsed);
PG_FUNCTION_INFO_V1(idempotency_stripe_resend_may_settle);

static const char *const stripe_columns[S_NCOLUMNS] = {
	"token", "created_at", "claimed_at", "lease_expires_at", "first_sent_at",
	"recorded_at", "lease", "attempt", "generation", "http_status", "outcome",
	"uncertain", "livemode", "account", "operation_type", "operation_id",
	"idempotency_key", "resource_id", "resource_type", "request_id",
	"fingerprint", "past_tokens", "request", "response", "error", "history",
	"method", "path", "api_version", "body", "caller_life", "caller_vxid",
	"callers", "callers_system", "settled", "acknowledged", "reconciled",
	"resource_status"
};

Ledger		stripe_calls = {
	"stripe_idempotency_keys", stripe_columns, S_NCOLUMNS,
	3, {S_ACCOUNT + 1, S_OPERATION_TYPE + 1, S_OPERATION_ID + 1},
	{
		"SELECT token, created_at, claimed_at, lease_expires_at, first_sent_at,"
		" recorded_at, lease, attempt, generation, http_status, outcome,"
		" uncertain, livemode, account, operation_type, operation_id,"
		" idempotency_key, resource_id, resource_type, request_id,"
		" fingerprint, past_tokens, request, response, error, history,"
		" method, path, api_version, body, caller_life, caller_vxid,"
		" callers, callers_system, settled, acknowledged, reconciled, resource_status"
		" FROM idempotency.stripe_idempotency_keys" STRIPE_WHERE_KEY,
		3, {TEXTOID, TEXTOID, TEXTOID}
	}
};

/* ---------- the operation ---------- */

/*
 * The arguments that name an operation, checked.  Raises IK003 for a bad one
 * and IK009 in a copied database that hasn't decided on its namespace.  Needs
 * an active snapshot.
 */
void
operation_init(Operation *op, const char *type, const char *id, const char *account)
{
	const char *problem;
	const char *p;

	op->type = pstrdup(type);
	op->id = pstrdup(id);
	op->account = pstrdup(account);

	problem = stripe_operation_problem(op->type, op->id);
	if (problem != NULL)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("operation cannot have a Stripe idempotency key"),
				 errdetail_internal("%s.", _(problem)),
				 errhint("Type and id become part of an HTTP header of at most 255 characters.")));

	for (p = op->account; *p != '\0'; p++)
	{
		if (*p <= 0x20 || *p > 0x7e)
			break;
	}
	if (*p != '\0' || p - op->account > KEY_MAX_CHARS)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("account must be at most %d printable ASCII characters without spaces",
						KEY_MAX_CHARS)));

	op->key[0] = CStringGetTextDatum(op->account);
	op->key[1] = CStringGetTextDatum(op->type);
	op->key[2] = CStringGetTextDatum(op->id);

	namespace_for_stripe(&op->ns);
}

/* The operation in an error message. */
char *
describe_operation(Operation *op)
{
	if (op->account[0] == '\0')
		return psprintf("\"%s:%s\"", op->type, op->id);
	return psprintf("\"%s:%s\" of account \"%s\"", op->type, op->id, op->account);
}

/* This session's rules. */
StripeRules
stripe_rules(void)
{
	StripeRules rules;

	rules.resend_margin = (int64) setting_stripe_resend_margin * USECS_PER_SEC;
	rules.compare_ignore = setting_stripe_compare_ignore;
	return rules;
}

/* ---------- reading a row ---------- */

/* A text column as a C string, or NULL. */
char *
stripe_row_string(LedgerRow *row, int column)
{
	return row->isnull[column] ? NULL : TextDatumGetCString(row->values[column]);
}

/* Is it known to be a call of API v2, which has rules of its own? */
static bool
is_of_api_v2(LedgerRow *row)
{
	return !row->isnull[S_PATH] && path_is_v2(stripe_row_string(row, S_PATH));
}

/* Until when may the same key and bytes be sent again?  0 where they never were. */
TimestampTz
stripe_resend_until(LedgerRow *row, int64 margin)
{
	if (row->isnull[S_FIRST_SENT_AT])
		return 0;
	return DatumGetTimestampTz(row->values[S_FIRST_SENT_AT]) +
		(is_of_api_v2(row) ? STRIPE_V2_KEY_RETENTION_USECS : STRIPE_KEY_RETENTION_USECS) -
		margin;
}

/* The outcome as it is recorded. */
StripeOutcome
stripe_recorded_outcome(LedgerRow *row)
{
	return stripe_outcome_by_name(enum_label(row->values[S_OUTCOME]));
}

/* Is it recorded for good? */
bool
stripe_row_is_final(LedgerRow *row)
{
	return stripe_is_definitive(stripe_recorded_outcome(row));
}

/*
 * Does nobody hold an operation in progress any more?  For rows and, as an SQL
 * function, for views.
 */
bool
stripe_has_lapsed(NullableDatum lease_expires_at, NullableDatum caller_life,
				  NullableDatum caller_vxid, TimestampTz now)
{
	if (!caller_life.isnull)
		return caller_vxid.isnull ||
			caller_is_gone(DatumGetInt64(caller_life.value),
						   TextDatumGetCString(caller_vxid.value));
	return lease_expires_at.isnull || DatumGetTimestampTz(lease_expires_at.value) <= now;
}

static NullableDatum
row_column(LedgerRow *row, int column)
{
	NullableDatum datum;

	datum.value = row->values[column];
	datum.isnull = row->isnull[column];
	return datum;
}

/* Is it in progress, and is its claimant to be believed? */
bool
stripe_row_is_held(LedgerRow *row, TimestampTz now)
{
	return stripe_recorded_outcome(row) == STRIPE_IN_PROGRESS &&
		!stripe_has_lapsed(row_column(row, S_LEASE_EXPIRES_AT), row_column(row, S_CALLER_LIFE),
						   row_column(row, S_CALLER_VXID), now);
}

/* Is it a call in flight whose caller is gone? */
bool
stripe_caller_gone(LedgerRow *row)
{
	return !row->isnull[S_CALLER_LIFE] && stripe_recorded_outcome(row) == STRIPE_IN_PROGRESS &&
		!stripe_row_is_held(row, 0);
}

/* The outcome as everybody sees it: a call whose caller is gone is unknown. */
StripeOutcome
stripe_row_outcome(LedgerRow *row)
{
	return stripe_caller_gone(row) ? STRIPE_UNKNOWN : stripe_recorded_outcome(row);
}

Livemode
stripe_row_livemode(LedgerRow *row)
{
	return row->isnull[S_LIVEMODE] ? LIVEMODE_UNKNOWN :
		livemode_of(DatumGetBool(row->values[S_LIVEMODE]));
}

static Jsonb *
row_jsonb(LedgerRow *row, int column)
{
	return row->isnull[column] ? NULL : DatumGetJsonbP(row->values[column]);
}

/* What is sent of it. */
void
stripe_row_request(LedgerRow *row, CallRequest *request)
{
	request->method = stripe_row_string(row, S_METHOD);
	request->path = stripe_row_string(row, S_PATH);
	request->api_version = stripe_row_string(row, S_API_VERSION);
	request->body = row->isnull[S_BODY] ? NULL : DatumGetByteaP(row->values[S_BODY]);
	request->livemode = stripe_row_livemode(row);
}

/* What is recorded of it; the outcome depends on who asks. */
void
stripe_row_result(LedgerRow *row, StripeOutcome outcome, CallResult *result)
{
	result->outcome = outcome;
	result->sent = !row->isnull[S_FIRST_SENT_AT];
	result->http_status = row->isnull[S_HTTP_STATUS] ? 0 :
		DatumGetInt32(row->values[S_HTTP_STATUS]);
	result->resource_id = stripe_row_string(row, S_RESOURCE_ID);
	result->resource_type = stripe_row_string(row, S_RESOURCE_TYPE);
	result->resource_status = stripe_row_string(row, S_RESOURCE_STATUS);
	result->request_id = stripe_row_string(row, S_REQUEST_ID);
	result->response = row_jsonb(row, S_RESPONSE);
	result->error = row_jsonb(row, S_ERROR);
	result->livemode = stripe_row_livemode(row);
}

/* The request as an application has named it, or NULL. */
static JsonbContainer *
request_of(LedgerRow *row)
{
	return row->isnull[S_REQUEST] ? NULL : &DatumGetJsonbP(row->values[S_REQUEST])->root;
}

/* Where the request goes, whoever sends it, or NULL where that isn't known. */
static char *
sent_to(LedgerRow *row)
{
	char	   *path = stripe_row_string(row, S_PATH);

	return path != NULL ? path : json_string_member(request_of(row), "path");
}

/* What is known of the call that an answer belongs to. */
void
stripe_row_received(LedgerRow *row, StripeReceived *received)
{
	JsonbContainer *request = request_of(row);

	received->method = stripe_row_string(row, S_METHOD);
	if (received->method == NULL)
		received->method = json_string_member(request, "method");
	received->path = sent_to(row);
	received->uncertain = DatumGetBool(row->values[S_UNCERTAIN]);
}

/*
 * Would Stripe only repeat itself?  As its recorded answer says, of which a row
 * has no more than what was genuine.
 */
static bool
answer_is_sticky(LedgerRow *row)
{
	StripeReceived received;
	StripeAnswer answer;
	StripeBody	body;
	StripeClass class;

	if (row->isnull[S_HTTP_STATUS])
		return false;

	stripe_read_body(row_jsonb(row, S_RESPONSE), &body);
	memset(&received, 0, sizeof(received));
	received.http_status = DatumGetInt32(row->values[S_HTTP_STATUS]);
	received.sent = received.whole = true;
	received.path = sent_to(row);
	class = stripe_judge(&received, &body, &answer);

	/* a refusal that is in doubt for an attempt before comes again, too */
	return class.outcome == STRIPE_FAILED ||
		(class.outcome == STRIPE_UNKNOWN && !class.resend);
}

/*
 * Is it still time to send the same request again, and could that tell more of
 * an operation that isn't known?
 *
 * There is no other rule: claims ask it, and so does the view stripe_unknown, by
 * the function below.
 */
bool
stripe_resend_may_settle(LedgerRow *row, int64 margin, TimestampTz now)
{
	if (!row->isnull[S_FIRST_SENT_AT] && now >= stripe_resend_until(row, margin))
		return false;
	switch (stripe_recorded_outcome(row))
	{
		case STRIPE_MISMATCH:
			return false;
		case STRIPE_NOT_EXECUTED:
			return true;
		default:
			return !answer_is_sticky(row);
	}
}

/* ---------- what is said of it ---------- */

void
stripe_refuse_unclaimed(Operation *op)
{
	ereport(ERROR,
			(errcode(ERRCODE_BAD_ARGUMENT),
			 errmsg("Stripe operation %s was never claimed", describe_operation(op))));
}

void
stripe_refuse_token(Operation *op, LedgerRow *row)
{
	ereport(ERROR,
			(errcode(ERRCODE_STALE_TOKEN),
			 errmsg("Stripe operation %s is not held with this token", describe_operation(op)),
			 row->found == FOUND_ROW ?
			 errdetail("It was claimed again after that claim's lease had lapsed, or reopened.") :
			 errdetail("It was never claimed, or its claim was rolled back."),
			 errhint("Look at it with idempotency.stripe_lookup().")));
}

/*
 * Tell those who wait that an operation which wasn't known is settled.
 */
void
stripe_notify_settled(Operation *op, StripeOutcome outcome, const char *resource_id)
{
	StringInfoData payload;

	json_begin(&payload);
	json_add_string(&payload, "account", op->account);
	json_add_string(&payload, "operation_type", op->type);
	json_add_string(&payload, "operation_id", op->id);
	json_add_string(&payload, "outcome", stripe_outcome_name(outcome));
	if (resource_id != NULL)
		json_add_string(&payload, "resource_id", resource_id);
	else
		json_add_json(&payload, "resource_id", "null");
	json_end(&payload);

	notify_at_commit("idempotency_settled", payload.data);
}

/* ---------- for the views ---------- */

/*
 * stripe_has_lapsed(lease_expires_at, server_life, virtual_xid)
 */
Datum
idempotency_stripe_has_lapsed(PG_FUNCTION_ARGS)
{
	PG_RETURN_BOOL(stripe_has_lapsed(fcinfo->args[0], fcinfo->args[1], fcinfo->args[2],
									 GetCurrentTimestamp()));
}

/*
 * stripe_resend_may_settle(outcome, first_sent_at, path, http_status, response):
 * the columns of a row that the rule asks for, and this session's margin.
 */
Datum
idempotency_stripe_resend_may_settle(PG_FUNCTION_ARGS)
{
	static const int columns[] = {
		S_OUTCOME, S_FIRST_SENT_AT, S_PATH, S_HTTP_STATUS, S_RESPONSE
	};
	LedgerRow	row;
	int			i;

	if (PG_ARGISNULL(0))
		PG_RETURN_NULL();
	memset(row.isnull, true, sizeof(row.isnull));
	for (i = 0; i < lengthof(columns); i++)
	{
		row.values[columns[i]] = PG_GETARG_DATUM(i);
		row.isnull[columns[i]] = PG_ARGISNULL(i);
	}
	PG_RETURN_BOOL(stripe_resend_may_settle(&row, stripe_rules().resend_margin,
											GetCurrentTimestamp()));
}
