/*-------------------------------------------------------------------------
 *
 * stripe_answer.c
 *	  What stands in Stripe's answers, and which answers are Stripe's.
 *
 * An answer comes to us in several ways: stripe_call() has sent the request
 * itself, stripe_record() is told by an application, a row of the ledger has
 * kept it.  Whichever way it came, stripe_judge() says what it means for the
 * call, by the table of stripe_outcome.c.
 *
 * A body is whatever came: nothing here raises an error for what it says.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/stripe/stripe_answer.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/json_member.h"
#include "stripe/api_path.h"
#include "stripe/stripe_answer.h"

#define HTTP_NO_CONTENT 204
#define HTTP_NOT_FOUND 404

/* Stripe's ids have 255 characters at most; what is longer is none. */
static void
drop_if_long(char **value)
{
	if (*value != NULL && strlen(*value) > STRIPE_ID_MAX)
		*value = NULL;
}

/* The status of an object, or NULL. */
char *
stripe_object_status(JsonbContainer *object)
{
	char	   *status = json_string_member(object, "status");

	drop_if_long(&status);
	return status;
}

static void
read_livemode(JsonbContainer *object, StripeBody *body)
{
	JsonbValue	value;

	if (!json_member(object, "livemode", &value) || value.type != jbvBool)
		return;
	body->livemode = livemode_of(value.val.boolean);
}

/*
 * The object that a refused call left behind: a declined card leaves its
 * payment intent in the error.
 */
static void
resource_of_error(JsonbContainer *error, StripeBody *body)
{
	static const char *const members[] = {"payment_intent", "setup_intent", "charge"};
	int			i;

	for (i = 0; i < lengthof(members); i++)
	{
		JsonbContainer *object = json_object_member(error, members[i]);
		char	   *id = json_string_member(object, "id");

		if (id == NULL)
			id = json_string_member(error, members[i]);
		if (id != NULL)
		{
			body->resource_id = id;
			body->resource_type = pstrdup(members[i]);
			body->resource_status = stripe_object_status(object);
			read_livemode(object, body);
			return;
		}
	}
}

/*
 * Make out a body, or none.
 */
void
stripe_read_body(Jsonb *json, StripeBody *body)
{
	JsonbContainer *root = json != NULL ? &json->root : NULL;
	JsonbContainer *error = json_object_member(root, "error");
	JsonbValue	value;

	memset(body, 0, sizeof(StripeBody));
	body->json = json;
	body->livemode = LIVEMODE_UNKNOWN;

	if (error != NULL)
	{
		if (json_member(root, "error", &value))
			body->error = JsonbValueToJsonb(&value);
		body->error_type = json_string_member(error, "type");
		body->error_code = json_string_member(error, "code");
		resource_of_error(error, body);
	}
	else
	{
		body->resource_id = json_string_member(root, "id");
		body->resource_type = json_string_member(root, "object");
		body->resource_status = stripe_object_status(root);
	}

	drop_if_long(&body->resource_id);
	drop_if_long(&body->resource_type);

	read_livemode(root, body);
}

/*
 * Does a body speak of an error?  No success of Stripe's has an error object.
 * An error that is anything else is somebody else's word, but for a member of
 * that name in one of Stripe's objects, which say what they are
 * (reporting.report_run).
 */
static bool
says_error(const StripeBody *body)
{
	JsonbValue	value;

	return body->error != NULL ||
		(body->json != NULL && json_member(&body->json->root, "error", &value) &&
		 value.type != jbvNull && body->resource_type == NULL);
}

static bool
is_delete(const StripeReceived *received)
{
	return received->method != NULL && pg_strcasecmp(received->method, "DELETE") == 0;
}

/*
 * Is this error one of Stripe's?  API v1 has a type in each, out of a short list
 * (api/errors, and what older versions say).  Gateways have codes, too, and
 * types of their own.  API v2 has more types than are listed anywhere, and some
 * errors with just a code, so there either is taken.
 */
static bool
is_error_of_stripe(const StripeReceived *received, const StripeBody *body)
{
	static const char *const types[] = {
		"api_error", "card_error", "idempotency_error", "invalid_request_error",
		"authentication_error", "rate_limit_error", "api_connection_error"
	};
	int			i;

	if (received->path != NULL && path_is_v2(received->path))
		return body->error_type != NULL || body->error_code != NULL;
	if (body->error_type == NULL)
		return false;
	for (i = 0; i < lengthof(types); i++)
	{
		if (strcmp(body->error_type, types[i]) == 0)
			return true;
	}
	return false;
}

/*
 * Is this an answer of Stripe's, and all of it?
 *
 * A refusal or a failure is, if its body is an object with an error object of
 * Stripe's.  A success is, if its body is an object
 * and doesn't speak of an error, if whoever has had it names what was made, and
 * if it has no content and answers a DELETE.  An answer that somebody tells
 * without its status is either.
 */
static bool
is_genuine(const StripeReceived *received, const StripeBody *body)
{
	if (!received->whole)
		return false;
	if (is_error_of_stripe(received, body))
		return received->http_status / 100 != 2;
	if (received->http_status != 0 && received->http_status / 100 != 2)
		return false;
	if (body->json != NULL && JB_ROOT_IS_OBJECT(body->json))
		return !says_error(body);
	return received->resource_id != NULL ||
		(body->json == NULL && received->http_status == HTTP_NO_CONTENT && is_delete(received));
}

/*
 * Does Stripe pay no regard to the key?  API v1 has no idempotency for DELETE, so
 * that each attempt is executed anew, and what it is told may follow from what
 * another one has done.  With a key that can't be: a request that was executed is
 * answered by its own answer, marked as replayed, whatever else has become true; a
 * refusal that isn't says that none was.
 */
static bool
has_no_key(const StripeReceived *received)
{
	return is_delete(received) && received->path != NULL && !path_is_v2(received->path);
}

/* The same where it may be: an application may have told no more than the method. */
static bool
may_have_no_key(const StripeReceived *received)
{
	return is_delete(received) && (received->path == NULL || has_no_key(received));
}

/*
 * Where an attempt before may have deleted the object, that it isn't there is
 * what was wanted.
 */
static bool
is_gone_already(const StripeReceived *received, const StripeAnswer *answer)
{
	return answer->genuine && received->http_status == HTTP_NOT_FOUND &&
		received->uncertain && has_no_key(received) &&
		answer->error_code != NULL && strcmp(answer->error_code, "resource_missing") == 0;
}

/*
 * Say what an answer means for the call.  Its body has been read; what a body
 * that isn't Stripe's says of an object is forgotten, so that no such id is
 * taken for one of Stripe's.
 */
StripeClass
stripe_judge(const StripeReceived *received, StripeBody *body, StripeAnswer *answer)
{
	static const StripeClass gone_already = {
		STRIPE_COMPLETED, false, false, gettext_noop("it is gone already")
	};
	static const StripeClass in_doubt = {
		STRIPE_UNKNOWN, false, false,
		gettext_noop("Stripe refused the request, and another attempt may be why")
	};
	StripeClass class;

	answer->http_status = received->http_status;
	answer->sent = received->sent;
	answer->genuine = is_genuine(received, body);
	answer->error_type = body->error_type;
	answer->error_code = body->error_code;
	answer->api_v2 = received->path != NULL && path_is_v2(received->path);

	if (!answer->genuine)
	{
		body->resource_id = NULL;
		body->resource_type = NULL;
		body->resource_status = NULL;
		body->livemode = LIVEMODE_UNKNOWN;
	}

	if (is_gone_already(received, answer))
		return gone_already;
	class = stripe_classify(answer);
	if (class.outcome == STRIPE_FAILED && may_have_no_key(received) &&
		(received->uncertain || received->overtaken))
		return in_doubt;
	return class;
}

/*
 * What a judged body says, for the ledger.  Of one that is not Stripe's nothing
 * is kept, but for its error object.
 */
void
stripe_body_result(const StripeBody *body, bool genuine, CallResult *result)
{
	result->response = genuine ? body->json : NULL;
	result->error = body->error;
	result->resource_id = body->resource_id;
	result->resource_type = body->resource_type;
	result->resource_status = body->resource_status;
	result->livemode = body->livemode;
}
