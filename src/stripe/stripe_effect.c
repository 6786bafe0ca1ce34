/*-------------------------------------------------------------------------
 *
 * stripe_effect.c
 *	  What an event or an object of Stripe's says about a call.
 *
 * The path of a call says which object it was to make or to change, and the
 * call is judged by that very object only: a payment also touches charges,
 * invoices and balances, with the same key, and the retry has to be given the
 * right id.  And the outcome must follow from what is seen: that a payment
 * intent exists does not tell whether the confirmation in the same call was
 * declined.  If it does not follow, nothing is said.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/stripe/stripe_effect.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/json_member.h"
#include "stripe/stripe_effect.h"

const char *const found_by_names[] = {"idempotency_key", "metadata", "object"};

/* What was done to the object that a call is about. */
typedef enum CallKind
{
	CALL_OTHER,					/* it is about another object */
	CALL_CREATES,
	CALL_CHANGES
} CallKind;

static bool
ends_with(const char *string, const char *end)
{
	size_t		len = strlen(string);
	size_t		endlen = strlen(end);

	return len >= endlen && strcmp(string + len - endlen, end) == 0;
}

/*
 * The collection of an object type in a path: payment_intent is found at
 * payment_intents, checkout.session at checkout/sessions.
 */
static char *
collection_of_type(const char *type)
{
	char	   *collection = psprintf("%s%s", type, "ies");
	size_t		len = strlen(type);
	char	   *p;

	if (len > 0 && type[len - 1] == 'y')
		strcpy(collection + len - 1, "ies");
	else
		strcpy(collection + len, "s");
	for (p = collection; *p != '\0'; p++)
	{
		if (*p == '.')
			*p = '/';
	}
	return collection;
}

/*
 * Is the object the one that this path makes or changes?  Sets *verb to what is
 * done to one that is changed, "" for an update; it points into the path.
 *
 * There are three forms: /v1/COLLECTION; /v1/COLLECTION/ID, and a verb after
 * it; and /v1/COLLECTION/ID/COLLECTION, where the inner one is the type's own
 * (charges/ID/refunds) or named after both (transfers/ID/reversals:
 * transfer_reversal).
 */
static CallKind
call_kind(const char *path, const char *type, const char *id, const char **verb)
{
	char	   *collection = collection_of_type(type);
	size_t		len = strlen(collection);
	char	   *copy;
	char	   *outer;
	char	   *inner;

	*verb = "";
	if (strncmp(path, "/v1/", 4) == 0)
		path += 4;
	else if (strncmp(path, "/v2/", 4) == 0 && strncmp(collection, "v2/", 3) == 0)
		path += 1;
	else if (strncmp(path, "/v2/", 4) == 0)
		path += 4;
	else
		return CALL_OTHER;

	if (strcmp(path, collection) == 0)
		return CALL_CREATES;

	if (strncmp(path, collection, len) == 0 && path[len] == '/' &&
		strncmp(path + len + 1, id, strlen(id)) == 0)
	{
		const char *rest = path + len + 1 + strlen(id);

		if (*rest == '\0')
			return CALL_CHANGES;
		if (*rest == '/' && strchr(rest + 1, '/') == NULL && !ends_with(rest, "s"))
		{
			*verb = rest + 1;
			return CALL_CHANGES;
		}
		return CALL_OTHER;
	}

	/* outer/ID/inner */
	copy = pstrdup(path);
	outer = copy;
	inner = strrchr(copy, '/');
	if (inner == NULL)
		return CALL_OTHER;
	*inner++ = '\0';
	if (strrchr(outer, '/') == NULL)
		return CALL_OTHER;
	*strrchr(outer, '/') = '\0';
	if (strcmp(inner, collection) == 0)
		return CALL_CREATES;
	if (ends_with(outer, "s") && len > strlen(outer))
	{
		size_t		n = strlen(outer) - 1;

		if (strncmp(collection, outer, n) == 0 && collection[n] == '_' &&
			strcmp(collection + n + 1, inner) == 0)
			return CALL_CREATES;
	}
	if (strcmp(type, "fee_refund") == 0 && strcmp(outer, "application_fees") == 0 &&
		strcmp(inner, "refunds") == 0)
		return CALL_CREATES;
	return CALL_OTHER;
}

/*
 * Is a parameter of a request set, and not to false?  The parameters may have
 * either of two names.  Returns "otherwise" if there are none that can be read,
 * such as those of a body that is already encoded.
 */
static bool
param_is_set(JsonbContainer *request, const char *name, bool otherwise)
{
	static const char *const members[] = {"params", "body"};
	bool		readable = false;
	int			i;

	for (i = 0; i < lengthof(members); i++)
	{
		JsonbContainer *params = json_object_member(request, members[i]);
		JsonbValue	value;
		char	   *string;

		readable = readable || params != NULL;
		if (!json_member(params, name, &value) || value.type == jbvNull ||
			(value.type == jbvBool && !value.val.boolean))
			continue;
		string = json_string_member(params, name);
		if (string == NULL || (string[0] != '\0' && pg_strcasecmp(string, "false") != 0))
			return true;
	}
	return !readable && otherwise;
}

/* What a request was to do. */
typedef struct Judged
{
	CallKind	kind;
	bool		tries;			/* to move money at once, or to be allowed to */
} Judged;

/*
 * Find out what a request was to do with this object.  Returns false if that
 * cannot be said.
 */
static bool
judge_request(Jsonb *request_jsonb, const char *type, const char *id, Judged *judged)
{
	JsonbContainer *request = request_jsonb != NULL ? &request_jsonb->root : NULL;
	char	   *path = json_string_member(request, "path");
	char	   *method = json_string_member(request, "method");
	const char *verb;

	if (path == NULL || id == NULL || type == NULL ||
		(method != NULL && pg_strcasecmp(method, "POST") != 0))
		return false;

	path[strcspn(path, "?")] = '\0';
	judged->kind = call_kind(path, type, id, &verb);
	if (judged->kind == CALL_CREATES)
		judged->tries = strcmp(type, "charge") == 0 ||
			param_is_set(request, "confirm", strcmp(type, "payment_intent") == 0 ||
						 strcmp(type, "setup_intent") == 0);
	else
		judged->tries = strcmp(verb, "confirm") == 0 || strcmp(verb, "pay") == 0 ||
			strcmp(verb, "capture") == 0 || strcmp(verb, "increment_authorization") == 0;
	return judged->kind != CALL_OTHER;
}

/* Was the object of an event to be made by this request? */
bool
request_makes_object(Jsonb *request, const WebhookEvent *event)
{
	Judged		judged;

	return judge_request(request, event->object_type, event->object_id, &judged) &&
		judged.kind == CALL_CREATES;
}

/*
 * Does an event of this type say that a payment, or the permission for one, is
 * under way or made?  From others, such as that an invoice was finalized,
 * canceled or waits for its customer, this does not follow: the answer may have
 * been 402.
 */
static bool
event_went_on(const char *type)
{
	static const char *const ends[] = {
		".succeeded", ".payment_succeeded", ".paid", ".processing", ".pending",
		".requires_action", ".amount_capturable_updated", ".partially_funded",
		".captured", ".refunded"
	};
	int			i;

	for (i = 0; i < lengthof(ends); i++)
	{
		if (ends_with(type, ends[i]))
			return true;
	}
	return false;
}

/*
 * What an event says about a call: its outcome, or STRIPE_UNKNOWN where it
 * says nothing.
 *
 * A call that tries to move money at once can be answered with 402 although its
 * object exists, so for such a call the object's existence, or an update of it,
 * tells nothing.  For other calls it is all there is to know.
 *
 * Metadata can be copied, by applications and by Stripe (a revision of an
 * invoice).  An object that a request with another key has made is such a copy.
 *
 * A failure is the call's own if a request has caused it: without one it came
 * later, by itself, after the call was answered.
 */
StripeOutcome
outcome_of_event(const WebhookEvent *event, FoundBy found_by, Jsonb *request)
{
	Judged		judged;
	bool		failure;

	if (!judge_request(request, event->object_type, event->object_id, &judged) ||
		(judged.kind == CALL_CHANGES && found_by == BY_OBJECT))
		return STRIPE_UNKNOWN;
	if (found_by == BY_METADATA && judged.kind == CALL_CREATES &&
		ends_with(event->type, ".created") && event->idempotency_key != NULL &&
		strcmp(event->idempotency_key, event->metadata_key) != 0)
		return STRIPE_UNKNOWN;

	failure = ends_with(event->type, ".payment_failed") ||
		ends_with(event->type, ".setup_failed") || strcmp(event->type, "charge.failed") == 0;

	if (!judged.tries)
		return failure && found_by == BY_KEY ? STRIPE_UNKNOWN : STRIPE_COMPLETED;
	if (failure)
		return found_by == BY_KEY && event->request_id != NULL ? STRIPE_FAILED : STRIPE_UNKNOWN;
	if (!event_went_on(event->type))
		return STRIPE_UNKNOWN;
	return judged.kind == CALL_CREATES || found_by == BY_KEY ? STRIPE_COMPLETED : STRIPE_UNKNOWN;
}

/*
 * What an object, as it is now, says about the call that was to make it: its
 * outcome, or STRIPE_UNKNOWN.  That a call which changes something was carried out can't
 * be seen from the object, since others may have changed it.
 *
 * Nor can it be seen that a call which tries to move money was declined: the
 * object waits for a payment method then, as it also does after its customer
 * has failed to authenticate.
 */
StripeOutcome
outcome_of_object(JsonbContainer *object, Jsonb *request)
{
	static const char *const went_on[] = {
		"succeeded", "processing", "pending", "requires_action", "requires_capture"
	};
	char	   *status = json_string_member(object, "status");
	Judged		judged;
	int			i;

	if (!judge_request(request, json_string_member(object, "object"),
					   json_string_member(object, "id"), &judged) ||
		judged.kind != CALL_CREATES)
		return STRIPE_UNKNOWN;
	if (!judged.tries)
		return STRIPE_COMPLETED;
	for (i = 0; status != NULL && i < lengthof(went_on); i++)
	{
		if (strcmp(status, went_on[i]) == 0)
			return STRIPE_COMPLETED;
	}
	return STRIPE_UNKNOWN;
}
