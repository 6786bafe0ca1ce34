/*-------------------------------------------------------------------------
 *
 * ledger_search.h
 *	  Going through a ledger piece by piece, and where one has got to.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/ledger/ledger_search.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_LEDGER_SEARCH_H
#define IDEMPOTENCY_LEDGER_SEARCH_H

#include "executor/tuptable.h"
#include "storage/itemptr.h"
#include "utils/timestamp.h"

#include "base/parameters.h"
#include "ledger/ledger.h"

/* How much of a table is read at a time: 8 MB. */
#define SEARCH_WINDOW_BLOCKS 1024

/* How many entries of an index are read at a time. */
#define SEARCH_INDEX_ENTRIES 10000

/* Where a search goes on in another process. */
typedef struct LedgerPlace
{
	ItemPointerData tid;		/* the last row seen, or invalid */
	TimestampTz at;				/* and, by an index, its time there */
	bool		flag;			/* which half of an index that has two */
	int64		left;			/* if the table is not read directly: rows
								 * seen that are still there */
} LedgerPlace;

typedef struct LedgerCursor
{
	LedgerPlace place;
	bool		resumed;		/* it comes from another process */
	Datum		key[LEDGER_MAX_KEYS];	/* the last row seen, by key, or 0 */
} LedgerCursor;

/* A row that the search has found. */
typedef struct LedgerHit
{
	Datum		key[LEDGER_MAX_KEYS];
	Datum		token;
	LedgerPlace place;
} LedgerHit;

/*
 * A partial index by time, perhaps by a flag first, that has only the rows that
 * somebody looks for.
 */
typedef struct LedgerIndex
{
	const char *name;
	bool		has_flag;
} LedgerIndex;

/* What to do with a row, which is at this place.  Returns false to stop. */
typedef bool (*LedgerRowCallback) (TupleTableSlot *slot, const LedgerPlace *place, void *arg);

extern void ledger_cursor_reset(LedgerCursor *cursor);
extern void ledger_cursor_resume(LedgerCursor *cursor, const LedgerPlace *place);
extern bool ledger_cursor_at_start(const LedgerCursor *cursor);
extern void ledger_cursor_move(LedgerCursor *cursor, Ledger *ledger, const LedgerHit *hit);

extern void ledger_hit_set(LedgerHit *hit, Ledger *ledger, TupleTableSlot *slot,
						   const LedgerPlace *place);
extern char *ledger_describe_key(Ledger *ledger, const Datum *key);
extern bool ledger_search_window(Relation rel, LedgerCursor *cursor, LedgerRowCallback row,
								 void *arg);
extern Relation ledger_index_open(Relation rel, const LedgerIndex *description);
extern bool ledger_search_index(Relation rel, Relation index, LedgerCursor *cursor,
								TimestampTz until, LedgerRowCallback row, void *arg);
extern void ledger_search_begin(Parameters *p, const LedgerCursor *cursor, Ledger *ledger);
extern int64 ledger_search_offset(const LedgerCursor *cursor);

#endif							/* IDEMPOTENCY_LEDGER_SEARCH_H */
