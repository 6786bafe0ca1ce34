/*-------------------------------------------------------------------------
 *
 * lock_limit.c
 *	  Limiting how long we wait for locks.
 *
 * We use lock_timeout.  It ends in an error, which can be caught only in a
 * subtransaction; but the wait is one that PostgreSQL knows: the deadlock
 * detector sees it, and it can be cancelled.
 *
 * The lock may be on another node if Citus keeps the rows there, and a process
 * that waits there does not know our limit.  Citus passes a SET LOCAL on to the
 * nodes of the transaction if it is told to.
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
 * Set lock_timeout on the other nodes of this transaction, and not here.
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
 * Set the current LockTimeout on the other nodes of this transaction instead of
 * the user's, until end_limit_elsewhere() or the abort of the subtransaction.
 * Returns the argument for end_limit_elsewhere(), or NULL if there is nothing
 * to undo.
 */
const char *
begin_limit_elsewhere(int users_timeout)
{
	const char *propagated = GetConfigOption(PROPAGATE_SET_COMMANDS, true, false);
	const char *back = "DEFAULT";

	if (propagated == NULL || LockTimeout == 0)
		return NULL;

	/* with "local" the nodes have the user's value */
	if (strcmp(propagated, "local") == 0)
		back = psprintf("%d", users_timeout);
	set_elsewhere(psprintf("%d", LockTimeout));
	return back;
}

/* Undo begin_limit_elsewhere(). */
void
end_limit_elsewhere(const char *back)
{
	if (back != NULL)
		set_elsewhere(back);
}

/*
 * Set lock_timeout, in milliseconds (0: none), until lock_limit_end() is called
 * with what this returns, or the (sub)transaction aborts.
 *
 * It is set as a function's SET clause would set it, and not by assigning the
 * variable: if a user's trigger set it, too, and failed, our value would be
 * restored and stay for the rest of the session.
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

/* Undo lock_limit_begin(). */
void
lock_limit_end(int nestlevel)
{
	AtEOXact_GUC(true, nestlevel);
}

/*
 * Call work(arg) in an internal subtransaction with a lock_timeout of
 * timeout_ms (0: none).  Returns false, with nothing done, if that was reached.
 * If the user has set a stricter limit, that raises its error as usual, unless
 * heed_users_limit is false.  "elsewhere" says that rows may be on other nodes.
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
