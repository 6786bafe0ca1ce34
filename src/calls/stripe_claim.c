/*-------------------------------------------------------------------------
 *
 * stripe_claim.c
 *	  Claiming a call to Stripe.
 *
 * See stripe_ledger.c for what the states of a row are.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/calls/stripe_claim.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xlog.h"
#include "catalog/pg_type_d.h"
#include "utils/builtins.h"
#include "utils/varlena.h"
#include "utils/xid8.h"

#include "base/arguments.h"
#include "base/compat.h"
#include "base/errors.h"
#include "base/json_member.h"
#include "calls/stripe_claim.h"

/*
 * Attempts whose late answers count.  An operation that stays unknown may be
 * tried again each second, and its row mustn't grow with every try; whoever is
 * so late has an answer that later attempts got as well, by the same key.
 */
#define MAX_PAST_TOKENS 64

/* $1 to $19, which both ways to claim share */
#define CLAIM_NARGS 19
#define CLAIM_ARGTYPES \
	TEXTOID, TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, TIMESTAMPTZOID, \
	INTERVALOID, TEXTOID, BYTEAOID, JSONBOID, TEXTOID, TEXTOID, TEXTOID, BYTEAOID, \
	BOOLOID, INT8OID, TEXTOID, XID8OID, INT8OID

static OwnerStatement insert_claim = {
	"INSERT INTO idempotency.stripe_idempotency_keys"
	" (account, operation_type, operation_id, token, created_at, claimed_at,"
	" first_sent_at, lease_expires_at, lease, attempt, generation, outcome, uncertain,"
	" idempotency_key, fingerprint, request, method, path, api_version, body, livemode,"
	" caller_life, caller_vxid, callers, callers_system)"
	" VALUES ($1, $2, $3, $4, $5, $5, $5, $6, $7, 1, 1, 'in_progress'::idempotency.outcome,"
	" false, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17,"
	" CASE WHEN $18 IS NULL THEN NULL::pg_catalog.xid8[] ELSE ARRAY[$18] END, $19)"
	" ON CONFLICT DO NOTHING",
	CLAIM_NARGS, {CLAIM_ARGTYPES}
};

/*
 * $20: the token that is taken over, $5 is the clock, too.  $8, the key, isn't
 * looked at.  Method, path, version and body belong together: those of the
 * first attempt that has them stay.  A row that a transaction known to have
 * committed, or this one, answers for needs nobody watched.
 */
static OwnerStatement take_over = {
	"UPDATE idempotency.stripe_idempotency_keys SET token = $4, claimed_at = $5,"
	" first_sent_at = COALESCE(first_sent_at, $5), lease_expires_at = $6, lease = $7,"
	" attempt = attempt OPERATOR(pg_catalog.+) 1,"
	" uncertain = uncertain OR NOT (" OUTCOME_IS("not_executed") "),"
	" past_tokens = (pg_catalog.array_append(past_tokens, token))"
	"[COALESCE(pg_catalog.cardinality(past_tokens), 0) OPERATOR(pg_catalog.-) "
	CppAsString2(MAX_PAST_TOKENS) " OPERATOR(pg_catalog.+) 2 :],"
	" outcome = 'in_progress'::idempotency.outcome, recorded_at = NULL,"
	" fingerprint = COALESCE(fingerprint, $9), request = COALESCE(request, $10),"
	" method = CASE WHEN method IS NULL THEN $11 ELSE method END,"
	" path = CASE WHEN method IS NULL THEN $12 ELSE path END,"
	" api_version = CASE WHEN method IS NULL THEN $13 ELSE api_version END,"
	" body = CASE WHEN method IS NULL THEN $14 ELSE body END,"
	" livemode = COALESCE(livemode, $15), caller_life = $16, caller_vxid = $17,"
	" callers = CASE WHEN callers IS NULL OR $18 IS NULL THEN NULL::pg_catalog.xid8[]"
	" WHEN callers_system OPERATOR(pg_catalog.=) $19"
	" THEN pg_catalog.array_append(callers, $18) ELSE ARRAY[$18] END,"
	" callers_system = $19"
	STRIPE_WHERE_KEY
	" AND token OPERATOR(pg_catalog.=) $20"
	" AND $8 IS NULL"
	" AND (" OUTCOME_IS("not_executed") " OR " OUTCOME_IS("unknown")
	" OR (" OUTCOME_IS("in_progress")
	" AND (lease_expires_at OPERATOR(pg_catalog.<=) $5 OR caller_life IS NOT NULL)))",
	CLAIM_NARGS + 1, {CLAIM_ARGTYPES, INT8OID}
};

static OwnerStatement renew_claim = {
	"UPDATE idempotency.stripe_idempotency_keys SET lease_expires_at = $5"
	STRIPE_WHERE_KEY " AND token OPERATOR(pg_catalog.=) $4 AND " OUTCOME_IS("in_progress"),
	5, {TEXTOID, TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID}
};

/*
 * The member names that don't take part in the comparison.
 */
static void
set_ignored(RequestPrint *print, const char *list)
{
	List	   *names;
	ListCell   *lc;
	const char **ignore;
	int			n = 0;

	if (!SplitGUCList(pstrdup(list), ',', &names))
		elog(ERROR, "invalid list syntax in parameter \"idempotency.stripe_compare_ignore\"");

	ignore = palloc(Max(list_length(names), 1) * sizeof(char *));
	foreach(lc, names)
		ignore[n++] = lfirst(lc);
	print->ignore = ignore;
	print->nignore = n;
}

/* Everything that is known of an operation which this caller doesn't run. */
static void
answer_known(StripeClaim *claim, StripeVerdict verdict, LedgerRow *row)
{
	claim->verdict = verdict;
	claim->outcome = stripe_row_outcome(row);
	claim->known = true;
	claim->row = *row;
}

static void
busy(LedgerClaim *base)
{
	StripeClaim *claim = (StripeClaim *) base;

	claim->verdict = STRIPE_BUSY;
	claim->outcome = STRIPE_IN_PROGRESS;
	claim->retry_after = 1;
	claim->known = false;
}

/*
 * Is this the request of the row, to the byte?  Most retries say exactly what
 * was said before, and need no fingerprint, which is the dearest part of a
 * replay.
 */
static bool
is_recorded_request(StripeClaim *claim, LedgerRow *row)
{
	Jsonb	   *recorded;

	if (claim->request == NULL || row->isnull[S_REQUEST])
		return false;
	recorded = DatumGetJsonbP(row->values[S_REQUEST]);
	return VARSIZE(recorded) == VARSIZE(claim->request) &&
		memcmp(recorded, claim->request, VARSIZE(recorded)) == 0;
}

static LedgerDecision
decide(LedgerClaim *base, LedgerRow *row, TimestampTz now)
{
	StripeClaim *claim = (StripeClaim *) base;
	StripeOutcome outcome = stripe_row_outcome(row);

	if (!row->isnull[S_FINGERPRINT] && !is_recorded_request(claim, row) &&
		!request_matches(&claim->print, DatumGetByteaPP(row->values[S_FINGERPRINT])))
	{
		answer_known(claim, STRIPE_OTHER_REQUEST, row);
		return LEDGER_ANSWER;
	}

	if (stripe_row_is_final(row))
	{
		answer_known(claim, STRIPE_REPLAY, row);
		return LEDGER_ANSWER;
	}

	if (stripe_row_is_held(row, now) ||
		(row->own && outcome == STRIPE_IN_PROGRESS))
	{
		answer_known(claim, STRIPE_BUSY, row);
		claim->retry_after = row->isnull[S_LEASE_EXPIRES_AT] ? 1 :
			ledger_retry_after(DatumGetTimestampTz(row->values[S_LEASE_EXPIRES_AT]), now);
		return LEDGER_ANSWER;
	}

	if (!stripe_resend_may_settle(row, claim->rules.resend_margin, now))
	{
		answer_known(claim, STRIPE_CANT_TELL, row);
		if (outcome != STRIPE_MISMATCH)
			claim->outcome = STRIPE_UNKNOWN;
		return LEDGER_ANSWER;
	}

	/* one mode's attempt says nothing about the other's */
	if (livemodes_differ(claim->send.livemode, stripe_row_livemode(row)))
		ereport(ERROR,
				(errcode(ERRCODE_CONTRADICTS_RECORD),
				 errmsg("Stripe operation %s was begun in %s mode", describe_operation(claim->op),
						claim->send.livemode == LIVEMODE_LIVE ? "test" : "live"),
				 errdetail("It cannot be continued with an API key of the other mode.")));

	return LEDGER_TAKE;
}

/*
 * $1 to $19, which both ways to claim share, with a new token.  "key" is NULL
 * where the row has its key.
 */
static void
claim_parameters(StripeClaim *claim, const char *key, TimestampTz now, Parameters *p)
{
	const CallRequest *send = &claim->send;
	bool		leased = claim->lease > 0;
	bool		called = claim->caller_life != 0;
	bool		watched = FullTransactionIdIsValid(claim->caller_xid);

	claim->token = ledger_new_token();

	parameters_begin(p, claim->op->key, lengthof(claim->op->key));
	parameter_int64(p, claim->token);
	parameter_timestamp(p, now);
	parameter_nullable(p, TimestampTzGetDatum(now + claim->lease), !leased);
	parameter_nullable(p, leased ? interval_datum(claim->lease) : (Datum) 0, !leased);
	parameter_string(p, key);
	parameter_pointer(p, request_print(&claim->print));
	parameter_pointer(p, claim->request);
	parameter_string(p, send->method);
	parameter_string(p, send->path);
	parameter_string(p, send->api_version);
	parameter_pointer(p, send->body);
	parameter_livemode(p, send->livemode);
	parameter_nullable(p, Int64GetDatum(claim->caller_life), !called);
	parameter_string(p, called ? claim->caller_vxid : NULL);
	parameter_nullable(p, FullTransactionIdGetDatum(claim->caller_xid), !watched);
	parameter_nullable(p, Int64GetDatum((int64) GetSystemIdentifier()), !watched);
}

static void
answer_claimed(StripeClaim *claim)
{
	claim->verdict = STRIPE_CLAIMED;
	claim->outcome = STRIPE_IN_PROGRESS;
}

static bool
insert(LedgerClaim *base, Relation rel, TimestampTz now)
{
	StripeClaim *claim = (StripeClaim *) base;
	Parameters	p;

	if (claim->resend)
		stripe_refuse_unclaimed(claim->op);

	/* the key that is derived here is kept for ever */
	namespace_write_down();

	claim_parameters(claim, derive_stripe_key(claim->op->ns.value, NAMESPACE_LEN,
											  claim->op->account, claim->op->type,
											  claim->op->id, 1), now, &p);
	if (ledger_execute(rel, &insert_claim, p.values, p.nulls, NULL, NULL, 0) == 0)
		return false;

	answer_claimed(claim);
	return true;
}

static bool
take(LedgerClaim *base, Relation rel, LedgerRow *row, TimestampTz now)
{
	StripeClaim *claim = (StripeClaim *) base;
	Parameters	p;

	claim_parameters(claim, NULL, now, &p);
	parameter_datum(&p, row->values[S_TOKEN]);
	if (ledger_execute(rel, &take_over, p.values, p.nulls, NULL, NULL, 0) == 0)
		return false;

	answer_claimed(claim);
	return true;
}

static void
renew(LedgerClaim *base, Relation rel, TimestampTz now)
{
	StripeClaim *claim = (StripeClaim *) base;
	Parameters	p;

	if (claim->lease == 0)
		return;
	stripe_token_parameters(claim->op, claim->token, &p);
	parameter_timestamp(&p, now + claim->lease);
	if (ledger_execute(rel, &renew_claim, p.values, p.nulls, NULL, NULL, 0) != 1)
		elog(ERROR, "lost a claim of this transaction");
}

/*
 * Fill in what follows from the arguments, which the caller has set.
 */
void
stripe_claim_init(StripeClaim *claim)
{
	memcpy(claim->base.key, claim->op->key, sizeof(claim->op->key));
	claim->base.decide = decide;
	claim->base.insert = insert;
	claim->base.take = take;
	claim->base.renew = renew;
	claim->base.busy = busy;
	claim->print.request = claim->request;
	claim->print.print = NULL;
	set_ignored(&claim->print, claim->rules.compare_ignore);
}

/*
 * Claim in this transaction.
 */
void
stripe_claim_run(StripeClaim *claim, Relation rel)
{
	claim->token = 0;
	ledger_claim(&stripe_calls, rel, &claim->base);
	if (claim->verdict != STRIPE_CLAIMED)
		claim->token = 0;
}

/*
 * Raise IK006 where this transaction itself has written a row: nobody else
 * could commit a change of it.
 */
static void
refuse_own_row(Operation *op, LedgerRow *row)
{
	if (row->found == FOUND_ROW && row->own)
		ereport(ERROR,
				(errcode(ERRCODE_NOT_IN_TRANSACTION),
				 errmsg("this transaction has changed Stripe operation %s and is not committed",
						describe_operation(op)),
				 errdetail("What is to be noted of it must be committed at once, by another transaction."),
				 errhint("Commit first.")));
}

void
stripe_refuse_own_row(Relation rel, Operation *op)
{
	LedgerRow	row;

	ledger_look_latest(&stripe_calls, rel, op->key, &row);
	refuse_own_row(op, &row);
}

/*
 * Answer a claim by a look at what is committed now, if that will do;
 * otherwise set wants_write.  Raises IK006 as above.
 *
 * A row that can be taken over while somebody is writing it isn't called busy
 * here: mostly that is the recorder, noting how its last caller has ended, and
 * the recorder has done so when it comes to this claim.
 */
void
stripe_claim_look(StripeClaim *claim, Relation rel)
{
	LedgerRow	row;

	claim->wants_write = false;
	claim->token = 0;
	ledger_look_latest(&stripe_calls, rel, claim->op->key, &row);

	refuse_own_row(claim->op, &row);
	if (row.found == FOUND_ROW &&
		decide(&claim->base, &row, GetCurrentTimestamp()) == LEDGER_ANSWER)
		return;
	if (row.found == FOUND_TWIN)
		busy(&claim->base);
	else if (row.found != FOUND_ROW && claim->resend)
		stripe_refuse_unclaimed(claim->op);
	else
		claim->wants_write = true;
}

/*
 * The row of a claim that was made: what to send.
 */
void
stripe_claim_fetch(StripeClaim *claim, Relation rel)
{
	ledger_look_latest(&stripe_calls, rel, claim->op->key, &claim->row);
	claim->known = true;
	if (claim->row.found != FOUND_ROW ||
		DatumGetInt64(claim->row.values[S_TOKEN]) != claim->token)
		stripe_refuse_token(claim->op, &claim->row);
}

/*
 * The caller hears of a refusal that stands, though perhaps it has corrected what
 * was refused.  Say how a corrected request comes to be sent: Stripe may have saved
 * the refusal under the key, so that isn't done unasked.  A declined card isn't
 * wrong, so nothing is said of it, but where another request was given.
 */
void
stripe_advise_reopen(StripeClaim *claim)
{
	JsonbContainer *error = NULL;
	char	   *type;

	if (!claim->known || claim->outcome != STRIPE_FAILED ||
		(claim->verdict != STRIPE_REPLAY && claim->verdict != STRIPE_OTHER_REQUEST))
		return;
	if (!claim->row.isnull[S_ERROR])
		error = &DatumGetJsonbP(claim->row.values[S_ERROR])->root;
	type = json_string_member(error, "type");
	if (claim->verdict == STRIPE_REPLAY &&
		(type == NULL || strcmp(type, "invalid_request_error") != 0))
		return;

	ereport(NOTICE,
			(claim->verdict == STRIPE_REPLAY ?
			 errmsg("Stripe has refused operation %s as invalid, and that stands",
					describe_operation(claim->op)) :
			 errmsg("Stripe operation %s has failed with another request, and that stands",
					describe_operation(claim->op)),
			 errhint("A corrected request is sent with a new key, after idempotency.stripe_reopen(%s, %s, account => %s, from_generation => %d).",
					 quote_literal_cstr(claim->op->type), quote_literal_cstr(claim->op->id),
					 quote_literal_cstr(claim->op->account),
					 DatumGetInt32(claim->row.values[S_GENERATION]))));
}

/*
 * Give a claim its lease anew, before its holder knows of it.  Returns false where
 * it isn't in progress with this token any more.
 */
bool
stripe_renew_run(Relation rel, Operation *op, int64 token, TimestampTz until)
{
	Parameters	p;

	stripe_token_parameters(op, token, &p);
	parameter_timestamp(&p, until);
	return ledger_execute_latest(rel, &renew_claim, p.values, p.nulls, NULL, NULL, 0) > 0;
}
