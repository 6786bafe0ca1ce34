/*-------------------------------------------------------------------------
 *
 * webhook_queue.c
 *	  Which event stripe_webhook_next() hands out.
 *
 * The one that has waited longest of those that nobody has tried yet comes
 * first; then those whose time has come again (next_attempt_at).  So whatever
 * fails, fresh events are never behind it.  Events that are dead or have to wait
 * are not looked at: they are at the end of the index.
 *
 * No event is handed out while another one of its object is claimed, by a
 * transaction that is open or with a lease.  A lease can be seen, an open
 * transaction's claim cannot: so a transaction that is handed an event holds a
 * lock on its object until it ends, and looks at the leases only once it has the
 * lock.  Nobody waits for that lock; an object that others are at is passed by.
 * It is a lock of the kind that pg_advisory_xact_lock() takes, in a space of its
 * own, and there are at most OBJECT_LOCKS of them, so that a transaction may
 * claim any number of events (though others pass by no more than MAX_PASSED of
 * them, and find nothing behind).  Two objects may share a lock, and then wait
 * for each other.
 *
 * An event without an object stands for itself.  Claims that do not come this
 * way, of Stripe's deliveries or by hand, neither take that lock nor heed it.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/events/webhook_queue.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_collation_d.h"
#include "catalog/pg_type_d.h"
#include "common/hashfn.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "storage/lock.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/rel.h"

#include "base/parameters.h"
#include "events/webhook_ledger.h"
#include "events/webhook_queue.h"
#include "ledger/open_claims.h"

#define OBJECT_LOCKS 1024

/* The fourth field of an advisory lock; PostgreSQL's own functions use 1 and 2. */
#define OBJECT_LOCK_CLASS 0x1de

/* Candidates that are looked at together, once the first is none, and in all. */
#define PAGE 100
#define MAX_PASSED 1000

/*
 * Of an event "e": is it due, and is neither it nor another one of its object
 * claimed?  $2 is the clock, $3 has the tokens of this transaction's open claims.
 * OFFSET 0 has that looked up for one event after the other.
 */
#define SAME_OBJECT \
	"SELECT FROM idempotency.stripe_webhook_events o" \
	" WHERE o.object_id OPERATOR(pg_catalog.=) e.object_id" \
	" AND o.account OPERATOR(pg_catalog.=) e.account" \
	" AND o.consumer OPERATOR(pg_catalog.=) e.consumer" \
	" AND o.claimed_at IS NOT NULL AND o.success IS NULL"

#define MAY_BE_HANDED_OUT \
	" next_attempt_at OPERATOR(pg_catalog.<=) $2" \
	" AND (lease_expires_at IS NULL OR lease_expires_at OPERATOR(pg_catalog.<=) $2)" \
	" AND NOT EXISTS (" SAME_OBJECT \
	" AND o.lease_expires_at OPERATOR(pg_catalog.>) $2 OFFSET 0)" \
	" AND (pg_catalog.cardinality($3) OPERATOR(pg_catalog.=) 0" \
	" OR token OPERATOR(pg_catalog.<>) ALL ($3)" \
	" AND NOT EXISTS (" SAME_OBJECT \
	" AND o.token OPERATOR(pg_catalog.=) ANY ($3) OFFSET 0))"

/*
 * What stands for an event when it is passed by: its account, and its object or
 * itself.  Several accounts may have an object of one name, such as a product or
 * a coupon whose id somebody has chosen.
 */
#define THING \
	"account OPERATOR(pg_catalog.||) E'\\n' OPERATOR(pg_catalog.||) COALESCE(object_id, stripe_event_id)"

/* $1: consumer, $4: 0 for fresh ones, 1 for others, $5: things that are passed by */
#define FIND_CANDIDATES(limit) \
	"SELECT account, stripe_event_id, " THING " FROM idempotency.stripe_webhook_events e" \
	" WHERE consumer OPERATOR(pg_catalog.=) $1 AND success IS NOT TRUE" \
	" AND LEAST(attempts, 1) OPERATOR(pg_catalog.=) $4" \
	" AND (" THING ") OPERATOR(pg_catalog.<>) ALL ($5)" \
	" AND" MAY_BE_HANDED_OUT " ORDER BY next_attempt_at LIMIT " limit

static OwnerStatement find_first = {
	FIND_CANDIDATES("1"),
	5, {TEXTOID, TIMESTAMPTZOID, INT8ARRAYOID, INT4OID, TEXTARRAYOID}
};

static OwnerStatement find_page = {
	FIND_CANDIDATES(CppAsString2(PAGE)),
	5, {TEXTOID, TIMESTAMPTZOID, INT8ARRAYOID, INT4OID, TEXTARRAYOID}
};

/*
 * $1: consumer, $4: account, $5: event.  The condition on success is written so
 * that the planner does not use the queue's index for it.
 */
static OwnerStatement lock_event = {
	SELECT_EVENT " e WHERE account OPERATOR(pg_catalog.=) $4"
	" AND stripe_event_id OPERATOR(pg_catalog.=) $5 AND consumer OPERATOR(pg_catalog.=) $1"
	" AND NOT COALESCE(success, false) AND" MAY_BE_HANDED_OUT " FOR UPDATE SKIP LOCKED",
	5, {TEXTOID, TIMESTAMPTZOID, INT8ARRAYOID, TEXTOID, TEXTOID}
};

/* Columns of a candidate. */
enum
{
	K_ACCOUNT, K_STRIPE_EVENT_ID, K_THING, K_NCOLUMNS
};

/* What is found, and what is passed by. */
typedef struct Search
{
	MemoryContext context;
	Relation	rel;
	text	   *consumer;
	TimestampTz now;
	Datum		own;			/* tokens of this transaction's claims */
	Datum		passed[MAX_PASSED];
	int			npassed;
	Datum		candidates[PAGE][K_NCOLUMNS];
	int			ncandidates;
} Search;

static void
add_candidate(Search *search, const Datum *values)
{
	int			n = search->ncandidates++;

	memcpy(search->candidates[n], values, sizeof(search->candidates[n]));
}

static void
add_row(HeapTuple tuple, TupleDesc desc, void *arg)
{
	Search	   *search = arg;
	MemoryContext old = MemoryContextSwitchTo(search->context);
	Datum		values[K_NCOLUMNS];
	bool		isnull;			/* none is */
	int			i;

	for (i = 0; i < K_NCOLUMNS; i++)
		values[i] = PointerGetDatum(DatumGetTextPCopy(heap_getattr(tuple, i + 1, desc, &isnull)));
	add_candidate(search, values);
	MemoryContextSwitchTo(old);
}

/* $1 to $3 of all statements */
static void
begin_parameters(Parameters *p, const Search *search)
{
	parameters_begin(p, NULL, 0);
	parameter_pointer(p, search->consumer);
	parameter_timestamp(p, search->now);
	parameter_datum(p, search->own);
}

/* The first candidate or, once something is passed by, a page of them. */
static void
find_candidates(Search *search, int tried)
{
	Parameters	p;
	Datum		out[K_NCOLUMNS];
	bool		outnull[K_NCOLUMNS];

	begin_parameters(&p, search);
	parameter_int32(&p, tried);
	parameter_pointer(&p, construct_array(search->passed, search->npassed, TEXTOID,
										  -1, false, TYPALIGN_INT));
	search->ncandidates = 0;
	if (search->npassed > 0)
		owner_select(&find_page, search->rel->rd_rel->relowner, p.values, add_row, search);
	else if (ledger_execute(search->rel, &find_first, p.values, NULL, out, outnull, K_NCOLUMNS) > 0)
		add_candidate(search, out);
}

/* ---------- one candidate ---------- */

static bool
is_passed(Search *search, Datum thing)
{
	int			i;

	for (i = 0; i < search->npassed; i++)
	{
		if (DatumGetBool(DirectFunctionCall2Coll(texteq, C_COLLATION_OID,
												 search->passed[i], thing)))
			return true;
	}
	return false;
}

/* The lock that an account's object has for a consumer. */
static void
object_lock(Search *search, int n, LOCKTAG *tag)
{
	StringInfoData name;
	uint32		hash;

	initStringInfo(&name);
	appendStringInfoString(&name, text_to_cstring(search->consumer));
	appendStringInfoChar(&name, '\0');
	appendStringInfoString(&name, TextDatumGetCString(search->candidates[n][K_THING]));
	hash = hash_bytes((unsigned char *) name.data, name.len);

	SET_LOCKTAG_ADVISORY(*tag, MyDatabaseId, RelationGetRelid(search->rel),
						 hash % OBJECT_LOCKS, OBJECT_LOCK_CLASS);
}

/*
 * Lock a candidate, unless somebody is at it or at its object.  Returns false if
 * somebody is, or it may no longer be handed out.
 */
static bool
lock_candidate(Search *search, int n, LedgerRow *row)
{
	LOCKTAG		tag;
	LockAcquireResult locked;
	Parameters	p;

	object_lock(search, n, &tag);
	locked = LockAcquire(&tag, ExclusiveLock, false, true);
	if (locked == LOCKACQUIRE_NOT_AVAIL)
		return false;

	begin_parameters(&p, search);
	parameter_datum(&p, search->candidates[n][K_ACCOUNT]);
	parameter_datum(&p, search->candidates[n][K_STRIPE_EVENT_ID]);
	if (ledger_execute_latest(search->rel, &lock_event, p.values, NULL, row->values,
							  row->isnull, webhook_events.ncolumns) > 0)
		return true;

	if (locked == LOCKACQUIRE_OK)
		LockRelease(&tag, ExclusiveLock, false);
	return false;
}

/* ---------- the search ---------- */

/* Tokens of claims that belong to this transaction. */
static Datum
own_tokens(void)
{
	int			n;
	int64	   *tokens = open_claims_tokens(&n);
	Datum	   *elements = palloc((n + 1) * sizeof(Datum));
	int			i;

	for (i = 0; i < n; i++)
		elements[i] = Int64GetDatum(tokens[i]);
	return PointerGetDatum(construct_array(elements, n, INT8OID, sizeof(int64),
										   FLOAT8PASSBYVAL, TYPALIGN_DOUBLE));
}

/*
 * Lock the event that comes next, and its object, and read its row.  Returns
 * false if there is none, or only behind MAX_PASSED that others are at.
 */
bool
webhook_queue_next(Relation rel, text *consumer, TimestampTz now, LedgerRow *row)
{
	Search	   *search = palloc0(sizeof(Search));
	int			tried;
	int			i;

	search->context = CurrentMemoryContext;
	search->rel = rel;
	search->consumer = consumer;
	search->now = now;
	search->own = own_tokens();

	for (tried = 0; tried <= 1; tried++)
	{
		for (;;)
		{
			int			npassed = search->npassed;

			CHECK_FOR_INTERRUPTS();
			find_candidates(search, tried);
			for (i = 0; i < search->ncandidates; i++)
			{
				Datum		thing = search->candidates[i][K_THING];

				if (is_passed(search, thing))
					continue;
				if (lock_candidate(search, i, row))
					return true;
				if (search->npassed == MAX_PASSED)
					return false;
				search->passed[search->npassed++] = thing;
			}
			if (search->npassed == npassed)
				break;			/* there are no others */
		}
	}
	return false;
}
