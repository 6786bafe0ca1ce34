/*-------------------------------------------------------------------------
 *
 * background.c
 *	  Settings that all background processes have.
 *
 * A background process runs with the settings of its database, so that the
 * project's own can be set there.  Those that could spoil its work, or change
 * what its statements mean, are fixed.
 *
 * src/background.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/guc.h"

#include "background.h"

/*
 * Fix a setting for the process's life, where this version has it.
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
