/*-------------------------------------------------------------------------
 *
 * gateway.h
 *	  The way to idempotency_stripe.so.
 *
 * src/stripe/gateway.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_STRIPE_GATEWAY_H
#define IDEMPOTENCY_STRIPE_GATEWAY_H

#include "stripe/http.h"

extern const HttpClient *http_client(void);

#endif							/* IDEMPOTENCY_STRIPE_GATEWAY_H */
