/*-------------------------------------------------------------------------
 *
 * worker_states.c
 *	  The view idempotency.workers: what the workers of all databases do, and
 *	  what to do about those that do nothing.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/process/worker_states.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/xlog.h"
#include "catalog/pg_authid_d.h"
#include "catalog/pg_database.h"
#include "commands/dbcommands.h"
#include "fmgr.h"
#include "funcapi.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/syscache.h"
#include "utils/timestamp.h"
#include "utils/tuplestore.h"
#include "utils/varlena.h"

#include "base/compat.h"
#include "base/settings.h"
#include "base/shmem.h"
#include "process/worker_table.h"

PG_FUNCTION_INFO_V1(idempotency_worker_states);

/* Columns of worker_states(). */
enum
{
	W_DATABASE, W_STATUS, W_PID, W_LAST_RUN, W_REMOVED, W_REFUSED,
	W_OLDEST_EXPIRED, W_LAST_ERROR, W_LAST_ERROR_AT, W_NEXT_RUN, W_NEXT_STEP,
	W_NCOLUMNS
};

/*
 * The statement that adds us to shared_preload_libraries, NULL where that is
 * done.  What is in the list is shown to those only who may see it anyway.
 */
static char *
preload_statement(void)
{
	const char *old = GetConfigOption("shared_preload_libraries", true, false);
	StringInfoData buf;
	List	   *names = NIL;
	ListCell   *lc;

	initStringInfo(&buf);
	appendStringInfoString(&buf, "ALTER SYSTEM SET shared_preload_libraries = ");
	if (old != NULL && old[0] != '\0')
	{
		if (!has_privs_of_role(GetUserId(), ROLE_PG_READ_ALL_SETTINGS))
			return pstrdup("-- as superuser, add idempotency to shared_preload_libraries and restart the server");
		if (!SplitDirectoriesString(pstrdup(old), ',', &names))
			names = NIL;
	}
	foreach(lc, names)
	{
		/* pg_upgrade's server has it in the list and runs nothing of ours */
		if (strcmp(lfirst(lc), "idempotency") == 0)
			return NULL;
		appendStringInfo(&buf, "%s, ", quote_literal_cstr(lfirst(lc)));
	}
	appendStringInfoString(&buf, "'idempotency'; -- and restart the server");
	return buf.data;
}

static const char *
status_of(Database *db, bool launcher)
{
	if (!shmem_is_there())
		return "not preloaded";
	if (RecoveryInProgress())
		return "standby";
	if (db != NULL && db->pid != 0)
		return "running";
	if (setting_max_workers == 0)
		return "stopped";
	if (!launcher)
		return "no launcher";
	if (db == NULL)
		return "unknown";
	if (!db->startable)
		return "no connections";
	if (db->known == DATABASE_UNKNOWN)
		return "unknown";
	switch (db->outcome)
	{
		case RUN_NONE:
			return "waiting";
		case RUN_DONE:
			return "idle";
		case RUN_OFF:
			return "off";
		case RUN_READ_ONLY:
			return "read only";
		case RUN_REFUSED:
			return "rows refused";
		case RUN_FAILED:
			return "failing";
		case RUN_NO_SLOT:
			return "no slot";
	}
	return NULL;
}

static char *
more_processes(void)
{
	return psprintf("ALTER SYSTEM SET max_worker_processes = %d; -- and restart the server",
					max_worker_processes + setting_max_workers + 1);
}

static char *
next_step_of(Database *db, const char *name, bool launcher)
{
	const char *quoted = quote_identifier(name);

	if (!shmem_is_there())
		return preload_statement();
	if (RecoveryInProgress())
		return NULL;
	if (setting_max_workers == 0)
		return pstrdup("ALTER SYSTEM RESET idempotency.max_workers; SELECT pg_catalog.pg_reload_conf();");
	if (!launcher)
		return more_processes();
	if (db == NULL)
		return NULL;
	if (!db->startable && db->known == DATABASE_WITH)
		return psprintf("ALTER DATABASE %s ALLOW_CONNECTIONS true;", quoted);
	switch (db->outcome)
	{
		case RUN_OFF:
			return psprintf("ALTER DATABASE %s SET idempotency.expiry = on;", quoted);
		case RUN_READ_ONLY:
			return psprintf("ALTER DATABASE %s SET default_transaction_read_only = off;", quoted);
		case RUN_NO_SLOT:
			return more_processes();
		case RUN_REFUSED:
			if (db->unsettled == db->refused)
				return pstrdup("SELECT * FROM idempotency.stripe_unknown;");
			return pstrdup("SELECT * FROM idempotency.expire();");
		case RUN_FAILED:
			return pstrdup("SELECT * FROM idempotency.expire();");
		default:
			return NULL;
	}
}

/*
 * The last error, which is in its own database's encoding: in another one it
 * may be no text at all, so that only its ASCII is shown there.
 */
static text *
last_error(Database *db)
{
	HeapTuple	tuple = SearchSysCache1(DATABASEOID, ObjectIdGetDatum(db->dbid));
	char	   *p;

	if (!HeapTupleIsValid(tuple) ||
		((Form_pg_database) GETSTRUCT(tuple))->encoding != GetDatabaseEncoding())
	{
		for (p = db->error; *p != '\0'; p++)
		{
			if (IS_HIGHBIT_SET(*p))
				*p = '?';
		}
	}
	if (HeapTupleIsValid(tuple))
		ReleaseSysCache(tuple);
	return cstring_to_text(db->error);
}

static void
put_row(ReturnSetInfo *rsinfo, Oid dbid, Database *db, bool launcher)
{
	Datum		values[W_NCOLUMNS];
	bool		nulls[W_NCOLUMNS];
	char	   *name = get_database_name(dbid);
	char	   *next_step;

	if (name == NULL)
		return;
	memset(nulls, true, sizeof(nulls));

#define PUT(column, value) (values[column] = (value), nulls[column] = false)
#define PUT_TIME(column, time) \
	do { if ((time) != 0) PUT(column, TimestampTzGetDatum(time)); } while (0)

	PUT(W_DATABASE, CStringGetTextDatum(name));
	PUT(W_STATUS, CStringGetTextDatum(status_of(db, launcher)));
	if (db != NULL)
	{
		if (db->pid != 0)
			PUT(W_PID, Int32GetDatum(db->pid));
		PUT_TIME(W_LAST_RUN, db->last_run);
		PUT(W_REMOVED, Int64GetDatum(db->removed));
		PUT(W_REFUSED, Int64GetDatum(db->refused));
		PUT_TIME(W_OLDEST_EXPIRED, db->oldest);
		if (db->error[0] != '\0')
			PUT(W_LAST_ERROR, PointerGetDatum(last_error(db)));
		PUT_TIME(W_LAST_ERROR_AT, db->error_at);
		if (!RecoveryInProgress() && db->startable && setting_max_workers > 0)
			PUT_TIME(W_NEXT_RUN, db->next_run);
	}
	next_step = next_step_of(db, name, launcher);
	if (next_step != NULL)
		PUT(W_NEXT_STEP, CStringGetTextDatum(next_step));

#undef PUT_TIME
#undef PUT

	tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
}

/*
 * worker_states(): this database, and with the privileges of
 * pg_read_all_stats the others that have the extension, too.
 */
Datum
idempotency_worker_states(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;
	bool		all = has_privs_of_role(GetUserId(), ROLE_PG_READ_ALL_STATS);
	bool		own = false;
	bool		launcher = false;
	Database   *copy = NULL;
	int			n = 0;
	int			i;

	InitMaterializedSRF(fcinfo, 0);

	if (worker_table != NULL)
	{
		copy = palloc(MAX_DATABASES * sizeof(Database));
		worker_table_lock(LW_SHARED);
		n = worker_table->used;
		memcpy(copy, worker_table->entries, n * sizeof(Database));
		launcher = worker_table->launcher_pid != 0;
		worker_table_unlock();
	}

	for (i = 0; i < n; i++)
	{
		if (copy[i].dbid == MyDatabaseId)
		{
			put_row(rsinfo, MyDatabaseId, &copy[i], launcher);
			own = true;
		}
		else if (all && copy[i].known == DATABASE_WITH)
			put_row(rsinfo, copy[i].dbid, &copy[i], launcher);
	}
	if (!own)
		put_row(rsinfo, MyDatabaseId, NULL, launcher);

	return (Datum) 0;
}
