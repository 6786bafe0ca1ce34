/*-------------------------------------------------------------------------
 *
 * owner_spi.c
 *	  Kept SPI statements that run with a table owner's rights.
 *
 * A caller has no privilege on the ledgers, and may only do what our functions
 * do for it.  So statements run as the table's owner, as those of referential
 * integrity triggers do: SECURITY_LOCAL_USERID_CHANGE keeps anything that they
 * call from changing the role further, SECURITY_NOFORCE_RLS lets the owner see
 * its own rows.  The owner is often a superuser, and search_path is the
 * caller's.  Hence the rule for statement texts: every function, type and
 * operator is qualified, and constructs that look an operator up by search_path
 * (IN, BETWEEN, IS DISTINCT FROM, NULLIF, simple CASE) do not occur.
 *
 * Plans are generic from the start: every statement names the whole primary
 * key, so a custom plan would be the same one, planned again.  Only
 * owner_select(), which searches, leaves that to the planner: a planner that
 * routes rows to other nodes may have no generic plan for a statement without a
 * key.
 *
 * The error of a constraint quotes the row that failed, with an answer, a token
 * or a payload in it, for the caller and for the server log.  The tables' own
 * constraints cannot fail, but an owner may add some.  So the quotation is
 * replaced.
 *
 * The user id is restored by us on success, and by the end of the
 * (sub)transaction on error.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/owner_spi.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "miscadmin.h"
#include "nodes/plannodes.h"
#include "utils/plancache.h"
#include "utils/resowner.h"
#include "utils/snapmgr.h"

#include "base/owner_spi.h"

/* Plan a statement, and keep the plan for the session. */
static void
prepare(OwnerStatement *statement, int options)
{
	SPIPlanPtr	plan;

	plan = SPI_prepare_cursor(statement->sql, statement->nargs, statement->argtypes,
							  options);
	if (plan == NULL)
		elog(ERROR, "SPI_prepare_cursor returned %s for %s",
			 SPI_result_code_string(SPI_result), statement->sql);
	SPI_keepplan(plan);
	statement->plan = plan;
}

/*
 * Error context callback: keep a row's values out of the error that is being
 * raised.
 */
static void
hide_row(void *arg)
{
	int			sqlstate = geterrcode();

	if (ERRCODE_TO_CATEGORY(sqlstate) == ERRCODE_INTEGRITY_CONSTRAINT_VIOLATION ||
		sqlstate == ERRCODE_WITH_CHECK_OPTION_VIOLATION)
		errdetail("The row is not shown, because it may hold what only its owner may see.");
}

/* See owner_execute(); InvalidSnapshot leaves the choice to read_only. */
static uint64
execute(OwnerStatement *statement, Oid owner, Datum *values, const char *nulls,
		bool read_only, Snapshot snapshot, Datum *out, bool *outnull, int nout)
{
	ErrorContextCallback context;
	Oid			save_userid;
	int			save_sec_context;
	uint64		processed;
	int			rc;

	context.callback = hide_row;
	context.arg = NULL;
	context.previous = error_context_stack;
	error_context_stack = &context;

	GetUserIdAndSecContext(&save_userid, &save_sec_context);
	SetUserIdAndSecContext(owner, save_sec_context |
						   SECURITY_LOCAL_USERID_CHANGE | SECURITY_NOFORCE_RLS);
	SPI_connect();

	if (statement->plan == NULL)
		prepare(statement, CURSOR_OPT_GENERIC_PLAN);

	rc = SPI_execute_snapshot(statement->plan, values, nulls, snapshot, InvalidSnapshot,
							  read_only, true, 0);
	if (rc < 0)
		elog(ERROR, "SPI_execute_snapshot returned %s for %s",
			 SPI_result_code_string(rc), statement->sql);
	processed = SPI_processed;

	if (out != NULL && processed > 0 && SPI_tuptable != NULL)
	{
		TupleDesc	desc = SPI_tuptable->tupdesc;
		int			i;

		for (i = 0; i < nout; i++)
		{
			out[i] = SPI_getbinval(SPI_tuptable->vals[0], desc, i + 1, &outnull[i]);
			if (!outnull[i])
				out[i] = SPI_datumTransfer(out[i], TupleDescAttr(desc, i)->attbyval,
										   TupleDescAttr(desc, i)->attlen);
		}
	}

	SPI_finish();
	SetUserIdAndSecContext(save_userid, save_sec_context);
	error_context_stack = context.previous;

	return processed;
}

/*
 * Run a statement as "owner": in a new snapshot, or with read_only in the
 * active one.
 *
 * values and nulls (' ' or 'n', or NULL) are its parameters.  If out is given
 * and a row is returned, its first nout columns are copied there, in the
 * caller's memory context.  Returns the number of rows, and raises whatever the
 * statement raises.
 */
uint64
owner_execute(OwnerStatement *statement, Oid owner,
			  Datum *values, const char *nulls, bool read_only,
			  Datum *out, bool *outnull, int nout)
{
	return execute(statement, owner, values, nulls, read_only, InvalidSnapshot,
				   out, outnull, nout);
}

/*
 * The same in a snapshot taken now, even if the transaction keeps an older one
 * (REPEATABLE READ, SERIALIZABLE), as referential integrity triggers do.  It
 * shows what was committed since, and what this transaction has done.
 */
uint64
owner_execute_latest(OwnerStatement *statement, Oid owner,
					 Datum *values, const char *nulls,
					 Datum *out, bool *outnull, int nout)
{
	Snapshot	snapshot = InvalidSnapshot;

	if (IsolationUsesXactSnapshot())
	{
		CommandCounterIncrement();
		snapshot = GetLatestSnapshot();
	}
	return execute(statement, owner, values, nulls, false, snapshot, out, outnull, nout);
}

/*
 * Run a SELECT as "owner", in a new snapshot, and call row() for each row.  The
 * callback has to copy what it wants to keep, and must not run statements of
 * its own.
 */
void
owner_select(OwnerStatement *statement, Oid owner, Datum *values,
			 void (*row) (HeapTuple tuple, TupleDesc desc, void *arg), void *arg)
{
	Oid			save_userid;
	int			save_sec_context;
	uint64		i;
	int			rc;

	GetUserIdAndSecContext(&save_userid, &save_sec_context);
	SetUserIdAndSecContext(owner, save_sec_context |
						   SECURITY_LOCAL_USERID_CHANGE | SECURITY_NOFORCE_RLS);
	SPI_connect();

	if (statement->plan == NULL)
		prepare(statement, 0);

	rc = SPI_execute_plan(statement->plan, values, NULL, false, 0);
	if (rc != SPI_OK_SELECT)
		elog(ERROR, "SPI_execute_plan returned %s for %s",
			 SPI_result_code_string(rc), statement->sql);
	for (i = 0; i < SPI_processed; i++)
		row(SPI_tuptable->vals[i], SPI_tuptable->tupdesc, arg);

	SPI_finish();
	SetUserIdAndSecContext(save_userid, save_sec_context);
}

/*
 * Does the plan of a SELECT from one table read the table "relid" itself?  It
 * does not if an extension has planned the statement (a distributed table is
 * empty on the coordinator), or if the table is partitioned.
 */
bool
owner_plan_is_local_scan(OwnerStatement *statement, Oid owner, Oid relid)
{
	Oid			save_userid;
	int			save_sec_context;
	CachedPlan *cplan;
	bool		local = false;

	GetUserIdAndSecContext(&save_userid, &save_sec_context);
	SetUserIdAndSecContext(owner, save_sec_context |
						   SECURITY_LOCAL_USERID_CHANGE | SECURITY_NOFORCE_RLS);
	SPI_connect();

	if (statement->plan == NULL)
		prepare(statement, CURSOR_OPT_GENERIC_PLAN);

	cplan = SPI_plan_get_cached_plan(statement->plan);
	if (cplan != NULL)
	{
		PlannedStmt *stmt = linitial_node(PlannedStmt, cplan->stmt_list);
		Plan	   *plan = stmt->planTree;

		if (list_length(cplan->stmt_list) == 1 && plan != NULL &&
			(IsA(plan, IndexScan) || IsA(plan, IndexOnlyScan) ||
			 IsA(plan, BitmapHeapScan) || IsA(plan, SeqScan)))
		{
			Scan	   *scan = (Scan *) plan;
			RangeTblEntry *rte = list_nth_node(RangeTblEntry, stmt->rtable,
											   scan->scanrelid - 1);

			local = rte->rtekind == RTE_RELATION && rte->relid == relid;
		}
		ReleaseCachedPlan(cplan, CurrentResourceOwner);
	}

	SPI_finish();
	SetUserIdAndSecContext(save_userid, save_sec_context);

	return local;
}
