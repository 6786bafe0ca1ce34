/*-------------------------------------------------------------------------
 *
 * request_claim.c
 *	  claim(): who runs a request, and what everybody else is told.
 *
 * ledger.c decides; here is what a claim finds in the row and what it writes.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/ledger/request_claim.c
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

#include "base/arguments.h"
#include "base/parameters.h"
#include "base/result_row.h"
#include "ledger/ledger.h"
#include "ledger/open_claims.h"
#include "ledger/request_fingerprint.h"
#include "ledger/request_ledger.h"

PG_FUNCTION_INFO_V1(idempotency_claim);

/* Columns of claim_result. */
enum
{
	C_VERDICT, C_TOKEN, C_ATTEMPT, C_RECOVERY_POINT, C_RECOVERY_DATA,
	C_HTTP_STATUS, C_RESPONSE, C_RESPONSE_HEADERS, C_RESPONSE_BODY,
	C_RETRY_AFTER, C_LEASE_EXPIRES_AT, C_EXPIRES_AT, C_NCOLUMNS
};

/*
 * The statements.  $1 and $2 are scope and key, $3 is the new token, $4 the
 * clock.
 */
static OwnerStatement insert_claim = {
	"INSERT INTO idempotency.idempotency_keys"
	" (scope, key, token, claimed_at, lease_expires_at, lease, ttl, attempt, fingerprint)"
	" VALUES ($1, $2, $3, $4, $5, $6, $7, 1, $8)"
	" ON CONFLICT DO NOTHING",
	8, {TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, TIMESTAMPTZOID, INTERVALOID,
	INTERVALOID, BYTEAOID}
};

/*
 * $9 is the token that is taken over.  The clock says whether its lease has
 * lapsed, too.
 */
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

/* Copy a column of the row into the answer. */
static void
answer_copy(RequestClaim *claim, int column, LedgerRow *row, int source)
{
	result_copy(&claim->result, column, row->values[source], row->isnull[source]);
}

/* Answer in_progress, to be tried again after so many seconds. */
static void
answer_in_progress(RequestClaim *claim, int retry_after)
{
	result_set_enum(&claim->result, C_VERDICT, "in_progress");
	result_set(&claim->result, C_HTTP_STATUS, Int32GetDatum(409));
	result_set(&claim->result, C_RETRY_AFTER, Int32GetDatum(retry_after));
}

/* LedgerClaim.busy */
static void
busy(LedgerClaim *base)
{
	answer_in_progress((RequestClaim *) base, 1);
}

/*
 * LedgerClaim.decide.  A different request is told that it is one before it is
 * told anything else about the key.
 */
static LedgerDecision
decide(LedgerClaim *base, LedgerRow *row, TimestampTz now)
{
	RequestClaim *claim = (RequestClaim *) base;
	bool		recorded = !row->isnull[K_EXPIRES_AT];

	if (request_is_expired(row, now))
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

	if (request_is_given_up(row))
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

/* Answer claimed, with a lease that begins now. */
static void
answer_claimed(RequestClaim *claim, TimestampTz now)
{
	claim->claimed = true;
	result_set_enum(&claim->result, C_VERDICT, "claimed");
	result_set(&claim->result, C_TOKEN, Int64GetDatum(claim->token));
	if (claim->lease.given)
		result_set(&claim->result, C_LEASE_EXPIRES_AT, lease_end(claim, now));
}

/* Draw a token, and set the parameters that all ways to claim share. */
static void
claim_parameters(RequestClaim *claim, TimestampTz now, Parameters *parameters)
{
	claim->token = ledger_new_token();

	parameters_begin(parameters, claim->base.key, 2);
	parameter_int64(parameters, claim->token);
	parameter_timestamp(parameters, now);
	parameter_nullable(parameters, lease_end(claim, now), !claim->lease.given);
	parameter_duration(parameters, claim->lease);
	parameter_duration(parameters, claim->ttl);
	parameter_pointer(parameters, request_print(&claim->print));
}

/* LedgerClaim.insert */
static bool
insert(LedgerClaim *base, Relation rel, TimestampTz now)
{
	RequestClaim *claim = (RequestClaim *) base;
	Parameters	parameters;

	claim_parameters(claim, now, &parameters);
	if (ledger_execute(rel, &insert_claim, parameters.values, parameters.nulls,
					   NULL, NULL, 0) == 0)
		return false;

	answer_claimed(claim, now);
	result_set(&claim->result, C_ATTEMPT, Int32GetDatum(1));
	return true;
}

/* LedgerClaim.take */
static bool
take(LedgerClaim *base, Relation rel, LedgerRow *row, TimestampTz now)
{
	RequestClaim *claim = (RequestClaim *) base;
	OwnerStatement *statement = request_is_expired(row, now) ? &take_expired : &take_lapsed;
	Parameters	parameters;
	Datum		out[3];
	bool		outnull[3];

	claim_parameters(claim, now, &parameters);
	parameter_datum(&parameters, row->values[K_TOKEN]);
	if (ledger_execute(rel, statement, parameters.values, parameters.nulls,
					   out, outnull, 3) == 0)
		return false;

	answer_claimed(claim, now);
	result_set(&claim->result, C_ATTEMPT, out[0]);
	result_copy(&claim->result, C_RECOVERY_POINT, out[1], outnull[1]);
	result_copy(&claim->result, C_RECOVERY_DATA, out[2], outnull[2]);
	return true;
}

/*
 * LedgerClaim.renew.  The claim waited while it was written: its lease begins
 * when it is answered.
 */
static void
renew(LedgerClaim *base, Relation rel, TimestampTz now)
{
	RequestClaim *claim = (RequestClaim *) base;
	Parameters	parameters;

	if (!claim->lease.given)
		return;

	parameters_begin(&parameters, claim->base.key, 2);
	parameter_int64(&parameters, claim->token);
	parameter_timestamp(&parameters, now);
	parameter_datum(&parameters, lease_end(claim, now));
	if (ledger_execute(rel, &renew_claim, parameters.values, parameters.nulls,
					   NULL, NULL, 0) != 1)
		elog(ERROR, "lost a claim of this transaction");
	result_set(&claim->result, C_LEASE_EXPIRES_AT, lease_end(claim, now));
}

/*
 * A request may be any JSON.  If it differs from the one before and is a mere
 * string, a driver has probably encoded it twice, which shows nowhere else.
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
					describe_request(key, scope)),
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

	rel = ledger_open(&request_ledger, RowExclusiveLock, !claim.base.wait);
	ledger_claim(&request_ledger, rel, &claim.base);
	ledger_close(rel);

	if (claim.mismatch)
		say_that_request_is_text(&claim.print, key, scope);
	if (claim.claimed && !claim.lease.given)
		open_claims_add(claim.token, "idempotency key", describe_request(key, scope));

	PG_RETURN_DATUM(result_end(&claim.result));
}
