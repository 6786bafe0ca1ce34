/*-------------------------------------------------------------------------
 *
 * call_transactions.h
 *	  Who has called Stripe: is it still there, and what became of its
 *	  transaction?
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/calls/call_transactions.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_CALL_TRANSACTIONS_H
#define IDEMPOTENCY_CALL_TRANSACTIONS_H

#include "access/transam.h"
#include "utils/array.h"

typedef enum CallersFate
{
	CALLERS_COMMITTED,			/* one of them, or nobody is to be watched */
	CALLERS_OPEN,				/* one of them may still commit */
	CALLERS_ROLLED_BACK,		/* all of them */
	CALLERS_NOT_KNOWN			/* that can't be found out any more */
} CallersFate;

extern char *my_virtual_xid(void);
extern bool caller_is_gone(int64 life, const char *virtual_xid);
extern CallersFate callers_fate(ArrayType *callers, uint64 system, ArrayType **open);
extern ArrayType *make_callers(const FullTransactionId *xids, int nxids);

#endif							/* IDEMPOTENCY_CALL_TRANSACTIONS_H */
