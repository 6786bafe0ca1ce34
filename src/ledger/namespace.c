/*-------------------------------------------------------------------------
 *
 * namespace.c
 *	  The secret that this database's keys and fingerprints are derived from.
 *
 * A namespace is 32 random bytes.  Stripe keys and operation UUIDs are
 * derived from it, so it must survive everything that the application
 * survives: rollback (hence it is made by CREATE EXTENSION and not on demand),
 * crash, dump and restore.  And two databases that serve different tenants
 * must not share one, or they would derive the same keys.
 *
 * The table has no unique key.  A restore runs CREATE EXTENSION, which makes a
 * row, and then loads the dumped one beside it; a unique key would refuse the
 * dumped row and silently change every key.  Each row says where it was made:
 * system identifier, database OID, time.
 *
 * Which row is in force is decided once, when a row is inserted, and written
 * down: the column in_force is true in that row alone, and a dump contains it.
 * CREATE EXTENSION's row is in force until a row is inserted that was in force
 * where it comes from.  That one is in force from then on (the trigger
 * function namespace_comes() sees to it, also for replicated rows).  This is
 * not computed anew from where and when rows were made: after the next
 * restore, or pg_upgrade, the result would be another.
 *
 * If triggers were disabled while rows were inserted, more than one row may be
 * marked, or none.  Then readers decide among those, or among all that are not
 * retired: one made elsewhere takes precedence over one made here; among
 * equals, the oldest.  Whoever claims an operation next, or a worker, writes
 * that down (namespace_write_down()).
 *
 * A row was made here if it names this database and this system, and did not
 * come from elsewhere (the trigger writes that down, too, in the column
 * carried).  pg_upgrade keeps database OIDs but gives the cluster a new system
 * identifier and runs no script; so if no such row names this system, the
 * newest that names this database's OID counts as made here.
 *
 * A database that was copied with CREATE DATABASE ... TEMPLATE (or that lost
 * its rows) has no row that was made here.  Until stripe_namespace() has
 * decided whether it goes on with the namespace of its original or has one of
 * its own, nothing may be sent to Stripe from it: namespace_for_stripe()
 * raises IK009. Requests may be claimed: fingerprints name the namespace they
 * were made with.
 *
 * Rows are only ever added, or retired by stripe_namespace('new'); retired
 * ones are kept because fingerprints made with them are still compared.  Their
 * number is that of restores and copies, so reading is a scan of one page.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/ledger/namespace.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/namespace.h"
#include "catalog/pg_type_d.h"
#include "commands/trigger.h"
#include "executor/tuptable.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "storage/lmgr.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "base/compat.h"
#include "base/errors.h"
#include "base/owner_spi.h"
#include "base/subtransaction.h"
#include "ledger/namespace.h"

PG_FUNCTION_INFO_V1(idempotency_stripe_namespace);
PG_FUNCTION_INFO_V1(idempotency_namespace_comes);

enum
{
	NS_VALUE, NS_SYSTEM, NS_DATABASE, NS_CREATED, NS_RETIRED, NS_IN_FORCE, NS_CARRIED,
	NS_NCOLUMNS
};

typedef struct NamespaceRow
{
	Namespace	ns;
	uint64		system;
	Oid			database;
	TimestampTz created;
	bool		retired;
	bool		marked;			/* in force, and not retired */
	bool		carried;		/* it came from elsewhere */
	bool		here;
	ItemPointerData tid;
} NamespaceRow;

typedef enum NamespaceState
{
	NAMESPACE_NONE,				/* all rows are retired, or there are none */
	NAMESPACE_COPIED,			/* none of the rows was made here */
	NAMESPACE_DECIDED
} NamespaceState;

static OwnerStatement insert_namespace = {
	"INSERT INTO idempotency.namespace"
	" (value, system_identifier, database, created_at, in_force)"
	" VALUES ($1, $2, $3, $4, $5)",
	5, {BYTEAOID, INT8OID, OIDOID, TIMESTAMPTZOID, BOOLOID}
};

static OwnerStatement retire_namespaces = {
	"UPDATE idempotency.namespace SET retired_at = COALESCE(retired_at, $1), in_force = false"
	" WHERE retired_at IS NULL OR in_force",
	1, {TIMESTAMPTZOID}
};

/* $1: the row in force, or NULL; the lock keeps it where it is */
static OwnerStatement mark_namespace = {
	"UPDATE idempotency.namespace"
	" SET in_force = COALESCE(ctid OPERATOR(pg_catalog.=) $1, false)"
	" WHERE in_force OPERATOR(pg_catalog.<>) COALESCE(ctid OPERATOR(pg_catalog.=) $1, false)",
	1, {TIDOID}
};

/* Has this process had to make a decision that is not written down? */
static bool met_undecided = false;

static Relation
open_namespace_table(LOCKMODE lockmode)
{
	Oid			schema = get_namespace_oid("idempotency", true);
	Oid			relid = OidIsValid(schema) ?
		get_relname_relid("namespace", schema) : InvalidOid;

	if (!OidIsValid(relid))
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_TABLE),
				 errmsg("table \"idempotency.%s\" does not exist", "namespace"),
				 errhint("Run CREATE EXTENSION idempotency in this database.")));
	return table_open(relid, lockmode);
}

/*
 * Read all rows, in the active snapshot, into a palloc'd array.
 */
static NamespaceRow *
read_namespaces(Relation rel, int *nrows)
{
	TupleTableSlot *slot;
	TableScanDesc scan;
	NamespaceRow *rows;
	int			max = 8;
	int			n = 0;

	rows = palloc(max * sizeof(NamespaceRow));
	slot = table_slot_create(rel, NULL);
	scan = table_beginscan_compat(rel, GetActiveSnapshot());
	while (table_scan_getnextslot(scan, ForwardScanDirection, slot))
	{
		NamespaceRow *row;
		bytea	   *value;

		slot_getallattrs(slot);
		value = DatumGetByteaPP(slot->tts_values[NS_VALUE]);
		if (VARSIZE_ANY_EXHDR(value) != NAMESPACE_LEN)
			ereport(ERROR,
					(errcode(ERRCODE_DATA_CORRUPTED),
					 errmsg("table \"idempotency.namespace\" holds a value of %d bytes instead of %d",
							(int) VARSIZE_ANY_EXHDR(value), NAMESPACE_LEN)));

		if (n >= max)
		{
			max *= 2;
			rows = repalloc(rows, max * sizeof(NamespaceRow));
		}
		row = &rows[n++];
		memcpy(row->ns.value, VARDATA_ANY(value), NAMESPACE_LEN);
		row->system = (uint64) DatumGetInt64(slot->tts_values[NS_SYSTEM]);
		row->database = DatumGetObjectId(slot->tts_values[NS_DATABASE]);
		row->created = DatumGetTimestampTz(slot->tts_values[NS_CREATED]);
		row->retired = !slot->tts_isnull[NS_RETIRED];
		row->marked = !row->retired && DatumGetBool(slot->tts_values[NS_IN_FORCE]);
		row->carried = DatumGetBool(slot->tts_values[NS_CARRIED]);
		row->here = false;
		row->tid = slot->tts_tid;
	}
	table_endscan(scan);
	ExecDropSingleTupleTableSlot(slot);

	*nrows = n;
	return rows;
}

/*
 * Mark the rows that were made here.
 */
static void
find_rows_made_here(NamespaceRow *rows, int nrows)
{
	uint64		system = GetSystemIdentifier();
	NamespaceRow *newest = NULL;
	bool		upgraded = true;
	int			i;

	for (i = 0; i < nrows; i++)
	{
		rows[i].here = false;
		if (rows[i].carried)
			continue;
		if (rows[i].system == system)
			upgraded = false;
		rows[i].here = rows[i].system == system && rows[i].database == MyDatabaseId;
		if (rows[i].database == MyDatabaseId &&
			(newest == NULL || rows[i].created > newest->created))
			newest = &rows[i];
	}

	/* after pg_upgrade, what was made here names the old system */
	if (upgraded && newest != NULL)
	{
		for (i = 0; i < nrows; i++)
			rows[i].here = !rows[i].carried && rows[i].system == newest->system &&
				rows[i].database == MyDatabaseId;
	}
}

/*
 * Find the row that is in force.  Sets *chosen, unless there is none, and
 * *written if the rows say so themselves and it did not have to be computed.
 */
static NamespaceState
choose_namespace(NamespaceRow *rows, int nrows, NamespaceRow **chosen, bool *written)
{
	NamespaceRow *best = NULL;
	bool		any_here = false;
	int			nmarked = 0;
	int			i;

	find_rows_made_here(rows, nrows);
	for (i = 0; i < nrows; i++)
		nmarked += rows[i].marked;
	for (i = 0; i < nrows; i++)
	{
		NamespaceRow *row = &rows[i];

		any_here = any_here || row->here;
		if (row->retired || (nmarked > 0 && !row->marked))
			continue;
		if (best == NULL ||
			(best->here && !row->here) ||
			(best->here == row->here && row->created < best->created))
			best = row;
	}

	*chosen = best;
	*written = best == NULL || nmarked == 1;
	if (best == NULL)
		return NAMESPACE_NONE;
	return any_here ? NAMESPACE_DECIDED : NAMESPACE_COPIED;
}

static NamespaceState
find_namespace(Namespace *ns)
{
	Relation	rel = open_namespace_table(AccessShareLock);
	NamespaceRow *rows;
	NamespaceRow *chosen;
	NamespaceState state;
	bool		written;
	int			nrows;

	rows = read_namespaces(rel, &nrows);
	state = choose_namespace(rows, nrows, &chosen, &written);
	met_undecided = met_undecided || !written;
	if (state != NAMESPACE_NONE)
		*ns = chosen->ns;
	pfree(rows);
	table_close(rel, NoLock);

	if (state == NAMESPACE_NONE)
		ereport(ERROR,
				(errcode(ERRCODE_FOREIGN_NAMESPACE),
				 errmsg("this database has no idempotency namespace"),
				 errdetail("Table \"idempotency.namespace\" is empty."),
				 errhint("Restore its rows from a dump, or make a new one with SELECT idempotency.stripe_namespace('new').")));
	return state;
}

/*
 * The namespace in force, for everything that stays in this database.  Needs
 * an active snapshot.
 */
void
namespace_in_force(Namespace *ns)
{
	(void) find_namespace(ns);
}

/*
 * The namespace in force, for what is sent to Stripe.  Raises IK009 in a copied
 * database whose namespace is not decided.
 */
void
namespace_for_stripe(Namespace *ns)
{
	if (find_namespace(ns) == NAMESPACE_COPIED)
		ereport(ERROR,
				(errcode(ERRCODE_FOREIGN_NAMESPACE),
				 errmsg("this database holds the idempotency namespace of another database"),
				 errdetail("It seems to be a copy: if it and its original both called Stripe, they would use the same keys."),
				 errhint("If this copy replaces its original, run SELECT idempotency.stripe_namespace('keep'); if both live on, run SELECT idempotency.stripe_namespace('new').")));
}

/*
 * Get the namespace with this id, retired or not.  Returns false if there is
 * none.
 */
bool
namespace_by_id(const uint8 *id, Namespace *ns)
{
	Relation	rel = open_namespace_table(AccessShareLock);
	NamespaceRow *rows;
	bool		found = false;
	int			nrows;
	int			i;

	rows = read_namespaces(rel, &nrows);
	for (i = 0; i < nrows && !found; i++)
	{
		uint8		row_id[NAMESPACE_ID_LEN];

		namespace_id(rows[i].ns.value, NAMESPACE_LEN, row_id);
		if (memcmp(row_id, id, NAMESPACE_ID_LEN) == 0)
		{
			*ns = rows[i].ns;
			found = true;
		}
	}
	pfree(rows);
	table_close(rel, NoLock);

	return found;
}

/* ---------- writing ---------- */

/*
 * The same as read_namespaces(), but in the latest snapshot.  The caller has
 * locked out other writers.
 */
static NamespaceRow *
read_latest_namespaces(Relation rel, int *nrows)
{
	NamespaceRow *rows;

	CommandCounterIncrement();
	PushActiveSnapshot(GetLatestSnapshot());
	rows = read_namespaces(rel, nrows);
	PopActiveSnapshot();
	return rows;
}

/* Mark one row, or none, as the only one in force. */
static void
mark(Relation rel, NamespaceRow *row)
{
	Datum		value = row == NULL ? (Datum) 0 : PointerGetDatum(&row->tid);
	const char *nulls = row == NULL ? "n" : " ";

	owner_execute_latest(&mark_namespace, rel->rd_rel->relowner, &value, nulls, NULL, NULL, 0);
}

static void
write_down(void *arg)
{
	Relation	rel = arg;
	NamespaceRow *chosen;
	bool		written;
	int			nrows;
	NamespaceRow *rows = read_latest_namespaces(rel, &nrows);

	(void) choose_namespace(rows, nrows, &chosen, &written);
	if (!written)
		mark(rel, chosen);
	pfree(rows);
}

/*
 * Write down which row is in force, if this process has had to compute it.
 * Does not wait: whoever has locked the table decides, too.  If it cannot be
 * written, that is logged and the caller goes on.
 */
void
namespace_write_down(void)
{
	Relation	rel;

	if (!met_undecided || XactReadOnly || RecoveryInProgress())
		return;
	met_undecided = false;

	rel = open_namespace_table(AccessShareLock);
	if (ConditionalLockRelation(rel, ShareRowExclusiveLock))
	{
		ErrorData  *error = try_in_subtransaction(write_down, rel);

		if (error != NULL)
			ereport(LOG,
					(errcode(error->sqlerrcode),
					 errmsg("could not write down which idempotency namespace is in force: %s",
							error->message)));
	}
	table_close(rel, NoLock);
}

/*
 * Was a row that is inserted made in the same place as one of these rows that
 * was made here?
 */
static bool
comes_from_here(NamespaceRow *rows, int nrows, uint64 system, Oid database)
{
	int			i;

	if (system == GetSystemIdentifier() && database == MyDatabaseId)
		return true;
	for (i = 0; i < nrows; i++)
	{
		if (rows[i].here && rows[i].system == system && rows[i].database == database)
			return true;
	}
	return false;
}

static bool
same_namespace(const NamespaceRow *row, bytea *value)
{
	return VARSIZE_ANY_EXHDR(value) == NAMESPACE_LEN &&
		memcmp(VARDATA_ANY(value), row->ns.value, NAMESPACE_LEN) == 0;
}

static bool
is_retired(const NamespaceRow *rows, int nrows, bytea *value)
{
	int			i;

	for (i = 0; i < nrows; i++)
	{
		if (rows[i].retired && same_namespace(&rows[i], value))
			return true;
	}
	return false;
}

/*
 * Is a row that is inserted, and was in force where it comes from, in force
 * here, too?  It is if no other row is, and it takes the place of a row that
 * was made here.  Of two that were made elsewhere the first to be inserted
 * stays in force; so does a row that is inserted a second time, and the
 * present one if an older one of our own is inserted.  A row that was retired
 * here does not return to force: somebody has decided that.
 */
static bool
takes_effect(Relation rel, NamespaceRow *rows, int nrows, bytea *value, bool carried)
{
	NamespaceRow *chosen;
	bool		written;
	bool		takes;

	(void) choose_namespace(rows, nrows, &chosen, &written);
	takes = chosen == NULL ||
		(chosen->here && carried && !same_namespace(chosen, value) &&
		 !is_retired(rows, nrows, value));
	if (takes && chosen != NULL)
		mark(rel, NULL);
	else if (!takes && !written)
		mark(rel, chosen);
	return takes;
}

/*
 * namespace_comes(): trigger function, called before a row is inserted by us,
 * a restore or replication.  Writes down in the row whether it was made
 * elsewhere, and whether it is in force.
 */
Datum
idempotency_namespace_comes(PG_FUNCTION_ARGS)
{
	static int columns[] = {NS_IN_FORCE + 1, NS_CARRIED + 1};
	TriggerData *trigger = (TriggerData *) fcinfo->context;
	Datum		values[NS_NCOLUMNS];
	bool		isnull[NS_NCOLUMNS];
	Datum		decided[lengthof(columns)];
	bool		not_null[lengthof(columns)] = {false, false};
	Relation	rel;
	NamespaceRow *rows;
	bool		in_force;
	bool		carried;
	int			nrows;
	int			i;

	if (!CALLED_AS_TRIGGER(fcinfo) || !TRIGGER_FIRED_BEFORE(trigger->tg_event) ||
		!TRIGGER_FIRED_FOR_ROW(trigger->tg_event) || !TRIGGER_FIRED_BY_INSERT(trigger->tg_event) ||
		strcmp(RelationGetRelationName(trigger->tg_relation), "namespace") != 0 ||
		RelationGetNamespace(trigger->tg_relation) != get_namespace_oid("idempotency", true))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("function \"%s\" is the trigger of table \"idempotency.namespace\"",
						"idempotency.namespace_comes")));

	rel = trigger->tg_relation;
	for (i = 0; i < NS_NCOLUMNS; i++)
		values[i] = heap_getattr(trigger->tg_trigtuple, i + 1, RelationGetDescr(rel), &isnull[i]);

	/* the table's constraints refuse such a row */
	if (isnull[NS_VALUE] || isnull[NS_SYSTEM] || isnull[NS_DATABASE] || isnull[NS_IN_FORCE])
		return PointerGetDatum(trigger->tg_trigtuple);

	/*
	 * One decision at a time.  The table's own lock will not do: whoever inserts
	 * holds a weaker one already, and two that do could not both upgrade it.
	 */
	LockDatabaseObject(RelationRelationId, RelationGetRelid(rel), 0, ShareRowExclusiveLock);
	rows = read_latest_namespaces(rel, &nrows);
	find_rows_made_here(rows, nrows);
	carried = !comes_from_here(rows, nrows, (uint64) DatumGetInt64(values[NS_SYSTEM]),
							   DatumGetObjectId(values[NS_DATABASE]));
	in_force = DatumGetBool(values[NS_IN_FORCE]) && isnull[NS_RETIRED] &&
		takes_effect(rel, rows, nrows, DatumGetByteaPP(values[NS_VALUE]), carried);
	pfree(rows);

	decided[0] = BoolGetDatum(in_force);
	decided[1] = BoolGetDatum(carried);
	return PointerGetDatum(heap_modify_tuple_by_cols(trigger->tg_trigtuple, RelationGetDescr(rel),
													 lengthof(columns), columns,
													 decided, not_null));
}

/*
 * stripe_namespace(choice): decide once, after a copy by TEMPLATE.  'keep'
 * goes on with the original's namespace, 'new' makes one.  CREATE EXTENSION
 * makes the first one with 'new'.
 */
Datum
idempotency_stripe_namespace(PG_FUNCTION_ARGS)
{
	char	   *choice;
	bool		keep;
	Relation	rel;
	Oid			owner;
	NamespaceRow *rows;
	NamespaceRow *chosen;
	NamespaceState state;
	Namespace	ns;
	bool		written;
	int			nrows;
	bytea	   *value;
	Datum		values[5];
	TimestampTz now;

	PreventCommandDuringRecovery("idempotency.stripe_namespace()");

	choice = PG_ARGISNULL(0) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(0));
	if (choice == NULL || (strcmp(choice, "keep") != 0 && strcmp(choice, "new") != 0))
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("choice must be \"keep\" or \"new\"")));
	keep = strcmp(choice, "keep") == 0;

	/* one decision at a time, on what the last one left */
	rel = open_namespace_table(ShareRowExclusiveLock);
	owner = rel->rd_rel->relowner;
	rows = read_latest_namespaces(rel, &nrows);
	state = choose_namespace(rows, nrows, &chosen, &written);

	if (state == NAMESPACE_DECIDED)
		ereport(ERROR,
				(errcode(ERRCODE_FOREIGN_NAMESPACE),
				 errmsg("the idempotency namespace of this database is decided"),
				 errdetail("A new one would give every operation another Stripe key.")));
	if (state == NAMESPACE_NONE && keep)
		ereport(ERROR,
				(errcode(ERRCODE_FOREIGN_NAMESPACE),
				 errmsg("this database has no idempotency namespace to keep")));

	now = GetCurrentTimestamp();
	if (keep)
	{
		/* the original's row stays in force; ours says that it was decided */
		ns = chosen->ns;
		if (!written)
			mark(rel, chosen);
	}
	else
	{
		if (!pg_strong_random(ns.value, NAMESPACE_LEN))
			ereport(ERROR,
					(errcode(ERRCODE_INTERNAL_ERROR),
					 errmsg("could not generate random values")));
		values[0] = TimestampTzGetDatum(now);
		owner_execute(&retire_namespaces, owner, values, NULL, false, NULL, NULL, 0);
	}

	value = palloc(VARHDRSZ + NAMESPACE_LEN);
	SET_VARSIZE(value, VARHDRSZ + NAMESPACE_LEN);
	memcpy(VARDATA(value), ns.value, NAMESPACE_LEN);
	values[0] = PointerGetDatum(value);
	values[1] = Int64GetDatum((int64) GetSystemIdentifier());
	values[2] = ObjectIdGetDatum(MyDatabaseId);
	values[3] = TimestampTzGetDatum(now);
	values[4] = BoolGetDatum(!keep);
	owner_execute(&insert_namespace, owner, values, NULL, false, NULL, NULL, 0);

	table_close(rel, NoLock);
	PG_RETURN_BOOL(true);
}
