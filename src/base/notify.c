/*-------------------------------------------------------------------------
 *
 * notify.c
 *	  NOTIFY by the extension: everything that it tells listeners goes this
 *	  way.
 *
 * PostgreSQL refuses to prepare a transaction that has sent a NOTIFY, and what
 * settles a call would then make PREPARE TRANSACTION fail, at every delivery
 * of the event that does it.  So a notice is kept until the end of the
 * transaction.  At COMMIT it becomes a NOTIFY.  At PREPARE TRANSACTION it
 * becomes a row of idempotency.pending_notices, which shares the transaction's
 * fate.  Once that has committed, a worker sends the notices and deletes the
 * rows; COMMIT PREPARED only has one come soon.  (If they were sent there, an
 * error of the NOTIFY would look as if the transaction had not committed.)  So
 * a notice comes at least once, as ever after COMMIT.
 *
 * That takes a hook and workers.  If the library is not preloaded, the NOTIFY
 * is sent at PREPARE TRANSACTION, too, and PostgreSQL refuses it in its own
 * words.  A hint, which only spares its listener a look that is taken now and
 * then anyway, is left out there.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/notify.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/table.h"
#include "access/xact.h"
#include "catalog/dependency.h"
#include "catalog/namespace.h"
#include "catalog/pg_class.h"
#include "catalog/pg_type_d.h"
#include "commands/async.h"
#include "commands/extension.h"
#include "miscadmin.h"
#include "nodes/pg_list.h"
#include "storage/bufmgr.h"
#include "tcop/utility.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "base/compat.h"
#include "base/debug_point.h"
#include "base/errors.h"
#include "base/notify.h"
#include "base/owner_spi.h"
#include "base/parameters.h"
#include "base/shmem.h"

/* NOTIFY takes no more than this, but says so only during the commit. */
#define PAYLOAD_MAX (BLCKSZ - NAMEDATALEN - 128 - 1)

typedef struct Notice
{
	SubTransactionId subid;		/* the innermost that is not over */
	bool		hint;			/* may it be left out? */
	char	   *channel;
	char	   *payload;
} Notice;

/*
 * In TopTransactionContext, in order of time, and so with subtransaction ids
 * that do not decrease.
 */
static List *notices = NIL;

/* Set exactly where there is shared memory, and with it workers. */
static NoticeCallbacks callbacks;

static ProcessUtility_hook_type prev_process_utility = NULL;

static OwnerStatement keep_notice = {
	"INSERT INTO idempotency.pending_notices (prepared_at, number, channel, payload)"
	" VALUES ($1, $2, $3, $4)",
	4, {TIMESTAMPTZOID, INT4OID, TEXTOID, TEXTOID}
};

static OwnerStatement take_notices = {
	"WITH taken AS (DELETE FROM idempotency.pending_notices WHERE ctid OPERATOR(pg_catalog.=)"
	" ANY (ARRAY(SELECT ctid FROM idempotency.pending_notices LIMIT 1000"
	" FOR UPDATE SKIP LOCKED)) RETURNING prepared_at, number, channel, payload)"
	" SELECT CAST(channel AS pg_catalog.text), CAST(payload AS pg_catalog.text) FROM taken ORDER BY prepared_at, number",
	0, {0}
};

/* ---------- the table ---------- */

/*
 * Open it.  Returns NULL if it does not exist: a table of that name that does
 * not belong to the extension is somebody else's.
 */
static Relation
open_table(void)
{
	Oid			extension = get_extension_oid("idempotency", true);
	Oid			namespace = get_namespace_oid("idempotency", true);
	Oid			relid;

	if (!OidIsValid(extension) || !OidIsValid(namespace))
		return NULL;
	relid = get_relname_relid("pending_notices", namespace);
	if (!OidIsValid(relid) || get_rel_relkind(relid) != RELKIND_RELATION ||
		getExtensionOfObject(RelationRelationId, relid) != extension)
		return NULL;
	return try_table_open(relid, RowExclusiveLock);
}

/*
 * The transaction is being prepared: its notices become part of it.
 */
static void
keep_notices(void)
{
	Relation	rel = open_table();
	TimestampTz now = GetCurrentTimestamp();
	int			i;

	if (rel == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("table \"idempotency.pending_notices\" does not exist")));

	PushActiveSnapshot(GetTransactionSnapshot());
	for (i = 0; i < list_length(notices); i++)
	{
		Notice	   *notice = list_nth(notices, i);
		Parameters	p;

		parameters_begin(&p, NULL, 0);
		parameter_timestamp(&p, now);
		parameter_int32(&p, i);
		parameter_string(&p, notice->channel);
		parameter_string(&p, notice->payload);
		(void) owner_execute(&keep_notice, rel->rd_rel->relowner, p.values, p.nulls, false,
							 NULL, NULL, 0);
	}
	PopActiveSnapshot();
	table_close(rel, NoLock);
	callbacks.kept();
}

/*
 * What NOTIFY would not take was not put there by us: it must neither make the
 * commit fail nor stand in the way of the others.
 */
static void
send_row(HeapTuple tuple, TupleDesc desc, void *arg)
{
	bool		no_channel;
	bool		no_payload;
	Datum		channel_datum = heap_getattr(tuple, 1, desc, &no_channel);
	Datum		payload_datum = heap_getattr(tuple, 2, desc, &no_payload);
	char	   *channel;
	char	   *payload;

	if (no_channel || no_payload)
		return;
	channel = TextDatumGetCString(channel_datum);
	payload = TextDatumGetCString(payload_datum);
	if (channel[0] == '\0' || strlen(channel) >= NAMEDATALEN || strlen(payload) > PAYLOAD_MAX)
		return;
	notify_at_commit(channel, payload);
}

/*
 * Send what prepared transactions have left that are committed, with this one's
 * commit.  Costs next to nothing if there is nothing.  To be called in a
 * transaction with an active snapshot.
 */
void
send_kept_notices(void)
{
	Relation	rel = open_table();

	if (rel == NULL)
		return;
	if (RelationGetNumberOfBlocks(rel) > 0)
		owner_select(&take_notices, rel->rd_rel->relowner, NULL, send_row, NULL);
	table_close(rel, NoLock);
}

/* ---------- the transaction ---------- */

static void
send_notices(bool with_hints)
{
	ListCell   *lc;

	foreach(lc, notices)
	{
		Notice	   *notice = lfirst(lc);

		if (with_hints || !notice->hint)
			Async_Notify(notice->channel, notice->payload);
	}
}

static void
at_xact_event(XactEvent event, void *arg)
{
	switch (event)
	{
		case XACT_EVENT_PRE_PREPARE:
			if (shmem_is_there())
			{
				if (notices != NIL)
					keep_notices();
			}
			else
				send_notices(false);
			break;
		case XACT_EVENT_PRE_COMMIT:
			send_notices(true);
			break;
		case XACT_EVENT_COMMIT:
		case XACT_EVENT_ABORT:
		case XACT_EVENT_PREPARE:
			notices = NIL;
			break;
		default:
			break;
	}
}

static void
at_subxact_event(SubXactEvent event, SubTransactionId subid,
				 SubTransactionId parent, void *arg)
{
	int			n = list_length(notices);

	if (event != SUBXACT_EVENT_COMMIT_SUB && event != SUBXACT_EVENT_ABORT_SUB)
		return;

	/* those that it has added are the last */
	for (; n > 0; n--)
	{
		Notice	   *notice = list_nth(notices, n - 1);

		if (notice->subid < subid)
			break;
		notice->subid = parent;
	}
	if (event == SUBXACT_EVENT_ABORT_SUB)
		notices = list_truncate(notices, n);
}

/* Is it the same as the last one?  PostgreSQL would send it once anyway. */
static bool
is_last_notice(bool hint, const char *channel, const char *payload)
{
	Notice	   *last = notices == NIL ? NULL : llast(notices);

	return last != NULL && last->hint == hint &&
		last->subid == GetCurrentSubTransactionId() &&
		strcmp(last->channel, channel) == 0 && strcmp(last->payload, payload) == 0;
}

static void
add_notice(bool hint, const char *channel, const char *payload)
{
	static bool registered = false;
	MemoryContext old;
	Notice	   *notice;

	if (!registered)
	{
		RegisterXactCallback(at_xact_event, NULL);
		RegisterSubXactCallback(at_subxact_event, NULL);
		registered = true;
	}
	if (is_last_notice(hint, channel, payload))
		return;

	old = MemoryContextSwitchTo(TopTransactionContext);
	notice = palloc(sizeof(Notice));
	notice->subid = GetCurrentSubTransactionId();
	notice->hint = hint;
	notice->channel = pstrdup(channel);
	notice->payload = pstrdup(payload);
	notices = lappend(notices, notice);
	MemoryContextSwitchTo(old);
}

/*
 * NOTIFY, if this (sub)transaction commits.
 */
void
notify_at_commit(const char *channel, const char *payload)
{
	add_notice(false, channel, payload);
}

/*
 * The same for a listener that need not hear it: a transaction that is prepared
 * where there are no workers does not fail because of it.
 */
void
hint_at_commit(const char *channel, const char *payload)
{
	add_notice(true, channel, payload);
}

/* ---------- COMMIT PREPARED ---------- */

static void
on_process_utility(PlannedStmt *pstmt, const char *query, bool read_only_tree,
				   ProcessUtilityContext context, ParamListInfo params,
				   QueryEnvironment *environment, DestReceiver *dest, QueryCompletion *qc)
{
	Node	   *statement = pstmt->utilityStmt;
	bool		commits_prepared = IsA(statement, TransactionStmt) &&
		((TransactionStmt *) statement)->kind == TRANS_STMT_COMMIT_PREPARED;

	if (prev_process_utility)
		prev_process_utility(pstmt, query, read_only_tree, context, params, environment, dest, qc);
	else
		standard_ProcessUtility(pstmt, query, read_only_tree, context, params, environment,
								dest, qc);

	if (commits_prepared)
	{
		DEBUG_POINT("commit-prepared");
		callbacks.may_be_due();
	}
}

/* To be called while the library is preloaded. */
void
notice_init(const NoticeCallbacks *to_call)
{
	callbacks = *to_call;
	prev_process_utility = ProcessUtility_hook;
	ProcessUtility_hook = on_process_utility;
}
