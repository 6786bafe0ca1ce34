/*-------------------------------------------------------------------------
 *
 * settings.h
 *	  Values of the idempotency.* settings; idempotency.c defines them with
 *	  their ranges and defaults.
 *
 * src/base/settings.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_SETTINGS_H
#define IDEMPOTENCY_SETTINGS_H

#include "postgres.h"

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

extern int	key_ttl;			/* seconds */
extern int	stripe_lease;		/* seconds */
extern int	wait_timeout;		/* milliseconds; 0 doesn't wait, -1 has no
								 * limit */
extern int	stripe_resend_margin;	/* seconds */
extern int	max_response_size;	/* kilobytes */
extern int	open_claim_at_commit;	/* OpenClaimAction */
extern int	stripe_ledger;		/* StripeLedgerMode */
extern int	stripe_record_timeout;	/* milliseconds */
extern char *stripe_compare_ignore; /* comma-separated list */
extern int	webhook_tolerance;	/* seconds */
extern int	webhook_retention;	/* seconds; -1 keeps for ever */
extern bool webhook_notify;
extern int	webhook_max_attempts;	/* -1: without limit */
extern int	webhook_payload;	/* WebhookPayload */
extern int	webhook_livemode;	/* WebhookLivemode */
extern char *webhook_secret_file;	/* "" where it isn't set */
extern int	stripe_timeout;		/* milliseconds, of a whole call */
extern int	stripe_max_retries;
extern bool stripe_key_in_metadata;
extern int	stripe_log_level;	/* elevel, or STRIPE_LOG_OFF */
extern char *stripe_api_base;
extern char *stripe_version;
extern char *stripe_allowed_paths;	/* as api_path.c says */
extern char *stripe_api_key_file;	/* empty: the postmaster's environment */
extern char *stripe_ca_file;	/* empty: the system's */
extern int	abandoned_retention;	/* seconds */
extern int	stripe_body_retention;	/* seconds; -1: for ever */
extern int	stripe_retention;	/* seconds; -1: for ever */
extern bool expiry;
extern int	expiry_interval;	/* seconds */
extern int	expiry_batch_size;	/* rows */
extern int	max_workers;

#define EXPIRY_MAX_BATCH_SIZE 100000

#endif							/* IDEMPOTENCY_SETTINGS_H */
