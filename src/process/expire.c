/*-------------------------------------------------------------------------
 *
 * expire.c
 *	  Removal of what all ledgers no longer need, by SQL.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/process/expire.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xlog.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/tuplestore.h"

#include "base/compat.h"
#include "base/errors.h"
#include "base/settings.h"
#include "calls/stripe_expiry.h"
#include "events/webhook_ledger.h"
#include "ledger/request_ledger.h"
#include "process/expire.h"

PG_FUNCTION_INFO_V1(idempotency_expire);

Expiry	   *const expiry_kinds[] = {
	&request_expiry,
	&stripe_body_expiry,
	&stripe_expiry,
	&webhook_expiry,
};

StaticAssertDecl(lengthof(expiry_kinds) == EXPIRY_KINDS, "EXPIRY_KINDS is wrong");

/* Columns of expire(). */
enum
{
	X_KIND, X_REMOVED, X_NCOLUMNS
};

/*
 * Remove at most max_rows rows of one kind, once around, from where the last call
 * of this session has stopped.  Returns how many were removed.
 */
static int64
expire_kind(Expiry *expiry, ExpiryCursor *cursor, int max_rows)
{
	bool		from_start = ledger_cursor_at_start(&cursor->at);
	ExpiryBatch batch;
	int64		removed = 0;
	int64		refused = 0;
	char	   *refusal = NULL;

	batch.expiry = expiry;
	batch.background = false;
	batch.cursor = cursor;

	for (;;)
	{
		CHECK_FOR_INTERRUPTS();
		batch.max_rows = max_rows - removed;
		expiry_batch(&batch);
		removed += batch.removed;
		refused += batch.refused;
		if (refusal == NULL)
			refusal = batch.refusal;

		if (batch.finished)
			ledger_cursor_reset(&cursor->at);
		if (removed >= max_rows || batch.gave_up || (batch.finished && from_start))
			break;
		if (batch.finished)
		{
			/* once more, from the start: it counts what there is */
			from_start = true;
			refused = 0;
			refusal = NULL;
		}
	}

	if (refused > 0)
		ereport(WARNING,
				(errcode(ERRCODE_TRIGGERED_ACTION_EXCEPTION),
				 errmsg_plural("%lld row of \"idempotency.%s\" could not be removed",
							   "%lld rows of \"idempotency.%s\" could not be removed",
							   refused, (long long) refused, expiry->ledger->table),
				 errdetail("Row %s.", refusal),
				 errhint("A trigger or a foreign key on the table refuses it.")));
	return removed;
}

/*
 * expire(max_rows)
 */
Datum
idempotency_expire(PG_FUNCTION_ARGS)
{
	static ExpiryCursor cursors[EXPIRY_KINDS];
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	int			max_rows = PG_ARGISNULL(0) ? setting_expiry_batch_size : PG_GETARG_INT32(0);
	int			i;

	if (max_rows < 1 || max_rows > EXPIRY_MAX_BATCH_SIZE)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("max_rows must be from 1 to %d", EXPIRY_MAX_BATCH_SIZE)));
	PreventCommandDuringRecovery("idempotency.expire()");
	PreventCommandIfReadOnly("idempotency.expire()");

	InitMaterializedSRF(fcinfo, 0);
	for (i = 0; i < EXPIRY_KINDS; i++)
	{
		Datum		values[X_NCOLUMNS];
		bool		nulls[X_NCOLUMNS] = {false, false};

		values[X_KIND] = CStringGetTextDatum(expiry_kinds[i]->name);
		values[X_REMOVED] = Int64GetDatum(expire_kind(expiry_kinds[i], &cursors[i], max_rows));
		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
	}

	return (Datum) 0;
}
