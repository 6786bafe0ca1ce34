/*-------------------------------------------------------------------------
 *
 * background_process.c
 *	  What all background processes have in common: how they are registered,
 *	  their settings and their rights.
 *
 * A background process runs with the settings of its database, so that the
 * project's own can be set there.  Those that could spoil its work, or change
 * what its statements mean, are fixed.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/process/background_process.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "commands/trigger.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "utils/guc.h"

#include "base/compat.h"
#include "process/background_process.h"

/*
 * Fill in what the postmaster has to know of an "idempotency KIND", whose
 * function is idempotency_KIND_main().
 */
void
background_describe(BackgroundWorker *worker, const char *kind)
{
	memset(worker, 0, sizeof(BackgroundWorker));
	worker->bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
	worker->bgw_start_time = BgWorkerStart_RecoveryFinished;
	worker->bgw_restart_time = BGW_NEVER_RESTART;
	strlcpy(worker->bgw_library_name, "idempotency", sizeof(worker->bgw_library_name));
	snprintf(worker->bgw_function_name, sizeof(worker->bgw_function_name),
			 "idempotency_%s_main", kind);
	snprintf(worker->bgw_name, sizeof(worker->bgw_name), "idempotency %s", kind);
	snprintf(worker->bgw_type, sizeof(worker->bgw_type), "idempotency %s", kind);
}

/*
 * Ask for one in a database, which is its argument.  If a handle is wanted, we
 * are also signalled when it starts and ends.  Returns false if there is no slot.
 */
bool
background_start(const char *kind, Oid dbid, BackgroundWorkerHandle **handle)
{
	BackgroundWorker worker;

	background_describe(&worker, kind);
	worker.bgw_flags |= BGWORKER_INTERRUPTIBLE;
	snprintf(worker.bgw_name, sizeof(worker.bgw_name),
			 "idempotency %s for database %u", kind, dbid);
	worker.bgw_main_arg = ObjectIdGetDatum(dbid);
	worker.bgw_notify_pid = handle == NULL ? 0 : MyProcPid;
	return RegisterDynamicBackgroundWorker(&worker, handle);
}

/*
 * Fix a setting for the process's life, if this version has it.
 */
void
background_set(const char *name, const char *value)
{
	if (GetConfigOption(name, true, false) != NULL)
		SetConfigOption(name, value, PGC_SUSET, PGC_S_OVERRIDE);
}

void
background_fix_settings(void)
{
	background_set("search_path", "pg_catalog, pg_temp");
	background_set("default_transaction_isolation", "read committed");
	background_set("default_transaction_deferrable", "off");
	background_set("session_replication_role", "origin");
	background_set("row_security", "on");
	background_set("exit_on_error", "off");
	background_set("lock_timeout", "0");
	background_set("statement_timeout", "0");
	background_set("transaction_timeout", "0");
	background_set("idle_in_transaction_session_timeout", "0");
	background_set("idle_session_timeout", "0");
	background_set("max_parallel_workers_per_gather", "0");
	background_set("jit", "off");
}

/*
 * Begin a transaction.
 *
 * What was fixed is safe from reloads, but a trigger of the table's owner may SET
 * what it likes, and that would last beyond its transaction.
 */
void
background_begin(void)
{
	ResetAllOptions();
	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();
}

/*
 * To be called first in a transaction that touches the ledgers.
 *
 * A background process runs as a superuser.  Its statements run with the rights
 * of the table's owner, and so do the triggers that they fire; but what an owner
 * leaves for the end of the transaction, a deferred trigger or a cursor WITH
 * HOLD, would run with ours.  So deferred constraints are checked at once, and
 * the rest is refused, as when PostgreSQL itself maintains the tables of others.
 */
void
background_restrict(void)
{
	Oid			userid;
	int			sec_context;

	/* all of them, and not deferred */
	AfterTriggerSetState(makeNode(ConstraintsSetStmt));

	GetUserIdAndSecContext(&userid, &sec_context);
	SetUserIdAndSecContext(userid, sec_context | SECURITY_RESTRICTED_OPERATION);
}

/* End such a transaction.  If it aborts instead, nothing is left to do. */
void
background_commit(void)
{
	Oid			userid;
	int			sec_context;

	CommitTransactionCommand();
	GetUserIdAndSecContext(&userid, &sec_context);
	SetUserIdAndSecContext(userid, sec_context & ~SECURITY_RESTRICTED_OPERATION);
}
