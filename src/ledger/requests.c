/*-------------------------------------------------------------------------
 *
 * requests.c
 *	  SQL functions for the requests that an API receives.
 *
 * One row of idempotency_keys is one key of one scope.  Its state is in its
 * columns:
 *
 *	expires_at set			recorded; absent once that moment has passed
 *	lease_expires_at set	claimed, held until then; lapsed afterwards
 *	  without lease			given up at that moment, by release(keep => true)
 *	neither					claimed without a lease, so held by the transaction
 *							that wrote it: whoever sees such a row committed
 *							(idempotency.open_claim_at_commit) finds it lapsed
 *
 * token is the fencing token of the last claim; every change of an unfinished
 * row names it.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/ledger/requests.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type_d.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/timestamp.h"
#include "utils/uuid.h"

#include "base/arguments.h"
#include "base/compat.h"
#include "base/errors.h"
#include "base/result_row.h"
#include "base/settings.h"
#include "ledger/derived_key.h"
#include "ledger/ledger.h"
#include "ledger/namespace.h"
#include "ledger/open_claims.h"
#include "ledger/request_fingerprint.h"
#include "ledger/requests.h"

PG_FUNCTION_INFO_V1(idempotency_claim);
PG_FUNCTION_INFO_V1(idempotency_record);
PG_FUNCTION_INFO_V1(idempotency_checkpoint);
PG_FUNCTION_INFO_V1(idempotency_extend);
PG_FUNCTION_INFO_V1(idempotency_release);
PG_FUNCTION_INFO_V1(idempotency_lookup);
PG_FUNCTION_INFO_V1(idempotency_operation_uuid);

/* Columns of idempotency_keys. */
enum
{
	K_TOKEN, K_CLAIMED_AT, K_LEASE_EXPIRES_AT, K_RECORDED_AT, K_EXPIRES_AT,
	K_LEASE, K_TTL, K_ATTEMPT, K_HTTP_STATUS, K_SCOPE, K_KEY, K_FINGERPRINT,
	K_RECOVERY_POINT, K_RECOVERY_DATA, K_RESPONSE, K_RESPONSE_HEADERS,
	K_RESPONSE_BODY, K_NCOLUMNS
};

static const char *const key_columns[K_NCOLUMNS] = {
	"token", "claimed_at", "lease_expires_at", "recorded_at", "expires_at",
	"lease", "ttl", "attempt", "http_status", "scope", "key", "fingerprint",
	"recovery_point", "recovery_data", "response", "response_headers",
	"response_body"
};

/* Columns of claim_result. */
enum
{
	C_VERDICT, C_TOKEN, C_ATTEMPT, C_RECOVERY_POINT, C_RECOVERY_DATA,
	C_HTTP_STATUS, C_RESPONSE, C_RESPONSE_HEADERS, C_RESPONSE_BODY,
	C_RETRY_AFTER, C_LEASE_EXPIRES_AT, C_EXPIRES_AT, C_NCOLUMNS
};

/* Columns of key_info. */
enum
{
	I_SCOPE, I_KEY, I_STATUS, I_ATTEMPT, I_RECOVERY_POINT, I_RECOVERY_DATA,
	I_HTTP_STATUS, I_RESPONSE, I_RESPONSE_HEADERS, I_RESPONSE_BODY,
	I_HAS_REQUEST, I_CLAIMED_AT, I_LEASE, I_LEASE_EXPIRES_AT, I_LAPSED,
	I_RECORDED_AT, I_EXPIRES_AT, I_NCOLUMNS
};

static Ledger requests = {
	"idempotency_keys", key_columns, K_NCOLUMNS,
	2, {K_SCOPE + 1, K_KEY + 1},
	{
		"SELECT token, claimed_at, lease_expires_at, recorded_at, expires_at,"
		" lease, ttl, attempt, http_status, scope, key, fingerprint,"
		" recovery_point, recovery_data, response, response_headers, response_body"
		" FROM idempotency.idempotency_keys"
		" WHERE scope OPERATOR(pg_catalog.=) $1 AND key OPERATOR(pg_catalog.=) $2",
		2, {TEXTOID, TEXTOID}
	}
};

/*
 * The statements.  $1 and $2 are always scope and key.
 */
static OwnerStatement insert_claim = {
	"INSERT INTO idempotency.idempotency_keys"
	" (scope, key, token, claimed_at, lease_expires_at, lease, ttl, attempt, fingerprint)"
	" VALUES ($1, $2, $3, $4, $5, $6, $7, 1, $8)"
	" ON CONFLICT DO NOTHING",
	8, {TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, TIMESTAMPTZOID, INTERVALOID,
	INTERVALOID, BYTEAOID}
};

/* $9: the token that is taken over; $4 is the clock, too */
static OwnerStatement take_lapsed = {
	"UPDATE idempotency.idempotency_keys SET token = $3, claimed_at = $4,"
	" lease_expires_at = $5, lease = $6, ttl = $7,"
	" attempt = attempt OPERATOR(pg_catalog.+) 1, fingerprint = COALESCE(fingerprint, $8)"
	" WHERE scope OPERATOR(pg_catalog.=) $1 AND key OPERATOR(pg_catalog.=) $2"
	" AND token OPERATOR(pg_catalog.=) $9 AND expires_at IS NULL"
	" AND (lease IS NULL OR lease_expires_at OPERATOR(pg_catalog.<=) $4)"
	" RETURNING attempt, recovery_point, recovery_data",
	9, {TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, TIMESTAMPTZOID, INTERVALOID,
	INTERVALOID, BYTEAOID, INT8OID}
};

static OwnerStatement take_expired = {
	"UPDATE idempotency.idempotency_keys SET token = $3, claimed_at = $4,"
	" lease_expires_at = $5, lease = $6, ttl = $7, attempt = 1, fingerprint = $8,"
	" recorded_at = NULL, expires_at = NULL, http_status = NULL,"
	" recovery_point = NULL, recovery_data = NULL,"
	" response = NULL, response_headers = NULL, response_body = NULL"
	" WHERE scope OPERATOR(pg_catalog.=) $1 AND key OPERATOR(pg_catalog.=) $2"
	" AND token OPERATOR(pg_catalog.=) $9 AND expires_at OPERATOR(pg_catalog.<=) $4"
	" RETURNING attempt, recovery_point, recovery_data",
	9, {TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, TIMESTAMPTZOID, INTERVALOID,
	INTERVALOID, BYTEAOID, INT8OID}
};

static OwnerStatement renew_claim = {
	"UPDATE idempotency.idempotency_keys SET claimed_at = $4, lease_expires_at = $5"
	" WHERE scope OPERATOR(pg_catalog.=) $1 AND key OPERATOR(pg_catalog.=) $2"
	" AND token OPERATOR(pg_catalog.=) $3",
	5, {TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, TIMESTAMPTZOID}
};

/* $5: the time to live given, $6: the one of the settings */
static OwnerStatement record_result = {
	"UPDATE idempotency.idempotency_keys SET recorded_at = $4,"
	" expires_at = $4 OPERATOR(pg_catalog.+) COALESCE($5, ttl, $6),"
	" http_status = $7, response = $8, response_headers = $9, response_body = $10,"
	" lease = NULL, lease_expires_at = NULL, ttl = NULL,"
	" recovery_point = NULL, recovery_data = NULL"
	" WHERE scope OPERATOR(pg_catalog.=) $1 AND key OPERATOR(pg_catalog.=) $2"
	" AND token OPERATOR(pg_catalog.=) $3 AND expires_at IS NULL"
	" RETURNING expires_at",
	10, {TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, INTERVALOID, INTERVALOID,
	INT4OID, JSONBOID, JSONBOID, BYTEAOID}
};

/* $5: how long it is replayed, $6: the clock it was recorded with */
static OwnerStatement renew_result = {
	"UPDATE idempotency.idempotency_keys SET recorded_at = $4,"
	" expires_at = $4 OPERATOR(pg_catalog.+) $5"
	" WHERE scope OPERATOR(pg_catalog.=) $1 AND key OPERATOR(pg_catalog.=) $2"
	" AND token OPERATOR(pg_catalog.=) $3 AND recorded_at OPERATOR(pg_catalog.=) $6"
	" RETURNING expires_at",
	6, {TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, INTERVALOID, TIMESTAMPTZOID}
};

static OwnerStatement extend_lease = {
	"UPDATE idempotency.idempotency_keys SET lease = COALESCE($5, lease),"
	" lease_expires_at = $4 OPERATOR(pg_catalog.+) COALESCE($5, lease)"
	" WHERE scope OPERATOR(pg_catalog.=) $1 AND key OPERATOR(pg_catalog.=) $2"
	" AND token OPERATOR(pg_catalog.=) $3 AND expires_at IS NULL"
	" RETURNING lease_expires_at",
	5, {TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, INTERVALOID}
};

static OwnerStatement set_checkpoint = {
	"UPDATE idempotency.idempotency_keys SET lease = COALESCE($5, lease),"
	" lease_expires_at = $4 OPERATOR(pg_catalog.+) COALESCE($5, lease),"
	" recovery_point = $6, recovery_data = $7"
	" WHERE scope OPERATOR(pg_catalog.=) $1 AND key OPERATOR(pg_catalog.=) $2"
	" AND token OPERATOR(pg_catalog.=) $3 AND expires_at IS NULL"
	" RETURNING lease_expires_at",
	7, {TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, INTERVALOID, TEXTOID, JSONBOID}
};

static OwnerStatement release_claim = {
	"DELETE FROM idempotency.idempotency_keys"
	" WHERE scope OPERATOR(pg_catalog.=) $1 AND key OPERATOR(pg_catalog.=) $2"
	" AND token OPERATOR(pg_catalog.=) $3 AND expires_at IS NULL",
	3, {TEXTOID, TEXTOID, INT8OID}
};

/*
 * Request, attempt and recovery point stay.  $5 is a token that nobody has: the
 * old one must not record any more.
 */
static OwnerStatement keep_claim = {
	"UPDATE idempotency.idempotency_keys SET token = $5,"
	" lease = NULL, lease_expires_at = $4"
	" WHERE scope OPERATOR(pg_catalog.=) $1 AND key OPERATOR(pg_catalog.=) $2"
	" AND token OPERATOR(pg_catalog.=) $3 AND expires_at IS NULL",
	5, {TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, INT8OID}
};

/*
 * The same for tables whose rows are somewhere else.  Citus refuses an UPDATE
 * that adds an interval to a time if the interval is a column: that isn't
 * IMMUTABLE, and nodes might disagree.  So the sum is the last parameter.
 */
static OwnerStatement record_result_elsewhere = {
	"UPDATE idempotency.idempotency_keys SET recorded_at = $4, expires_at = $11,"
	" http_status = $7, response = $8, response_headers = $9, response_body = $10,"
	" lease = NULL, lease_expires_at = NULL, ttl = NULL,"
	" recovery_point = NULL, recovery_data = NULL"
	" WHERE scope OPERATOR(pg_catalog.=) $1 AND key OPERATOR(pg_catalog.=) $2"
	" AND token OPERATOR(pg_catalog.=) $3 AND expires_at IS NULL"
	" RETURNING expires_at",
	11, {TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, INTERVALOID, INTERVALOID,
	INT4OID, JSONBOID, JSONBOID, BYTEAOID, TIMESTAMPTZOID}
};

static OwnerStatement extend_lease_elsewhere = {
	"UPDATE idempotency.idempotency_keys SET lease = COALESCE($5, lease),"
	" lease_expires_at = $6"
	" WHERE scope OPERATOR(pg_catalog.=) $1 AND key OPERATOR(pg_catalog.=) $2"
	" AND token OPERATOR(pg_catalog.=) $3 AND expires_at IS NULL"
	" RETURNING lease_expires_at",
	6, {TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, INTERVALOID, TIMESTAMPTZOID}
};

static OwnerStatement set_checkpoint_elsewhere = {
	"UPDATE idempotency.idempotency_keys SET lease = COALESCE($5, lease),"
	" lease_expires_at = $8, recovery_point = $6, recovery_data = $7"
	" WHERE scope OPERATOR(pg_catalog.=) $1 AND key OPERATOR(pg_catalog.=) $2"
	" AND token OPERATOR(pg_catalog.=) $3 AND expires_at IS NULL"
	" RETURNING lease_expires_at",
	8, {TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, INTERVALOID, TEXTOID, JSONBOID,
	TIMESTAMPTZOID}
};

/* ---------- expiry ---------- */

/*
 * Two kinds of rows go: recorded ones past expires_at, and claims that were
 * abandoned.  Those are unfinished, have no recovery point that a successor
 * might need, and their lease lapsed long ago; without a lease that is the
 * moment of the claim.  $n is the clock, $n + 1 the clock less
 * idempotency.abandoned_retention.
 */
#define IS_DUE(clock, abandoned) \
	"(expires_at OPERATOR(pg_catalog.<=) " clock \
	" OR (expires_at IS NULL AND recovery_point IS NULL" \
	" AND COALESCE(lease_expires_at, claimed_at) OPERATOR(pg_catalog.<=) " abandoned "))"

static bool
expiry_cutoffs(TimestampTz now, TimestampTz *cutoffs)
{
	cutoffs[0] = now;
	cutoffs[1] = now - (int64) setting_abandoned_retention * USECS_PER_SEC;
	return true;
}

/* IS_DUE, in C */
static bool
is_due(TupleTableSlot *slot, const TimestampTz *cutoffs, TimestampTz *since)
{
	bool		isnull;
	Datum		value = slot_getattr(slot, K_EXPIRES_AT + 1, &isnull);

	if (!isnull)
	{
		*since = DatumGetTimestampTz(value);
		return *since <= cutoffs[0];
	}

	value = slot_getattr(slot, K_LEASE_EXPIRES_AT + 1, &isnull);
	if (isnull)
		value = slot_getattr(slot, K_CLAIMED_AT + 1, &isnull);
	if (DatumGetTimestampTz(value) > cutoffs[1])
		return false;
	*since = DatumGetTimestampTz(value) + (cutoffs[0] - cutoffs[1]);
	return slot_attisnull(slot, K_RECOVERY_POINT + 1);
}

Expiry		request_expiry = {
	"request", &requests, expiry_cutoffs, is_due,
	{
		"SELECT scope, key, token, COALESCE(expires_at, COALESCE(lease_expires_at, claimed_at)"
		" OPERATOR(pg_catalog.+) ($3 OPERATOR(pg_catalog.-) $4))"
		" FROM idempotency.idempotency_keys"
		" WHERE ROW(scope, key) OPERATOR(pg_catalog.>) ROW($1, $2) AND " IS_DUE("$3", "$4")
		" ORDER BY scope, key LIMIT $5 OFFSET $6",
		6, {TEXTOID, TEXTOID, TIMESTAMPTZOID, TIMESTAMPTZOID, INT8OID, INT8OID}
	},
	{
		"DELETE FROM idempotency.idempotency_keys"
		" WHERE scope OPERATOR(pg_catalog.=) $1 AND key OPERATOR(pg_catalog.=) $2"
		" AND token OPERATOR(pg_catalog.=) $3 AND " IS_DUE("$4", "$5"),
		5, {TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, TIMESTAMPTZOID}
	}
};

/* ---------- claim ---------- */

typedef struct RequestClaim
{
	LedgerClaim base;
	RequestPrint print;
	Duration	lease;
	Duration	ttl;
	int64		token;
	bool		claimed;
	bool		mismatch;
	ResultRow	result;
} RequestClaim;

static void
answer_copy(RequestClaim *claim, int column, LedgerRow *row, int source)
{
	result_copy(&claim->result, column, row->values[source], row->isnull[source]);
}

static void
answer_in_progress(RequestClaim *claim, int retry_after)
{
	result_set_enum(&claim->result, C_VERDICT, "in_progress");
	result_set(&claim->result, C_HTTP_STATUS, Int32GetDatum(409));
	result_set(&claim->result, C_RETRY_AFTER, Int32GetDatum(retry_after));
}

static void
busy(LedgerClaim *base)
{
	answer_in_progress((RequestClaim *) base, 1);
}

static bool
is_expired(LedgerRow *row, TimestampTz now)
{
	return !row->isnull[K_EXPIRES_AT] &&
		DatumGetTimestampTz(row->values[K_EXPIRES_AT]) <= now;
}

/*
 * Was the key given back with its request kept?  Then it is free from that
 * moment on, whatever the clock says now, and for the transaction that did it.
 */
static bool
is_given_up(LedgerRow *row)
{
	return row->isnull[K_EXPIRES_AT] && row->isnull[K_LEASE] &&
		!row->isnull[K_LEASE_EXPIRES_AT];
}

/*
 * What a claim finds.  A different request is told so before anything else is
 * told about the key.
 */
static LedgerDecision
decide(LedgerClaim *base, LedgerRow *row, TimestampTz now)
{
	RequestClaim *claim = (RequestClaim *) base;
	bool		recorded = !row->isnull[K_EXPIRES_AT];

	if (is_expired(row, now))
		return LEDGER_TAKE;

	if (!row->isnull[K_FINGERPRINT] &&
		!request_matches(&claim->print, DatumGetByteaPP(row->values[K_FINGERPRINT])))
	{
		claim->mismatch = true;
		result_set_enum(&claim->result, C_VERDICT, "mismatch");
		result_set(&claim->result, C_HTTP_STATUS, Int32GetDatum(422));
		return LEDGER_ANSWER;
	}

	if (recorded)
	{
		result_set_enum(&claim->result, C_VERDICT, "replay");
		answer_copy(claim, C_ATTEMPT, row, K_ATTEMPT);
		answer_copy(claim, C_HTTP_STATUS, row, K_HTTP_STATUS);
		answer_copy(claim, C_RESPONSE, row, K_RESPONSE);
		answer_copy(claim, C_RESPONSE_HEADERS, row, K_RESPONSE_HEADERS);
		answer_copy(claim, C_RESPONSE_BODY, row, K_RESPONSE_BODY);
		answer_copy(claim, C_EXPIRES_AT, row, K_EXPIRES_AT);
		return LEDGER_ANSWER;
	}

	if (is_given_up(row))
		return LEDGER_TAKE;

	if (!row->isnull[K_LEASE_EXPIRES_AT] &&
		DatumGetTimestampTz(row->values[K_LEASE_EXPIRES_AT]) > now)
	{
		answer_in_progress(claim,
						   ledger_retry_after(DatumGetTimestampTz(row->values[K_LEASE_EXPIRES_AT]), now));
		return LEDGER_ANSWER;
	}

	if (row->own)
	{
		answer_in_progress(claim, 1);
		return LEDGER_ANSWER;
	}

	return LEDGER_TAKE;
}

static Datum
lease_end(RequestClaim *claim, TimestampTz now)
{
	return TimestampTzGetDatum(now + claim->lease.usecs);
}

static void
answer_claimed(RequestClaim *claim, TimestampTz now)
{
	claim->claimed = true;
	result_set_enum(&claim->result, C_VERDICT, "claimed");
	result_set(&claim->result, C_TOKEN, Int64GetDatum(claim->token));
	if (claim->lease.given)
		result_set(&claim->result, C_LEASE_EXPIRES_AT, lease_end(claim, now));
}

/* Parameters that all ways to claim share; nulls has room for all of them. */
static void
claim_parameters(RequestClaim *claim, TimestampTz now, Datum *values, char *nulls)
{
	bytea	   *print = request_print(&claim->print);

	claim->token = ledger_new_token();

	memset(nulls, ' ', OWNER_STATEMENT_MAX_ARGS);
	values[0] = claim->base.key[0];
	values[1] = claim->base.key[1];
	values[2] = Int64GetDatum(claim->token);
	values[3] = TimestampTzGetDatum(now);
	if (claim->lease.given)
	{
		values[4] = lease_end(claim, now);
		values[5] = interval_datum(claim->lease.usecs);
	}
	else
		nulls[4] = nulls[5] = 'n';
	if (claim->ttl.given)
		values[6] = interval_datum(claim->ttl.usecs);
	else
		nulls[6] = 'n';
	if (print != NULL)
		values[7] = PointerGetDatum(print);
	else
		nulls[7] = 'n';
}

static bool
insert(LedgerClaim *base, Relation rel, TimestampTz now)
{
	RequestClaim *claim = (RequestClaim *) base;
	Datum		values[8];
	char		nulls[OWNER_STATEMENT_MAX_ARGS];

	claim_parameters(claim, now, values, nulls);
	if (ledger_execute(rel, &insert_claim, values, nulls, NULL, NULL, 0) == 0)
		return false;

	answer_claimed(claim, now);
	result_set(&claim->result, C_ATTEMPT, Int32GetDatum(1));
	return true;
}

static bool
take(LedgerClaim *base, Relation rel, LedgerRow *row, TimestampTz now)
{
	RequestClaim *claim = (RequestClaim *) base;
	OwnerStatement *statement = is_expired(row, now) ? &take_expired : &take_lapsed;
	Datum		values[9];
	char		nulls[OWNER_STATEMENT_MAX_ARGS];
	Datum		out[3];
	bool		outnull[3];

	claim_parameters(claim, now, values, nulls);
	values[8] = row->values[K_TOKEN];
	if (ledger_execute(rel, statement, values, nulls, out, outnull, 3) == 0)
		return false;

	answer_claimed(claim, now);
	result_set(&claim->result, C_ATTEMPT, out[0]);
	result_copy(&claim->result, C_RECOVERY_POINT, out[1], outnull[1]);
	result_copy(&claim->result, C_RECOVERY_DATA, out[2], outnull[2]);
	return true;
}

/* The claim waited while it was written: its lease starts when it answers. */
static void
renew(LedgerClaim *base, Relation rel, TimestampTz now)
{
	RequestClaim *claim = (RequestClaim *) base;
	Datum		values[5];

	if (!claim->lease.given)
		return;

	values[0] = claim->base.key[0];
	values[1] = claim->base.key[1];
	values[2] = Int64GetDatum(claim->token);
	values[3] = TimestampTzGetDatum(now);
	values[4] = lease_end(claim, now);
	if (ledger_execute(rel, &renew_claim, values, NULL, NULL, NULL, 0) != 1)
		elog(ERROR, "lost a claim of this transaction");
	result_set(&claim->result, C_LEASE_EXPIRES_AT, lease_end(claim, now));
}

/* "key" of scope "scope", for messages */
static char *
describe_key(text *key, text *scope)
{
	return psprintf("\"%s\" of scope \"%s\"", text_to_cstring(key), text_to_cstring(scope));
}

/*
 * A request may be any JSON.  Where it is another than the one before, and a
 * mere string, a driver has mostly encoded it twice; nobody sees that elsewhere.
 */
static void
say_that_request_is_text(RequestPrint *print, text *key, text *scope)
{
	JsonbValue	value;

	if (!JB_ROOT_IS_SCALAR(print->request) ||
		!JsonbExtractScalar(&print->request->root, &value) || value.type != jbvString)
		return;
	ereport(NOTICE,
			(errmsg("request of idempotency key %s is a JSON string, and not the one that is recorded",
					describe_key(key, scope)),
			 errhint("It may have been encoded twice: pass the object, or its text as it is.")));
}

/*
 * claim(key, scope, request, ttl, lease, wait)
 */
Datum
idempotency_claim(PG_FUNCTION_ARGS)
{
	text	   *key = argument_key(fcinfo, 0);
	text	   *scope = argument_scope(fcinfo, 1);
	RequestClaim claim;
	Relation	rel;

	PreventCommandDuringRecovery("idempotency.claim()");

	memset(&claim, 0, sizeof(claim));
	claim.base.key[0] = PointerGetDatum(scope);
	claim.base.key[1] = PointerGetDatum(key);
	claim.base.decide = decide;
	claim.base.insert = insert;
	claim.base.take = take;
	claim.base.renew = renew;
	claim.base.busy = busy;
	claim.print.request = argument_jsonb(fcinfo, 2);
	claim.ttl = argument_duration(fcinfo, 3, "ttl");
	claim.lease = argument_duration(fcinfo, 4, "lease");
	claim.base.wait = argument_bool(fcinfo, 5, "wait");
	result_begin(&claim.result, fcinfo, C_NCOLUMNS);

	rel = ledger_open(&requests, RowExclusiveLock, !claim.base.wait);
	ledger_claim(&requests, rel, &claim.base);
	ledger_close(rel);

	if (claim.mismatch)
		say_that_request_is_text(&claim.print, key, scope);
	if (claim.claimed && !claim.lease.given)
		open_claims_add(claim.token, "idempotency key", describe_key(key, scope));

	PG_RETURN_DATUM(result_end(&claim.result));
}

/* ---------- what the holder of a token does ---------- */

/*
 * A fenced statement found no row.  Say why, or return true where the row has
 * this token and isn't recorded, so that the caller tries again.
 *
 * With "recorded" given, a row that this token has recorded is returned there
 * instead of being an error.
 */
static bool
explain_refusal(Relation rel, text *key, text *scope, int64 token, LedgerRow *recorded)
{
	Datum		keys[LEDGER_MAX_KEYS];
	LedgerRow	row;
	const char *reason;
	TimestampTz now;

	keys[0] = PointerGetDatum(scope);
	keys[1] = PointerGetDatum(key);
	ledger_look(&requests, rel, keys, &row);
	now = GetCurrentTimestamp();

	if (row.found != FOUND_ROW || is_expired(&row, now))
		reason = "It is not claimed: it never was, was released, has expired, or its claim was rolled back.";
	else if (DatumGetInt64(row.values[K_TOKEN]) != token && is_given_up(&row))
		reason = "It was released.";
	else if (DatumGetInt64(row.values[K_TOKEN]) != token)
		reason = "It was claimed again after that claim's lease had lapsed.";
	else if (row.isnull[K_EXPIRES_AT])
		return true;
	else if (recorded != NULL)
	{
		*recorded = row;
		return false;
	}
	else
		ereport(ERROR,
				(errcode(ERRCODE_CONTRADICTS_RECORD),
				 errmsg("result of idempotency key %s is recorded already",
						describe_key(key, scope)),
				 errdetail("A recorded result is final until it expires.")));

	ereport(ERROR,
			(errcode(ERRCODE_STALE_TOKEN),
			 errmsg("idempotency key %s is not held with this token", describe_key(key, scope)),
			 errdetail_internal("%s", reason),
			 errhint("Roll back, and let the client's retry claim the key again.")));
	return false;
}

/*
 * Run record_result, extend_lease, set_checkpoint, or another statement whose
 * fourth parameter is the clock and its fifth a duration; or, where the rows
 * are somewhere else, what has to be used there instead.
 */
static uint64
execute_timed(Relation rel, OwnerStatement *statement, Datum *values, const char *nulls,
			  Datum *out, bool *outnull)
{
	OwnerStatement *elsewhere = NULL;
	Datum		evalues[OWNER_STATEMENT_MAX_ARGS];
	char		enulls[OWNER_STATEMENT_MAX_ARGS];
	Datum		duration = (Datum) 0;
	int			column = K_LEASE;
	int			last;

	if (!requests.direct)
	{
		if (statement == &record_result)
		{
			elsewhere = &record_result_elsewhere;
			column = K_TTL;
		}
		else if (statement == &extend_lease)
			elsewhere = &extend_lease_elsewhere;
		else if (statement == &set_checkpoint)
			elsewhere = &set_checkpoint_elsewhere;
	}
	if (elsewhere == NULL)
		return ledger_execute(rel, statement, values, nulls, out, outnull,
							  out != NULL ? 1 : 0);

	last = elsewhere->nargs - 1;
	memcpy(evalues, values, last * sizeof(Datum));
	memcpy(enulls, nulls, last);
	enulls[last] = ' ';
	if (nulls[4] != 'n')
		duration = values[4];
	else
	{
		LedgerRow	row;

		if (ledger_execute(rel, &requests.select, values, NULL,
						   row.values, row.isnull, requests.ncolumns) == 0)
			return 0;
		if (!row.isnull[column])
			duration = row.values[column];
		else if (column == K_TTL)
			duration = values[5];
		else
			enulls[last] = 'n';
	}
	evalues[last] = (Datum) 0;
	if (enulls[last] != 'n')
		evalues[last] = DirectFunctionCall2(timestamptz_pl_interval, values[3], duration);

	return ledger_execute(rel, elsewhere, evalues, enulls, out, outnull, 1);
}

/*
 * Run a statement that names the key and its token, until it has changed the
 * row or the reason why it can't is raised.  values[3] is set to the clock.
 * *out is its only column: the end of a lease, which starts when this returns.
 */
static void
fenced(Relation rel, OwnerStatement *statement, Datum *values, const char *nulls,
	   text *key, text *scope, int64 token, Datum *out, bool *outnull)
{
	TimestampTz now = GetCurrentTimestamp();
	int			races = 0;

	values[3] = TimestampTzGetDatum(now);
	while (execute_timed(rel, statement, values, nulls, out, outnull) == 0)
	{
		(void) explain_refusal(rel, key, scope, token, NULL);
		ledger_lost_race(&requests, &races);
		now = GetCurrentTimestamp();
		values[3] = TimestampTzGetDatum(now);
	}

	if (out != NULL && ledger_has_waited(&now))
	{
		/* the row is this transaction's now, so that once more is at once */
		values[3] = TimestampTzGetDatum(now);
		if (execute_timed(rel, statement, values, nulls, out, outnull) != 1)
			elog(ERROR, "lost a row that this transaction has changed");
	}
}

/*
 * A result was recorded after a wait: it is replayed from now on.  "clock" is
 * the one it was recorded with; *expires_at is changed.
 */
static void
renew_recorded(Relation rel, text *key, text *scope, int64 token, TimestampTz clock,
			   TimestampTz now, Datum *expires_at)
{
	Datum		values[6];
	bool		isnull;

	values[0] = PointerGetDatum(scope);
	values[1] = PointerGetDatum(key);
	values[2] = Int64GetDatum(token);
	values[3] = TimestampTzGetDatum(now);
	values[4] = interval_datum(DatumGetTimestampTz(*expires_at) - clock);
	values[5] = TimestampTzGetDatum(clock);
	if (ledger_execute(rel, &renew_result, values, NULL, expires_at, &isnull, 1) != 1)
		elog(ERROR, "lost a row that this transaction has changed");
}

/* Equal, where NULL equals NULL? */
static bool
same_value(PGFunction equal, bool isnull1, Datum value1, bool isnull2, Datum value2)
{
	if (isnull1 || isnull2)
		return isnull1 && isnull2;
	return DatumGetBool(DirectFunctionCall2(equal, value1, value2));
}

/*
 * record(key, scope, token, response, response_status, response_headers,
 *		  response_body, ttl)
 */
Datum
idempotency_record(PG_FUNCTION_ARGS)
{
	static const int sized[] = {3, 5, 6};
	text	   *key = argument_key(fcinfo, 0);
	text	   *scope = argument_scope(fcinfo, 1);
	int64		token = argument_token(fcinfo, 2);
	int			status = argument_http_status(fcinfo, 4, "response_status");
	Duration	ttl = argument_duration(fcinfo, 7, "ttl");
	Relation	rel;
	Datum		values[10];
	char		nulls[10];
	Datum		expires_at;
	bool		isnull;
	int			races = 0;

	PreventCommandDuringRecovery("idempotency.record()");

	check_size(fcinfo, sized, lengthof(sized), "response");
	(void) argument_object(fcinfo, 5, "response_headers");

	memset(nulls, ' ', sizeof(nulls));
	values[0] = PointerGetDatum(scope);
	values[1] = PointerGetDatum(key);
	values[2] = Int64GetDatum(token);
	if (ttl.given)
		values[4] = interval_datum(ttl.usecs);
	else
		nulls[4] = 'n';
	values[5] = interval_datum((int64) setting_key_ttl * USECS_PER_SEC);
	values[6] = Int32GetDatum(status);
	values[7] = PG_GETARG_DATUM(3);
	nulls[7] = PG_ARGISNULL(3) ? 'n' : ' ';
	values[8] = PG_GETARG_DATUM(5);
	nulls[8] = PG_ARGISNULL(5) ? 'n' : ' ';
	values[9] = PG_GETARG_DATUM(6);
	nulls[9] = PG_ARGISNULL(6) ? 'n' : ' ';

	rel = ledger_open(&requests, RowExclusiveLock, false);
	for (;;)
	{
		TimestampTz clock = GetCurrentTimestamp();
		TimestampTz now = clock;
		LedgerRow	row;

		values[3] = TimestampTzGetDatum(clock);
		if (execute_timed(rel, &record_result, values, nulls, &expires_at, &isnull) > 0)
		{
			if (ledger_has_waited(&now))
				renew_recorded(rel, key, scope, token, clock, now, &expires_at);
			break;
		}

		if (explain_refusal(rel, key, scope, token, &row))
		{
			ledger_lost_race(&requests, &races);
			continue;
		}

		/* recorded by this very claim: the same result may be recorded again */
		if (DatumGetInt32(row.values[K_HTTP_STATUS]) != status ||
			!same_value(jsonb_eq, row.isnull[K_RESPONSE], row.values[K_RESPONSE],
						PG_ARGISNULL(3), PG_GETARG_DATUM(3)) ||
			!same_value(jsonb_eq, row.isnull[K_RESPONSE_HEADERS], row.values[K_RESPONSE_HEADERS],
						PG_ARGISNULL(5), PG_GETARG_DATUM(5)) ||
			!same_value(byteaeq, row.isnull[K_RESPONSE_BODY], row.values[K_RESPONSE_BODY],
						PG_ARGISNULL(6), PG_GETARG_DATUM(6)))
			ereport(ERROR,
					(errcode(ERRCODE_CONTRADICTS_RECORD),
					 errmsg("another result of idempotency key %s is recorded already",
							describe_key(key, scope)),
					 errdetail("A recorded result is final until it expires.")));
		expires_at = row.values[K_EXPIRES_AT];
		break;
	}
	ledger_close(rel);
	open_claims_remove(token);

	PG_RETURN_DATUM(expires_at);
}

/*
 * checkpoint(key, scope, token, recovery_point, recovery_data, lease)
 */
Datum
idempotency_checkpoint(PG_FUNCTION_ARGS)
{
	static const int sized[] = {4};
	text	   *key = argument_key(fcinfo, 0);
	text	   *scope = argument_scope(fcinfo, 1);
	int64		token = argument_token(fcinfo, 2);
	text	   *point = argument_text(fcinfo, 3, "recovery_point");
	Duration	lease = argument_duration(fcinfo, 5, "lease");
	Relation	rel;
	Datum		values[7];
	char		nulls[] = "       ";
	Datum		lease_expires_at;
	bool		isnull;

	PreventCommandDuringRecovery("idempotency.checkpoint()");
	check_label(VARDATA_ANY(point), VARSIZE_ANY_EXHDR(point), false, "recovery_point");
	check_size(fcinfo, sized, lengthof(sized), "recovery_data");

	values[0] = PointerGetDatum(scope);
	values[1] = PointerGetDatum(key);
	values[2] = Int64GetDatum(token);
	if (lease.given)
		values[4] = interval_datum(lease.usecs);
	else
		nulls[4] = 'n';
	values[5] = PointerGetDatum(point);
	values[6] = PG_GETARG_DATUM(4);
	nulls[6] = PG_ARGISNULL(4) ? 'n' : ' ';

	rel = ledger_open(&requests, RowExclusiveLock, false);
	fenced(rel, &set_checkpoint, values, nulls, key, scope, token, &lease_expires_at, &isnull);
	ledger_close(rel);

	/* with a lease the claim no longer ends with its transaction */
	if (isnull)
		PG_RETURN_NULL();
	open_claims_remove(token);
	PG_RETURN_DATUM(lease_expires_at);
}

/*
 * extend(key, scope, token, lease)
 */
Datum
idempotency_extend(PG_FUNCTION_ARGS)
{
	text	   *key = argument_key(fcinfo, 0);
	text	   *scope = argument_scope(fcinfo, 1);
	int64		token = argument_token(fcinfo, 2);
	Duration	lease = argument_duration(fcinfo, 3, "lease");
	Relation	rel;
	Datum		values[5];
	char		nulls[] = "     ";
	Datum		lease_expires_at;
	bool		isnull;

	PreventCommandDuringRecovery("idempotency.extend()");

	values[0] = PointerGetDatum(scope);
	values[1] = PointerGetDatum(key);
	values[2] = Int64GetDatum(token);
	if (lease.given)
		values[4] = interval_datum(lease.usecs);
	else
		nulls[4] = 'n';

	rel = ledger_open(&requests, RowExclusiveLock, false);
	fenced(rel, &extend_lease, values, nulls, key, scope, token, &lease_expires_at, &isnull);
	ledger_close(rel);

	if (isnull)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("idempotency key %s was claimed without a lease",
						describe_key(key, scope)),
				 errhint("Say for how long it shall be held: lease => interval '5 minutes'.")));
	open_claims_remove(token);
	PG_RETURN_DATUM(lease_expires_at);
}

/*
 * release(key, scope, token, keep)
 */
Datum
idempotency_release(PG_FUNCTION_ARGS)
{
	text	   *key = argument_key(fcinfo, 0);
	text	   *scope = argument_scope(fcinfo, 1);
	int64		token = argument_token(fcinfo, 2);
	bool		keep = argument_bool(fcinfo, 3, "keep");
	Relation	rel;
	Datum		values[5];

	PreventCommandDuringRecovery("idempotency.release()");

	values[0] = PointerGetDatum(scope);
	values[1] = PointerGetDatum(key);
	values[2] = Int64GetDatum(token);
	values[4] = Int64GetDatum(keep ? ledger_new_token() : 0);

	rel = ledger_open(&requests, RowExclusiveLock, false);
	fenced(rel, keep ? &keep_claim : &release_claim, values, NULL, key, scope, token, NULL, NULL);
	ledger_close(rel);

	open_claims_remove(token);
	PG_RETURN_BOOL(true);
}

/* ---------- display ---------- */

/*
 * lookup(key, scope)
 */
Datum
idempotency_lookup(PG_FUNCTION_ARGS)
{
	static const struct
	{
		int			column;
		int			source;
	}			copied[] = {
		{I_SCOPE, K_SCOPE}, {I_KEY, K_KEY}, {I_ATTEMPT, K_ATTEMPT},
		{I_RECOVERY_POINT, K_RECOVERY_POINT}, {I_RECOVERY_DATA, K_RECOVERY_DATA},
		{I_HTTP_STATUS, K_HTTP_STATUS}, {I_RESPONSE, K_RESPONSE},
		{I_RESPONSE_HEADERS, K_RESPONSE_HEADERS}, {I_RESPONSE_BODY, K_RESPONSE_BODY},
		{I_CLAIMED_AT, K_CLAIMED_AT}, {I_LEASE, K_LEASE},
		{I_LEASE_EXPIRES_AT, K_LEASE_EXPIRES_AT}, {I_RECORDED_AT, K_RECORDED_AT},
		{I_EXPIRES_AT, K_EXPIRES_AT}
	};
	text	   *key = argument_key(fcinfo, 0);
	text	   *scope = argument_scope(fcinfo, 1);
	Datum		keys[LEDGER_MAX_KEYS];
	LedgerRow	row;
	ResultRow	result;
	TimestampTz now;
	int			i;

	keys[0] = PointerGetDatum(scope);
	keys[1] = PointerGetDatum(key);
	if (!ledger_lookup(&requests, keys, &row))
		PG_RETURN_NULL();
	now = GetCurrentTimestamp();
	if (is_expired(&row, now))
		PG_RETURN_NULL();

	result_begin(&result, fcinfo, I_NCOLUMNS);
	for (i = 0; i < lengthof(copied); i++)
		result_copy(&result, copied[i].column, row.values[copied[i].source],
					row.isnull[copied[i].source]);
	result_set(&result, I_HAS_REQUEST, BoolGetDatum(!row.isnull[K_FINGERPRINT]));

	if (row.isnull[K_EXPIRES_AT])
	{
		result_set_text(&result, I_STATUS, "in_progress");
		result_set(&result, I_LAPSED,
				   BoolGetDatum(row.isnull[K_LEASE] ||
								DatumGetTimestampTz(row.values[K_LEASE_EXPIRES_AT]) <= now));
	}
	else
		result_set_text(&result, I_STATUS,
						DatumGetInt32(row.values[K_HTTP_STATUS]) >= 400 ? "failed" : "completed");

	PG_RETURN_DATUM(result_end(&result));
}

/*
 * operation_uuid(key, scope)
 */
Datum
idempotency_operation_uuid(PG_FUNCTION_ARGS)
{
	text	   *key = argument_key(fcinfo, 0);
	text	   *scope = argument_scope(fcinfo, 1);
	pg_uuid_t  *uuid = palloc(sizeof(pg_uuid_t));
	Namespace	ns;

	namespace_in_force(&ns);
	derive_operation_uuid(ns.value, NAMESPACE_LEN,
						  VARDATA_ANY(scope), VARSIZE_ANY_EXHDR(scope),
						  VARDATA_ANY(key), VARSIZE_ANY_EXHDR(key), uuid);
	PG_RETURN_UUID_P(uuid);
}
