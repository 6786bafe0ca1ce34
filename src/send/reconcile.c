/*-------------------------------------------------------------------------
 *
 * reconcile.c
 *	  Finding out at Stripe what came of calls that nobody knows about.
 *
 * stripe_reconcile() only reads at Stripe, and never sends a call again.  It
 * asks about one operation after the other, beginning with the one that was
 * asked about longest ago (reconcile_search.c).  What was asked, how far it
 * went and what was found is kept in the row's column "reconciled", and the
 * next call goes on with a list that was cut (reconcile_evidence.c).
 *
 * A row of one mode is not asked about with a key of the other.
 *
 * All requests are made first, and the rows are written after the last one, in
 * the caller's transaction: while Stripe is asked no row is locked, and whoever
 * learns of the outcome meanwhile is free to record it.  A row that is no
 * longer as it was, or that somebody has locked, is left alone.  So a rollback
 * loses nothing but what can be read again.
 *
 * An operation whose row cannot be written, because a user's trigger refuses
 * it, is passed over with a WARNING: otherwise it would be the first again, and
 * those behind it would never have their turn.  So is one that an open
 * transaction is changing.
 *
 * Rate limiting, a permission error, or no answer at all ends the search; what
 * went wrong is evidence, not an error.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/send/reconcile.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type_d.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/tuplestore.h"

#include "base/arguments.h"
#include "base/debug_point.h"
#include "base/errors.h"
#include "base/json_member.h"
#include "base/parameters.h"
#include "base/result_row.h"
#include "base/subtransaction.h"
#include "calls/settle_by_event.h"
#include "calls/stripe_ledger.h"
#include "events/kept_events.h"
#include "send/http_client.h"
#include "send/reconcile.h"
#include "send/stripe_call.h"
#include "send/stripe_request.h"

PG_FUNCTION_INFO_V1(idempotency_stripe_reconcile);

#define MAX_REQUESTS 1000

/*
 * $2 and $3 are empty if any type and id will do; $4 is the mode of the API
 * key.  Operations that somebody holds are left out here, so that they do not
 * use up the limit.
 */
static OwnerStatement find_doubts = {
	"SELECT operation_type, operation_id FROM idempotency.stripe_idempotency_keys"
	" WHERE account OPERATOR(pg_catalog.=) $1"
	" AND ($2 OPERATOR(pg_catalog.=) '' OR operation_type OPERATOR(pg_catalog.=) $2)"
	" AND ($3 OPERATOR(pg_catalog.=) '' OR operation_id OPERATOR(pg_catalog.=) $3)"
	" AND (livemode IS NULL OR livemode OPERATOR(pg_catalog.=) $4)"
	" AND (" OUTCOME_IS("unknown") " OR " OUTCOME_IS("in_progress") ")"
	" AND (" OUTCOME_IS("unknown")
	" OR idempotency.stripe_has_lapsed(lease_expires_at, caller_life, caller_vxid))"
	" ORDER BY (reconciled OPERATOR(pg_catalog.->>) 'at'::pg_catalog.text)::pg_catalog.timestamptz"
	" NULLS FIRST, first_sent_at NULLS FIRST, operation_type, operation_id LIMIT $5",
	5, {TEXTOID, TEXTOID, TEXTOID, BOOLOID, INT8OID}
};

/* Names of operations: a list of lists of type and id. */
typedef struct Names
{
	List	   *list;
	MemoryContext context;
} Names;

/* Callback of owner_select(): keep the name in a row. */
static void
append_name(HeapTuple tuple, TupleDesc desc, void *arg)
{
	Names	   *names = arg;
	MemoryContext old = MemoryContextSwitchTo(names->context);
	bool		isnull;
	char	   *type = TextDatumGetCString(heap_getattr(tuple, 1, desc, &isnull));
	char	   *id = TextDatumGetCString(heap_getattr(tuple, 2, desc, &isnull));

	names->list = lappend(names->list, list_make2(type, id));
	MemoryContextSwitchTo(old);
}

/* Return a row of the result; resource_id and evidence may be NULL. */
static void
put_row(ReturnSetInfo *rsinfo, Operation *op, StripeOutcome outcome, const char *resource_id,
		Jsonb *evidence)
{
	Datum		values[6];
	bool		nulls[6] = {false};

	values[0] = CStringGetTextDatum(op->account);
	values[1] = CStringGetTextDatum(op->type);
	values[2] = CStringGetTextDatum(op->id);
	values[3] = enum_datum(TupleDescAttr(rsinfo->setDesc, 3)->atttypid,
						   stripe_outcome_name(outcome));
	nulls[4] = resource_id == NULL;
	values[4] = nulls[4] ? (Datum) 0 : CStringGetTextDatum(resource_id);
	nulls[5] = evidence == NULL;
	values[5] = PointerGetDatum(evidence);
	tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
}

/*
 * Return an operation as its row has it.  One in progress that nobody holds
 * counts as unknown.
 */
static void
put_recorded(ReturnSetInfo *rsinfo, Operation *op, LedgerRow *row, Jsonb *evidence)
{
	StripeOutcome outcome = stripe_row_outcome(row);

	if (outcome == STRIPE_IN_PROGRESS && !stripe_row_is_held(row, GetCurrentTimestamp()))
		outcome = STRIPE_UNKNOWN;
	if (evidence == NULL && stripe_row_is_final(row) && !row->isnull[S_SETTLED])
		evidence = json_member_copy(&DatumGetJsonbP(row->values[S_SETTLED])->root, "evidence");
	put_row(rsinfo, op, outcome, stripe_row_string(row, S_RESOURCE_ID), evidence);
}

/* Write down what was found, mostly in a subtransaction. */
static void
write_doubt(void *arg)
{
	Doubt	   *doubt = arg;

	if (doubt->told)
		(void) settle_by_kept_events(doubt->op.key, 0, false);
	else
		doubt->kept = settle_by_finding(doubt->op.key, doubt->token, &doubt->finding);
}

/*
 * Write down what came of asking about an operation.  If the caller has named
 * this "one", whatever keeps it from being written is an error, otherwise a
 * WARNING.
 */
static void
keep_doubt(Doubt *doubt, bool one)
{
	ErrorData  *error;

	doubt->kept = false;
	if (one)
	{
		write_doubt(doubt);
		return;
	}
	error = try_in_subtransaction(write_doubt, doubt);
	if (error != NULL)
	{
		doubt->kept = false;
		ereport(WARNING,
				(errcode(error->sqlerrcode),
				 errmsg("what was found out about Stripe operation %s could not be written down: %s",
						describe_operation(&doubt->op), error->message)));
	}
}

/*
 * Write down what came of asking about an operation, and return its row.
 */
static void
finish_doubt(Reconcile *r, Doubt *doubt, Relation rel, bool one, ReturnSetInfo *rsinfo)
{
	Jsonb	   *json = NULL;
	LedgerRow	row;

	if (doubt->told)
		keep_doubt(doubt, one);
	else
	{
		bool		kept = false;

		json = reconcile_evidence(r, doubt, true);
		if (!doubt->known)
			memset(&doubt->finding, 0, sizeof(Finding));
		doubt->finding.by = "stripe_reconcile";
		doubt->finding.evidence = json;
		if (doubt->asked)
		{
			keep_doubt(doubt, one);
			kept = doubt->kept;
		}
		if (kept && doubt->known)
		{
			put_row(rsinfo, &doubt->op, doubt->finding.result.outcome,
					doubt->finding.result.resource_id, json);
			return;
		}
		if (!kept)
			json = reconcile_evidence(r, doubt, false);
	}
	ledger_look_latest(&stripe_calls, rel, doubt->op.key, &row);
	if (row.found == FOUND_ROW)
		put_recorded(rsinfo, &doubt->op, &row, json);
}

/*
 * The operations to ask about.
 */
static List *
list_doubts(Reconcile *r, Relation rel, const char *account, const char *type, const char *id)
{
	Names		names = {NIL, CurrentMemoryContext};
	Parameters	parameters;

	parameters_begin(&parameters, NULL, 0);
	parameter_string(&parameters, account);
	parameter_string(&parameters, type);
	parameter_string(&parameters, id);
	parameter_bool(&parameters, r->key.live);
	parameter_int64(&parameters, r->left);
	owner_select(&find_doubts, rel->rd_rel->relowner, parameters.values, append_name, &names);
	return names.list;
}

/*
 * May Stripe know more of an operation than its row?  A caller who names "one"
 * may also ask about a call that is recorded as not executed, if it was sent.
 */
static bool
is_doubtful(LedgerRow *row, bool one, TimestampTz now)
{
	StripeOutcome outcome = stripe_row_outcome(row);

	if (outcome == STRIPE_NOT_EXECUTED)
		return one && !row->isnull[S_FIRST_SENT_AT];
	return outcome == STRIPE_UNKNOWN ||
		(outcome == STRIPE_IN_PROGRESS && !stripe_row_is_held(row, now));
}

/*
 * Ask about the operations of a list, then write down and return what was
 * found.  With "one", the only one was named by the caller.
 */
static void
reconcile(Reconcile *r, Relation rel, List *names, const char *account, bool one,
		  ReturnSetInfo *rsinfo)
{
	List	   *doubts = NIL;
	ListCell   *lc;

	foreach(lc, names)
	{
		List	   *name = lfirst(lc);
		Doubt	   *doubt = palloc0(sizeof(Doubt));
		TimestampTz now;
		LedgerRow	row;

		if (r->left <= 0 || r->stopped != NULL)
			break;
		operation_init(&doubt->op, linitial(name), lsecond(name), account);
		ledger_look_latest(&stripe_calls, rel, doubt->op.key, &row);
		now = GetCurrentTimestamp();
		if (row.found != FOUND_ROW)
		{
			if (one)
				stripe_refuse_unclaimed(&doubt->op);
			continue;
		}
		if (!is_doubtful(&row, one, now))
		{
			if (one)
				put_recorded(rsinfo, &doubt->op, &row, NULL);
			continue;
		}
		if (livemodes_differ(stripe_row_livemode(&row), livemode_of(r->key.live)))
		{
			if (!one)
				continue;
			doubt->skipped = "it belongs to the other mode than the API key";
		}
		else
		{
			reconcile_read(r, doubt, &row, now);
			reconcile_ask(r, doubt);
		}
		doubts = lappend(doubts, doubt);
	}

	DEBUG_POINT("reconcile-asked");
	foreach(lc, doubts)
		finish_doubt(r, lfirst(lc), rel, one, rsinfo);
}

/* A text argument, or "" if it was left out. */
static char *
optional_text(FunctionCallInfo fcinfo, int argno)
{
	return PG_ARGISNULL(argno) ? "" : text_to_cstring(PG_GETARG_TEXT_PP(argno));
}

/*
 * stripe_reconcile(operation_type, operation_id, account, max_requests)
 */
Datum
idempotency_stripe_reconcile(PG_FUNCTION_ARGS)
{
	Reconcile	r;
	Namespace	ns;
	Relation	rel;
	char	   *type;
	char	   *id;
	char	   *account;
	bool		one;

	PreventCommandDuringRecovery("idempotency.stripe_reconcile()");
	PreventCommandIfReadOnly("idempotency.stripe_reconcile()");

	type = optional_text(fcinfo, 0);
	id = optional_text(fcinfo, 1);
	account = text_to_cstring(argument_text(fcinfo, 2, "account"));
	check_account(account);
	one = !PG_ARGISNULL(1);
	if (one && PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("operation_id must not be given without operation_type")));
	if (!PG_ARGISNULL(0))
	{
		Operation	op;

		operation_init(&op, type, one ? id : "any", account);
	}
	memset(&r, 0, sizeof(r));
	r.left = PG_ARGISNULL(3) ? 0 : PG_GETARG_INT32(3);
	if (r.left < 1 || r.left > MAX_REQUESTS)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("max_requests must be from 1 to %d", MAX_REQUESTS)));

	namespace_for_stripe(&ns);
	check_stripe_settings();
	InitMaterializedSRF(fcinfo, 0);
	r.keep = CurrentMemoryContext;
	r.work = AllocSetContextCreate(CurrentMemoryContext, "answer of Stripe",
								   ALLOCSET_DEFAULT_SIZES);
	rel = ledger_open(&stripe_calls, RowExclusiveLock, false);

	/* what is missing is an error before a secret is in memory */
	(void) http_client();
	api_key_read(&r.key);
	PG_TRY();
	{
		exchange_check_key(&r.key);
		reconcile(&r, rel, one ? list_make1(list_make2(type, id)) :
				  list_doubts(&r, rel, account, type, id), account, one,
				  (ReturnSetInfo *) fcinfo->resultinfo);
	}
	PG_FINALLY();
	{
		api_key_wipe(&r.key);
	}
	PG_END_TRY();

	ledger_close(rel);
	return (Datum) 0;
}
