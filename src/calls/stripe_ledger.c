/*-------------------------------------------------------------------------
 *
 * stripe_ledger.c
 *	  The ledger of calls to Stripe: its rows, and what may become of them.
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
 * but names its caller (call_transactions.c) and is held while that is there; after that
 * every reader takes the row for unknown.
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

#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/pg_type_d.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/json.h"
#include "utils/varlena.h"
#include "utils/xid8.h"

#include "base/arguments.h"
#include "base/compat.h"
#include "base/errors.h"
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

/* Statuses with a meaning of their own */
#define HTTP_OK 200
#define HTTP_NO_CONTENT 204
#define HTTP_BAD_REQUEST 400

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

/*
 * Attempts whose late answers count.  An operation that stays unknown may be
 * tried again each second, and its row mustn't grow with every try; whoever is
 * so late has an answer that later attempts got as well, by the same key.
 */
#define MAX_PAST_TOKENS 64

/* $4 to $19, which both ways to claim share */
#define CLAIM_NARGS 19
#define CLAIM_ARGTYPES \
	TEXTOID, TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, TIMESTAMPTZOID, \
	INTERVALOID, TEXTOID, BYTEAOID, JSONBOID, TEXTOID, TEXTOID, TEXTOID, BYTEAOID, \
	BOOLOID, INT8OID, TEXTOID, XID8OID, INT8OID

static OwnerStatement insert_claim = {
	"INSERT INTO idempotency.stripe_idempotency_keys"
	" (account, operation_type, operation_id, token, created_at, claimed_at,"
	" first_sent_at, lease_expires_at, lease, attempt, generation, outcome, uncertain,"
	" idempotency_key, fingerprint, request, method, path, api_version, body, livemode,"
	" caller_life, caller_vxid, callers, callers_system)"
	" VALUES ($1, $2, $3, $4, $5, $5, $5, $6, $7, 1, 1, 'in_progress'::idempotency.outcome,"
	" false, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17,"
	" CASE WHEN $18 IS NULL THEN NULL::pg_catalog.xid8[] ELSE ARRAY[$18] END, $19)"
	" ON CONFLICT DO NOTHING",
	CLAIM_NARGS, {CLAIM_ARGTYPES}
};

/*
 * $20: the token that is taken over, $5 is the clock, too.  $8, the key, isn't
 * looked at.  Method, path, version and body belong together: those of the
 * first attempt that has them stay.  A row that a transaction known to have
 * committed, or this one, answers for needs nobody watched.
 */
static OwnerStatement take_over = {
	"UPDATE idempotency.stripe_idempotency_keys SET token = $4, claimed_at = $5,"
	" first_sent_at = COALESCE(first_sent_at, $5), lease_expires_at = $6, lease = $7,"
	" attempt = attempt OPERATOR(pg_catalog.+) 1,"
	" uncertain = uncertain OR NOT (" OUTCOME_IS("not_executed") "),"
	" past_tokens = (pg_catalog.array_append(past_tokens, token))"
	"[COALESCE(pg_catalog.cardinality(past_tokens), 0) OPERATOR(pg_catalog.-) "
	CppAsString2(MAX_PAST_TOKENS) " OPERATOR(pg_catalog.+) 2 :],"
	" outcome = 'in_progress'::idempotency.outcome, recorded_at = NULL,"
	" fingerprint = COALESCE(fingerprint, $9), request = COALESCE(request, $10),"
	" method = CASE WHEN method IS NULL THEN $11 ELSE method END,"
	" path = CASE WHEN method IS NULL THEN $12 ELSE path END,"
	" api_version = CASE WHEN method IS NULL THEN $13 ELSE api_version END,"
	" body = CASE WHEN method IS NULL THEN $14 ELSE body END,"
	" livemode = COALESCE(livemode, $15), caller_life = $16, caller_vxid = $17,"
	" callers = CASE WHEN callers IS NULL OR $18 IS NULL THEN NULL::pg_catalog.xid8[]"
	" WHEN callers_system OPERATOR(pg_catalog.=) $19"
	" THEN pg_catalog.array_append(callers, $18) ELSE ARRAY[$18] END,"
	" callers_system = $19"
	STRIPE_WHERE_KEY
	" AND token OPERATOR(pg_catalog.=) $20"
	" AND $8 IS NULL"
	" AND (" OUTCOME_IS("not_executed") " OR " OUTCOME_IS("unknown")
	" OR (" OUTCOME_IS("in_progress")
	" AND (lease_expires_at OPERATOR(pg_catalog.<=) $5 OR caller_life IS NOT NULL)))",
	CLAIM_NARGS + 1, {CLAIM_ARGTYPES, INT8OID}
};

static OwnerStatement renew_claim = {
	"UPDATE idempotency.stripe_idempotency_keys SET lease_expires_at = $5"
	STRIPE_WHERE_KEY " AND token OPERATOR(pg_catalog.=) $4 AND " OUTCOME_IS("in_progress"),
	5, {TEXTOID, TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID}
};

/*
 * $6 is the outcome of this answer.  It makes the operation free only where no
 * attempt before may have been executed; and an outcome that isn't known stays
 * uncertain whatever this token records next, but for a definitive one.
 * $14: may this attempt have left?  $15: the transaction that records answers for
 * the row by itself.  $16: what the object's status is.
 */
static OwnerStatement record_outcome = {
	"UPDATE idempotency.stripe_idempotency_keys SET recorded_at = $5,"
	" outcome = CASE WHEN $6 OPERATOR(pg_catalog.=) 'not_executed' AND uncertain"
	" THEN 'unknown'::idempotency.outcome ELSE $6::idempotency.outcome END,"
	" uncertain = uncertain OR $6 OPERATOR(pg_catalog.=) 'unknown',"
	" resource_id = COALESCE($7, resource_id),"
	" resource_type = " OF_RESOURCE("resource_type", "$7", "$8") ","
	" resource_status = $16,"
	" http_status = $9, response = " WITHOUT_SECRET("$10") ", error = $11,"
	" request_id = COALESCE($12, request_id), livemode = COALESCE($13, livemode),"
	" first_sent_at = CASE WHEN NOT $14 AND first_sent_at OPERATOR(pg_catalog.=) claimed_at"
	" THEN NULL ELSE first_sent_at END,"
	" callers = CASE WHEN $15 THEN NULL ELSE callers END,"
	" lease = NULL, lease_expires_at = NULL, caller_life = NULL, caller_vxid = NULL"
	STRIPE_WHERE_KEY
	" AND token OPERATOR(pg_catalog.=) $4"
	" AND NOT (" OUTCOME_IS("completed") " OR " OUTCOME_IS("failed") ")"
	" RETURNING outcome, uncertain, resource_id",
	16, {TEXTOID, TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, TEXTOID, TEXTOID,
	TEXTOID, INT4OID, JSONBOID, JSONBOID, TEXTOID, BOOLOID, BOOLOID, BOOLOID, TEXTOID}
};

static OwnerStatement release_claim = {
	"UPDATE idempotency.stripe_idempotency_keys SET"
	" outcome = CASE WHEN uncertain THEN 'unknown'::idempotency.outcome"
	" ELSE 'not_executed'::idempotency.outcome END,"
	" first_sent_at = CASE WHEN first_sent_at OPERATOR(pg_catalog.=) claimed_at"
	" THEN NULL ELSE first_sent_at END,"
	" lease = NULL, lease_expires_at = NULL, caller_life = NULL, caller_vxid = NULL"
	STRIPE_WHERE_KEY " AND token OPERATOR(pg_catalog.=) $4 AND " OUTCOME_IS("in_progress"),
	4, {TEXTOID, TEXTOID, TEXTOID, INT8OID}
};

static OwnerStatement extend_lease = {
	"UPDATE idempotency.stripe_idempotency_keys SET lease = COALESCE($6, lease),"
	" lease_expires_at = $5 OPERATOR(pg_catalog.+) COALESCE($6, lease)"
	STRIPE_WHERE_KEY " AND token OPERATOR(pg_catalog.=) $4 AND " OUTCOME_IS("in_progress")
	" RETURNING lease_expires_at",
	6, {TEXTOID, TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, INTERVALOID}
};

/* $4: the new token, $5: the one that is there, $8: the outcome that is there */
static OwnerStatement reopen = {
	"UPDATE idempotency.stripe_idempotency_keys SET"
	" history = COALESCE(history, '[]'::pg_catalog.jsonb) OPERATOR(pg_catalog.||)"
	" pg_catalog.jsonb_build_object('generation', generation,"
	" 'idempotency_key', idempotency_key, 'attempts', attempt, 'outcome', outcome,"
	" 'http_status', http_status, 'resource_id', resource_id,"
	" 'resource_type', resource_type, 'resource_status', resource_status, 'request_id', request_id, 'error', error,"
	" 'first_sent_at', first_sent_at, 'recorded_at', recorded_at, 'reopened_at', $6,"
	" 'reopened_by', $9, 'forced', $10, 'settled', settled, 'acknowledged', acknowledged,"
	" 'reconciled', reconciled),"
	" token = $4, attempt = 0, generation = generation OPERATOR(pg_catalog.+) 1,"
	" idempotency_key = $7, outcome = 'not_executed'::idempotency.outcome,"
	" uncertain = false, past_tokens = NULL, lease = NULL, lease_expires_at = NULL,"
	" first_sent_at = NULL, recorded_at = NULL, http_status = NULL, livemode = NULL,"
	" resource_id = NULL, resource_type = NULL, resource_status = NULL, request_id = NULL,"
	" fingerprint = NULL,"
	" request = NULL, response = NULL, error = NULL, method = NULL, path = NULL,"
	" api_version = NULL, body = NULL, caller_life = NULL, caller_vxid = NULL,"
	" callers = '{}'::pg_catalog.xid8[], settled = NULL, acknowledged = NULL,"
	" reconciled = NULL"
	STRIPE_WHERE_KEY
	" AND token OPERATOR(pg_catalog.=) $5"
	" AND outcome OPERATOR(pg_catalog.=) $8::idempotency.outcome",
	10, {TEXTOID, TEXTOID, TEXTOID, INT8OID, INT8OID, TIMESTAMPTZOID, TEXTOID,
	TEXTOID, TEXTOID, BOOLOID}
};

/* $4: what they become, $5: what they were when the fate was asked for */
static OwnerStatement set_callers = {
	"UPDATE idempotency.stripe_idempotency_keys SET callers = $4, callers_system = $6"
	STRIPE_WHERE_KEY " AND callers OPERATOR(pg_catalog.=) $5",
	6, {TEXTOID, TEXTOID, TEXTOID, XID8ARRAYOID, XID8ARRAYOID, INT8OID}
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
				 errmsg("operation can't have a Stripe idempotency key"),
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

/*
 * The member names that don't take part in the comparison.
 */
static void
set_ignored(RequestPrint *print, const char *list)
{
	List	   *names;
	ListCell   *lc;
	const char **ignore;
	int			n = 0;

	if (!SplitGUCList(pstrdup(list), ',', &names))
		elog(ERROR, "invalid list syntax in parameter \"idempotency.stripe_compare_ignore\"");

	ignore = palloc(Max(list_length(names), 1) * sizeof(char *));
	foreach(lc, names)
		ignore[n++] = lfirst(lc);
	print->ignore = ignore;
	print->nignore = n;
}

/* $1 to $4 of what is done with a token. */
static void
token_parameters(Operation *op, int64 token, Parameters *p)
{
	parameters_begin(p, op->key, lengthof(op->key));
	parameter_int64(p, token);
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
static void
received_for(LedgerRow *row, StripeReceived *received)
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

/* ---------- claim ---------- */

/* Everything that is known of an operation which this caller doesn't run. */
static void
answer_known(StripeClaim *claim, StripeVerdict verdict, LedgerRow *row)
{
	claim->verdict = verdict;
	claim->outcome = stripe_row_outcome(row);
	claim->known = true;
	claim->row = *row;
}

static void
busy(LedgerClaim *base)
{
	StripeClaim *claim = (StripeClaim *) base;

	claim->verdict = STRIPE_BUSY;
	claim->outcome = STRIPE_IN_PROGRESS;
	claim->retry_after = 1;
	claim->known = false;
}

/*
 * Is this the request of the row, to the byte?  Most retries say exactly what
 * was said before, and need no fingerprint, which is the dearest part of a
 * replay.
 */
static bool
is_recorded_request(StripeClaim *claim, LedgerRow *row)
{
	Jsonb	   *recorded;

	if (claim->request == NULL || row->isnull[S_REQUEST])
		return false;
	recorded = DatumGetJsonbP(row->values[S_REQUEST]);
	return VARSIZE(recorded) == VARSIZE(claim->request) &&
		memcmp(recorded, claim->request, VARSIZE(recorded)) == 0;
}

static LedgerDecision
decide(LedgerClaim *base, LedgerRow *row, TimestampTz now)
{
	StripeClaim *claim = (StripeClaim *) base;
	StripeOutcome outcome = stripe_row_outcome(row);

	if (!row->isnull[S_FINGERPRINT] && !is_recorded_request(claim, row) &&
		!request_matches(&claim->print, DatumGetByteaPP(row->values[S_FINGERPRINT])))
	{
		answer_known(claim, STRIPE_OTHER_REQUEST, row);
		return LEDGER_ANSWER;
	}

	if (stripe_row_is_final(row))
	{
		answer_known(claim, STRIPE_REPLAY, row);
		return LEDGER_ANSWER;
	}

	if (stripe_row_is_held(row, now) ||
		(row->own && outcome == STRIPE_IN_PROGRESS))
	{
		answer_known(claim, STRIPE_BUSY, row);
		claim->retry_after = row->isnull[S_LEASE_EXPIRES_AT] ? 1 :
			ledger_retry_after(DatumGetTimestampTz(row->values[S_LEASE_EXPIRES_AT]), now);
		return LEDGER_ANSWER;
	}

	if (!stripe_resend_may_settle(row, claim->rules.resend_margin, now))
	{
		answer_known(claim, STRIPE_CANT_TELL, row);
		if (outcome != STRIPE_MISMATCH)
			claim->outcome = STRIPE_UNKNOWN;
		return LEDGER_ANSWER;
	}

	/* one mode's attempt says nothing about the other's */
	if (livemodes_differ(claim->send.livemode, stripe_row_livemode(row)))
		ereport(ERROR,
				(errcode(ERRCODE_CONTRADICTS_RECORD),
				 errmsg("Stripe operation %s was begun in %s mode", describe_operation(claim->op),
						claim->send.livemode == LIVEMODE_LIVE ? "test" : "live"),
				 errdetail("It can't be continued with an API key of the other mode.")));

	return LEDGER_TAKE;
}

/*
 * $1 to $19, which both ways to claim share, with a new token.  "key" is NULL
 * where the row has its key.
 */
static void
claim_parameters(StripeClaim *claim, const char *key, TimestampTz now, Parameters *p)
{
	const CallRequest *send = &claim->send;
	bool		leased = claim->lease > 0;
	bool		called = claim->caller_life != 0;
	bool		watched = FullTransactionIdIsValid(claim->caller_xid);

	claim->token = ledger_new_token();

	parameters_begin(p, claim->op->key, lengthof(claim->op->key));
	parameter_int64(p, claim->token);
	parameter_timestamp(p, now);
	parameter_nullable(p, TimestampTzGetDatum(now + claim->lease), !leased);
	parameter_nullable(p, leased ? interval_datum(claim->lease) : (Datum) 0, !leased);
	parameter_string(p, key);
	parameter_pointer(p, request_print(&claim->print));
	parameter_pointer(p, claim->request);
	parameter_string(p, send->method);
	parameter_string(p, send->path);
	parameter_string(p, send->api_version);
	parameter_pointer(p, send->body);
	parameter_livemode(p, send->livemode);
	parameter_nullable(p, Int64GetDatum(claim->caller_life), !called);
	parameter_string(p, called ? claim->caller_vxid : NULL);
	parameter_nullable(p, FullTransactionIdGetDatum(claim->caller_xid), !watched);
	parameter_nullable(p, Int64GetDatum((int64) GetSystemIdentifier()), !watched);
}

static void
answer_claimed(StripeClaim *claim)
{
	claim->verdict = STRIPE_CLAIMED;
	claim->outcome = STRIPE_IN_PROGRESS;
}

void
stripe_refuse_unclaimed(Operation *op)
{
	ereport(ERROR,
			(errcode(ERRCODE_BAD_ARGUMENT),
			 errmsg("Stripe operation %s was never claimed", describe_operation(op))));
}

static bool
insert(LedgerClaim *base, Relation rel, TimestampTz now)
{
	StripeClaim *claim = (StripeClaim *) base;
	Parameters	p;

	if (claim->resend)
		stripe_refuse_unclaimed(claim->op);

	/* the key that is derived here is kept for ever */
	namespace_write_down();

	claim_parameters(claim, derive_stripe_key(claim->op->ns.value, NAMESPACE_LEN,
											  claim->op->account, claim->op->type,
											  claim->op->id, 1), now, &p);
	if (ledger_execute(rel, &insert_claim, p.values, p.nulls, NULL, NULL, 0) == 0)
		return false;

	answer_claimed(claim);
	return true;
}

static bool
take(LedgerClaim *base, Relation rel, LedgerRow *row, TimestampTz now)
{
	StripeClaim *claim = (StripeClaim *) base;
	Parameters	p;

	claim_parameters(claim, NULL, now, &p);
	parameter_datum(&p, row->values[S_TOKEN]);
	if (ledger_execute(rel, &take_over, p.values, p.nulls, NULL, NULL, 0) == 0)
		return false;

	answer_claimed(claim);
	return true;
}

static void
renew(LedgerClaim *base, Relation rel, TimestampTz now)
{
	StripeClaim *claim = (StripeClaim *) base;
	Parameters	p;

	if (claim->lease == 0)
		return;
	token_parameters(claim->op, claim->token, &p);
	parameter_timestamp(&p, now + claim->lease);
	if (ledger_execute(rel, &renew_claim, p.values, p.nulls, NULL, NULL, 0) != 1)
		elog(ERROR, "lost a claim of this transaction");
}

/*
 * Fill in what follows from the arguments, which the caller has set.
 */
void
stripe_claim_init(StripeClaim *claim)
{
	memcpy(claim->base.key, claim->op->key, sizeof(claim->op->key));
	claim->base.decide = decide;
	claim->base.insert = insert;
	claim->base.take = take;
	claim->base.renew = renew;
	claim->base.busy = busy;
	claim->print.request = claim->request;
	claim->print.print = NULL;
	set_ignored(&claim->print, claim->rules.compare_ignore);
}

/*
 * Claim in this transaction.
 */
void
stripe_claim_run(StripeClaim *claim, Relation rel)
{
	claim->token = 0;
	ledger_claim(&stripe_calls, rel, &claim->base);
	if (claim->verdict != STRIPE_CLAIMED)
		claim->token = 0;
}

/*
 * Raise IK006 where this transaction itself has written a row: nobody else
 * could commit a change of it.
 */
static void
refuse_own_row(Operation *op, LedgerRow *row)
{
	if (row->found == FOUND_ROW && row->own)
		ereport(ERROR,
				(errcode(ERRCODE_NOT_IN_TRANSACTION),
				 errmsg("this transaction has changed Stripe operation %s and isn't committed",
						describe_operation(op)),
				 errdetail("What is to be noted of it must be committed at once, by another transaction."),
				 errhint("Commit first.")));
}

void
stripe_refuse_own_row(Relation rel, Operation *op)
{
	LedgerRow	row;

	ledger_look_latest(&stripe_calls, rel, op->key, &row);
	refuse_own_row(op, &row);
}

/*
 * Answer a claim by a look at what is committed now, if that will do;
 * otherwise set wants_write.  Raises IK006 as above.
 *
 * A row that can be taken over while somebody is writing it isn't called busy
 * here: mostly that is the recorder, noting how its last caller has ended, and
 * the recorder has done so when it comes to this claim.
 */
void
stripe_claim_look(StripeClaim *claim, Relation rel)
{
	LedgerRow	row;

	claim->wants_write = false;
	claim->token = 0;
	ledger_look_latest(&stripe_calls, rel, claim->op->key, &row);

	refuse_own_row(claim->op, &row);
	if (row.found == FOUND_ROW &&
		decide(&claim->base, &row, GetCurrentTimestamp()) == LEDGER_ANSWER)
		return;
	if (row.found == FOUND_TWIN)
		busy(&claim->base);
	else if (row.found != FOUND_ROW && claim->resend)
		stripe_refuse_unclaimed(claim->op);
	else
		claim->wants_write = true;
}

/*
 * The row of a claim that was made: what to send.
 */
void
stripe_claim_fetch(StripeClaim *claim, Relation rel)
{
	ledger_look_latest(&stripe_calls, rel, claim->op->key, &claim->row);
	claim->known = true;
	if (claim->row.found != FOUND_ROW ||
		DatumGetInt64(claim->row.values[S_TOKEN]) != claim->token)
		stripe_refuse_token(claim->op, &claim->row);
}

/*
 * The caller hears of a refusal that stands, though perhaps it has corrected what
 * was refused.  Say how a corrected request comes to be sent: Stripe may have saved
 * the refusal under the key, so that isn't done unasked.  A declined card isn't
 * wrong, so nothing is said of it, but where another request was given.
 */
void
stripe_advise_reopen(StripeClaim *claim)
{
	JsonbContainer *error = NULL;
	char	   *type;

	if (!claim->known || claim->outcome != STRIPE_FAILED ||
		(claim->verdict != STRIPE_REPLAY && claim->verdict != STRIPE_OTHER_REQUEST))
		return;
	if (!claim->row.isnull[S_ERROR])
		error = &DatumGetJsonbP(claim->row.values[S_ERROR])->root;
	type = json_string_member(error, "type");
	if (claim->verdict == STRIPE_REPLAY &&
		(type == NULL || strcmp(type, "invalid_request_error") != 0))
		return;

	ereport(NOTICE,
			(claim->verdict == STRIPE_REPLAY ?
			 errmsg("Stripe has refused operation %s as invalid, and that stands",
					describe_operation(claim->op)) :
			 errmsg("Stripe operation %s has failed with another request, and that stands",
					describe_operation(claim->op)),
			 errhint("A corrected request is sent with a new key, after idempotency.stripe_reopen(%s, %s, account => %s, from_generation => %d).",
					 quote_literal_cstr(claim->op->type), quote_literal_cstr(claim->op->id),
					 quote_literal_cstr(claim->op->account),
					 DatumGetInt32(claim->row.values[S_GENERATION]))));
}

/* ---------- what the holder of a token does ---------- */

static void
look(Relation rel, Operation *op, LedgerRow *row)
{
	ledger_look_latest(&stripe_calls, rel, op->key, row);
}

/* Is this the token of an earlier attempt of the same generation? */
static bool
is_past_token(LedgerRow *row, int64 token)
{
	Datum	   *tokens;
	int			ntokens;
	int			i;

	if (row->isnull[S_PAST_TOKENS])
		return false;
	deconstruct_array(DatumGetArrayTypeP(row->values[S_PAST_TOKENS]), INT8OID,
					  sizeof(int64), FLOAT8PASSBYVAL, TYPALIGN_DOUBLE,
					  &tokens, NULL, &ntokens);
	for (i = 0; i < ntokens; i++)
	{
		if (DatumGetInt64(tokens[i]) == token)
			return true;
	}
	return false;
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
 * A fenced statement that needs the operation in progress found no row.  Raise
 * the reason; return where the row is as the statement wants it after all.
 */
void
stripe_explain_refusal(Relation rel, Operation *op, int64 token)
{
	LedgerRow	row;
	StripeOutcome outcome;

	look(rel, op, &row);
	if (row.found != FOUND_ROW || DatumGetInt64(row.values[S_TOKEN]) != token)
		stripe_refuse_token(op, &row);

	outcome = stripe_recorded_outcome(&row);
	if (outcome != STRIPE_IN_PROGRESS)
		ereport(ERROR,
				(errcode(ERRCODE_CONTRADICTS_RECORD),
				 errmsg("Stripe operation %s is no longer in progress", describe_operation(op)),
				 errdetail("Its outcome is recorded as %s.", stripe_outcome_name(outcome))));
}

/*
 * Make out an answer: the body and status as the application got them, 0 for
 * no status.  Without one, something with an id is taken for a success, and all
 * else for no answer.  Of a body that isn't Stripe's nothing is kept, but for
 * its error object.
 */
static void
read_answer(StripeReceived *received, Jsonb *response, CallResult *result)
{
	StripeBody	body;
	StripeAnswer answer;

	stripe_read_body(response, &body);
	memset(result, 0, sizeof(CallResult));
	result->sent = true;
	result->http_status = received->http_status;
	if (received->http_status == 0 && body.error == NULL &&
		(received->resource_id != NULL || body.resource_id != NULL))
		received->http_status = HTTP_OK;
	received->sent = received->whole = true;
	result->outcome = stripe_judge(received, &body, &answer).outcome;

	stripe_body_result(&body, answer.genuine, result);
	if (received->resource_id != NULL)
		result->resource_id = received->resource_id;
}

/*
 * An answer to an operation's call, as the holder of a token tells it.  What no
 * content and a refusal mean takes to know the call, so that the row is looked at
 * for these alone.  Whether an attempt before may have been executed, the row
 * says of its latest attempt only.  A token of 0 is a person's word for all of
 * them.
 */
void
stripe_read_answer_of(Relation rel, Operation *op, int64 token, Jsonb *response, int http_status,
					  const char *resource_id, CallResult *result)
{
	StripeReceived received;
	LedgerRow	row;

	memset(&received, 0, sizeof(received));
	received.http_status = http_status;
	received.resource_id = resource_id;
	if (http_status == HTTP_NO_CONTENT || http_status >= HTTP_BAD_REQUEST)
	{
		look(rel, op, &row);
		if (row.found == FOUND_ROW)
		{
			received_for(&row, &received);
			if (token == 0)
				received.uncertain = false;
			else if (DatumGetInt64(row.values[S_TOKEN]) != token)
			{
				received.uncertain = false;
				received.overtaken = true;
			}
		}
	}
	read_answer(&received, response, result);
}

/* Does a definitive result say something else than what is recorded? */
static bool
contradicts(LedgerRow *row, const CallResult *result)
{
	if (stripe_recorded_outcome(row) != result->outcome)
		return true;
	return result->resource_id != NULL && !row->isnull[S_RESOURCE_ID] &&
		strcmp(TextDatumGetCString(row->values[S_RESOURCE_ID]), result->resource_id) != 0;
}

/*
 * Recording found no unrecorded row of this token.  Returns true where it
 * should be tried (again) with the token *as; otherwise nothing is left to do
 * and the row has what stands.  Raises IK001 or IK002 where the result can't
 * stand.
 */
static bool
record_late(Relation rel, Operation *op, int64 token, const CallResult *result,
			LedgerRow *row, int64 *as)
{
	bool		current;

	look(rel, op, row);
	if (row->found != FOUND_ROW)
		stripe_refuse_token(op, row);
	current = DatumGetInt64(row->values[S_TOKEN]) == token;
	if (!current && !is_past_token(row, token))
		stripe_refuse_token(op, row);

	if (stripe_row_is_final(row))
	{
		/* who knows less than what is recorded doesn't contradict it */
		if (!stripe_is_definitive(result->outcome) || !contradicts(row, result))
			return false;
		if (!current)
			stripe_refuse_token(op, row);
		ereport(ERROR,
				(errcode(ERRCODE_CONTRADICTS_RECORD),
				 errmsg("another result of Stripe operation %s is recorded already",
						describe_operation(op)),
				 errdetail("Its outcome is recorded as %s, with resource %s.",
						   stripe_outcome_name(stripe_recorded_outcome(row)),
						   row->isnull[S_RESOURCE_ID] ? "none" :
						   TextDatumGetCString(row->values[S_RESOURCE_ID]))));
	}

	/* a late token settles the operation, but doesn't speak for its successor */
	if (!current && !stripe_is_definitive(result->outcome))
		return false;

	*as = DatumGetInt64(row->values[S_TOKEN]);
	return true;
}

/*
 * Tell those who wait that an operation which wasn't known is settled.
 */
void
stripe_notify_settled(Operation *op, StripeOutcome outcome, const char *resource_id)
{
	StringInfoData payload;

	initStringInfo(&payload);
	appendStringInfoString(&payload, "{\"account\": ");
	escape_json(&payload, op->account);
	appendStringInfoString(&payload, ", \"operation_type\": ");
	escape_json(&payload, op->type);
	appendStringInfoString(&payload, ", \"operation_id\": ");
	escape_json(&payload, op->id);
	appendStringInfoString(&payload, ", \"outcome\": ");
	escape_json(&payload, stripe_outcome_name(outcome));
	appendStringInfoString(&payload, ", \"resource_id\": ");
	if (resource_id != NULL)
		escape_json(&payload, resource_id);
	else
		appendStringInfoString(&payload, "null");
	appendStringInfoChar(&payload, '}');

	notify_at_commit("idempotency_settled", payload.data);
}

/*
 * Record what the holder of a token got for an answer; "adopt": the transaction
 * records its own work with it.  Returns the outcome that stands.
 */
StripeOutcome
stripe_record_run(Relation rel, Operation *op, int64 token, const CallResult *result, bool adopt)
{
	int64		as = token;
	int			races = 0;

	for (;;)
	{
		Parameters	p;
		LedgerRow	row;
		Datum		out[3];
		bool		isnull[3];

		token_parameters(op, as, &p);
		parameter_timestamp(&p, GetCurrentTimestamp());
		parameter_outcome(&p, result->outcome);
		parameter_string(&p, result->resource_id);
		parameter_string(&p, result->resource_type);
		parameter_nullable(&p, Int32GetDatum(result->http_status), result->http_status == 0);
		parameter_pointer(&p, result->response);
		parameter_pointer(&p, result->error);
		parameter_string(&p, result->request_id);
		parameter_livemode(&p, result->livemode);
		parameter_bool(&p, result->sent);
		parameter_bool(&p, adopt);
		parameter_string(&p, result->resource_status);
		if (ledger_execute_latest(rel, &record_outcome, p.values, p.nulls, out, isnull, 3) > 0)
		{
			/* an earlier attempt left it in doubt, and this is the end of it */
			if (stripe_is_definitive(result->outcome) && DatumGetBool(out[1]))
				stripe_notify_settled(op, result->outcome,
									  isnull[2] ? NULL : TextDatumGetCString(out[2]));
			return stripe_outcome_by_name(enum_label(out[0]));
		}

		if (!record_late(rel, op, token, result, &row, &as))
			return stripe_recorded_outcome(&row);
		ledger_lost_race(&stripe_calls, &races);
	}
}

/*
 * Give a claim its lease anew, before its holder knows of it.  Returns false where
 * it isn't in progress with this token any more.
 */
bool
stripe_renew_run(Relation rel, Operation *op, int64 token, TimestampTz until)
{
	Parameters	p;

	token_parameters(op, token, &p);
	parameter_timestamp(&p, until);
	return ledger_execute_latest(rel, &renew_claim, p.values, p.nulls, NULL, NULL, 0) > 0;
}

/*
 * Give a claim up because nothing was sent.  Returns false where it isn't in
 * progress with this token.
 */
bool
stripe_release_run(Relation rel, Operation *op, int64 token)
{
	Parameters	p;

	token_parameters(op, token, &p);
	return ledger_execute_latest(rel, &release_claim, p.values, p.nulls, NULL, NULL, 0) > 0;
}

/*
 * Renew a lease, 0 for the one given last.  Returns its new end, or 0 where
 * the operation isn't in progress with this token.
 */
TimestampTz
stripe_extend_run(Relation rel, Operation *op, int64 token, int64 lease, TimestampTz now)
{
	Parameters	p;
	Datum		lease_expires_at;
	bool		isnull;

	token_parameters(op, token, &p);
	parameter_timestamp(&p, now);
	parameter_nullable(&p, lease > 0 ? interval_datum(lease) : (Datum) 0, lease <= 0);
	if (ledger_execute_latest(rel, &extend_lease, p.values, p.nulls,
							  &lease_expires_at, &isnull, 1) == 0)
		return 0;
	return isnull ? 0 : DatumGetTimestampTz(lease_expires_at);
}

/* ---------- reopen ---------- */

/*
 * May an operation as it stands be given a new key?  Raises IK002 if not.
 */
static void
check_reopen(Operation *op, LedgerRow *row, bool force, TimestampTz now)
{
	StripeOutcome outcome = stripe_recorded_outcome(row);

	if (outcome == STRIPE_FAILED || outcome == STRIPE_NOT_EXECUTED)
		return;

	if (outcome == STRIPE_COMPLETED)
		ereport(ERROR,
				(errcode(ERRCODE_CONTRADICTS_RECORD),
				 errmsg("Stripe operation %s is completed", describe_operation(op)),
				 errdetail("A new key would execute it a second time."),
				 errhint("Use another operation id for another operation.")));

	if (stripe_row_is_held(row, now))
		ereport(ERROR,
				(errcode(ERRCODE_CONTRADICTS_RECORD),
				 errmsg("Stripe operation %s is in progress", describe_operation(op)),
				 errhint("Wait for its outcome, or until its lease has lapsed.")));

	if (!force)
		ereport(ERROR,
				(errcode(ERRCODE_CONTRADICTS_RECORD),
				 errmsg("outcome of Stripe operation %s is not known", describe_operation(op)),
				 errdetail("It may have been executed, and a new key would execute it a second time."),
				 errhint("Find out at Stripe first; force => true reopens it all the same.")));
}

/*
 * Start an operation's next generation.  from_generation is 0 where any will
 * do.  Returns the new key.
 */
char *
stripe_reopen_run(Relation rel, Operation *op, bool force, int from_generation,
				  const char *user)
{
	int			races = 0;

	for (;;)
	{
		LedgerRow	row;
		TimestampTz now;
		int			generation;
		char	   *key;
		Parameters	p;

		look(rel, op, &row);
		now = GetCurrentTimestamp();
		if (row.found == FOUND_TWIN)
			ereport(ERROR,
					(errcode(ERRCODE_CONTRADICTS_RECORD),
					 errmsg("Stripe operation %s is in progress", describe_operation(op)),
					 errhint("Wait for its outcome, or until its lease has lapsed.")));
		if (row.found != FOUND_ROW)
			stripe_refuse_unclaimed(op);

		/* a repeated call finds its work done */
		generation = DatumGetInt32(row.values[S_GENERATION]);
		if (from_generation > 0 && generation != from_generation)
		{
			if (generation != from_generation + 1)
				ereport(ERROR,
						(errcode(ERRCODE_CONTRADICTS_RECORD),
						 errmsg("Stripe operation %s is of generation %d, not %d",
								describe_operation(op), generation, from_generation)));
			return TextDatumGetCString(row.values[S_IDEMPOTENCY_KEY]);
		}

		check_reopen(op, &row, force, now);

		key = derive_stripe_key(op->ns.value, NAMESPACE_LEN, op->account, op->type, op->id,
								generation + 1);
		token_parameters(op, ledger_new_token(), &p);
		parameter_datum(&p, row.values[S_TOKEN]);
		parameter_timestamp(&p, now);
		parameter_string(&p, key);
		parameter_outcome(&p, stripe_recorded_outcome(&row));
		parameter_string(&p, user);
		parameter_bool(&p, force);
		if (ledger_execute_latest(rel, &reopen, p.values, p.nulls, NULL, NULL, 0) > 0)
			return key;
		ledger_lost_race(&stripe_calls, &races);
	}
}

/* ---------- the transactions behind a row ---------- */

static bool
replace_callers(Relation rel, Operation *op, Datum old, ArrayType *new)
{
	Parameters	p;

	parameters_begin(&p, op->key, lengthof(op->key));
	parameter_pointer(&p, new);
	parameter_datum(&p, old);
	parameter_int64(&p, (int64) GetSystemIdentifier());
	return ledger_execute_latest(rel, &set_callers, p.values, p.nulls, NULL, NULL, 0) > 0;
}

/*
 * A transaction was given the result of an operation that no other one is
 * known to answer for: watch it, too.  The token is that of the row it was
 * given; a claim of a later generation isn't adopted.
 */
void
stripe_adopt_run(Relation rel, Operation *op, int64 token, FullTransactionId xid)
{
	int			races = 0;

	for (;;)
	{
		LedgerRow	row;
		ArrayType  *callers;
		ArrayType  *open;
		Datum	   *xids;
		FullTransactionId *all;
		int			nxids;
		int			i;

		look(rel, op, &row);
		if (row.found != FOUND_ROW || row.isnull[S_CALLERS] ||
			DatumGetInt64(row.values[S_TOKEN]) != token)
			return;
		callers = DatumGetArrayTypeP(row.values[S_CALLERS]);

		switch (callers_fate(callers, row.isnull[S_CALLERS_SYSTEM] ? 0 :
							 (uint64) DatumGetInt64(row.values[S_CALLERS_SYSTEM]), &open))
		{
			case CALLERS_COMMITTED:
				open = NULL;
				break;
			case CALLERS_NOT_KNOWN:
				open = make_callers(&xid, 1);
				break;
			default:
				deconstruct_array(open, XID8OID, sizeof(FullTransactionId), FLOAT8PASSBYVAL,
								  TYPALIGN_DOUBLE, &xids, NULL, &nxids);
				all = palloc((nxids + 1) * sizeof(FullTransactionId));
				for (i = 0; i < nxids; i++)
					all[i] = DatumGetFullTransactionId(xids[i]);
				all[nxids] = xid;
				open = make_callers(all, nxids + 1);
				break;
		}

		if (replace_callers(rel, op, PointerGetDatum(callers), open))
			return;
		ledger_lost_race(&stripe_calls, &races);
	}
}

/*
 * Write down what became of an operation's transactions, as far as it is
 * known.  Returns false where it isn't yet.  Doesn't wait for a row that
 * another transaction is changing; one that changes meanwhile is left for
 * another time.
 */
bool
stripe_note_fate_run(Relation rel, Operation *op)
{
	LedgerRow	row;
	ArrayType  *callers;
	ArrayType  *open;
	CallersFate fate;

	look(rel, op, &row);
	if (row.found != FOUND_ROW || row.isnull[S_CALLERS])
		return true;
	if (TransactionIdIsValid(row.busy))
		return false;
	callers = DatumGetArrayTypeP(row.values[S_CALLERS]);
	if (ArrayGetNItems(ARR_NDIM(callers), ARR_DIMS(callers)) == 0)
		return true;

	fate = callers_fate(callers, row.isnull[S_CALLERS_SYSTEM] ? 0 :
						(uint64) DatumGetInt64(row.values[S_CALLERS_SYSTEM]), &open);
	switch (fate)
	{
		case CALLERS_COMMITTED:
			return replace_callers(rel, op, PointerGetDatum(callers), NULL);
		case CALLERS_ROLLED_BACK:
			return replace_callers(rel, op, PointerGetDatum(callers), open);
		case CALLERS_OPEN:
			return false;
		case CALLERS_NOT_KNOWN:
			return true;
	}
	return true;
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
