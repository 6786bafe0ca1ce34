/*-------------------------------------------------------------------------
 *
 * ledger_search.c
 *	  Going through a ledger piece by piece, and where that has got to.
 *
 * A plain local heap is read directly, window by window, and the place is the
 * last row seen.  A large table is read through a ring of buffers, so that it
 * does not push others out of the cache.  If rows are kept for ever, a partial
 * index has those that somebody looks for, by time, and is read instead of the
 * table: the place is the last of its entries that were seen, which are in the
 * order of time and TID.  (Such an index may be rebuilt, or dropped; while it is
 * not there, the table is read.)  Any other table (see ledger_check()) is
 * searched by a SELECT in the order of the primary key.
 *
 * A worker stays for a few seconds, and the next one goes on from the place
 * that it has left (worker_table.c).  There is no room for a key there: if the
 * search goes by key, the next worker steps over as many rows as were seen and
 * are still there.
 *
 * The place moves on whether or not anything came of the rows before it; what
 * could not be done is for the next time around.  It moves on before a window,
 * or an entry's row, is read, so that what cannot be read, or ends the process,
 * does not hold up what comes after it.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/ledger/ledger_search.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/relscan.h"
#include "access/tableam.h"
#include "catalog/pg_am_d.h"
#include "catalog/pg_class_d.h"
#include "catalog/pg_type_d.h"
#include "miscadmin.h"
#include "storage/bufmgr.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/fmgroids.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

#include "base/compat.h"
#include "ledger/ledger_search.h"

/* ---------- places ---------- */

static void
forget_key(LedgerCursor *cursor)
{
	int			i;

	for (i = 0; i < LEDGER_MAX_KEYS; i++)
	{
		if (cursor->key[i] != (Datum) 0)
			pfree(DatumGetPointer(cursor->key[i]));
		cursor->key[i] = (Datum) 0;
	}
}

/* Back to the start. */
void
ledger_cursor_reset(LedgerCursor *cursor)
{
	forget_key(cursor);
	memset(&cursor->place, 0, sizeof(cursor->place));
	ItemPointerSetInvalid(&cursor->place.tid);
	cursor->resumed = false;
}

/* Go on from where another process has stopped. */
void
ledger_cursor_resume(LedgerCursor *cursor, const LedgerPlace *place)
{
	forget_key(cursor);
	cursor->place = *place;
	cursor->resumed = true;
}

bool
ledger_cursor_at_start(const LedgerCursor *cursor)
{
	return !ItemPointerIsValid(&cursor->place.tid) && !cursor->place.flag &&
		cursor->key[0] == (Datum) 0 && cursor->place.left == 0;
}

/* The cursor is after this row now. */
void
ledger_cursor_move(LedgerCursor *cursor, Ledger *ledger, const LedgerHit *hit)
{
	MemoryContext context = MemoryContextSwitchTo(TopMemoryContext);
	int64		left = cursor->place.left;
	int			i;

	forget_key(cursor);
	cursor->place = hit->place;
	cursor->place.left = left;
	if (!ledger->direct)
	{
		/* the row may be gone before the next batch, with its TOAST */
		for (i = 0; i < ledger->nkeys; i++)
			cursor->key[i] = PointerGetDatum(PG_DETOAST_DATUM_COPY(hit->key[i]));
	}
	MemoryContextSwitchTo(context);
}

static BlockNumber
first_block(const LedgerPlace *place)
{
	return ItemPointerIsValid(&place->tid) ? ItemPointerGetBlockNumber(&place->tid) : 0;
}

/* ---------- rows ---------- */

/* Copied into the current memory context. */
void
ledger_hit_set(LedgerHit *hit, Ledger *ledger, TupleTableSlot *slot, const LedgerPlace *place)
{
	bool		isnull;
	int			i;

	for (i = 0; i < ledger->nkeys; i++)
		hit->key[i] = datumCopy(slot_getattr(slot, ledger->keys[i], &isnull), false, -1);
	hit->token = slot_getattr(slot, 1, &isnull);
	hit->place = *place;
}

/* Describe a row by its key, for a message. */
char *
ledger_describe_key(Ledger *ledger, const Datum *key)
{
	StringInfoData buf;
	int			i;

	initStringInfo(&buf);
	appendStringInfoChar(&buf, '(');
	for (i = 0; i < ledger->nkeys; i++)
		appendStringInfo(&buf, "%s%s", i > 0 ? ", " : "",
						 ledger->columns[ledger->keys[i] - 1]);
	appendStringInfoString(&buf, ")=(");
	for (i = 0; i < ledger->nkeys; i++)
		appendStringInfo(&buf, "%s%s", i > 0 ? ", " : "", TextDatumGetCString(key[i]));
	appendStringInfoChar(&buf, ')');
	return buf.data;
}

/* One row, in a memory context of its own. */
static bool
call_back(LedgerRowCallback row, TupleTableSlot *slot, const LedgerPlace *place, void *arg,
		  MemoryContext row_context)
{
	MemoryContext context;
	bool		more;

	MemoryContextReset(row_context);
	context = MemoryContextSwitchTo(row_context);
	more = row(slot, place, arg);
	MemoryContextSwitchTo(context);
	return more;
}

/*
 * Look at the rows of one window of the table, from the cursor on, which is
 * moved to the window's end, or to the row at which the callback returned false.
 * The callback runs in a memory context that lasts for one row.  Returns true
 * at the end of the table.
 */
bool
ledger_search_window(Relation rel, LedgerCursor *cursor, LedgerRowCallback row, void *arg)
{
	BlockNumber nblocks = RelationGetNumberOfBlocks(rel);
	ItemPointerData behind = cursor->place.tid;
	BlockNumber start = first_block(&cursor->place);
	BlockNumber end;
	MemoryContext row_context;
	TableScanDesc scan;
	TupleTableSlot *slot;
	bool		more = true;

	/* a place of long ago may be past the end: then start over */
	if (start >= nblocks && cursor->resumed)
	{
		start = 0;
		ItemPointerSetInvalid(&behind);
	}
	cursor->resumed = false;
	if (start >= nblocks)
		return true;
	cursor->place.at = 0;
	cursor->place.left = 0;
	end = start + Min(nblocks - start, SEARCH_WINDOW_BLOCKS);
	ItemPointerSet(&cursor->place.tid, end - 1, MaxOffsetNumber);

	row_context = AllocSetContextCreate(CurrentMemoryContext, "idempotency search",
										ALLOCSET_SMALL_SIZES);
	slot = MakeSingleTupleTableSlot(RelationGetDescr(rel), &TTSOpsBufferHeapTuple);
	PushActiveSnapshot(GetTransactionSnapshot());
	scan = heap_beginscan(rel, GetActiveSnapshot(), 0, NULL, NULL,
						  SO_TYPE_SEQSCAN | SO_ALLOW_STRAT | SO_ALLOW_PAGEMODE);
	heap_setscanlimits(scan, start, end - start);

	while (more && heap_getnextslot(scan, ForwardScanDirection, slot))
	{
		LedgerPlace here = cursor->place;

		if (ItemPointerIsValid(&behind) && ItemPointerCompare(&slot->tts_tid, &behind) <= 0)
			continue;

		here.tid = slot->tts_tid;
		more = call_back(row, slot, &here, arg, row_context);
		if (!more)
			cursor->place.tid = slot->tts_tid;
	}

	heap_endscan(scan);
	PopActiveSnapshot();
	ExecDropSingleTupleTableSlot(slot);
	MemoryContextDelete(row_context);

	return more && end == nblocks;
}

/* Is an index on the columns that are searched by, in ascending order? */
static bool
index_is_by_time(Relation index, bool has_flag)
{
	TupleDesc	desc = RelationGetDescr(index);
	int			nkeys = has_flag ? 2 : 1;
	int			i;

	if (index->rd_rel->relam != BTREE_AM_OID ||
		IndexRelationGetNumberOfKeyAttributes(index) != nkeys)
		return false;
	for (i = 0; i < nkeys; i++)
	{
		if (index->rd_indoption[i] != 0 ||
			TupleDescAttr(desc, i)->atttypid != (i < nkeys - 1 ? BOOLOID : TIMESTAMPTZOID))
			return false;
	}
	return true;
}

/*
 * Open an index of a table that is open and locked.  Returns NULL if the index
 * does not exist, or cannot be used now, because it is being built or has been
 * built since this transaction began.
 */
Relation
ledger_index_open(Relation rel, const LedgerIndex *description)
{
	Oid			indexid = get_relname_relid(description->name, RelationGetNamespace(rel));
	Relation	index;
	Form_pg_index form;

	if (!OidIsValid(indexid) || get_rel_relkind(indexid) != RELKIND_INDEX)
		return NULL;
	index = index_open(indexid, AccessShareLock);
	form = index->rd_index;
	if (form->indrelid == RelationGetRelid(rel) && form->indisvalid &&
		index_is_by_time(index, description->has_flag) &&
		(!form->indcheckxmin ||
		 TransactionIdPrecedes(HeapTupleHeaderGetXmin(index->rd_indextuple->t_data),
							   TransactionXmin)))
		return index;
	index_close(index, NoLock);
	return NULL;
}

/*
 * The same as ledger_search_window() by an index, for some of its entries from
 * the cursor on, up to a time.  If the index has a flag, the entries with the
 * cursor's are searched.  Returns true after the last one.
 */
bool
ledger_search_index(Relation rel, Relation index, LedgerCursor *cursor, TimestampTz until,
					LedgerRowCallback row, void *arg)
{
	LedgerPlace *place = &cursor->place;
	LedgerPlace behind = *place;
	int			time_column = IndexRelationGetNumberOfKeyAttributes(index);
	ScanKeyData keys[3];
	int			nkeys = 0;
	int			entries = 0;
	MemoryContext row_context;
	IndexScanDesc scan;
	TupleTableSlot *slot;
	ItemPointer tid;
	bool		more = true;

	if (time_column > 1)
		ScanKeyInit(&keys[nkeys++], 1, BTEqualStrategyNumber, F_BOOLEQ,
					BoolGetDatum(place->flag));
	if (ItemPointerIsValid(&behind.tid))
		ScanKeyInit(&keys[nkeys++], time_column, BTGreaterEqualStrategyNumber,
					F_TIMESTAMPTZ_GE, TimestampTzGetDatum(behind.at));
	ScanKeyInit(&keys[nkeys++], time_column, BTLessEqualStrategyNumber, F_TIMESTAMPTZ_LE,
				TimestampTzGetDatum(until));
	cursor->resumed = false;
	place->left = 0;

	row_context = AllocSetContextCreate(CurrentMemoryContext, "idempotency search",
										ALLOCSET_SMALL_SIZES);
	slot = MakeSingleTupleTableSlot(RelationGetDescr(rel), &TTSOpsBufferHeapTuple);
	PushActiveSnapshot(GetTransactionSnapshot());
	scan = index_beginscan_compat(rel, index, GetActiveSnapshot(), nkeys);
	scan->xs_want_itup = true;
	index_rescan(scan, keys, nkeys, NULL, 0);

	while (more && (tid = index_getnext_tid(scan, ForwardScanDirection)) != NULL)
	{
		bool		isnull;
		Datum		at = index_getattr(scan->xs_itup, time_column, scan->xs_itupdesc, &isnull);

		CHECK_FOR_INTERRUPTS();
		if (ItemPointerIsValid(&behind.tid) && DatumGetTimestampTz(at) == behind.at &&
			ItemPointerCompare(tid, &behind.tid) <= 0)
			continue;

		place->at = DatumGetTimestampTz(at);
		place->tid = *tid;
		if (index_fetch_heap(scan, slot))
			more = call_back(row, slot, place, arg, row_context);
		if (++entries >= SEARCH_INDEX_ENTRIES)
			more = false;
	}

	index_endscan(scan);
	PopActiveSnapshot();
	ExecDropSingleTupleTableSlot(slot);
	MemoryContextDelete(row_context);

	return more;
}

/*
 * The first parameters of a SELECT that searches: the key after which it begins.
 */
void
ledger_search_begin(Parameters *p, const LedgerCursor *cursor, Ledger *ledger)
{
	int			i;

	/* all keys are greater than empty ones */
	parameters_begin(p, NULL, 0);
	for (i = 0; i < ledger->nkeys; i++)
	{
		if (cursor->key[i] != (Datum) 0)
			parameter_datum(p, cursor->key[i]);
		else
			parameter_string(p, "");
	}
}

/* Its OFFSET: how many rows it steps over. */
int64
ledger_search_offset(const LedgerCursor *cursor)
{
	return cursor->key[0] != (Datum) 0 ? 0 : cursor->place.left;
}
