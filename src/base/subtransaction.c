/*-------------------------------------------------------------------------
 *
 * subtransaction.c
 *	  Doing something in a subtransaction, and catching its error.
 *
 * Whoever goes through many rows must not be stopped by one of them, the same
 * one each time.  But an error of the machine, or one that is meant for the
 * whole transaction, isn't to be caught.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/subtransaction.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#include "utils/snapmgr.h"

#include "base/subtransaction.h"

/*
 * Does an error concern one row, so that the next may do better?  Not one of
 * the machine, of the whole table, or meant for the transaction.
 */
bool
error_is_about_one_row(const ErrorData *error)
{
	switch (ERRCODE_TO_CATEGORY(error->sqlerrcode))
	{
		case ERRCODE_INSUFFICIENT_RESOURCES:
		case ERRCODE_OPERATOR_INTERVENTION:
		case ERRCODE_SYSTEM_ERROR:
		case ERRCODE_CONFIG_FILE_ERROR:
		case ERRCODE_INVALID_TRANSACTION_STATE:
			return false;
		case ERRCODE_TRANSACTION_ROLLBACK:
			return !IsolationUsesXactSnapshot();
		default:
			return error->sqlerrcode != ERRCODE_DATA_CORRUPTED &&
				error->sqlerrcode != ERRCODE_INDEX_CORRUPTED;
	}
}

/* A row that is locked after all, rather than refused. */
bool
error_is_about_locks(const ErrorData *error)
{
	return error->sqlerrcode == ERRCODE_LOCK_NOT_AVAILABLE ||
		ERRCODE_TO_CATEGORY(error->sqlerrcode) == ERRCODE_TRANSACTION_ROLLBACK;
}

/*
 * Do one thing in a subtransaction, with a new snapshot.  Returns NULL, or the
 * error, whichever it is, and then nothing is done.
 */
ErrorData *
in_subtransaction(void (*work) (void *), void *arg)
{
	MemoryContext context = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;
	ErrorData  *volatile error = NULL;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(context);

	PG_TRY();
	{
		PushActiveSnapshot(GetTransactionSnapshot());
		work(arg);
		PopActiveSnapshot();
		ReleaseCurrentSubTransaction();
	}
	PG_CATCH();
	{
		MemoryContextSwitchTo(context);
		error = CopyErrorData();
		FlushErrorState();
		RollbackAndReleaseCurrentSubTransaction();
	}
	PG_END_TRY();
	MemoryContextSwitchTo(context);
	CurrentResourceOwner = owner;

	return error;
}

/*
 * The same, but an error that isn't about one row is raised again.
 */
ErrorData *
try_in_subtransaction(void (*work) (void *), void *arg)
{
	ErrorData  *error = in_subtransaction(work, arg);

	if (error != NULL && !error_is_about_one_row(error))
		ReThrowError(error);
	return error;
}
