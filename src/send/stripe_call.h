/*-------------------------------------------------------------------------
 *
 * stripe_call.h
 *	  What the functions that call Stripe have in common.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/send/stripe_call.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_STRIPE_CALL_H
#define IDEMPOTENCY_STRIPE_CALL_H

#include "ledger/derived_key.h"
#include "send/stripe_request.h"

extern void check_stripe_settings(void);
extern void log_stripe_call(const char *method, const char *path, const char *account,
							const char *operation, int generation,
							const char *idempotency_key, const StripeReply *reply,
							StripeOutcome outcome, bool live);

#endif							/* IDEMPOTENCY_STRIPE_CALL_H */
