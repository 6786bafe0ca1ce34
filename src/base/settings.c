/*-------------------------------------------------------------------------
 *
 * settings.c
 *	  The idempotency.* settings: their variables, ranges and defaults.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/settings.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <limits.h>

#include "access/parallel.h"
#include "utils/guc.h"
#include "utils/varlena.h"

#include "base/secret_file.h"
#include "base/settings.h"

#define ONE_DAY (24 * 60 * 60)

/* Requests that an API receives */
int			setting_key_ttl = ONE_DAY;
int			setting_wait_timeout = 10 * 1000;
int			setting_max_response_size = 1024;
int			setting_open_claim_at_commit = OPEN_CLAIM_ERROR;
int			setting_abandoned_retention = 7 * ONE_DAY;

/* Removal of expired rows */
bool		setting_expiry = true;
int			setting_expiry_interval = 60;
int			setting_expiry_batch_size = 1000;
int			setting_max_workers = 2;

/* The ledger of calls to Stripe */
int			setting_stripe_ledger = STRIPE_LEDGER_RECORDER;
int			setting_stripe_lease = 5 * 60;
int			setting_stripe_record_timeout = 2 * 1000;
int			setting_stripe_resend_margin = 60 * 60;
char	   *setting_stripe_compare_ignore = NULL;
int			setting_stripe_body_retention = 30 * ONE_DAY;
int			setting_stripe_retention = -1;

/* Calls that the server sends to Stripe */
char	   *setting_stripe_api_base = NULL;
char	   *setting_stripe_version = NULL;
char	   *setting_stripe_allowed_paths = NULL;
char	   *setting_stripe_api_key_file = NULL;
char	   *setting_stripe_ca_file = NULL;
int			setting_stripe_timeout = 30 * 1000;
int			setting_stripe_max_retries = 2;
bool		setting_stripe_key_in_metadata = false;
int			setting_stripe_log_level = LOG;

/* Events that Stripe sends */
char	   *setting_webhook_secret_file = NULL;
int			setting_webhook_tolerance = 300;
int			setting_webhook_livemode = WEBHOOK_LIVEMODE_ANY;
int			setting_webhook_payload = WEBHOOK_PAYLOAD_ALL;
int			setting_webhook_retention = 35 * ONE_DAY;
int			setting_webhook_max_attempts = 20;
bool		setting_webhook_notify = true;

static bool settings_are_defined = false;
static StripeSettingRules stripe_rules;

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
 * Where calls to Stripe go, and which are allowed.
 *
 * A session may set anything before the library is loaded.  If an invalid value
 * were refused at that point, the default would take its place, and that allows
 * all of Stripe.  So the invalid value is kept, and refused when it is used.  A
 * parallel worker is given its leader's value, whatever that is.
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
	return check_stripe_setting(stripe_rules.api_base_problem(*newval));
}

static bool
check_stripe_version(char **newval, void **extra, GucSource source)
{
	return check_stripe_setting(stripe_rules.version_problem(*newval));
}

static bool
check_stripe_allowed_paths(char **newval, void **extra, GucSource source)
{
	return check_stripe_setting(stripe_rules.allowed_paths_problem(*newval));
}

/*
 * Stripe itself keeps a key for a day, and no row must be removed before that.
 */
static bool
check_stripe_retention(int *newval, void **extra, GucSource source)
{
	if (*newval != -1 && *newval < ONE_DAY)
	{
		GUC_check_errdetail("It must be at least one day, or -1, which keeps the rows forever.");
		return false;
	}
	return true;
}

/* Without any attempt nothing would ever leave the queue. */
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

/* Requests that an API receives */
static void
define_request_settings(void)
{
	DefineCustomIntVariable("idempotency.key_ttl",
							"Sets how long a recorded result is replayed.",
							"The time counts from record(), which may be given a time to live of its own.",
							&setting_key_ttl,
							ONE_DAY, 1, INT_MAX,
							PGC_USERSET, GUC_UNIT_S,
							NULL, NULL, NULL);

	DefineCustomIntVariable("idempotency.wait_timeout",
							"Sets how long a claim waits for another transaction that holds the key.",
							"After that it answers in_progress. 0 does not wait, -1 waits without limit.",
							&setting_wait_timeout,
							10 * 1000, -1, INT_MAX,
							PGC_USERSET, GUC_UNIT_MS,
							NULL, NULL, NULL);

	DefineCustomIntVariable("idempotency.max_response_size",
							"Sets the maximum size of a response that is recorded.",
							"Counts body, headers and jsonb together.",
							&setting_max_response_size,
							1024, 1, 512 * 1024,
							PGC_SUSET, GUC_UNIT_KB,
							NULL, NULL, NULL);

	DefineCustomEnumVariable("idempotency.open_claim_at_commit",
							 "Sets what COMMIT does about a claim without a lease that is neither recorded nor released.",
							 "With warning and allow the claim counts as lapsed at once.",
							 &setting_open_claim_at_commit,
							 OPEN_CLAIM_ERROR, open_claim_options,
							 PGC_USERSET, 0,
							 NULL, NULL, NULL);

	DefineCustomIntVariable("idempotency.abandoned_retention",
							"Sets how long an unfinished key is kept after its lease has lapsed.",
							"A key with a recovery point is kept forever.",
							&setting_abandoned_retention,
							7 * ONE_DAY, 1, INT_MAX,
							PGC_SUSET, GUC_UNIT_S,
							NULL, NULL, NULL);
}

/* Removal of expired rows */
static void
define_expiry_settings(void)
{
	DefineCustomBoolVariable("idempotency.expiry",
							 "Removes expired rows in the background.",
							 "Turn it off where the rows come from elsewhere, as on a logical replication subscriber.",
							 &setting_expiry,
							 true,
							 PGC_SUSET, 0,
							 NULL, NULL, NULL);

	DefineCustomIntVariable("idempotency.expiry_interval",
							"Sets the time from one background removal of expired rows to the next.",
							"The time counts from the start of one to the start of the next.",
							&setting_expiry_interval,
							60, 1, ONE_DAY,
							PGC_SUSET, GUC_UNIT_S,
							NULL, NULL, NULL);

	DefineCustomIntVariable("idempotency.expiry_batch_size",
							"Sets the maximum number of rows that are removed in one transaction.",
							NULL,
							&setting_expiry_batch_size,
							1000, 1, EXPIRY_MAX_BATCH_SIZE,
							PGC_SUSET, 0,
							NULL, NULL, NULL);

	DefineCustomIntVariable("idempotency.max_workers",
							"Sets the maximum number of databases in which expired rows are removed at the same time.",
							"Each takes one of max_worker_processes, and the launcher takes one. 0 stops the removal.",
							&setting_max_workers,
							2, 0, 64,
							PGC_SIGHUP, 0,
							NULL, NULL, NULL);
}

/* The ledger of calls to Stripe */
static void
define_call_settings(void)
{
	DefineCustomEnumVariable("idempotency.stripe_ledger",
							 "Sets who commits what is sent to Stripe.",
							 "recorder: on its own, before anything is sent; transaction: with the caller's transaction, where the derived key alone protects a call that was rolled back.",
							 &setting_stripe_ledger,
							 STRIPE_LEDGER_RECORDER, stripe_ledger_options,
							 PGC_USERSET, 0,
							 NULL, NULL, NULL);

	DefineCustomIntVariable("idempotency.stripe_lease",
							"Sets how long a claimed Stripe operation is held for its claimant.",
							"stripe_claim() may be given a lease of its own.",
							&setting_stripe_lease,
							5 * 60, 1, INT_MAX,
							PGC_USERSET, GUC_UNIT_S,
							NULL, NULL, NULL);

	DefineCustomIntVariable("idempotency.stripe_record_timeout",
							"Sets how long a caller waits for the recorder of Stripe operations.",
							"Before anything is sent it fails after that; afterwards it goes on with a warning, and so does the recorder.",
							&setting_stripe_record_timeout,
							2 * 1000, 10, INT_MAX,
							PGC_USERSET, GUC_UNIT_MS,
							NULL, NULL, NULL);

	DefineCustomIntVariable("idempotency.stripe_resend_margin",
							"Sets how long before Stripe may forget a key it is no longer sent again.",
							"Stripe keeps keys for at least 24 hours after it has first seen them.",
							&setting_stripe_resend_margin,
							60 * 60, 60, ONE_DAY,
							PGC_SUSET, GUC_UNIT_S,
							NULL, NULL, NULL);

	DefineCustomStringVariable("idempotency.stripe_compare_ignore",
							   "Lists parameters that may differ between two attempts of a Stripe operation.",
							   "Names separated by commas.",
							   &setting_stripe_compare_ignore,
							   "metadata, description, expand",
							   PGC_SUSET, GUC_LIST_INPUT,
							   check_stripe_compare_ignore, NULL, NULL);

	DefineCustomIntVariable("idempotency.stripe_body_retention",
							"Sets how long request and response of a settled Stripe operation are kept.",
							"After that the row keeps what the operation was and what came of it. -1 keeps all of it forever.",
							&setting_stripe_body_retention,
							30 * ONE_DAY, -1, INT_MAX,
							PGC_SUSET, GUC_UNIT_S,
							NULL, NULL, NULL);

	DefineCustomIntVariable("idempotency.stripe_retention",
							"Sets how long the row of a settled Stripe operation is kept.",
							"Stripe forgets a key after a day: an operation that is repeated when its row is gone is executed again. -1 keeps the rows forever.",
							&setting_stripe_retention,
							-1, -1, INT_MAX,
							PGC_SUSET, GUC_UNIT_S,
							check_stripe_retention, NULL, NULL);
}

/* Calls that the server sends to Stripe */
static void
define_sending_settings(void)
{
	DefineCustomStringVariable("idempotency.stripe_api_base",
							   "Sets the address of Stripe's API.",
							   "It is https with a host and, if need be, a port; http is accepted for a loopback address only.",
							   &setting_stripe_api_base,
							   "https://api.stripe.com",
							   PGC_SUSET, 0,
							   check_stripe_api_base, NULL, NULL);

	DefineCustomStringVariable("idempotency.stripe_version",
							   "Sets the version of Stripe's API that calls are made with.",
							   NULL,
							   &setting_stripe_version,
							   "2026-10-28.endive",
							   PGC_USERSET, 0,
							   check_stripe_version, NULL, NULL);

	DefineCustomStringVariable("idempotency.stripe_allowed_paths",
							   "Lists the paths of Stripe's API that may be called.",
							   "Entries are separated by commas; a method may precede each. * is one segment of a path, ** any number, and * alone everything.",
							   &setting_stripe_allowed_paths,
							   "*",
							   PGC_SUSET, 0,
							   check_stripe_allowed_paths, NULL, NULL);

	DefineCustomStringVariable("idempotency.stripe_api_key_file",
							   "Sets the file that holds the secret key of Stripe's API.",
							   "It is read for each call. If it is empty, IDEMPOTENCY_STRIPE_API_KEY in the server's environment holds the key.",
							   &setting_stripe_api_key_file,
							   "",
							   PGC_SUSET, GUC_SUPERUSER_ONLY,
							   NULL, NULL, NULL);

	DefineCustomStringVariable("idempotency.stripe_ca_file",
							   "Sets the file of certificate authorities that Stripe's certificate is verified with.",
							   "If it is empty, those of the system are used.",
							   &setting_stripe_ca_file,
							   "",
							   PGC_SUSET, 0,
							   NULL, NULL, NULL);

	DefineCustomIntVariable("idempotency.stripe_timeout",
							"Sets the maximum duration of a call to Stripe, with all its attempts.",
							"A call may be given a timeout of its own.",
							&setting_stripe_timeout,
							30 * 1000, 100, 60 * 60 * 1000,
							PGC_USERSET, GUC_UNIT_MS,
							NULL, NULL, NULL);

	DefineCustomIntVariable("idempotency.stripe_max_retries",
							"Sets how often a call to Stripe is attempted again.",
							"Each attempt sends the same request with the same key.",
							&setting_stripe_max_retries,
							2, 0, 10,
							PGC_USERSET, 0,
							NULL, NULL, NULL);

	DefineCustomBoolVariable("idempotency.stripe_key_in_metadata",
							 "Puts the idempotency key into the metadata of what stripe_call() creates.",
							 "There it can be found, also by people, after Stripe has forgotten the key.",
							 &setting_stripe_key_in_metadata,
							 false,
							 PGC_USERSET, 0,
							 NULL, NULL, NULL);

	DefineCustomEnumVariable("idempotency.stripe_log_level",
							 "Sets the level of the line that is logged about each call to Stripe.",
							 "The line tells what became of the call, and neither request nor answer.",
							 &setting_stripe_log_level,
							 LOG, stripe_log_options,
							 PGC_SUSET, 0,
							 NULL, NULL, NULL);
}

/* Events that Stripe sends */
static void
define_webhook_settings(void)
{
	DefineCustomStringVariable("idempotency.webhook_secret_file",
							   "Sets the file that holds the signing secrets of webhook endpoints.",
							   "One secret a line. If it is empty, the postmaster's environment variable IDEMPOTENCY_WEBHOOK_SECRET holds them.",
							   &setting_webhook_secret_file,
							   "",
							   PGC_SUSET, 0,
							   secret_file_check_setting, NULL, NULL);

	DefineCustomIntVariable("idempotency.webhook_tolerance",
							"Sets the maximum age of a webhook's signature.",
							"An age of exactly this is accepted, and so is a time in the future.",
							&setting_webhook_tolerance,
							300, 1, INT_MAX,
							PGC_USERSET, GUC_UNIT_S,
							NULL, NULL, NULL);

	DefineCustomEnumVariable("idempotency.webhook_livemode",
							 "Sets which of Stripe's modes events must come from.",
							 "Events of the other mode are refused.",
							 &setting_webhook_livemode,
							 WEBHOOK_LIVEMODE_ANY, webhook_livemode_options,
							 PGC_SUSET, 0,
							 NULL, NULL, NULL);

	DefineCustomEnumVariable("idempotency.webhook_payload",
							 "Sets what is kept of an event's body.",
							 "all: its bytes and a jsonb; jsonb: that alone; none: a jsonb until it is processed, and nothing afterwards.",
							 &setting_webhook_payload,
							 WEBHOOK_PAYLOAD_ALL, webhook_payload_options,
							 PGC_SUSET, 0,
							 NULL, NULL, NULL);

	DefineCustomIntVariable("idempotency.webhook_retention",
							"Sets how long a processed event is kept.",
							"The time counts from its receipt; Stripe can send an event again for 30 days. -1 keeps it forever.",
							&setting_webhook_retention,
							35 * ONE_DAY, -1, INT_MAX,
							PGC_SUSET, GUC_UNIT_S,
							NULL, NULL, NULL);

	DefineCustomIntVariable("idempotency.webhook_max_attempts",
							"Sets how often an event is tried before it is no longer handed out.",
							"Each failure counts, and each claim that has lapsed. -1 has no limit.",
							&setting_webhook_max_attempts,
							20, -1, INT_MAX,
							PGC_SUSET, 0,
							check_webhook_max_attempts, NULL, NULL);

	DefineCustomBoolVariable("idempotency.webhook_notify",
							 "Sends NOTIFY idempotency_event when an event is received.",
							 "PostgreSQL lets transactions that notify commit one after the other.",
							 &setting_webhook_notify,
							 true,
							 PGC_USERSET, 0,
							 NULL, NULL, NULL);
}

/*
 * Define all settings.  "rules" checks the values of those that only a layer
 * above this one understands.
 */
void
settings_define(const StripeSettingRules *rules)
{
	stripe_rules = *rules;
	define_request_settings();
	define_expiry_settings();
	define_call_settings();
	define_sending_settings();
	define_webhook_settings();
	MarkGUCPrefixReserved("idempotency");
	settings_are_defined = true;
}
