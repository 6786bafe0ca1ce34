/*-------------------------------------------------------------------------
 *
 * idempotency.c
 *	  Module start-up.
 *
 * Nothing here needs shared_preload_libraries: a backend that loads the
 * library at its first call has everything but the background processes.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/idempotency.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "fmgr.h"
#include "miscadmin.h"

#include "base/compat.h"
#include "base/notify.h"
#include "base/settings.h"
#include "base/settings_guard.h"
#include "base/shmem.h"
#include "ledger/open_claims.h"
#include "process/drop_database.h"
#include "process/launcher.h"
#include "stripe/api_path.h"

IDEMPOTENCY_MODULE_MAGIC;

PGDLLEXPORT void _PG_init(void);

/* What the settings cannot know: they are in a layer below. */
static const StripeSettingRules stripe_setting_rules = {
	.api_base_problem = api_base_problem,
	.version_problem = api_version_problem,
	.allowed_paths_problem = path_list_problem
};

/* The library is loaded, by a backend or by the postmaster. */
void
_PG_init(void)
{
	settings_guard_begin();
	settings_define(&stripe_setting_rules);
	settings_guard_end();
	open_claims_init();

	/* the server that pg_upgrade starts runs no processes of ours */
	if (process_shared_preload_libraries_in_progress && !IsBinaryUpgrade)
	{
		shmem_request_at_preload();
		drop_database_init();
		notice_init();
		launcher_register();
	}
}
