/*-------------------------------------------------------------------------
 *
 * lock_limit.c
 *	  Waiting for locks no longer than we want to.
 *
 * lock_timeout is an error, and an error can be caught only at the price of a
 * subtransaction.  In exchange the wait is one that PostgreSQL knows: the
 * deadlock detector sees it, and it can be cancelled.
 *
 * src/lock_limit.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "storage/proc.h"
#include "utils/memutils.h"
#include "utils/resowner.h"

#include "lock_limit.h"

/*
 * Do something in an internal subtransaction under a lock_timeout of
 * timeout_ms (0: none).  Returns false, with nothing done, if that limit
 * struck.  A stricter limit that the user has set raises its error as ever,
 * unless heed_users_limit is false.
 */
bool
within_lock_timeout(int timeout_ms, bool heed_users_limit,
					void (*work) (void *), void *arg)
{
	MemoryContext context = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;
	int			users_timeout = LockTimeout;
	bool		users_limit = heed_users_limit && users_timeout > 0 &&
		(timeout_ms <= 0 || users_timeout <= timeout_ms);
	volatile bool done = false;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(context);

	PG_TRY();
	{
		if (!users_limit)
			LockTimeout = timeout_ms;
		work(arg);
		LockTimeout = users_timeout;

		ReleaseCurrentSubTransaction();
		MemoryContextSwitchTo(context);
		CurrentResourceOwner = owner;
		done = true;
	}
	PG_CATCH();
	{
		ErrorData  *edata;

		LockTimeout = users_timeout;
		MemoryContextSwitchTo(context);
		edata = CopyErrorData();
		FlushErrorState();

		RollbackAndReleaseCurrentSubTransaction();
		MemoryContextSwitchTo(context);
		CurrentResourceOwner = owner;

		if (edata->sqlerrcode != ERRCODE_LOCK_NOT_AVAILABLE || users_limit)
			ReThrowError(edata);
		FreeErrorData(edata);
	}
	PG_END_TRY();

	return done;
}
