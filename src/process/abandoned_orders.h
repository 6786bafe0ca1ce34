/*-------------------------------------------------------------------------
 *
 * abandoned_orders.h
 *	  Orders that nobody waits for, in databases without a recorder.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/process/abandoned_orders.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_ABANDONED_ORDERS_H
#define IDEMPOTENCY_ABANDONED_ORDERS_H

extern long see_to_left_orders(void);

#endif							/* IDEMPOTENCY_ABANDONED_ORDERS_H */
