/*-------------------------------------------------------------------------
 *
 * stripe_claim.h
 *	  Claiming a call to Stripe.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/calls/stripe_claim.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_STRIPE_CLAIM_H
#define IDEMPOTENCY_STRIPE_CLAIM_H

#include "access/transam.h"
#include "utils/jsonb.h"

#include "calls/stripe_ledger.h"
#include "ledger/request_fingerprint.h"

/*
 * A claim.  What isn't given is NULL.
 */
typedef struct StripeClaim
{
	LedgerClaim base;
	Operation  *op;
	StripeRules rules;
	RequestPrint print;			/* of request */
	Jsonb	   *request;
	int64		lease;			/* microseconds; 0: held while its caller is
								 * there */

	/* of a call that the backend sends by itself */
	CallRequest send;
	bool		resend;			/* only what is stored */
	int64		caller_life;	/* 0: not such a call */
	const char *caller_vxid;

	/* the transaction to watch, invalid where it writes the row itself */
	FullTransactionId caller_xid;

	/* after stripe_claim_look(): it takes a write to answer */
	bool		wants_write;

	/* the answer */
	StripeVerdict verdict;
	StripeOutcome outcome;
	int			retry_after;
	int64		token;			/* 0 unless claimed */
	bool		known;			/* is row set? */
	LedgerRow	row;
} StripeClaim;

extern void stripe_claim_init(StripeClaim *claim);
extern void stripe_claim_run(StripeClaim *claim, Relation rel);
extern void stripe_claim_look(StripeClaim *claim, Relation rel);
extern void stripe_claim_fetch(StripeClaim *claim, Relation rel);
extern bool stripe_renew_run(Relation rel, Operation *op, int64 token, TimestampTz until);
extern void stripe_refuse_own_row(Relation rel, Operation *op);
extern void stripe_advise_reopen(StripeClaim *claim);

#endif							/* IDEMPOTENCY_STRIPE_CLAIM_H */
