/*-------------------------------------------------------------------------
 *
 * answer.c
 *	  Fuzz target: what comes back from Stripe, status, headers and body
 *	  (src/send/http.c, stripe_request.c, src/stripe/stripe_answer.c, stripe_outcome.c,
 *	  json_member.c).
 *
 * The network is left out: this calls http.c's functions for headers and body
 * as libcurl would, and exchange() handles the result like any other answer.
 * The first two bytes of an input are the status, the next two say what happened
 * on the way; then come lines of headers, an empty line, and the body.
 *
 * No answer may raise an error.  Only one that is whole and 2xx is "completed",
 * and "not_executed" needs a status that Stripe gives for it.  A second parser
 * must read the same from the headers.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * test/fuzz/answer.c
 *
 *-------------------------------------------------------------------------
 */
#define _GNU_SOURCE				/* memmem() */
#include "backend.h"

/* included because its functions are static */
#include "send/http.c"

#include "base/json_member.h"
#include "base/settings.h"
#include "json_tree.h"
#include "send/http_client.h"
#include "send/stripe_request.h"

#define BODY_MAX 1024

/* settings that stripe_request.c looks at */
int			setting_stripe_max_retries = 0;
int			setting_stripe_timeout = 60000;
int			setting_max_response_size = BODY_MAX / 1024;
char	   *setting_stripe_api_base = "http://localhost";
char	   *setting_stripe_ca_file = "";

/* The present input. */
static struct
{
	int			status;
	bool		sent;
	bool		whole;
	bool		stale;
	size_t		chunk;
	const char *headers;
	size_t		headers_len;
	const char *body;
	size_t		body_len;
}			input;

static HttpResponse seen;

/* Stands in for perform() of http.c, with an input instead of a network. */
static void
replay(const HttpRequest *request, HttpResponse *response)
{
	Transfer	transfer;
	bool		whole = input.whole;
	size_t		at;

	memset(response, 0, sizeof(HttpResponse));
	memset(&transfer, 0, sizeof(transfer));
	transfer.request = request;
	transfer.response = response;
	transfer.context = CurrentMemoryContext;
	transfer.body_size = Min(64, request->max_body + 1);
	response->body = palloc(transfer.body_size);
	response->body[0] = '\0';
	response->sent = input.sent;

	for (at = 0; at < input.headers_len;)
	{
		const char *line = input.headers + at;
		const char *end = memchr(line, '\n', input.headers_len - at);
		size_t		len = end != NULL ? (size_t) (end + 1 - line) : input.headers_len - at;
		char	   *copy = palloc(len);

		memcpy(copy, line, len);
		CHECK(take_header(copy, 1, len, &transfer) == len);
		pfree(copy);
		at += len;
	}

	for (at = 0; at < input.body_len && transfer.refusal == NULL;)
	{
		size_t		len = Min(input.chunk, input.body_len - at);
		char	   *copy = palloc(len);

		memcpy(copy, input.body + at, len);
		if (take_body(copy, 1, len, &transfer) != len)
			CHECK(transfer.refusal != NULL);
		pfree(copy);
		at += len;
	}
	CHECK(response->too_large == (input.body_len > request->max_body));
	CHECK(response->body_len <= request->max_body && response->body_len < transfer.body_size);
	CHECK(response->body_len == input.body_len || response->too_large);
	CHECK(memcmp(response->body, input.body, response->body_len) == 0);

	response->status = input.status;
	response->body[response->body_len] = '\0';
	response->whole = whole && transfer.refusal == NULL && response->status != 0 && response->sent;
	response->stale = input.stale && response->status == 0;
	if (!response->whole)
		strlcpy(response->problem, transfer.refusal != NULL ? transfer.refusal : "cut", sizeof(response->problem));
	seen = *response;
}

/* Stands in for http_client.c. */
const HttpClient *
http_client(void)
{
	static const HttpClient client = {HTTP_CLIENT_VERSION, replay};

	return &client;
}

/* The second parser of headers. */
static void
check_headers(void)
{
	char	   *text = pnstrdup(input.headers, input.headers_len);
	char		request_id[HTTP_TEXT_MAX] = "";
	StripeShouldRetry should_retry = STRIPE_RETRY_UNSAID;
	bool		replayed = false;
	char	   *line;

	/* a zero byte hides what follows it from the C library */
	if (strlen(text) != input.headers_len)
		return;

	while ((line = strsep(&text, "\n")) != NULL)
	{
		char	   *value = strchr(line, ':');
		size_t		len;

		if (strncmp(line, "HTTP/", 5) == 0)
		{
			request_id[0] = '\0';
			should_retry = STRIPE_RETRY_UNSAID;
			replayed = false;
			continue;
		}
		if (value == NULL)
			continue;
		*value++ = '\0';
		value += strspn(value, " \t");
		len = strlen(value);
		while (len > 0 && strchr("\r\n \t", value[len - 1]) != NULL)
			value[--len] = '\0';

		if (strcasecmp(line, "request-id") == 0 && len < sizeof(request_id))
		{
			size_t		printable = 0;

			while (value[printable] > ' ' && value[printable] <= '~')
				printable++;
			if (printable == len)
				strcpy(request_id, value);
		}
		if (strcasecmp(line, "stripe-should-retry") == 0)
			should_retry = strcasecmp(value, "true") == 0 ? STRIPE_RETRY_TRUE :
				strcasecmp(value, "false") == 0 ? STRIPE_RETRY_FALSE : should_retry;
		if (strcasecmp(line, "idempotent-replayed") == 0)
			replayed = strcasecmp(value, "true") == 0;
	}

	CHECK(strcmp(seen.request_id, request_id) == 0);
	CHECK(seen.should_retry == should_retry);
	CHECK(seen.replayed == replayed);
}

static bool
equals_member(Jsonb *json, const char *name, const char *word)
{
	char	   *value = json == NULL ? NULL :
		json_string_member(json_object_member(&json->root, "error"), name);

	return value != NULL && strcmp(value, word) == 0;
}

/* Take an input apart.  Returns false for one that perform() could not have. */
static bool
take_input(const uint8 *data, size_t size)
{
	const char *empty;

	if (size < 4)
		return false;
	input.status = (data[0] * 256 + data[1]) % 1000;
	input.sent = input.status != 0 || (data[2] & 1) != 0;
	input.whole = (data[2] & 2) != 0;
	input.stale = (data[2] & 4) != 0;
	input.chunk = 1 + data[3];

	input.headers = (const char *) data + 4;
	empty = memmem(data + 4, size - 4, "\r\n\r\n", 4);
	input.headers_len = empty != NULL ? (size_t) (empty + 2 - input.headers) : 0;
	input.body = empty != NULL ? empty + 4 : input.headers;
	input.body_len = size - (input.body - (const char *) data);
	return input.headers_len <= MAX_HEADERS;
}

/* Does the outcome agree with what came back? */
static void
check_outcome(const StripeReply *reply, bool object, bool stripes, bool v2)
{
	switch (reply->result.outcome)
	{
		case STRIPE_IN_PROGRESS:
			CHECK(false);
			break;
		case STRIPE_COMPLETED:
			CHECK(input.status >= 200 && input.status <= 299 && seen.whole);
			CHECK(object && json_object_member(&reply->body.json->root, "error") == NULL);
			break;
		case STRIPE_FAILED:
			CHECK(input.status >= 400 && input.status <= 499 && seen.whole);
			CHECK(input.status != 401 && input.status != 403 && input.status != 408 &&
				  input.status != 424 && input.status != 429);
			CHECK(stripes);
			CHECK(!equals_member(reply->body.json, "code", "idempotency_key_in_use"));
			break;
		case STRIPE_MISMATCH:
			CHECK(input.status >= 400 && input.status <= 499);
			CHECK(equals_member(reply->body.json, "type", "idempotency_error"));
			break;
		case STRIPE_NOT_EXECUTED:
			CHECK(!input.sent || (stripes && seen.whole));
			CHECK(!input.sent || input.status == 401 || input.status == 403 || input.status == 409 ||
				  input.status == 429);
			if (input.status == 409)
				CHECK(!equals_member(reply->body.json, "code", "idempotency_key_in_use"));
			CHECK(reply->resend);
			break;
		case STRIPE_UNKNOWN:
			CHECK(input.sent);
			CHECK(reply->resend || (input.status == 500 && stripes && !v2));
			break;
	}
	if (!input.sent)
		CHECK(reply->result.outcome == STRIPE_NOT_EXECUTED);
	if (reply->result.outcome != STRIPE_COMPLETED && !object)
		CHECK(reply->body.error != NULL);
}

/* The target, called by backend.c. */
int
fuzz_answer(const uint8 *data, size_t size)
{
	StripeRequest request;
	ApiKey		key;
	Duration	timeout;
	StripeDeadline deadline;
	StripeReply reply;
	Jsonb	   *json;
	bool		object;
	bool		stripes;		/* an error in Stripe's words */
	bool		v2;
	StripeAnswer answer;
	StripeClass class;

	if (!take_input(data, size))
		return 0;
	memset(&request, 0, sizeof(request));
	request.method = "POST";
	request.target = "/v1/payment_intents";
	request.account = "";
	request.version = "2026-10-28.endive";
	request.idempotency_key = "a key";
	request.content_type = "application/x-www-form-urlencoded";
	request.body = "amount=1";
	request.body_len = 8;
	v2 = (data[2] & 8) != 0;
	if (v2)
		request.target = "/v2/core/accounts";
	if ((data[2] & 16) != 0)
		request.idempotency_key = NULL;

	memset(&key, 0, sizeof(key));
	strcpy(key.secret, "sk_test_fuzz");
	memset(&timeout, 0, sizeof(timeout));
	exchange_deadline(&deadline, timeout);
	exchange(&request, &key, &deadline, &reply);

	check_headers();

	/* parse the body a second time, if it is JSON that jsonb takes as it is */
	json = jsonb_from_text(input.body, input.body_len);
	object = json != NULL && JB_ROOT_IS_OBJECT(json) && seen.whole;
	if (object)
	{
		CHECK(reply.body.json != NULL &&
			  compareJsonbContainers(&json->root, &reply.body.json->root) == 0);
		CHECK((reply.body.error_type != NULL) ==
			  (json_string_member(json_object_member(&json->root, "error"), "type") != NULL));
	}
	if (!seen.whole)
		CHECK(reply.body.json == NULL);
	object = reply.body.json != NULL;
	stripes = object && (reply.body.error_type != NULL || reply.body.error_code != NULL);

	CHECK(reply.attempts == 1 && reply.result.sent == input.sent && reply.result.http_status == input.status);
	CHECK(reply.body.resource_id == NULL || strlen(reply.body.resource_id) <= STRIPE_ID_MAX);
	CHECK(reply.body.resource_type == NULL || strlen(reply.body.resource_type) <= STRIPE_ID_MAX);
	CHECK((reply.result.request_id == NULL) == (seen.request_id[0] == '\0'));
	CHECK(reply.reason != NULL && reply.reason[0] != '\0');

	check_outcome(&reply, object, stripes, v2);

	/*
	 * What is settled, or what Stripe has answered before, is not sent again
	 * at once.
	 */
	answer.http_status = input.status;
	answer.sent = input.sent;
	answer.genuine = reply.genuine;
	answer.api_v2 = v2;
	answer.error_type = reply.body.error_type;
	answer.error_code = reply.body.error_code;
	class = stripe_classify(&answer);
	CHECK(class.outcome == reply.result.outcome);
	if (stripe_retry_at_once(&answer, &class, seen.should_retry, seen.replayed))
	{
		CHECK(class.outcome != STRIPE_COMPLETED && class.outcome != STRIPE_MISMATCH);
		CHECK(!seen.replayed || input.status == 0 || !answer.genuine);
	}
	return 0;
}
