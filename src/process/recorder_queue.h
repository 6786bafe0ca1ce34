/*-------------------------------------------------------------------------
 *
 * recorder_queue.h
 *	  What callers and recorders share: orders, and who works on them.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/process/recorder_queue.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_RECORDER_QUEUE_H
#define IDEMPOTENCY_RECORDER_QUEUE_H

#include "access/transam.h"
#include "storage/dsm.h"
#include "storage/lwlock.h"
#include "utils/timestamp.h"

#include "ledger/derived_key.h"
#include "stripe/stripe_outcome.h"

#define ORDER_LABEL_LEN		256 /* account, stored key */
#define ORDER_MESSAGE_LEN	512

/* What a session that has called keeps of shared memory; longer ones go again. */
#define ORDER_SEGMENT_MIN	(16 * 1024)

/* Most orders in one commit: each is a subtransaction, and 64 are cached. */
#define ORDER_BATCH			60

typedef enum OrderVerb
{
	ORDER_CLAIM,
	ORDER_REOPEN,
	ORDER_ADOPT,				/* watch one more transaction */
	ORDER_SETTLE,				/* by an event, if one tells what came of it */
	ORDER_RECORD,
	ORDER_GAVE_UP,				/* after something may have been sent */
	ORDER_RELEASE				/* before */
} OrderVerb;

typedef enum OrderState
{
	ORDER_FREE,
	ORDER_OWNED,				/* by a backend that has nothing to do now */
	ORDER_POSTED,				/* waits for the recorder */
	ORDER_TAKEN,				/* the recorder is at it */
	ORDER_DONE					/* its answer is committed */
} OrderState;

typedef enum OrderAnswer
{
	ORDER_OK,
	ORDER_REFUSED,				/* claim: look again; others: not there any
								 * more */
	ORDER_LOCKED,				/* another transaction holds the row */
	ORDER_ERROR
} OrderAnswer;

/*
 * One order.  "state", "detached" and what posting sets are changed under the
 * queue's lock; the answer is written by the recorder while the order is
 * TAKEN, and read when it is DONE.
 */
typedef struct Order
{
	OrderState	state;
	OrderVerb	verb;
	bool		detached;		/* nobody waits: freed when done, and what was
								 * claimed is released */
	bool		alone;			/* has failed in company */
	bool		committed;		/* done, but for the wait for a standby, which
								 * was cut short, or for its full lease */
	int			failures;		/* tries in vain */
	int			refusals;		/* those in which the row refused */
	TimestampTz failed_at;		/* when it was last tried in vain */
	int			pause_ms;		/* how long not to try it again */
	int			tries;			/* how often a recorder has taken it */
	uint64		number;			/* in order of posting */
	Oid			database;
	int			procno;			/* of the owner, while not detached */

	/* the operation, so that giving up needs no further memory */
	char		account[ORDER_LABEL_LEN];
	char		type[STRIPE_OPERATION_MAX + 1];
	char		id[STRIPE_OPERATION_MAX + 1];
	int64		token;			/* set by a claim */
	int64		lease;			/* that a claim was given, or 0; microseconds */
	TimestampTz leased_until;
	FullTransactionId caller_xid;

	/* arguments, as datumSerialize() leaves them */
	dsm_handle	segment;		/* pinned; DSM_HANDLE_INVALID before the first */

	/* the answer */
	OrderAnswer answer;
	char		key[ORDER_LABEL_LEN];	/* of a new generation */
	StripeOutcome outcome;		/* that stands */
	int			sqlstate;
	char		message[ORDER_MESSAGE_LEN];
	char		detail[ORDER_MESSAGE_LEN];
	char		hint[ORDER_MESSAGE_LEN];
} Order;

/* The recorder of one database. */
typedef struct RecorderSlot
{
	Oid			database;		/* InvalidOid: free */
	int			procno;			/* -1: doesn't run (yet) */
	TransactionId xid;			/* of the batch in progress */
	TimestampTz started;		/* when it was last asked for */
	TimestampTz came;			/* when it began */
	TimestampTz used;			/* when it last had something to do */
	bool		make_room;		/* another database wants its place */
	bool		blocked;		/* the database is being dropped: leave, and
								 * let nobody in */
} RecorderSlot;

/* Databases that wait in line; where there are more, the rest waits for that. */
#define RECORDER_WANTS 64

/* A database whose recorder finds no place. */
typedef struct RecorderWant
{
	Oid			database;		/* InvalidOid: free */
	uint64		number;			/* who came first is next */
	TimestampTz seen;			/* when somebody last asked for it */
	TimestampTz asked;			/* when another one was last asked to make room */
	int			procno;			/* who asked last */
} RecorderWant;

typedef struct RecorderQueue
{
	int			norders;
	int			nslots;
	uint64		last_number;
	uint64		last_want;
	RecorderWant wants[RECORDER_WANTS];
	RecorderSlot slots[FLEXIBLE_ARRAY_MEMBER];
	/* then the orders */
} RecorderQueue;

extern LWLock *recorder_queue_lock;

extern Size recorder_queue_size(void);
extern void recorder_queue_init(void *area);
extern void recorder_queue_attach(void *area, LWLockPadded *locks);
extern bool recorder_queue_is_there(void);

extern int	recorder_queue_norders(void);
extern Order *recorder_queue_order(int i);
extern Order *recorder_queue_new_order(void);
extern void recorder_queue_free_order(Order *order);
extern void recorder_queue_post(Order *order, OrderVerb verb);
extern RecorderSlot *recorder_queue_slot(Oid database, bool create);
extern void recorder_queue_wake(Oid database);
extern bool recorder_queue_is_next(Oid database);
extern void recorder_queue_ask_for_room(Oid database);
extern void recorder_queue_stop_wanting(Oid database, bool found);
extern bool recorder_queue_is_left(const Order *order);
extern bool recorder_queue_block(Oid database);
extern void recorder_queue_unblock(Oid database);

#endif							/* IDEMPOTENCY_RECORDER_QUEUE_H */
