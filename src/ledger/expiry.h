/*-------------------------------------------------------------------------
 *
 * expiry.h
 *	  Removal of what the ledgers no longer need.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/ledger/expiry.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_EXPIRY_H
#define IDEMPOTENCY_EXPIRY_H

#include "executor/tuptable.h"

#include "base/owner_spi.h"
#include "ledger/ledger.h"
#include "ledger/ledger_search.h"

#define EXPIRY_CUTOFFS 2

/*
 * One kind of rows that are removed, or reduced, when their time has come.  Each
 * ledger says here what it no longer needs, twice: in C, for the search, and in
 * SQL, for the statement that decides.
 *
 * cutoffs[] are the moments up to which rows are due.  In "find" they follow the
 * key after which to search, and precede limit and offset; in "remove" they
 * follow the whole key and the token.
 */
typedef struct Expiry
{
	const char *name;			/* in the result of expire() */
	Ledger	   *ledger;			/* its first column is the token */

	/* false: this kind is kept for ever */
	bool		(*cutoffs) (TimestampTz now, TimestampTz *cutoffs);

	/* is the row due, and since when? */
	bool		(*due) (TupleTableSlot *slot, const TimestampTz *cutoffs, TimestampTz *since);

	OwnerStatement find;		/* keys, token, since when; by key */
	OwnerStatement remove;

	/* an index of the rows that may be due, or NULL: the table is read */
	const LedgerIndex *index;
	bool		flag;			/* only those that have its flag */
} Expiry;

/* Where the search stands. */
typedef struct ExpiryCursor
{
	LedgerCursor at;
	int			refusals;		/* in a row */
} ExpiryCursor;

/* One batch, which is the work of one transaction. */
typedef struct ExpiryBatch
{
	Expiry	   *expiry;
	int			max_rows;
	bool		background;		/* never wait for the table, commit soon */
	ExpiryCursor *cursor;		/* moved on */

	/* what came of it */
	bool		finished;		/* the search has come to the end of the table */
	int64		removed;
	int64		refused;		/* rows that raised an error */
	TimestampTz oldest;			/* oldest row found, or 0 */
	TimestampTz left;			/* oldest row left there, or 0 */
	int64		searched;		/* microseconds of the search, in vain */
	char	   *refusal;		/* which row was refused first, and why */
	bool		gave_up;		/* too many refused, one after the other */
} ExpiryBatch;

extern bool expiry_row_is_locked(TupleTableSlot *slot);
extern void expiry_batch(ExpiryBatch *batch);

#endif							/* IDEMPOTENCY_EXPIRY_H */
