/*-------------------------------------------------------------------------
 *
 * recorder_client.c
 *	  Bookkeeping of calls to Stripe that doesn't depend on the caller's
 *	  transaction: the callers' side.
 *
 * A caller first looks for itself, at what is committed now: most questions
 * (a replay, somebody else's live claim) are answered by that, without the
 * recorder.  Where something must be written it posts an order
 * (recorder_queue.c) and waits until the recorder has committed it
 * (recorder_process.c), for idempotency.stripe_record_timeout at most.
 *
 * How to wait.  The recorder may itself wait for a lock that the caller holds,
 * and a caller asleep on its latch would be a deadlock that PostgreSQL can't
 * see.  So after the few milliseconds that a commit takes, the caller waits for
 * the transaction id of the batch that the recorder is at, whether or not its
 * own order is in it: the deadlock detector, cancel and lock_timeout work.
 *
 * Before the send a caller that doesn't get its answer takes its order back,
 * or, where the recorder is at it already, leaves the order behind: what was
 * claimed in vain is then released.  After the send it leaves the order behind,
 * too, and the recorder goes on trying.  Both ways work without memory, locks
 * or a transaction, so that an error, a cancelled statement and a terminated
 * session are all alike: the end of the (sub)transaction or of the process
 * comes here.  A killed process takes the server's shared memory with it; then
 * the row, which names the server's life, says that nobody knows.
 *
 * A claim that the caller has picked up may be sent.  One that it hasn't, never
 * was.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/process/recorder_client.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/table.h"
#include "access/xact.h"
#include "catalog/pg_type_d.h"
#include "miscadmin.h"
#include "postmaster/bgworker.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/lmgr.h"
#include "storage/proc.h"
#include "storage/procarray.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/xid8.h"
#include "utils/wait_event.h"

#include "base/clock.h"
#include "base/compat.h"
#include "base/debug_point.h"
#include "base/errors.h"
#include "base/lock_limit.h"
#include "base/settings.h"
#include "base/shmem.h"
#include "calls/call_transactions.h"
#include "calls/stripe_ledger.h"
#include "calls/stripe_record.h"
#include "events/kept_events.h"
#include "process/recorder_client.h"
#include "process/recorder_message.h"
#include "process/recorder_queue.h"
#include "process/recorder_start.h"
#include "process/worker_table.h"

/* A commit is usually done within this time; then wait for its lock. */
#define FIRST_WAIT_MS		10
#define NEXT_WAIT_MS		100

/* There was no place for a recorder: how soon to ask again. */
#define PLACE_WAIT_MS		25

/* What a record needs besides the bodies: ids of limited length. */
#define ANSWER_OVERHEAD		(8 * 1024)

#define MAX_LOOKS			10
#define ADOPT_TRIES			3

/* This backend's order, if it has one, and the mapping of its segment. */
static Order *my_order = NULL;
static dsm_segment *my_segment = NULL;

/* The subtransaction that has posted it. */
static SubTransactionId order_subid = InvalidSubTransactionId;

/* The call that was claimed and has no result yet. */
static struct
{
	bool		active;
	bool		direct;			/* without the recorder */
	bool		sending;
	SubTransactionId subid;		/* in which it was claimed */
	Operation	op;
	int64		token;
}			flight;

typedef enum WaitResult
{
	WAIT_ANSWERED,
	WAIT_TIMED_OUT,
	WAIT_NO_WORKER,				/* the server has no place for another process */
	WAIT_NOT_STARTED			/* the process didn't come up */
} WaitResult;

static void see_to_order(void);

/* ---------- the order ---------- */

/*
 * The recorder owns the order from now on.
 */
static void
leave_order_behind(void)
{
	my_order = NULL;
	if (my_segment != NULL)
	{
		dsm_segment *segment = my_segment;

		my_segment = NULL;
		dsm_detach(segment);
	}
}

/*
 * Don't wait for the answer any more.  Safe anywhere.
 */
static void
stop_waiting(void)
{
	bool		left = false;
	bool		claimed;

	LWLockAcquire(recorder_queue_lock, LW_EXCLUSIVE);
	claimed = my_order->verb == ORDER_CLAIM && my_order->answer == ORDER_OK &&
		(my_order->state == ORDER_DONE ||
		 (my_order->state == ORDER_POSTED && my_order->committed));
	switch (my_order->state)
	{
		case ORDER_POSTED:
		case ORDER_DONE:
			if (claimed)
			{
				left = my_order->detached = true;
				recorder_queue_post(my_order, ORDER_RELEASE);
				recorder_queue_wake(MyDatabaseId);
			}
			else if (my_order->state == ORDER_POSTED && my_order->verb == ORDER_RECORD)
				left = my_order->detached = true;
			else
				my_order->state = ORDER_OWNED;
			break;
		case ORDER_TAKEN:
			left = my_order->detached = true;
			break;
		default:
			break;
	}
	LWLockRelease(recorder_queue_lock);

	if (left)
	{
		leave_order_behind();
		see_to_order();
	}
}

/*
 * Give back the room of a large request or answer: many sessions stay connected
 * that call now and then.
 */
static void
give_back_room(void)
{
	dsm_segment *segment = my_segment;
	dsm_handle	handle;

	if (segment == NULL || dsm_segment_map_length(segment) <= ORDER_SEGMENT_MIN)
		return;

	LWLockAcquire(recorder_queue_lock, LW_EXCLUSIVE);
	handle = my_order->segment;
	my_order->segment = DSM_HANDLE_INVALID;
	LWLockRelease(recorder_queue_lock);
	my_segment = NULL;
	dsm_detach(segment);
	dsm_unpin_segment(handle);
}

/* Whatever was under way has come to its end. */
static void
clean_up(void)
{
	recorder_gave_up();
	if (my_order != NULL && my_order->state != ORDER_OWNED)
		stop_waiting();
	if (my_order != NULL)
		give_back_room();
}

static void
at_exit(int code, Datum arg)
{
	dsm_handle	segment;

	clean_up();
	if (my_order == NULL)
		return;

	segment = my_order->segment;
	LWLockAcquire(recorder_queue_lock, LW_EXCLUSIVE);
	recorder_queue_free_order(my_order);
	LWLockRelease(recorder_queue_lock);
	leave_order_behind();
	if (segment != DSM_HANDLE_INVALID)
		dsm_unpin_segment(segment);
}

static void
at_xact_event(XactEvent event, void *arg)
{
	switch (event)
	{
		case XACT_EVENT_PRE_COMMIT:
		case XACT_EVENT_PRE_PREPARE:
		case XACT_EVENT_ABORT:
			clean_up();
			break;
		default:
			break;
	}
}

static void
at_subxact_event(SubXactEvent event, SubTransactionId subid,
				 SubTransactionId parent, void *arg)
{
	if (event == SUBXACT_EVENT_COMMIT_SUB)
	{
		if (flight.active && flight.subid >= subid)
			flight.subid = parent;
	}
	else if (event == SUBXACT_EVENT_ABORT_SUB)
	{
		if (flight.active && flight.subid >= subid)
			recorder_gave_up();

		/* not the subtransaction in which we wait */
		if (my_order != NULL && my_order->state != ORDER_OWNED && order_subid >= subid)
			stop_waiting();
	}
}

static void
register_callbacks(void)
{
	static bool registered = false;

	if (registered)
		return;
	before_shmem_exit(at_exit, (Datum) 0);
	RegisterXactCallback(at_xact_event, NULL);
	RegisterSubXactCallback(at_subxact_event, NULL);
	registered = true;
}

static void
no_recorder(const char *detail, const char *hint)
{
	ereport(ERROR,
			(errcode(ERRCODE_NO_RECORDER),
			 errmsg("the recorder of Stripe operations is out of reach, and nothing was sent"),
			 errdetail_internal("%s", _(detail)),
			 errhint("%s", _(hint))));
}

/*
 * Make sure that this backend has an order for an operation.
 */
static void
get_order(Operation *op)
{
	register_callbacks();

	if (my_order == NULL)
	{
		LWLockAcquire(recorder_queue_lock, LW_EXCLUSIVE);
		my_order = recorder_queue_new_order();
		LWLockRelease(recorder_queue_lock);
		if (my_order == NULL)
			no_recorder(gettext_noop("Too many answers of Stripe wait to be recorded."),
						gettext_noop("Look for transactions that hold rows of \"idempotency.stripe_idempotency_keys\" locked."));
	}

	strlcpy(my_order->account, op->account, sizeof(my_order->account));
	strlcpy(my_order->type, op->type, sizeof(my_order->type));
	strlcpy(my_order->id, op->id, sizeof(my_order->id));
	my_order->caller_xid = InvalidFullTransactionId;
	my_order->token = 0;
}

static void
reserving(void *arg)
{
	errcontext("reserving memory for what is to be recorded of a call to Stripe; nothing was sent");
}

/*
 * See to it that the order's segment has room.
 */
static void
reserve(Size size)
{
	ErrorContextCallback context;
	Size		rounded = ORDER_SEGMENT_MIN;
	dsm_segment *segment;
	dsm_handle	old;

	if (my_segment != NULL && dsm_segment_map_length(my_segment) >= size)
		return;
	while (rounded < size)
		rounded *= 2;

	context.callback = reserving;
	context.arg = NULL;
	context.previous = error_context_stack;
	error_context_stack = &context;
	segment = dsm_create(rounded, 0);
	error_context_stack = context.previous;

	dsm_pin_mapping(segment);
	dsm_pin_segment(segment);
	LWLockAcquire(recorder_queue_lock, LW_EXCLUSIVE);
	old = my_order->segment;
	my_order->segment = dsm_segment_handle(segment);
	LWLockRelease(recorder_queue_lock);

	if (my_segment != NULL)
	{
		dsm_detach(my_segment);
		dsm_unpin_segment(old);
	}
	my_segment = segment;
}

/*
 * This backend has left its order behind: nobody waits for it, so somebody has
 * to come for it.  That is the launcher, where no recorder runs; to ask for one
 * here is only sooner.
 */
static void
see_to_order(void)
{
	TimestampTz since;

	if (ask_for_recorder(MyDatabaseId, &since, NULL) != RECORDER_RUNS)
		worker_table_call_launcher();
}

/* ---------- posting and waiting ---------- */

static void
wait_for_xid(void *arg)
{
	XactLockTableWait(*(TransactionId *) arg, NULL, NULL, XLTW_None);
}

/*
 * Wait until the order is done.
 *
 * A place for the recorder may become free at any moment, so where there is none
 * it is asked for again.  One that couldn't start is the end of the wait only
 * before the send; afterwards the caller's time is all that counts.
 */
static WaitResult
wait_for_answer(bool before_send)
{
	static uint32 wait_event = 0;
	instr_time	begin;
	BackgroundWorkerHandle *handle = NULL;
	TimestampTz since = 0;
	long		nap = FIRST_WAIT_MS;
	bool		no_place = false;

	if (wait_event == 0)
		wait_event = WAIT_EVENT_NEW("IdempotencyRecorderAnswer");
	INSTR_TIME_SET_CURRENT(begin);

	for (;;)
	{
		RecorderSlot *slot;
		OrderState	state;
		TransactionId xid = InvalidTransactionId;
		bool		running = false;
		bool		failed = false;
		long		left;

		CHECK_FOR_INTERRUPTS();

		LWLockAcquire(recorder_queue_lock, LW_SHARED);
		state = my_order->state;
		slot = recorder_queue_slot(MyDatabaseId, false);
		if (slot != NULL)
		{
			running = slot->procno >= 0;
			xid = slot->xid;
			failed = !running && handle != NULL && slot->started == since;
		}
		LWLockRelease(recorder_queue_lock);

		if (state == ORDER_DONE)
			return WAIT_ANSWERED;

		left = setting_stripe_record_timeout - (long) milliseconds_since(begin);
		if (left <= 0)
		{
			if (!no_place)
				return WAIT_TIMED_OUT;
			LWLockAcquire(recorder_queue_lock, LW_EXCLUSIVE);
			recorder_queue_stop_wanting(MyDatabaseId, false);
			LWLockRelease(recorder_queue_lock);
			return WAIT_NO_WORKER;
		}

		if (!running)
		{
			pid_t		pid;

			/* it has ended without ever having taken its slot */
			if (failed && before_send && GetBackgroundWorkerPid(handle, &pid) == BGWH_STOPPED)
			{
				LWLockAcquire(recorder_queue_lock, LW_EXCLUSIVE);
				slot = recorder_queue_slot(MyDatabaseId, false);
				failed = slot != NULL && slot->procno < 0 && slot->started == since;
				if (failed)
					slot->started = 0;
				LWLockRelease(recorder_queue_lock);
				if (failed)
					return WAIT_NOT_STARTED;
			}
			no_place = ask_for_recorder(MyDatabaseId, &since, &handle) == RECORDER_HAS_NO_PLACE;
		}
		else if (nap > FIRST_WAIT_MS && TransactionIdIsValid(xid) && TransactionIdIsInProgress(xid))
		{
			(void) within_lock_timeout((int) left, before_send, false, wait_for_xid, &xid);
			continue;
		}

		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 Min(left, nap), wait_event);
		ResetLatch(MyLatch);
		nap = no_place ? PLACE_WAIT_MS : NEXT_WAIT_MS;
	}
}

/*
 * Post the order and wait.  With any other result than WAIT_ANSWERED the order
 * was taken back or left behind; after an error the end of the
 * (sub)transaction does that.
 */
static WaitResult
submit(OrderVerb verb, bool before_send)
{
	WaitResult	result;

	order_subid = GetCurrentSubTransactionId();
	LWLockAcquire(recorder_queue_lock, LW_EXCLUSIVE);
	recorder_queue_post(my_order, verb);
	recorder_queue_wake(MyDatabaseId);
	LWLockRelease(recorder_queue_lock);

	result = wait_for_answer(before_send);
	if (result != WAIT_ANSWERED)
		stop_waiting();
	return result;
}

/* The answer has been read: the order is ours again. */
static void
take_order_back(void)
{
	LWLockAcquire(recorder_queue_lock, LW_EXCLUSIVE);
	my_order->state = ORDER_OWNED;
	LWLockRelease(recorder_queue_lock);
}

/*
 * Submit what must be done before anything may be sent: raises IK008 where
 * there is no answer, and the recorder's error as our own.
 */
static void
submit_before_send(OrderVerb verb)
{
	static const char *const restart_hint =
		gettext_noop("Try again; the server log may tell more.");

	switch (submit(verb, true))
	{
		case WAIT_ANSWERED:
			break;
		case WAIT_TIMED_OUT:
			no_recorder(gettext_noop("It did not answer within idempotency.stripe_record_timeout."),
						restart_hint);
			break;
		case WAIT_NO_WORKER:
			no_recorder(gettext_noop("There is no free slot for a background process."),
						gettext_noop("Consider increasing \"max_worker_processes\"."));
			break;
		case WAIT_NOT_STARTED:
			no_recorder(gettext_noop("It ended before it was ready."), restart_hint);
			break;
	}

	/* nothing can interrupt us from here on, but a claim in vain is released */
	if (my_order->answer == ORDER_ERROR)
	{
		int			sqlstate = my_order->sqlstate;
		char	   *message = pstrdup(my_order->message);
		char	   *detail = pstrdup(my_order->detail);
		char	   *hint = pstrdup(my_order->hint);

		take_order_back();
		ereport(ERROR,
				(errcode(sqlstate),
				 errmsg_internal("%s", message),
				 detail[0] != '\0' ? errdetail_internal("%s", detail) : 0,
				 hint[0] != '\0' ? errhint("%s", hint) : 0,
				 errcontext("recorder of Stripe operations; nothing was sent")));
	}
}

/* ---------- claims ---------- */

/* Is there shared memory, so that a recorder can run at all? */
bool
recorder_can_run(void)
{
	return recorder_queue_is_there();
}

/*
 * A transaction was given a result that, as far as is known, nobody answers
 * for: have it watched.
 */
static void
adopt(StripeClaim *claim)
{
	ArrayType  *callers;
	ArrayType  *open;
	Datum	   *xids;
	int			nxids;
	int			i;

	if (claim->row.isnull[S_CALLERS])
		return;
	callers = DatumGetArrayTypeP(claim->row.values[S_CALLERS]);
	if (callers_fate(callers, claim->row.isnull[S_CALLERS_SYSTEM] ? 0 :
					 (uint64) DatumGetInt64(claim->row.values[S_CALLERS_SYSTEM]),
					 &open) == CALLERS_COMMITTED)
		return;

	/* another call of the same transaction? */
	deconstruct_array(open, XID8OID, sizeof(FullTransactionId), FLOAT8PASSBYVAL,
					  TYPALIGN_DOUBLE, &xids, NULL, &nxids);
	for (i = 0; i < nxids; i++)
	{
		if (U64FromFullTransactionId(DatumGetFullTransactionId(xids[i])) ==
			U64FromFullTransactionId(GetCurrentFullTransactionIdIfAny()))
			return;
	}

	for (i = 0; i < ADOPT_TRIES; i++)
	{
		WaitResult	result;

		get_order(claim->op);
		my_order->token = DatumGetInt64(claim->row.values[S_TOKEN]);
		my_order->caller_xid = GetCurrentFullTransactionId();
		result = submit(ORDER_ADOPT, true);
		if (result == WAIT_ANSWERED)
		{
			bool		done = my_order->answer == ORDER_OK;

			take_order_back();
			if (done)
				return;
		}
		/* one that could not start says little about the next one */
		if (result != WAIT_NOT_STARTED)
			break;
	}
	ereport(WARNING,
			(errcode(ERRCODE_NO_RECORDER),
			 errmsg("could not note that this transaction was given the result of Stripe operation %s",
					describe_operation(claim->op)),
			 errdetail("Until another one is, the view \"idempotency.stripe_orphans\" lists it.")));
}

/* What a call brings along, as far as it is known. */
static void
take_call(StripeClaim *claim, const StripeCall *call)
{
	if (call->resend)
		claim->send.livemode = call->send.livemode;
	else
	{
		claim->request = call->request;
		claim->send = call->send;
	}
}

static void
prepare_call(StripeClaim *claim, const StripeCall *call)
{
	if (call->prepare == NULL)
		return;
	call->prepare(call->prepare_arg);
	take_call(claim, call);
}

/*
 * Nobody knows what came of an operation: have the recorder look among the
 * events that have come in.  Returns true where one has settled it.
 */
static bool
settled_by_event(StripeClaim *claim)
{
	bool		settled = false;

	get_order(claim->op);
	if (submit(ORDER_SETTLE, true) == WAIT_ANSWERED)
	{
		settled = my_order->answer == ORDER_OK;
		take_order_back();
	}
	return settled;
}

/*
 * Claim through the recorder.  The caller has set the arguments; room is what
 * to reserve for the result, and call is NULL for stripe_claim().  With STRIPE_CLAIMED it takes the order back once
 * nothing can fail any more: that is when the call may be sent.
 */
static void
run_claim(StripeClaim *claim, const StripeCall *call, Size room)
{
	bool		prepared = (call == NULL);
	int			looks;

	stripe_claim_init(claim);

	for (looks = 0; looks < MAX_LOOKS; looks++)
	{
		OrderArguments arguments;
		OrderAnswer answer;
		Size		size;
		Relation	rel;

		rel = ledger_open(&stripe_calls, AccessShareLock, false);
		stripe_claim_look(claim, rel);
		table_close(rel, AccessShareLock);
		if (!claim->wants_write)
		{
			if (claim->verdict == STRIPE_CANT_TELL && looks == 0 && settled_by_event(claim))
				continue;
			if (claim->verdict == STRIPE_REPLAY)
				adopt(claim);
			return;
		}
		if (!prepared)
			prepare_call(claim, call);
		prepared = true;

		pack_claim(&arguments, claim);
		get_order(claim->op);
		my_order->caller_xid = GetCurrentFullTransactionId();
		size = arguments_size(&arguments);
		reserve(Max(size, room));
		arguments_write(&arguments, dsm_segment_address(my_segment));

		submit_before_send(ORDER_CLAIM);

		DEBUG_POINT("claim-answered");
		answer = my_order->answer;
		claim->token = my_order->token;

		if (answer == ORDER_OK)
		{
			claim->verdict = STRIPE_CLAIMED;
			claim->outcome = STRIPE_IN_PROGRESS;
			rel = ledger_open(&stripe_calls, AccessShareLock, false);
			stripe_claim_fetch(claim, rel);
			table_close(rel, AccessShareLock);
			return;
		}
		take_order_back();
		if (answer == ORDER_LOCKED)
			break;
	}

	/* others are busy with it */
	claim->verdict = STRIPE_BUSY;
	claim->outcome = STRIPE_IN_PROGRESS;
	claim->retry_after = 1;
	claim->known = false;
}

/*
 * stripe_claim()
 */
void
recorder_run_claim(StripeClaim *claim)
{
	run_claim(claim, NULL, 0);
	if (claim->verdict == STRIPE_CLAIMED)
		take_order_back();
}

/*
 * stripe_reopen().  Returns the new key.
 */
char *
recorder_run_reopen(Operation *op, bool force, int from_generation, const char *user)
{
	OrderArguments arguments;
	Relation	rel;
	char	   *key;
	OrderAnswer answer;

	rel = ledger_open(&stripe_calls, AccessShareLock, false);
	stripe_refuse_own_row(rel, op);
	table_close(rel, AccessShareLock);

	pack_reopen(&arguments, force, from_generation, user);
	get_order(op);
	reserve(arguments_size(&arguments));
	arguments_write(&arguments, dsm_segment_address(my_segment));
	submit_before_send(ORDER_REOPEN);

	answer = my_order->answer;
	key = pstrdup(my_order->key);
	take_order_back();
	if (answer != ORDER_OK)
		ereport(ERROR,
				(errcode(ERRCODE_LOCK_NOT_AVAILABLE),
				 errmsg("could not reopen Stripe operation %s: another transaction is changing it",
						describe_operation(op))));
	return key;
}

/* ---------- calls that a backend sends by itself ---------- */

/* What is known of an operation, for C. */
static void
fill_call_claim(StripeClaim *claim, StripeCallClaim *answer)
{
	LedgerRow  *row = &claim->row;

	memset(answer, 0, sizeof(StripeCallClaim));
	answer->verdict = claim->verdict;
	answer->retry_after = claim->verdict == STRIPE_BUSY ? claim->retry_after : 0;
	answer->result.outcome = claim->outcome;
	answer->result.livemode = LIVEMODE_UNKNOWN;
	if (claim->known)
	{
		TimestampTz first_sent_at = row->isnull[S_FIRST_SENT_AT] ? 0 :
			DatumGetTimestampTz(row->values[S_FIRST_SENT_AT]);

		answer->idempotency_key = stripe_row_string(row, S_IDEMPOTENCY_KEY);
		answer->attempt = DatumGetInt32(row->values[S_ATTEMPT]);
		answer->generation = DatumGetInt32(row->values[S_GENERATION]);
		answer->uncertain = DatumGetBool(row->values[S_UNCERTAIN]);
		if (!row->isnull[S_REQUEST])
			answer->request = DatumGetJsonbP(row->values[S_REQUEST]);
		stripe_row_request(row, &answer->send);
		stripe_row_result(row, claim->outcome, &answer->result);
		answer->resend_until = stripe_resend_until(row, claim->rules.resend_margin);
		answer->sent_before = first_sent_at != 0 &&
			first_sent_at < DatumGetTimestampTz(row->values[S_CLAIMED_AT]);
	}
}

/* Keep the operation of a claimed call for the time of the call. */
static void
begin_flight(StripeClaim *claim, bool direct)
{
	MemoryContext old = MemoryContextSwitchTo(TopTransactionContext);

	flight.op = *claim->op;
	flight.op.account = pstrdup(claim->op->account);
	flight.op.type = pstrdup(claim->op->type);
	flight.op.id = pstrdup(claim->op->id);
	flight.op.key[0] = CStringGetTextDatum(claim->op->account);
	flight.op.key[1] = CStringGetTextDatum(claim->op->type);
	flight.op.key[2] = CStringGetTextDatum(claim->op->id);
	MemoryContextSwitchTo(old);

	flight.direct = direct;
	flight.sending = false;
	flight.subid = GetCurrentSubTransactionId();
	flight.token = claim->token;
	register_callbacks();
	if (!direct)
		take_order_back();
	flight.active = true;
}

/*
 * Claim a call; see recorder_client.h.
 */
void
recorder_claim(const StripeCall *call, StripeCallClaim *answer)
{
	StripeClaim claim;
	bool		direct = setting_stripe_ledger == STRIPE_LEDGER_TRANSACTION;

	PreventCommandDuringRecovery("a call to Stripe");
	PreventCommandIfReadOnly("a call to Stripe");
	if (!direct && !recorder_can_run())
		ereport(ERROR,
				(errcode(ERRCODE_NOT_IN_TRANSACTION),
				 errmsg("Stripe cannot be called without a recorder"),
				 errdetail("What is noted of a call must be committed before anything is sent, which takes a process of its own."),
				 errhint("Add \"idempotency\" to shared_preload_libraries and restart the server.")));
	if (flight.active)
		elog(ERROR, "a call to Stripe is in progress already");

	memset(&claim, 0, sizeof(claim));
	claim.op = call->op;
	claim.rules = stripe_rules();
	claim.resend = call->resend;
	take_call(&claim, call);
	if (shmem_is_there())
	{
		claim.caller_life = shmem_server_life();
		claim.caller_vxid = my_virtual_xid();
	}
	else
		claim.lease = (int64) setting_stripe_lease * USECS_PER_SEC;

	if (direct)
	{
		Relation	rel;

		/* what Stripe has done is then lost with the transaction alone */
		ForceSyncCommit();
		prepare_call(&claim, call);
		rel = ledger_open(&stripe_calls, RowExclusiveLock, false);
		stripe_claim_init(&claim);
		claim.base.wait = true;
		settle_or_claim(&claim, rel);
		if (claim.verdict == STRIPE_CLAIMED)
			stripe_claim_fetch(&claim, rel);
		ledger_close(rel);
	}
	else
		run_claim(&claim, call, call->answer_room + ANSWER_OVERHEAD);

	stripe_advise_reopen(&claim);
	fill_call_claim(&claim, answer);
	if (claim.verdict == STRIPE_CLAIMED)
		begin_flight(&claim, direct);
}

/* The first byte is about to leave. */
void
recorder_sending(void)
{
	flight.sending = true;
}

/*
 * The claimed call ends without a result.  Doesn't wait, raises nothing; does
 * nothing where there is no such call.
 */
void
recorder_gave_up(void)
{
	if (!flight.active)
		return;
	flight.active = false;

	/* the claim is this transaction's own, and shares its fate */
	if (flight.direct)
		return;

	LWLockAcquire(recorder_queue_lock, LW_EXCLUSIVE);
	my_order->token = flight.token;
	my_order->detached = true;
	recorder_queue_post(my_order, flight.sending ? ORDER_GAVE_UP : ORDER_RELEASE);
	recorder_queue_wake(MyDatabaseId);
	LWLockRelease(recorder_queue_lock);
	leave_order_behind();
	see_to_order();
}

/*
 * Record in the caller's own transaction.
 */
static StripeOutcome
record_directly(const CallResult *result)
{
	Relation	rel = ledger_open(&stripe_calls, RowExclusiveLock, false);
	StripeOutcome outcome;

	outcome = stripe_record_run(rel, &flight.op, flight.token, result, false);
	ledger_close(rel);
	flight.active = false;
	return outcome;
}

/*
 * Put a result in the order.  Bodies that are larger than was said go first,
 * then they don't.
 */
static void
write_result(const CallResult *result)
{
	OrderArguments arguments;

	pack_result(&arguments, result);
	if (arguments_size(&arguments) > dsm_segment_map_length(my_segment))
	{
		CallResult	without = *result;

		without.response = NULL;
		without.error = NULL;
		pack_result(&arguments, &without);
		if (arguments_size(&arguments) > dsm_segment_map_length(my_segment))
			elog(ERROR, "ids of a Stripe operation are too long to be recorded");
		ereport(WARNING,
				(errmsg("the answer to Stripe operation %s is recorded without its body",
						describe_operation(&flight.op)),
				 errdetail("It is larger than what was reserved before the call.")));
	}
	arguments_write(&arguments, dsm_segment_address(my_segment));
}

/* Say why a result is not recorded, or not yet. */
static void
warn_not_recorded(StripeOutcome outcome, WaitResult waited, const char *problem)
{
	if (waited == WAIT_ANSWERED)
		ereport(WARNING,
				(errcode(ERRCODE_CONTRADICTS_RECORD),
				 errmsg("outcome \"%s\" of Stripe operation %s could not be recorded",
						stripe_outcome_name(outcome), describe_operation(&flight.op)),
				 errdetail_internal("%s", problem)));
	else
		ereport(WARNING,
				(errcode(ERRCODE_NO_RECORDER),
				 errmsg("outcome \"%s\" of Stripe operation %s is not recorded yet",
						stripe_outcome_name(outcome), describe_operation(&flight.op)),
				 waited == WAIT_NO_WORKER ?
				 errdetail("There is no free slot for a background process. It will be recorded as soon as there is one; if the server stops before that, the operation counts as unknown.") :
				 errdetail("It will be as soon as the recorder can write its row; if the server stops before that, the operation counts as unknown.")));
}

/*
 * Record what came of the claimed call; see recorder_client.h.
 */
StripeOutcome
recorder_record(const CallResult *result)
{
	StripeOutcome outcome = result->outcome;
	WaitResult	waited;
	const char *problem = NULL;

	if (!flight.active)
		elog(ERROR, "no call to Stripe is in progress");
	if (flight.direct)
		return record_directly(result);

	DEBUG_POINT("before-record");
	write_result(result);
	my_order->token = flight.token;
	flight.active = false;

	waited = submit(ORDER_RECORD, false);
	if (waited == WAIT_ANSWERED)
	{
		if (my_order->answer == ORDER_OK)
			outcome = my_order->outcome;
		else
			problem = pstrdup(my_order->message);
		take_order_back();
	}
	if (waited != WAIT_ANSWERED || problem != NULL)
		warn_not_recorded(outcome, waited, problem);

	DEBUG_POINT("after-record");
	return outcome;
}

/*
 * What is recorded of the last call; see recorder_client.h.
 */
bool
recorder_look(StripeCallClaim *known)
{
	StripeClaim claim;
	Relation	rel = ledger_open(&stripe_calls, AccessShareLock, false);

	memset(&claim, 0, sizeof(claim));
	claim.rules = stripe_rules();
	ledger_look_latest(&stripe_calls, rel, flight.op.key, &claim.row);
	ledger_close(rel);
	if (claim.row.found != FOUND_ROW)
		return false;

	claim.verdict = STRIPE_REPLAY;
	claim.outcome = stripe_row_outcome(&claim.row);
	claim.known = true;
	fill_call_claim(&claim, known);
	return true;
}
