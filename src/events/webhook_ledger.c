/*-------------------------------------------------------------------------
 *
 * webhook_ledger.c
 *	  The ledger of events received from Stripe: its rows, and what is
 *	  written there.
 *
 * One row of stripe_webhook_events is one event of one account, for one
 * consumer: whoever else has to hear of it uses another name and gets a row of
 * its own.  The row's state is in its columns:
 *
 *	success true			processed: replayed until it expires
 *	success false			failed: free to be claimed again
 *	claimed_at set			claimed, by its transaction or until
 *							lease_expires_at; lapsed afterwards
 *	none of them			received
 *
 * next_attempt_at is when stripe_webhook_next() may hand the event out again.
 * Each claim books it in advance, for the case that nothing is ever recorded:
 * what fails or lapses waits twice as long each time, up to an hour.  After
 * idempotency.webhook_max_attempts it is infinity: the event is dead, until
 * somebody claims it.  What was never tried comes before what was, so that
 * events that fail never keep fresh ones waiting (webhook_queue.c).
 *
 * token is the fencing token of the last claim.  A row that was only received
 * has one, too, which nobody knows.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/events/webhook_ledger.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type_d.h"
#include "common/pg_prng.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"

#include "base/compat.h"
#include "base/json_member.h"
#include "base/parameters.h"
#include "base/settings.h"
#include "events/webhook_ledger.h"

/* How far apart two events of one fact may be. */
#define TWIN_USECS USECS_PER_HOUR

/* The whole key; in every statement $1 to $3. */
#define WHERE_KEY \
	" WHERE account OPERATOR(pg_catalog.=) $1" \
	" AND stripe_event_id OPERATOR(pg_catalog.=) $2" \
	" AND consumer OPERATOR(pg_catalog.=) $3"

/*
 * Which events may be removed, as a condition on stripe_webhook_events; "moment"
 * is an SQL expression for now less idempotency.webhook_retention.
 *
 * Only what was processed: an event that is received, claimed or failed still
 * has to be, however old it is.  Time counts from the receipt: Stripe can send
 * an event again for 30 days after it was made, and one whose row is gone by
 * then would be processed a second time.
 */
#define WEBHOOK_EVENT_IS_EXPIRED(moment) \
	"success AND received_at OPERATOR(pg_catalog.<=) " moment

/*
 * When may an event be handed out again that was tried "attempts" times, last
 * until "since"?  After a second, doubled with each attempt, up to an hour.
 * "limit" is idempotency.webhook_max_attempts; "jitter", from 0.5 to 1, keeps
 * events apart that have failed together.
 */
#define NEXT_ATTEMPT(attempts, since, limit, jitter) \
	"CASE WHEN " limit " OPERATOR(pg_catalog.>=) 0 AND " attempts " OPERATOR(pg_catalog.>=) " limit \
	" THEN 'infinity'::pg_catalog.timestamptz" \
	" ELSE " since " OPERATOR(pg_catalog.+) pg_catalog.make_interval(secs => " jitter \
	" OPERATOR(pg_catalog.*) LEAST(pg_catalog.power(2::pg_catalog.float8," \
	" (LEAST(" attempts ", 13) OPERATOR(pg_catalog.-) 1)::pg_catalog.float8), 3600::pg_catalog.float8)) END"

static const char *const event_columns[] = {
	EVENT_COLUMNS(LEDGER_NAME, LEDGER_NAME)
};

Ledger		webhook_events = {
	"stripe_webhook_events", event_columns, E_NCOLUMNS,
	3, {E_ACCOUNT + 1, E_STRIPE_EVENT_ID + 1, E_CONSUMER + 1},
	{SELECT_EVENT WHERE_KEY, 3, {TEXTOID, TEXTOID, TEXTOID}}
};

Relation
webhook_events_open(LOCKMODE lockmode)
{
	return ledger_open(&webhook_events, lockmode, false);
}

/* "evt_1" of account "acct_1" for consumer "mails", for messages */
char *
describe_event(const Datum *key)
{
	char	   *account = TextDatumGetCString(key[0]);
	char	   *consumer = TextDatumGetCString(key[2]);
	StringInfoData name;

	initStringInfo(&name);
	appendStringInfo(&name, "\"%s\"", TextDatumGetCString(key[1]));
	if (account[0] != '\0')
		appendStringInfo(&name, " of account \"%s\"", account);
	if (consumer[0] != '\0')
		appendStringInfo(&name, " for consumer \"%s\"", consumer);
	return name.data;
}

/* ---------- expiry ---------- */

static bool
expiry_cutoffs(TimestampTz now, TimestampTz *cutoffs)
{
	if (setting_webhook_retention < 0)
		return false;
	cutoffs[0] = now - (int64) setting_webhook_retention * USECS_PER_SEC;
	cutoffs[1] = now;
	return true;
}

/* WEBHOOK_EVENT_IS_EXPIRED, in C */
static bool
is_due(TupleTableSlot *slot, const TimestampTz *cutoffs, TimestampTz *since)
{
	bool		isnull;
	Datum		success = slot_getattr(slot, E_SUCCESS + 1, &isnull);

	if (isnull || !DatumGetBool(success))
		return false;
	*since = DatumGetTimestampTz(slot_getattr(slot, E_RECEIVED_AT + 1, &isnull));
	if (*since > cutoffs[0])
		return false;
	*since += cutoffs[1] - cutoffs[0];
	return true;
}

Expiry		webhook_expiry = {
	"webhook", &webhook_events, expiry_cutoffs, is_due,
	{
		"SELECT account, stripe_event_id, consumer, token,"
		" received_at OPERATOR(pg_catalog.+) ($5 OPERATOR(pg_catalog.-) $4)"
		" FROM idempotency.stripe_webhook_events"
		" WHERE ROW(account, stripe_event_id, consumer) OPERATOR(pg_catalog.>) ROW($1, $2, $3)"
		" AND " WEBHOOK_EVENT_IS_EXPIRED("$4")
		" ORDER BY account, stripe_event_id, consumer LIMIT $6 OFFSET $7",
		7, {TEXTOID, TEXTOID, TEXTOID, TIMESTAMPTZOID, TIMESTAMPTZOID, INT8OID, INT8OID}
	},
	{
		"DELETE FROM idempotency.stripe_webhook_events" WHERE_KEY
		" AND token OPERATOR(pg_catalog.=) $4 AND " WEBHOOK_EVENT_IS_EXPIRED("$5"),
		6, {TEXTOID, TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, TIMESTAMPTZOID}
	}
};

/* ---------- claims ---------- */

/* The key and the token of the claim. */
static void
begin_write(Parameters *p, const EventWrite *write)
{
	parameters_begin(p, write->key, LEDGER_MAX_KEYS);
	parameter_int64(p, write->token);
}

/* When the lease expires, and how long it is. */
static void
add_lease(Parameters *p, const EventWrite *write)
{
	bool		none = write->received_only || !write->lease.given;

	parameter_nullable(p, TimestampTzGetDatum(write->now + write->lease.usecs), none);
	parameter_nullable(p, none ? (Datum) 0 : interval_datum(write->lease.usecs), none);
}

/* What is kept of the body: payload_snapshot and payload. */
static void
add_payload(Parameters *p, const EventWrite *write)
{
	parameter_pointer(p, write->event == NULL ? NULL : write->event->json);
	parameter_pointer(p, setting_webhook_payload == WEBHOOK_PAYLOAD_ALL ? write->payload : NULL);
}

/* The limit of attempts, and the jitter of the next one. */
static void
add_back_off(Parameters *p)
{
	parameter_int32(p, setting_webhook_max_attempts);
	parameter_datum(p, Float8GetDatum(1.0 - pg_prng_double(&pg_global_prng_state) / 2));
}

static OwnerStatement insert_event = {
	"INSERT INTO idempotency.stripe_webhook_events"
	" (account, stripe_event_id, consumer, token, received_at, claimed_at,"
	" lease_expires_at, lease, attempts, pending_key, payload_snapshot, payload,"
	" created, livemode, order_id, correlation_id, event_type, api_version,"
	" object_type, object_id, request_id, idempotency_key, reference, checkout_session_id,"
	" next_attempt_at)"
	" VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15,"
	" $16, $17, $18, $19, $20, $21, $22, $23, $24,"
	" CASE WHEN $9 OPERATOR(pg_catalog.=) 0 THEN $5"
	" ELSE " NEXT_ATTEMPT("$9", "COALESCE($7, $5)", "$25", "$26") " END)"
	" ON CONFLICT DO NOTHING",
	26, {TEXTOID, TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, TIMESTAMPTZOID,
		TIMESTAMPTZOID, INTERVALOID, INT4OID, TEXTOID, JSONBOID, BYTEAOID,
		TIMESTAMPTZOID, BOOLOID, UUIDOID, UUIDOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID,
	TEXTOID, TEXTOID, TEXTOID, TEXTOID, INT4OID, FLOAT8OID}
};

/*
 * Write a new row, for an event that is claimed or only received.  Returns false
 * if there is one already.
 */
bool
webhook_row_insert(Relation rel, const EventWrite *write)
{
	const WebhookEvent *event = write->event;
	Parameters	p;

	begin_write(&p, write);
	parameter_timestamp(&p, write->now);
	parameter_nullable(&p, TimestampTzGetDatum(write->now), write->received_only);
	add_lease(&p, write);
	parameter_int32(&p, write->received_only ? 0 : 1);
	parameter_string(&p, write->pending_key);
	add_payload(&p, write);
	parameter_nullable(&p, TimestampTzGetDatum(event->created), !event->created_known);
	parameter_nullable(&p, BoolGetDatum(event->livemode), !event->livemode_known);
	parameter_pointer(&p, event->order_id);
	parameter_pointer(&p, event->correlation_id);
	parameter_string(&p, event->type);
	parameter_string(&p, event->api_version);
	parameter_string(&p, event->object_type);
	parameter_string(&p, event->object_id);
	parameter_string(&p, event->request_id);
	parameter_string(&p, event->idempotency_key);
	parameter_string(&p, event->reference);
	parameter_string(&p, event->checkout_session_id);
	add_back_off(&p);
	return ledger_execute(rel, &insert_event, p.values, p.nulls, NULL, NULL, 0) > 0;
}

/*
 * $5: the clock, $11: the token that is taken over, $12: the attempt, $15: who
 * has an event run again, or NULL.  The last 20 times of that are kept.
 */
static OwnerStatement take_event = {
	"UPDATE idempotency.stripe_webhook_events SET token = $4, claimed_at = $5,"
	" lease_expires_at = $6, lease = $7, attempts = $12,"
	" success = NULL, processed_at = NULL, pending_key = $8,"
	" payload_snapshot = COALESCE(payload_snapshot, $9), payload = COALESCE(payload, $10),"
	" next_attempt_at = " NEXT_ATTEMPT("$12", "COALESCE($6, $5)", "$13", "$14") ","
	" reclaimed = CASE WHEN $15 IS NULL THEN reclaimed ELSE"
	" CASE WHEN pg_catalog.jsonb_array_length(reclaimed) OPERATOR(pg_catalog.>=) 20"
	" THEN reclaimed OPERATOR(pg_catalog.-) 0"
	" ELSE COALESCE(reclaimed, '[]'::pg_catalog.jsonb) END OPERATOR(pg_catalog.||)"
	" pg_catalog.jsonb_build_object('at', $5, 'by', $15, 'success', success,"
	" 'attempts', attempts, 'processed_at', processed_at, 'error', error_message) END"
	WHERE_KEY
	" AND token OPERATOR(pg_catalog.=) $11 AND (success IS NOT TRUE OR $15 IS NOT NULL)"
	" AND (lease_expires_at IS NULL OR lease_expires_at OPERATOR(pg_catalog.<=) $5)",
	15, {TEXTOID, TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, TIMESTAMPTZOID,
		INTERVALOID, TEXTOID, JSONBOID, BYTEAOID, INT8OID, INT4OID, INT4OID,
	FLOAT8OID, TEXTOID}
};

/*
 * Take a row over from its last claimant, or its receipt.  "seen_token" is the
 * token that it has to have for that.  Returns false if it has changed since.
 */
bool
webhook_row_take(Relation rel, const EventWrite *write, int64 seen_token, int attempt)
{
	Parameters	p;

	begin_write(&p, write);
	parameter_timestamp(&p, write->now);
	add_lease(&p, write);
	parameter_string(&p, write->pending_key);
	add_payload(&p, write);
	parameter_int64(&p, seen_token);
	parameter_int32(&p, attempt);
	add_back_off(&p);
	parameter_string(&p, write->again_by);
	return ledger_execute(rel, &take_event, p.values, p.nulls, NULL, NULL, 0) > 0;
}

static OwnerStatement renew_claim = {
	"UPDATE idempotency.stripe_webhook_events SET claimed_at = $5, lease_expires_at = $6,"
	" next_attempt_at = next_attempt_at OPERATOR(pg_catalog.+)"
	" ($6 OPERATOR(pg_catalog.-) lease_expires_at)"
	WHERE_KEY " AND token OPERATOR(pg_catalog.=) $4",
	6, {TEXTOID, TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, TIMESTAMPTZOID}
};

/* A claim with a lease was written a while ago: the lease starts now. */
void
webhook_row_renew(Relation rel, const EventWrite *write, TimestampTz now)
{
	Parameters	p;

	begin_write(&p, write);
	parameter_timestamp(&p, now);
	parameter_timestamp(&p, now + write->lease.usecs);
	if (ledger_execute(rel, &renew_claim, p.values, NULL, NULL, NULL, 0) != 1)
		elog(ERROR, "lost a claim of this transaction");
}

/* ---------- what came of an event ---------- */

/* $11: is the payload to be forgotten?  Not while it may settle a call yet. */
static OwnerStatement record_event = {
	"UPDATE idempotency.stripe_webhook_events SET processed_at = $5, success = $6,"
	" error_message = $7, reference = COALESCE($8, reference),"
	" order_id = COALESCE($9, order_id), correlation_id = COALESCE($10, correlation_id),"
	" payload_snapshot = CASE WHEN $11 AND pending_key IS NULL THEN NULL ELSE payload_snapshot END,"
	" payload = CASE WHEN $11 AND pending_key IS NULL THEN NULL ELSE payload END,"
	" lease = NULL, lease_expires_at = NULL, next_attempt_at = CASE WHEN $6 THEN $5"
	" ELSE " NEXT_ATTEMPT("attempts", "$5", "$12", "$13") " END"
	WHERE_KEY
	" AND token OPERATOR(pg_catalog.=) $4 AND claimed_at IS NOT NULL AND success IS NULL"
	" RETURNING next_attempt_at, attempts",
	13, {TEXTOID, TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, BOOLOID, TEXTOID,
	TEXTOID, UUIDOID, UUIDOID, BOOLOID, INT4OID, FLOAT8OID}
};

/*
 * Record what came of an event.  Returns false if it is not claimed with this
 * token, or was recorded already.
 */
bool
webhook_row_record(Relation rel, const Datum *key, int64 token, EventResult *result)
{
	Parameters	p;
	Datum		out[2];
	bool		outnull[2];

	parameters_begin(&p, key, LEDGER_MAX_KEYS);
	parameter_int64(&p, token);
	parameter_timestamp(&p, GetCurrentTimestamp());
	parameter_bool(&p, result->success);
	parameter_string(&p, result->message);
	parameter_nullable(&p, result->reference.value, result->reference.isnull);
	parameter_nullable(&p, result->order_id.value, result->order_id.isnull);
	parameter_nullable(&p, result->correlation_id.value, result->correlation_id.isnull);
	parameter_bool(&p, result->success && setting_webhook_payload == WEBHOOK_PAYLOAD_NONE);
	add_back_off(&p);
	if (ledger_execute(rel, &record_event, p.values, p.nulls, out, outnull, 2) == 0)
		return false;

	result->next_attempt_at = DatumGetTimestampTz(out[0]);
	result->attempts = DatumGetInt32(out[1]);
	return true;
}

/* ---------- what else is known of an object ---------- */

/*
 * $3: object, $4: created, $5: type, $6: the event itself, $7: request, $8: data,
 * $9 and $10: when its twin may have been made
 */
static OwnerStatement find_relatives = {
	"SELECT (SELECT e.stripe_event_id FROM idempotency.stripe_webhook_events e"
	" WHERE e.account OPERATOR(pg_catalog.=) $1 AND e.consumer OPERATOR(pg_catalog.=) $2"
	" AND e.object_id OPERATOR(pg_catalog.=) $3 AND e.success"
	" AND e.created OPERATOR(pg_catalog.>) $4"
	" ORDER BY e.created DESC LIMIT 1),"
	" (SELECT e.stripe_event_id FROM idempotency.stripe_webhook_events e"
	" WHERE e.account OPERATOR(pg_catalog.=) $1 AND e.consumer OPERATOR(pg_catalog.=) $2"
	" AND e.object_id OPERATOR(pg_catalog.=) $3 AND e.success"
	" AND e.event_type OPERATOR(pg_catalog.=) $5"
	" AND e.stripe_event_id OPERATOR(pg_catalog.<>) $6"
	" AND e.created OPERATOR(pg_catalog.>=) $9 AND e.created OPERATOR(pg_catalog.<=) $10"
	" AND COALESCE(e.request_id, '') OPERATOR(pg_catalog.=) COALESCE($7, '')"
	" AND e.payload_snapshot OPERATOR(pg_catalog.->) 'data'::pg_catalog.text OPERATOR(pg_catalog.=) $8"
	" ORDER BY e.processed_at LIMIT 1)",
	10, {TEXTOID, TEXTOID, TEXTOID, TIMESTAMPTZOID, TEXTOID, TEXTOID, TEXTOID, JSONBOID,
	TIMESTAMPTZOID, TIMESTAMPTZOID}
};

/*
 * Which processed events should the claimant of this one know of?  values[] and
 * isnull[] are set to superseded_by and twin_of.
 */
void
webhook_find_relatives(Relation rel, const Datum *key, const WebhookEvent *event,
					   Datum *values, bool *isnull)
{
	Parameters	p;

	isnull[0] = isnull[1] = true;
	if (event->object_id == NULL || !event->created_known)
		return;

	parameters_begin(&p, NULL, 0);
	parameter_datum(&p, key[0]);
	parameter_datum(&p, key[2]);
	parameter_string(&p, event->object_id);
	parameter_timestamp(&p, event->created);
	parameter_string(&p, event->type);
	parameter_datum(&p, key[1]);
	parameter_string(&p, event->request_id);
	parameter_pointer(&p, json_member_copy(&event->json->root, "data"));
	parameter_timestamp(&p, event->created - TWIN_USECS);
	parameter_timestamp(&p, event->created + TWIN_USECS);
	(void) ledger_execute_latest(rel, &find_relatives, p.values, p.nulls, values, isnull, 2);
}
