/*-------------------------------------------------------------------------
 *
 * webhook_queue.h
 *	  Which event stripe_webhook_next() hands out.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/events/webhook_queue.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_WEBHOOK_QUEUE_H
#define IDEMPOTENCY_WEBHOOK_QUEUE_H

#include "ledger/ledger.h"

extern bool webhook_queue_next(Relation rel, text *consumer, TimestampTz now, LedgerRow *row);

#endif							/* IDEMPOTENCY_WEBHOOK_QUEUE_H */
