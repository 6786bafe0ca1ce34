/*-------------------------------------------------------------------------
 *
 * recorder_queue.c
 *	  What callers and recorders share: orders, and who works on them.
 *
 * A backend that calls Stripe owns an order, from its first call to its end,
 * and posts one verb after the other in it.  What it leaves behind (an answer
 * that couldn't be recorded in time, a call given up by an error) stays in the
 * order, which then belongs to the recorder, and the backend takes another one.
 * So there are more orders than backends, and a shortage of them is an answer
 * given before anything is sent.
 *
 * Arguments lie in a dynamic shared memory segment per order, made and grown
 * by the backend before the send, with room for what is to be recorded after
 * it.  It is pinned, because it may have to outlive the backend, and unpinned
 * by whoever frees the order.
 *
 * Processes are stored by number, not by pointers to their latches: setting
 * the latch of a process that took over the number is harmless.
 *
 * Where there are more databases than places for processes, recorders take turns.
 * Whose recorder finds no place has an idle one asked to leave, and tries again,
 * soon and often, until there is a place or its time is over; those who have waited
 * longest come first.  Nobody is told that there is one: it is the postmaster that
 * has it back, and other extensions want it, too.
 *
 * Locking: one LWLock for all of it, held for a few stores, or for a pass over
 * the orders by a recorder that looks for work.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/process/recorder_queue.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "storage/latch.h"
#include "storage/proc.h"

#include "base/clock.h"
#include "base/compat.h"
#include "process/recorder_queue.h"

/*
 * A recorder stays that long, so that databases that take turns don't spend their
 * time on starting processes.
 */
#define SHORTEST_STAY_USECS (50 * INT64CONST(1000))

/* One that was asked to make room has gone after this. */
#define ROOM_USECS (100 * INT64CONST(1000))

/* Who wants a place asks more often than that. */
#define WANT_USECS (500 * INT64CONST(1000))

LWLock	   *recorder_queue_lock = NULL;
static RecorderQueue *queue = NULL;

/*
 * Two a backend, one of which may be left behind, and some for the small
 * server whose every backend has left behind several.
 */
static int
count_orders(void)
{
	return 2 * MaxBackends + 64;
}

static Size
orders_offset(int nslots)
{
	return MAXALIGN(offsetof(RecorderQueue, slots) + nslots * sizeof(RecorderSlot));
}

Size
recorder_queue_size(void)
{
	return add_size(orders_offset(max_worker_processes),
					mul_size(count_orders(), sizeof(Order)));
}

void
recorder_queue_init(void *area)
{
	RecorderQueue *new = area;
	int			i;

	/* the rest is zero: free */
	new->norders = count_orders();
	new->nslots = max_worker_processes;
	for (i = 0; i < new->nslots; i++)
		new->slots[i].procno = -1;
}

void
recorder_queue_attach(void *area, LWLockPadded *locks)
{
	queue = area;
	recorder_queue_lock = &locks[0].lock;
}

bool
recorder_queue_is_there(void)
{
	return queue != NULL;
}

int
recorder_queue_norders(void)
{
	return queue->norders;
}

Order *
recorder_queue_order(int i)
{
	return (Order *) ((char *) queue + orders_offset(queue->nslots)) + i;
}

/*
 * A free order for this backend, or NULL.  Under the exclusive lock.
 */
Order *
recorder_queue_new_order(void)
{
	int			i;

	for (i = 0; i < queue->norders; i++)
	{
		Order	   *order = recorder_queue_order(i);

		if (order->state == ORDER_FREE)
		{
			memset(order, 0, sizeof(Order));
			order->state = ORDER_OWNED;
			order->database = MyDatabaseId;
			order->procno = MY_PROC_NUMBER;
			order->segment = DSM_HANDLE_INVALID;
			return order;
		}
	}
	return NULL;
}

/*
 * Free an order; its segment has been unpinned.  Under the exclusive lock.
 */
void
recorder_queue_free_order(Order *order)
{
	order->state = ORDER_FREE;
	order->segment = DSM_HANDLE_INVALID;
}

/*
 * Hand an order to the recorder.  Under the exclusive lock.
 */
void
recorder_queue_post(Order *order, OrderVerb verb)
{
	order->verb = verb;
	order->state = ORDER_POSTED;
	order->number = ++queue->last_number;
	order->alone = false;
	order->committed = false;
	order->failures = 0;
	order->refusals = 0;
	order->failed_at = 0;
	order->pause_ms = 0;
	order->tries = 0;
	order->lease = 0;
}

/*
 * The slot of a database's recorder, or NULL.  Under the lock, exclusive with
 * create; then NULL means that all are in use.
 */
RecorderSlot *
recorder_queue_slot(Oid database, bool create)
{
	RecorderSlot *spare = NULL;
	int			i;

	for (i = 0; i < queue->nslots; i++)
	{
		RecorderSlot *slot = &queue->slots[i];

		if (slot->database == database)
			return slot;
		if (create && spare == NULL &&
			(!OidIsValid(slot->database) ||
			 (slot->procno < 0 &&
			  is_over(slot->started, 10 * USECS_PER_SEC, GetCurrentTimestamp()) &&
			  !slot->blocked)))
			spare = slot;
	}

	if (spare != NULL)
	{
		memset(spare, 0, sizeof(RecorderSlot));
		spare->database = database;
		spare->procno = -1;
	}
	return spare;
}

/* Wake a database's recorder, if there is one.  Under the lock. */
void
recorder_queue_wake(Oid database)
{
	RecorderSlot *slot = recorder_queue_slot(database, false);

	if (slot != NULL && slot->procno >= 0)
		SetLatch(&GetPGProcByNumber(slot->procno)->procLatch);
}

/* ---------- places for recorders ---------- */

/* What is noted of a database that wants a place, or NULL. */
static RecorderWant *
find_want(Oid database)
{
	int			i;

	for (i = 0; i < RECORDER_WANTS; i++)
	{
		if (queue->wants[i].database == database)
			return &queue->wants[i];
	}
	return NULL;
}

/* The one that has waited longest, or NULL.  Who doesn't ask any more is out. */
static RecorderWant *
next_want(void)
{
	TimestampTz now = GetCurrentTimestamp();
	RecorderWant *next = NULL;
	int			i;

	for (i = 0; i < RECORDER_WANTS; i++)
	{
		RecorderWant *want = &queue->wants[i];

		if (!OidIsValid(want->database))
			continue;
		if (is_over(want->seen, WANT_USECS, now))
			want->database = InvalidOid;
		else if (next == NULL || want->number < next->number)
			next = want;
	}
	return next;
}

/*
 * Somebody wants a recorder for this database: note that, and tell whether it is
 * this one's turn where there is a place.  To be asked again and again, until
 * there is one.  Under the exclusive lock.
 */
bool
recorder_queue_is_next(Oid database)
{
	RecorderWant *next = next_want();
	RecorderWant *want = find_want(database);

	if (want == NULL)
	{
		want = find_want(InvalidOid);
		if (want == NULL)
			return false;
		memset(want, 0, sizeof(RecorderWant));
		want->database = database;
		want->number = ++queue->last_want;
	}
	want->seen = GetCurrentTimestamp();
	want->procno = MY_PROC_NUMBER;
	return next == NULL || next == want;
}

/*
 * This database has found its place, or this process doesn't wait for it any more
 * (another one may): the next one may try.  Under the exclusive lock.
 */
void
recorder_queue_stop_wanting(Oid database, bool found)
{
	RecorderWant *want = find_want(database);

	if (want == NULL || (!found && want->procno != MY_PROC_NUMBER))
		return;
	want->database = InvalidOid;
	want = next_want();
	if (want != NULL)
		SetLatch(&GetPGProcByNumber(want->procno)->procLatch);
}

/*
 * A database wants a place, and there is none: ask the recorder that has had
 * nothing to do for longest to leave.  That takes it a moment, in which the next
 * one isn't asked for the same.  It stays where it has something to do by now,
 * and then counts as just used.  Under the exclusive lock.
 */
void
recorder_queue_ask_for_room(Oid database)
{
	RecorderWant *want = find_want(database);
	TimestampTz now = GetCurrentTimestamp();
	RecorderSlot *idlest = NULL;
	int			i;

	if (want == NULL || !is_over(want->asked, ROOM_USECS, now))
		return;
	for (i = 0; i < queue->nslots; i++)
	{
		RecorderSlot *slot = &queue->slots[i];

		if (slot->procno < 0 || slot->make_room || slot->blocked ||
			TransactionIdIsValid(slot->xid) ||
			!is_over(slot->came, SHORTEST_STAY_USECS, now))
			continue;
		if (idlest == NULL || slot->used < idlest->used)
			idlest = slot;
	}
	if (idlest == NULL)
		return;

	want->asked = now;
	idlest->make_room = true;
	SetLatch(&GetPGProcByNumber(idlest->procno)->procLatch);
}

/* Does nobody but a recorder see to this order?  Under the lock. */
bool
recorder_queue_is_left(const Order *order)
{
	return order->state == ORDER_POSTED && order->detached;
}

/* ---------- DROP DATABASE ---------- */

/*
 * A database is about to be dropped: send its recorder away, and let none be
 * started until recorder_queue_unblock().  Its orders stay as they are.  Returns false
 * when no recorder is there any more.
 */
bool
recorder_queue_block(Oid database)
{
	RecorderSlot *slot;
	bool		running = false;

	LWLockAcquire(recorder_queue_lock, LW_EXCLUSIVE);
	slot = recorder_queue_slot(database, true);
	if (slot != NULL)
	{
		running = slot->procno >= 0;
		slot->blocked = true;
		recorder_queue_wake(database);
	}
	LWLockRelease(recorder_queue_lock);
	return running;
}

/*
 * It has been dropped, or stays after all: give the slot back.
 */
void
recorder_queue_unblock(Oid database)
{
	RecorderSlot *slot;

	LWLockAcquire(recorder_queue_lock, LW_EXCLUSIVE);
	slot = recorder_queue_slot(database, false);
	if (slot != NULL)
	{
		slot->blocked = false;
		if (slot->procno < 0)
			slot->database = InvalidOid;
	}
	LWLockRelease(recorder_queue_lock);
}
