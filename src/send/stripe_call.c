/*-------------------------------------------------------------------------
 *
 * stripe_call.c
 *	  SQL functions that call Stripe.
 *
 * stripe_get() reads: nothing is claimed and nothing recorded.
 *
 * stripe_call() does something, and so is an operation of the ledger
 * (stripe_ledger.c).  The order of things is what makes it safe:
 *
 *	1. arguments and settings are checked; anything wrong is an error now, and
 *	   leaves no trace
 *	2. recorder_claim(): a look at the ledger, which answers most repeated
 *	   calls.  Only if there is something to send, library, parameters and API
 *	   key are seen to (prepare_call(), still without a trace), and then key,
 *	   bytes, path, account, version and time are committed, whatever becomes
 *	   of the caller
 *	3. the stored request is sent, in as many attempts as there is reason and
 *	   time for; recorder_sending() notes that the first byte is about to leave
 *	4. recorder_record(): what came back is committed
 *	5. the result
 *
 * Between 3 and 4 nothing is done that could fail or be interrupted.  An error
 * after 2 ends the caller's (sub)transaction, and by that the recorder hears
 * that the call was given up, before or after it was sent.
 *
 * What is sent are the bytes of the first attempt of this generation, however
 * often the operation is called: stripe_retry() has none of its own.
 *
 * What Stripe or the network does is a result, never an error: an error would
 * roll back what the caller has just written.  Errors are for what is wrong
 * before anything is sent: arguments, settings, the API key.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/send/stripe_call.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "fmgr.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"

#include "base/arguments.h"
#include "base/debug_point.h"
#include "base/errors.h"
#include "base/json_build.h"
#include "base/result_row.h"
#include "base/settings.h"
#include "base/settings_guard.h"
#include "calls/stripe_ledger.h"
#include "ledger/namespace.h"
#include "process/recorder_client.h"
#include "send/api_key.h"
#include "send/http_client.h"
#include "send/stripe_call.h"
#include "send/stripe_request.h"
#include "stripe/api_path.h"
#include "stripe/form.h"

PG_FUNCTION_INFO_V1(idempotency_stripe_get);
PG_FUNCTION_INFO_V1(idempotency_stripe_call);
PG_FUNCTION_INFO_V1(idempotency_stripe_retry);

/* Columns of stripe_call_result. */
enum
{
	R_OUTCOME, R_REPLAYED, R_RESOURCE_ID, R_RESOURCE_TYPE, R_HTTP_STATUS, R_RESPONSE,
	R_ERROR, R_IDEMPOTENCY_KEY, R_REQUEST_ID, R_ATTEMPTS, R_GENERATION, R_RETRY_AFTER,
	R_LIVEMODE, R_RESOURCE_STATUS, R_NCOLUMNS
};

/* Query strings are for ids and filters. */
#define QUERY_MAX (16 * 1024)

/*
 * Reserved for what comes back, as jsonb, before anything is sent.  Stripe's
 * objects have some kilobytes; what is larger is recorded without its body.
 */
#define ANSWER_ROOM (240 * 1024)

/* Stripe takes so many */
#define METADATA_MAX 50

/* When to come back to what Stripe didn't do or didn't answer, in seconds. */
#define RETRY_AFTER 5

/* ---------- arguments ---------- */

static Jsonb *
argument_params(FunctionCallInfo fcinfo, int argno)
{
	Jsonb	   *params = argument_object(fcinfo, argno, "params");

	if (params == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("%s must not be null", "params")));
	return params;
}

/*
 * A setting that was set before the library was there to refuse it.
 */
static void
check_setting(const char *name, const char *value, const char *problem)
{
	if (problem != NULL)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("invalid value for parameter \"%s\": \"%s\"", name, value),
				 errdetail_internal("%s", _(problem))));
}

void
check_stripe_settings(void)
{
	check_settings();
	check_setting("idempotency.stripe_api_base", setting_stripe_api_base,
				  api_base_problem(setting_stripe_api_base));
	check_setting("idempotency.stripe_version", setting_stripe_version,
				  api_version_problem(setting_stripe_version));
	check_setting("idempotency.stripe_allowed_paths", setting_stripe_allowed_paths,
				  path_list_problem(setting_stripe_allowed_paths));
}

/* May it be called?  The path may have a query string. */
static void
check_allowed(const char *method, const char *path)
{
	char	   *bare = pnstrdup(path, strcspn(path, "?"));

	if (!path_is_allowed(setting_stripe_allowed_paths, method, bare))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("not allowed by \"idempotency.stripe_allowed_paths\": %s %s",
						method, bare)));
}

/*
 * A path of the API that may be called.
 */
static char *
argument_path(FunctionCallInfo fcinfo, int argno, const char *method)
{
	char	   *path = text_to_cstring(argument_text(fcinfo, argno, "path"));
	const char *problem = path_problem(path);

	if (problem != NULL)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("not a path of Stripe's API"),
				 errdetail_internal("%s", _(problem))));
	check_allowed(method, path);
	return path;
}

/* The account becomes a header. */
static char *
argument_account(FunctionCallInfo fcinfo, int argno)
{
	char	   *account = text_to_cstring(argument_text(fcinfo, argno, "account"));

	check_account(account);
	return account;
}

static char *
with_query(const char *path, Jsonb *params)
{
	StringInfoData target;
	int			path_len = strlen(path);

	initStringInfo(&target);
	appendStringInfo(&target, "%s?", path);
	form_encode(&target, params, QUERY_MAX);
	if (target.len == path_len + 1)
		target.data[path_len] = '\0';
	return target.data;
}

/* ---------- the result ---------- */

/*
 * One line about a call: what became of it, and nothing of what was said.
 */
void
log_stripe_call(const char *method, const char *path, const char *account,
				const char *operation, int generation, const char *idempotency_key,
				const StripeReply *reply, StripeOutcome outcome, bool live)
{
	StringInfoData line;

	if (setting_stripe_log_level == STRIPE_LOG_OFF)
		return;

	initStringInfo(&line);
	appendStringInfo(&line, "Stripe call: %s %.*s", method, (int) strcspn(path, "?"), path);
	if (operation != NULL)
		appendStringInfo(&line, " operation=%s generation=%d", operation, generation);
	if (account[0] != '\0')
		appendStringInfo(&line, " account=%s", account);
	if (idempotency_key != NULL)
		appendStringInfo(&line, " key=%s", idempotency_key);
	if (reply->result.request_id != NULL)
		appendStringInfo(&line, " request_id=%s", reply->result.request_id);
	appendStringInfo(&line, " livemode=%s attempts=%d", live ? "true" : "false", reply->attempts);
	if (reply->result.http_status != 0)
		appendStringInfo(&line, " status=%d", reply->result.http_status);
	if (reply->replayed)
		appendStringInfoString(&line, " replayed=true");
	appendStringInfo(&line, " outcome=%s ms=%.0f (%s)",
					 stripe_outcome_name(outcome), reply->ms, _(reply->reason));

	ereport(setting_stripe_log_level,
			(errmsg_internal("%s", line.data),
			 errhidestmt(true), errhidecontext(true)));
	pfree(line.data);
}

/* What came of a call, or is recorded of it. */
static void
set_result(ResultRow *row, const CallResult *result)
{
	result_set_enum(row, R_OUTCOME, stripe_outcome_name(result->outcome));
	result_set_text(row, R_RESOURCE_ID, result->resource_id);
	result_set_text(row, R_RESOURCE_TYPE, result->resource_type);
	result_set_text(row, R_RESOURCE_STATUS, result->resource_status);
	if (result->http_status != 0)
		result_set(row, R_HTTP_STATUS, Int32GetDatum(result->http_status));
	if (result->response != NULL)
		result_set(row, R_RESPONSE, JsonbPGetDatum(result->response));
	if (result->error != NULL)
		result_set(row, R_ERROR, JsonbPGetDatum(result->error));
	result_set_text(row, R_REQUEST_ID, result->request_id);
	if (result->livemode != LIVEMODE_UNKNOWN)
		result_set(row, R_LIVEMODE, BoolGetDatum(result->livemode == LIVEMODE_LIVE));
}

/* What an exchange came to. */
static void
set_reply(ResultRow *row, const StripeReply *reply, bool live)
{
	CallResult	result = reply->result;

	/* the caller may see a body that is not Stripe's */
	result.response = reply->body.json;
	if (result.livemode == LIVEMODE_UNKNOWN)
		result.livemode = livemode_of(live);
	set_result(row, &result);
	result_set(row, R_REPLAYED, BoolGetDatum(reply->replayed));
	result_set(row, R_ATTEMPTS, Int32GetDatum(reply->attempts));
	if (result.outcome == STRIPE_NOT_EXECUTED || result.outcome == STRIPE_UNKNOWN)
		result_set(row, R_RETRY_AFTER, Int32GetDatum(RETRY_AFTER));
}

/*
 * stripe_get(path, params, account, timeout)
 */
Datum
idempotency_stripe_get(PG_FUNCTION_ARGS)
{
	StripeDeadline deadline;
	StripeRequest request;
	StripeReply reply;
	ApiKey		key;
	Namespace	ns;
	char	   *path;
	bool		live;
	ResultRow	result;

	/* a copied database has to say first whose it is, also for this */
	namespace_for_stripe(&ns);
	check_stripe_settings();
	path = argument_path(fcinfo, 0, "GET");
	memset(&request, 0, sizeof(request));
	request.method = "GET";
	request.target = with_query(path, argument_params(fcinfo, 1));
	request.account = argument_account(fcinfo, 2);
	request.version = setting_stripe_version;
	exchange_deadline(&deadline, argument_duration(fcinfo, 3, "timeout"));

	/* whatever is missing is an error, before a secret is in memory */
	(void) http_client();

	api_key_read(&key);
	live = key.live;
	PG_TRY();
	{
		exchange_check_key(&key);
		exchange(&request, &key, &deadline, &reply);
	}
	PG_FINALLY();
	{
		api_key_wipe(&key);
	}
	PG_END_TRY();

	log_stripe_call(request.method, path, request.account, NULL, 0, NULL, &reply,
					reply.result.outcome, live);

	result_begin(&result, fcinfo, R_NCOLUMNS);
	set_reply(&result, &reply, live);
	PG_RETURN_DATUM(result_end(&result));
}

/* ---------- calls that are recorded ---------- */

/* One call, from its arguments to its result. */
typedef struct Call
{
	Operation	op;
	StripeDeadline deadline;
	StripeCall	call;
	StripeCallClaim claim;
	StripeReply reply;
	Jsonb	   *params;
	ApiKey		key;
	ResultRow	result;
} Call;

/*
 * The operation, checked along with the state that this server and database
 * must be in.
 */
static void
begin_operation(Call *call, FunctionCallInfo fcinfo, int account_argno, const char *function)
{
	text	   *type;
	text	   *id;

	PreventCommandDuringRecovery(function);
	PreventCommandIfReadOnly(function);

	type = argument_text(fcinfo, 0, "operation_type");
	id = argument_text(fcinfo, 1, "operation_id");
	operation_init(&call->op, text_to_cstring(type), text_to_cstring(id),
				   argument_account(fcinfo, account_argno));
	call->call.op = &call->op;
}

static char *
argument_method(FunctionCallInfo fcinfo, int argno)
{
	char	   *method = text_to_cstring(argument_text(fcinfo, argno, "method"));

	if (strcmp(method, "GET") == 0)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("GET is no operation"),
				 errhint("Use idempotency.stripe_get() to read.")));
	if (strcmp(method, "POST") != 0 && strcmp(method, "DELETE") != 0)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("method must be POST or DELETE")));
	return method;
}

/* What is compared with other calls of the operation, and shown to people. */
static Jsonb *
describe_request(const char *method, const char *path, Jsonb *params)
{
	StringInfoData text;

	json_begin(&text);
	json_add_string(&text, "method", method);
	json_add_string(&text, "path", path);
	json_add_name(&text, "params");
	(void) JsonbToCString(&text, &params->root, VARSIZE(params));
	return json_end_jsonb(&text);
}

/*
 * May the operation's key be added to this metadata?  Not where the caller
 * clears it, has one of that name, or has as much as Stripe takes.
 */
static bool
has_room_for_key(Jsonb *params)
{
	JsonbValue	metadata;
	JsonbValue	value;

	if (getKeyJsonValueFromContainer(&params->root, "metadata", strlen("metadata"), &metadata) == NULL)
		return true;
	return metadata.type == jbvBinary &&
		JsonContainerIsObject(metadata.val.binary.data) &&
		JsonContainerSize(metadata.val.binary.data) < METADATA_MAX &&
		getKeyJsonValueFromContainer(metadata.val.binary.data, METADATA_NAME,
									 strlen(METADATA_NAME), &value) == NULL;
}

/*
 * The key that a call will have.  Only a reopening at this very moment would
 * make it another one.
 */
static char *
operation_key(const Operation *op)
{
	LedgerRow	row;

	if (ledger_lookup(&stripe_calls, op->key, &row))
		return stripe_row_string(&row, S_IDEMPOTENCY_KEY);
	return derive_stripe_key(op->ns.value, NAMESPACE_LEN, op->account, op->type, op->id, 1);
}

/*
 * Encode the parameters of a call: into its path, or into its body.
 */
static void
encode_request(StripeCall *call, const char *path, Jsonb *params)
{
	StringInfoData body;
	Size		max_size = (Size) setting_max_response_size * 1024;

	if (strcmp(call->send.method, "POST") != 0)
	{
		call->send.path = with_query(path, params);
		return;
	}

	call->send.path = path;
	initStringInfo(&body);
	appendStringInfoSpaces(&body, VARHDRSZ);
	if (path_is_v2(path))
		json_encode(&body, params, max_size);
	else
	{
		form_encode(&body, params, max_size);
		if (setting_stripe_key_in_metadata && path_takes_metadata(path) && has_room_for_key(params))
			form_append(&body, body.len == VARHDRSZ, "metadata[" METADATA_NAME "]",
						operation_key(call->op));
	}

	SET_VARSIZE(body.data, body.len);
	call->send.body = (bytea *) body.data;
}

/*
 * The call is going to be sent: see to all that this takes, which a replay
 * does without.  The API key has to be wiped.
 */
static void
prepare_call(void *arg)
{
	Call	   *call = arg;

	(void) http_client();
	if (!call->call.resend)
		encode_request(&call->call, call->call.send.path, call->params);
	api_key_read(&call->key);
	exchange_check_key(&call->key);
	call->call.send.livemode = livemode_of(call->key.live);
}

/* What is known of an operation that isn't sent now. */
static void
set_known(ResultRow *result, const StripeCallClaim *claim)
{
	set_result(result, &claim->result);
	result_set(result, R_REPLAYED, BoolGetDatum(claim->verdict == STRIPE_REPLAY));
	result_set(result, R_ATTEMPTS, Int32GetDatum(0));

	switch (claim->verdict)
	{
		case STRIPE_BUSY:
			result_set(result, R_RETRY_AFTER, Int32GetDatum(claim->retry_after));
			break;
		case STRIPE_OTHER_REQUEST:

			/*
			 * the caller is the application itself, so it may see the other
			 * one
			 */
			result_set_enum(result, R_OUTCOME, stripe_outcome_name(STRIPE_MISMATCH));
			result_set(result, R_ERROR,
					   JsonbPGetDatum(exchange_error("idempotency_error",
													 claim->result.outcome == STRIPE_FAILED ?
													 "the operation has failed with another request; stripe_reopen() gives it a new key for this one" :
													 "the operation was called with another request before",
													 claim->request)));
			break;
		case STRIPE_CANT_TELL:
			if (claim->result.outcome == STRIPE_UNKNOWN)
				result_set(result, R_RETRY_AFTER, Int32GetDatum(RETRY_AFTER));
			break;
		case STRIPE_CLAIMED:
		case STRIPE_REPLAY:
			break;
	}
}

/*
 * The call is claimed: send it.
 */
static void
send_call(Call *call)
{
	StripeCallClaim *claim = &call->claim;
	const CallRequest *send = &claim->send;
	StripeRequest request;
	bool		v2;

	if (send->method == NULL || send->path == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("it is not known what was sent for Stripe operation \"%s:%s\"",
						call->op.type, call->op.id),
				 errdetail("An application sends it by itself, with idempotency.stripe_claim().")));
	check_allowed(send->method, send->path);
	v2 = path_is_v2(send->path);

	memset(&request, 0, sizeof(request));
	request.method = send->method;
	request.target = send->path;
	request.account = call->op.account;
	request.version = send->api_version;
	if (strcmp(send->method, "POST") == 0 || v2)
		request.idempotency_key = claim->idempotency_key;
	if (send->body != NULL)
	{
		request.body = VARDATA_ANY(send->body);
		request.body_len = VARSIZE_ANY_EXHDR(send->body);
		request.content_type = v2 ? "application/json" : "application/x-www-form-urlencoded";
	}
	request.sending = recorder_sending;
	request.sent_before = claim->sent_before;
	request.uncertain = claim->uncertain;
	request.resend_until = claim->resend_until;

	DEBUG_POINT("before-send");
	exchange(&request, &call->key, &call->deadline, &call->reply);
	DEBUG_POINT("after-answer");
}

/* What came of it, for the ledger; returns the outcome that stands. */
static StripeOutcome
record_call(Call *call)
{
	CallResult	result = call->reply.result;

	if (result.livemode == LIVEMODE_UNKNOWN && result.sent)
		result.livemode = livemode_of(call->key.live);
	return recorder_record(&result);
}

/*
 * The outcome that stands is of another answer than this call's: of an attempt
 * before, told late.  Then that one is the result, too.  Returns the outcome, or
 * STRIPE_UNKNOWN where the answer isn't to be had.
 */
static StripeOutcome
set_other_answer(Call *call)
{
	StripeCallClaim known;

	if (!recorder_look(&known) || !stripe_is_definitive(known.result.outcome))
		return STRIPE_UNKNOWN;
	result_reset(&call->result);
	set_known(&call->result, &known);
	result_set(&call->result, R_ATTEMPTS, Int32GetDatum(call->reply.attempts));
	return known.result.outcome;
}

/*
 * "unknown" mostly means that the same call, made again, may tell more.  Say so
 * where it can't.
 */
static void
say_that_resend_is_useless(const Operation *op)
{
	ereport(NOTICE,
			(errmsg("outcome of Stripe operation \"%s:%s\" is not known, and cannot be found out by calling again",
					op->type, op->id),
			 errhint("The view \"idempotency.stripe_unknown\" says what to do.")));
}

/*
 * Claim, send, record; the result is set.
 */
static void
run_call(Call *call)
{
	StripeCallClaim *claim = &call->claim;
	StripeOutcome outcome;

	recorder_claim(&call->call, claim);
	if (claim->verdict != STRIPE_CLAIMED)
	{
		set_known(&call->result, claim);
		result_set_text(&call->result, R_IDEMPOTENCY_KEY, claim->idempotency_key);
		if (claim->generation > 0)
			result_set(&call->result, R_GENERATION, Int32GetDatum(claim->generation));
		if (claim->verdict == STRIPE_CANT_TELL && claim->result.outcome == STRIPE_UNKNOWN)
			say_that_resend_is_useless(&call->op);
		return;
	}

	send_call(call);
	outcome = record_call(call);

	log_stripe_call(claim->send.method, claim->send.path, call->op.account,
					psprintf("%s:%s", call->op.type, call->op.id),
					claim->generation, claim->idempotency_key, &call->reply, outcome,
					call->key.live);

	set_reply(&call->result, &call->reply, call->key.live);
	if (stripe_is_definitive(outcome) && outcome != call->reply.result.outcome)
		outcome = set_other_answer(call);
	result_set_enum(&call->result, R_OUTCOME, stripe_outcome_name(outcome));
	result_set_text(&call->result, R_IDEMPOTENCY_KEY, claim->idempotency_key);
	result_set(&call->result, R_GENERATION, Int32GetDatum(claim->generation));
	if (outcome == STRIPE_UNKNOWN && !call->reply.resend)
		say_that_resend_is_useless(&call->op);
}

static Datum
finish_call(FunctionCallInfo fcinfo, Call *call)
{
	call->call.send.livemode = LIVEMODE_UNKNOWN;
	call->call.answer_room = Min(ANSWER_ROOM, (Size) setting_max_response_size * 1024 * 2);
	call->call.prepare = prepare_call;
	call->call.prepare_arg = call;

	result_begin(&call->result, fcinfo, R_NCOLUMNS);
	PG_TRY();
	{
		run_call(call);
	}
	PG_FINALLY();
	{
		api_key_wipe(&call->key);
	}
	PG_END_TRY();

	return result_end(&call->result);
}

/*
 * stripe_call(operation_type, operation_id, method, path, params, account, timeout)
 */
Datum
idempotency_stripe_call(PG_FUNCTION_ARGS)
{
	Call		call;

	memset(&call, 0, sizeof(call));
	begin_operation(&call, fcinfo, 5, "idempotency.stripe_call()");
	call.call.send.method = argument_method(fcinfo, 2);
	check_stripe_settings();
	call.call.send.path = argument_path(fcinfo, 3, call.call.send.method);
	call.params = argument_params(fcinfo, 4);
	exchange_deadline(&call.deadline, argument_duration(fcinfo, 6, "timeout"));
	call.call.send.api_version = setting_stripe_version;
	call.call.request = describe_request(call.call.send.method, call.call.send.path, call.params);

	PG_RETURN_DATUM(finish_call(fcinfo, &call));
}

/*
 * stripe_retry(operation_type, operation_id, account, timeout)
 */
Datum
idempotency_stripe_retry(PG_FUNCTION_ARGS)
{
	Call		call;

	memset(&call, 0, sizeof(call));
	begin_operation(&call, fcinfo, 2, "idempotency.stripe_retry()");
	call.call.resend = true;
	check_stripe_settings();
	exchange_deadline(&call.deadline, argument_duration(fcinfo, 3, "timeout"));

	PG_RETURN_DATUM(finish_call(fcinfo, &call));
}
