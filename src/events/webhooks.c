/*-------------------------------------------------------------------------
 *
 * webhooks.c
 *	  SQL functions for the events that Stripe sends.
 *
 * They are kept in a ledger (webhook_ledger.c).  Nothing is stored, and nothing
 * parsed, before the signature was found to be good.  An event's row and what it
 * settles among the calls that were sent (settle_by_event.c) are written by the
 * caller's transaction, along with whatever the application makes of it.
 *
 * Stripe delivers at least once, in no order, and may have made two events of
 * one fact.  The first is what the ledger is for.  About the other two it can
 * only tell, when an event is claimed, what is in the table at that moment:
 * superseded_by is an event about the same object that Stripe made in a later
 * second and that has been processed; twin_of is one of the same type, object,
 * request and data, made within an hour of it, that has been processed.  Nobody
 * knows the order of events within a second, so nothing is said about it.
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
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"

#include "base/arguments.h"
#include "base/clock.h"
#include "base/compat.h"
#include "base/errors.h"
#include "base/notify.h"
#include "base/result_row.h"
#include "base/settings.h"
#include "base/settings_guard.h"
#include "calls/settle_by_event.h"
#include "events/kept_events.h"
#include "events/webhook_ledger.h"
#include "events/webhook_payload.h"
#include "events/webhook_queue.h"
#include "events/webhook_secret.h"
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

/* Events that wait for their call, looked at when none is to be handed out. */
#define IDLE_KEPT_EVENTS 20

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

/* An event id, an account or a consumer. */
static text *
argument_label(FunctionCallInfo fcinfo, int argno, bool may_be_empty, const char *name)
{
	text	   *value = argument_text(fcinfo, argno, name);

	check_label(VARDATA_ANY(value), VARSIZE_ANY_EXHDR(value), may_be_empty, name);
	return value;
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
 * Verify and parse what has come in; raises IK004 for whatever is not an event
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
	EventWrite	write;
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
	if (claim->write.event == NULL)
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
 * An event that is only to be kept cannot be said to be kept while it may still
 * vanish with another's transaction: Stripe would not send it again.
 */
static void
busy(LedgerClaim *base)
{
	EventClaim *claim = (EventClaim *) base;

	if (claim->write.received_only)
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

	if (claim->write.received_only)
	{
		result_set(&claim->result, R_STORED, BoolGetDatum(false));
		return LEDGER_ANSWER;
	}

	result_reset(&claim->result);
	answer_event(claim, row);

	if (is_processed(row) && claim->write.again_by == NULL)
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

static void
answer_claimed(EventClaim *claim, Relation rel, const WebhookEvent *event, int attempt)
{
	claim->claimed = true;
	result_set_enum(&claim->result, C_VERDICT, "claimed");
	result_set(&claim->result, C_TOKEN, Int64GetDatum(claim->write.token));
	result_set(&claim->result, C_ATTEMPT, Int32GetDatum(attempt));
	if (event != NULL)
	{
		Datum		values[2];
		bool		isnull[2];

		webhook_find_relatives(rel, claim->base.key, event, values, isnull);
		result_copy(&claim->result, C_SUPERSEDED_BY, values[0], isnull[0]);
		result_copy(&claim->result, C_TWIN_OF, values[1], isnull[1]);
	}
}

static bool
insert(LedgerClaim *base, Relation rel, TimestampTz now)
{
	EventClaim *claim = (EventClaim *) base;
	const WebhookEvent *event = claim->write.event;

	if (event == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("event %s is not known", describe_event(base->key)),
				 errdetail("It was never received, or has expired.")));

	claim->write.token = ledger_new_token();
	claim->write.now = now;
	if (!webhook_row_insert(rel, &claim->write))
		return false;

	if (claim->write.received_only)
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
	const WebhookEvent *event = claim->write.event;
	WebhookEvent stored;
	int			attempt = claim->write.again_by != NULL ? 1 :
		DatumGetInt32(row->values[E_ATTEMPTS]) + 1;

	if (event == NULL)
	{
		const char *pending_key = row->isnull[E_PENDING_KEY] ? NULL :
			TextDatumGetCString(row->values[E_PENDING_KEY]);

		if (!row->isnull[E_PAYLOAD_SNAPSHOT] &&
			webhook_event_read(DatumGetJsonbP(row->values[E_PAYLOAD_SNAPSHOT]), &stored))
		{
			event = &stored;
			if (pending_key != NULL)
				pending_key = settle_by_event(event);
		}
		claim->write.pending_key = pending_key;
	}

	claim->write.token = ledger_new_token();
	claim->write.now = now;
	if (!webhook_row_take(rel, &claim->write, DatumGetInt64(row->values[E_TOKEN]), attempt))
		return false;

	answer_claimed(claim, rel, event, attempt);
	return true;
}

/* The claim had to wait when it was written: its lease starts now. */
static void
renew(LedgerClaim *base, Relation rel, TimestampTz now)
{
	EventClaim *claim = (EventClaim *) base;

	if (!claim->write.received_only && claim->write.lease.given)
		webhook_row_renew(rel, &claim->write, now);
}

static void
begin_claim(EventClaim *claim, Datum account, Datum id, Datum consumer)
{
	claim->base.key[0] = account;
	claim->base.key[1] = id;
	claim->base.key[2] = consumer;
	claim->write.key = claim->base.key;
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
	if (claim->claimed && !claim->write.lease.given)
		open_claims_add(claim->write.token, "Stripe event", describe_event(claim->base.key));
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
	claim.write.lease = argument_duration(fcinfo, 4, "lease");
	claim.base.wait = argument_bool(fcinfo, 5, "wait");
	consumer = argument_label(fcinfo, 6, true, "consumer");
	take_in(fcinfo, payload, &event);
	claim.write.payload = payload.bytes;
	claim.write.event = &event;
	begin_claim(&claim, CStringGetTextDatum(event.account),
				CStringGetTextDatum(event.id), PointerGetDatum(consumer));
	result_begin(&claim.result, fcinfo, C_NCOLUMNS);

	rel = ledger_open(&webhook_events, RowExclusiveLock, !claim.base.wait);
	claim.write.pending_key = settle_by_event(&event);
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
	claim.write.received_only = true;
	claim.base.wait = true;
	consumer = argument_label(fcinfo, 4, true, "consumer");
	take_in(fcinfo, payload, &event);
	claim.write.payload = payload.bytes;
	claim.write.event = &event;
	begin_claim(&claim, CStringGetTextDatum(event.account),
				CStringGetTextDatum(event.id), PointerGetDatum(consumer));
	result_begin(&claim.result, fcinfo, R_NCOLUMNS);

	rel = ledger_open(&webhook_events, RowExclusiveLock, false);
	claim.write.pending_key = settle_by_event(&event);
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
	claim.write.again_by = again_by;
	claim.write.lease = argument_duration(fcinfo, lease, "lease");
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
	claim.write.lease = argument_duration(fcinfo, 0, "lease");
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
	Datum		key[LEDGER_MAX_KEYS];
	EventResult result;
	Relation	rel;
	int			races = 0;

	PreventCommandDuringRecovery("idempotency.stripe_webhook_record()");

	key[0] = PointerGetDatum(argument_label(fcinfo, 7, true, "account"));
	key[1] = PointerGetDatum(argument_label(fcinfo, 0, false, "stripe_event_id"));
	key[2] = PointerGetDatum(argument_label(fcinfo, 8, true, "consumer"));
	result.success = success;
	result.message = message;
	result.reference = fcinfo->args[4];
	result.order_id = fcinfo->args[5];
	result.correlation_id = fcinfo->args[6];

	rel = ledger_open(&webhook_events, RowExclusiveLock, false);
	for (;;)
	{
		if (webhook_row_record(rel, key, token, &result))
		{
			if (!success && TIMESTAMP_IS_NOEND(result.next_attempt_at))
				ereport(LOG,
						(errmsg("event %s is dead after %d attempts", describe_event(key),
								result.attempts),
						 errhint("The view \"idempotency.stripe_webhook_pending\" has the statement that revives it.")));
			break;
		}
		if (!explain_refusal(rel, key, token, success, message))
			break;
		ledger_lost_race(&webhook_events, &races);
	}
	ledger_close(rel);
	open_claims_remove(token);

	PG_RETURN_BOOL(true);
}
