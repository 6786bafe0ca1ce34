/*-------------------------------------------------------------------------
 *
 * stripe_call.c
 *	  SQL functions that call Stripe.
 *
 * stripe_get() reads: nothing is claimed and nothing recorded.
 *
 * What Stripe or the network does is a result, never an error: an error would
 * roll back what the caller has just written.  Errors are for what is wrong
 * before anything is sent: arguments, settings, the API key.
 *
 * src/stripe/stripe_call.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "fmgr.h"
#include "lib/stringinfo.h"
#include "utils/builtins.h"

#include "arguments.h"
#include "errors.h"
#include "namespace.h"
#include "result.h"
#include "settings.h"
#include "stripe/api_key.h"
#include "stripe/exchange.h"
#include "stripe/form.h"
#include "stripe/gateway.h"
#include "stripe/path.h"

PG_FUNCTION_INFO_V1(idempotency_stripe_get);

/* Columns of stripe_call_result. */
enum
{
	R_OUTCOME, R_REPLAYED, R_RESOURCE_ID, R_RESOURCE_TYPE, R_HTTP_STATUS, R_RESPONSE,
	R_ERROR, R_IDEMPOTENCY_KEY, R_REQUEST_ID, R_ATTEMPTS, R_GENERATION, R_RETRY_AFTER,
	R_LIVEMODE, R_NCOLUMNS
};

/* Query strings are for ids and filters. */
#define QUERY_MAX (16 * 1024)

/* When to come back to what Stripe didn't do or didn't answer, in seconds. */
#define RETRY_AFTER 5

/* ---------- arguments ---------- */

static Jsonb *
argument_params(FunctionCallInfo fcinfo, int argno)
{
	Jsonb	   *params = argument_jsonb(fcinfo, argno);

	if (params == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("%s must not be null", "params")));
	if (!JB_ROOT_IS_OBJECT(params))
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("params must be a JSON object")));
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

static void
check_settings(void)
{
	check_setting("idempotency.stripe_api_base", stripe_api_base,
				  api_base_problem(stripe_api_base));
	check_setting("idempotency.stripe_version", stripe_version,
				  api_version_problem(stripe_version));
	check_setting("idempotency.stripe_allowed_paths", stripe_allowed_paths,
				  path_list_problem(stripe_allowed_paths));
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
	if (!path_is_allowed(stripe_allowed_paths, method, path))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("not allowed by \"idempotency.stripe_allowed_paths\": %s %s",
						method, path)));
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
static void
log_call(const char *method, const char *path, const char *account,
		 const char *operation, int generation, const char *idempotency_key,
		 const StripeReply *reply, bool live)
{
	StringInfoData line;

	if (stripe_log_level == STRIPE_LOG_OFF)
		return;

	initStringInfo(&line);
	appendStringInfo(&line, "Stripe call: %s %s", method, path);
	if (operation != NULL)
		appendStringInfo(&line, " operation=%s generation=%d", operation, generation);
	if (account[0] != '\0')
		appendStringInfo(&line, " account=%s", account);
	if (idempotency_key != NULL)
		appendStringInfo(&line, " key=%s", idempotency_key);
	if (reply->request_id != NULL)
		appendStringInfo(&line, " request_id=%s", reply->request_id);
	appendStringInfo(&line, " livemode=%s attempts=%d", live ? "true" : "false", reply->attempts);
	if (reply->http_status != 0)
		appendStringInfo(&line, " status=%d", reply->http_status);
	if (reply->replayed)
		appendStringInfoString(&line, " replayed=true");
	appendStringInfo(&line, " outcome=%s ms=%.0f (%s)",
					 stripe_outcome_name(reply->outcome), reply->ms, _(reply->reason));

	ereport(stripe_log_level,
			(errmsg_internal("%s", line.data),
			 errhidestmt(true), errhidecontext(true)));
	pfree(line.data);
}

/* What an exchange came to. */
static void
set_reply(ResultRow *result, const StripeReply *reply, bool live)
{
	result_set_enum(result, R_OUTCOME, stripe_outcome_name(reply->outcome));
	result_set(result, R_REPLAYED, BoolGetDatum(reply->replayed));
	result_set_text(result, R_RESOURCE_ID, reply->body.resource_id);
	result_set_text(result, R_RESOURCE_TYPE, reply->body.resource_type);
	if (reply->http_status != 0)
		result_set(result, R_HTTP_STATUS, Int32GetDatum(reply->http_status));
	if (reply->body.json != NULL)
		result_set(result, R_RESPONSE, JsonbPGetDatum(reply->body.json));
	if (reply->body.error != NULL)
		result_set(result, R_ERROR, JsonbPGetDatum(reply->body.error));
	result_set_text(result, R_REQUEST_ID, reply->request_id);
	result_set(result, R_ATTEMPTS, Int32GetDatum(reply->attempts));
	if (reply->outcome == STRIPE_NOT_EXECUTED || reply->outcome == STRIPE_UNKNOWN)
		result_set(result, R_RETRY_AFTER, Int32GetDatum(RETRY_AFTER));
	result_set(result, R_LIVEMODE,
			   BoolGetDatum(reply->body.livemode_isnull ? live : reply->body.livemode));
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
	check_settings();
	path = argument_path(fcinfo, 0, "GET");
	memset(&request, 0, sizeof(request));
	request.method = "GET";
	request.target = with_query(path, argument_params(fcinfo, 1));
	request.account = argument_account(fcinfo, 2);
	request.version = stripe_version;
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

	log_call(request.method, path, request.account, NULL, 0, NULL, &reply, live);

	result_begin(&result, fcinfo, R_NCOLUMNS);
	set_reply(&result, &reply, live);
	PG_RETURN_DATUM(result_end(&result));
}
