/*-------------------------------------------------------------------------
 *
 * idempotency.c
 *	  Module start-up and settings.
 *
 * Nothing here needs shared_preload_libraries: a backend that loads the
 * library at its first call has everything but the background processes.
 *
 * src/idempotency.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <limits.h>

#include "access/parallel.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "utils/guc.h"
#include "utils/varlena.h"

#include "base/compat.h"
#include "base/notify.h"
#include "base/secret_file.h"
#include "base/settings.h"
#include "base/settings_guard.h"
#include "base/shmem.h"
#include "ledger/open_claims.h"
#include "process/drop_database.h"
#include "process/launcher.h"
#include "process/recorder_client.h"
#include "stripe/api_path.h"

IDEMPOTENCY_MODULE_MAGIC;

PGDLLEXPORT void _PG_init(void);

int			key_ttl = 24 * 60 * 60;
int			stripe_lease = 5 * 60;
int			wait_timeout = 10 * 1000;
int			stripe_resend_margin = 60 * 60;
int			max_response_size = 1024;
int			open_claim_at_commit = OPEN_CLAIM_ERROR;
int			stripe_ledger = STRIPE_LEDGER_RECORDER;
int			stripe_record_timeout = 2 * 1000;
char	   *stripe_compare_ignore = NULL;
int			webhook_tolerance = 300;
int			webhook_retention = 35 * 24 * 60 * 60;
int			webhook_max_attempts = 20;
bool		webhook_notify = true;
int			webhook_payload = WEBHOOK_PAYLOAD_ALL;
int			webhook_livemode = WEBHOOK_LIVEMODE_ANY;
char	   *webhook_secret_file = NULL;
int			stripe_timeout = 30 * 1000;
int			stripe_max_retries = 2;
bool		stripe_key_in_metadata = false;
int			stripe_log_level = LOG;
char	   *stripe_api_base = NULL;
char	   *stripe_version = NULL;
char	   *stripe_allowed_paths = NULL;
char	   *stripe_api_key_file = NULL;
char	   *stripe_ca_file = NULL;
int			abandoned_retention = 7 * 24 * 60 * 60;
int			stripe_body_retention = 30 * 24 * 60 * 60;
int			stripe_retention = -1;
bool		expiry = true;
int			expiry_interval = 60;
int			expiry_batch_size = 1000;
int			max_workers = 2;

static bool settings_are_defined = false;

static const struct config_enum_entry open_claim_options[] = {
	{"error", OPEN_CLAIM_ERROR, false},
	{"warning", OPEN_CLAIM_WARNING, false},
	{"allow", OPEN_CLAIM_ALLOW, false},
	{NULL, 0, false}
};

static const struct config_enum_entry stripe_ledger_options[] = {
	{"recorder", STRIPE_LEDGER_RECORDER, false},
	{"transaction", STRIPE_LEDGER_TRANSACTION, false},
	{NULL, 0, false}
};

static const struct config_enum_entry webhook_payload_options[] = {
	{"all", WEBHOOK_PAYLOAD_ALL, false},
	{"jsonb", WEBHOOK_PAYLOAD_JSONB, false},
	{"none", WEBHOOK_PAYLOAD_NONE, false},
	{NULL, 0, false}
};

static const struct config_enum_entry webhook_livemode_options[] = {
	{"any", WEBHOOK_LIVEMODE_ANY, false},
	{"live", WEBHOOK_LIVEMODE_LIVE, false},
	{"test", WEBHOOK_LIVEMODE_TEST, false},
	{NULL, 0, false}
};

static const struct config_enum_entry stripe_log_options[] = {
	{"off", STRIPE_LOG_OFF, false},
	{"debug5", DEBUG5, false},
	{"debug4", DEBUG4, false},
	{"debug3", DEBUG3, false},
	{"debug2", DEBUG2, false},
	{"debug1", DEBUG1, false},
	{"debug", DEBUG2, true},
	{"log", LOG, false},
	{"info", INFO, true},
	{"notice", NOTICE, false},
	{"warning", WARNING, false},
	{NULL, 0, false}
};

static bool
check_stripe_compare_ignore(char **newval, void **extra, GucSource source)
{
	List	   *names;

	if (!SplitGUCList(pstrdup(*newval), ',', &names))
	{
		GUC_check_errdetail("List syntax is invalid.");
		return false;
	}
	return true;
}

/*
 * Where calls to Stripe go, and which are allowed.  A session may set what it
 * likes before the library is loaded; were a bad value refused then, the
 * default would stand in its place, with all of Stripe open.  So it is kept,
 * and refused when it is used.  A parallel worker is given what the leader has,
 * whatever it is.
 */
static bool
check_stripe_setting(const char *problem)
{
	if (problem == NULL || !settings_are_defined || InitializingParallelWorker)
		return true;
	GUC_check_errdetail("%s", _(problem));
	return false;
}

static bool
check_stripe_api_base(char **newval, void **extra, GucSource source)
{
	return check_stripe_setting(api_base_problem(*newval));
}

static bool
check_stripe_version(char **newval, void **extra, GucSource source)
{
	return check_stripe_setting(api_version_problem(*newval));
}

static bool
check_stripe_allowed_paths(char **newval, void **extra, GucSource source)
{
	return check_stripe_setting(path_list_problem(*newval));
}

/*
 * Stripe itself keeps a key for a day: a row that goes before that is no risk
 * that anybody can want to take.
 */
static bool
check_stripe_retention(int *newval, void **extra, GucSource source)
{
	if (*newval != -1 && *newval < 24 * 60 * 60)
	{
		GUC_check_errdetail("It must be at least one day, or -1, which keeps the rows for ever.");
		return false;
	}
	return true;
}

/* No attempt at all would be a queue that nothing leaves. */
static bool
check_webhook_max_attempts(int *newval, void **extra, GucSource source)
{
	if (*newval == 0)
	{
		GUC_check_errdetail("It must be at least 1, or -1, which has no limit.");
		return false;
	}
	return true;
}

static void
define_settings(void)
{
	DefineCustomIntVariable("idempotency.key_ttl",
							"How long a recorded result is replayed.",
							"Counts from record(), which may be given a time to live of its own.",
							&key_ttl,
							24 * 60 * 60, 1, INT_MAX,
							PGC_USERSET, GUC_UNIT_S,
							NULL, NULL, NULL);

	DefineCustomIntVariable("idempotency.wait_timeout",
							"How long a claim waits for another transaction that holds the key.",
							"After that it answers in_progress. 0 doesn't wait, -1 waits without limit.",
							&wait_timeout,
							10 * 1000, -1, INT_MAX,
							PGC_USERSET, GUC_UNIT_MS,
							NULL, NULL, NULL);

	DefineCustomIntVariable("idempotency.max_response_size",
							"Largest response that is recorded.",
							"Body, headers and jsonb together.",
							&max_response_size,
							1024, 1, 512 * 1024,
							PGC_SUSET, GUC_UNIT_KB,
							NULL, NULL, NULL);

	DefineCustomEnumVariable("idempotency.open_claim_at_commit",
							 "What COMMIT does where a claim without a lease is neither recorded nor released.",
							 "With warning and allow the claim counts as lapsed at once.",
							 &open_claim_at_commit,
							 OPEN_CLAIM_ERROR, open_claim_options,
							 PGC_USERSET, 0,
							 NULL, NULL, NULL);

	DefineCustomIntVariable("idempotency.stripe_lease",
							"How long a claimed Stripe operation is held by its claimant.",
							"stripe_claim() may be given a lease of its own.",
							&stripe_lease,
							5 * 60, 1, INT_MAX,
							PGC_USERSET, GUC_UNIT_S,
							NULL, NULL, NULL);

	DefineCustomIntVariable("idempotency.stripe_resend_margin",
							"How long before Stripe may forget a key it is no longer sent again.",
							"Stripe keeps keys for at least 24 hours after it has first seen them.",
							&stripe_resend_margin,
							60 * 60, 60, 24 * 60 * 60,
							PGC_SUSET, GUC_UNIT_S,
							NULL, NULL, NULL);

	DefineCustomEnumVariable("idempotency.stripe_ledger",
							 "Who commits what is sent to Stripe.",
							 "recorder: on its own, before anything is sent; transaction: with the caller's transaction, where the derived key alone protects a call that was rolled back.",
							 &stripe_ledger,
							 STRIPE_LEDGER_RECORDER, stripe_ledger_options,
							 PGC_USERSET, 0,
							 NULL, NULL, NULL);

	DefineCustomIntVariable("idempotency.stripe_record_timeout",
							"How long a caller waits for the recorder of Stripe operations.",
							"Before anything is sent it fails after that; afterwards it goes on with a warning, and so does the recorder.",
							&stripe_record_timeout,
							2 * 1000, 10, INT_MAX,
							PGC_USERSET, GUC_UNIT_MS,
							NULL, NULL, NULL);

	DefineCustomStringVariable("idempotency.stripe_compare_ignore",
							   "Parameters that may differ between two attempts of a Stripe operation.",
							   "Names separated by commas.",
							   &stripe_compare_ignore,
							   "metadata, description, expand",
							   PGC_SUSET, GUC_LIST_INPUT,
							   check_stripe_compare_ignore, NULL, NULL);

	DefineCustomIntVariable("idempotency.webhook_tolerance",
							"How old the signature of a webhook may be.",
							"An age of exactly this is accepted, and so is a time in the future.",
							&webhook_tolerance,
							300, 1, INT_MAX,
							PGC_USERSET, GUC_UNIT_S,
							NULL, NULL, NULL);

	DefineCustomIntVariable("idempotency.webhook_retention",
							"How long a processed event is kept.",
							"Counts from its receipt; Stripe can send an event again for 30 days. -1 keeps it for ever.",
							&webhook_retention,
							35 * 24 * 60 * 60, -1, INT_MAX,
							PGC_SUSET, GUC_UNIT_S,
							NULL, NULL, NULL);

	DefineCustomIntVariable("idempotency.webhook_max_attempts",
							"How often an event is tried before it is handed out no more.",
							"Counts at each failure, and where a claim has lapsed. -1 has no limit.",
							&webhook_max_attempts,
							20, -1, INT_MAX,
							PGC_SUSET, 0,
							check_webhook_max_attempts, NULL, NULL);

	DefineCustomBoolVariable("idempotency.webhook_notify",
							 "Sends NOTIFY idempotency_event when an event is received.",
							 "PostgreSQL lets transactions that notify commit one after the other.",
							 &webhook_notify,
							 true,
							 PGC_USERSET, 0,
							 NULL, NULL, NULL);

	DefineCustomEnumVariable("idempotency.webhook_payload",
							 "What is kept of an event's body.",
							 "all: its bytes and a jsonb; jsonb: that alone; none: a jsonb until it is processed, and nothing afterwards.",
							 &webhook_payload,
							 WEBHOOK_PAYLOAD_ALL, webhook_payload_options,
							 PGC_SUSET, 0,
							 NULL, NULL, NULL);

	DefineCustomEnumVariable("idempotency.webhook_livemode",
							 "Which of Stripe's modes events have to come from.",
							 "Events of the other one are refused.",
							 &webhook_livemode,
							 WEBHOOK_LIVEMODE_ANY, webhook_livemode_options,
							 PGC_SUSET, 0,
							 NULL, NULL, NULL);

	DefineCustomStringVariable("idempotency.webhook_secret_file",
							   "File with the signing secrets of webhook endpoints.",
							   "One a line. Where it isn't set, the postmaster's environment variable IDEMPOTENCY_WEBHOOK_SECRET has them.",
							   &webhook_secret_file,
							   "",
							   PGC_SUSET, 0,
							   secret_file_check_setting, NULL, NULL);
	DefineCustomIntVariable("idempotency.abandoned_retention",
							"How long an unfinished key is kept after its lease has lapsed.",
							"One with a recovery point is kept for ever.",
							&abandoned_retention,
							7 * 24 * 60 * 60, 1, INT_MAX,
							PGC_SUSET, GUC_UNIT_S,
							NULL, NULL, NULL);

	DefineCustomIntVariable("idempotency.stripe_body_retention",
							"How long request and response of a settled Stripe operation are kept.",
							"After that the row keeps what the operation was and what came of it. -1 keeps all for ever.",
							&stripe_body_retention,
							30 * 24 * 60 * 60, -1, INT_MAX,
							PGC_SUSET, GUC_UNIT_S,
							NULL, NULL, NULL);

	DefineCustomIntVariable("idempotency.stripe_retention",
							"How long the row of a settled Stripe operation is kept.",
							"Stripe forgets a key after a day: an operation that is repeated when its row is gone is executed again. -1 keeps the rows for ever.",
							&stripe_retention,
							-1, -1, INT_MAX,
							PGC_SUSET, GUC_UNIT_S,
							check_stripe_retention, NULL, NULL);

	DefineCustomBoolVariable("idempotency.expiry",
							 "Removes expired rows in the background.",
							 "To be switched off where the rows come from elsewhere, as on a logical replication subscriber.",
							 &expiry,
							 true,
							 PGC_SUSET, 0,
							 NULL, NULL, NULL);

	DefineCustomIntVariable("idempotency.expiry_interval",
							"Time from one background removal of expired rows to the next.",
							"Counts from the beginning of one to the beginning of the next.",
							&expiry_interval,
							60, 1, 24 * 60 * 60,
							PGC_SUSET, GUC_UNIT_S,
							NULL, NULL, NULL);

	DefineCustomIntVariable("idempotency.expiry_batch_size",
							"Most rows that are removed in one transaction.",
							NULL,
							&expiry_batch_size,
							1000, 1, EXPIRY_MAX_BATCH_SIZE,
							PGC_SUSET, 0,
							NULL, NULL, NULL);

	DefineCustomIntVariable("idempotency.max_workers",
							"Most databases in which expired rows are removed at the same time.",
							"Each takes one of max_worker_processes, and the launcher takes one. 0 stops the removal.",
							&max_workers,
							2, 0, 64,
							PGC_SIGHUP, 0,
							NULL, NULL, NULL);

	DefineCustomIntVariable("idempotency.stripe_timeout",
							"How long a call to Stripe takes at most, with all its attempts.",
							"A call may be given a timeout of its own.",
							&stripe_timeout,
							30 * 1000, 100, 60 * 60 * 1000,
							PGC_USERSET, GUC_UNIT_MS,
							NULL, NULL, NULL);

	DefineCustomIntVariable("idempotency.stripe_max_retries",
							"How often a call to Stripe is attempted again.",
							"Each attempt sends the same request with the same key.",
							&stripe_max_retries,
							2, 0, 10,
							PGC_USERSET, 0,
							NULL, NULL, NULL);

	DefineCustomStringVariable("idempotency.stripe_api_base",
							   "Where Stripe's API is.",
							   "https with a host and a port if need be; http on a loopback address only.",
							   &stripe_api_base,
							   "https://api.stripe.com",
							   PGC_SUSET, 0,
							   check_stripe_api_base, NULL, NULL);

	DefineCustomStringVariable("idempotency.stripe_version",
							   "Version of Stripe's API that calls are made with.",
							   NULL,
							   &stripe_version,
							   "2026-10-28.endive",
							   PGC_USERSET, 0,
							   check_stripe_version, NULL, NULL);

	DefineCustomStringVariable("idempotency.stripe_allowed_paths",
							   "Paths of Stripe's API that may be called.",
							   "Entries separated by commas, each with a method before it if need be; * is one segment of a path, ** is any number, * alone is everything.",
							   &stripe_allowed_paths,
							   "*",
							   PGC_SUSET, 0,
							   check_stripe_allowed_paths, NULL, NULL);

	DefineCustomStringVariable("idempotency.stripe_api_key_file",
							   "File that holds the secret key of Stripe's API.",
							   "Read for each call. If empty, IDEMPOTENCY_STRIPE_API_KEY in the server's environment holds the key.",
							   &stripe_api_key_file,
							   "",
							   PGC_SUSET, GUC_SUPERUSER_ONLY,
							   NULL, NULL, NULL);

	DefineCustomStringVariable("idempotency.stripe_ca_file",
							   "File of the certificates that Stripe's is verified with.",
							   "If empty, the system's certificates.",
							   &stripe_ca_file,
							   "",
							   PGC_SUSET, 0,
							   NULL, NULL, NULL);

	DefineCustomBoolVariable("idempotency.stripe_key_in_metadata",
							 "Whether what stripe_call() creates carries its idempotency key in its metadata.",
							 "There it can be found, also by people, after Stripe has forgotten the key.",
							 &stripe_key_in_metadata,
							 false,
							 PGC_USERSET, 0,
							 NULL, NULL, NULL);

	DefineCustomEnumVariable("idempotency.stripe_log_level",
							 "Level of the line that is logged about each call to Stripe.",
							 "It tells what became of the call, and neither request nor answer.",
							 &stripe_log_level,
							 LOG, stripe_log_options,
							 PGC_SUSET, 0,
							 NULL, NULL, NULL);

	MarkGUCPrefixReserved("idempotency");
	settings_are_defined = true;
}

void
_PG_init(void)
{
	settings_guard_begin();
	define_settings();
	settings_guard_end();
	open_claims_init();

	/* pg_upgrade's server runs nothing of ours */
	if (process_shared_preload_libraries_in_progress && !IsBinaryUpgrade)
	{
		shmem_request_at_preload();
		drop_database_init();
		notice_init();
		launcher_register();
	}
}
