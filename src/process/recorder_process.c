/*-------------------------------------------------------------------------
 *
 * recorder_process.c
 *	  Bookkeeping of calls to Stripe that doesn't depend on the caller's
 *	  transaction: the process that commits it.
 *
 * One recorder per database, started by the first caller that needs it, gone
 * after two idle seconds (DROP and RENAME DATABASE wait five), or as soon as it
 * is idle where another database wants its place.
 *
 * It takes what is posted, up to 60 orders, in one transaction: the commit is
 * what costs.  Each order is a subtransaction under a short lock_timeout, so
 * that one which meets somebody else's lock leaves the others alone.  The
 * transaction's id is assigned and published before anything that might wait:
 * callers wait for it (recorder_client.c), and so the deadlock detector sees through
 * this process.
 *
 * An order's answer counts once the transaction has committed, hence only then
 * is it DONE.  Where commits wait for a standby, the end of that wait is what
 * counts; a process that is terminated cuts it short.  Such orders are posted
 * again, as "committed", and are done when a later commit was waited for.  So is
 * a claim whose lease was running out while its commit took its time: it is
 * given its lease anew, and what its caller is told of is nearly all of it.
 *
 * If the commit itself fails, its orders are tried again one by one, so that
 * each gets its own error.  If this process is terminated, its orders are as if
 * they had never been taken, and the callers start another one.
 *
 * What must be recorded after a send is tried again until it succeeds, without
 * limit where it is a lock that is in the way.  It is given up where the ledger
 * refuses it for good, or where the database has been dropped; the row then
 * says that nobody knows.
 *
 * Between the orders it writes down what became of the transactions of the
 * calls it has recorded, while that is known (call_transactions.c).
 *
 * A database's settings are its owner's, and must not spoil any of this: they
 * are fixed right after connecting.  What makes a commit durable is looked at
 * again before each.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/process/recorder_process.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/transam.h"
#include "access/xact.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "replication/message.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/pmsignal.h"
#include "storage/proc.h"
#include "storage/procarray.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/wait_event.h"

#include "base/clock.h"
#include "base/compat.h"
#include "base/debug_point.h"
#include "base/errors.h"
#include "base/settings_guard.h"
#include "base/subtransaction.h"
#include "calls/stripe_claim.h"
#include "calls/stripe_fate.h"
#include "calls/stripe_record.h"
#include "events/kept_events.h"
#include "process/background_process.h"
#include "process/recorder_message.h"
#include "process/recorder_queue.h"
#include "process/worker_table.h"

PGDLLEXPORT void idempotency_recorder_main(Datum arg);

#define IDLE_EXIT_MS		2000

/*
 * How long an order waits for a lock, in milliseconds, and what is left of that
 * for notes, and for orders once so many in the batch have waited in vain: who
 * comes behind them mustn't pay for each row that somebody has locked.
 */
#define LOCK_TIMEOUT		100
#define LOCK_TIMEOUT_LEAST	1
#define PATIENT_ORDERS		2

/* Between two tries of an order: doubled each time, up to the second. */
#define RETRY_FIRST_MS		50
#define RETRY_LAST_MS		2000

/* Tries of an order whose row refuses it; what passes is waited for. */
#define MAX_REFUSALS		300

/*
 * After an error that came before any order was taken, and how often the same
 * error is logged.
 */
#define REST_FIRST_MS		50
#define REST_LAST_MS		1000
#define LOG_AGAIN_USECS		USECS_PER_MINUTE

/* How often to look whether a caller's transaction has ended. */
#define NOTE_INTERVAL_MS	200
#define MAX_NOTES			2048
#define MAX_NOTE_TRIES		20

/*
 * A claim's lease runs from when the caller is told of it, but for this part.
 * One that is shorter than a commit may take isn't renewed.
 */
#define LEASE_PART			10
#define LEASE_LEAST			USECS_PER_SEC

/* An order of the current batch. */
typedef struct BatchEntry
{
	Order	   *order;
	bool		retry;
	bool		is_lock;		/* why */
} BatchEntry;

/* A call whose transaction's fate is to be written down. */
typedef struct Note
{
	char	   *account;		/* one allocation for all three */
	char	   *type;
	char	   *id;
	TransactionId xid;
	int			tries;
	bool		done;			/* in the transaction in progress */
} Note;

static bool have_slot = false;
static BatchEntry batch[ORDER_BATCH];
static int	nbatch = 0;
static TransactionId batch_xid = InvalidTransactionId;
static bool batch_durable = false;	/* has its commit come to its end? */
static dsm_segment **mappings;	/* by number of the order */
static dsm_handle *mapped;
static Note notes[MAX_NOTES];
static int	nnotes = 0;
static TimestampTz last_notes = 0;	/* 0: look at once */

/* Errors before any order was taken */
static TimestampTz rest_since = 0;
static int	rest_ms = 0;		/* 0: the last transaction was none */

/* ---------- segments ---------- */

static void
unmap_segment(int i)
{
	dsm_segment *segment = mappings[i];

	if (segment != NULL)
	{
		mappings[i] = NULL;
		dsm_detach(segment);
	}
	mapped[i] = DSM_HANDLE_INVALID;
}

static char *
map_segment(Order *order)
{
	int			i = order - recorder_queue_order(0);

	if (mappings[i] == NULL || mapped[i] != order->segment)
	{
		unmap_segment(i);
		mappings[i] = dsm_attach(order->segment);
		if (mappings[i] == NULL)
			ereport(ERROR,
					(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
					 errmsg("could not map dynamic shared memory segment")));
		dsm_pin_mapping(mappings[i]);
		mapped[i] = order->segment;
	}
	return dsm_segment_address(mappings[i]);
}

/* An order is done: its caller gives a large segment back, so we do. */
static void
unmap_large_segment(Order *order)
{
	int			i = order - recorder_queue_order(0);

	if (mappings[i] != NULL && dsm_segment_map_length(mappings[i]) > ORDER_SEGMENT_MIN)
		unmap_segment(i);
}

/* Let go of what callers have replaced or freed. */
static void
unmap_stale_segments(void)
{
	int			i;

	for (i = 0; i < recorder_queue_norders(); i++)
	{
		Order	   *order = recorder_queue_order(i);

		if (mappings[i] != NULL &&
			(order->state == ORDER_FREE || order->segment != mapped[i]))
			unmap_segment(i);
	}
}

/* ---------- notes ---------- */

static void
add_note(Order *order)
{
	Note	   *note;
	Size		account = strlen(order->account) + 1;
	Size		type = strlen(order->type) + 1;
	Size		id = strlen(order->id) + 1;

	/* the oldest is left to settle_note_fates() */
	if (nnotes == MAX_NOTES)
	{
		pfree(notes[0].account);
		memmove(&notes[0], &notes[1], (MAX_NOTES - 1) * sizeof(Note));
		nnotes--;
	}

	note = &notes[nnotes];
	note->account = MemoryContextAllocExtended(TopMemoryContext, account + type + id,
											   MCXT_ALLOC_NO_OOM);
	if (note->account == NULL)
		return;
	note->type = note->account + account;
	note->id = note->type + type;
	memcpy(note->account, order->account, account);
	memcpy(note->type, order->type, type);
	memcpy(note->id, order->id, id);
	note->xid = XidFromFullTransactionId(order->caller_xid);
	note->tries = 0;
	note->done = false;
	nnotes++;
}

static bool
notes_are_due(void)
{
	int			i;

	if (nnotes == 0 || !is_over(last_notes, NOTE_INTERVAL_MS * 1000, GetCurrentTimestamp()))
		return false;
	last_notes = GetCurrentTimestamp();
	for (i = 0; i < nnotes; i++)
	{
		if (!TransactionIdIsInProgress(notes[i].xid))
		{
			last_notes = 0;
			return true;
		}
	}
	return false;
}

/* ---------- orders ---------- */

static bool
is_before_send(OrderVerb verb)
{
	return verb == ORDER_CLAIM || verb == ORDER_REOPEN || verb == ORDER_ADOPT ||
		verb == ORDER_SETTLE;
}

/*
 * Is there nobody but us to try it again?  Nothing else notes that an open
 * transaction has been given a result.
 */
static bool
is_tried_again(OrderVerb verb)
{
	return !is_before_send(verb) || verb == ORDER_ADOPT;
}

static void
copy_message(char *to, const char *from)
{
	if (from == NULL)
		to[0] = '\0';
	else
		strlcpy(to, from, 1 + pg_mbcliplen(from, strlen(from), ORDER_MESSAGE_LEN - 1));
}

static void
answer_error(Order *order, int sqlstate, const char *message, const char *detail,
			 const char *hint)
{
	order->answer = ORDER_ERROR;
	order->sqlstate = sqlstate;
	copy_message(order->message, message);
	copy_message(order->detail, detail);
	copy_message(order->hint, hint);
}

/* The recorder's error becomes the caller's. */
static void
answer_with(Order *order, ErrorData *edata)
{
	if (edata->sqlerrcode == ERRCODE_QUERY_CANCELED)
		answer_error(order, ERRCODE_NO_RECORDER,
					 "the recorder of Stripe operations was interrupted, and nothing was sent",
					 edata->message, NULL);
	else
		answer_error(order, edata->sqlerrcode, edata->message, edata->detail, edata->hint);
}

static void
do_claim(Order *order, Operation *op, Relation rel)
{
	TimestampTz now = GetCurrentTimestamp();
	StripeClaim claim;

	memset(&claim, 0, sizeof(claim));
	claim.op = op;
	unpack_claim(map_segment(order), &claim);
	claim.caller_xid = order->caller_xid;

	stripe_claim_init(&claim);
	claim.base.bounded = true;
	settle_or_claim(&claim, rel);

	order->token = claim.token;
	order->lease = 0;
	if (claim.verdict == STRIPE_CLAIMED)
	{
		order->answer = ORDER_OK;
		order->lease = claim.lease;
		order->leased_until = now + claim.lease;
	}
	else if (claim.verdict == STRIPE_BUSY && !claim.known)
		order->answer = ORDER_LOCKED;
	else
		order->answer = ORDER_REFUSED;
}

/* Has the commit of a claim taken what was to be the caller's time? */
static bool
lease_runs_out(Order *order, TimestampTz now)
{
	return order->verb == ORDER_CLAIM && order->answer == ORDER_OK &&
		order->lease >= LEASE_LEAST &&
		order->leased_until - now < order->lease - order->lease / LEASE_PART;
}

/*
 * A claim is committed, and its caller hasn't been told yet: its lease begins
 * anew.  It is longer by what the last commit took, as this one may take.
 */
static void
renew_lease(Order *order, Operation *op, Relation rel)
{
	TimestampTz now = GetCurrentTimestamp();
	int64		took = now - (order->leased_until - order->lease);

	order->leased_until = now + order->lease + Min(Max(took, 0), order->lease);
	if (!stripe_renew_run(rel, op, order->token, order->leased_until))
	{
		/* it had run out, and somebody has taken over */
		order->answer = ORDER_REFUSED;
		order->lease = 0;
	}
}

static void
do_reopen(Order *order, Operation *op, Relation rel)
{
	bool		force;
	int			from_generation;
	char	   *user;

	unpack_reopen(map_segment(order), &force, &from_generation, &user);
	strlcpy(order->key, stripe_reopen_run(rel, op, force, from_generation, user),
			sizeof(order->key));
	order->answer = ORDER_OK;
}

static void
do_record(Order *order, Operation *op, Relation rel)
{
	CallResult	result;

	memset(&result, 0, sizeof(result));
	if (order->verb == ORDER_RECORD)
		unpack_result(map_segment(order), &result);
	else
	{
		/* given up, after something may have been sent */
		result.outcome = STRIPE_UNKNOWN;
		result.sent = true;
		result.livemode = LIVEMODE_UNKNOWN;
	}

	order->outcome = stripe_record_run(rel, op, order->token, &result, false);
	order->answer = ORDER_OK;
}

static void
do_order(Order *order, bool *opened)
{
	Operation	op;
	Relation	rel;

	operation_init(&op, order->type, order->id, order->account);
	rel = ledger_open(&stripe_calls, RowExclusiveLock, false);
	*opened = true;

	switch (order->verb)
	{
		case ORDER_CLAIM:
			if (order->committed)
				renew_lease(order, &op, rel);
			else
				do_claim(order, &op, rel);
			break;
		case ORDER_REOPEN:
			do_reopen(order, &op, rel);
			break;
		case ORDER_ADOPT:
			stripe_adopt_run(rel, &op, order->token, order->caller_xid);
			order->answer = ORDER_OK;
			break;
		case ORDER_SETTLE:
			order->answer = settle_by_kept_events(op.key, 0, false) ? ORDER_OK : ORDER_REFUSED;
			break;
		case ORDER_RECORD:
		case ORDER_GAVE_UP:
			do_record(order, &op, rel);
			break;
		case ORDER_RELEASE:
			order->answer = stripe_release_run(rel, &op, order->token) ?
				ORDER_OK : ORDER_REFUSED;
			break;
	}
	ledger_close(rel);
}

static bool
is_lock_failure(int sqlstate)
{
	return sqlstate == ERRCODE_LOCK_NOT_AVAILABLE || sqlstate == ERRCODE_T_R_DEADLOCK_DETECTED;
}

/*
 * Is this an answer of the ledger, which another try wouldn't change?  That there
 * is no table is one where it was the ledger's, and not where a trigger says so.
 */
static bool
is_final_refusal(int sqlstate, bool opened)
{
	if (sqlstate == ERRCODE_UNDEFINED_TABLE)
		return !opened;
	return ERRCODE_TO_CATEGORY(sqlstate) == MAKE_SQLSTATE('I', 'K', '0', '0', '0') &&
		sqlstate != ERRCODE_FOREIGN_NAMESPACE;
}

/*
 * Does an error say that the row refuses?  What is the machine's, somebody's
 * lock or cancel, or a decision that is yet to be made, passes.
 */
static bool
counts_as_refusal(const ErrorData *edata)
{
	return !is_lock_failure(edata->sqlerrcode) && error_is_about_one_row(edata) &&
		edata->sqlerrcode != ERRCODE_FOREIGN_NAMESPACE;
}

/*
 * An order has failed: answer it, or have it tried again.
 */
static void
order_failed(BatchEntry *entry, ErrorData *edata, bool opened)
{
	Order	   *order = entry->order;
	int			sqlstate = edata->sqlerrcode;
	bool		is_lock = is_lock_failure(sqlstate);

	if ((is_tried_again(order->verb) || order->committed) && !is_final_refusal(sqlstate, opened) &&
		(!counts_as_refusal(edata) || order->refusals++ < MAX_REFUSALS))
	{
		entry->retry = true;
		entry->is_lock = is_lock;
		if (order->failures == 0 || !is_lock)
			ereport(order->failures == 0 ? LOG : DEBUG1,
					(errmsg("what is known of Stripe operation \"%s:%s\" cannot be recorded yet",
							order->type, order->id),
					 errdetail_internal("%s", edata->message)));
		return;
	}

	if (is_lock && opened)
		order->answer = ORDER_LOCKED;
	else if (is_lock)
		answer_error(order, ERRCODE_LOCK_NOT_AVAILABLE,
					 "could not lock table \"idempotency.stripe_idempotency_keys\"",
					 "Another session holds a lock on it, or waits for one.", NULL);
	else
		answer_with(order, edata);

	if (!is_before_send(order->verb))
		ereport(LOG,
				(errmsg("what is known of Stripe operation \"%s:%s\" is not recorded",
						order->type, order->id),
				 errdetail_internal("%s", edata->message)));
}

typedef struct OrderWork
{
	Order	   *order;
	bool		opened;
} OrderWork;

static void
order_work(void *arg)
{
	OrderWork  *work = arg;

	do_order(work->order, &work->opened);
}

typedef struct NoteWork
{
	Note	   *note;
	bool		done;
} NoteWork;

static void
note_work(void *arg)
{
	NoteWork   *work = arg;
	Operation	op;
	Relation	rel;

	operation_init(&op, work->note->type, work->note->id, work->note->account);
	rel = ledger_open(&stripe_calls, RowExclusiveLock, true);
	work->done = stripe_note_fate_run(rel, &op);
	ledger_close(rel);
}

/*
 * Write down fates that are known now, as many as the batch has room for.
 */
static void
run_notes(int room)
{
	int			i;

	if (nnotes == 0 || !is_over(last_notes, NOTE_INTERVAL_MS * 1000, GetCurrentTimestamp()))
		return;

	for (i = 0; i < nnotes; i++)
	{
		Note	   *note = &notes[i];
		NoteWork	work;

		if (room > 0 && !TransactionIdIsInProgress(note->xid))
		{
			room--;
			work.note = note;
			work.done = false;
			note->tries++;
			note->done = in_subtransaction(note_work, &work) == NULL && work.done;
		}
	}
	if (room > 0)
		last_notes = GetCurrentTimestamp();
}

/*
 * The transaction has ended: forget the notes that are written down now, and
 * those that were tried often enough, which are left to settle_note_fates().
 */
static void
end_notes(bool committed)
{
	int			kept = 0;
	int			i;

	for (i = 0; i < nnotes; i++)
	{
		Note	   *note = &notes[i];

		if ((note->done && committed) || note->tries >= MAX_NOTE_TRIES)
		{
			pfree(note->account);
			continue;
		}
		note->done = false;
		notes[kept++] = *note;
	}
	nnotes = kept;

	/* not at once what has just failed */
	if (!committed)
		last_notes = GetCurrentTimestamp();
}

/* ---------- batches ---------- */

static int
compare_numbers(const void *a, const void *b)
{
	uint64		x = (*(Order *const *) a)->number;
	uint64		y = (*(Order *const *) b)->number;

	return x < y ? -1 : x > y ? 1 : 0;
}

/* May the order be tried, or has it failed a moment ago? */
static bool
is_ripe(Order *order, TimestampTz now)
{
	return is_over(order->failed_at, order->pause_ms * INT64CONST(1000), now);
}

/*
 * Look for orders of this database.  Returns how many are posted; *due tells
 * whether one can be done now, otherwise *pause is after how many milliseconds
 * to look again.  Under the lock.
 */
static int
look_for_orders(bool *due, int *pause)
{
	TimestampTz now = GetCurrentTimestamp();
	int			n = 0;
	int			i;

	*due = false;
	*pause = RETRY_LAST_MS;
	for (i = 0; i < recorder_queue_norders(); i++)
	{
		Order	   *order = recorder_queue_order(i);

		if (order->state != ORDER_POSTED || order->database != MyDatabaseId)
			continue;
		n++;
		if (is_ripe(order, now))
			*due = true;
		else
			*pause = Min(*pause, order->pause_ms);
	}
	return n;
}

/*
 * Publish the transaction and take what it shall do.
 */
static void
take_batch(TransactionId xid)
{
	Order	  **candidates = palloc(recorder_queue_norders() * sizeof(Order *));
	TimestampTz now = GetCurrentTimestamp();
	RecorderSlot *slot;
	int			n = 0;
	int			i;

	LWLockAcquire(recorder_queue_lock, LW_EXCLUSIVE);
	slot = recorder_queue_slot(MyDatabaseId, false);
	slot->xid = xid;
	for (i = 0; i < recorder_queue_norders(); i++)
	{
		Order	   *order = recorder_queue_order(i);

		if (order->state == ORDER_POSTED && order->database == MyDatabaseId &&
			is_ripe(order, now))
			candidates[n++] = order;
	}
	qsort(candidates, n, sizeof(Order *), compare_numbers);

	batch_xid = xid;
	batch_durable = false;
	nbatch = 0;
	for (i = 0; i < n && nbatch < ORDER_BATCH; i++)
	{
		/* one that has failed in company comes first and is alone, or waits */
		if (candidates[i]->alone && nbatch > 0)
			continue;
		candidates[i]->state = ORDER_TAKEN;
		candidates[i]->tries++;
		memset(&batch[nbatch], 0, sizeof(BatchEntry));
		batch[nbatch++].order = candidates[i];
		if (candidates[i]->alone)
			break;
	}
	if (nbatch > 0)
		slot->used = now;
	LWLockRelease(recorder_queue_lock);
	pfree(candidates);
}

/*
 * Free an order whose owner has left it.
 */
static void
free_order(Order *order)
{
	dsm_handle	segment = order->segment;

	unmap_segment(order - recorder_queue_order(0));
	LWLockAcquire(recorder_queue_lock, LW_EXCLUSIVE);
	recorder_queue_free_order(order);
	LWLockRelease(recorder_queue_lock);
	if (segment != DSM_HANDLE_INVALID)
		dsm_unpin_segment(segment);
}

/*
 * The batch's transaction has ended: tell the callers.  "durable": it has
 * committed, and nothing has cut the wait for a standby short.  "edata" is why
 * it rolled back, or NULL where this process is going.
 *
 * Nothing interrupts it, as a message to the log may: nobody else would ever come
 * to the orders that it hasn't come to.
 */
static void
end_batch(bool committed, bool durable, ErrorData *edata)
{
	TimestampTz now = GetCurrentTimestamp();
	int			n = nbatch;
	int			i;

	HOLD_INTERRUPTS();
	nbatch = 0;
	batch_xid = InvalidTransactionId;
	end_notes(committed);

	for (i = 0; i < n; i++)
	{
		BatchEntry *entry = &batch[i];
		Order	   *order = entry->order;
		bool		free_it = false;

		unmap_large_segment(order);
		if (!committed)
		{
			entry->retry = true;
			entry->is_lock = true;
			if (edata != NULL && n == 1 && !order->committed)
			{
				entry->retry = false;
				order_failed(entry, edata, true);
			}
		}
		else if (!entry->retry && !order->committed && order->answer == ORDER_OK &&
				 FullTransactionIdIsValid(order->caller_xid) &&
				 (order->verb == ORDER_CLAIM || order->verb == ORDER_ADOPT))
			add_note(order);

		LWLockAcquire(recorder_queue_lock, LW_EXCLUSIVE);
		if (order->detached && order->verb == ORDER_CLAIM && order->answer == ORDER_OK &&
			(order->committed || !entry->retry))
			recorder_queue_post(order, ORDER_RELEASE);	/* claimed in vain */
		else if (order->detached && is_before_send(order->verb))
			free_it = true;		/* nobody wants it any more */
		else if (committed && !entry->retry && (!durable || lease_runs_out(order, now)))
		{
			order->state = ORDER_POSTED;
			order->committed = true;
		}
		else if (entry->retry)
		{
			order->state = ORDER_POSTED;
			if (!committed && edata == NULL)
				;				/* for our successor */
			else if (!committed && n > 1)
				order->alone = true;
			else
			{
				int			delay = RETRY_FIRST_MS << Min(order->failures, 10);

				if (entry->is_lock)
					delay = Min(delay, RETRY_FIRST_MS * 4);
				order->failures++;
				order->failed_at = now;
				order->pause_ms = Min(delay, RETRY_LAST_MS);
			}
		}
		else if (order->detached)
			free_it = true;
		else
		{
			order->state = ORDER_DONE;
			SetLatch(&GetPGProcByNumber(order->procno)->procLatch);
		}
		LWLockRelease(recorder_queue_lock);

		if (free_it)
			free_order(order);
	}

	LWLockAcquire(recorder_queue_lock, LW_EXCLUSIVE);
	recorder_queue_slot(MyDatabaseId, false)->xid = InvalidTransactionId;
	LWLockRelease(recorder_queue_lock);
	RESUME_INTERRUPTS();
}

/* ---------- errors outside of orders ---------- */

/* A string that may be missing, in a buffer; has it been another one before? */
static bool
changes_to(char *buffer, Size size, const char *string)
{
	char	   *old = pstrdup(buffer);

	strlcpy(buffer, string != NULL ? string : "", size);
	return strcmp(buffer, old) != 0;
}

/*
 * Log an error unless that has just been done: what fails is tried again.  It is
 * the same where it comes from the same place; its text may tell of a block or of
 * a transaction, and be another one each time.
 */
static void
log_error(ErrorData *edata)
{
	static int	last_sqlstate = 0;
	static int	last_line = 0;
	static char last_file[MAXPGPATH] = "";
	static char last_format[ORDER_MESSAGE_LEN] = "";
	static TimestampTz last_logged = 0;
	TimestampTz now = GetCurrentTimestamp();
	bool		is_new = edata->sqlerrcode != last_sqlstate || edata->lineno != last_line;

	last_sqlstate = edata->sqlerrcode;
	last_line = edata->lineno;
	is_new = changes_to(last_file, sizeof(last_file), edata->filename) || is_new;
	is_new = changes_to(last_format, sizeof(last_format), edata->message_id) || is_new;
	if (!is_new && !is_over(last_logged, LOG_AGAIN_USECS, now))
		return;
	last_logged = now;
	EmitErrorReport();
}

/*
 * No order could be taken, and the next try may fail as this one did: rest a
 * while, each time longer.  Who hasn't sent anything yet is told why; what must be
 * recorded waits.
 */
static void
rest_after(ErrorData *edata)
{
	int			i;

	rest_since = GetCurrentTimestamp();
	rest_ms = Min(Max(2 * rest_ms, REST_FIRST_MS), REST_LAST_MS);

	for (i = 0; i < recorder_queue_norders(); i++)
	{
		Order	   *order = recorder_queue_order(i);

		LWLockAcquire(recorder_queue_lock, LW_EXCLUSIVE);
		if (order->state == ORDER_POSTED && order->database == MyDatabaseId &&
			!order->detached && !order->committed && !is_tried_again(order->verb))
		{
			answer_with(order, edata);
			order->state = ORDER_DONE;
			SetLatch(&GetPGProcByNumber(order->procno)->procLatch);
		}
		LWLockRelease(recorder_queue_lock);
	}
}

/* How many milliseconds of the rest are left? */
static int
rest_left(void)
{
	TimestampTz now = GetCurrentTimestamp();

	if (rest_ms == 0 || is_over(rest_since, rest_ms * INT64CONST(1000), now))
		return 0;
	return rest_ms - (int) ((now - rest_since) / 1000);
}

/* ---------- transactions ---------- */

/*
 * Whoever is told that an order is done goes on from there, and sends: so it has
 * to be on disk, and on the standby that commits wait for, whatever the setting
 * has become since this process began.  Nobody waits for notes, and what is lost
 * of them is found again.
 */
static void
choose_durability(void)
{
	const char *wanted = NULL;

	if (nbatch == 0)
		wanted = "off";
	else if (synchronous_commit < SYNCHRONOUS_COMMIT_ON)
		wanted = "on";

	/*
	 * It takes PGC_S_SESSION to be local: what comes from a source below that
	 * becomes the default, for good.
	 */
	if (wanted != NULL)
		(void) set_config_option("synchronous_commit", wanted, PGC_SUSET, PGC_S_SESSION,
								 GUC_ACTION_LOCAL, true, 0, false);
	if (nbatch > 0)
		ForceSyncCommit();
}

/*
 * The orders of the batch, each in a subtransaction.
 */
static void
run_orders(void)
{
	int			nlocked = 0;
	int			i;

	for (i = 0; i < nbatch; i++)
	{
		OrderWork	work;
		ErrorData  *edata;

		CHECK_FOR_INTERRUPTS();
		if (batch[i].order->committed)
		{
			/* a commit that has written nothing waits for no standby */
			log_message_compat("idempotency");
			if (batch[i].order->lease == 0)
				continue;
		}
		work.order = batch[i].order;
		work.opened = false;
		LockTimeout = nlocked < PATIENT_ORDERS ? LOCK_TIMEOUT : LOCK_TIMEOUT_LEAST;
		edata = in_subtransaction(order_work, &work);
		if (edata != NULL)
			order_failed(&batch[i], edata, work.opened);
		if (edata != NULL && is_lock_failure(edata->sqlerrcode))
			nlocked++;
	}
}

/*
 * One transaction: what is posted, and notes where there is room.
 */
static void
run_batch(void)
{
	MemoryContext context = CurrentMemoryContext;
	char		activity[64];

	PG_TRY();
	{
		background_begin();
		background_restrict();
		DEBUG_POINT("recorder-begins");

		/* before anything that might wait */
		take_batch(GetTopTransactionId());
		if (nbatch > 0)
			snprintf(activity, sizeof(activity), "recording Stripe operations: %d", nbatch);
		else
			strlcpy(activity, "noting how callers of Stripe have ended", sizeof(activity));
		pgstat_report_activity(STATE_RUNNING, activity);
		if (nbatch > 0)
			DEBUG_POINT("recorder-taken");

		run_orders();
		LockTimeout = LOCK_TIMEOUT_LEAST;
		run_notes(ORDER_BATCH - nbatch);
		LockTimeout = LOCK_TIMEOUT;

		if (nbatch > 0)
			DEBUG_POINT("recorder-before-commit");
		else
			DEBUG_POINT("notes-before-commit");
		choose_durability();

		/*
		 * A cancelled wait for a standby would look like a commit. One that
		 * is cut by our termination can be told.
		 */
		pqsignal(SIGINT, SIG_IGN);
		CHECK_FOR_INTERRUPTS();
		background_commit();
		batch_durable = !ProcDiePending;
		pqsignal(SIGINT, StatementCancelHandler);
		if (nbatch > 0)
			DEBUG_POINT("recorder-after-commit");
		end_batch(true, batch_durable, NULL);
		rest_ms = 0;
	}
	PG_CATCH();
	{
		ErrorData  *edata;
		bool		committed;
		bool		taken = TransactionIdIsValid(batch_xid);

		pqsignal(SIGINT, StatementCancelHandler);
		HOLD_INTERRUPTS();
		MemoryContextSwitchTo(context);
		edata = CopyErrorData();
		log_error(edata);
		FlushErrorState();
		AbortOutOfAnyTransaction();
		DEBUG_POINT("recorder-rolled-back");
		RESUME_INTERRUPTS();

		MemoryContextSwitchTo(context);
		committed = TransactionIdIsValid(batch_xid) && TransactionIdDidCommit(batch_xid);
		end_batch(committed, batch_durable, edata);
		if (!taken)
			rest_after(edata);
		FreeErrorData(edata);
	}
	PG_END_TRY();

	MemoryContextSwitchTo(context);
	pgstat_report_stat(false);
	pgstat_report_activity(STATE_IDLE, NULL);
}

/* ---------- coming and going ---------- */

/*
 * However this process ends, its orders can be taken by another one.
 */
static void
at_exit(int code, Datum arg)
{
	RecorderSlot *slot;
	bool		left = false;
	int			i;

	if (nbatch > 0)
	{
		TransactionId xid = batch_xid;

		AbortOutOfAnyTransaction();
		end_batch(TransactionIdDidCommit(xid), batch_durable, NULL);
	}
	if (!have_slot)
		return;

	LWLockAcquire(recorder_queue_lock, LW_EXCLUSIVE);
	have_slot = false;
	slot = recorder_queue_slot(MyDatabaseId, false);
	slot->procno = -1;
	slot->xid = InvalidTransactionId;
	slot->started = 0;
	if (!slot->blocked)
		slot->database = InvalidOid;
	for (i = 0; i < recorder_queue_norders(); i++)
	{
		Order	   *order = recorder_queue_order(i);

		if (order->state != ORDER_POSTED || order->database != MyDatabaseId)
			continue;
		if (recorder_queue_is_left(order))
			left = true;
		else
			SetLatch(&GetPGProcByNumber(order->procno)->procLatch);
	}
	LWLockRelease(recorder_queue_lock);

	/* nobody waits for those, so nobody else would start a successor */
	if (left)
		worker_table_call_launcher();
}

/*
 * Become this database's recorder.  Returns false where there is one.
 */
static bool
take_slot(void)
{
	RecorderSlot *slot;

	before_shmem_exit(at_exit, (Datum) 0);

	LWLockAcquire(recorder_queue_lock, LW_EXCLUSIVE);
	slot = recorder_queue_slot(MyDatabaseId, true);
	if (slot != NULL && slot->procno < 0 && !slot->blocked)
	{
		slot->procno = MY_PROC_NUMBER;
		slot->xid = InvalidTransactionId;
		slot->came = slot->used = GetCurrentTimestamp();
		slot->make_room = false;
		have_slot = true;
	}
	LWLockRelease(recorder_queue_lock);
	return have_slot;
}

/*
 * Leave, if there is still nothing to do: a caller that posts afterwards finds
 * no recorder and starts one.
 */
static bool
leave_if_idle(void)
{
	RecorderSlot *slot;
	bool		due;
	int			pause;

	LWLockAcquire(recorder_queue_lock, LW_EXCLUSIVE);
	if (look_for_orders(&due, &pause) == 0)
	{
		slot = recorder_queue_slot(MyDatabaseId, false);
		slot->procno = -1;
		slot->started = 0;
		slot->database = InvalidOid;
		have_slot = false;
	}
	LWLockRelease(recorder_queue_lock);
	return !have_slot;
}

/* Stay, though another database wants our place: there is something to do. */
static void
decline_to_leave(void)
{
	RecorderSlot *slot;

	LWLockAcquire(recorder_queue_lock, LW_EXCLUSIVE);
	slot = recorder_queue_slot(MyDatabaseId, false);
	slot->make_room = false;
	slot->used = GetCurrentTimestamp();
	LWLockRelease(recorder_queue_lock);
}

static void
fix_settings(void)
{
	background_fix_settings();
	background_set("role", "none");
	background_set("default_transaction_read_only", "off");
	background_set("lock_timeout", CppAsString2(LOCK_TIMEOUT) "ms");
	background_set("DateStyle", "ISO");
}

void
idempotency_recorder_main(Datum arg)
{
	uint32		wait_event;
	instr_time	last_order;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();

	DEBUG_POINT("recorder-start");
	BackgroundWorkerInitializeConnectionByOid(DatumGetObjectId(arg), InvalidOid,
											  BGWORKER_BYPASS_ALLOWCONN);
	fix_settings();
	settings_guard_disarm();
	pgstat_report_appname(MyBgworkerEntry->bgw_type);
	wait_event = WAIT_EVENT_NEW("IdempotencyRecorderMain");
	mappings = MemoryContextAllocZero(TopMemoryContext, recorder_queue_norders() * sizeof(dsm_segment *));
	mapped = MemoryContextAllocZero(TopMemoryContext, recorder_queue_norders() * sizeof(dsm_handle));
	MemoryContextSwitchTo(AllocSetContextCreate(TopMemoryContext, "idempotency recorder",
												ALLOCSET_DEFAULT_SIZES));

	if (!take_slot())
		proc_exit(0);
	pgstat_report_activity(STATE_IDLE, NULL);

	INSTR_TIME_SET_CURRENT(last_order);
	for (;;)
	{
		RecorderSlot *slot;
		bool		due;
		bool		blocked;
		bool		make_room;
		int			posted;
		int			pause;
		int			rest;
		long		nap;

		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
		/* nothing else looks while there is work, and a commit's wait says nothing */
		if (!PostmasterIsAlive())
			proc_exit(1);
		if (ConfigReloadPending)
		{
			ConfigReloadPending = false;
			ProcessConfigFile(PGC_SIGHUP);
		}

		LWLockAcquire(recorder_queue_lock, LW_SHARED);
		posted = look_for_orders(&due, &pause);
		slot = recorder_queue_slot(MyDatabaseId, false);
		blocked = slot->blocked;
		make_room = slot->make_room;
		LWLockRelease(recorder_queue_lock);

		if (blocked)
			proc_exit(0);
		rest = rest_left();
		if (rest == 0 && (due || notes_are_due()))
		{
			run_batch();
			if (due)
				INSTR_TIME_SET_CURRENT(last_order);
			MemoryContextReset(CurrentMemoryContext);
			continue;
		}

		unmap_stale_segments();
		nap = IDLE_EXIT_MS - (long) milliseconds_since(last_order);
		if (posted > 0 && make_room)
			decline_to_leave();
		if (posted > 0)
			nap = pause;
		else if ((nap <= 0 || make_room) && leave_if_idle())
			proc_exit(0);
		if (nnotes > 0)
			nap = Min(nap, NOTE_INTERVAL_MS);
		if (rest > 0)
			nap = Min(nap, rest);

		pgstat_report_stat(true);
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 Max(nap, 1), wait_event);
	}
}
