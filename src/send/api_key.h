/*-------------------------------------------------------------------------
 *
 * api_key.h
 *	  The secret API key of the Stripe account.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/send/api_key.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_API_KEY_H
#define IDEMPOTENCY_API_KEY_H

#define API_KEY_MAX 512

typedef struct ApiKey
{
	char		secret[API_KEY_MAX + 1];
	bool		live;			/* real money */
	bool		organization;	/* of an organization: needs Stripe-Context */
} ApiKey;

extern void api_key_read(ApiKey *key);
extern void api_key_wipe(ApiKey *key);

#endif							/* IDEMPOTENCY_API_KEY_H */
