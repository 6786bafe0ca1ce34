/*-------------------------------------------------------------------------
 *
 * call_transactions.c
 *	  Who has called Stripe: is it still there, and what became of its
 *	  transaction?
 *
 * A call in flight names the server's life and the virtual transaction that
 * makes it.  Either may end without a word (a crash, a killed server), so
 * nobody waits for a sign of life: whoever reads the row computes whether the
 * caller is gone.  On a standby that can't be known, and the row is shown as it
 * stands.
 *
 * What was sent stays, but the transaction that wanted it may roll back.  So a
 * row lists the transactions, each by the id of its innermost subtransaction,
 * that have claimed it or been given its result, until one of them is known to
 * have committed:
 *
 *	NULL		one has, or the row was written by the transaction itself
 *	{}			all of them have rolled back
 *	{...}		those whose fate wasn't known when the row was written
 *
 * Ids mean something in the database system that has assigned them, and only
 * as long as its commit log goes back to them; the fate is written down before.
 * After a restore elsewhere it can't be asked for.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/calls/call_transactions.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/pg_type_d.h"
#include "fmgr.h"
#include "storage/lock.h"
#include "storage/proc.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/xid8.h"

#include "base/compat.h"
#include "base/errors.h"
#include "base/shmem.h"
#include "calls/call_transactions.h"

PG_FUNCTION_INFO_V1(idempotency_stripe_callers_fate);

/* The current virtual transaction, as pg_locks shows it. */
char *
my_virtual_xid(void)
{
	VirtualTransactionId vxid;

	GET_VXID_FROM_PGPROC(vxid, *MyProc);
	return psprintf("%d/%u", VXID_PROC(vxid), vxid.localTransactionId);
}

/*
 * Is the transaction that makes a call over?
 */
bool
caller_is_gone(int64 life, const char *virtual_xid)
{
	VirtualTransactionId vxid;
	int			proc;
	unsigned int lxid;

	if (RecoveryInProgress())
		return false;
	if (!shmem_is_there() || life != shmem_server_life())
		return true;

	if (sscanf(virtual_xid, "%d/%u", &proc, &lxid) != 2 || proc < 0 ||
		lxid == InvalidLocalTransactionId)
		return true;
	VXID_PROC(vxid) = proc;
	vxid.localTransactionId = lxid;
	return VirtualXactLock(vxid, false);
}

/*
 * Fate of one transaction of this database system.
 */
static CallersFate
fate_of(FullTransactionId xid)
{
	LOCAL_FCINFO(fcinfo, 1);
	FmgrInfo	flinfo;
	Datum		status;
	char	   *label;

	/* of a future that a restore has taken back */
	if (!FullTransactionIdPrecedes(xid, ReadNextFullTransactionId()))
		return CALLERS_NOT_KNOWN;

	fmgr_info(F_PG_XACT_STATUS, &flinfo);
	InitFunctionCallInfoData(*fcinfo, &flinfo, 1, InvalidOid, NULL, NULL);
	fcinfo->args[0].value = FullTransactionIdGetDatum(xid);
	fcinfo->args[0].isnull = false;
	status = FunctionCallInvoke(fcinfo);
	if (fcinfo->isnull)
		return CALLERS_NOT_KNOWN;

	label = TextDatumGetCString(status);
	if (strcmp(label, "committed") == 0)
		return CALLERS_COMMITTED;
	if (strcmp(label, "aborted") == 0)
		return CALLERS_ROLLED_BACK;
	return CALLERS_OPEN;
}

/*
 * What has become of the transactions that a row lists?
 *
 * If open isn't NULL, *open is set to those that didn't roll back.
 */
CallersFate
callers_fate(ArrayType *callers, uint64 system, ArrayType **open)
{
	Datum	   *xids;
	bool	   *nulls;
	FullTransactionId *left;
	int			nxids;
	int			nleft = 0;
	int			i;
	bool		one_is_open = false;

	if (callers == NULL)
		return CALLERS_COMMITTED;

	deconstruct_array(callers, XID8OID, sizeof(FullTransactionId), FLOAT8PASSBYVAL,
					  TYPALIGN_DOUBLE, &xids, &nulls, &nxids);
	if (nxids > 0 && system != GetSystemIdentifier())
	{
		if (open != NULL)
			*open = callers;
		return CALLERS_NOT_KNOWN;
	}

	left = palloc(Max(nxids, 1) * sizeof(FullTransactionId));
	for (i = 0; i < nxids; i++)
	{
		FullTransactionId xid = DatumGetFullTransactionId(xids[i]);

		switch (nulls[i] ? CALLERS_ROLLED_BACK : fate_of(xid))
		{
			case CALLERS_COMMITTED:
				return CALLERS_COMMITTED;
			case CALLERS_OPEN:
				one_is_open = true;
				left[nleft++] = xid;
				break;
			case CALLERS_NOT_KNOWN:
				left[nleft++] = xid;
				break;
			case CALLERS_ROLLED_BACK:
				break;
		}
	}

	if (open != NULL)
		*open = make_callers(left, nleft);
	if (one_is_open)
		return CALLERS_OPEN;
	return nleft > 0 ? CALLERS_NOT_KNOWN : CALLERS_ROLLED_BACK;
}

/* An array of transaction ids. */
ArrayType *
make_callers(const FullTransactionId *xids, int nxids)
{
	Datum	   *values = palloc(Max(nxids, 1) * sizeof(Datum));
	int			i;

	for (i = 0; i < nxids; i++)
		values[i] = FullTransactionIdGetDatum(xids[i]);
	return construct_array(values, nxids, XID8OID, sizeof(FullTransactionId),
						   FLOAT8PASSBYVAL, TYPALIGN_DOUBLE);
}

/* ---------- for the views ---------- */

/*
 * stripe_callers_fate(callers, system_identifier)
 */
Datum
idempotency_stripe_callers_fate(PG_FUNCTION_ARGS)
{
	const char *fate = NULL;

	switch (callers_fate(PG_ARGISNULL(0) ? NULL : PG_GETARG_ARRAYTYPE_P(0),
						 PG_ARGISNULL(1) ? 0 : (uint64) PG_GETARG_INT64(1), NULL))
	{
		case CALLERS_COMMITTED:
			fate = "committed";
			break;
		case CALLERS_OPEN:
			fate = "open";
			break;
		case CALLERS_ROLLED_BACK:
			fate = "rolled back";
			break;
		case CALLERS_NOT_KNOWN:
			fate = "not known";
			break;
	}
	PG_RETURN_TEXT_P(cstring_to_text(fate));
}
