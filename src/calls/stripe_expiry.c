/*-------------------------------------------------------------------------
 *
 * stripe_expiry.c
 *	  What the ledger of calls to Stripe no longer needs.
 *
 * Only what is settled, and so final, is ever touched: and of that not what a
 * person has to see yet, a call that succeeded while nobody is known to have
 * committed what went with it (the view stripe_orphans).
 *
 * After idempotency.stripe_body_retention such a row loses what was sent and what
 * came back, in its history, too; and keeps what the operation was, its keys,
 * what came of it and when.  It is deleted only where
 * idempotency.stripe_retention says so.
 *
 * The first cutoff is the moment up to which rows recorded are due, the second
 * is the clock.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/calls/stripe_expiry.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type_d.h"
#include "utils/timestamp.h"

#include "base/result_row.h"
#include "base/settings.h"
#include "calls/stripe_expiry.h"
#include "calls/stripe_ledger.h"

#define IS_SETTLED(cutoff) \
	"(" OUTCOME_IS("failed") " OR (" OUTCOME_IS("completed") \
	" AND (callers IS NULL OR acknowledged IS NOT NULL)))" \
	" AND recorded_at OPERATOR(pg_catalog.<=) " cutoff
#define HAS_BODY \
	"(request IS NOT NULL OR body IS NOT NULL OR response IS NOT NULL OR error IS NOT NULL)"

#define FIND_DUE(condition) \
	"SELECT account, operation_type, operation_id, token," \
	" recorded_at OPERATOR(pg_catalog.+) ($5 OPERATOR(pg_catalog.-) $4)" \
	" FROM idempotency.stripe_idempotency_keys" \
	" WHERE ROW(account, operation_type, operation_id)" \
	" OPERATOR(pg_catalog.>) ROW($1, $2, $3) AND " condition \
	" ORDER BY account, operation_type, operation_id LIMIT $6 OFFSET $7"

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
	return retention_cutoffs(setting_stripe_body_retention, now, cutoffs);
}

static bool
row_cutoffs(TimestampTz now, TimestampTz *cutoffs)
{
	return retention_cutoffs(setting_stripe_retention, now, cutoffs);
}

/* IS_SETTLED, in C */
static bool
is_row_due(TupleTableSlot *slot, const TimestampTz *cutoffs, TimestampTz *since)
{
	bool		isnull;
	Datum		value = slot_getattr(slot, S_RECORDED_AT + 1, &isnull);

	if (isnull || DatumGetTimestampTz(value) > cutoffs[0])
		return false;
	*since = DatumGetTimestampTz(value) + (cutoffs[1] - cutoffs[0]);

	switch (stripe_outcome_by_name(enum_label(slot_getattr(slot, S_OUTCOME + 1, &isnull))))
	{
		case STRIPE_FAILED:
			return true;
		case STRIPE_COMPLETED:
			return slot_attisnull(slot, S_CALLERS + 1) || !slot_attisnull(slot, S_ACKNOWLEDGED + 1);
		default:
			return false;
	}
}

/* IS_SETTLED and HAS_BODY, in C */
static bool
is_body_due(TupleTableSlot *slot, const TimestampTz *cutoffs, TimestampTz *since)
{
	bool		isnull;
	Datum		value = slot_getattr(slot, S_RECORDED_AT + 1, &isnull);

	if (isnull || DatumGetTimestampTz(value) > cutoffs[0])
		return false;
	if (slot_attisnull(slot, S_REQUEST + 1) && slot_attisnull(slot, S_BODY + 1) &&
		slot_attisnull(slot, S_RESPONSE + 1) && slot_attisnull(slot, S_ERROR + 1))
		return false;
	return is_row_due(slot, cutoffs, since);
}

/* IS_SETTLED is its condition, HAS_BODY its flag, recorded_at the time. */
static const LedgerIndex settled_index = {"stripe_idempotency_keys_settled_idx", true};

Expiry		stripe_body_expiry = {
	"stripe_body", &stripe_calls, body_cutoffs, is_body_due,
	{
		FIND_DUE(IS_SETTLED("$4") " AND " HAS_BODY),
		7, {TEXTOID, TEXTOID, TEXTOID, TIMESTAMPTZOID, TIMESTAMPTZOID, INT8OID, INT8OID}
	},
	{
		"UPDATE idempotency.stripe_idempotency_keys"
		" SET request = NULL, body = NULL, response = NULL, error = NULL,"
		" history = (SELECT pg_catalog.jsonb_agg(h.value OPERATOR(pg_catalog.-) 'error'::pg_catalog.text"
		" ORDER BY h.ordinality)"
		" FROM pg_catalog.jsonb_array_elements(history) WITH ORDINALITY h)"
		STRIPE_WHERE_KEY " AND token OPERATOR(pg_catalog.=) $4"
		" AND " IS_SETTLED("$5") " AND " HAS_BODY,
		6, {TEXTOID, TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, TIMESTAMPTZOID}
	},
	&settled_index, true
};

Expiry		stripe_expiry = {
	"stripe", &stripe_calls, row_cutoffs, is_row_due,
	{
		FIND_DUE(IS_SETTLED("$4")),
		7, {TEXTOID, TEXTOID, TEXTOID, TIMESTAMPTZOID, TIMESTAMPTZOID, INT8OID, INT8OID}
	},
	{
		"DELETE FROM idempotency.stripe_idempotency_keys"
		STRIPE_WHERE_KEY " AND token OPERATOR(pg_catalog.=) $4"
		" AND " IS_SETTLED("$5"),
		6, {TEXTOID, TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, TIMESTAMPTZOID}
	},
	&settled_index, false
};
