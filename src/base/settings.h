/*-------------------------------------------------------------------------
 *
 * settings.h
 *	  The idempotency.* settings: settings.c defines their ranges and defaults.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/settings.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_SETTINGS_H
#define IDEMPOTENCY_SETTINGS_H

typedef enum OpenClaimAction
{
	OPEN_CLAIM_ALLOW,
	OPEN_CLAIM_WARNING,
	OPEN_CLAIM_ERROR
} OpenClaimAction;

typedef enum StripeLedgerMode
{
	STRIPE_LEDGER_RECORDER,
	STRIPE_LEDGER_TRANSACTION
} StripeLedgerMode;

/* What is kept of an event's body. */
typedef enum WebhookPayload
{
	WEBHOOK_PAYLOAD_ALL,		/* its bytes and a jsonb */
	WEBHOOK_PAYLOAD_JSONB,
	WEBHOOK_PAYLOAD_NONE		/* a jsonb until it is processed */
} WebhookPayload;

typedef enum WebhookLivemode
{
	WEBHOOK_LIVEMODE_ANY,
	WEBHOOK_LIVEMODE_LIVE,
	WEBHOOK_LIVEMODE_TEST
} WebhookLivemode;

#define STRIPE_LOG_OFF 0

#define EXPIRY_MAX_BATCH_SIZE 100000

/* What is wrong with a value, untranslated, or NULL */
typedef const char *(*SettingProblem) (const char *value);

typedef struct StripeSettingRules
{
	SettingProblem api_base_problem;
	SettingProblem version_problem;
	SettingProblem allowed_paths_problem;
} StripeSettingRules;

/* requests that an API receives */
extern int	setting_key_ttl;	/* seconds */
extern int	setting_wait_timeout;	/* milliseconds; 0: do not wait, -1: no
									 * limit */
extern int	setting_max_response_size;	/* kilobytes */
extern int	setting_open_claim_at_commit;	/* OpenClaimAction */
extern int	setting_abandoned_retention;	/* seconds */

/* removal of expired rows */
extern bool setting_expiry;
extern int	setting_expiry_interval;	/* seconds */
extern int	setting_expiry_batch_size;	/* rows */
extern int	setting_max_workers;

/* the ledger of calls to Stripe */
extern int	setting_stripe_ledger;	/* StripeLedgerMode */
extern int	setting_stripe_lease;	/* seconds */
extern int	setting_stripe_record_timeout;	/* milliseconds */
extern int	setting_stripe_resend_margin;	/* seconds */
extern char *setting_stripe_compare_ignore; /* comma-separated list */
extern int	setting_stripe_body_retention;	/* seconds; -1: forever */
extern int	setting_stripe_retention;	/* seconds; -1: forever */

/* calls that the server sends to Stripe */
extern char *setting_stripe_api_base;
extern char *setting_stripe_version;
extern char *setting_stripe_allowed_paths;	/* see api_path.c */
extern char *setting_stripe_api_key_file;	/* "": the postmaster's environment */
extern char *setting_stripe_ca_file;	/* "": the system's */
extern int	setting_stripe_timeout; /* milliseconds, of a whole call */
extern int	setting_stripe_max_retries;
extern bool setting_stripe_key_in_metadata;
extern int	setting_stripe_log_level;	/* elevel, or STRIPE_LOG_OFF */

/* events that Stripe sends */
extern char *setting_webhook_secret_file;	/* "": the postmaster's environment */
extern int	setting_webhook_tolerance;	/* seconds */
extern int	setting_webhook_livemode;	/* WebhookLivemode */
extern int	setting_webhook_payload;	/* WebhookPayload */
extern int	setting_webhook_retention;	/* seconds; -1: forever */
extern int	setting_webhook_max_attempts;	/* -1: no limit */
extern bool setting_webhook_notify;

extern void settings_define(const StripeSettingRules *rules);

#endif							/* IDEMPOTENCY_SETTINGS_H */
