/*-------------------------------------------------------------------------
 *
 * stripe_record.h
 *	  What the holder of a claim may do: record, release, extend; and reopening.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/calls/stripe_record.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_STRIPE_RECORD_H
#define IDEMPOTENCY_STRIPE_RECORD_H

#include "calls/stripe_ledger.h"

extern StripeOutcome stripe_record_run(Relation rel, Operation *op, int64 token,
									   const CallResult *result, bool adopt);
extern bool stripe_release_run(Relation rel, Operation *op, int64 token);
extern TimestampTz stripe_extend_run(Relation rel, Operation *op, int64 token, int64 lease,
									 TimestampTz now);
extern char *stripe_reopen_run(Relation rel, Operation *op, bool force, int from_generation,
							   const char *user);
extern void stripe_explain_refusal(Relation rel, Operation *op, int64 token);
extern void stripe_read_answer_of(Relation rel, Operation *op, int64 token, Jsonb *response,
								  int http_status, const char *resource_id,
								  CallResult *result);

#endif							/* IDEMPOTENCY_STRIPE_RECORD_H */
