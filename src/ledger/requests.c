/*-------------------------------------------------------------------------
 *
 * requests.c
 *	  SQL functions for the requests that an API receives: what the holder of
 *	  a claim does, and looking a key up.
 *
 * claim() is in request_claim.c, and the states of a row are explained in
 * request_ledger.c.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/ledger/requests.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

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
#include "base/parameters.h"
#include "base/result_row.h"
#include "base/settings.h"
#include "ledger/derived_key.h"
#include "ledger/ledger.h"
#include "ledger/namespace.h"
#include "ledger/open_claims.h"
#include "ledger/request_ledger.h"

PG_FUNCTION_INFO_V1(idempotency_record);
PG_FUNCTION_INFO_V1(idempotency_checkpoint);
PG_FUNCTION_INFO_V1(idempotency_extend);
PG_FUNCTION_INFO_V1(idempotency_release);
PG_FUNCTION_INFO_V1(idempotency_lookup);
PG_FUNCTION_INFO_V1(idempotency_operation_uuid);

/* Columns of key_info. */
enum
{
	I_SCOPE, I_KEY, I_STATUS, I_ATTEMPT, I_RECOVERY_POINT, I_RECOVERY_DATA,
	I_HTTP_STATUS, I_RESPONSE, I_RESPONSE_HEADERS, I_RESPONSE_BODY,
	I_HAS_REQUEST, I_CLAIMED_AT, I_LEASE, I_LEASE_EXPIRES_AT, I_LAPSED,
	I_RECORDED_AT, I_EXPIRES_AT, I_NCOLUMNS
};

/*
 * The statements.  $1 and $2 are scope and key, $3 is the token, $4 the clock
 * and $5, unless something else is said, the length of time that was given.
 *
 * Of record_result, $6 is the time to live of the settings.
 */
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

/* $5 is how long the result is replayed, $6 the clock it was recorded with. */
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

/* Parameters of every statement of a holder, counted from 0. */
#define P_CLOCK 3
#define P_DURATION 4
#define P_SETTINGS_TTL 5		/* of record_result */

/* Who calls with a token, and the parameters of what is to be done. */
typedef struct Holder
{
	text	   *key;
	text	   *scope;
	int64		token;
	Relation	rel;			/* idempotency_keys, once it is open */
	Parameters	parameters;
} Holder;

/*
 * Take the arguments that all functions of a holder begin with: key, scope and
 * token.  The clock is set when the statement runs.
 */
static void
begin_holder(Holder *holder, FunctionCallInfo fcinfo)
{
	holder->key = argument_key(fcinfo, 0);
	holder->scope = argument_scope(fcinfo, 1);
	holder->token = argument_token(fcinfo, 2);

	parameters_begin(&holder->parameters, NULL, 0);
	parameter_datum(&holder->parameters, PointerGetDatum(holder->scope));
	parameter_datum(&holder->parameters, PointerGetDatum(holder->key));
	parameter_int64(&holder->parameters, holder->token);
	parameter_timestamp(&holder->parameters, 0);
}

static void
set_clock(Holder *holder, TimestampTz clock)
{
	holder->parameters.values[P_CLOCK] = TimestampTzGetDatum(clock);
}

/* An argument as it is, or NULL. */
static void
parameter_argument(Holder *holder, FunctionCallInfo fcinfo, int argno)
{
	parameter_nullable(&holder->parameters, PG_GETARG_DATUM(argno), PG_ARGISNULL(argno));
}

/*
 * A statement of a holder found no row.  Raise why, or return true if the row
 * has this token and isn't recorded, so that the caller tries again.
 *
 * With "recorded" given, a row that this token has recorded is returned there
 * instead of being an error.
 */
static bool
explain_refusal(Holder *holder, LedgerRow *recorded)
{
	LedgerRow	row;
	const char *reason;
	TimestampTz now;

	ledger_look(&request_ledger, holder->rel, holder->parameters.values, &row);
	now = GetCurrentTimestamp();

	if (row.found != FOUND_ROW || request_is_expired(&row, now))
		reason = "It is not claimed: it never was, was released, has expired, or its claim was rolled back.";
	else if (DatumGetInt64(row.values[K_TOKEN]) != holder->token && request_is_given_up(&row))
		reason = "It was released.";
	else if (DatumGetInt64(row.values[K_TOKEN]) != holder->token)
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
						describe_request(holder->key, holder->scope)),
				 errdetail("A recorded result is final until it expires.")));

	ereport(ERROR,
			(errcode(ERRCODE_STALE_TOKEN),
			 errmsg("idempotency key %s is not held with this token",
					describe_request(holder->key, holder->scope)),
			 errdetail_internal("%s", reason),
			 errhint("Roll back, and let the client's retry claim the key again.")));
	return false;
}

/*
 * Run a statement for rows that are somewhere else: its last parameter is the
 * clock and the length of time together, which is the one given, the row's
 * own, or that of the settings.
 */
static uint64
execute_elsewhere(Holder *holder, OwnerStatement *statement, int column,
				  Datum *out, bool *outnull)
{
	Parameters	parameters = holder->parameters;
	Datum		duration = parameters.values[P_DURATION];
	bool		isnull = parameters.nulls[P_DURATION] == 'n';

	if (isnull)
	{
		LedgerRow	row;

		if (ledger_execute(holder->rel, &request_ledger.select, parameters.values, NULL,
						   row.values, row.isnull, request_ledger.ncolumns) == 0)
			return 0;
		isnull = row.isnull[column];
		if (!isnull)
			duration = row.values[column];
		else if (column == K_TTL)
		{
			duration = parameters.values[P_SETTINGS_TTL];
			isnull = false;
		}
	}

	if (isnull)
		parameter_nullable(&parameters, (Datum) 0, true);
	else
		parameter_datum(&parameters,
						DirectFunctionCall2(timestamptz_pl_interval,
											parameters.values[P_CLOCK], duration));
	Assert(parameters.n == statement->nargs);

	return ledger_execute(holder->rel, statement, parameters.values, parameters.nulls,
						  out, outnull, 1);
}

/*
 * Run a statement of a holder; *out is its only column, if it has one.  Where
 * the rows are somewhere else, the statement is one that can be run there.
 */
static uint64
execute(Holder *holder, OwnerStatement *statement, Datum *out, bool *outnull)
{
	if (!request_ledger.direct)
	{
		if (statement == &record_result)
			return execute_elsewhere(holder, &record_result_elsewhere, K_TTL, out, outnull);
		if (statement == &extend_lease)
			return execute_elsewhere(holder, &extend_lease_elsewhere, K_LEASE, out, outnull);
		if (statement == &set_checkpoint)
			return execute_elsewhere(holder, &set_checkpoint_elsewhere, K_LEASE, out, outnull);
	}

	return ledger_execute(holder->rel, statement, holder->parameters.values,
						  holder->parameters.nulls, out, outnull, out != NULL ? 1 : 0);
}

/*
 * Run a statement of a holder until it has changed the row, or raise the
 * reason why it cannot.  *out is its only column: the end of a lease, which
 * begins when this returns.
 */
static void
execute_fenced(Holder *holder, OwnerStatement *statement, Datum *out, bool *outnull)
{
	TimestampTz now = GetCurrentTimestamp();
	int			races = 0;

	holder->rel = ledger_open(&request_ledger, RowExclusiveLock, false);
	set_clock(holder, now);
	while (execute(holder, statement, out, outnull) == 0)
	{
		(void) explain_refusal(holder, NULL);
		ledger_lost_race(&request_ledger, &races);
		now = GetCurrentTimestamp();
		set_clock(holder, now);
	}

	if (out != NULL && ledger_has_waited(&now))
	{
		/* the row is this transaction's now, so that once more is at once */
		set_clock(holder, now);
		if (execute(holder, statement, out, outnull) != 1)
			elog(ERROR, "lost a row that this transaction has changed");
	}
	ledger_close(holder->rel);
}

/* ---------- record ---------- */

/*
 * A result was recorded after a wait: it is replayed from now on.  "clock" is
 * the one it was recorded with; *expires_at is changed.
 */
static void
renew_recorded(Holder *holder, TimestampTz clock, TimestampTz now, Datum *expires_at)
{
	Parameters	parameters;
	bool		isnull;

	parameters_begin(&parameters, holder->parameters.values, P_CLOCK);
	parameter_timestamp(&parameters, now);
	parameter_datum(&parameters, interval_datum(DatumGetTimestampTz(*expires_at) - clock));
	parameter_timestamp(&parameters, clock);
	if (ledger_execute(holder->rel, &renew_result, parameters.values, parameters.nulls,
					   expires_at, &isnull, 1) != 1)
		elog(ERROR, "lost a row that this transaction has changed");
}

/* Is a column equal to an argument?  NULL equals NULL. */
static bool
same_value(PGFunction equal, const LedgerRow *row, int column,
		   FunctionCallInfo fcinfo, int argno)
{
	if (row->isnull[column] || PG_ARGISNULL(argno))
		return row->isnull[column] && PG_ARGISNULL(argno);
	return DatumGetBool(DirectFunctionCall2(equal, row->values[column], PG_GETARG_DATUM(argno)));
}

/* Is what record() is called with the result that a row has already? */
static bool
is_same_result(const LedgerRow *row, FunctionCallInfo fcinfo, int status)
{
	return DatumGetInt32(row->values[K_HTTP_STATUS]) == status &&
		same_value(jsonb_eq, row, K_RESPONSE, fcinfo, 3) &&
		same_value(jsonb_eq, row, K_RESPONSE_HEADERS, fcinfo, 5) &&
		same_value(byteaeq, row, K_RESPONSE_BODY, fcinfo, 6);
}

/*
 * record(key, scope, token, response, response_status, response_headers,
 *		  response_body, ttl)
 */
Datum
idempotency_record(PG_FUNCTION_ARGS)
{
	static const int sized[] = {3, 5, 6};
	Holder		holder;
	int			status;
	Duration	ttl;
	Datum		expires_at;
	int			races = 0;

	begin_holder(&holder, fcinfo);
	status = argument_http_status(fcinfo, 4, "response_status");
	ttl = argument_duration(fcinfo, 7, "ttl");

	PreventCommandDuringRecovery("idempotency.record()");

	check_size(fcinfo, sized, lengthof(sized), "response");
	(void) argument_object(fcinfo, 5, "response_headers");

	parameter_duration(&holder.parameters, ttl);
	parameter_datum(&holder.parameters,
					interval_datum((int64) setting_key_ttl * USECS_PER_SEC));
	parameter_int32(&holder.parameters, status);
	parameter_argument(&holder, fcinfo, 3);
	parameter_argument(&holder, fcinfo, 5);
	parameter_argument(&holder, fcinfo, 6);

	holder.rel = ledger_open(&request_ledger, RowExclusiveLock, false);
	for (;;)
	{
		TimestampTz clock = GetCurrentTimestamp();
		TimestampTz now = clock;
		LedgerRow	row;
		bool		isnull;

		set_clock(&holder, clock);
		if (execute(&holder, &record_result, &expires_at, &isnull) > 0)
		{
			if (ledger_has_waited(&now))
				renew_recorded(&holder, clock, now, &expires_at);
			break;
		}

		if (explain_refusal(&holder, &row))
		{
			ledger_lost_race(&request_ledger, &races);
			continue;
		}

		/* recorded by this very claim: the same result may be recorded again */
		if (!is_same_result(&row, fcinfo, status))
			ereport(ERROR,
					(errcode(ERRCODE_CONTRADICTS_RECORD),
					 errmsg("another result of idempotency key %s is recorded already",
							describe_request(holder.key, holder.scope)),
					 errdetail("A recorded result is final until it expires.")));
		expires_at = row.values[K_EXPIRES_AT];
		break;
	}
	ledger_close(holder.rel);
	open_claims_remove(holder.token);

	PG_RETURN_DATUM(expires_at);
}

/* ---------- checkpoint, extend, release ---------- */

/*
 * checkpoint(key, scope, token, recovery_point, recovery_data, lease)
 */
Datum
idempotency_checkpoint(PG_FUNCTION_ARGS)
{
	static const int sized[] = {4};
	Holder		holder;
	text	   *point;
	Duration	lease;
	Datum		lease_expires_at;
	bool		isnull;

	begin_holder(&holder, fcinfo);
	point = argument_text(fcinfo, 3, "recovery_point");
	lease = argument_duration(fcinfo, 5, "lease");

	PreventCommandDuringRecovery("idempotency.checkpoint()");

	check_label(VARDATA_ANY(point), VARSIZE_ANY_EXHDR(point), false, "recovery_point");
	check_size(fcinfo, sized, lengthof(sized), "recovery_data");

	parameter_duration(&holder.parameters, lease);
	parameter_datum(&holder.parameters, PointerGetDatum(point));
	parameter_argument(&holder, fcinfo, 4);
	execute_fenced(&holder, &set_checkpoint, &lease_expires_at, &isnull);

	/* with a lease the claim no longer ends with its transaction */
	if (isnull)
		PG_RETURN_NULL();
	open_claims_remove(holder.token);
	PG_RETURN_DATUM(lease_expires_at);
}

/*
 * extend(key, scope, token, lease)
 */
Datum
idempotency_extend(PG_FUNCTION_ARGS)
{
	Holder		holder;
	Duration	lease;
	Datum		lease_expires_at;
	bool		isnull;

	begin_holder(&holder, fcinfo);
	lease = argument_duration(fcinfo, 3, "lease");

	PreventCommandDuringRecovery("idempotency.extend()");

	parameter_duration(&holder.parameters, lease);
	execute_fenced(&holder, &extend_lease, &lease_expires_at, &isnull);
	if (isnull)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("idempotency key %s was claimed without a lease",
						describe_request(holder.key, holder.scope)),
				 errhint("Say for how long it shall be held: lease => interval '5 minutes'.")));
	open_claims_remove(holder.token);
	PG_RETURN_DATUM(lease_expires_at);
}

/*
 * release(key, scope, token, keep)
 */
Datum
idempotency_release(PG_FUNCTION_ARGS)
{
	Holder		holder;
	bool		keep;

	begin_holder(&holder, fcinfo);
	keep = argument_bool(fcinfo, 3, "keep");

	PreventCommandDuringRecovery("idempotency.release()");

	if (keep)
		parameter_int64(&holder.parameters, ledger_new_token());
	execute_fenced(&holder, keep ? &keep_claim : &release_claim, NULL, NULL);
	open_claims_remove(holder.token);
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
	if (!ledger_lookup(&request_ledger, keys, &row))
		PG_RETURN_NULL();
	now = GetCurrentTimestamp();
	if (request_is_expired(&row, now))
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
