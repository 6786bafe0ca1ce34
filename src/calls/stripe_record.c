/*-------------------------------------------------------------------------
 *
 * stripe_record.c
 *	  What the holder of a claim may do: record, release, extend; and reopening.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/calls/stripe_record.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type_d.h"
#include "utils/array.h"
#include "utils/builtins.h"

#include "base/arguments.h"
#include "base/errors.h"
#include "base/result_row.h"
#include "calls/stripe_record.h"
#include "stripe/stripe_answer.h"

/* Statuses with a meaning of their own */
#define HTTP_OK 200
#define HTTP_NO_CONTENT 204
#define HTTP_BAD_REQUEST 400

/*
 * $6 is the outcome of this answer.  It makes the operation free only where no
 * attempt before may have been executed; and an outcome that isn't known stays
 * uncertain whatever this token records next, but for a definitive one.
 * $14: may this attempt have left?  $15: the transaction that records answers for
 * the row by itself.  $16: what the object's status is.
 */
static OwnerStatement record_outcome = {
	"UPDATE idempotency.stripe_idempotency_keys SET recorded_at = $5,"
	" outcome = CASE WHEN $6 OPERATOR(pg_catalog.=) 'not_executed' AND uncertain"
	" THEN 'unknown'::idempotency.outcome ELSE $6::idempotency.outcome END,"
	" uncertain = uncertain OR $6 OPERATOR(pg_catalog.=) 'unknown',"
	" resource_id = COALESCE($7, resource_id),"
	" resource_type = " OF_RESOURCE("resource_type", "$7", "$8") ","
	" resource_status = $16,"
	" http_status = $9, response = " WITHOUT_SECRET("$10") ", error = $11,"
	" request_id = COALESCE($12, request_id), livemode = COALESCE($13, livemode),"
	" first_sent_at = CASE WHEN NOT $14 AND first_sent_at OPERATOR(pg_catalog.=) claimed_at"
	" THEN NULL ELSE first_sent_at END,"
	" callers = CASE WHEN $15 THEN NULL ELSE callers END,"
	" lease = NULL, lease_expires_at = NULL, caller_life = NULL, caller_vxid = NULL"
	STRIPE_WHERE_KEY
	" AND token OPERATOR(pg_catalog.=) $4"
	" AND NOT (" OUTCOME_IS("completed") " OR " OUTCOME_IS("failed") ")"
	" RETURNING outcome, uncertain, resource_id",
	16, {TEXTOID, TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, TEXTOID, TEXTOID,
	TEXTOID, INT4OID, JSONBOID, JSONBOID, TEXTOID, BOOLOID, BOOLOID, BOOLOID, TEXTOID}
};

static OwnerStatement release_claim = {
	"UPDATE idempotency.stripe_idempotency_keys SET"
	" outcome = CASE WHEN uncertain THEN 'unknown'::idempotency.outcome"
	" ELSE 'not_executed'::idempotency.outcome END,"
	" first_sent_at = CASE WHEN first_sent_at OPERATOR(pg_catalog.=) claimed_at"
	" THEN NULL ELSE first_sent_at END,"
	" lease = NULL, lease_expires_at = NULL, caller_life = NULL, caller_vxid = NULL"
	STRIPE_WHERE_KEY " AND token OPERATOR(pg_catalog.=) $4 AND " OUTCOME_IS("in_progress"),
	4, {TEXTOID, TEXTOID, TEXTOID, INT8OID}
};

static OwnerStatement extend_lease = {
	"UPDATE idempotency.stripe_idempotency_keys SET lease = COALESCE($6, lease),"
	" lease_expires_at = $5 OPERATOR(pg_catalog.+) COALESCE($6, lease)"
	STRIPE_WHERE_KEY " AND token OPERATOR(pg_catalog.=) $4 AND " OUTCOME_IS("in_progress")
	" RETURNING lease_expires_at",
	6, {TEXTOID, TEXTOID, TEXTOID, INT8OID, TIMESTAMPTZOID, INTERVALOID}
};

/* $4: the new token, $5: the one that is there, $8: the outcome that is there */
static OwnerStatement reopen = {
	"UPDATE idempotency.stripe_idempotency_keys SET"
	" history = COALESCE(history, '[]'::pg_catalog.jsonb) OPERATOR(pg_catalog.||)"
	" pg_catalog.jsonb_build_object('generation', generation,"
	" 'idempotency_key', idempotency_key, 'attempts', attempt, 'outcome', outcome,"
	" 'http_status', http_status, 'resource_id', resource_id,"
	" 'resource_type', resource_type, 'resource_status', resource_status, 'request_id', request_id, 'error', error,"
	" 'first_sent_at', first_sent_at, 'recorded_at', recorded_at, 'reopened_at', $6,"
	" 'reopened_by', $9, 'forced', $10, 'settled', settled, 'acknowledged', acknowledged,"
	" 'reconciled', reconciled),"
	" token = $4, attempt = 0, generation = generation OPERATOR(pg_catalog.+) 1,"
	" idempotency_key = $7, outcome = 'not_executed'::idempotency.outcome,"
	" uncertain = false, past_tokens = NULL, lease = NULL, lease_expires_at = NULL,"
	" first_sent_at = NULL, recorded_at = NULL, http_status = NULL, livemode = NULL,"
	" resource_id = NULL, resource_type = NULL, resource_status = NULL, request_id = NULL,"
	" fingerprint = NULL,"
	" request = NULL, response = NULL, error = NULL, method = NULL, path = NULL,"
	" api_version = NULL, body = NULL, caller_life = NULL, caller_vxid = NULL,"
	" callers = '{}'::pg_catalog.xid8[], settled = NULL, acknowledged = NULL,"
	" reconciled = NULL"
	STRIPE_WHERE_KEY
	" AND token OPERATOR(pg_catalog.=) $5"
	" AND outcome OPERATOR(pg_catalog.=) $8::idempotency.outcome",
	10, {TEXTOID, TEXTOID, TEXTOID, INT8OID, INT8OID, TIMESTAMPTZOID, TEXTOID,
	TEXTOID, TEXTOID, BOOLOID}
};

/* ---------- what the holder of a token does ---------- */

/* Is this the token of an earlier attempt of the same generation? */
static bool
is_past_token(LedgerRow *row, int64 token)
{
	Datum	   *tokens;
	int			ntokens;
	int			i;

	if (row->isnull[S_PAST_TOKENS])
		return false;
	deconstruct_array(DatumGetArrayTypeP(row->values[S_PAST_TOKENS]), INT8OID,
					  sizeof(int64), FLOAT8PASSBYVAL, TYPALIGN_DOUBLE,
					  &tokens, NULL, &ntokens);
	for (i = 0; i < ntokens; i++)
	{
		if (DatumGetInt64(tokens[i]) == token)
			return true;
	}
	return false;
}

/*
 * A fenced statement that needs the operation in progress found no row.  Raise
 * the reason; return where the row is as the statement wants it after all.
 */
void
stripe_explain_refusal(Relation rel, Operation *op, int64 token)
{
	LedgerRow	row;
	StripeOutcome outcome;

	ledger_look_latest(&stripe_calls, rel, op->key, &row);
	if (row.found != FOUND_ROW || DatumGetInt64(row.values[S_TOKEN]) != token)
		stripe_refuse_token(op, &row);

	outcome = stripe_recorded_outcome(&row);
	if (outcome != STRIPE_IN_PROGRESS)
		ereport(ERROR,
				(errcode(ERRCODE_CONTRADICTS_RECORD),
				 errmsg("Stripe operation %s is no longer in progress", describe_operation(op)),
				 errdetail("Its outcome is recorded as %s.", stripe_outcome_name(outcome))));
}

/*
 * Make out an answer: the body and status as the application got them, 0 for
 * no status.  Without one, something with an id is taken for a success, and all
 * else for no answer.  Of a body that isn't Stripe's nothing is kept, but for
 * its error object.
 */
static void
read_answer(StripeReceived *received, Jsonb *response, CallResult *result)
{
	StripeBody	body;
	StripeAnswer answer;

	stripe_read_body(response, &body);
	memset(result, 0, sizeof(CallResult));
	result->sent = true;
	result->http_status = received->http_status;
	if (received->http_status == 0 && body.error == NULL &&
		(received->resource_id != NULL || body.resource_id != NULL))
		received->http_status = HTTP_OK;
	received->sent = received->whole = true;
	result->outcome = stripe_judge(received, &body, &answer).outcome;

	stripe_body_result(&body, answer.genuine, result);
	if (received->resource_id != NULL)
		result->resource_id = received->resource_id;
}

/*
 * An answer to an operation's call, as the holder of a token tells it.  What no
 * content and a refusal mean takes to know the call, so that the row is looked at
 * for these alone.  Whether an attempt before may have been executed, the row
 * says of its latest attempt only.  A token of 0 is a person's word for all of
 * them.
 */
void
stripe_read_answer_of(Relation rel, Operation *op, int64 token, Jsonb *response, int http_status,
					  const char *resource_id, CallResult *result)
{
	StripeReceived received;
	LedgerRow	row;

	memset(&received, 0, sizeof(received));
	received.http_status = http_status;
	received.resource_id = resource_id;
	if (http_status == HTTP_NO_CONTENT || http_status >= HTTP_BAD_REQUEST)
	{
		ledger_look_latest(&stripe_calls, rel, op->key, &row);
		if (row.found == FOUND_ROW)
		{
			stripe_row_received(&row, &received);
			if (token == 0)
				received.uncertain = false;
			else if (DatumGetInt64(row.values[S_TOKEN]) != token)
			{
				received.uncertain = false;
				received.overtaken = true;
			}
		}
	}
	read_answer(&received, response, result);
}

/* Does a definitive result say something else than what is recorded? */
static bool
contradicts(LedgerRow *row, const CallResult *result)
{
	if (stripe_recorded_outcome(row) != result->outcome)
		return true;
	return result->resource_id != NULL && !row->isnull[S_RESOURCE_ID] &&
		strcmp(TextDatumGetCString(row->values[S_RESOURCE_ID]), result->resource_id) != 0;
}

/*
 * Recording found no unrecorded row of this token.  Returns true where it
 * should be tried (again) with the token *as; otherwise nothing is left to do
 * and the row has what stands.  Raises IK001 or IK002 where the result can't
 * stand.
 */
static bool
record_late(Relation rel, Operation *op, int64 token, const CallResult *result,
			LedgerRow *row, int64 *as)
{
	bool		current;

	ledger_look_latest(&stripe_calls, rel, op->key, row);
	if (row->found != FOUND_ROW)
		stripe_refuse_token(op, row);
	current = DatumGetInt64(row->values[S_TOKEN]) == token;
	if (!current && !is_past_token(row, token))
		stripe_refuse_token(op, row);

	if (stripe_row_is_final(row))
	{
		/* who knows less than what is recorded doesn't contradict it */
		if (!stripe_is_definitive(result->outcome) || !contradicts(row, result))
			return false;
		if (!current)
			stripe_refuse_token(op, row);
		ereport(ERROR,
				(errcode(ERRCODE_CONTRADICTS_RECORD),
				 errmsg("another result of Stripe operation %s is recorded already",
						describe_operation(op)),
				 errdetail("Its outcome is recorded as %s, with resource %s.",
						   stripe_outcome_name(stripe_recorded_outcome(row)),
						   row->isnull[S_RESOURCE_ID] ? "none" :
						   TextDatumGetCString(row->values[S_RESOURCE_ID]))));
	}

	/* a late token settles the operation, but doesn't speak for its successor */
	if (!current && !stripe_is_definitive(result->outcome))
		return false;

	*as = DatumGetInt64(row->values[S_TOKEN]);
	return true;
}

/*
 * Record what the holder of a token got for an answer; "adopt": the transaction
 * records its own work with it.  Returns the outcome that stands.
 */
StripeOutcome
stripe_record_run(Relation rel, Operation *op, int64 token, const CallResult *result, bool adopt)
{
	int64		as = token;
	int			races = 0;

	for (;;)
	{
		Parameters	p;
		LedgerRow	row;
		Datum		out[3];
		bool		isnull[3];

		stripe_token_parameters(op, as, &p);
		parameter_timestamp(&p, GetCurrentTimestamp());
		parameter_outcome(&p, result->outcome);
		parameter_string(&p, result->resource_id);
		parameter_string(&p, result->resource_type);
		parameter_nullable(&p, Int32GetDatum(result->http_status), result->http_status == 0);
		parameter_pointer(&p, result->response);
		parameter_pointer(&p, result->error);
		parameter_string(&p, result->request_id);
		parameter_livemode(&p, result->livemode);
		parameter_bool(&p, result->sent);
		parameter_bool(&p, adopt);
		parameter_string(&p, result->resource_status);
		if (ledger_execute_latest(rel, &record_outcome, p.values, p.nulls, out, isnull, 3) > 0)
		{
			/* an earlier attempt left it in doubt, and this is the end of it */
			if (stripe_is_definitive(result->outcome) && DatumGetBool(out[1]))
				stripe_notify_settled(op, result->outcome,
									  isnull[2] ? NULL : TextDatumGetCString(out[2]));
			return stripe_outcome_by_name(enum_label(out[0]));
		}

		if (!record_late(rel, op, token, result, &row, &as))
			return stripe_recorded_outcome(&row);
		ledger_lost_race(&stripe_calls, &races);
	}
}

/*
 * Give a claim up because nothing was sent.  Returns false where it isn't in
 * progress with this token.
 */
bool
stripe_release_run(Relation rel, Operation *op, int64 token)
{
	Parameters	p;

	stripe_token_parameters(op, token, &p);
	return ledger_execute_latest(rel, &release_claim, p.values, p.nulls, NULL, NULL, 0) > 0;
}

/*
 * Renew a lease, 0 for the one given last.  Returns its new end, or 0 where
 * the operation isn't in progress with this token.
 */
TimestampTz
stripe_extend_run(Relation rel, Operation *op, int64 token, int64 lease, TimestampTz now)
{
	Parameters	p;
	Datum		lease_expires_at;
	bool		isnull;

	stripe_token_parameters(op, token, &p);
	parameter_timestamp(&p, now);
	parameter_nullable(&p, lease > 0 ? interval_datum(lease) : (Datum) 0, lease <= 0);
	if (ledger_execute_latest(rel, &extend_lease, p.values, p.nulls,
							  &lease_expires_at, &isnull, 1) == 0)
		return 0;
	return isnull ? 0 : DatumGetTimestampTz(lease_expires_at);
}

/* ---------- reopen ---------- */

/*
 * May an operation as it stands be given a new key?  Raises IK002 if not.
 */
static void
check_reopen(Operation *op, LedgerRow *row, bool force, TimestampTz now)
{
	StripeOutcome outcome = stripe_recorded_outcome(row);

	if (outcome == STRIPE_FAILED || outcome == STRIPE_NOT_EXECUTED)
		return;

	if (outcome == STRIPE_COMPLETED)
		ereport(ERROR,
				(errcode(ERRCODE_CONTRADICTS_RECORD),
				 errmsg("Stripe operation %s is completed", describe_operation(op)),
				 errdetail("A new key would execute it a second time."),
				 errhint("Use another operation id for another operation.")));

	if (stripe_row_is_held(row, now))
		ereport(ERROR,
				(errcode(ERRCODE_CONTRADICTS_RECORD),
				 errmsg("Stripe operation %s is in progress", describe_operation(op)),
				 errhint("Wait for its outcome, or until its lease has lapsed.")));

	if (!force)
		ereport(ERROR,
				(errcode(ERRCODE_CONTRADICTS_RECORD),
				 errmsg("outcome of Stripe operation %s is not known", describe_operation(op)),
				 errdetail("It may have been executed, and a new key would execute it a second time."),
				 errhint("Find out at Stripe first; force => true reopens it all the same.")));
}

/*
 * Start an operation's next generation.  from_generation is 0 where any will
 * do.  Returns the new key.
 */
char *
stripe_reopen_run(Relation rel, Operation *op, bool force, int from_generation,
				  const char *user)
{
	int			races = 0;

	for (;;)
	{
		LedgerRow	row;
		TimestampTz now;
		int			generation;
		char	   *key;
		Parameters	p;

		ledger_look_latest(&stripe_calls, rel, op->key, &row);
		now = GetCurrentTimestamp();
		if (row.found == FOUND_TWIN)
			ereport(ERROR,
					(errcode(ERRCODE_CONTRADICTS_RECORD),
					 errmsg("Stripe operation %s is in progress", describe_operation(op)),
					 errhint("Wait for its outcome, or until its lease has lapsed.")));
		if (row.found != FOUND_ROW)
			stripe_refuse_unclaimed(op);

		/* a repeated call finds its work done */
		generation = DatumGetInt32(row.values[S_GENERATION]);
		if (from_generation > 0 && generation != from_generation)
		{
			if (generation != from_generation + 1)
				ereport(ERROR,
						(errcode(ERRCODE_CONTRADICTS_RECORD),
						 errmsg("Stripe operation %s is of generation %d, not %d",
								describe_operation(op), generation, from_generation)));
			return TextDatumGetCString(row.values[S_IDEMPOTENCY_KEY]);
		}

		check_reopen(op, &row, force, now);

		key = derive_stripe_key(op->ns.value, NAMESPACE_LEN, op->account, op->type, op->id,
								generation + 1);
		stripe_token_parameters(op, ledger_new_token(), &p);
		parameter_datum(&p, row.values[S_TOKEN]);
		parameter_timestamp(&p, now);
		parameter_string(&p, key);
		parameter_outcome(&p, stripe_recorded_outcome(&row));
		parameter_string(&p, user);
		parameter_bool(&p, force);
		if (ledger_execute_latest(rel, &reopen, p.values, p.nulls, NULL, NULL, 0) > 0)
			return key;
		ledger_lost_race(&stripe_calls, &races);
	}
}
