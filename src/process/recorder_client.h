/*-------------------------------------------------------------------------
 *
 * recorder_client.h
 *	  Bookkeeping of calls to Stripe that doesn't depend on the caller's
 *	  transaction.
 *
 * The order of things for whoever sends by itself (stripe_call()):
 *
 *	recorder_claim()	may the call be sent, or what is known of it?
 *						Returns with key, bytes and first_sent_at committed.
 *						Only where it answers STRIPE_CLAIMED go on:
 *	recorder_sending()	immediately before the first byte leaves
 *	recorder_record()	what came back, once for all attempts of this call
 *
 * An error in between is taken care of: when the (sub)transaction that claimed
 * is aborted, or the backend dies, the recorder is told that the call was given
 * up, before or after it was sent according to recorder_sending().  Whoever
 * catches errors by itself says so with recorder_gave_up().
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/process/recorder_client.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_RECORDER_CLIENT_H
#define IDEMPOTENCY_RECORDER_CLIENT_H

#include "utils/timestamp.h"

#include "calls/stripe_claim.h"
#include "stripe/call_data.h"

/*
 * A call that somebody wants to send.
 */
typedef struct StripeCall
{
	Operation  *op;
	Jsonb	   *request;		/* what is compared and shown: method, path,
								 * params */
	CallRequest send;
	bool		resend;			/* stripe_retry(): send what is stored, never
								 * something new; request and send are not
								 * looked at, but for the mode */
	Size		answer_room;	/* reserved before the send: response and
								 * error together, as jsonb, at most */

	/*
	 * Called before anything is written, and so only where the call is going
	 * to be sent: sets path, body and livemode of "send".  May raise errors;
	 * NULL where there is nothing left to be set.
	 */
	void		(*prepare) (void *arg);
	void	   *prepare_arg;
} StripeCall;

/*
 * What is known of the operation.  With STRIPE_CLAIMED the call is the
 * caller's to send: "send", with the key, which are those of the first
 * attempt.  All in the current memory context; NULL (or 0) where there is none.
 */
typedef struct StripeCallClaim
{
	StripeVerdict verdict;
	char	   *idempotency_key;	/* NULL only with STRIPE_BUSY, where
									 * another transaction has just claimed it */
	int			attempt;
	int			generation;
	bool		uncertain;		/* may an earlier attempt of this generation
								 * have been executed? */
	Jsonb	   *request;
	CallRequest send;			/* without a method where only stripe_claim()
								 * has claimed it */
	TimestampTz resend_until;	/* 0: never sent */
	bool		sent_before;	/* may a claim before this one have been sent? */
	int			retry_after;	/* seconds, with STRIPE_BUSY */
	CallResult	result;			/* what is recorded */
} StripeCallClaim;

/*
 * Claim a call.
 *
 * Raises IK003 (with resend) for an operation that was never claimed, IK002
 * where the row is of the other mode than livemode, IK006 where the caller's
 * own transaction holds the row or, without a recorder, has no way to commit
 * it, IK008 where no recorder is to be had, IK009, 55P03 where the ledger is
 * locked, 53100 or 53200 where there is no room for the answer.  Nothing may
 * be sent after any of them.
 */
extern PGDLLEXPORT void recorder_claim(const StripeCall *call, StripeCallClaim *claim);

/*
 * What is recorded of the operation that recorder_record() was called for last,
 * with the verdict replay.  Returns false where its row isn't there.
 */
extern PGDLLEXPORT bool recorder_look(StripeCallClaim *known);

/* The first byte is about to leave. */
extern PGDLLEXPORT void recorder_sending(void);

/*
 * Record what came of the claimed call.
 *
 * Returns the operation's outcome: that of the
 * result, but STRIPE_UNKNOWN where the result says not executed and an earlier
 * attempt may have been, and what is recorded where somebody else was faster
 * to record something definitive.  Waits for its commit for
 * idempotency.stripe_record_timeout; after that it warns, and the recorder
 * goes on trying.  Raises nothing but what interrupts the wait (cancel,
 * termination), and then the recorder goes on, too.
 */
extern PGDLLEXPORT StripeOutcome recorder_record(const CallResult *result);

/* The claimed call ends without a result.  Doesn't wait, raises nothing. */
extern PGDLLEXPORT void recorder_gave_up(void);

/* ---------- for the core's own functions ---------- */

/* Is there shared memory, so that a recorder can run at all? */
extern PGDLLEXPORT bool recorder_can_run(void);

extern void recorder_run_claim(StripeClaim *claim);
extern char *recorder_run_reopen(Operation *op, bool force, int from_generation,
								 const char *user);

#endif							/* IDEMPOTENCY_RECORDER_CLIENT_H */
