/*-------------------------------------------------------------------------
 *
 * ledger.c
 *	  The one state machine behind every ledger.
 *
 * A claim is decided by an INSERT ... ON CONFLICT DO NOTHING or by an UPDATE
 * that names the token it takes over, and by nothing else.  Before it writes,
 * it looks: one scan of the primary key with a dirty snapshot.  The look is a
 * hint that saves the write where the answer is known already (a replay, a
 * live claim), and that names the transaction to wait for.  It may miss a row
 * that is being moved at that instant; then the INSERT finds it, and the loop
 * looks again.
 *
 * The ON CONFLICT names no columns.  With them it would know the primary key
 * alone, and while REINDEX CONCURRENTLY keeps a second one, two claims of a key
 * at the same moment could fail there with a unique violation or a deadlock.
 * A unique index of the user's that is in the way ends in the error of
 * ledger_lost_race().
 *
 * Why a dirty snapshot.  INSERT ... ON CONFLICT alone would wait for every
 * open transaction that has touched the row, also for one that merely extends
 * a committed, live claim.  Reading by MVCC through the index would take
 * predicate locks on whole index pages, and at SERIALIZABLE two claims of
 * different new keys would fail each other.  What a dirty scan returns with
 * neither xmin nor xmax set is committed, and nobody is changing it: at READ
 * COMMITTED that is exactly what a new snapshot would show.  Above READ
 * COMMITTED the row is fetched once more, by its TID, with the transaction's
 * snapshot: a row that this doesn't see was written by a concurrent winner,
 * and the honest answer is a serialization failure.
 *
 * The look reads the table itself, without the planner.  That is right only
 * where the planner would do the same; ledger_check() finds out, once per
 * relcache invalidation.  For any other table (distributed, partitioned, with
 * rules or policies) the look is a SELECT.
 *
 * Waiting.  A claim that may wait waits for the other transaction's id in an
 * internal subtransaction with a lock_timeout of what is left of
 * idempotency.wait_timeout, so that the deadlock detector, cancel and the
 * user's own lock_timeout all work and running out of time is an answer, not
 * an error.  A claim that may not wait writes in such a subtransaction with a
 * lock_timeout of 1 ms, for the case of a twin that slips in after the look.  A
 * waiting claim's INSERT needs no subtransaction, which would cost every fresh
 * claim: it can block only on such a late twin, and then for
 * idempotency.wait_timeout at most (an error, 55P03).  If a user's trigger,
 * which may do anything, runs in it, it has one nevertheless.  A takeover can
 * also meet a row lock, which the look does not see, and has one.  The
 * recorder claims for others in subtransactions and under a lock_timeout of
 * its own: it waits for nobody and just writes ("bounded").
 *
 * Locks: ROW EXCLUSIVE on the table and ACCESS SHARE on its primary key, kept
 * to the end of the transaction, as every statement does.  A look at what is
 * committed now releases the lock on the primary key at once: callers of the
 * recorder take it, and the recorder should not have to wait for them.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/ledger/ledger.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/relscan.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "catalog/namespace.h"
#include "catalog/pg_am_d.h"
#include "catalog/pg_class.h"
#include "catalog/pg_collation_d.h"
#include "executor/tuptable.h"
#include "miscadmin.h"
#include "storage/lmgr.h"
#include "storage/proc.h"
#include "utils/fmgroids.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"

#include "base/compat.h"
#include "base/errors.h"
#include "base/lock_limit.h"
#include "base/settings.h"
#include "base/settings_guard.h"
#include "ledger/ledger.h"
#include "ledger/open_claims.h"

/* A statement that took longer than this has waited: 10 ms. */
#define WAITED_USECS INT64CONST(10000)

/* How long a claim that doesn't wait may be held up by a late twin. */
#define NOWAIT_TIMEOUT_MS 1

/* Races lost in a row before a claim says that others are busy with the key. */
#define MAX_RACES 100

/* Random tokens are drawn from the system in handfuls. */
#define TOKEN_POOL 32
#define TOKEN_MASK ((INT64CONST(1) << 53) - 1)

/* All ledgers that this backend has used, for the invalidation callback. */
#define MAX_LEDGERS 4
static Ledger *known_ledgers[MAX_LEDGERS];
static int	nknown_ledgers = 0;

/* Whoever wants to know that this database has the extension, or NULL. */
static void (*note_use) (void) = NULL;

static void
invalidate_ledger(Datum arg, Oid relid)
{
	int			i;

	for (i = 0; i < nknown_ledgers; i++)
	{
		if (!OidIsValid(relid) || known_ledgers[i]->relid == relid)
			known_ledgers[i]->relid = InvalidOid;
	}
}

static void
remember_ledger(Ledger *ledger)
{
	int			i;

	for (i = 0; i < nknown_ledgers; i++)
	{
		if (known_ledgers[i] == ledger)
			return;
	}

	Assert(nknown_ledgers < MAX_LEDGERS);
	if (nknown_ledgers == 0)
		CacheRegisterRelcacheCallback(invalidate_ledger, (Datum) 0);
	known_ledgers[nknown_ledgers++] = ledger;
}

/*
 * OID of a ledger's table by name.  Raises an error if there is none.
 */
static Oid
ledger_relid(Ledger *ledger)
{
	Oid			namespace = get_namespace_oid("idempotency", true);
	Oid			relid = InvalidOid;

	if (OidIsValid(namespace))
		relid = get_relname_relid(ledger->table, namespace);
	if (!OidIsValid(relid))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("table \"idempotency.%s\" does not exist", ledger->table),
				 errhint("Run CREATE EXTENSION idempotency in this database.")));
	return relid;
}

/* Is the primary key the ledger's own, on columns in the ledger's order? */
static bool
primary_key_is_ours(Ledger *ledger, Relation rel)
{
	Oid			pkid = RelationGetPrimaryKeyIndexCompat(rel);
	Relation	pk;
	bool		ours;
	int			i;

	if (!OidIsValid(pkid))
		return false;

	pk = index_open(pkid, AccessShareLock);
	ours = pk->rd_rel->relam == BTREE_AM_OID &&
		pk->rd_index->indnkeyatts == ledger->nkeys;
	for (i = 0; ours && i < ledger->nkeys; i++)
		ours = pk->rd_index->indkey.values[i] == ledger->keys[i] &&
			pk->rd_indcollation[i] == C_COLLATION_OID;
	index_close(pk, NoLock);

	return ours;
}

/*
 * Is an index unique on exactly the columns of the key, for all rows and at
 * once?
 */
static bool
index_keeps_key(Ledger *ledger, Relation index)
{
	Form_pg_index form = index->rd_index;
	int			i;
	int			j;

	if (!form->indisunique || !form->indisvalid || !form->indimmediate ||
		form->indnkeyatts != ledger->nkeys ||
		!heap_attisnull(index->rd_indextuple, Anum_pg_index_indpred, NULL))
		return false;
	for (i = 0; i < ledger->nkeys; i++)
	{
		for (j = 0; j < ledger->nkeys && form->indkey.values[j] != ledger->keys[i]; j++)
			;
		if (j == ledger->nkeys)
			return false;
	}
	return true;
}

/*
 * Does an index ensure that a key has one row?  The insert of a claim does not
 * name an index.
 */
static bool
has_unique_key(Ledger *ledger, Relation rel)
{
	List	   *indexes = RelationGetIndexList(rel);
	ListCell   *lc;
	bool		found = false;

	foreach(lc, indexes)
	{
		Relation	index = index_open(lfirst_oid(lc), AccessShareLock);

		found = index_keeps_key(ledger, index);
		index_close(index, NoLock);
		if (found)
			break;
	}
	list_free(indexes);
	return found;
}

/*
 * Check that an opened and locked table has the columns whose numbers are
 * compiled in.  Find out whether its key is unique, and whether its rows may be
 * read without the planner.
 */
static void
ledger_check(Ledger *ledger, Relation rel)
{
	TupleDesc	desc = RelationGetDescr(rel);
	int			i;

	for (i = 0; i < ledger->ncolumns; i++)
	{
		if (i >= desc->natts || TupleDescAttr(desc, i)->attisdropped ||
			strcmp(NameStr(TupleDescAttr(desc, i)->attname), ledger->columns[i]) != 0)
			ereport(ERROR,
					(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
					 errmsg("table \"idempotency.%s\" has no column \"%s\" in place %d",
							ledger->table, ledger->columns[i], i + 1),
					 errhint("The library and the extension's installed version do not belong together: try ALTER EXTENSION idempotency UPDATE.")));
	}

	ledger->unique = has_unique_key(ledger, rel);
	ledger->bare = rel->trigdesc == NULL &&
		(desc->constr == NULL || (desc->constr->num_check == 0 && desc->constr->num_defval == 0));

	ledger->direct =
		rel->rd_rel->relkind == RELKIND_RELATION &&
		rel->rd_rel->relam == HEAP_TABLE_AM_OID &&
		!rel->rd_rel->relhassubclass &&
		!rel->rd_rel->relhasrules &&
		!rel->rd_rel->relrowsecurity &&
		primary_key_is_ours(ledger, rel) &&
		owner_plan_is_local_scan(&ledger->select, rel->rd_rel->relowner,
								 RelationGetRelid(rel));
}

/*
 * Have a callback called when a ledger is found, which is at its first use in a
 * backend and now and then later.  To be called while the library is preloaded.
 */
void
ledger_note_use(void (*callback) (void))
{
	note_use = callback;
}

/*
 * Open a ledger's table.  The caller closes it with ledger_close(); the lock
 * stays until the end of the transaction.
 *
 * With nowait, a lock that is not available at once is an error (55P03).
 * Opening it to write is refused while a setting that may guard it has lost
 * its value (IK011).
 */
Relation
ledger_open(Ledger *ledger, LOCKMODE lockmode, bool nowait)
{
	if (lockmode != AccessShareLock)
		check_settings();

	for (;;)
	{
		Oid			relid = ledger->relid;
		Relation	rel;

		if (!OidIsValid(relid))
			relid = ledger_relid(ledger);

		if (nowait && !ConditionalLockRelationOid(relid, lockmode))
			ereport(ERROR,
					(errcode(ERRCODE_LOCK_NOT_AVAILABLE),
					 errmsg("could not obtain lock on relation \"idempotency.%s\"",
							ledger->table)));

		/* takes the lock and so learns of every invalidation before it */
		rel = try_table_open(relid, nowait ? NoLock : lockmode);
		if (rel != NULL)
		{
			if (ledger->relid == relid)
				return rel;

			if (ledger_relid(ledger) == relid)
			{
				remember_ledger(ledger);
				ledger_check(ledger, rel);
				ledger->relid = relid;
				if (note_use != NULL)
					note_use();
				return rel;
			}
			table_close(rel, lockmode);
		}

		ledger->relid = InvalidOid;
		CHECK_FOR_INTERRUPTS();
	}
}

/* Close a ledger's table and keep its lock. */
void
ledger_close(Relation rel)
{
	table_close(rel, NoLock);
}

/*
 * Run one of a ledger's statements with the table owner's rights, in a new
 * snapshot.  See owner_execute().
 */
uint64
ledger_execute(Relation rel, OwnerStatement *statement, Datum *values,
			   const char *nulls, Datum *out, bool *outnull, int nout)
{
	return owner_execute(statement, rel->rd_rel->relowner, values, nulls, false,
						 out, outnull, nout);
}

/*
 * The same in a snapshot taken now, whatever the transaction's.  See
 * owner_execute_latest().
 */
uint64
ledger_execute_latest(Relation rel, OwnerStatement *statement, Datum *values,
					  const char *nulls, Datum *out, bool *outnull, int nout)
{
	return owner_execute_latest(statement, rel->rd_rel->relowner, values, nulls,
								out, outnull, nout);
}

/*
 * The look by a SELECT, which sees committed rows and our own.
 */
static void
look_by_select(Ledger *ledger, Relation rel, const Datum *key, LedgerRow *row, bool latest)
{
	row->found = FOUND_NOTHING;
	row->own = false;
	row->busy = InvalidTransactionId;
	row->speculative = 0;

	if ((latest ? ledger_execute_latest : ledger_execute)
		(rel, &ledger->select, (Datum *) key, NULL,
		 row->values, row->isnull, ledger->ncolumns) > 0)
	{
		row->found = FOUND_ROW;
		row->own = open_claims_contain(DatumGetInt64(row->values[0]));
	}
}

/*
 * Take a tuple apart.  A table may have more columns than this library knows
 * and a LedgerRow has room for: those of a later version, until the server is
 * restarted with that version's library, or somebody's own.
 */
static void
deform_row(HeapTuple tuple, TupleDesc desc, LedgerRow *row)
{
	if (desc->natts <= LEDGER_MAX_COLUMNS)
		heap_deform_tuple(tuple, desc, row->values, row->isnull);
	else
	{
		Datum	   *values = palloc(desc->natts * sizeof(Datum));
		bool	   *isnull = palloc(desc->natts * sizeof(bool));

		heap_deform_tuple(tuple, desc, values, isnull);
		memcpy(row->values, values, sizeof(row->values));
		memcpy(row->isnull, isnull, sizeof(row->isnull));
		pfree(values);
		pfree(isnull);
	}
}

/*
 * The look: one dirty scan of the primary key.
 *
 * On return row->values hold the committed version of the row, or our own
 * uncommitted one, copied into the current memory context (large values still
 * as TOAST pointers: the caller's active snapshot protects what they point
 * to).  Unless "latest", raises a serialization failure where the
 * transaction's snapshot doesn't see the version that is there now.
 */
static void
look(Ledger *ledger, Relation rel, const Datum *key, LedgerRow *row, bool latest)
{
	Oid			pkid;
	Relation	pk;
	SnapshotData dirty;
	ScanKeyData skeys[LEDGER_MAX_KEYS];
	IndexScanDesc scan;
	TupleTableSlot *slot;
	HeapTuple	tuple = NULL;
	int			i;

	pkid = ledger->direct ? RelationGetPrimaryKeyIndexCompat(rel) : InvalidOid;
	if (!OidIsValid(pkid))
	{
		look_by_select(ledger, rel, key, row, latest);
		return;
	}

	row->found = FOUND_NOTHING;
	row->own = false;
	row->busy = InvalidTransactionId;
	row->speculative = 0;

	pk = index_open(pkid, AccessShareLock);
	slot = MakeSingleTupleTableSlot(RelationGetDescr(rel), table_slot_callbacks(rel));

	for (i = 0; i < ledger->nkeys; i++)
		ScanKeyEntryInitialize(&skeys[i], 0, i + 1, BTEqualStrategyNumber, InvalidOid,
							   C_COLLATION_OID, F_TEXTEQ, key[i]);
	InitDirtySnapshot(dirty);
	scan = index_beginscan_compat(rel, pk, &dirty, ledger->nkeys);
	index_rescan(scan, skeys, ledger->nkeys, NULL, 0);

	/*
	 * More than one version can come back: an open transaction that moves a
	 * row leaves the committed one, with xmax set, and its own, with xmin
	 * set. A version with neither is the only one.
	 */
	while (index_getnext_slot(scan, ForwardScanDirection, slot))
	{
		if (TransactionIdIsValid(dirty.xmin))
		{
			row->busy = dirty.xmin;
			row->speculative = dirty.speculativeToken;
			continue;
		}
		if (TransactionIdIsValid(dirty.xmax))
			row->busy = dirty.xmax;

		tuple = ExecCopySlotHeapTuple(slot);
		row->own = TransactionIdIsCurrentTransactionId(HeapTupleHeaderGetXmin(tuple->t_data));
		if (!TransactionIdIsValid(dirty.xmax))
			break;
	}
	index_endscan(scan);
	index_close(pk, latest ? AccessShareLock : NoLock);

	if (tuple != NULL && !row->own && !latest && IsolationUsesXactSnapshot())
	{
		/* takes the predicate lock that SERIALIZABLE wants, on this row only */
		if (!table_tuple_fetch_row_version(rel, &tuple->t_self, GetTransactionSnapshot(), slot))
			ereport(ERROR,
					(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
					 errmsg("could not serialize access due to a concurrent claim"),
					 errdetail("The row in \"idempotency.%s\" was written after this transaction's snapshot was taken.",
							   ledger->table),
					 errhint("The transaction might succeed if retried.")));
	}
	ExecDropSingleTupleTableSlot(slot);

	if (tuple != NULL)
	{
		row->found = FOUND_ROW;
		deform_row(tuple, RelationGetDescr(rel), row);
	}
	else if (TransactionIdIsValid(row->busy))
		row->found = FOUND_TWIN;
}

/*
 * The look of a transaction that decides by what its snapshot sees.
 */
void
ledger_look(Ledger *ledger, Relation rel, const Datum *key, LedgerRow *row)
{
	look(ledger, rel, key, row, false);
}

/*
 * The look at what is committed now, at any isolation level.
 */
void
ledger_look_latest(Ledger *ledger, Relation rel, const Datum *key, LedgerRow *row)
{
	look(ledger, rel, key, row, true);
}

/*
 * The row as the query's own snapshot sees it, for display; works on a
 * standby.  Returns false if there is none.
 */
bool
ledger_lookup(Ledger *ledger, const Datum *key, LedgerRow *row)
{
	Relation	rel = ledger_open(ledger, AccessShareLock, false);
	uint64		n;

	n = owner_execute(&ledger->select, rel->rd_rel->relowner, (Datum *) key, NULL, true,
					  row->values, row->isnull, ledger->ncolumns);
	ledger_close(rel);

	return n > 0;
}

/* Arguments of do_wait(). */
typedef struct WaitWork
{
	Relation	rel;
	LedgerRow  *row;
} WaitWork;

/* Wait until the transaction that is changing a row has ended. */
static void
do_wait(void *arg)
{
	WaitWork   *work = arg;

	if (work->row->speculative != 0)
		SpeculativeInsertionWait(work->row->busy, work->row->speculative);
	else
		XactLockTableWait(work->row->busy, work->rel, NULL, XLTW_None);
}

/* Arguments of do_write(). */
typedef struct WriteWork
{
	LedgerClaim *claim;
	Relation	rel;
	LedgerRow  *row;			/* NULL: insert */
	TimestampTz now;
	bool		written;
} WriteWork;

/* Insert or take over the row of a claim. */
static void
do_write(void *arg)
{
	WriteWork  *work = arg;
	LedgerClaim *claim = work->claim;

	if (work->row == NULL)
		work->written = claim->insert(claim, work->rel, work->now);
	else
		work->written = claim->take(claim, work->rel, work->row, work->now);
}

/*
 * The INSERT of a claim that may wait and whose look went straight to the
 * table: no subtransaction, but no unlimited wait either.
 *
 * lock_limit_begin() would cost every fresh claim 7 % more.  The variable
 * itself may be changed because the table is bare: nobody else's code, which
 * might set it, too, runs meanwhile.
 */
static void
write_bounded(WriteWork *work)
{
	int			users_timeout = LockTimeout;

	if (setting_wait_timeout < 0 || (users_timeout > 0 && users_timeout <= setting_wait_timeout))
	{
		do_write(work);
		return;
	}

	PG_TRY();
	{
		LockTimeout = Max(setting_wait_timeout, NOWAIT_TIMEOUT_MS);
		do_write(work);
	}
	PG_FINALLY();
	{
		LockTimeout = users_timeout;
	}
	PG_END_TRY();
}

/*
 * Milliseconds left of idempotency.wait_timeout for a claim that began to wait
 * at "since".  Returns 0 for no limit, and -1 if there are none left.
 */
static int
wait_left(TimestampTz since)
{
	int64		left;

	if (setting_wait_timeout < 0)
		return 0;
	left = setting_wait_timeout - (GetCurrentTimestamp() - since) / 1000;
	return left > 0 ? (int) Min(left, setting_wait_timeout) : -1;
}

/*
 * Claim a key.
 *
 * The answer is given through the callbacks: either decide() said that there
 * is nothing to write, or insert() or take() wrote, or busy() was told that
 * others are in the way.  "now" is read anew for each decision, and a claim
 * that had to wait in its write is renewed before this returns.
 */
void
ledger_claim(Ledger *ledger, Relation rel, LedgerClaim *claim)
{
	TimestampTz waiting_since = 0;
	int			races;

	if (!ledger->unique)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("table \"idempotency.%s\" has no unique index on its key", ledger->table),
				 errdetail("Without one a key could be claimed twice."),
				 errhint("Restore its primary key.")));

	for (races = 0; races < MAX_RACES; races++)
	{
		TimestampTz now;
		LedgerRow	row;
		WriteWork	write;

		CHECK_FOR_INTERRUPTS();

		look(ledger, rel, claim->key, &row, claim->bounded);
		now = GetCurrentTimestamp();

		if (row.found == FOUND_ROW && claim->decide(claim, &row, now) == LEDGER_ANSWER)
			return;

		if (TransactionIdIsValid(row.busy))
		{
			WaitWork	wait;
			int			left;

			if (waiting_since == 0)
				waiting_since = now;
			left = claim->wait && !claim->bounded ? wait_left(waiting_since) : -1;
			wait.rel = rel;
			wait.row = &row;
			if (left < 0 || !within_lock_timeout(left, true, false, do_wait, &wait))
				break;
			continue;
		}

		write.claim = claim;
		write.rel = rel;
		write.row = row.found == FOUND_ROW ? &row : NULL;
		write.now = now;
		write.written = false;

		if (claim->bounded)
			do_write(&write);
		else if (claim->wait && ledger->direct && ledger->bare && write.row == NULL)
			write_bounded(&write);
		else
		{
			int			left = NOWAIT_TIMEOUT_MS;

			if (claim->wait)
			{
				if (waiting_since == 0)
					waiting_since = now;
				left = wait_left(waiting_since);

				/* nobody was seen, so try it even if no time is left to wait */
				if (left < 0)
					left = NOWAIT_TIMEOUT_MS;
			}
			if (!within_lock_timeout(left, true, !ledger->direct, do_write, &write))
				break;
		}

		if (write.written)
		{
			if (ledger_has_waited(&now))
				claim->renew(claim, rel, now);
			return;
		}
	}

	claim->busy(claim);
}

/*
 * Has a statement that was given this clock waited for somebody?  If so, sets
 * *clock to the present, with which the caller renews what it wrote.
 */
bool
ledger_has_waited(TimestampTz *clock)
{
	TimestampTz now = GetCurrentTimestamp();

	if (now - *clock <= WAITED_USECS)
		return false;
	*clock = now;
	return true;
}

/*
 * A fenced statement changed nothing although its row is as it should be, so
 * another transaction was faster, and the caller tries again.  Counts that in
 * *races, and raises an error after too many: something else is the reason.
 */
void
ledger_lost_race(Ledger *ledger, int *races)
{
	CHECK_FOR_INTERRUPTS();

	if (++*races >= MAX_RACES)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("could not change a row of table \"idempotency.%s\"", ledger->table),
				 errdetail("It has been tried %d times.", MAX_RACES),
				 errhint("A trigger, a rule or a unique index of the table may prevent it.")));
}

/*
 * A fencing token: random, from 1 to 2^53 - 1.  A counter would hand a number
 * out twice where a crash lost the WAL that had moved it on.
 */
int64
ledger_new_token(void)
{
	static int64 pool[TOKEN_POOL];
	static int	left = 0;

	for (;;)
	{
		int64		token;

		if (left == 0)
		{
			if (!pg_strong_random(pool, sizeof(pool)))
				ereport(ERROR,
						(errcode(ERRCODE_INTERNAL_ERROR),
						 errmsg("could not generate random values")));
			left = TOKEN_POOL;
		}

		token = pool[--left] & TOKEN_MASK;
		pool[left] = 0;
		if (token != 0)
			return token;
	}
}

/* Seconds until a moment, for an HTTP header: at least 1. */
int
ledger_retry_after(TimestampTz until, TimestampTz now)
{
	int64		secs = (until - now + USECS_PER_SEC - 1) / USECS_PER_SEC;

	return (int) Max(Min(secs, PG_INT32_MAX), 1);
}
