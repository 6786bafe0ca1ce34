/*-------------------------------------------------------------------------
 *
 * left_orders.h
 *	  Orders that nobody waits for, in databases without a recorder.
 *
 * src/left_orders.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_LEFT_ORDERS_H
#define IDEMPOTENCY_LEFT_ORDERS_H

extern long see_to_left_orders(void);

#endif							/* IDEMPOTENCY_LEFT_ORDERS_H */
