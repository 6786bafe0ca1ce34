/*-------------------------------------------------------------------------
 *
 * webhooks.c
 *	  SQL functions for the events that Stripe sends.
 *
 * One row of stripe_webhook_events is one event of one account, for one
 * consumer: whoever else has to hear of it uses another name and gets a row
 * of its own.  Its state is in its columns:
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
 * events that fail never keep fresh ones waiting.
 *
 * token is the fencing token of the last claim.  A row that was only received
 * has one, too, which nobody knows.
 *
 * Nothing is stored, and nothing parsed, before the signature was found to be
 * good.  An event's row and what it settles among the calls that were sent
 * (settle_by_event.c) are written by the caller's transaction, along with
 * whatever the application makes of it.
 *
 * Stripe delivers at least once, in no order, and may have made two events of
 * one fact.  The first is what the ledger is for.  About the other two it can
 * only tell, when an event is claimed, what is in the table at that moment:
 * superseded_by is an event about the same object that Stripe made in a later
 * second and that has been processed; twin_of is one of the same type, object,
 * request and data, made within an hour of it, that has been processed.  The
 * order of events within a second isn't known to anybody, so nothing is said
 * about it.
 *
 * stripe_webhook_next() hands out no event while another one of the same object
 * is claimed (webhook_queue.c), so that what superseded_by says still holds when
 * its claimant is done.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/events/webhooks.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/pg_type_d.h"
#include "common/pg_prng.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/uuid.h"

#include "base/arguments.h"
#include "base/clock.h"
#include "base/compat.h"
#include "base/errors.h"
#include "base/json_member.h"
#include "base/notify.h"
#include "base/result_row.h"
#include "base/settings.h"
#include "base/settings_guard.h"
#include "calls/settle_by_event.h"
#include "events/webhook_payload.h"
#include "events/webhook_queue.h"
#include "events/webhook_secret.h"
#include "events/webhooks.h"
#include "ledger/expiry.h"
#include "ledger/ledger.h"
#include "ledger/open_claims.h"
#include "stripe/webhook_event.h"
#include "stripe/webhook_signature.h"

PG_FUNCTION_INFO_V1(idempotency_stripe_webhook_verify);
PG_FUNCTION_INFO_V1(idempotency_stripe_webhook_verify_text);
PG_FUNCTION_INFO_V1(idempotency_stripe_webhook_is_valid);
PG_FUNCTION_INFO_V1(idempotency_stripe_webhook_is_valid_text);
PG_FUNCTION_INFO_V1(idempotency_stripe_webhook_claim);
PG_FUNCTION_INFO_V1(idempotency_stripe_webhook_claim_text);
PG_FUNCTION_INFO_V1(idempotency_stripe_webhook_record);
PG_FUNCTION_INFO_V1(idempotency_stripe_webhook_receive);
PG_FUNCTION_INFO_V1(idempotency_stripe_webhook_receive_text);
PG_FUNCTION_INFO_V1(idempotency_stripe_webhook_next);
PG_FUNCTION_INFO_V1(idempotency_stripe_webhook_reclaim);
PG_FUNCTION_INFO_V1(idempotency_stripe_webhook_again);

/* Events that wait to settle a call, looked at where none is to be handed out. */
#define IDLE_KEPT_EVENTS 20

/* How far apart two events of one fact may be. */
#define TWIN_USECS USECS_PER_HOUR

static const char *const event_columns[E_NCOLUMNS] = {
	"token", "received_at", "claimed_at", "lease_expires_at", "processed_at",
	"created", "lease", "attempts", "success", "livemode", "order_id",
	"correlation_id", "account", "stripe_event_id", "consumer", "event_type",
	"api_version", "object_type", "object_id", "request_id", "idempotency_key",
	"reference", "checkout_session_id", "error_message", "pending_key",
	"payload_snapshot", "payload", "next_attempt_at", "reclaimed"
};

/* Columns of webhook_claim_result. */
enum
{
	C_VERDICT, C_STRIPE_EVENT_ID, C_EVENT_TYPE, C_EVENT, C_TOKEN, C_ATTEMPT,
	C_ACCOUNT, C_LIVEMODE, C_CREATED, C_OBJECT_TYPE, C_OBJECT_ID,
	C_SUPERSEDED_BY, C_TWIN_OF, C_LAST_ERROR, C_RETRY_AFTER, C_NCOLUMNS
};

/* Columns of webhook_receipt. */
enum
{
	R_STORED, R_STRIPE_EVENT_ID, R_EVENT_TYPE, R_ACCOUNT, R_NCOLUMNS
};

/* The whole key; in every statement $1 to $3. */
#define WHERE_KEY \
	" WHERE account OPERATOR(pg_catalog.=) $1" \
	" AND stripe_event_id OPERATOR(pg_catalog.=) $2" \
	" AND consumer OPERATOR(pg_catalog.=) $3"

/*
 * When an event may be handed out again that was tried "attempts" times, last
 * until "since": after a second, doubled with each attempt, up to an hour.
 * "limit" is idempotency.webhook_max_attempts; "jitter", from 0.5 to 1, keeps
 * those apart that have failed together.
 */
#define NEXT_ATTEMPT(attempts, since, limit, jitter) \
	"CASE WHEN " limit " OPERATOR(pg_catalog.>=) 0 AND " attempts " OPERATOR(pg_catalog.>=) " limit \
	" THEN 'infinity'::pg_catalog.timestamptz" \
	" ELSE " since " OPERATOR(pg_catalog.+) pg_catalog.make_interval(secs => " jitter \
	" OPERATOR(pg_catalog.*) LEAST(pg_catalog.power(2::pg_catalog.float8," \
	" (LEAST(" attempts ", 13) OPERATOR(pg_catalog.-) 1)::pg_catalog.float8), 3600::pg_catalog.float8)) END"

Ledger		webhook_events = {
	"stripe_webhook_events", event_columns, E_NCOLUMNS,
	3, {E_ACCOUNT + 1, E_STRIPE_EVENT_ID + 1, E_CONSUMER + 1},
	{EVENT_COLUMNS WHERE_KEY, 3, {TEXTOID, TEXTOID, TEXTOID}}
};

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
 * $11: the token that is taken over; $5 is the clock, too.  $12: the attempt;
 * $15: who has an event run again, or NULL.  The last 20 times of that are kept.
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

static OwnerStatement renew_claim = {
	"UPDATE idempotency.stripe_webhook_events SET claimed_at = $5, lease_expires_at = $6,"
	" next_attempt_at = next_attempt_at OPERATOR(pg_catalog.+)"
	" ($6 OPERATOR(pg_catalog.-) lease_expires_at)"
	WHERE_KEY " AND token OPERATOR(pg_catalog.=) $4",
	6, {TEXTOID, TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, TIMESTAMPTZOID}
};

/* $11: is the payload to be forgotten?  Not where it may settle a call yet. */
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

/* The ledger's table, for whoever looks at its rows by other ways. */
Relation
webhook_events_open(LOCKMODE lockmode)
{
	return ledger_open(&webhook_events, lockmode, false);
}

/* ---------- arguments and messages ---------- */

/* An event id, an account or a consumer. */
static text *
argument_label(FunctionCallInfo fcinfo, int argno, bool may_be_empty, const char *name)
{
	text	   *value = argument_text(fcinfo, argno, name);

	check_label(VARDATA_ANY(value), VARSIZE_ANY_EXHDR(value), may_be_empty, name);
	return value;
}

/* "evt_1" of account "acct_1" for consumer "mails", for messages */
static char *
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

static void
set_text(Datum *values, char *nulls, int i, const char *text)
{
	nulls[i] = text == NULL ? 'n' : ' ';
	values[i] = text == NULL ? (Datum) 0 : CStringGetTextDatum(text);
}

/* A parameter passed by reference, which may be missing. */
static void
set_pointer(Datum *values, char *nulls, int i, const void *pointer)
{
	nulls[i] = pointer == NULL ? 'n' : ' ';
	values[i] = PointerGetDatum(pointer);
}

/* ---------- the signature ---------- */

/* Arguments payload, signature, secrets, tolerance, from the first on. */
static WebhookVerdict
verify(FunctionCallInfo fcinfo, const bytea *payload)
{
	text	   *header = PG_ARGISNULL(1) ? NULL : PG_GETARG_TEXT_PP(1);
	Duration	tolerance = argument_duration(fcinfo, 3, "tolerance");
	WebhookSecret *secrets;
	int			nsecrets;
	TimestampTz now;

	check_settings();
	nsecrets = webhook_secrets(fcinfo, 2, &secrets);
	now = GetCurrentTimestamp();

	return webhook_verify(VARDATA_ANY(payload), VARSIZE_ANY_EXHDR(payload),
						  header == NULL ? NULL : VARDATA_ANY(header),
						  header == NULL ? 0 : VARSIZE_ANY_EXHDR(header),
						  secrets, nsecrets,
						  unix_seconds(now),
						  tolerance.given ? tolerance.usecs :
						  (int64) setting_webhook_tolerance * USECS_PER_SEC);
}

/*
 * stripe_webhook_verify(payload, signature, secrets, tolerance)
 */
Datum
idempotency_stripe_webhook_verify(PG_FUNCTION_ARGS)
{
	WebhookBytes payload = payload_of_bytea(fcinfo, 0);

	PG_RETURN_TEXT_P(cstring_to_text(webhook_verdict_word(verify(fcinfo, payload.bytes))));
}

Datum
idempotency_stripe_webhook_verify_text(PG_FUNCTION_ARGS)
{
	WebhookBytes payload = payload_of_text(fcinfo, 0);

	PG_RETURN_TEXT_P(cstring_to_text(webhook_verdict_word(verify(fcinfo, payload.bytes))));
}

/*
 * stripe_webhook_is_valid(payload, signature, secrets, tolerance)
 */
Datum
idempotency_stripe_webhook_is_valid(PG_FUNCTION_ARGS)
{
	WebhookBytes payload = payload_of_bytea(fcinfo, 0);

	PG_RETURN_BOOL(verify(fcinfo, payload.bytes) == WEBHOOK_VALID);
}

Datum
idempotency_stripe_webhook_is_valid_text(PG_FUNCTION_ARGS)
{
	WebhookBytes payload = payload_of_text(fcinfo, 0);

	PG_RETURN_BOOL(verify(fcinfo, payload.bytes) == WEBHOOK_VALID);
}

static const char *
signature_hint(WebhookVerdict verdict, bool of_text)
{
	switch (verdict)
	{
		case WEBHOOK_NO_SIGNATURE:
		case WEBHOOK_MALFORMED_HEADER:
			return _("Pass the header Stripe-Signature as it came.");
		case WEBHOOK_NO_MATCHING_SIGNATURE:
			return of_text ?
				_("Pass the body as it came, not parsed and written again, and as bytea if it may have been decoded from anything but UTF-8; and the secret of the endpoint that it came to.") :
				_("Pass the body's bytes as they came, not parsed and written again; and the secret of the endpoint that they came to.");
		case WEBHOOK_TOO_OLD:
			return _("Stripe signs each delivery anew. Compare the clocks, and see idempotency.webhook_tolerance.");
		case WEBHOOK_NO_SECRET:
			return _("Set idempotency.webhook_secret_file, or pass the endpoint's secret.");
		case WEBHOOK_VALID:
			break;
	}
	return "";
}

static void
refuse_body(const char *word, const char *message)
{
	ereport(ERROR,
			(errcode(ERRCODE_WEBHOOK_REFUSED),
			 errmsg("%s", message),
			 errdetail_internal("%s", word)));
}

/*
 * Verify and parse what has come in; raises IK004 for whatever isn't an event
 * signed by Stripe.
 */
static void
take_in(FunctionCallInfo fcinfo, WebhookBytes payload, WebhookEvent *event)
{
	WebhookVerdict verdict = verify(fcinfo, payload.bytes);

	if (verdict != WEBHOOK_VALID)
		ereport(ERROR,
				(errcode(ERRCODE_WEBHOOK_REFUSED),
				 errmsg("webhook is not signed by Stripe, as far as this can be told"),
				 errdetail_internal("%s", webhook_verdict_word(verdict)),
				 errhint("%s", signature_hint(verdict, payload.of_text))));

	switch (webhook_body_parse(VARDATA_ANY(payload.bytes), VARSIZE_ANY_EXHDR(payload.bytes),
							   event))
	{
		case WEBHOOK_BODY_EVENT:
			break;
		case WEBHOOK_BODY_NOT_JSON:
			refuse_body("not_json", _("webhook body is not JSON in UTF-8 that jsonb can hold"));
			break;
		case WEBHOOK_BODY_NOT_AN_EVENT:
			refuse_body("not_an_event", _("webhook body is not an event"));
			break;
	}

	if (setting_webhook_livemode != WEBHOOK_LIVEMODE_ANY &&
		(!event->livemode_known ||
		 event->livemode != (setting_webhook_livemode == WEBHOOK_LIVEMODE_LIVE)))
		refuse_body("wrong_livemode",
					setting_webhook_livemode == WEBHOOK_LIVEMODE_LIVE ?
					_("webhook is an event of Stripe's test mode, and live ones are expected") :
					_("webhook is an event of Stripe's live mode, and test ones are expected"));
}

/* ---------- claim ---------- */

typedef struct EventClaim
{
	LedgerClaim base;
	bool		receive;		/* keep the event only, don't claim it */
	const char *again_by;		/* who has it run again, whatever came of it */
	const WebhookEvent *event;	/* NULL: as stored */
	bytea	   *payload;
	const char *pending_key;	/* how it may settle a call later */
	Duration	lease;
	int64		token;
	bool		claimed;
	ResultRow	result;
} EventClaim;

static void
answer_copy(EventClaim *claim, int column, LedgerRow *row, int source)
{
	result_copy(&claim->result, column, row->values[source], row->isnull[source]);
}

/* What the row says about the event itself. */
static void
answer_event(EventClaim *claim, LedgerRow *row)
{
	answer_copy(claim, C_STRIPE_EVENT_ID, row, E_STRIPE_EVENT_ID);
	answer_copy(claim, C_EVENT_TYPE, row, E_EVENT_TYPE);
	if (claim->event == NULL)
		answer_copy(claim, C_EVENT, row, E_PAYLOAD_SNAPSHOT);
	answer_copy(claim, C_ATTEMPT, row, E_ATTEMPTS);
	answer_copy(claim, C_ACCOUNT, row, E_ACCOUNT);
	answer_copy(claim, C_LIVEMODE, row, E_LIVEMODE);
	answer_copy(claim, C_CREATED, row, E_CREATED);
	answer_copy(claim, C_OBJECT_TYPE, row, E_OBJECT_TYPE);
	answer_copy(claim, C_OBJECT_ID, row, E_OBJECT_ID);
	answer_copy(claim, C_LAST_ERROR, row, E_ERROR_MESSAGE);
}

static void
answer_in_progress(EventClaim *claim, int retry_after)
{
	result_set_enum(&claim->result, C_VERDICT, "in_progress");
	result_set(&claim->result, C_RETRY_AFTER, Int32GetDatum(retry_after));
}

/*
 * An event that is only to be kept can't be said to be kept while it may still
 * vanish with another's transaction: Stripe wouldn't send it again.
 */
static void
busy(LedgerClaim *base)
{
	EventClaim *claim = (EventClaim *) base;

	if (claim->receive)
		ereport(ERROR,
				(errcode(ERRCODE_LOCK_NOT_AVAILABLE),
				 errmsg("event %s is being processed by another transaction",
						describe_event(base->key)),
				 errhint("Answer with an error, so that Stripe delivers it again.")));

	answer_in_progress(claim, 1);
	result_set(&claim->result, C_STRIPE_EVENT_ID, base->key[1]);
	result_set(&claim->result, C_ACCOUNT, base->key[0]);
}

static bool
is_processed(LedgerRow *row)
{
	return !row->isnull[E_SUCCESS] && DatumGetBool(row->values[E_SUCCESS]);
}

static LedgerDecision
decide(LedgerClaim *base, LedgerRow *row, TimestampTz now)
{
	EventClaim *claim = (EventClaim *) base;

	if (claim->receive)
	{
		result_set(&claim->result, R_STORED, BoolGetDatum(false));
		return LEDGER_ANSWER;
	}

	result_reset(&claim->result);
	answer_event(claim, row);

	if (is_processed(row) && claim->again_by == NULL)
	{
		result_set_enum(&claim->result, C_VERDICT, "replay");
		return LEDGER_ANSWER;
	}
	if (is_processed(row) && row->isnull[E_PAYLOAD_SNAPSHOT])
		ereport(ERROR,
				(errcode(ERRCODE_CONTRADICTS_RECORD),
				 errmsg("what event %s said is not kept", describe_event(base->key)),
				 errdetail("idempotency.webhook_payload was \"none\" when it was processed."),
				 errhint("Have Stripe send it again, or look at the object at Stripe.")));

	if (!row->isnull[E_LEASE_EXPIRES_AT] &&
		DatumGetTimestampTz(row->values[E_LEASE_EXPIRES_AT]) > now)
	{
		answer_in_progress(claim,
						   ledger_retry_after(DatumGetTimestampTz(row->values[E_LEASE_EXPIRES_AT]), now));
		return LEDGER_ANSWER;
	}

	/* claimed by this transaction, and not recorded */
	if (row->own && !row->isnull[E_CLAIMED_AT] && row->isnull[E_SUCCESS])
	{
		answer_in_progress(claim, 1);
		return LEDGER_ANSWER;
	}

	return LEDGER_TAKE;
}

/* The key and the new token; nulls has room for all parameters. */
static void
claim_parameters(EventClaim *claim, Datum *values, char *nulls)
{
	claim->token = ledger_new_token();

	memset(nulls, ' ', OWNER_STATEMENT_MAX_ARGS);
	memcpy(values, claim->base.key, sizeof(claim->base.key));
	values[3] = Int64GetDatum(claim->token);
}

/* The limit of attempts, and the jitter of the next one. */
static void
set_back_off(Datum *values, int i)
{
	values[i] = Int32GetDatum(setting_webhook_max_attempts);
	values[i + 1] = Float8GetDatum(1.0 - pg_prng_double(&pg_global_prng_state) / 2);
}

static void
set_lease(EventClaim *claim, TimestampTz now, Datum *values, char *nulls, int i)
{
	if (claim->lease.given)
	{
		values[i] = TimestampTzGetDatum(now + claim->lease.usecs);
		values[i + 1] = interval_datum(claim->lease.usecs);
	}
	else
		nulls[i] = nulls[i + 1] = 'n';
}

/* What of the body is kept: i is payload_snapshot, i + 1 payload. */
static void
set_payload(EventClaim *claim, Datum *values, char *nulls, int i)
{
	set_pointer(values, nulls, i, claim->event == NULL ? NULL : claim->event->json);
	set_pointer(values, nulls, i + 1,
				setting_webhook_payload == WEBHOOK_PAYLOAD_ALL ? claim->payload : NULL);
}

/*
 * Which processed events should the claimant of this one know of?
 */
static void
answer_relatives(EventClaim *claim, Relation rel, const WebhookEvent *event)
{
	Jsonb	   *data = json_member_copy(&event->json->root, "data");
	Datum		values[10];
	char		nulls[] = "          ";
	Datum		out[2];
	bool		outnull[2];

	if (event->object_id == NULL || !event->created_known)
		return;

	values[0] = claim->base.key[0];
	values[1] = claim->base.key[2];
	values[2] = CStringGetTextDatum(event->object_id);
	values[3] = TimestampTzGetDatum(event->created);
	values[4] = CStringGetTextDatum(event->type);
	values[5] = claim->base.key[1];
	set_text(values, nulls, 6, event->request_id);
	set_pointer(values, nulls, 7, data);
	values[8] = TimestampTzGetDatum(event->created - TWIN_USECS);
	values[9] = TimestampTzGetDatum(event->created + TWIN_USECS);
	(void) ledger_execute_latest(rel, &find_relatives, values, nulls, out, outnull, 2);
	result_copy(&claim->result, C_SUPERSEDED_BY, out[0], outnull[0]);
	result_copy(&claim->result, C_TWIN_OF, out[1], outnull[1]);
}

static void
answer_claimed(EventClaim *claim, Relation rel, const WebhookEvent *event, int attempt)
{
	claim->claimed = true;
	result_set_enum(&claim->result, C_VERDICT, "claimed");
	result_set(&claim->result, C_TOKEN, Int64GetDatum(claim->token));
	result_set(&claim->result, C_ATTEMPT, Int32GetDatum(attempt));
	if (event != NULL)
		answer_relatives(claim, rel, event);
}

static bool
insert(LedgerClaim *base, Relation rel, TimestampTz now)
{
	EventClaim *claim = (EventClaim *) base;
	const WebhookEvent *event = claim->event;
	Datum		values[26];
	char		nulls[OWNER_STATEMENT_MAX_ARGS];

	if (event == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("event %s is not known", describe_event(base->key)),
				 errdetail("It was never received, or has expired.")));

	claim_parameters(claim, values, nulls);
	values[4] = TimestampTzGetDatum(now);
	values[5] = TimestampTzGetDatum(now);
	if (claim->receive)
		nulls[5] = nulls[6] = nulls[7] = 'n';
	else
		set_lease(claim, now, values, nulls, 6);
	values[8] = Int32GetDatum(claim->receive ? 0 : 1);
	set_text(values, nulls, 9, claim->pending_key);
	set_payload(claim, values, nulls, 10);
	values[12] = TimestampTzGetDatum(event->created);
	nulls[12] = event->created_known ? ' ' : 'n';
	values[13] = BoolGetDatum(event->livemode);
	nulls[13] = event->livemode_known ? ' ' : 'n';
	set_pointer(values, nulls, 14, event->order_id);
	set_pointer(values, nulls, 15, event->correlation_id);
	set_text(values, nulls, 16, event->type);
	set_text(values, nulls, 17, event->api_version);
	set_text(values, nulls, 18, event->object_type);
	set_text(values, nulls, 19, event->object_id);
	set_text(values, nulls, 20, event->request_id);
	set_text(values, nulls, 21, event->idempotency_key);
	set_text(values, nulls, 22, event->reference);
	set_text(values, nulls, 23, event->checkout_session_id);
	set_back_off(values, 24);
	if (ledger_execute(rel, &insert_event, values, nulls, NULL, NULL, 0) == 0)
		return false;

	if (claim->receive)
	{
		if (setting_webhook_notify)
			hint_at_commit("idempotency_event", TextDatumGetCString(base->key[2]));
		result_set(&claim->result, R_STORED, BoolGetDatum(true));
		return true;
	}

	result_reset(&claim->result);
	result_set(&claim->result, C_STRIPE_EVENT_ID, base->key[1]);
	result_set(&claim->result, C_ACCOUNT, base->key[0]);
	result_set_text(&claim->result, C_EVENT_TYPE, event->type);
	if (event->livemode_known)
		result_set(&claim->result, C_LIVEMODE, BoolGetDatum(event->livemode));
	if (event->created_known)
		result_set(&claim->result, C_CREATED, TimestampTzGetDatum(event->created));
	result_set_text(&claim->result, C_OBJECT_TYPE, event->object_type);
	result_set_text(&claim->result, C_OBJECT_ID, event->object_id);
	answer_claimed(claim, rel, event, 1);
	return true;
}

static bool
take(LedgerClaim *base, Relation rel, LedgerRow *row, TimestampTz now)
{
	EventClaim *claim = (EventClaim *) base;
	const WebhookEvent *event = claim->event;
	const char *pending_key = claim->pending_key;
	WebhookEvent stored;
	Datum		values[15];
	char		nulls[OWNER_STATEMENT_MAX_ARGS];
	int			attempt = claim->again_by != NULL ? 1 :
		DatumGetInt32(row->values[E_ATTEMPTS]) + 1;

	if (event == NULL)
	{
		pending_key = row->isnull[E_PENDING_KEY] ? NULL :
			TextDatumGetCString(row->values[E_PENDING_KEY]);
		if (!row->isnull[E_PAYLOAD_SNAPSHOT] &&
			webhook_event_read(DatumGetJsonbP(row->values[E_PAYLOAD_SNAPSHOT]), &stored))
		{
			event = &stored;
			if (pending_key != NULL)
				pending_key = settle_by_event(event);
		}
	}

	claim_parameters(claim, values, nulls);
	values[4] = TimestampTzGetDatum(now);
	set_lease(claim, now, values, nulls, 5);
	set_text(values, nulls, 7, pending_key);
	set_payload(claim, values, nulls, 8);
	values[10] = row->values[E_TOKEN];
	values[11] = Int32GetDatum(attempt);
	set_back_off(values, 12);
	set_text(values, nulls, 14, claim->again_by);
	if (ledger_execute(rel, &take_event, values, nulls, NULL, NULL, 0) == 0)
		return false;

	answer_claimed(claim, rel, event, attempt);
	return true;
}

/* The claim waited while it was written: its lease starts when it answers. */
static void
renew(LedgerClaim *base, Relation rel, TimestampTz now)
{
	EventClaim *claim = (EventClaim *) base;
	Datum		values[6];

	if (claim->receive || !claim->lease.given)
		return;

	memcpy(values, claim->base.key, sizeof(claim->base.key));
	values[3] = Int64GetDatum(claim->token);
	values[4] = TimestampTzGetDatum(now);
	values[5] = TimestampTzGetDatum(now + claim->lease.usecs);
	if (ledger_execute(rel, &renew_claim, values, NULL, NULL, NULL, 0) != 1)
		elog(ERROR, "lost a claim of this transaction");
}

static void
begin_claim(EventClaim *claim, Datum account, Datum id, Datum consumer)
{
	claim->base.key[0] = account;
	claim->base.key[1] = id;
	claim->base.key[2] = consumer;
	claim->base.decide = decide;
	claim->base.insert = insert;
	claim->base.take = take;
	claim->base.renew = renew;
	claim->base.busy = busy;
}

/* A claim without a lease belongs to its transaction. */
static void
end_claim(EventClaim *claim)
{
	if (claim->claimed && !claim->lease.given)
		open_claims_add(claim->token, "Stripe event", describe_event(claim->base.key));
}

/*
 * stripe_webhook_claim(payload, signature, secrets, tolerance, lease, wait,
 *						consumer)
 */
static Datum
claim_event(FunctionCallInfo fcinfo, WebhookBytes payload)
{
	EventClaim	claim;
	WebhookEvent event;
	text	   *consumer;
	Relation	rel;

	PreventCommandDuringRecovery("idempotency.stripe_webhook_claim()");

	memset(&claim, 0, sizeof(claim));
	claim.lease = argument_duration(fcinfo, 4, "lease");
	claim.base.wait = argument_bool(fcinfo, 5, "wait");
	consumer = argument_label(fcinfo, 6, true, "consumer");
	take_in(fcinfo, payload, &event);
	claim.payload = payload.bytes;
	claim.event = &event;
	begin_claim(&claim, CStringGetTextDatum(event.account),
				CStringGetTextDatum(event.id), PointerGetDatum(consumer));
	result_begin(&claim.result, fcinfo, C_NCOLUMNS);

	rel = ledger_open(&webhook_events, RowExclusiveLock, !claim.base.wait);
	claim.pending_key = settle_by_event(&event);
	ledger_claim(&webhook_events, rel, &claim.base);
	ledger_close(rel);
	end_claim(&claim);

	result_set(&claim.result, C_EVENT, JsonbPGetDatum(event.json));
	PG_RETURN_DATUM(result_end(&claim.result));
}

Datum
idempotency_stripe_webhook_claim(PG_FUNCTION_ARGS)
{
	return claim_event(fcinfo, payload_of_bytea(fcinfo, 0));
}

Datum
idempotency_stripe_webhook_claim_text(PG_FUNCTION_ARGS)
{
	return claim_event(fcinfo, payload_of_text(fcinfo, 0));
}

/*
 * stripe_webhook_receive(payload, signature, secrets, tolerance, consumer)
 */
static Datum
receive_event(FunctionCallInfo fcinfo, WebhookBytes payload)
{
	EventClaim	claim;
	WebhookEvent event;
	text	   *consumer;
	Relation	rel;

	PreventCommandDuringRecovery("idempotency.stripe_webhook_receive()");

	memset(&claim, 0, sizeof(claim));
	claim.receive = true;
	claim.base.wait = true;
	consumer = argument_label(fcinfo, 4, true, "consumer");
	take_in(fcinfo, payload, &event);
	claim.payload = payload.bytes;
	claim.event = &event;
	begin_claim(&claim, CStringGetTextDatum(event.account),
				CStringGetTextDatum(event.id), PointerGetDatum(consumer));
	result_begin(&claim.result, fcinfo, R_NCOLUMNS);

	rel = ledger_open(&webhook_events, RowExclusiveLock, false);
	claim.pending_key = settle_by_event(&event);
	ledger_claim(&webhook_events, rel, &claim.base);
	ledger_close(rel);

	result_set(&claim.result, R_STRIPE_EVENT_ID, claim.base.key[1]);
	result_set_text(&claim.result, R_EVENT_TYPE, event.type);
	result_set(&claim.result, R_ACCOUNT, claim.base.key[0]);
	PG_RETURN_DATUM(result_end(&claim.result));
}

Datum
idempotency_stripe_webhook_receive(PG_FUNCTION_ARGS)
{
	return receive_event(fcinfo, payload_of_bytea(fcinfo, 0));
}

Datum
idempotency_stripe_webhook_receive_text(PG_FUNCTION_ARGS)
{
	return receive_event(fcinfo, payload_of_text(fcinfo, 0));
}

/*
 * Claim an event from what is stored.  account, lease and consumer are numbers of
 * arguments.
 */
static Datum
reclaim(FunctionCallInfo fcinfo, int account, int lease, int consumer, const char *again_by)
{
	EventClaim	claim;
	text	   *keys[3];
	Relation	rel;

	keys[0] = argument_label(fcinfo, account, true, "account");
	keys[1] = argument_label(fcinfo, 0, false, "stripe_event_id");
	keys[2] = argument_label(fcinfo, consumer, true, "consumer");

	PreventCommandDuringRecovery("idempotency.stripe_webhook_reclaim()");

	memset(&claim, 0, sizeof(claim));
	claim.base.wait = true;
	claim.again_by = again_by;
	claim.lease = argument_duration(fcinfo, lease, "lease");
	begin_claim(&claim, PointerGetDatum(keys[0]), PointerGetDatum(keys[1]),
				PointerGetDatum(keys[2]));
	result_begin(&claim.result, fcinfo, C_NCOLUMNS);

	rel = ledger_open(&webhook_events, RowExclusiveLock, false);
	ledger_claim(&webhook_events, rel, &claim.base);
	ledger_close(rel);
	end_claim(&claim);

	return result_end(&claim.result);
}

/*
 * stripe_webhook_reclaim(stripe_event_id, account, lease, consumer)
 */
Datum
idempotency_stripe_webhook_reclaim(PG_FUNCTION_ARGS)
{
	PG_RETURN_DATUM(reclaim(fcinfo, 1, 2, 3, NULL));
}

/*
 * stripe_webhook_reclaim(stripe_event_id, again, lease, account, consumer): a
 * function of its own, so that EXECUTE tells operators from others.
 */
Datum
idempotency_stripe_webhook_again(PG_FUNCTION_ARGS)
{
	bool		again = argument_bool(fcinfo, 1, "again");

	PG_RETURN_DATUM(reclaim(fcinfo, 3, 2, 4,
							again ? GetUserNameFromId(GetSessionUserId(), false) : NULL));
}

/*
 * stripe_webhook_next(lease, consumer)
 */
Datum
idempotency_stripe_webhook_next(PG_FUNCTION_ARGS)
{
	FuncCallContext *context;
	EventClaim	claim;
	text	   *consumer;
	Relation	rel;
	int			races = 0;

	if (!SRF_IS_FIRSTCALL())
	{
		context = SRF_PERCALL_SETUP();
		SRF_RETURN_DONE(context);
	}

	PreventCommandDuringRecovery("idempotency.stripe_webhook_next()");
	PreventCommandIfReadOnly("idempotency.stripe_webhook_next()");

	memset(&claim, 0, sizeof(claim));
	claim.lease = argument_duration(fcinfo, 0, "lease");
	consumer = argument_label(fcinfo, 1, true, "consumer");
	context = SRF_FIRSTCALL_INIT();
	result_begin(&claim.result, fcinfo, C_NCOLUMNS);

	rel = ledger_open(&webhook_events, RowExclusiveLock, false);
	for (;;)
	{
		LedgerRow	row;
		TimestampTz now = GetCurrentTimestamp();

		if (!webhook_queue_next(rel, consumer, now, &row))
			break;

		/* the row is locked, so that nobody else can take it */
		begin_claim(&claim, row.values[E_ACCOUNT], row.values[E_STRIPE_EVENT_ID],
					PointerGetDatum(consumer));
		answer_event(&claim, &row);
		if (take(&claim.base, rel, &row, now))
		{
			/* the search may have been long: the lease starts at the answer */
			if (ledger_has_waited(&now))
				renew(&claim.base, rel, now);
			break;
		}
		ledger_lost_race(&webhook_events, &races);
	}
	ledger_close(rel);
	end_claim(&claim);

	if (!claim.claimed)
	{
		/* a worker with nothing to do is as good as one in the background */
		settle_kept_events_idly(IDLE_KEPT_EVENTS);
		ReleaseTupleDesc(claim.result.desc);
		SRF_RETURN_DONE(context);
	}
	SRF_RETURN_NEXT(context, result_end(&claim.result));
}

/* ---------- record ---------- */

static bool
same_text(bool isnull, Datum value, const char *other)
{
	if (isnull || other == NULL)
		return isnull && other == NULL;
	return strcmp(TextDatumGetCString(value), other) == 0;
}

/*
 * Recording found no claimed row of this token.  Returns true where it should
 * be tried again, false where the same was recorded before; otherwise raises
 * the reason.
 */
static bool
explain_refusal(Relation rel, const Datum *key, int64 token, bool success, const char *message)
{
	LedgerRow	row;

	ledger_look(&webhook_events, rel, key, &row);

	if (row.found != FOUND_ROW || DatumGetInt64(row.values[E_TOKEN]) != token ||
		row.isnull[E_CLAIMED_AT])
		ereport(ERROR,
				(errcode(ERRCODE_STALE_TOKEN),
				 errmsg("event %s is not held with this token", describe_event(key)),
				 row.found == FOUND_ROW && !row.isnull[E_CLAIMED_AT] ?
				 errdetail("It was claimed again after that claim's lease had lapsed or it had failed.") :
				 errdetail("It is not claimed: it has expired, or its claim was rolled back."),
				 errhint("Roll back: whoever has claimed it since processes it.")));

	if (row.isnull[E_SUCCESS])
		return true;

	if (DatumGetBool(row.values[E_SUCCESS]) != success ||
		!same_text(row.isnull[E_ERROR_MESSAGE], row.values[E_ERROR_MESSAGE], message))
		ereport(ERROR,
				(errcode(ERRCODE_CONTRADICTS_RECORD),
				 errmsg("another result of event %s is recorded already", describe_event(key)),
				 errdetail("It is recorded as %s.",
						   DatumGetBool(row.values[E_SUCCESS]) ? "processed" : "failed")));
	return false;
}

/*
 * stripe_webhook_record(stripe_event_id, token, success, error_message,
 *						 reference, order_id, correlation_id, account, consumer)
 */
Datum
idempotency_stripe_webhook_record(PG_FUNCTION_ARGS)
{
	int64		token = argument_token(fcinfo, 1);
	char	   *message = PG_ARGISNULL(3) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(3));
	bool		success = PG_ARGISNULL(2) ? message == NULL : PG_GETARG_BOOL(2);
	Datum		values[13];
	char		nulls[] = "             ";
	Datum		out[2];
	bool		outnull[2];
	Relation	rel;
	int			races = 0;
	int			i;

	PreventCommandDuringRecovery("idempotency.stripe_webhook_record()");

	values[0] = PointerGetDatum(argument_label(fcinfo, 7, true, "account"));
	values[1] = PointerGetDatum(argument_label(fcinfo, 0, false, "stripe_event_id"));
	values[2] = PointerGetDatum(argument_label(fcinfo, 8, true, "consumer"));
	values[3] = Int64GetDatum(token);
	values[5] = BoolGetDatum(success);
	set_text(values, nulls, 6, message);
	for (i = 4; i <= 6; i++)
	{
		values[i + 3] = PG_GETARG_DATUM(i);
		nulls[i + 3] = PG_ARGISNULL(i) ? 'n' : ' ';
	}
	values[10] = BoolGetDatum(success && setting_webhook_payload == WEBHOOK_PAYLOAD_NONE);
	set_back_off(values, 11);

	rel = ledger_open(&webhook_events, RowExclusiveLock, false);
	for (;;)
	{
		values[4] = TimestampTzGetDatum(GetCurrentTimestamp());
		if (ledger_execute(rel, &record_event, values, nulls, out, outnull, 2) > 0)
		{
			if (!success && TIMESTAMP_IS_NOEND(DatumGetTimestampTz(out[0])))
				ereport(LOG,
						(errmsg("event %s is dead after %d attempts", describe_event(values),
								DatumGetInt32(out[1])),
						 errhint("The view \"idempotency.stripe_webhook_pending\" has the statement that revives it.")));
			break;
		}
		if (!explain_refusal(rel, values, token, success, message))
			break;
		ledger_lost_race(&webhook_events, &races);
	}
	ledger_close(rel);
	open_claims_remove(token);

	PG_RETURN_BOOL(true);
}
