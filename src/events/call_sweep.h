/*-------------------------------------------------------------------------
 *
 * call_sweep.h
 *	  Going through the ledger of calls for what nobody else comes to do.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/events/call_sweep.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_CALL_SWEEP_H
#define IDEMPOTENCY_CALL_SWEEP_H

#include "ledger/ledger_search.h"

/* Some rows of the ledger, which is the work of one transaction. */
typedef struct SettleBatch
{
	int			max_rows;
	LedgerCursor *cursor;		/* moved on */

	/* what came of it */
	bool		finished;		/* the end of the table */
	int			seen;			/* rows with which something could be done */
	int			settled;		/* and was */
	int			refused;		/* rows that raised an error */
	char	   *refusal;		/* which was the first, and why */
} SettleBatch;

extern PGDLLEXPORT void settle_calls(SettleBatch *batch);

#endif							/* IDEMPOTENCY_CALL_SWEEP_H */
