/*-------------------------------------------------------------------------
 *
 * worker.c
 *	  The worker of one database.
 *
 * The launcher has one started when it is due (launcher.c).  It sends what
 * prepared transactions have left to be told (notify.c), does as much of a pass
 * through the ledgers as it has time for (worker_pass.c, worker_run.c), and ends.
 *
 * It obeys default_transaction_read_only.
 *
 * The statements, and with them triggers of the table, run with the rights of
 * the table's owner; nothing is left for the end of the transaction, which has
 * ours.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/process/worker.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <signal.h>

#include "access/xact.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "tcop/tcopprot.h"
#include "utils/backend_status.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"

#include "base/compat.h"
#include "base/notify.h"
#include "base/subtransaction.h"
#include "process/background_process.h"
#include "process/worker_pass.h"
#include "process/worker_run.h"
#include "process/worker_table.h"

PGDLLEXPORT void idempotency_worker_main(Datum arg);

/* ---------- notices ---------- */

static void
send_notices_work(void *arg)
{
	send_kept_notices();
}

/*
 * Send what prepared transactions have left.  If that fails, it is left to the
 * next worker, shown in the view, and logged if the last worker did not fail in
 * that way.
 */
static void
send_notices(WorkerRun *run)
{
	static bool failed = false;
	ErrorData  *error = failed ? NULL : in_subtransaction(send_notices_work, NULL);
	char	   *text;
	const char *last;
	bool		is_new;

	if (error == NULL)
		return;
	failed = true;
	text = psprintf("could not send the notices of a prepared transaction: %s", error->message);
	worker_table_lock(LW_SHARED);
	last = worker_own_entry()->error;
	is_new = last[0] == '\0' || strncmp(last, text, strlen(last)) != 0;
	worker_table_unlock();
	if (run->error[0] == '\0')
		run_keep_error(run, text);
	ereport(is_new && !error_is_about_locks(error) ? LOG : DEBUG1,
			(errcode(error->sqlerrcode), errmsg_internal("%s", text)));
	FreeErrorData(error);
}

/*
 * The first thing that a worker does, in a transaction of its own and whatever
 * idempotency.expiry says: somebody waits for it.
 */
static void
run_notices(WorkerRun *run)
{
	background_begin();
	if (!run_lock_extension() || XactReadOnly)
	{
		CommitTransactionCommand();
		return;
	}
	background_restrict();
	PushActiveSnapshot(GetTransactionSnapshot());
	run_limit_lock_waits();
	send_notices(run);
	run_commit_transaction();
}

/* ---------- errors ---------- */

/*
 * An error has ended the transaction.  "context" is where its text may be.
 */
static void
catch_error(WorkerRun *run, MemoryContext context)
{
	ErrorData  *error;

	HOLD_INTERRUPTS();
	MemoryContextSwitchTo(context);
	error = CopyErrorData();

	/* that somebody alters the table need not be in the log */
	if (error->sqlerrcode != ERRCODE_LOCK_NOT_AVAILABLE)
		EmitErrorReport();
	AbortCurrentTransaction();
	MemoryContextSwitchTo(context);
	FlushErrorState();
	RESUME_INTERRUPTS();

	run->failed = true;
	run_keep_error(run, error->message);
}

/* An error ends the work on one ledger, but not that on the next. */
static void
note_error(WorkerRun *run, MemoryContext context)
{
	catch_error(run, context);

	/* that one is over for this pass */
	run_end_part(run, false);
}

/* ---------- the process ---------- */

void
idempotency_worker_main(Datum arg)
{
	Oid			dbid = DatumGetObjectId(arg);
	MemoryContext context;
	MemoryContext run_context;
	static WorkerRun run;		/* looked at as the process exits, whatever
								 * has become of the stack */

	if (!worker_enter(dbid))
		proc_exit(0);

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnectionByOid(dbid, InvalidOid, 0);
	pgstat_report_appname("idempotency worker");
	background_fix_settings();
	/* what a crash undoes is done again */
	background_set("synchronous_commit", "off");

	run_context = AllocSetContextCreate(TopMemoryContext, "idempotency worker",
										ALLOCSET_DEFAULT_SIZES);
	context = AllocSetContextCreate(TopMemoryContext, "idempotency worker batch",
									ALLOCSET_DEFAULT_SIZES);
	run_begin(&run);

	PG_TRY();
	{
		MemoryContextSwitchTo(context);
		run_notices(&run);
	}
	PG_CATCH();
	{
		catch_error(&run, run_context);
	}
	PG_END_TRY();

	while (run.part < NPARTS)
	{
		volatile bool more = false;
		volatile bool failed = false;

		PG_TRY();
		{
			more = worker_do_part(&run, context);
		}
		PG_CATCH();
		{
			note_error(&run, run_context);
			failed = true;
		}
		PG_END_TRY();
		if (!more && !failed)
			break;
	}

	run_end(&run);
	proc_exit(0);
}
