/*-------------------------------------------------------------------------
 *
 * http_client.h
 *	  The way to idempotency_stripe.so.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/send/http_client.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_HTTP_CLIENT_H
#define IDEMPOTENCY_HTTP_CLIENT_H

#include "send/http.h"

extern const HttpClient *http_client(void);

#endif							/* IDEMPOTENCY_HTTP_CLIENT_H */
