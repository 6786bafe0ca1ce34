/*-------------------------------------------------------------------------
 *
 * ledger.h
 *	  What all ledgers have in common: finding a row, claiming it, changing
 *	  it under a fencing token.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/ledger/ledger.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_LEDGER_H
#define IDEMPOTENCY_LEDGER_H

#include "access/attnum.h"
#include "utils/rel.h"
#include "utils/timestamp.h"

#include "base/owner_spi.h"

#define LEDGER_MAX_KEYS 3
#define LEDGER_MAX_COLUMNS 40

/*
 * A ledger: its table, and what this backend has found out about it.
 */
typedef struct Ledger
{
	const char *table;			/* its name in schema idempotency */
	const char *const *columns; /* names in order of attribute number */
	int			ncolumns;
	int			nkeys;			/* primary key, all text COLLATE "C" */
	AttrNumber	keys[LEDGER_MAX_KEYS];
	OwnerStatement select;		/* all columns by the whole key */

	/* valid while relid is, which a relcache invalidation resets */
	Oid			relid;
	bool		unique;			/* does an index keep its key unique? */
	bool		direct;			/* may the row be read without the planner? */
	bool		bare;			/* no trigger, check or default of the user's */
} Ledger;

typedef enum LedgerFound
{
	FOUND_NOTHING,
	FOUND_ROW,
	FOUND_TWIN					/* nothing but another's uncommitted row */
} LedgerFound;

/*
 * What is known of a key: the committed row, or our own uncommitted one, and
 * the transaction of somebody else that is changing it.
 */
typedef struct LedgerRow
{
	LedgerFound found;
	bool		own;			/* written by this transaction */
	TransactionId busy;			/* another open transaction that wrote it, or
								 * InvalidTransactionId */
	uint32		speculative;	/* its speculative insertion token, or 0 */
	Datum		values[LEDGER_MAX_COLUMNS]; /* by attribute number - 1 */
	bool		isnull[LEDGER_MAX_COLUMNS];
} LedgerRow;

/* What a ledger makes of a row that it has found. */
typedef enum LedgerDecision
{
	LEDGER_ANSWER,				/* the claim is answered, nothing to write */
	LEDGER_TAKE					/* the row is free to be taken over */
} LedgerDecision;

/*
 * A claim of one ledger.  insert and take return false where another
 * transaction was faster.
 */
typedef struct LedgerClaim
{
	Datum		key[LEDGER_MAX_KEYS];
	bool		wait;			/* for another's uncommitted row? */
	bool		bounded;		/* never, and the caller has a subtransaction
								 * and a lock_timeout of its own for the
								 * write; decides on the latest row at any
								 * isolation */
	LedgerDecision (*decide) (struct LedgerClaim *claim, LedgerRow *row, TimestampTz now);
	bool		(*insert) (struct LedgerClaim *claim, Relation rel, TimestampTz now);
	bool		(*take) (struct LedgerClaim *claim, Relation rel, LedgerRow *row,
						 TimestampTz now);
	void		(*renew) (struct LedgerClaim *claim, Relation rel, TimestampTz now);
	void		(*busy) (struct LedgerClaim *claim);	/* answer in_progress */
} LedgerClaim;

extern Relation ledger_open(Ledger *ledger, LOCKMODE lockmode, bool nowait);
extern void ledger_close(Relation rel);
extern uint64 ledger_execute(Relation rel, OwnerStatement *statement, Datum *values,
							 const char *nulls, Datum *out, bool *outnull, int nout);
extern uint64 ledger_execute_latest(Relation rel, OwnerStatement *statement, Datum *values,
									const char *nulls, Datum *out, bool *outnull, int nout);
extern void ledger_look(Ledger *ledger, Relation rel, const Datum *key, LedgerRow *row);
extern void ledger_look_latest(Ledger *ledger, Relation rel, const Datum *key, LedgerRow *row);
extern bool ledger_lookup(Ledger *ledger, const Datum *key, LedgerRow *row);
extern void ledger_claim(Ledger *ledger, Relation rel, LedgerClaim *claim);
extern bool ledger_has_waited(TimestampTz *clock);
extern void ledger_lost_race(Ledger *ledger, int *races);

extern int64 ledger_new_token(void);
extern int	ledger_retry_after(TimestampTz until, TimestampTz now);

#endif							/* IDEMPOTENCY_LEDGER_H */
