/*-------------------------------------------------------------------------
 *
 * drop_database.c
 *	  What happens at DROP DATABASE.
 *
 * PostgreSQL says that a database is being dropped when it holds the lock that
 * keeps new processes out, and before it counts those that are in.  So ours, the
 * recorder and the worker, are sent away then, and none is started until the
 * transaction has ended.
 *
 * Whether the database is dropped is not known before that: other sessions, a
 * replication slot or a subscription may be in the way.  So nothing is given up
 * here.  What waits to be recorded stays where it is, and at the end of the
 * transaction, whichever it is, the launcher is woken: it has a recorder started
 * if the database still exists, and discards the orders if it does not
 * (abandoned_orders.c).
 *
 * The end of a transaction cannot be missed: a session that is terminated rolls
 * back, and a killed one takes the shared memory with it.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/process/drop_database.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "catalog/objectaccess.h"
#include "catalog/pg_database.h"
#include "miscadmin.h"
#include "nodes/pg_list.h"
#include "storage/latch.h"
#include "utils/memutils.h"

#include "base/compat.h"
#include "process/drop_database.h"
#include "process/launcher.h"
#include "process/recorder_queue.h"
#include "process/worker_table.h"

/* How long DROP DATABASE waits for our processes, ten milliseconds at a time. */
#define DROP_WAIT_MS 10
#define DROP_WAITS 500

static object_access_hook_type prev_object_access_hook = NULL;

/* What this transaction drops; in TopMemoryContext. */
static List *dropping = NIL;

static void
at_xact_event(XactEvent event, void *arg)
{
	ListCell   *lc;

	if (dropping == NIL || (event != XACT_EVENT_COMMIT && event != XACT_EVENT_ABORT))
		return;

	foreach(lc, dropping)
	{
		recorder_queue_unblock(lfirst_oid(lc));
		worker_may_return(lfirst_oid(lc), event == XACT_EVENT_COMMIT);
	}
	list_free(dropping);
	dropping = NIL;
}

/*
 * Send our processes away, and wait until they are gone.  If one is still there
 * then, PostgreSQL reports it as it reports any other session.
 */
static void
leave_database(Oid dbid)
{
	static uint32 wait_event = 0;
	int			waits;

	if (wait_event == 0)
	{
		wait_event = WAIT_EVENT_NEW("IdempotencyDropDatabase");
		RegisterXactCallback(at_xact_event, NULL);
	}
	if (!list_member_oid(dropping, dbid))
	{
		MemoryContext old = MemoryContextSwitchTo(TopMemoryContext);

		dropping = lappend_oid(dropping, dbid);
		MemoryContextSwitchTo(old);
	}

	for (waits = 0; waits < DROP_WAITS; waits++)
	{
		bool		recorder = recorder_queue_block(dbid);
		bool		worker = worker_send_away(dbid);

		if (!recorder && !worker)
			return;

		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 DROP_WAIT_MS, wait_event);
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
}

static void
on_object_access(ObjectAccessType access, Oid classid, Oid objid, int subid, void *arg)
{
	if (prev_object_access_hook)
		prev_object_access_hook(access, classid, objid, subid, arg);

	if (access == OAT_DROP && classid == DatabaseRelationId &&
		worker_table != NULL && recorder_queue_is_there())
		leave_database(objid);
}

/* To be called while the library is preloaded. */
void
drop_database_init(void)
{
	prev_object_access_hook = object_access_hook;
	object_access_hook = on_object_access;
}
