/*-------------------------------------------------------------------------
 *
 * recorder_message.h
 *	  Arguments of an order, on their way to the recorder.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/process/recorder_message.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_RECORDER_MESSAGE_H
#define IDEMPOTENCY_RECORDER_MESSAGE_H

#include "calls/stripe_claim.h"

/* Arguments on their way, varlena ones not toasted. */
#define ORDER_MAX_ARGUMENTS 12

typedef struct OrderArguments
{
	int			n;
	Datum		values[ORDER_MAX_ARGUMENTS];
	bool		isnull[ORDER_MAX_ARGUMENTS];
	bool		byval[ORDER_MAX_ARGUMENTS];
} OrderArguments;

extern Size arguments_size(const OrderArguments *arguments);
extern void arguments_write(const OrderArguments *arguments, char *to);

extern void pack_claim(OrderArguments *arguments, const StripeClaim *claim);
extern void unpack_claim(char *from, StripeClaim *claim);
extern void pack_reopen(OrderArguments *arguments, bool force, int from_generation,
						const char *user);
extern void unpack_reopen(char *from, bool *force, int *from_generation, char **user);
extern void pack_result(OrderArguments *arguments, const CallResult *result);
extern void unpack_result(char *from, CallResult *result);

#endif							/* IDEMPOTENCY_RECORDER_MESSAGE_H */
