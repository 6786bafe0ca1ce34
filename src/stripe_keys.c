/*-------------------------------------------------------------------------
 *
 * stripe_keys.c
 *	  SQL functions for the calls that an application sends to Stripe.
 *
 * One row of stripe_idempotency_keys is one operation, for ever: Stripe forgets
 * a key after a day, and a forgotten row would be a second charge.  Its state
 * is its outcome:
 *
 *	in_progress				claimed; held until lease_expires_at, lapsed after
 *	completed, failed		final, until a failed one is reopened
 *	not_executed			free: Stripe did nothing, or was never asked
 *	unknown					it may or may not have happened
 *	mismatch				Stripe knows the key from another request
 *
 * What may still happen at Stripe is bounded by three columns.  first_sent_at
 * is when the first request of this generation may have left: stripe_claim()
 * sets it, because the application sends right after.  Until 24 hours later,
 * less idempotency.stripe_resend_margin, the same key and bytes are safe to
 * send again; past that nothing is (verdict unknown).  "uncertain" remembers
 * that an earlier attempt of this generation ended without a definitive answer,
 * so that a later one that wasn't executed doesn't make the operation free.
 * past_tokens are the tokens of earlier attempts of this generation: they used
 * the same key, so a late answer of theirs is as good as any, where none is
 * recorded yet.
 *
 * A generation is one idempotency key.  stripe_reopen() starts the next; the
 * one before goes to "history".
 *
 * src/stripe_keys.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <stdarg.h>

#include "access/xact.h"
#include "catalog/pg_type_d.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/varlena.h"

#include "arguments.h"
#include "compat.h"
#include "errors.h"
#include "expiry.h"
#include "ledger.h"
#include "namespace.h"
#include "request_print.h"
#include "result.h"
#include "settings.h"
#include "settle_event.h"
#include "stripe_key.h"
#include "stripe_keys.h"
#include "stripe_outcome.h"

PG_FUNCTION_INFO_V1(idempotency_stripe_idempotency_key);
PG_FUNCTION_INFO_V1(idempotency_stripe_claim);
PG_FUNCTION_INFO_V1(idempotency_stripe_record);
PG_FUNCTION_INFO_V1(idempotency_stripe_release);
PG_FUNCTION_INFO_V1(idempotency_stripe_extend);
PG_FUNCTION_INFO_V1(idempotency_stripe_reopen);
PG_FUNCTION_INFO_V1(idempotency_stripe_lookup);

/*
 * API v1 prunes keys once they are at least this old.
 * https://docs.stripe.com/api/idempotent_requests
 */
#define STRIPE_KEY_RETENTION_USECS (24 * USECS_PER_HOUR)

/* Columns of stripe_idempotency_keys. */
enum
{
	S_TOKEN, S_CREATED_AT, S_CLAIMED_AT, S_LEASE_EXPIRES_AT, S_FIRST_SENT_AT,
	S_RECORDED_AT, S_LEASE, S_ATTEMPT, S_GENERATION, S_HTTP_STATUS, S_OUTCOME,
	S_UNCERTAIN, S_LIVEMODE, S_ACCOUNT, S_OPERATION_TYPE, S_OPERATION_ID,
	S_IDEMPOTENCY_KEY, S_RESOURCE_ID, S_RESOURCE_TYPE, S_REQUEST_ID,
	S_FINGERPRINT, S_PAST_TOKENS, S_REQUEST, S_RESPONSE, S_ERROR, S_HISTORY,
	S_SETTLED, S_NCOLUMNS
};

static const char *const stripe_columns[S_NCOLUMNS] = {
	"token", "created_at", "claimed_at", "lease_expires_at", "first_sent_at",
	"recorded_at", "lease", "attempt", "generation", "http_status", "outcome",
	"uncertain", "livemode", "account", "operation_type", "operation_id",
	"idempotency_key", "resource_id", "resource_type", "request_id",
	"fingerprint", "past_tokens", "request", "response", "error", "history",
	"settled"
};

/* Columns of stripe_claim_result. */
enum
{
	C_VERDICT, C_OUTCOME, C_IDEMPOTENCY_KEY, C_TOKEN, C_ATTEMPT, C_GENERATION,
	C_REQUEST, C_RESOURCE_ID, C_RESOURCE_TYPE, C_HTTP_STATUS, C_RESPONSE, C_ERROR,
	C_RETRY_AFTER, C_RESEND_UNTIL, C_LIVEMODE, C_NCOLUMNS
};

/* Columns of stripe_key_info. */
enum
{
	I_ACCOUNT, I_OPERATION_TYPE, I_OPERATION_ID, I_IDEMPOTENCY_KEY, I_GENERATION,
	I_ATTEMPT, I_OUTCOME, I_REQUEST, I_RESOURCE_ID, I_RESOURCE_TYPE, I_HTTP_STATUS,
	I_RESPONSE, I_ERROR, I_REQUEST_ID, I_LIVEMODE, I_CREATED_AT, I_CLAIMED_AT,
	I_LEASE_EXPIRES_AT, I_LAPSED, I_FIRST_SENT_AT, I_RESEND_UNTIL, I_RECORDED_AT,
	I_HISTORY, I_NCOLUMNS
};

/* The whole key; in every statement $1 to $3. */
#define WHERE_KEY \
	" WHERE account OPERATOR(pg_catalog.=) $1" \
	" AND operation_type OPERATOR(pg_catalog.=) $2" \
	" AND operation_id OPERATOR(pg_catalog.=) $3"

#define OUTCOME_IS(label) "outcome OPERATOR(pg_catalog.=) '" label "'::idempotency.outcome"

static Ledger stripe_calls = {
	"stripe_idempotency_keys", stripe_columns, S_NCOLUMNS,
	3, {S_ACCOUNT + 1, S_OPERATION_TYPE + 1, S_OPERATION_ID + 1},
	{
		"SELECT token, created_at, claimed_at, lease_expires_at, first_sent_at,"
		" recorded_at, lease, attempt, generation, http_status, outcome,"
		" uncertain, livemode, account, operation_type, operation_id,"
		" idempotency_key, resource_id, resource_type, request_id,"
		" fingerprint, past_tokens, request, response, error, history, settled"
		" FROM idempotency.stripe_idempotency_keys" WHERE_KEY,
		3, {TEXTOID, TEXTOID, TEXTOID}
	}
};

static OwnerStatement insert_claim = {
	"INSERT INTO idempotency.stripe_idempotency_keys"
	" (account, operation_type, operation_id, token, created_at, claimed_at,"
	" first_sent_at, lease_expires_at, lease, attempt, generation, outcome, uncertain,"
	" idempotency_key, fingerprint, request)"
	" VALUES ($1, $2, $3, $4, $5, $5, $5, $6, $7, 1, 1, 'in_progress'::idempotency.outcome,"
	" false, $8, $9, $10)"
	" ON CONFLICT (account, operation_type, operation_id) DO NOTHING",
	10, {TEXTOID, TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, TIMESTAMPTZOID,
	INTERVALOID, TEXTOID, BYTEAOID, JSONBOID}
};

/* $10: the token that is taken over, $5 is the clock, too */
static OwnerStatement take_over = {
	"UPDATE idempotency.stripe_idempotency_keys SET token = $4, claimed_at = $5,"
	" first_sent_at = COALESCE(first_sent_at, $5), lease_expires_at = $6, lease = $7,"
	" attempt = attempt OPERATOR(pg_catalog.+) 1,"
	" uncertain = uncertain OR NOT (" OUTCOME_IS("not_executed") "),"
	" past_tokens = pg_catalog.array_append(past_tokens, token),"
	" outcome = 'in_progress'::idempotency.outcome, recorded_at = NULL,"
	" fingerprint = COALESCE(fingerprint, $8), request = COALESCE(request, $9)"
	WHERE_KEY
	" AND token OPERATOR(pg_catalog.=) $10"
	" AND (" OUTCOME_IS("not_executed") " OR " OUTCOME_IS("unknown")
	" OR (" OUTCOME_IS("in_progress")
	" AND lease_expires_at OPERATOR(pg_catalog.<=) $5))"
	" RETURNING attempt, generation, idempotency_key, request, first_sent_at",
	10, {TEXTOID, TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, TIMESTAMPTZOID,
	INTERVALOID, BYTEAOID, JSONBOID, INT8OID}
};

static OwnerStatement renew_claim = {
	"UPDATE idempotency.stripe_idempotency_keys SET lease_expires_at = $5"
	WHERE_KEY " AND token OPERATOR(pg_catalog.=) $4",
	5, {TEXTOID, TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID}
};

/*
 * $6 is the outcome of this answer.  It makes the operation free only where no
 * attempt before may have been executed; and an outcome that isn't known stays
 * uncertain whatever this token records next, but for a definitive one.
 */
static OwnerStatement record_outcome = {
	"UPDATE idempotency.stripe_idempotency_keys SET recorded_at = $5,"
	" outcome = CASE WHEN $6 OPERATOR(pg_catalog.=) 'not_executed' AND uncertain"
	" THEN 'unknown'::idempotency.outcome ELSE $6::idempotency.outcome END,"
	" uncertain = uncertain OR $6 OPERATOR(pg_catalog.=) 'unknown',"
	" resource_id = COALESCE($7, resource_id), resource_type = COALESCE($8, resource_type),"
	" http_status = $9, response = $10, error = $11,"
	" request_id = COALESCE($12, request_id), livemode = COALESCE($13, livemode),"
	" lease = NULL, lease_expires_at = NULL"
	WHERE_KEY
	" AND token OPERATOR(pg_catalog.=) $4"
	" AND NOT (" OUTCOME_IS("completed") " OR " OUTCOME_IS("failed") ")"
	" RETURNING outcome",
	13, {TEXTOID, TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, TEXTOID, TEXTOID,
	TEXTOID, INT4OID, JSONBOID, JSONBOID, TEXTOID, BOOLOID}
};

static OwnerStatement release_claim = {
	"UPDATE idempotency.stripe_idempotency_keys SET"
	" outcome = CASE WHEN uncertain THEN 'unknown'::idempotency.outcome"
	" ELSE 'not_executed'::idempotency.outcome END,"
	" first_sent_at = CASE WHEN first_sent_at OPERATOR(pg_catalog.=) claimed_at"
	" THEN NULL ELSE first_sent_at END,"
	" lease = NULL, lease_expires_at = NULL"
	WHERE_KEY " AND token OPERATOR(pg_catalog.=) $4 AND " OUTCOME_IS("in_progress"),
	4, {TEXTOID, TEXTOID, TEXTOID, INT8OID}
};

static OwnerStatement extend_lease = {
	"UPDATE idempotency.stripe_idempotency_keys SET lease = COALESCE($6, lease),"
	" lease_expires_at = $5 OPERATOR(pg_catalog.+) COALESCE($6, lease)"
	WHERE_KEY " AND token OPERATOR(pg_catalog.=) $4 AND " OUTCOME_IS("in_progress")
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
	" 'resource_type', resource_type, 'request_id', request_id, 'error', error,"
	" 'first_sent_at', first_sent_at, 'recorded_at', recorded_at, 'reopened_at', $6,"
	" 'reopened_by', $9, 'forced', $10, 'settled', settled),"
	" token = $4, attempt = 0, generation = generation OPERATOR(pg_catalog.+) 1,"
	" idempotency_key = $7, outcome = 'not_executed'::idempotency.outcome,"
	" uncertain = false, past_tokens = NULL, lease = NULL, lease_expires_at = NULL,"
	" first_sent_at = NULL, recorded_at = NULL, http_status = NULL, livemode = NULL,"
	" resource_id = NULL, resource_type = NULL, request_id = NULL, fingerprint = NULL,"
	" request = NULL, response = NULL, error = NULL, settled = NULL"
	WHERE_KEY
	" AND token OPERATOR(pg_catalog.=) $5"
	" AND outcome OPERATOR(pg_catalog.=) $8::idempotency.outcome",
	10, {TEXTOID, TEXTOID, TEXTOID, INT8OID, INT8OID, TIMESTAMPTZOID, TEXTOID,
	TEXTOID, TEXTOID, BOOLOID}
};

/* The ledger's table, for whoever looks at its rows by other ways. */
Relation
stripe_calls_open(LOCKMODE lockmode)
{
	return ledger_open(&stripe_calls, lockmode, false);
}

/* ---------- expiry ---------- */

/*
 * Only what is settled, and so final, is ever touched.  After
 * idempotency.stripe_body_retention such a row loses what was sent and what came
 * back, in its history, too; and keeps what the operation was, its keys, what
 * came of it and when.  It is deleted only where idempotency.stripe_retention
 * says so.  The first cutoff is the moment up to which rows recorded are due, the
 * second is the clock.
 */
#define IS_SETTLED(cutoff) \
	"(" OUTCOME_IS("completed") " OR " OUTCOME_IS("failed") ")" \
	" AND recorded_at OPERATOR(pg_catalog.<=) " cutoff
#define HAS_BODY \
	"(request IS NOT NULL OR response IS NOT NULL OR error IS NOT NULL)"

#define FIND_DUE(condition) \
	"SELECT account, operation_type, operation_id, token," \
	" recorded_at OPERATOR(pg_catalog.+) ($5 OPERATOR(pg_catalog.-) $4)" \
	" FROM idempotency.stripe_idempotency_keys" \
	" WHERE ROW(account, operation_type, operation_id)" \
	" OPERATOR(pg_catalog.>) ROW($1, $2, $3) AND " condition \
	" ORDER BY account, operation_type, operation_id LIMIT $6"

static bool
retention_cutoffs(int retention, TimestampTz now, TimestampTz *cutoffs)
{
	if (retention < 0)
		return false;
	cutoffs[0] = now - (int64) retention * USECS_PER_SEC;
	cutoffs[1] = now;
	return true;
}

static bool
body_cutoffs(TimestampTz now, TimestampTz *cutoffs)
{
	return retention_cutoffs(stripe_body_retention, now, cutoffs);
}

static bool
row_cutoffs(TimestampTz now, TimestampTz *cutoffs)
{
	return retention_cutoffs(stripe_retention, now, cutoffs);
}

/* IS_SETTLED, in C */
static bool
is_row_due(TupleTableSlot *slot, const TimestampTz *cutoffs, TimestampTz *since)
{
	bool		isnull;
	Datum		value = slot_getattr(slot, S_RECORDED_AT + 1, &isnull);
	char	   *outcome;

	if (isnull || DatumGetTimestampTz(value) > cutoffs[0])
		return false;
	*since = DatumGetTimestampTz(value) + (cutoffs[1] - cutoffs[0]);

	outcome = enum_label(slot_getattr(slot, S_OUTCOME + 1, &isnull));
	return strcmp(outcome, "completed") == 0 || strcmp(outcome, "failed") == 0;
}

/* IS_SETTLED and HAS_BODY, in C */
static bool
is_body_due(TupleTableSlot *slot, const TimestampTz *cutoffs, TimestampTz *since)
{
	bool		isnull;
	Datum		value = slot_getattr(slot, S_RECORDED_AT + 1, &isnull);

	if (isnull || DatumGetTimestampTz(value) > cutoffs[0])
		return false;
	if (slot_attisnull(slot, S_REQUEST + 1) && slot_attisnull(slot, S_RESPONSE + 1) &&
		slot_attisnull(slot, S_ERROR + 1))
		return false;
	return is_row_due(slot, cutoffs, since);
}

Expiry		stripe_body_expiry = {
	"stripe_body", &stripe_calls, body_cutoffs, is_body_due,
	{
		FIND_DUE(IS_SETTLED("$4") " AND " HAS_BODY),
		6, {TEXTOID, TEXTOID, TEXTOID, TIMESTAMPTZOID, TIMESTAMPTZOID, INT8OID}
	},
	{
		"UPDATE idempotency.stripe_idempotency_keys"
		" SET request = NULL, response = NULL, error = NULL,"
		" history = (SELECT pg_catalog.jsonb_agg(h.value OPERATOR(pg_catalog.-) 'error'::pg_catalog.text"
		" ORDER BY h.ordinality)"
		" FROM pg_catalog.jsonb_array_elements(history) WITH ORDINALITY h)"
		WHERE_KEY " AND token OPERATOR(pg_catalog.=) $4"
		" AND " IS_SETTLED("$5") " AND " HAS_BODY,
		6, {TEXTOID, TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, TIMESTAMPTZOID}
	}
};

Expiry		stripe_expiry = {
	"stripe", &stripe_calls, row_cutoffs, is_row_due,
	{
		FIND_DUE(IS_SETTLED("$4")),
		6, {TEXTOID, TEXTOID, TEXTOID, TIMESTAMPTZOID, TIMESTAMPTZOID, INT8OID}
	},
	{
		"DELETE FROM idempotency.stripe_idempotency_keys"
		WHERE_KEY " AND token OPERATOR(pg_catalog.=) $4"
		" AND " IS_SETTLED("$5"),
		6, {TEXTOID, TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, TIMESTAMPTZOID}
	}
};

/* ---------- the operation ---------- */

typedef struct Operation
{
	char	   *account;
	char	   *type;
	char	   *id;
	Datum		key[LEDGER_MAX_KEYS];
	Namespace	ns;
} Operation;

/*
 * The arguments that name an operation, checked.  Raises IK003 for a bad one
 * and IK009 in a copied database that hasn't decided on its namespace.
 */
static void
get_operation(Operation *op, FunctionCallInfo fcinfo, int account_argno)
{
	text	   *type = argument_text(fcinfo, 0, "operation_type");
	text	   *id = argument_text(fcinfo, 1, "operation_id");
	text	   *account = argument_text(fcinfo, account_argno, "account");
	const char *problem;
	const char *p;

	op->type = text_to_cstring(type);
	op->id = text_to_cstring(id);
	op->account = text_to_cstring(account);

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

	op->key[0] = PointerGetDatum(account);
	op->key[1] = PointerGetDatum(type);
	op->key[2] = PointerGetDatum(id);

	namespace_for_stripe(&op->ns);
}

/* The operation in an error message. */
static char *
describe_operation(Operation *op)
{
	if (op->account[0] == '\0')
		return psprintf("\"%s:%s\"", op->type, op->id);
	return psprintf("\"%s:%s\" of account \"%s\"", op->type, op->id, op->account);
}

/*
 * What is committed with the caller's transaction isn't known to survive it,
 * and a key must be known before anything is sent with it.
 */
static void
require_own_commit(const char *function)
{
	if (stripe_ledger == STRIPE_LEDGER_RECORDER &&
		(IsTransactionBlock() || IsSubTransaction()))
		ereport(ERROR,
				(errcode(ERRCODE_NOT_IN_TRANSACTION),
				 errmsg("%s can't run inside a transaction block", function),
				 errdetail("What it notes must be committed before anything is sent to Stripe, and this transaction may still roll back."),
				 errhint("Run it as a statement of its own, or set idempotency.stripe_ledger to \"transaction\" and rely on the derived key alone.")));

	/* whatever synchronous_commit says: committed means on disk */
	ForceSyncCommit();
}

/*
 * The member names that don't take part in the comparison.
 */
static void
set_ignored(RequestPrint *print)
{
	List	   *names;
	ListCell   *lc;
	const char **ignore;
	int			n = 0;

	if (!SplitGUCList(pstrdup(stripe_compare_ignore), ',', &names))
		elog(ERROR, "invalid list syntax in parameter \"idempotency.stripe_compare_ignore\"");

	ignore = palloc(Max(list_length(names), 1) * sizeof(char *));
	foreach(lc, names)
		ignore[n++] = lfirst(lc);
	print->ignore = ignore;
	print->nignore = n;
}

/* ---------- reading a row ---------- */

/* A string member of a JSON object, palloc'd, or NULL. */
static char *
string_member(JsonbContainer *object, const char *name)
{
	JsonbValue	value;

	if (object == NULL || !JsonContainerIsObject(object) ||
		getKeyJsonValueFromContainer(object, name, strlen(name), &value) == NULL ||
		value.type != jbvString)
		return NULL;
	return pnstrdup(value.val.string.val, value.val.string.len);
}

/* An object member of a JSON object, or NULL. */
static JsonbContainer *
object_member(JsonbContainer *object, const char *name)
{
	JsonbValue	value;

	if (object == NULL || !JsonContainerIsObject(object) ||
		getKeyJsonValueFromContainer(object, name, strlen(name), &value) == NULL ||
		value.type != jbvBinary || !JsonContainerIsObject(value.val.binary.data))
		return NULL;
	return value.val.binary.data;
}

static TimestampTz
resend_until(LedgerRow *row)
{
	return DatumGetTimestampTz(row->values[S_FIRST_SENT_AT]) +
		STRIPE_KEY_RETENTION_USECS - (int64) stripe_resend_margin * USECS_PER_SEC;
}

/* May the same key and bytes be sent now?  Yes where they never were. */
static bool
in_resend_window(LedgerRow *row, TimestampTz now)
{
	return row->isnull[S_FIRST_SENT_AT] || now < resend_until(row);
}

static bool
lease_is_live(LedgerRow *row, TimestampTz now)
{
	return !row->isnull[S_LEASE_EXPIRES_AT] &&
		DatumGetTimestampTz(row->values[S_LEASE_EXPIRES_AT]) > now;
}

/*
 * Could sending the same request again settle what is recorded as unknown?
 * Not where Stripe would only repeat itself.
 */
static bool
resend_may_settle(LedgerRow *row)
{
	StripeAnswer answer;
	JsonbContainer *error = NULL;

	if (row->isnull[S_HTTP_STATUS])
		return true;

	if (!row->isnull[S_ERROR])
		error = &DatumGetJsonbP(row->values[S_ERROR])->root;
	answer.http_status = DatumGetInt32(row->values[S_HTTP_STATUS]);
	answer.sent = true;
	answer.body_complete = true;
	answer.error_type = string_member(error, "type");
	answer.error_code = string_member(error, "code");
	return stripe_classify(&answer).resend;
}

/* ---------- claim ---------- */

typedef struct StripeClaim
{
	LedgerClaim base;
	Operation	op;
	RequestPrint print;
	Datum		request;
	bool		request_isnull;
	int64		lease;			/* microseconds */
	int64		token;
	bool		settleable;		/* claimed, or unknown: an event may have told
								 * what came of it */
	ResultRow	result;
} StripeClaim;

static void
answer_copy(StripeClaim *claim, int column, LedgerRow *row, int source)
{
	result_copy(&claim->result, column, row->values[source], row->isnull[source]);
}

/* Everything that is known of an operation which this caller doesn't run. */
static void
answer_known(StripeClaim *claim, const char *verdict, LedgerRow *row)
{
	result_set_enum(&claim->result, C_VERDICT, verdict);
	answer_copy(claim, C_OUTCOME, row, S_OUTCOME);
	answer_copy(claim, C_IDEMPOTENCY_KEY, row, S_IDEMPOTENCY_KEY);
	answer_copy(claim, C_ATTEMPT, row, S_ATTEMPT);
	answer_copy(claim, C_GENERATION, row, S_GENERATION);
	answer_copy(claim, C_REQUEST, row, S_REQUEST);
	answer_copy(claim, C_RESOURCE_ID, row, S_RESOURCE_ID);
	answer_copy(claim, C_RESOURCE_TYPE, row, S_RESOURCE_TYPE);
	answer_copy(claim, C_HTTP_STATUS, row, S_HTTP_STATUS);
	answer_copy(claim, C_RESPONSE, row, S_RESPONSE);
	answer_copy(claim, C_ERROR, row, S_ERROR);
	answer_copy(claim, C_LIVEMODE, row, S_LIVEMODE);
	if (!row->isnull[S_FIRST_SENT_AT])
		result_set(&claim->result, C_RESEND_UNTIL, TimestampTzGetDatum(resend_until(row)));
}

static void
busy(LedgerClaim *base)
{
	StripeClaim *claim = (StripeClaim *) base;

	result_set_enum(&claim->result, C_VERDICT, "in_progress");
	result_set_enum(&claim->result, C_OUTCOME, "in_progress");
	result_set(&claim->result, C_RETRY_AFTER, Int32GetDatum(1));
}

static LedgerDecision
decide(LedgerClaim *base, LedgerRow *row, TimestampTz now)
{
	StripeClaim *claim = (StripeClaim *) base;
	char	   *outcome = enum_label(row->values[S_OUTCOME]);
	bool		in_progress = strcmp(outcome, "in_progress") == 0;

	if (!row->isnull[S_FINGERPRINT] &&
		!request_matches(&claim->print, DatumGetByteaPP(row->values[S_FINGERPRINT])))
	{
		answer_known(claim, "mismatch", row);
		return LEDGER_ANSWER;
	}

	if (strcmp(outcome, "completed") == 0 || strcmp(outcome, "failed") == 0)
	{
		answer_known(claim, "replay", row);
		return LEDGER_ANSWER;
	}

	if (in_progress && (row->own || lease_is_live(row, now)))
	{
		answer_known(claim, "in_progress", row);
		result_set(&claim->result, C_RETRY_AFTER,
				   Int32GetDatum(ledger_retry_after(DatumGetTimestampTz(row->values[S_LEASE_EXPIRES_AT]), now)));
		return LEDGER_ANSWER;
	}

	if (!in_resend_window(row, now) || strcmp(outcome, "mismatch") == 0 ||
		(strcmp(outcome, "unknown") == 0 && !resend_may_settle(row)))
	{
		claim->settleable = true;
		answer_known(claim, "unknown", row);
		if (strcmp(outcome, "mismatch") != 0)
			result_set_enum(&claim->result, C_OUTCOME, "unknown");
		return LEDGER_ANSWER;
	}

	return LEDGER_TAKE;
}

/* $1 to $7, which both ways to claim share, with a new token. */
static void
claim_parameters(StripeClaim *claim, TimestampTz now, Datum *values, char *nulls)
{
	claim->token = ledger_new_token();

	memset(nulls, ' ', OWNER_STATEMENT_MAX_ARGS);
	memcpy(values, claim->op.key, sizeof(claim->op.key));
	values[3] = Int64GetDatum(claim->token);
	values[4] = TimestampTzGetDatum(now);
	values[5] = TimestampTzGetDatum(now + claim->lease);
	values[6] = interval_datum(claim->lease);
}

/* A parameter that may be missing. */
static void
set_pointer(Datum *values, char *nulls, int i, void *pointer)
{
	values[i] = PointerGetDatum(pointer);
	nulls[i] = pointer == NULL ? 'n' : ' ';
}

static void
answer_claimed(StripeClaim *claim, TimestampTz first_sent_at)
{
	claim->settleable = true;
	result_set_enum(&claim->result, C_VERDICT, "claimed");
	result_set_enum(&claim->result, C_OUTCOME, "in_progress");
	result_set(&claim->result, C_TOKEN, Int64GetDatum(claim->token));
	result_set(&claim->result, C_RESEND_UNTIL,
			   TimestampTzGetDatum(first_sent_at + STRIPE_KEY_RETENTION_USECS -
								   (int64) stripe_resend_margin * USECS_PER_SEC));
}

static bool
insert(LedgerClaim *base, Relation rel, TimestampTz now)
{
	StripeClaim *claim = (StripeClaim *) base;
	char	   *key;
	Datum		values[10];
	char		nulls[OWNER_STATEMENT_MAX_ARGS];

	key = derive_stripe_key(claim->op.ns.value, NAMESPACE_LEN,
							claim->op.account, claim->op.type, claim->op.id, 1);

	claim_parameters(claim, now, values, nulls);
	values[7] = CStringGetTextDatum(key);
	set_pointer(values, nulls, 8, request_print(&claim->print));
	values[9] = claim->request;
	nulls[9] = claim->request_isnull ? 'n' : ' ';
	if (ledger_execute(rel, &insert_claim, values, nulls, NULL, NULL, 0) == 0)
		return false;

	answer_claimed(claim, now);
	result_set(&claim->result, C_IDEMPOTENCY_KEY, values[7]);
	result_set(&claim->result, C_ATTEMPT, Int32GetDatum(1));
	result_set(&claim->result, C_GENERATION, Int32GetDatum(1));
	result_copy(&claim->result, C_REQUEST, claim->request, claim->request_isnull);
	return true;
}

static bool
take(LedgerClaim *base, Relation rel, LedgerRow *row, TimestampTz now)
{
	StripeClaim *claim = (StripeClaim *) base;
	Datum		values[10];
	char		nulls[OWNER_STATEMENT_MAX_ARGS];
	Datum		out[5];
	bool		outnull[5];

	claim_parameters(claim, now, values, nulls);
	set_pointer(values, nulls, 7, request_print(&claim->print));
	values[8] = claim->request;
	nulls[8] = claim->request_isnull ? 'n' : ' ';
	values[9] = row->values[S_TOKEN];
	if (ledger_execute(rel, &take_over, values, nulls, out, outnull, 5) == 0)
		return false;

	answer_claimed(claim, DatumGetTimestampTz(out[4]));
	result_set(&claim->result, C_ATTEMPT, out[0]);
	result_set(&claim->result, C_GENERATION, out[1]);
	result_set(&claim->result, C_IDEMPOTENCY_KEY, out[2]);
	result_copy(&claim->result, C_REQUEST, out[3], outnull[3]);
	return true;
}

static void
renew(LedgerClaim *base, Relation rel, TimestampTz now)
{
	StripeClaim *claim = (StripeClaim *) base;
	Datum		values[5];

	memcpy(values, claim->op.key, sizeof(claim->op.key));
	values[3] = Int64GetDatum(claim->token);
	values[4] = TimestampTzGetDatum(now + claim->lease);
	if (ledger_execute(rel, &renew_claim, values, NULL, NULL, NULL, 0) != 1)
		elog(ERROR, "lost a claim of this transaction");
}

/*
 * stripe_claim(operation_type, operation_id, request, account, lease)
 */
Datum
idempotency_stripe_claim(PG_FUNCTION_ARGS)
{
	static const int sized[] = {2};
	StripeClaim claim;
	Duration	lease;
	Relation	rel;

	PreventCommandDuringRecovery("idempotency.stripe_claim()");

	memset(&claim, 0, sizeof(claim));
	get_operation(&claim.op, fcinfo, 3);
	lease = argument_duration(fcinfo, 4, "lease");
	check_size(fcinfo, sized, lengthof(sized), "request");
	require_own_commit("idempotency.stripe_claim()");

	memcpy(claim.base.key, claim.op.key, sizeof(claim.op.key));
	claim.base.wait = true;
	claim.base.decide = decide;
	claim.base.insert = insert;
	claim.base.take = take;
	claim.base.renew = renew;
	claim.base.busy = busy;
	claim.print.request = argument_jsonb(fcinfo, 2);
	set_ignored(&claim.print);
	claim.request = PG_GETARG_DATUM(2);
	claim.request_isnull = PG_ARGISNULL(2);
	claim.lease = lease.given ? lease.usecs : (int64) stripe_lease * USECS_PER_SEC;
	result_begin(&claim.result, fcinfo, C_NCOLUMNS);

	rel = ledger_open(&stripe_calls, RowExclusiveLock, false);
	ledger_claim(&stripe_calls, rel, &claim.base);
	if (claim.settleable && settle_by_kept_events(claim.base.key, claim.token))
	{
		result_reset(&claim.result);
		ledger_claim(&stripe_calls, rel, &claim.base);
	}
	ledger_close(rel);

	PG_RETURN_DATUM(result_end(&claim.result));
}

/* ---------- what the holder of a token does ---------- */

static void
look(Relation rel, Operation *op, LedgerRow *row)
{
	ledger_look(&stripe_calls, rel, op->key, row);
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

static void
refuse_token(Operation *op, LedgerRow *row)
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
static void
explain_refusal(Relation rel, Operation *op, int64 token)
{
	LedgerRow	row;
	char	   *outcome;

	look(rel, op, &row);
	if (row.found != FOUND_ROW || DatumGetInt64(row.values[S_TOKEN]) != token)
		refuse_token(op, &row);

	outcome = enum_label(row.values[S_OUTCOME]);
	if (strcmp(outcome, "in_progress") != 0)
		ereport(ERROR,
				(errcode(ERRCODE_CONTRADICTS_RECORD),
				 errmsg("Stripe operation %s is no longer in progress", describe_operation(op)),
				 errdetail("Its outcome is recorded as %s.", outcome)));
}

/* What an answer says, ready to be recorded. */
typedef struct StripeResult
{
	StripeOutcome outcome;
	char	   *resource_id;
	char	   *resource_type;
	Jsonb	   *error;
	bool		livemode;
	bool		livemode_isnull;
} StripeResult;

/*
 * The object that a refused call left behind: a declined card leaves its
 * payment intent in the error.
 */
static void
resource_of_error(JsonbContainer *error, StripeResult *result)
{
	static const char *const members[] = {"payment_intent", "setup_intent", "charge"};
	int			i;

	for (i = 0; i < lengthof(members); i++)
	{
		char	   *id = string_member(object_member(error, members[i]), "id");

		if (id == NULL)
			id = string_member(error, members[i]);
		if (id != NULL)
		{
			result->resource_id = id;
			result->resource_type = pstrdup(members[i]);
			return;
		}
	}
}

/*
 * Make out an answer: the body and status as the application got them.
 */
static void
read_answer(Jsonb *response, bool status_given, int http_status, char *resource_id,
			StripeResult *result)
{
	JsonbContainer *body = response != NULL ? &response->root : NULL;
	JsonbContainer *error = object_member(body, "error");
	JsonbValue	value;

	memset(result, 0, sizeof(StripeResult));
	result->livemode_isnull = true;

	if (error != NULL)
	{
		value.type = jbvBinary;
		value.val.binary.data = error;
		value.val.binary.len = 0;
		if (getKeyJsonValueFromContainer(body, "error", strlen("error"), &value) != NULL)
			result->error = JsonbValueToJsonb(&value);
		resource_of_error(error, result);
	}
	else
	{
		result->resource_id = string_member(body, "id");
		result->resource_type = string_member(body, "object");
	}
	if (resource_id != NULL)
		result->resource_id = resource_id;
	if (body != NULL && JsonContainerIsObject(body) &&
		getKeyJsonValueFromContainer(body, "livemode", strlen("livemode"), &value) != NULL &&
		value.type == jbvBool)
	{
		result->livemode = value.val.boolean;
		result->livemode_isnull = false;
	}

	if (status_given)
	{
		StripeAnswer answer;

		answer.http_status = http_status;
		answer.sent = true;
		answer.body_complete = true;
		answer.error_type = string_member(error, "type");
		answer.error_code = string_member(error, "code");
		result->outcome = stripe_classify(&answer).outcome;
	}
	else if (result->resource_id != NULL && error == NULL)
		result->outcome = STRIPE_COMPLETED;
	else
		result->outcome = STRIPE_UNKNOWN;
}

static bool
is_definitive(StripeOutcome outcome)
{
	return outcome == STRIPE_COMPLETED || outcome == STRIPE_FAILED;
}

/* Does a definitive result say something else than what is recorded? */
static bool
contradicts(LedgerRow *row, StripeResult *result)
{
	if (strcmp(enum_label(row->values[S_OUTCOME]), stripe_outcome_name(result->outcome)) != 0)
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
record_late(Relation rel, Operation *op, int64 token, StripeResult *result,
			LedgerRow *row, int64 *as)
{
	char	   *recorded;
	bool		current;

	look(rel, op, row);
	if (row->found != FOUND_ROW)
		refuse_token(op, row);
	current = DatumGetInt64(row->values[S_TOKEN]) == token;
	if (!current && !is_past_token(row, token))
		refuse_token(op, row);

	recorded = enum_label(row->values[S_OUTCOME]);
	if (strcmp(recorded, "completed") == 0 || strcmp(recorded, "failed") == 0)
	{
		/* who knows less than what is recorded doesn't contradict it */
		if (!is_definitive(result->outcome) || !contradicts(row, result))
			return false;
		if (!current)
			refuse_token(op, row);
		ereport(ERROR,
				(errcode(ERRCODE_CONTRADICTS_RECORD),
				 errmsg("another result of Stripe operation %s is recorded already",
						describe_operation(op)),
				 errdetail("Its outcome is recorded as %s, with resource %s.", recorded,
						   row->isnull[S_RESOURCE_ID] ? "none" :
						   TextDatumGetCString(row->values[S_RESOURCE_ID]))));
	}

	/* a late token settles the operation, but doesn't speak for its successor */
	if (!current && !is_definitive(result->outcome))
		return false;

	*as = DatumGetInt64(row->values[S_TOKEN]);
	return true;
}

/*
 * stripe_record(operation_type, operation_id, token, resource_id, response,
 *				 http_status, request_id, account)
 */
Datum
idempotency_stripe_record(PG_FUNCTION_ARGS)
{
	static const int sized[] = {4};
	Operation	op;
	int64		token;
	int64		as;
	StripeResult result;
	Relation	rel;
	Datum		values[13];
	char		nulls[] = "             ";
	Datum		outcome;
	bool		isnull;
	int			races = 0;

	PreventCommandDuringRecovery("idempotency.stripe_record()");

	token = as = argument_token(fcinfo, 2);
	get_operation(&op, fcinfo, 7);
	check_size(fcinfo, sized, lengthof(sized), "response");
	if (!PG_ARGISNULL(3))
		check_label(VARDATA_ANY(PG_GETARG_TEXT_PP(3)), VARSIZE_ANY_EXHDR(PG_GETARG_TEXT_PP(3)),
					false, "resource_id");
	if (!PG_ARGISNULL(6))
		check_label(VARDATA_ANY(PG_GETARG_TEXT_PP(6)), VARSIZE_ANY_EXHDR(PG_GETARG_TEXT_PP(6)),
					false, "request_id");
	read_answer(argument_jsonb(fcinfo, 4), !PG_ARGISNULL(5),
				PG_ARGISNULL(5) ? 0 : argument_http_status(fcinfo, 5, "http_status"),
				PG_ARGISNULL(3) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(3)), &result);

	memcpy(values, op.key, sizeof(op.key));
	values[5] = CStringGetTextDatum(stripe_outcome_name(result.outcome));
	if (result.resource_id != NULL)
		values[6] = CStringGetTextDatum(result.resource_id);
	else
		nulls[6] = 'n';
	if (result.resource_type != NULL)
		values[7] = CStringGetTextDatum(result.resource_type);
	else
		nulls[7] = 'n';
	values[8] = PG_GETARG_DATUM(5);
	nulls[8] = PG_ARGISNULL(5) ? 'n' : ' ';
	values[9] = PG_GETARG_DATUM(4);
	nulls[9] = PG_ARGISNULL(4) ? 'n' : ' ';
	set_pointer(values, nulls, 10, result.error);
	values[11] = PG_GETARG_DATUM(6);
	nulls[11] = PG_ARGISNULL(6) ? 'n' : ' ';
	values[12] = BoolGetDatum(result.livemode);
	nulls[12] = result.livemode_isnull ? 'n' : ' ';

	rel = ledger_open(&stripe_calls, RowExclusiveLock, false);
	for (;;)
	{
		LedgerRow	row;

		values[3] = Int64GetDatum(as);
		values[4] = TimestampTzGetDatum(GetCurrentTimestamp());
		if (ledger_execute(rel, &record_outcome, values, nulls, &outcome, &isnull, 1) > 0)
			break;

		if (!record_late(rel, &op, token, &result, &row, &as))
		{
			outcome = row.values[S_OUTCOME];
			break;
		}
		ledger_lost_race(&stripe_calls, &races);
	}
	ledger_close(rel);

	PG_RETURN_DATUM(outcome);
}

/*
 * stripe_release(operation_type, operation_id, token, account): nothing was
 * sent.
 */
Datum
idempotency_stripe_release(PG_FUNCTION_ARGS)
{
	Operation	op;
	int64		token;
	Relation	rel;
	Datum		values[4];
	int			races = 0;

	PreventCommandDuringRecovery("idempotency.stripe_release()");

	token = argument_token(fcinfo, 2);
	get_operation(&op, fcinfo, 3);

	memcpy(values, op.key, sizeof(op.key));
	values[3] = Int64GetDatum(token);

	rel = ledger_open(&stripe_calls, RowExclusiveLock, false);
	while (ledger_execute(rel, &release_claim, values, NULL, NULL, NULL, 0) == 0)
	{
		explain_refusal(rel, &op, token);
		ledger_lost_race(&stripe_calls, &races);
	}
	ledger_close(rel);

	PG_RETURN_VOID();
}

/*
 * stripe_extend(operation_type, operation_id, token, lease, account)
 */
Datum
idempotency_stripe_extend(PG_FUNCTION_ARGS)
{
	Operation	op;
	int64		token;
	Duration	lease;
	Relation	rel;
	Datum		values[6];
	char		nulls[] = "      ";
	Datum		lease_expires_at;
	bool		isnull;
	TimestampTz now;
	int			races = 0;

	PreventCommandDuringRecovery("idempotency.stripe_extend()");

	token = argument_token(fcinfo, 2);
	lease = argument_duration(fcinfo, 3, "lease");
	get_operation(&op, fcinfo, 4);

	memcpy(values, op.key, sizeof(op.key));
	values[3] = Int64GetDatum(token);
	if (lease.given)
		values[5] = interval_datum(lease.usecs);
	else
		nulls[5] = 'n';

	rel = ledger_open(&stripe_calls, RowExclusiveLock, false);
	for (;;)
	{
		now = GetCurrentTimestamp();
		values[4] = TimestampTzGetDatum(now);
		if (ledger_execute(rel, &extend_lease, values, nulls, &lease_expires_at, &isnull, 1) > 0)
			break;
		explain_refusal(rel, &op, token);
		ledger_lost_race(&stripe_calls, &races);
	}
	if (ledger_has_waited(&now))
	{
		/* the row is this transaction's now, so that once more is at once */
		values[4] = TimestampTzGetDatum(now);
		if (ledger_execute(rel, &extend_lease, values, nulls, &lease_expires_at, &isnull, 1) != 1)
			elog(ERROR, "lost a row that this transaction has changed");
	}
	ledger_close(rel);

	PG_RETURN_DATUM(lease_expires_at);
}

/* ---------- reopen ---------- */

/*
 * May an operation as it stands be given a new key?  Raises IK002 if not.
 */
static void
check_reopen(Operation *op, LedgerRow *row, bool force, TimestampTz now)
{
	char	   *outcome = enum_label(row->values[S_OUTCOME]);

	if (strcmp(outcome, "failed") == 0 || strcmp(outcome, "not_executed") == 0)
		return;

	if (strcmp(outcome, "completed") == 0)
		ereport(ERROR,
				(errcode(ERRCODE_CONTRADICTS_RECORD),
				 errmsg("Stripe operation %s is completed", describe_operation(op)),
				 errdetail("A new key would execute it a second time."),
				 errhint("Use another operation id for another operation.")));

	if (strcmp(outcome, "in_progress") == 0 && lease_is_live(row, now))
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
 * stripe_reopen(operation_type, operation_id, account, force, from_generation)
 */
Datum
idempotency_stripe_reopen(PG_FUNCTION_ARGS)
{
	Operation	op;
	bool		force;
	Relation	rel;
	char	   *key;
	int			races = 0;

	PreventCommandDuringRecovery("idempotency.stripe_reopen()");

	get_operation(&op, fcinfo, 2);
	force = argument_bool(fcinfo, 3, "force");
	if (!PG_ARGISNULL(4) && PG_GETARG_INT32(4) < 1)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("from_generation must be at least 1")));
	require_own_commit("idempotency.stripe_reopen()");

	rel = ledger_open(&stripe_calls, RowExclusiveLock, false);
	for (;;)
	{
		LedgerRow	row;
		TimestampTz now;
		int			generation;
		Datum		values[10];

		look(rel, &op, &row);
		now = GetCurrentTimestamp();
		if (row.found == FOUND_TWIN)
			ereport(ERROR,
					(errcode(ERRCODE_CONTRADICTS_RECORD),
					 errmsg("Stripe operation %s is in progress", describe_operation(&op)),
					 errhint("Wait for its outcome, or until its lease has lapsed.")));
		if (row.found != FOUND_ROW)
			ereport(ERROR,
					(errcode(ERRCODE_BAD_ARGUMENT),
					 errmsg("Stripe operation %s was never claimed", describe_operation(&op))));

		/* a repeated call finds its work done */
		generation = DatumGetInt32(row.values[S_GENERATION]);
		if (!PG_ARGISNULL(4) && generation != PG_GETARG_INT32(4))
		{
			if (generation != PG_GETARG_INT32(4) + 1)
				ereport(ERROR,
						(errcode(ERRCODE_CONTRADICTS_RECORD),
						 errmsg("Stripe operation %s is of generation %d, not %d",
								describe_operation(&op), generation, PG_GETARG_INT32(4))));
			key = TextDatumGetCString(row.values[S_IDEMPOTENCY_KEY]);
			break;
		}

		check_reopen(&op, &row, force, now);

		key = derive_stripe_key(op.ns.value, NAMESPACE_LEN, op.account, op.type, op.id,
								generation + 1);
		memcpy(values, op.key, sizeof(op.key));
		values[3] = Int64GetDatum(ledger_new_token());
		values[4] = row.values[S_TOKEN];
		values[5] = TimestampTzGetDatum(now);
		values[6] = CStringGetTextDatum(key);
		values[7] = CStringGetTextDatum(enum_label(row.values[S_OUTCOME]));
		values[8] = CStringGetTextDatum(GetUserNameFromId(GetSessionUserId(), false));
		values[9] = BoolGetDatum(force);
		if (ledger_execute(rel, &reopen, values, NULL, NULL, NULL, 0) > 0)
			break;
		ledger_lost_race(&stripe_calls, &races);
	}
	ledger_close(rel);

	PG_RETURN_TEXT_P(cstring_to_text(key));
}

/* ---------- display ---------- */

/*
 * stripe_idempotency_key(operation_type, operation_id, account)
 */
Datum
idempotency_stripe_idempotency_key(PG_FUNCTION_ARGS)
{
	Operation	op;
	LedgerRow	row;

	get_operation(&op, fcinfo, 2);
	if (ledger_lookup(&stripe_calls, op.key, &row))
		PG_RETURN_DATUM(row.values[S_IDEMPOTENCY_KEY]);

	PG_RETURN_TEXT_P(cstring_to_text(derive_stripe_key(op.ns.value, NAMESPACE_LEN, op.account,
													   op.type, op.id, 1)));
}

/*
 * stripe_lookup(operation_type, operation_id, account)
 */
Datum
idempotency_stripe_lookup(PG_FUNCTION_ARGS)
{
	static const struct
	{
		int			column;
		int			source;
	}			copied[] = {
		{I_ACCOUNT, S_ACCOUNT}, {I_OPERATION_TYPE, S_OPERATION_TYPE},
		{I_OPERATION_ID, S_OPERATION_ID}, {I_IDEMPOTENCY_KEY, S_IDEMPOTENCY_KEY},
		{I_GENERATION, S_GENERATION}, {I_ATTEMPT, S_ATTEMPT}, {I_OUTCOME, S_OUTCOME},
		{I_REQUEST, S_REQUEST}, {I_RESOURCE_ID, S_RESOURCE_ID},
		{I_RESOURCE_TYPE, S_RESOURCE_TYPE}, {I_HTTP_STATUS, S_HTTP_STATUS},
		{I_RESPONSE, S_RESPONSE}, {I_ERROR, S_ERROR}, {I_REQUEST_ID, S_REQUEST_ID},
		{I_LIVEMODE, S_LIVEMODE}, {I_CREATED_AT, S_CREATED_AT},
		{I_CLAIMED_AT, S_CLAIMED_AT}, {I_LEASE_EXPIRES_AT, S_LEASE_EXPIRES_AT},
		{I_FIRST_SENT_AT, S_FIRST_SENT_AT}, {I_RECORDED_AT, S_RECORDED_AT},
		{I_HISTORY, S_HISTORY}
	};
	Operation	op;
	LedgerRow	row;
	ResultRow	result;
	int			i;

	get_operation(&op, fcinfo, 2);
	if (!ledger_lookup(&stripe_calls, op.key, &row))
		PG_RETURN_NULL();

	result_begin(&result, fcinfo, I_NCOLUMNS);
	for (i = 0; i < lengthof(copied); i++)
		result_copy(&result, copied[i].column, row.values[copied[i].source],
					row.isnull[copied[i].source]);
	if (strcmp(enum_label(row.values[S_OUTCOME]), "in_progress") == 0)
		result_set(&result, I_LAPSED, BoolGetDatum(!lease_is_live(&row, GetCurrentTimestamp())));
	if (!row.isnull[S_FIRST_SENT_AT])
		result_set(&result, I_RESEND_UNTIL, TimestampTzGetDatum(resend_until(&row)));

	PG_RETURN_DATUM(result_end(&result));
}
