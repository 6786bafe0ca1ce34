/*-------------------------------------------------------------------------
 *
 * requests.h
 *	  The ledger of requests received.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/ledger/requests.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_REQUESTS_H
#define IDEMPOTENCY_REQUESTS_H

#include "ledger/expiry.h"

extern Expiry request_expiry;

#endif							/* IDEMPOTENCY_REQUESTS_H */
