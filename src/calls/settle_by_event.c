/*-------------------------------------------------------------------------
 *
 * settle_by_event.c
 *	  What events of Stripe's say about calls that were sent to it.
 *
 * An answer got lost, or the caller died with it: the row of the call is
 * unknown, or in progress and lapsed.  An event can tell what came of it.  There
 * are three ways to find the call that an event is about:
 *
 *	- the event was caused by a request with its key (idempotency_key);
 *	- one of the object's metadata is its key (metadata);
 *	- the object is the one that the row knows by id (object).
 *
 * What an event says about a call, stripe_effect.c knows.  Where it says
 * nothing, nothing is settled: the next event may say more, stripe_reconcile()
 * can ask, and a person can tell.  So a row without a request, or whose request
 * has no path, is left alone.  An event of the other mode, test or live, says
 * nothing.
 *
 * What stripe_reconcile() has found out is written here, too: a call may be
 * settled only while nobody is at it, whoever settles it.
 *
 * A recorded result is never changed.  That a call wasn't executed is none: an
 * event that a request with its key has caused says otherwise.  Nothing here waits for a row that
 * somebody else holds: not the intake of events, which Stripe wants to be
 * quick, and not a transaction that has an event row locked.  An event that
 * finds its row held, live, or not there (the caller hasn't committed yet, or
 * has rolled back) keeps the key in pending_key.  It is found by that when the
 * operation is claimed (settle_by_kept_events), and when a worker comes past the
 * call while it is open (settle_open_call).  So events of keys that aren't ours,
 * of another shop or a staging system with the same account of Stripe's, hold up
 * nobody, however many they are.
 *
 * Whether events have to wait any longer is looked at bit by bit
 * (settle_kept_events), in the order of pending_key, from the place where
 * somebody has stopped; with shared memory that is everybody's.  One that raises
 * an error is stepped over.  An event of a key that isn't known waits for as long
 * as it is kept: the namespace that the key was derived from may be restored.
 *
 * The row of a call is found from its key alone, without an index on it:
 * "type:id:UUID" is the primary key, up to where the type ends.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/calls/settle_by_event.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type_d.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/json.h"

#include "base/arguments.h"
#include "base/compat.h"
#include "base/json_member.h"
#include "base/subtransaction.h"
#include "calls/call_transactions.h"
#include "calls/settle_by_event.h"
#include "calls/stripe_ledger.h"
#include "events/webhooks.h"
#include "ledger/ledger.h"
#include "ledger/ledger_search.h"
#include "process/worker_table.h"
#include "stripe/stripe_answer.h"
#include "stripe/stripe_effect.h"

/*
 * Events that wait for one call: as many are looked at together, and as many of
 * them at all.
 */
#define KEPT_EVENTS_PAGE 20
#define KEPT_EVENTS_MAX 1000

/* What of a call is looked at; the order of columns is CALL_COLUMNS. */
typedef enum CallColumn
{
	CALL_ACCOUNT, CALL_TYPE, CALL_ID, CALL_TOKEN, CALL_OUTCOME, CALL_LEASE_EXPIRES_AT,
	CALL_KEY, CALL_RESOURCE_ID, CALL_REQUEST, CALL_CALLER_LIFE, CALL_CALLER_VXID,
	CALL_LIVEMODE, CALL_SENT,
	CALL_NCOLUMNS
} CallColumn;

#define CALL_COLUMNS \
	"SELECT account, operation_type, operation_id, token, outcome::pg_catalog.text," \
	" lease_expires_at, idempotency_key, resource_id, request, caller_life, caller_vxid," \
	" livemode, first_sent_at IS NOT NULL" \
	" FROM idempotency.stripe_idempotency_keys"

/*
 * The rows that something may be found out about.  One that wasn't executed is
 * among them, if it was sent at all: what was recorded is the answer to the last
 * of several attempts of whoever sends, and an attempt before may have succeeded
 * without an answer.
 */
#define MAY_BE_SETTLED \
	OUTCOME_IS("unknown") " OR " OUTCOME_IS("in_progress") \
	" OR (" OUTCOME_IS("not_executed") " AND first_sent_at IS NOT NULL)"

typedef struct Call
{
	Datum		values[CALL_NCOLUMNS];
	bool		isnull[CALL_NCOLUMNS];
} Call;

static OwnerStatement find_call = {
	CALL_COLUMNS STRIPE_WHERE_KEY,
	3, {TEXTOID, TEXTOID, TEXTOID}
};

/* $1: the object, $2: its account; a path that names the object didn't make it */
static OwnerStatement find_call_by_object = {
	CALL_COLUMNS
	" WHERE resource_id OPERATOR(pg_catalog.=) $1"
	" AND (" OUTCOME_IS("unknown") " OR " OUTCOME_IS("in_progress") ")"
	" AND account OPERATOR(pg_catalog.=) $2"
	" AND pg_catalog.strpos(request OPERATOR(pg_catalog.->>) 'path'::pg_catalog.text, $1) OPERATOR(pg_catalog.=) 0"
	" LIMIT 1",
	2, {TEXTOID, TEXTOID}
};

/* $4: the token that was seen */
static OwnerStatement lock_call = {
	CALL_COLUMNS STRIPE_WHERE_KEY
	" AND token OPERATOR(pg_catalog.=) $4"
	" AND (" MAY_BE_SETTLED ")"
	" FOR UPDATE SKIP LOCKED",
	4, {TEXTOID, TEXTOID, TEXTOID, INT8OID}
};

static OwnerStatement settle_call = {
	"UPDATE idempotency.stripe_idempotency_keys SET"
	" outcome = $5::idempotency.outcome, uncertain = false, recorded_at = $6,"
	" http_status = NULL,"
	" resource_id = $7, resource_type = $8, resource_status = $15,"
	" livemode = COALESCE($9, livemode),"
	" request_id = COALESCE($10, request_id), response = $11, error = $12,"
	" lease = NULL, lease_expires_at = NULL, caller_life = NULL, caller_vxid = NULL,"
	" settled = pg_catalog.jsonb_build_object('was', outcome, 'by', $14,"
	" 'at', $6, 'note', NULL::pg_catalog.text, 'evidence', $13)"
	STRIPE_WHERE_KEY
	" AND token OPERATOR(pg_catalog.=) $4"
	" AND (" MAY_BE_SETTLED ")",
	15, {TEXTOID, TEXTOID, TEXTOID, INT8OID, TEXTOID, TIMESTAMPTZOID, TEXTOID,
	TEXTOID, BOOLOID, TEXTOID, JSONBOID, JSONBOID, JSONBOID, TEXTOID, TEXTOID}
};

static OwnerStatement note_asked = {
	"UPDATE idempotency.stripe_idempotency_keys SET reconciled = $5"
	STRIPE_WHERE_KEY
	" AND token OPERATOR(pg_catalog.=) $4"
	" AND (" MAY_BE_SETTLED ")",
	5, {TEXTOID, TEXTOID, TEXTOID, INT8OID, JSONBOID}
};

/*
 * $1: a key, $2 and $3: an object and its account, or NULL, $4: how many to
 * skip.  Those that tell of a failure come last: where a payment has failed and
 * was made all the same, later or by another card, that it was made counts.
 */
static OwnerStatement find_kept_events = {
	"SELECT pg_catalog.array_agg(k.payload_snapshot"
	" ORDER BY k.failed, k.created, k.stripe_event_id, k.consumer) FROM (SELECT * FROM ("
	"SELECT payload_snapshot, event_type OPERATOR(pg_catalog.~~) '%failed' AS failed,"
	" created, stripe_event_id, consumer FROM idempotency.stripe_webhook_events"
	" WHERE pending_key OPERATOR(pg_catalog.=) $1 AND payload_snapshot IS NOT NULL"
	" UNION ALL"
	" SELECT payload_snapshot, event_type OPERATOR(pg_catalog.~~) '%failed',"
	" created, stripe_event_id, consumer FROM idempotency.stripe_webhook_events"
	" WHERE object_id OPERATOR(pg_catalog.=) $2 AND account OPERATOR(pg_catalog.=) $3"
	" AND payload_snapshot IS NOT NULL) u"
	" ORDER BY failed, created, stripe_event_id, consumer"
	" LIMIT " CppAsString2(KEPT_EVENTS_PAGE) " OFFSET $4) k",
	4, {TEXTOID, TEXTOID, TEXTOID, INT8OID}
};

/*
 * $1 and $2: the first pending key and the last, $3: how many of the first to
 * skip.  Failures come last, as above.
 */
static OwnerStatement next_kept_events = {
	"SELECT account, stripe_event_id, consumer, pending_key, payload_snapshot"
	" FROM idempotency.stripe_webhook_events"
	" WHERE pending_key OPERATOR(pg_catalog.>=) $1 AND pending_key OPERATOR(pg_catalog.<=) $2"
	" ORDER BY pending_key, event_type OPERATOR(pg_catalog.~~) '%failed', created,"
	" account, stripe_event_id, consumer LIMIT $4 OFFSET $3",
	4, {TEXTOID, TEXTOID, INT8OID, INT8OID}
};

/* $4: the pending key that was seen */
static OwnerStatement lock_kept_event = {
	"SELECT true FROM idempotency.stripe_webhook_events"
	" WHERE account OPERATOR(pg_catalog.=) $1"
	" AND stripe_event_id OPERATOR(pg_catalog.=) $2"
	" AND consumer OPERATOR(pg_catalog.=) $3"
	" AND pending_key OPERATOR(pg_catalog.=) $4 FOR UPDATE SKIP LOCKED",
	4, {TEXTOID, TEXTOID, TEXTOID, TEXTOID}
};

/* $4: what it waits for now, or NULL */
static OwnerStatement set_pending_key = {
	"UPDATE idempotency.stripe_webhook_events SET pending_key = $4"
	" WHERE account OPERATOR(pg_catalog.=) $1"
	" AND stripe_event_id OPERATOR(pg_catalog.=) $2"
	" AND consumer OPERATOR(pg_catalog.=) $3",
	4, {TEXTOID, TEXTOID, TEXTOID, TEXTOID}
};

/* ---------- settling ---------- */

/* What is kept of an event as the reason for an outcome. */
static Datum
evidence_of_event(const WebhookEvent *event, FoundBy found_by)
{
	const char *const members[][2] = {
		{"stripe_event_id", event->id}, {"event_type", event->type},
		{"found_by", found_by_names[found_by]}
	};
	StringInfoData json;
	int			i;

	initStringInfo(&json);
	for (i = 0; i < lengthof(members); i++)
	{
		appendStringInfoString(&json, i == 0 ? "{" : ", ");
		escape_json(&json, members[i][0]);
		appendStringInfoString(&json, ": ");
		escape_json(&json, members[i][1]);
	}
	appendStringInfoChar(&json, '}');
	return DirectFunctionCall1(jsonb_in, CStringGetDatum(json.data));
}

static void
set_text(Datum *values, char *nulls, int i, const char *text)
{
	nulls[i] = text == NULL ? 'n' : ' ';
	values[i] = text == NULL ? (Datum) 0 : CStringGetTextDatum(text);
}

static void
set_jsonb(Datum *values, char *nulls, int i, Jsonb *json)
{
	nulls[i] = json == NULL ? 'n' : ' ';
	values[i] = PointerGetDatum(json);
}

static bool
outcome_is(const Call *call, StripeOutcome outcome)
{
	return stripe_outcome_by_name(TextDatumGetCString(call->values[CALL_OUTCOME])) == outcome;
}

static NullableDatum
call_column(const Call *call, int column)
{
	NullableDatum datum;

	datum.value = call->values[column];
	datum.isnull = call->isnull[column];
	return datum;
}

/*
 * Is a call one that is said not to be executed, and may have been?  Only who has
 * found its key at Stripe knows better.
 */
static bool
call_is_denied(const Call *call)
{
	return outcome_is(call, STRIPE_NOT_EXECUTED) && DatumGetBool(call->values[CALL_SENT]);
}

/* Is nobody at a call whose outcome isn't known? */
static bool
call_is_open(const Call *call, bool key_found, int64 claimed_token, TimestampTz now)
{
	if (outcome_is(call, STRIPE_UNKNOWN))
		return true;
	if (call_is_denied(call))
		return key_found;
	if (!outcome_is(call, STRIPE_IN_PROGRESS))
		return false;
	if (DatumGetInt64(call->values[CALL_TOKEN]) == claimed_token)
		return true;
	return stripe_has_lapsed(call_column(call, CALL_LEASE_EXPIRES_AT),
							 call_column(call, CALL_CALLER_LIFE),
							 call_column(call, CALL_CALLER_VXID), now);
}

typedef enum Settled
{
	SETTLED,					/* by this event */
	SETTLED_NOT,				/* the event has nothing to add */
	SETTLED_LATER				/* somebody has the row now */
} Settled;

typedef uint64 (*Execute) (Relation rel, OwnerStatement *statement, Datum *values,
						   const char *nulls, Datum *out, bool *outnull, int nout);

/*
 * Lock a call, unless somebody else has, and see that nobody is at it.
 */
static bool
lock_open_call(Relation rel, Call *call, bool key_found, int64 claimed_token, TimestampTz now,
			   Execute execute)
{
	Datum		values[4];

	memcpy(values, call->values, sizeof(values));
	return execute(rel, &lock_call, values, NULL, call->values, call->isnull,
				   CALL_NCOLUMNS) > 0 &&
		call_is_open(call, key_found, claimed_token, now);
}

/* Write down what was found out about a call that is locked. */
static bool
write_finding(Relation rel, Call *call, const Finding *finding, TimestampTz now, Execute execute)
{
	const CallResult *result = &finding->result;
	Operation	op;
	Datum		values[15];
	char		nulls[] = "               ";

	memcpy(values, call->values, 4 * sizeof(Datum));
	set_text(values, nulls, 4, stripe_outcome_name(result->outcome));
	values[5] = TimestampTzGetDatum(now);
	set_text(values, nulls, 6, result->resource_id);
	set_text(values, nulls, 7, result->resource_type);
	values[8] = BoolGetDatum(result->livemode == LIVEMODE_LIVE);
	nulls[8] = result->livemode == LIVEMODE_UNKNOWN ? 'n' : ' ';
	set_text(values, nulls, 9, result->request_id);
	set_jsonb(values, nulls, 10, result->response);
	set_jsonb(values, nulls, 11, result->error);
	set_jsonb(values, nulls, 12, finding->evidence);
	set_text(values, nulls, 13, finding->by);
	set_text(values, nulls, 14, result->resource_status);
	if (execute(rel, &settle_call, values, nulls, NULL, NULL, 0) == 0)
		return false;

	op.account = TextDatumGetCString(values[0]);
	op.type = TextDatumGetCString(values[1]);
	op.id = TextDatumGetCString(values[2]);
	stripe_notify_settled(&op, result->outcome, result->resource_id);
	return true;
}

/*
 * What an event that was found to be about a call says of it.  Returns false
 * where it says nothing; by and evidence are left to be set.
 */
bool
finding_of_event(const WebhookEvent *event, FoundBy found_by, Jsonb *request, Finding *finding)
{
	CallResult *result = &finding->result;

	memset(finding, 0, sizeof(Finding));
	result->outcome = outcome_of_event(event, found_by, request);
	if (!stripe_is_definitive(result->outcome))
		return false;

	result->resource_id = event->object_id;
	result->resource_type = event->object_type;
	result->resource_status = stripe_object_status(event->object);
	result->livemode = event->livemode_known ? livemode_of(event->livemode) : LIVEMODE_UNKNOWN;
	if (found_by == BY_KEY)
		result->request_id = event->request_id;
	if (result->outcome == STRIPE_FAILED)
	{
		result->error = json_member_copy(event->object, "last_payment_error");
		if (result->error == NULL)
			result->error = json_member_copy(event->object, "last_setup_error");
	}
	if (result->error == NULL && event->object != NULL)
		result->response = json_member_copy(json_object_member(&event->json->root, "data"),
											 "object");
	return true;
}

/*
 * May an event be about a call of this account?
 *
 * One whose context is one's own account may be about a call that was made
 * without naming it.  What comes from a connected account may not: its owner
 * chooses metadata and keys.
 */
bool
may_be_of_account(const WebhookEvent *event, const char *account)
{
	return strcmp(event->account, account) == 0 ||
		(account[0] == '\0' && !event->connected);
}

/*
 * The call that has this key.  Returns false if it can't be seen; *other tells
 * that there is one with this operation and another key, of another generation.
 */
static bool
call_with_key(Relation rel, const WebhookEvent *event, const char *key, Call *call, bool *other)
{
	const char *accounts[2];
	const char *uuid = key + strlen(key) - STRIPE_KEY_UUID_LEN - 1;
	const char *colon;
	int			i;

	accounts[0] = event->account;
	accounts[1] = may_be_of_account(event, "") && event->account[0] != '\0' ? "" : NULL;
	*other = false;

	/* type and id may have colons themselves */
	for (colon = strchr(key, ':'); colon != NULL && colon < uuid; colon = strchr(colon + 1, ':'))
	{
		if (colon == key || colon + 1 == uuid)
			continue;
		for (i = 0; i < lengthof(accounts) && accounts[i] != NULL; i++)
		{
			Datum		values[3];

			values[0] = CStringGetTextDatum(accounts[i]);
			values[1] = PointerGetDatum(cstring_to_text_with_len(key, colon - key));
			values[2] = PointerGetDatum(cstring_to_text_with_len(colon + 1, uuid - colon - 1));
			if (ledger_execute(rel, &find_call, values, NULL, call->values, call->isnull,
							   CALL_NCOLUMNS) == 0)
				continue;
			if (strcmp(TextDatumGetCString(call->values[CALL_KEY]), key) == 0)
				return true;
			*other = true;
		}
	}
	return false;
}

/*
 * Was the object of an event made by another call than the one that it has in its
 * metadata?  Then its metadata was copied.
 */
static bool
is_made_by_another(Relation rel, const WebhookEvent *event)
{
	Call		call;
	bool		other;

	return event->idempotency_key != NULL && is_stripe_key(event->idempotency_key) &&
		strcmp(event->idempotency_key, event->metadata_key) != 0 &&
		call_with_key(rel, event, event->idempotency_key, &call, &other) &&
		request_makes_object(call.isnull[CALL_REQUEST] ? NULL :
							 DatumGetJsonbP(call.values[CALL_REQUEST]), event);
}

/*
 * Settle a call by an event that was found to be about it.  "claimed_token" is
 * the token of a claim that this transaction has just made, or 0.  With
 * "only_look" nothing is written, and no row locked.
 */
static Settled
settle(Relation rel, Call *call, const WebhookEvent *event, FoundBy found_by,
	   int64 claimed_token, bool only_look, Execute execute)
{
	TimestampTz now = GetCurrentTimestamp();
	Finding		finding;

	if (!outcome_is(call, STRIPE_UNKNOWN) && !outcome_is(call, STRIPE_IN_PROGRESS) &&
		!(found_by == BY_KEY && call_is_denied(call)))
		return SETTLED_NOT;

	/* where a database was copied, both modes have the same keys */
	if (event->livemode_known && !call->isnull[CALL_LIVEMODE] &&
		event->livemode != DatumGetBool(call->values[CALL_LIVEMODE]))
		return SETTLED_NOT;
	if (found_by == BY_METADATA && is_made_by_another(rel, event))
		return SETTLED_NOT;
	if (!finding_of_event(event, found_by, call->isnull[CALL_REQUEST] ? NULL :
						  DatumGetJsonbP(call->values[CALL_REQUEST]), &finding))
		return SETTLED_NOT;
	if (!call_is_open(call, found_by == BY_KEY, claimed_token, now))
		return SETTLED_LATER;
	if (only_look)
		return SETTLED;

	finding.by = "event";
	finding.evidence = DatumGetJsonbP(evidence_of_event(event, found_by));
	if (!lock_open_call(rel, call, found_by == BY_KEY, claimed_token, now, execute) ||
		!write_finding(rel, call, &finding, now, execute))
		return SETTLED_LATER;
	return SETTLED;
}

/*
 * Settle a call by what somebody has found out at Stripe, or with an outcome
 * of NULL keep just what was asked.  "token" is the row's from before it was
 * asked.  Doesn't wait: returns false, and leaves the row alone, where it isn't
 * as it was, or somebody else has it.
 */
bool
settle_by_finding(const Datum *key, int64 token, const Finding *finding)
{
	Relation	rel = ledger_open(&stripe_calls, RowExclusiveLock, false);
	TimestampTz now = GetCurrentTimestamp();
	Call		call;
	bool		written;

	memcpy(call.values, key, 3 * sizeof(Datum));
	call.values[CALL_TOKEN] = Int64GetDatum(token);
	written = lock_open_call(rel, &call, true, 0, now, ledger_execute_latest);
	if (written && stripe_is_definitive(finding->result.outcome))
		written = write_finding(rel, &call, finding, now, ledger_execute_latest);
	else if (written)
	{
		Datum		values[5];

		memcpy(values, call.values, 4 * sizeof(Datum));
		values[4] = JsonbPGetDatum(finding->evidence);
		(void) ledger_execute_latest(rel, &note_asked, values, NULL, NULL, NULL, 0);
	}
	ledger_close(rel);
	return written;
}

/*
 * Settle what an event that has come in can settle.
 *
 * Returns a key of ours by which it may do so later, palloc'd, or NULL.
 */
char *
settle_by_event(const WebhookEvent *event)
{
	const char *keys[2];
	static const FoundBy found_by[2] = {BY_KEY, BY_METADATA};
	const char *pending = NULL;
	Relation	rel = NULL;
	Call		call;
	int			i;

	keys[0] = event->idempotency_key != NULL && is_stripe_key(event->idempotency_key) ?
		event->idempotency_key : NULL;
	keys[1] = event->metadata_key != NULL &&
		(keys[0] == NULL || strcmp(keys[0], event->metadata_key) != 0) ?
		event->metadata_key : NULL;

	for (i = 0; i < lengthof(keys); i++)
	{
		bool		other;
		Settled		settled;

		if (keys[i] == NULL)
			continue;
		if (rel == NULL)
			rel = ledger_open(&stripe_calls, RowExclusiveLock, false);

		if (call_with_key(rel, event, keys[i], &call, &other))
			settled = settle(rel, &call, event, found_by[i], 0, false, ledger_execute);
		else
			settled = other ? SETTLED_NOT : SETTLED_LATER;
		if (settled == SETTLED_LATER && pending == NULL)
			pending = keys[i];
	}

	/* a thin event doesn't show its object, so its id alone says nothing new */
	if (event->object != NULL && event->object_id != NULL && pending == NULL)
	{
		Datum		values[2];

		if (rel == NULL)
			rel = ledger_open(&stripe_calls, RowExclusiveLock, false);
		values[0] = CStringGetTextDatum(event->object_id);
		values[1] = CStringGetTextDatum(event->account);
		if (ledger_execute(rel, &find_call_by_object, values, NULL, call.values, call.isnull,
						   CALL_NCOLUMNS) > 0)
			(void) settle(rel, &call, event, BY_OBJECT, 0, false, ledger_execute);
	}

	if (rel != NULL)
		ledger_close(rel);
	return pending == NULL ? NULL : pstrdup(pending);
}

/* How is a kept event about a call?  Returns false if it isn't. */
static bool
event_is_about(const WebhookEvent *event, const Call *call, FoundBy *found_by)
{
	const char *key = TextDatumGetCString(call->values[CALL_KEY]);

	if (!may_be_of_account(event, TextDatumGetCString(call->values[CALL_ACCOUNT])))
		return false;

	if (event->idempotency_key != NULL && strcmp(event->idempotency_key, key) == 0)
		*found_by = BY_KEY;
	else if (event->metadata_key != NULL && strcmp(event->metadata_key, key) == 0)
		*found_by = BY_METADATA;
	else if (event->object != NULL && event->object_id != NULL &&
			 !call->isnull[CALL_RESOURCE_ID] &&
			 strcmp(event->object_id, TextDatumGetCString(call->values[CALL_RESOURCE_ID])) == 0)
		*found_by = BY_OBJECT;
	else
		return false;
	return true;
}

/*
 * Settle a call by events that came in before it could be: account, operation
 * type and operation id are its key.  Returns true if it is settled now, or with
 * "only_look" would be.
 *
 * "claimed_token" is the token of a claim that this transaction has just made,
 * or 0: the claimant hasn't sent anything yet and needn't any more.
 */
bool
settle_by_kept_events(const Datum *key, int64 claimed_token, bool only_look)
{
	Relation	rel = ledger_open(&stripe_calls, RowExclusiveLock, false);
	Relation	events_rel = webhook_events_open(AccessShareLock);
	Call		call;
	bool		settled = false;

	if (ledger_execute_latest(rel, &find_call, (Datum *) key, NULL, call.values, call.isnull,
							  CALL_NCOLUMNS) > 0 &&
		(outcome_is(&call, STRIPE_UNKNOWN) || outcome_is(&call, STRIPE_IN_PROGRESS) ||
		 call_is_denied(&call)))
	{
		Datum		values[4];
		char		nulls[] = "    ";
		Datum		events;
		bool		isnull;
		int			skip;
		int			n = KEPT_EVENTS_PAGE;

		values[0] = call.values[CALL_KEY];
		values[1] = call.values[CALL_RESOURCE_ID];
		nulls[1] = call.isnull[CALL_RESOURCE_ID] ? 'n' : ' ';
		values[2] = key[0];
		for (skip = 0; skip < KEPT_EVENTS_MAX && n == KEPT_EVENTS_PAGE && !settled; skip += n)
		{
			Datum	   *payloads;
			int			i;

			CHECK_FOR_INTERRUPTS();
			values[3] = Int64GetDatum(skip);
			(void) ledger_execute_latest(events_rel, &find_kept_events, values, nulls, &events,
										 &isnull, 1);
			if (isnull)
				break;
			deconstruct_array(DatumGetArrayTypeP(events), JSONBOID, -1, false, TYPALIGN_INT,
							  &payloads, NULL, &n);
			for (i = 0; i < n && !settled; i++)
			{
				WebhookEvent event;
				FoundBy		found_by;

				if (webhook_event_read(DatumGetJsonbP(payloads[i]), &event) &&
					event_is_about(&event, &call, &found_by))
					settled = settle(rel, &call, &event, found_by, claimed_token, only_look,
									 ledger_execute_latest) == SETTLED;
			}
		}
	}

	ledger_close(events_rel);
	ledger_close(rel);
	return settled;
}

/*
 * Claim in this transaction, unless an event that has come in tells what came
 * of the operation: then it is settled by that, and replays.
 */
void
settle_or_claim(StripeClaim *claim, Relation rel)
{
	stripe_claim_run(claim, rel);
	if ((claim->verdict == STRIPE_CLAIMED || claim->verdict == STRIPE_CANT_TELL) &&
		settle_by_kept_events(claim->base.key, claim->token, false))
		stripe_claim_run(claim, rel);
}

/* ---------- events that wait ---------- */

/* More than any pending key, which is printable ASCII */
#define LAST_KEY "\x7f"

/* Events that a settled call has had. */
#define MAX_FORGOTTEN 100

enum
{
	KEPT_ACCOUNT, KEPT_ID, KEPT_CONSUMER, KEPT_KEY, KEPT_PAYLOAD, KEPT_NCOLUMNS
};

typedef struct KeptEvent
{
	Datum		values[KEPT_NCOLUMNS];
	bool		isnull[KEPT_NCOLUMNS];
} KeptEvent;

typedef struct KeptEvents
{
	KeptEvent  *events;
	int			n;
} KeptEvents;

typedef struct KeptStep
{
	Relation	rel;
	KeptEvent  *event;
	bool		forgotten;		/* it doesn't wait for this key any more */
} KeptStep;

static void
add_kept_event(HeapTuple tuple, TupleDesc desc, void *arg)
{
	KeptEvents *kept = arg;
	KeptEvent  *event = &kept->events[kept->n++];
	int			i;

	/* out of the statement's memory */
	for (i = 0; i < KEPT_NCOLUMNS; i++)
	{
		event->values[i] = SPI_getbinval(tuple, desc, i + 1, &event->isnull[i]);
		if (!event->isnull[i])
			event->values[i] = SPI_datumTransfer(event->values[i], false, -1);
	}
}

/* Settle what an event can settle, in a subtransaction. */
static void
look_at_kept_event(void *arg)
{
	KeptStep   *step = arg;
	KeptEvent  *kept = step->event;
	WebhookEvent event;
	char	   *pending = NULL;
	Datum		values[4];
	char		nulls[] = "    ";

	step->forgotten = false;
	if (!kept->isnull[KEPT_PAYLOAD] &&
		webhook_event_read(DatumGetJsonbP(kept->values[KEPT_PAYLOAD]), &event))
		pending = settle_by_event(&event);
	if (pending != NULL && strcmp(pending, TextDatumGetCString(kept->values[KEPT_KEY])) == 0)
		return;

	/* who has the event locked is left alone */
	memcpy(values, kept->values, sizeof(values));
	if (ledger_execute(step->rel, &lock_kept_event, values, NULL, NULL, NULL, 0) == 0)
		return;
	set_text(values, nulls, 3, pending);
	(void) ledger_execute(step->rel, &set_pending_key, values, nulls, NULL, NULL, 0);
	step->forgotten = true;
}

/* The place is behind this event. */
static void
move_place(KeptPlace *place, KeptEvent *event, bool forgotten)
{
	char	   *key = TextDatumGetCString(event->values[KEPT_KEY]);

	if (strcmp(place->key, key) != 0)
	{
		strlcpy(place->key, key, sizeof(place->key));
		place->left = 0;
	}
	if (!forgotten)
		place->left++;
}

/* Look at events from the place on, up to those with the key "last". */
static void
look_at_kept_events(KeptBatch *batch, const char *last)
{
	Relation	rel = webhook_events_open(RowExclusiveLock);
	KeptPlace  *place = batch->place;
	KeptEvents	kept;
	Datum		values[4];
	int			i;

	batch->forgotten = 0;
	batch->refused = 0;
	batch->refusal = NULL;
	kept.events = palloc(batch->max_events * sizeof(KeptEvent));
	kept.n = 0;
	values[0] = CStringGetTextDatum(place->key);
	values[1] = CStringGetTextDatum(last);
	values[2] = Int64GetDatum(place->left);
	values[3] = Int64GetDatum(batch->max_events);
	owner_select(&next_kept_events, rel->rd_rel->relowner, values, add_kept_event, &kept);

	for (i = 0; i < kept.n; i++)
	{
		KeptStep	step = {rel, &kept.events[i], false};
		ErrorData  *error;

		CHECK_FOR_INTERRUPTS();
		error = try_in_subtransaction(look_at_kept_event, &step);
		if (error != NULL)
		{
			step.forgotten = false;
			if (!error_is_about_locks(error))
			{
				batch->refused++;
				if (batch->refusal == NULL)
					batch->refusal = psprintf("%s: %s",
											  ledger_describe_key(&webhook_events, kept.events[i].values),
											  error->message);
			}
		}
		batch->forgotten += step.forgotten;
		move_place(place, &kept.events[i], step.forgotten);
	}
	ledger_close(rel);

	batch->seen = kept.n;
	batch->finished = kept.n < batch->max_events;
	if (batch->finished)
		memset(place, 0, sizeof(KeptPlace));
}

/*
 * Look at some events that wait to settle a call: their calls may have become
 * visible, or lapsed, or be settled.
 */
void
settle_kept_events(KeptBatch *batch)
{
	look_at_kept_events(batch, LAST_KEY);
}

/*
 * The same for a session that has nothing else to do.  Nobody reads there which
 * event was refused, so the log says it, once.
 */
void
settle_kept_events_idly(int max_events)
{
	static KeptPlace own = {"", 0};
	static bool logged = false;
	KeptPlace	place = own;
	KeptBatch	batch;

	worker_table_read_kept_place(&place);
	batch.max_events = max_events;
	batch.place = &place;
	settle_kept_events(&batch);
	own = place;
	worker_table_write_kept_place(&place);

	if (batch.refused > 0 && !logged)
	{
		logged = true;
		ereport(LOG,
				(errmsg("event of Stripe's could not settle its call"),
				 errdetail("Row %s.", batch.refusal)));
	}
}

/*
 * Settle a call that is open by events that came in before it could be, in a
 * subtransaction.  Returns true if it is settled now; then they wait no longer.
 */
bool
settle_open_call(const Datum *key)
{
	Relation	rel;
	Call		call;
	KeptPlace	place;
	KeptBatch	batch;

	if (!settle_by_kept_events(key, 0, false))
		return false;

	rel = ledger_open(&stripe_calls, AccessShareLock, false);
	if (ledger_execute(rel, &find_call, (Datum *) key, NULL, call.values, call.isnull,
					   CALL_NCOLUMNS) > 0)
	{
		strlcpy(place.key, TextDatumGetCString(call.values[CALL_KEY]), sizeof(place.key));
		place.left = 0;
		batch.max_events = MAX_FORGOTTEN;
		batch.place = &place;
		look_at_kept_events(&batch, TextDatumGetCString(call.values[CALL_KEY]));
	}
	ledger_close(rel);
	return true;
}
