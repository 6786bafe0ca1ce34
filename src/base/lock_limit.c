/*-------------------------------------------------------------------------
 *
 * lock_limit.c
 *	  Waiting for locks no longer than we want to.
 *
 * lock_timeout is an error, and an error can be caught only at the price of a
 * subtransaction.  In exchange the wait is one that PostgreSQL knows: the
 * deadlock detector sees it, and it can be cancelled.
 *
 * The lock may be on another node, where Citus keeps the rows, and who waits
 * there doesn't know of our limit.  Citus hands a SET LOCAL on to the nodes of
 * the transaction if it is asked to.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/lock_limit.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "executor/spi.h"
#include "storage/proc.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/resowner.h"

#include "base/lock_limit.h"

#define PROPAGATE_SET_COMMANDS "citus.propagate_set_commands"

/*
 * Give the other nodes of this transaction a lock_timeout.  Here it stays as
 * it is.
 */
static void
set_elsewhere(const char *value)
{
	int			nestlevel = NewGUCNestLevel();
	char	   *sql = psprintf("SET LOCAL lock_timeout = %s", value);
	int			rc;

	(void) set_config_option(PROPAGATE_SET_COMMANDS, "local", PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_SAVE, true, 0, false);
	SPI_connect();
	rc = SPI_execute(sql, false, 0);
	if (rc != SPI_OK_UTILITY)
		elog(ERROR, "SPI_execute returned %s for %s", SPI_result_code_string(rc), sql);
	SPI_finish();
	/* true would keep what SET LOCAL has set */
	AtEOXact_GUC(false, nestlevel);
}

/*
 * Let other nodes of this transaction keep to the LockTimeout that was set here
 * instead of the user's, until end_limit_elsewhere() or the end of the
 * subtransaction by an error.  Returns what to give that, NULL where nobody
 * was told.
 */
const char *
begin_limit_elsewhere(int users_timeout)
{
	const char *propagated = GetConfigOption(PROPAGATE_SET_COMMANDS, true, false);
	const char *back = "DEFAULT";

	if (propagated == NULL || LockTimeout == 0)
		return NULL;

	/* they know the user's if settings are handed on anyway */
	if (strcmp(propagated, "local") == 0)
		back = psprintf("%d", users_timeout);
	set_elsewhere(psprintf("%d", LockTimeout));
	return back;
}

void
end_limit_elsewhere(const char *back)
{
	if (back != NULL)
		set_elsewhere(back);
}

/*
 * Set lock_timeout, in milliseconds (0: none), until lock_limit_end() is given
 * what this returns, or the (sub)transaction aborts.
 *
 * The setting is changed as a function's SET clause changes it, not behind its
 * back: a user's trigger that sets it, too, and fails would have it put back to
 * our value for the rest of the session.
 */
int
lock_limit_begin(int timeout_ms)
{
	int			nestlevel = NewGUCNestLevel();
	char		value[16];

	snprintf(value, sizeof(value), "%d", timeout_ms);
	(void) set_config_option("lock_timeout", value, PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_SAVE, true, 0, false);
	return nestlevel;
}

void
lock_limit_end(int nestlevel)
{
	AtEOXact_GUC(true, nestlevel);
}

/*
 * Do something in an internal subtransaction under a lock_timeout of
 * timeout_ms (0: none).  Returns false, with nothing done, if that limit
 * struck.  A stricter limit that the user has set raises its error as ever,
 * unless heed_users_limit is false.  "elsewhere" says that rows may be on other
 * nodes.
 */
bool
within_lock_timeout(int timeout_ms, bool heed_users_limit, bool elsewhere,
					void (*work) (void *), void *arg)
{
	MemoryContext context = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;
	int			users_timeout = LockTimeout;
	bool		users_limit = heed_users_limit && users_timeout > 0 &&
		(timeout_ms <= 0 || users_timeout <= timeout_ms);
	volatile bool done = false;
	const char *volatile back = NULL;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(context);

	PG_TRY();
	{
		int			nestlevel = 0;

		if (!users_limit)
			nestlevel = lock_limit_begin(timeout_ms);
		if (elsewhere)
			back = begin_limit_elsewhere(users_timeout);
		work(arg);
		end_limit_elsewhere(back);
		if (!users_limit)
			lock_limit_end(nestlevel);

		ReleaseCurrentSubTransaction();
		MemoryContextSwitchTo(context);
		CurrentResourceOwner = owner;
		done = true;
	}
	PG_CATCH();
	{
		ErrorData  *edata;

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
