/*-------------------------------------------------------------------------
 *
 * kept_events.c
 *	  Events that wait for the call that they are about.
 *
 * An event that cannot settle its call yet (settle_by_event.c) keeps the call's
 * key in pending_key.  It is found by that key when the operation is claimed
 * (settle_by_kept_events), and when a worker comes past the call while it is
 * open (settle_open_call).  So events whose keys are not ours, of another shop
 * or a staging system with the same account at Stripe, hold up nobody, however
 * many there are.
 *
 * Whether events still have to wait is looked at bit by bit
 * (settle_kept_events), in the order of pending_key, from the place where the
 * last look has stopped; with shared memory there is one place for all.  An
 * event that raises an error is stepped over.  An event of a key that is not
 * known waits for as long as it is kept: the namespace that the key was derived
 * from may be restored.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/events/kept_events.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type_d.h"
#include "miscadmin.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"

#include "base/compat.h"
#include "base/parameters.h"
#include "base/subtransaction.h"
#include "calls/settle_by_event.h"
#include "events/kept_events.h"
#include "events/webhook_ledger.h"
#include "ledger/ledger_search.h"
#include "stripe/webhook_event.h"

/*
 * Events that wait for one call: as many are looked at together, and as many of
 * them at all.
 */
#define KEPT_EVENTS_PAGE 20
#define KEPT_EVENTS_MAX 1000

/* Events that a settled call has had, and that need not wait any longer. */
#define MAX_FORGOTTEN 100

/* More than any pending key, which is printable ASCII */
#define LAST_KEY "\x7f"

/* Where the shared place is, or NULLs: then each backend has its own. */
static KeptPlaceCallbacks shared_place;

/*
 * $1: a key, $2 and $3: an object and its account, or NULL, $4: how many to
 * skip.  Those that tell of a failure come last: if a payment has failed and was
 * made all the same, later or by another card, that it was made counts.
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

/* ---------- the events of one call ---------- */

/*
 * The payloads of some events that wait for a call, or are about its object.
 * Returns how many there are.
 */
static int
find_payloads(Relation rel, const CallRow *call, int skip, Datum **payloads)
{
	Parameters	p;
	Datum		events;
	bool		isnull;
	int			n;

	parameters_begin(&p, NULL, 0);
	parameter_datum(&p, call->values[CALL_KEY]);
	parameter_nullable(&p, call->values[CALL_RESOURCE_ID], call->isnull[CALL_RESOURCE_ID]);
	parameter_datum(&p, call->values[CALL_ACCOUNT]);
	parameter_int64(&p, skip);
	(void) ledger_execute_latest(rel, &find_kept_events, p.values, p.nulls, &events, &isnull, 1);
	if (isnull)
		return 0;
	deconstruct_array(DatumGetArrayTypeP(events), JSONBOID, -1, false, TYPALIGN_INT,
					  payloads, NULL, &n);
	return n;
}

/*
 * Find a call by its key (account, operation type and operation id), and settle
 * it by events that came in before it could be settled.  Returns true if it is
 * settled now, or with "only_look" would be.
 */
static bool
find_and_settle(const Datum *key, int64 claimed_token, bool only_look, CallRow *call)
{
	Relation	rel = ledger_open(&stripe_calls, RowExclusiveLock, false);
	Relation	events_rel = webhook_events_open(AccessShareLock);
	bool		settled = false;

	if (find_call_to_settle(rel, key, call))
	{
		int			skip;
		int			n = KEPT_EVENTS_PAGE;

		for (skip = 0; skip < KEPT_EVENTS_MAX && n == KEPT_EVENTS_PAGE && !settled; skip += n)
		{
			Datum	   *payloads;
			int			i;

			CHECK_FOR_INTERRUPTS();
			n = find_payloads(events_rel, call, skip, &payloads);
			for (i = 0; i < n && !settled; i++)
			{
				WebhookEvent event;

				settled = webhook_event_read(DatumGetJsonbP(payloads[i]), &event) &&
					settle_call_by_event(rel, call, &event, claimed_token, only_look);
			}
		}
	}

	ledger_close(events_rel);
	ledger_close(rel);
	return settled;
}

/*
 * The same without the call.  "claimed_token" is the token of a claim that this
 * transaction has just made, or 0: the claimant has not sent anything yet and
 * need not any more.
 */
bool
settle_by_kept_events(const Datum *key, int64 claimed_token, bool only_look)
{
	CallRow		call;

	return find_and_settle(key, claimed_token, only_look, &call);
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
	bool		forgotten;		/* it no longer waits for this key */
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
	Parameters	p;

	step->forgotten = false;
	if (!kept->isnull[KEPT_PAYLOAD] &&
		webhook_event_read(DatumGetJsonbP(kept->values[KEPT_PAYLOAD]), &event))
		pending = settle_by_event(&event);
	if (pending != NULL && strcmp(pending, TextDatumGetCString(kept->values[KEPT_KEY])) == 0)
		return;

	/* whoever has the event locked is left alone */
	parameters_begin(&p, kept->values, LEDGER_MAX_KEYS);
	parameter_datum(&p, kept->values[KEPT_KEY]);
	if (ledger_execute(step->rel, &lock_kept_event, p.values, NULL, NULL, NULL, 0) == 0)
		return;
	parameters_begin(&p, kept->values, LEDGER_MAX_KEYS);
	parameter_string(&p, pending);
	(void) ledger_execute(step->rel, &set_pending_key, p.values, p.nulls, NULL, NULL, 0);
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
	Parameters	p;
	int			i;

	batch->forgotten = 0;
	batch->refused = 0;
	batch->refusal = NULL;
	kept.events = palloc(batch->max_events * sizeof(KeptEvent));
	kept.n = 0;
	parameters_begin(&p, NULL, 0);
	parameter_string(&p, place->key);
	parameter_string(&p, last);
	parameter_int64(&p, place->left);
	parameter_int64(&p, batch->max_events);
	owner_select(&next_kept_events, rel->rd_rel->relowner, p.values, add_kept_event, &kept);

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
 * The same for a session that has nothing else to do.  Nobody there reads which
 * event was refused, so the log says it, once.
 */
void
settle_kept_events_idly(int max_events)
{
	static KeptPlace own = {"", 0};
	static bool logged = false;
	KeptPlace	place = own;
	KeptBatch	batch;

	if (shared_place.read != NULL)
		shared_place.read(&place);
	batch.max_events = max_events;
	batch.place = &place;
	settle_kept_events(&batch);
	own = place;
	if (shared_place.write != NULL)
		shared_place.write(&place);

	if (batch.refused > 0 && !logged)
	{
		logged = true;
		ereport(LOG,
				(errmsg("event of Stripe's could not settle its call"),
				 errdetail("Row %s.", batch.refusal)));
	}
}

/*
 * Settle an open call by events that came in before it could be settled, in a
 * subtransaction.  Returns true if it is settled now; then they wait no longer.
 */
bool
settle_open_call(const Datum *key)
{
	CallRow		call;
	char	   *call_key;
	KeptPlace	place;
	KeptBatch	batch;

	if (!find_and_settle(key, 0, false, &call))
		return false;

	call_key = TextDatumGetCString(call.values[CALL_KEY]);
	strlcpy(place.key, call_key, sizeof(place.key));
	place.left = 0;
	batch.max_events = MAX_FORGOTTEN;
	batch.place = &place;
	look_at_kept_events(&batch, call_key);
	return true;
}

/* To be called while the library is preloaded. */
void
kept_events_share_place(const KeptPlaceCallbacks *callbacks)
{
	shared_place = *callbacks;
}
