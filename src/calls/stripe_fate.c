/*-------------------------------------------------------------------------
 *
 * stripe_fate.c
 *	  What became of the transactions behind a call.
 *
 * A row names the transactions that called, or were given its result, as long as
 * their fate is not written down (call_transactions.c).
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/calls/stripe_fate.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xlog.h"
#include "catalog/pg_type_d.h"
#include "utils/array.h"
#include "utils/xid8.h"

#include "base/compat.h"
#include "calls/call_transactions.h"
#include "calls/stripe_fate.h"

/* $4: what they become, $5: what they were when the fate was asked for */
static OwnerStatement set_callers = {
	"UPDATE idempotency.stripe_idempotency_keys SET callers = $4, callers_system = $6"
	STRIPE_WHERE_KEY " AND callers OPERATOR(pg_catalog.=) $5",
	6, {TEXTOID, TEXTOID, TEXTOID, XID8ARRAYOID, XID8ARRAYOID, INT8OID}
};

static bool
replace_callers(Relation rel, Operation *op, Datum old, ArrayType *new)
{
	Parameters	p;

	parameters_begin(&p, op->key, lengthof(op->key));
	parameter_pointer(&p, new);
	parameter_datum(&p, old);
	parameter_int64(&p, (int64) GetSystemIdentifier());
	return ledger_execute_latest(rel, &set_callers, p.values, p.nulls, NULL, NULL, 0) > 0;
}

/*
 * A transaction was given the result of an operation that no other one is
 * known to answer for: watch it, too.  The token is that of the row it was
 * given; a claim of a later generation isn't adopted.
 */
void
stripe_adopt_run(Relation rel, Operation *op, int64 token, FullTransactionId xid)
{
	int			races = 0;

	for (;;)
	{
		LedgerRow	row;
		ArrayType  *callers;
		ArrayType  *open;
		Datum	   *xids;
		FullTransactionId *all;
		int			nxids;
		int			i;

		ledger_look_latest(&stripe_calls, rel, op->key, &row);
		if (row.found != FOUND_ROW || row.isnull[S_CALLERS] ||
			DatumGetInt64(row.values[S_TOKEN]) != token)
			return;
		callers = DatumGetArrayTypeP(row.values[S_CALLERS]);

		switch (callers_fate(callers, row.isnull[S_CALLERS_SYSTEM] ? 0 :
							 (uint64) DatumGetInt64(row.values[S_CALLERS_SYSTEM]), &open))
		{
			case CALLERS_COMMITTED:
				open = NULL;
				break;
			case CALLERS_NOT_KNOWN:
				open = make_callers(&xid, 1);
				break;
			default:
				deconstruct_array(open, XID8OID, sizeof(FullTransactionId), FLOAT8PASSBYVAL,
								  TYPALIGN_DOUBLE, &xids, NULL, &nxids);
				all = palloc((nxids + 1) * sizeof(FullTransactionId));
				for (i = 0; i < nxids; i++)
					all[i] = DatumGetFullTransactionId(xids[i]);
				all[nxids] = xid;
				open = make_callers(all, nxids + 1);
				break;
		}

		if (replace_callers(rel, op, PointerGetDatum(callers), open))
			return;
		ledger_lost_race(&stripe_calls, &races);
	}
}

/*
 * Write down what became of an operation's transactions, as far as it is
 * known.  Returns false where it isn't yet.  Doesn't wait for a row that
 * another transaction is changing; one that changes meanwhile is left for
 * another time.
 */
bool
stripe_note_fate_run(Relation rel, Operation *op)
{
	LedgerRow	row;
	ArrayType  *callers;
	ArrayType  *open;
	CallersFate fate;

	ledger_look_latest(&stripe_calls, rel, op->key, &row);
	if (row.found != FOUND_ROW || row.isnull[S_CALLERS])
		return true;
	if (TransactionIdIsValid(row.busy))
		return false;
	callers = DatumGetArrayTypeP(row.values[S_CALLERS]);
	if (ArrayGetNItems(ARR_NDIM(callers), ARR_DIMS(callers)) == 0)
		return true;

	fate = callers_fate(callers, row.isnull[S_CALLERS_SYSTEM] ? 0 :
						(uint64) DatumGetInt64(row.values[S_CALLERS_SYSTEM]), &open);
	switch (fate)
	{
		case CALLERS_COMMITTED:
			return replace_callers(rel, op, PointerGetDatum(callers), NULL);
		case CALLERS_ROLLED_BACK:
			return replace_callers(rel, op, PointerGetDatum(callers), open);
		case CALLERS_OPEN:
			return false;
		case CALLERS_NOT_KNOWN:
			return true;
	}
	return true;
}
