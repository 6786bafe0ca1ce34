/*-------------------------------------------------------------------------
 *
 * webhook_signature.h
 *	  The signature of a webhook of Stripe's.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/stripe/webhook_signature.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_WEBHOOK_SIGNATURE_H
#define IDEMPOTENCY_WEBHOOK_SIGNATURE_H

/* Limits of a header; Stripe sends about 200 bytes. */
#define WEBHOOK_HEADER_MAX		4096
#define WEBHOOK_SIGNATURES_MAX	32

/* A signature of scheme v1: HMAC-SHA256 in lower-case hexadecimal. */
#define WEBHOOK_SIGNATURE_LEN	64

/* Digits of a time: up to 18 fit an int64. */
#define WEBHOOK_TIME_MAX_DIGITS	18

typedef enum WebhookVerdict
{
	WEBHOOK_VALID,
	WEBHOOK_NO_SIGNATURE,		/* no header, or none of scheme v1 in it */
	WEBHOOK_MALFORMED_HEADER,
	WEBHOOK_NO_MATCHING_SIGNATURE,
	WEBHOOK_TOO_OLD,
	WEBHOOK_NO_SECRET
} WebhookVerdict;

/* A header, taken apart; pointers into it. */
typedef struct WebhookHeader
{
	int64		time;			/* seconds since 1970 */
	const char *time_text;		/* its digits, which are what is signed */
	int			time_len;
	int			nsignatures;	/* well-formed v1s; others cannot match */
	const char *signatures[WEBHOOK_SIGNATURES_MAX]; /* WEBHOOK_SIGNATURE_LEN
													 * bytes each */
} WebhookHeader;

typedef struct WebhookSecret
{
	const char *data;
	size_t		len;			/* at least 1 */
} WebhookSecret;

extern WebhookVerdict webhook_parse_header(const char *header, size_t len,
										   WebhookHeader *parsed);
extern WebhookVerdict webhook_verify(const char *payload, size_t payloadlen,
									 const char *header, size_t headerlen,
									 const WebhookSecret *secrets, int nsecrets,
									 int64 now, int64 tolerance_usecs);
extern const char *webhook_verdict_word(WebhookVerdict verdict);

#endif							/* IDEMPOTENCY_WEBHOOK_SIGNATURE_H */
