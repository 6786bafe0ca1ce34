/*-------------------------------------------------------------------------
 *
 * request_ledger.c
 *	  The table idempotency_keys: its columns, and which rows expire.
 *
 * One row is one key of one scope.  Its state is in its columns:
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
 * src/ledger/request_ledger.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type_d.h"
#include "executor/tuptable.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "base/settings.h"
#include "ledger/expiry.h"
#include "ledger/request_ledger.h"

static const char *const request_columns[K_NCOLUMNS] = {
	REQUEST_COLUMNS(LEDGER_NAME, LEDGER_NAME)
};

Ledger		request_ledger = {
	"idempotency_keys", request_columns, K_NCOLUMNS,
	2, {K_SCOPE + 1, K_KEY + 1},
	{
		REQUEST_COLUMNS(LEDGER_SELECT_FIRST, LEDGER_SELECT_NEXT)
		" FROM idempotency.idempotency_keys"
		" WHERE scope OPERATOR(pg_catalog.=) $1 AND key OPERATOR(pg_catalog.=) $2",
		2, {TEXTOID, TEXTOID}
	}
};

/* A key as messages show it: "key" of scope "scope". */
char *
describe_request(text *key, text *scope)
{
	return psprintf("\"%s\" of scope \"%s\"", text_to_cstring(key), text_to_cstring(scope));
}

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
	"request", &request_ledger, expiry_cutoffs, is_due,
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

