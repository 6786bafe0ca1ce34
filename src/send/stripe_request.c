/*-------------------------------------------------------------------------
 *
 * stripe_request.c
 *	  One call of Stripe's API: a request, its attempts, and the answer.
 *
 * Attempts are made as Stripe's own libraries make them: at most
 * idempotency.stripe_max_retries more after the first, half a second to five
 * seconds apart, and only where stripe_outcome.c says that another one is
 * worth it.  Each sends the same bytes with the same key.
 *
 * All of it is over by the deadline, which is the call's own timeout or a
 * moment before statement_timeout strikes, whichever is nearer: a call that
 * ends by itself can still tell, and record, what it knows.  What can't be
 * finished by then isn't begun.
 *
 * What comes back is a StripeReply, never an error, but for a cancel, a
 * terminate and want of memory; reply->sent is right then, too.
 *
 * The API key is in the caller's ApiKey and, while an attempt is under way, in
 * a header of libcurl's.  It is in no message: what is told of an attempt that
 * failed is libcurl's text, which doesn't quote requests.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/send/stripe_request.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "common/pg_prng.h"
#include "miscadmin.h"
#include "storage/latch.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timeout.h"
#include "utils/wait_event.h"

#include "base/compat.h"
#include "base/debug_point.h"
#include "base/errors.h"
#include "base/json_build.h"
#include "base/json_text.h"
#include "base/settings.h"
#include "send/http_client.h"
#include "send/stripe_request.h"
#include "stripe/api_path.h"

#define USER_AGENT "idempotency/" IDEMPOTENCY_VERSION " (PostgreSQL/" PG_VERSION ")"

/* Pauses between attempts, in milliseconds (stripe-node, -python, -ruby). */
#define FIRST_PAUSE 500
#define LONGEST_PAUSE 5000

/* A connection is given this long to come about, in milliseconds. */
#define CONNECT_TIMEOUT 10000

/*
 * A call is over so long before statement_timeout strikes, to be recorded, and
 * isn't begun with less than that left, in milliseconds.
 */
#define STATEMENT_MARGIN 250
#define STATEMENT_LEAST 1000

/* Another attempt isn't begun with less than this left, in milliseconds. */
#define ATTEMPT_LEAST 100

/* A call that is given no end of its own has one all the same. */
#define LONGEST_CALL (60 * 60 * 1000)

static uint32 wait_event = 0;

/* ---------- time ---------- */

static int64
elapsed_ms(const StripeDeadline *deadline)
{
	instr_time	now;

	INSTR_TIME_SET_CURRENT(now);
	INSTR_TIME_SUBTRACT(now, deadline->start);
	return (int64) INSTR_TIME_GET_MILLISEC(now);
}

static int64
left_ms(const StripeDeadline *deadline)
{
	return deadline->limit - elapsed_ms(deadline);
}

static void
bound_by(StripeDeadline *deadline, TimeoutId id)
{
	int64		left;

	if (!get_timeout_active(id))
		return;
	left = (get_timeout_finish_time(id) - GetCurrentTimestamp()) / 1000 - STATEMENT_MARGIN;
	if (left < deadline->limit)
	{
		deadline->limit = left;
		deadline->of_statement = true;
	}
}

/*
 * Begin a call.  Its timeout is the one given, or idempotency.stripe_timeout.
 */
void
exchange_deadline(StripeDeadline *deadline, Duration timeout)
{
	INSTR_TIME_SET_CURRENT(deadline->start);
	deadline->limit = timeout.given ?
		Min(timeout.usecs / 1000, LONGEST_CALL) : setting_stripe_timeout;
	deadline->of_statement = false;
	bound_by(deadline, STATEMENT_TIMEOUT);
#ifdef HAVE_TRANSACTION_TIMEOUT
	bound_by(deadline, TRANSACTION_TIMEOUT);
#endif
}

/* How long to pause after this many attempts. */
static int64
pause_ms(int attempts)
{
	double		ms = FIRST_PAUSE;

	while (--attempts > 0 && ms < LONGEST_PAUSE)
		ms *= 2;
	ms = Min(ms, LONGEST_PAUSE) * (0.5 + 0.5 * pg_prng_double(&pg_global_prng_state));
	return (int64) Max(ms, FIRST_PAUSE);
}

static void
pause_for(int64 ms)
{
	StripeDeadline pause = {.limit = ms};
	int64		left;

	if (wait_event == 0)
		wait_event = WAIT_EVENT_NEW("IdempotencyStripePause");

	INSTR_TIME_SET_CURRENT(pause.start);
	while ((left = left_ms(&pause)) > 0)
	{
		if (WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, (long) left,
					  wait_event) & WL_LATCH_SET)
			ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
}

/* ---------- the request ---------- */

/*
 * A live key belongs to real money, and isn't sent in the clear or to a
 * stand-in.
 */
void
exchange_check_key(const ApiKey *key)
{
	if (key->live && strncmp(setting_stripe_api_base, "https://", 8) != 0)
		ereport(ERROR,
				(errcode(ERRCODE_CONFIG_FILE_ERROR),
				 errmsg("a live Stripe API key is not sent without encryption"),
				 errhint("Use a test key with this \"idempotency.stripe_api_base\".")));
}

#define MAX_HEADERS 8

static void
set_headers(const StripeRequest *request, const ApiKey *key, const char **headers)
{
	int			n = 0;

	headers[n++] = "Accept: application/json";
	headers[n++] = "User-Agent: " USER_AGENT;
	headers[n++] = psprintf("Stripe-Version: %s", request->version);
	if (request->body != NULL)
		headers[n++] = psprintf("Content-Type: %s", request->content_type);
	if (request->idempotency_key != NULL)
		headers[n++] = psprintf("Idempotency-Key: %s", request->idempotency_key);

	/*
	 * a path of accounts, and whatever an organization's key does, is a
	 * context
	 */
	if (request->account[0] != '\0')
		headers[n++] = psprintf("%s: %s",
								key->organization || strchr(request->account, '/') != NULL ?
								"Stripe-Context" : "Stripe-Account",
								request->account);
	headers[n] = NULL;
	Assert(n < MAX_HEADERS);
}

/* ---------- the answer ---------- */

/*
 * A body as jsonb, or NULL where it isn't JSON.  Whatever the server sends,
 * this is not the place to fail: it may be the answer to a charge.
 *
 * It touches nothing but memory and the cache of the catalogs, so that its
 * errors need no subtransaction.
 */
static Jsonb *
parse_body(const char *body, size_t len)
{
	MemoryContext context = CurrentMemoryContext;
	Jsonb	   *volatile json = NULL;

	PG_TRY();
	{
		json = json_read(body, len);
	}
	PG_CATCH();
	{
		if (ERRCODE_TO_CATEGORY(geterrcode()) == ERRCODE_OPERATOR_INTERVENTION)
			PG_RE_THROW();
		MemoryContextSwitchTo(context);
		FlushErrorState();
	}
	PG_END_TRY();
	return json;
}

/*
 * An error object of ours, for want of one of Stripe's.  "request" may be NULL.
 */
Jsonb *
exchange_error(const char *type, const char *message, Jsonb *request)
{
	StringInfoData text;
	char	   *ascii = pstrdup(message);
	char	   *p;

	for (p = ascii; *p != '\0'; p++)
	{
		if (IS_HIGHBIT_SET(*p) || *p < ' ')
			*p = '?';
	}

	json_begin(&text);
	json_add_string(&text, "type", type);
	json_add_string(&text, "message", ascii);
	if (request != NULL)
	{
		json_add_name(&text, "recorded_request");
		(void) JsonbToCString(&text, &request->root, VARSIZE(request));
	}
	return json_end_jsonb(&text);
}

/*
 * Read an attempt's answer.  "uncertain": may one before have been executed?
 */
static void
read_response(const StripeRequest *request, const HttpResponse *response, bool uncertain,
			  StripeReply *reply, StripeAnswer *answer, StripeClass *class)
{
	Jsonb	   *json = parse_body(response->body, response->body_len);
	StripeReceived received;

	if (json != NULL && !JB_ROOT_IS_OBJECT(json))
		json = NULL;
	if (!response->whole)
		json = NULL;

	stripe_read_body(json, &reply->body);
	reply->replayed = response->replayed;

	memset(&received, 0, sizeof(received));
	received.http_status = response->status;
	received.sent = response->sent;
	received.whole = response->whole;
	received.method = request->method;
	received.path = request->target;
	received.uncertain = uncertain || request->uncertain;

	*class = stripe_judge(&received, &reply->body, answer);
	reply->genuine = answer->genuine;
	reply->reason = class->reason;
	if (reply->body.error == NULL && !answer->genuine)
	{
		if (response->status == 0)
			reply->body.error = exchange_error("api_connection_error", response->problem, NULL);
		else if (!response->whole)
			reply->body.error = exchange_error("api_error", response->problem, NULL);
		else if (json == NULL)
			reply->body.error = exchange_error("api_error", "answer is not a JSON object", NULL);
		else
			reply->body.error = exchange_error("api_error", "answer is not one of Stripe's", NULL);
	}

	stripe_body_result(&reply->body, answer->genuine, &reply->result);
	reply->result.outcome = class->outcome;
	reply->result.http_status = response->status;
	if (response->request_id[0] != '\0')
		reply->result.request_id = pstrdup(response->request_id);
}

/*
 * Is it too late to send the same again?  To be asked before each attempt: this
 * process may have been held up since the call was claimed.
 */
static bool
is_too_late(const StripeRequest *request)
{
	return request->resend_until != 0 && GetCurrentTimestamp() >= request->resend_until;
}

/* No attempt can be made, or no more. */
static void
not_sent(StripeReply *reply, const char *reason)
{
	memset(reply, 0, sizeof(StripeReply));
	reply->reason = reason;
	reply->resend = true;
	stripe_read_body(NULL, &reply->body);
	reply->body.error = exchange_error("api_connection_error", reason, NULL);
	stripe_body_result(&reply->body, false, &reply->result);
	reply->result.outcome = STRIPE_NOT_EXECUTED;
}

/*
 * Why a request cannot be sent at all, or NULL.  Marked for translation.
 */
static const char *
reason_not_to_send(const StripeRequest *request, const StripeDeadline *deadline)
{
	if (deadline->of_statement && left_ms(deadline) < STATEMENT_LEAST)
		return gettext_noop("too little time is left before statement_timeout");
	if (left_ms(deadline) <= 0)
		return gettext_noop("no time is left");
	if (request->sent_before && is_too_late(request))
		return gettext_noop("it is too late to send the same key again");
	return NULL;
}

/* What each attempt sends. */
static void
prepare_http(const StripeRequest *request, const ApiKey *key, const char **headers,
			 HttpRequest *http)
{
	set_headers(request, key, headers);
	memset(http, 0, sizeof(HttpRequest));
	http->method = request->method;
	http->url = psprintf("%s%s", setting_stripe_api_base, request->target);
	http->headers = headers;
	http->bearer = key->secret;
	http->body = request->body;
	http->body_len = request->body_len;
	http->sending = request->sending;
	http->max_body = (size_t) setting_max_response_size * 1024;
	http->ca_file = setting_stripe_ca_file[0] != '\0' ? setting_stripe_ca_file : NULL;
}

/*
 * Send a request until there is an answer that counts, or no more time.
 *
 * The last attempt's answer is the one that is told.  Where it says that
 * nothing was executed, but an earlier attempt may have been, the outcome of
 * whatever isn't a mere reading is unknown.
 */
void
exchange(const StripeRequest *request, const ApiKey *key,
		 const StripeDeadline *deadline, StripeReply *reply)
{
	const HttpClient *client = http_client();
	HttpRequest http;
	const char *headers[MAX_HEADERS];
	volatile bool sent = false;
	bool		uncertain = false;
	int			attempts = 0;
	const char *reason = reason_not_to_send(request, deadline);

	if (reason != NULL)
	{
		not_sent(reply, reason);
		return;
	}
	memset(reply, 0, sizeof(StripeReply));
	prepare_http(request, key, headers, &http);

	for (;;)
	{
		HttpResponse response;
		StripeAnswer answer;
		StripeClass class;
		int64		pause;

		http.timeout = (long) Max(left_ms(deadline), 1);	/* 0 is for ever */
		http.connect_timeout = Min(http.timeout, CONNECT_TIMEOUT);
		response.sent = false;
		PG_TRY();
		{
			client->perform(&http, &response);
		}
		PG_CATCH();
		{
			reply->result.sent = sent || response.sent;
			PG_RE_THROW();
		}
		PG_END_TRY();
		attempts++;
		sent = sent || response.sent;

		memset(reply, 0, sizeof(StripeReply));
		read_response(request, &response, uncertain, reply, &answer, &class);
		pfree(response.body);
		reply->result.sent = sent;
		reply->attempts = attempts;
		reply->resend = class.resend;

		if (attempts > setting_stripe_max_retries || attempts == request->max_attempts ||
			response.too_large ||
			!stripe_retry_at_once(&answer, &class, response.should_retry, response.replayed))
			break;

		uncertain = uncertain || class.outcome == STRIPE_UNKNOWN;

		/* where just the connection had grown old, a new one is at hand */
		pause = response.stale ? 0 : pause_ms(attempts);
		if (left_ms(deadline) < pause + ATTEMPT_LEAST)
			break;
		pause_for(pause);
		DEBUG_POINT("between-attempts");
		if (is_too_late(request))
			break;
	}

	if (uncertain && reply->result.outcome == STRIPE_NOT_EXECUTED && strcmp(request->method, "GET") != 0)
	{
		reply->result.outcome = STRIPE_UNKNOWN;
		reply->reason = gettext_noop("an earlier attempt may have been executed");
		reply->resend = true;
	}
	reply->ms = elapsed_ms(deadline);
}
