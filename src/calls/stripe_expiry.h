/*-------------------------------------------------------------------------
 *
 * stripe_expiry.h
 *	  What the ledger of calls to Stripe no longer needs.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/calls/stripe_expiry.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_STRIPE_EXPIRY_H
#define IDEMPOTENCY_STRIPE_EXPIRY_H

#include "ledger/expiry.h"

extern Expiry stripe_body_expiry;
extern Expiry stripe_expiry;

#endif							/* IDEMPOTENCY_STRIPE_EXPIRY_H */
