/*-------------------------------------------------------------------------
 *
 * ledger_search.c
 *	  Going through a ledger piece by piece, and where one has got to.
 *
 * A plain local heap is read itself, window by window, and the place is the
 * last row seen.  A large table is read through a ring of buffers, so that it
 * doesn't push others out of the cache.  Any other table (ledger_check() tells)
 * is searched by a SELECT in the order of the primary key.
 *
 * A worker stays for a few seconds, and the next one goes on from the place
 * that it has left (databases.c).  There is no room for a key there: where one
 * goes on by key, the next worker steps over as many rows as were seen and are
 * still there.
 *
 * The place moves on whether or not anything came of the rows behind it; what
 * couldn't be done is for the next time around.  It moves on before a window is
 * read, so that what can't be read, or ends the process, doesn't hold up what is
 * behind it.
 *
 * src/ledger_search.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/heapam.h"
#include "access/tableam.h"
#include "storage/bufmgr.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"

#include "compat.h"
#include "ledger_search.h"

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
	ItemPointerSetInvalid(&cursor->place.tid);
	cursor->place.left = 0;
	cursor->resumed = false;
}

/* Go on where another process has stopped. */
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
	return !ItemPointerIsValid(&cursor->place.tid) && cursor->key[0] == (Datum) 0 &&
		cursor->place.left == 0;
}

/* The cursor stands behind this row. */
void
ledger_cursor_move(LedgerCursor *cursor, Ledger *ledger, const LedgerHit *hit)
{
	MemoryContext context = MemoryContextSwitchTo(TopMemoryContext);
	int			i;

	forget_key(cursor);
	cursor->place.tid = hit->tid;
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

/*
 * Behind what is going to be looked at: a window of a table that is read directly,
 * and so many rows of any other.
 */
void
ledger_place_step_over(LedgerPlace *place, int max_rows)
{
	BlockNumber start = first_block(place);

	place->left += max_rows;
	if (start < MaxBlockNumber - SEARCH_WINDOW_BLOCKS)
		ItemPointerSet(&place->tid, start + SEARCH_WINDOW_BLOCKS - 1, MaxOffsetNumber);
}

/* ---------- rows ---------- */

/* Copied into the current memory context. */
void
ledger_hit_set(LedgerHit *hit, Ledger *ledger, TupleTableSlot *slot)
{
	bool		isnull;
	int			i;

	for (i = 0; i < ledger->nkeys; i++)
		hit->key[i] = datumCopy(slot_getattr(slot, ledger->keys[i], &isnull), false, -1);
	hit->token = slot_getattr(slot, 1, &isnull);
	hit->tid = slot->tts_tid;
}

/* Which row, for a message */
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

/*
 * Look at the rows of one window of the table, from the cursor on, which is
 * moved to the window's end, or to the row where the callback wanted no more.
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

	/* a place of long ago may be behind the end: then it has gone around */
	if (start >= nblocks && cursor->resumed)
	{
		start = 0;
		ItemPointerSetInvalid(&behind);
	}
	cursor->resumed = false;
	cursor->place.left = 0;
	if (start >= nblocks)
		return true;
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
		MemoryContext context;

		if (ItemPointerIsValid(&behind) && ItemPointerCompare(&slot->tts_tid, &behind) <= 0)
			continue;

		MemoryContextReset(row_context);
		context = MemoryContextSwitchTo(row_context);
		more = row(slot, arg);
		MemoryContextSwitchTo(context);
		if (!more)
			cursor->place.tid = slot->tts_tid;
	}

	heap_endscan(scan);
	PopActiveSnapshot();
	ExecDropSingleTupleTableSlot(slot);
	MemoryContextDelete(row_context);

	return more && end == nblocks;
}

/*
 * The first parameters of a SELECT that searches: the key behind which it does.
 * Returns how many there are.
 */
int
ledger_search_keys(const LedgerCursor *cursor, Ledger *ledger, Datum *values)
{
	int			i;

	/* all keys are greater than empty ones */
	for (i = 0; i < ledger->nkeys; i++)
		values[i] = cursor->key[i] != (Datum) 0 ? cursor->key[i] : CStringGetTextDatum("");
	return ledger->nkeys;
}

/* And its OFFSET: how many rows it steps over. */
int64
ledger_search_offset(const LedgerCursor *cursor)
{
	return cursor->key[0] != (Datum) 0 ? 0 : cursor->place.left;
}
