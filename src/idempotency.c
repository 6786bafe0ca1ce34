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
#include "events/kept_events.h"
#include "ledger/ledger.h"
#include "ledger/open_claims.h"
#include "process/drop_database.h"
#include "process/launcher.h"
#include "process/recorder_queue.h"
#include "process/worker_table.h"
#include "stripe/api_path.h"

IDEMPOTENCY_MODULE_MAGIC;

PGDLLEXPORT void _PG_init(void);

/* What the settings cannot know: they are in a layer below. */
static const StripeSettingRules stripe_setting_rules = {
	.api_base_problem = api_base_problem,
	.version_problem = api_version_problem,
	.allowed_paths_problem = path_list_problem
};

/*
 * No folder includes a later one: what base/, ledger/ and events/ have to tell
 * process/, or to ask of it, goes by these.
 */
static const ShmemPart shmem_parts[] = {
	{"idempotency recorder queue", 1, recorder_queue_size, recorder_queue_init, recorder_queue_attach},
	{"idempotency databases", 1, worker_table_size, worker_table_init, worker_table_attach},
};

static const NoticeCallbacks notice_callbacks = {
	.kept = worker_table_note_notices,
	.may_be_due = worker_table_send_notices_soon
};

static const KeptPlaceCallbacks kept_place_callbacks = {
	.read = worker_table_read_kept_place,
	.write = worker_table_write_kept_place
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
		shmem_request_at_preload(shmem_parts, lengthof(shmem_parts));
		drop_database_init();
		notice_init(&notice_callbacks);
		ledger_note_use(worker_table_note_use);
		kept_events_share_place(&kept_place_callbacks);
		launcher_register();
	}
}
