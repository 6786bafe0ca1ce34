/*-------------------------------------------------------------------------
 *
 * settle_by_event.c
 *	  What Stripe's events say about calls that were sent to it.
 *
 * An answer got lost, or the caller died with it: the row of the call is
 * unknown, or in progress and lapsed.  An event can tell what came of it.  There
 * are three ways to find the call that an event is about:
 *
 *	- the event was caused by a request with its key (idempotency_key);
 *	- one of the object's metadata is its key (metadata);
 *	- the object is the one that the row knows by id (object).
 *
 * stripe_effect.c knows what an event says about a call.  If it says nothing,
 * nothing is settled: the next event may say more, stripe_reconcile() can ask,
 * and a person can tell.  So a row without a request, or whose request has no
 * path, is left alone.  An event of the other mode, test or live, says nothing.
 *
 * What stripe_reconcile() has found out is written here, too: whoever settles a
 * call, it may be settled only while nobody is at it.
 *
 * A recorded result is never changed.  That a call was not executed is not one:
 * an event that was caused by a request with its key says otherwise.  Nothing
 * here waits for a row that somebody else holds: neither the intake of events,
 * which Stripe wants to be quick, nor a transaction that has an event's row
 * locked.  An event that finds its row held, live or missing (its caller has
 * not committed yet, or has rolled back) is kept for later (kept_events.c).
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
#include "utils/builtins.h"
#include "utils/jsonb.h"

#include "base/json_build.h"
#include "base/json_member.h"
#include "base/parameters.h"
#include "calls/settle_by_event.h"
#include "calls/stripe_ledger.h"
#include "ledger/ledger.h"
#include "stripe/stripe_answer.h"
#include "stripe/stripe_effect.h"

/* What of a call is looked at, in the order of CallColumn. */
#define CALL_COLUMNS \
	"SELECT account, operation_type, operation_id, token, outcome::pg_catalog.text," \
	" lease_expires_at, idempotency_key, resource_id, request, caller_life, caller_vxid," \
	" livemode, first_sent_at IS NOT NULL" \
	" FROM idempotency.stripe_idempotency_keys"

/*
 * The rows that something may be found out about.  One that was not executed is
 * among them, if it was sent at all: what was recorded is the answer to the last
 * of several attempts, and an earlier attempt may have succeeded without an
 * answer.
 */
#define MAY_BE_SETTLED \
	OUTCOME_IS("unknown") " OR " OUTCOME_IS("in_progress") \
	" OR (" OUTCOME_IS("not_executed") " AND first_sent_at IS NOT NULL)"

static OwnerStatement find_call = {
	CALL_COLUMNS STRIPE_WHERE_KEY,
	3, {TEXTOID, TEXTOID, TEXTOID}
};

/* $1: the object, $2: its account; a call whose path names it did not make it */
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

/* ---------- settling ---------- */

/* What is kept of an event as the reason for an outcome. */
static Jsonb *
evidence_of_event(const WebhookEvent *event, FoundBy found_by)
{
	StringInfoData json;

	json_begin(&json);
	json_add_string(&json, "stripe_event_id", event->id);
	json_add_string(&json, "event_type", event->type);
	json_add_string(&json, "found_by", found_by_names[found_by]);
	return json_end_jsonb(&json);
}

static bool
outcome_is(const CallRow *call, StripeOutcome outcome)
{
	return stripe_outcome_by_name(TextDatumGetCString(call->values[CALL_OUTCOME])) == outcome;
}

static NullableDatum
call_column(const CallRow *call, int column)
{
	NullableDatum datum;

	datum.value = call->values[column];
	datum.isnull = call->isnull[column];
	return datum;
}

/*
 * Is a call said not to have been executed although it may have been?  Only its
 * key, found at Stripe, proves better.
 */
static bool
call_is_denied(const CallRow *call)
{
	return outcome_is(call, STRIPE_NOT_EXECUTED) && DatumGetBool(call->values[CALL_SENT]);
}

/* Is the outcome of a call unknown, and nobody at it? */
static bool
call_is_open(const CallRow *call, bool key_found, int64 claimed_token, TimestampTz now)
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

/* $1 to $4: the call and its token */
static void
begin_with_token(Parameters *p, const CallRow *call)
{
	parameters_begin(p, call->values, LEDGER_MAX_KEYS);
	parameter_datum(p, call->values[CALL_TOKEN]);
}

/*
 * Lock a call, unless somebody else has, and see to it that nobody is at it.
 */
static bool
lock_open_call(Relation rel, CallRow *call, bool key_found, int64 claimed_token, TimestampTz now,
			   Execute execute)
{
	Parameters	p;

	begin_with_token(&p, call);
	return execute(rel, &lock_call, p.values, NULL, call->values, call->isnull,
				   CALL_NCOLUMNS) > 0 &&
		call_is_open(call, key_found, claimed_token, now);
}

/* Write down what was found out about a call that is locked. */
static bool
write_finding(Relation rel, const CallRow *call, const Finding *finding, TimestampTz now,
			  Execute execute)
{
	const CallResult *result = &finding->result;
	Operation	op;
	Parameters	p;

	begin_with_token(&p, call);
	parameter_outcome(&p, result->outcome);
	parameter_timestamp(&p, now);
	parameter_string(&p, result->resource_id);
	parameter_string(&p, result->resource_type);
	parameter_livemode(&p, result->livemode);
	parameter_string(&p, result->request_id);
	parameter_pointer(&p, result->response);
	parameter_pointer(&p, result->error);
	parameter_pointer(&p, finding->evidence);
	parameter_string(&p, finding->by);
	parameter_string(&p, result->resource_status);
	if (execute(rel, &settle_call, p.values, p.nulls, NULL, NULL, 0) == 0)
		return false;

	op.account = TextDatumGetCString(call->values[CALL_ACCOUNT]);
	op.type = TextDatumGetCString(call->values[CALL_TYPE]);
	op.id = TextDatumGetCString(call->values[CALL_ID]);
	stripe_notify_settled(&op, result->outcome, result->resource_id);
	return true;
}

/*
 * What an event that was found to be about a call says of it.  Returns false if
 * it says nothing; by and evidence are left to be set.
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
 * An event whose context is one's own account may be about a call that was made
 * without naming it.  One of a connected account may not: that account's owner
 * chooses metadata and keys.
 */
bool
may_be_of_account(const WebhookEvent *event, const char *account)
{
	return strcmp(event->account, account) == 0 ||
		(account[0] == '\0' && !event->connected);
}

/*
 * Find the call that has this key.  Returns false if there is none to be seen;
 * *other tells that there is one with this operation and another key, of another
 * generation.
 */
static bool
call_with_key(Relation rel, const WebhookEvent *event, const char *key, CallRow *call, bool *other)
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
			Parameters	p;

			parameters_begin(&p, NULL, 0);
			parameter_string(&p, accounts[i]);
			parameter_pointer(&p, cstring_to_text_with_len(key, colon - key));
			parameter_pointer(&p, cstring_to_text_with_len(colon + 1, uuid - colon - 1));
			if (ledger_execute(rel, &find_call, p.values, NULL, call->values, call->isnull,
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
 * Was the object of an event made by another call than the one whose key is in
 * its metadata?  Then the metadata was copied.
 */
static bool
is_made_by_another(Relation rel, const WebhookEvent *event)
{
	CallRow		call;
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
settle(Relation rel, CallRow *call, const WebhookEvent *event, FoundBy found_by,
	   int64 claimed_token, bool only_look, Execute execute)
{
	TimestampTz now = GetCurrentTimestamp();
	Finding		finding;

	if (!outcome_is(call, STRIPE_UNKNOWN) && !outcome_is(call, STRIPE_IN_PROGRESS) &&
		!(found_by == BY_KEY && call_is_denied(call)))
		return SETTLED_NOT;

	/* after a database was copied, both modes have the same keys */
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
	finding.evidence = evidence_of_event(event, found_by);
	if (!lock_open_call(rel, call, found_by == BY_KEY, claimed_token, now, execute) ||
		!write_finding(rel, call, &finding, now, execute))
		return SETTLED_LATER;
	return SETTLED;
}

/*
 * Settle a call by what somebody has found out at Stripe, or with an outcome of
 * NULL just keep what was asked.  "token" is the row's from before Stripe was
 * asked.  Does not wait: returns false, and leaves the row alone, if it has
 * changed since or somebody else has it.
 */
bool
settle_by_finding(const Datum *key, int64 token, const Finding *finding)
{
	Relation	rel = ledger_open(&stripe_calls, RowExclusiveLock, false);
	TimestampTz now = GetCurrentTimestamp();
	CallRow		call;
	bool		written;

	memcpy(call.values, key, LEDGER_MAX_KEYS * sizeof(Datum));
	call.values[CALL_TOKEN] = Int64GetDatum(token);
	written = lock_open_call(rel, &call, true, 0, now, ledger_execute_latest);
	if (written && stripe_is_definitive(finding->result.outcome))
		written = write_finding(rel, &call, finding, now, ledger_execute_latest);
	else if (written)
	{
		Parameters	p;

		begin_with_token(&p, &call);
		parameter_pointer(&p, finding->evidence);
		(void) ledger_execute_latest(rel, &note_asked, p.values, NULL, NULL, NULL, 0);
	}
	ledger_close(rel);
	return written;
}

/*
 * Settle what an event can settle.
 *
 * Returns, palloc'd, the key of a call that it may settle later, or NULL.
 */
char *
settle_by_event(const WebhookEvent *event)
{
	const char *keys[2];
	static const FoundBy found_by[2] = {BY_KEY, BY_METADATA};
	const char *pending = NULL;
	Relation	rel = NULL;
	CallRow		call;
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

	/* a thin event does not show its object, so the id alone says nothing new */
	if (event->object != NULL && event->object_id != NULL && pending == NULL)
	{
		Parameters	p;

		if (rel == NULL)
			rel = ledger_open(&stripe_calls, RowExclusiveLock, false);
		parameters_begin(&p, NULL, 0);
		parameter_string(&p, event->object_id);
		parameter_string(&p, event->account);
		if (ledger_execute(rel, &find_call_by_object, p.values, NULL, call.values, call.isnull,
						   CALL_NCOLUMNS) > 0)
			(void) settle(rel, &call, event, BY_OBJECT, 0, false, ledger_execute);
	}

	if (rel != NULL)
		ledger_close(rel);
	return pending == NULL ? NULL : pstrdup(pending);
}

/* Is an event about a call, and how was that found? */
static bool
event_is_about(const WebhookEvent *event, const CallRow *call, FoundBy *found_by)
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
 * Find a call by its account, operation type and operation id.  Returns false if
 * there is none, or none that an event may settle.
 */
bool
find_call_to_settle(Relation rel, const Datum *key, CallRow *call)
{
	return ledger_execute_latest(rel, &find_call, (Datum *) key, NULL, call->values,
								 call->isnull, CALL_NCOLUMNS) > 0 &&
		(outcome_is(call, STRIPE_UNKNOWN) || outcome_is(call, STRIPE_IN_PROGRESS) ||
		 call_is_denied(call));
}

/*
 * Settle a call by an event that may be about it or not.  Returns true if the
 * call is settled now, or with "only_look" would be.
 */
bool
settle_call_by_event(Relation rel, CallRow *call, const WebhookEvent *event,
					 int64 claimed_token, bool only_look)
{
	FoundBy		found_by;

	return event_is_about(event, call, &found_by) &&
		settle(rel, call, event, found_by, claimed_token, only_look,
			   ledger_execute_latest) == SETTLED;
}
