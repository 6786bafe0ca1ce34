/*-------------------------------------------------------------------------
 *
 * abandoned_orders.c
 *	  Orders that nobody waits for, in databases without a recorder.
 *
 * A backend that leaves an answer of Stripe's behind asks for a recorder, but may
 * ask in vain: no process is to be had at that moment, the one that was asked
 * for cannot start, the database is being dropped.  The backend does not come
 * back for it: its caller was told what Stripe said, and has gone on.  So the
 * launcher, which is always there, looks for such orders: whenever it is woken,
 * which it is when something is left behind, at the end of a DROP DATABASE, and
 * when a recorder ends before its work is done; and every second as long as
 * there are any.
 *
 * It asks again until a recorder runs, with a pause that grows if one was asked
 * for and has not come.  That one has come shows in the oldest of these orders,
 * which it has done, or at least taken; that it was terminated then is no reason
 * to have the next one wait.  If there is no slot it looks more often, as callers
 * do, so as not to lose its turn.
 *
 * The orders of a database that no longer exists are discarded, and the log says
 * which.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/process/abandoned_orders.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <limits.h>

#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/pg_database.h"
#include "miscadmin.h"
#include "utils/fmgroids.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"

#include "base/clock.h"
#include "base/compat.h"
#include "process/abandoned_orders.h"
#include "process/recorder_queue.h"
#include "process/recorder_start.h"

/* How often to look while there are such orders, and while there is no slot. */
#define LOOK_MS 1000
#define PLACE_LOOK_MS 50

/* The longest pause between two recorders that do not come. */
#define LAST_PAUSE_MS (30 * 1000)

/* How long to remember what was tried for a database. */
#define FORGET_USECS (60 * USECS_PER_SEC)

/* A database that has such orders, and the oldest of them. */
typedef struct Left
{
	Oid			database;
	uint64		number;
	int			tries;
} Left;

/* What was found when a recorder was last asked for, and when that was. */
typedef struct Tried
{
	Left		left;
	TimestampTz asked;
	int			pause_ms;
} Tried;

typedef enum DatabaseState
{
	DATABASE_IS_THERE,
	DATABASE_IS_BROKEN,			/* by a DROP DATABASE that was interrupted */
	DATABASE_IS_GONE
} DatabaseState;

static Tried *tried = NULL;		/* as many as there are orders */
static int	ntried = 0;
static bool no_place_logged = false;

/*
 * The databases that have such orders, each once.  One that is being dropped is
 * left out until that has ended.
 */
static int
find_databases(Left *list)
{
	int			n = 0;
	int			i;

	LWLockAcquire(recorder_queue_lock, LW_SHARED);
	for (i = 0; i < recorder_queue_norders(); i++)
	{
		Order	   *order = recorder_queue_order(i);
		RecorderSlot *slot;
		int			j;

		if (!recorder_queue_is_left(order))
			continue;
		for (j = 0; j < n && list[j].database != order->database; j++)
			;
		if (j < n && list[j].number < order->number)
			continue;
		slot = recorder_queue_slot(order->database, false);
		if (slot != NULL && (slot->procno >= 0 || slot->blocked))
			continue;
		list[j].database = order->database;
		list[j].number = order->number;
		list[j].tries = order->tries;
		if (j == n)
			n++;
	}
	LWLockRelease(recorder_queue_lock);
	return n;
}

static DatabaseState
database_state(Oid database)
{
	MemoryContext context = CurrentMemoryContext;
	DatabaseState state = DATABASE_IS_GONE;
	Relation	rel;
	TableScanDesc scan;
	ScanKeyData key;
	HeapTuple	tuple;

	StartTransactionCommand();
	(void) GetTransactionSnapshot();
	rel = table_open(DatabaseRelationId, AccessShareLock);
	ScanKeyInit(&key, Anum_pg_database_oid, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(database));
	scan = table_beginscan_catalog(rel, 1, &key);
	tuple = heap_getnext(scan, ForwardScanDirection);
	if (tuple != NULL)
		state = ((Form_pg_database) GETSTRUCT(tuple))->datconnlimit == DATCONNLIMIT_INVALID_DB ?
			DATABASE_IS_BROKEN : DATABASE_IS_THERE;
	table_endscan(scan);
	table_close(rel, AccessShareLock);
	CommitTransactionCommand();
	MemoryContextSwitchTo(context);
	return state;
}

/*
 * The database is gone, and no recorder can come to its orders any more.
 */
static void
discard_orders(Oid database)
{
	int			i;

	for (i = 0; i < recorder_queue_norders(); i++)
	{
		Order	   *order = recorder_queue_order(i);
		bool		left;
		dsm_handle	segment;

		LWLockAcquire(recorder_queue_lock, LW_EXCLUSIVE);
		left = recorder_queue_is_left(order) && order->database == database;
		if (left)
			order->state = ORDER_TAKEN;
		LWLockRelease(recorder_queue_lock);
		if (!left)
			continue;

		/* the message may not end us here, with the order in nobody's hands */
		HOLD_INTERRUPTS();
		ereport(LOG,
				(errmsg("what is known of Stripe operation \"%s:%s\" is not recorded",
						order->type, order->id),
				 errdetail("Its database has been dropped.")));
		segment = order->segment;
		LWLockAcquire(recorder_queue_lock, LW_EXCLUSIVE);
		recorder_queue_free_order(order);
		LWLockRelease(recorder_queue_lock);
		if (segment != DSM_HANDLE_INVALID)
			dsm_unpin_segment(segment);
		RESUME_INTERRUPTS();
	}
}

/* What was tried for a database; a new entry if that was long ago. */
static Tried *
find_tried(const Left *left)
{
	TimestampTz now = GetCurrentTimestamp();
	int			kept = 0;
	int			i;

	if (tried == NULL)
		tried = MemoryContextAlloc(TopMemoryContext, recorder_queue_norders() * sizeof(Tried));
	for (i = 0; i < ntried; i++)
	{
		if (tried[i].left.database == left->database ||
			!is_over(tried[i].asked, FORGET_USECS, now))
			tried[kept++] = tried[i];
	}
	ntried = kept;

	for (i = 0; i < ntried; i++)
	{
		if (tried[i].left.database == left->database)
			return &tried[i];
	}
	if (ntried == recorder_queue_norders())
		ntried = 0;
	tried[ntried].left = *left;
	tried[ntried].asked = 0;
	tried[ntried].pause_ms = 0;
	return &tried[ntried++];
}

/*
 * See to it that a recorder comes to one of them.  Returns false if there is no
 * slot for it.
 */
static bool
see_to_database(const Left *left)
{
	Oid			database = left->database;
	Tried	   *last = find_tried(left);
	TimestampTz now = GetCurrentTimestamp();
	TimestampTz since;

	/* has one come since? */
	if (last->left.number != left->number || last->left.tries != left->tries)
		last->pause_ms = 0;
	last->left = *left;

	if (!is_over(last->asked, last->pause_ms * INT64CONST(1000), now))
		return true;
	last->asked = now;
	last->pause_ms = Min(Max(2 * last->pause_ms, LOOK_MS), LAST_PAUSE_MS);

	switch (database_state(database))
	{
		case DATABASE_IS_GONE:
			discard_orders(database);
			return true;
		case DATABASE_IS_BROKEN:
			return true;
		case DATABASE_IS_THERE:
			break;
	}
	if (ask_for_recorder(database, &since, NULL) != RECORDER_HAS_NO_PLACE)
		return true;

	/* there may be one at any moment */
	last->pause_ms = 0;
	return false;
}

/*
 * Look for such orders, and see to them.  Returns the milliseconds after which to
 * look again.
 */
long
see_to_left_orders(void)
{
	Left	   *left = palloc(recorder_queue_norders() * sizeof(Left));
	int			n = find_databases(left);
	bool		no_place = false;
	int			i;

	for (i = 0; i < n; i++)
	{
		if (!see_to_database(&left[i]))
			no_place = true;
	}
	pfree(left);

	if (no_place && !no_place_logged)
		ereport(LOG,
				(errcode(ERRCODE_CONFIGURATION_LIMIT_EXCEEDED),
				 errmsg("idempotency launcher: there is no free slot for a recorder of Stripe operations"),
				 errdetail("What is known of some is recorded as soon as there is one."),
				 errhint("Consider increasing \"max_worker_processes\".")));
	no_place_logged = no_place;
	if (no_place)
		return PLACE_LOOK_MS;
	return n > 0 ? LOOK_MS : LONG_MAX;
}
