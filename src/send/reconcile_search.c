/*-------------------------------------------------------------------------
 *
 * reconcile_search.c
 *	  Asking Stripe about one call, one way after the other.
 *
 * In steps, as long as they tell nothing and the budget of requests lasts:
 *
 *	kept events		what has come in already; costs no request
 *	object			the object that the row knows by id, or that the path names
 *	search			by the key in metadata, where the resource can be searched
 *	list			the objects made at that time, for the key in metadata
 *	events			the events of that time, for the key of their request
 *
 * Only what has this operation's key, or the id that the row knows, settles
 * it, and only as stripe_effect.c allows.  Metadata can be copied, so a list
 * is read to its end before an object counts as the one that has the key.
 * What is not found is not settled, however well it was looked for: a search
 * lags, metadata can be changed, and Stripe may carry out later what has
 * failed in the middle.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/send/reconcile_search.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "base/clock.h"
#include "base/json_build.h"
#include "base/json_member.h"
#include "base/settings.h"
#include "events/kept_events.h"
#include "send/reconcile.h"
#include "send/stripe_call.h"
#include "send/stripe_request.h"
#include "stripe/api_path.h"
#include "stripe/form.h"
#include "stripe/stripe_answer.h"

/* Objects in a page of a list, and in one if so many are too large. */
#define PAGE 100
#define SMALL_PAGE 10

/*
 * Stripe's clock and ours may differ, and what was sent last may have been on
 * its way for as long as a call lasts.
 */
#define BEFORE_FIRST (5 * USECS_PER_MINUTE)
#define AFTER_LAST (10 * USECS_PER_MINUTE)

/* How far back events reach: https://docs.stripe.com/api/events */
#define EVENTS_REACH (30 * USECS_PER_DAY)

/* ---------- the operation ---------- */

/* A moment of a row, or 0. */
static TimestampTz
time_of(LedgerRow *row, int column)
{
	return row->isnull[column] ? 0 : DatumGetTimestampTz(row->values[column]);
}

/*
 * Does an object's metadata contain this value?  Sets *name, unless that is
 * NULL, to the value's name.
 */
static bool
metadata_has(JsonbContainer *metadata, const char *wanted, char **name)
{
	JsonbIterator *it;
	JsonbIteratorToken token;
	JsonbValue	value;
	char	   *last_name = NULL;

	if (metadata == NULL)
		return false;
	it = JsonbIteratorInit(metadata);
	while ((token = JsonbIteratorNext(&it, &value, true)) != WJB_DONE)
	{
		if (token == WJB_KEY)
			last_name = pnstrdup(value.val.string.val, value.val.string.len);
		else if (token == WJB_VALUE && value.type == jbvString &&
				 value.val.string.len == strlen(wanted) &&
				 memcmp(value.val.string.val, wanted, value.val.string.len) == 0)
		{
			if (name != NULL)
				*name = last_name;
			return true;
		}
	}
	return false;
}

/*
 * Find out whether the object may have the key in its metadata, and by which
 * name.  The parameters and the bytes that were sent tell; if an application
 * has sent the call itself, its bytes are not known and may have had the key.
 */
static void
look_for_metadata(Doubt *doubt, bytea *body)
{
	static const char *const members[] = {"params", "body"};
	StringInfoData encoded;
	int			i;

	doubt->metadata_name = METADATA_NAME;
	for (i = 0; i < lengthof(members); i++)
	{
		JsonbContainer *params = json_object_member(&doubt->request->root, members[i]);

		if (metadata_has(json_object_member(params, "metadata"), doubt->key,
						 &doubt->metadata_name))
			doubt->in_metadata = true;
	}
	if (body == NULL)
		doubt->in_metadata = true;
	if (doubt->in_metadata)
		return;

	initStringInfo(&encoded);
	form_append(&encoded, true, "metadata[" METADATA_NAME "]", doubt->key);
	for (i = 0; i + encoded.len <= VARSIZE_ANY_EXHDR(body); i++)
	{
		if (memcmp(VARDATA_ANY(body) + i, encoded.data, encoded.len) == 0)
			doubt->in_metadata = true;
	}
}

/* The path of an object in a collection, or NULL if the id cannot be in one. */
static char *
object_path(const char *collection, const char *id)
{
	char	   *path = psprintf("%s/%s", collection, id);

	return strchr(id, '/') == NULL && path_problem(path) == NULL ? path : NULL;
}

/*
 * Find out from the row of an operation what is to be asked about it.
 */
void
reconcile_read(Reconcile *r, Doubt *doubt, LedgerRow *row, TimestampTz now)
{
	char	   *resource_id = stripe_row_string(row, S_RESOURCE_ID);
	Step	   *steps = doubt->steps;
	bool		post;

	doubt->token = DatumGetInt64(row->values[S_TOKEN]);
	doubt->generation = DatumGetInt32(row->values[S_GENERATION]);
	doubt->key = stripe_row_string(row, S_IDEMPOTENCY_KEY);
	doubt->version = stripe_row_string(row, S_API_VERSION);
	if (doubt->version == NULL)
		doubt->version = setting_stripe_version;
	if (!row->isnull[S_REQUEST])
		doubt->request = DatumGetJsonbPCopy(row->values[S_REQUEST]);

	doubt->from = time_of(row, S_FIRST_SENT_AT) != 0 ? time_of(row, S_FIRST_SENT_AT) :
		time_of(row, S_CREATED_AT);
	doubt->to = Max(Max(time_of(row, S_CLAIMED_AT), time_of(row, S_RECORDED_AT)),
					time_of(row, S_LEASE_EXPIRES_AT));
	doubt->from -= BEFORE_FIRST;
	doubt->to += AFTER_LAST;

	if (doubt->request != NULL)
	{
		doubt->method = json_string_member(&doubt->request->root, "method");
		doubt->path = json_string_member(&doubt->request->root, "path");
	}
	if (doubt->method == NULL)
		doubt->method = "POST";
	if (doubt->path != NULL)
		doubt->path[strcspn(doubt->path, "?")] = '\0';
	if (doubt->path == NULL || path_problem(doubt->path) != NULL)
	{
		doubt->skipped = "it is not known which path was called";
		return;
	}

	post = pg_strcasecmp(doubt->method, "POST") == 0;
	place_of_call(doubt->path, &doubt->place);
	look_for_metadata(doubt, row->isnull[S_BODY] ? NULL : DatumGetByteaPP(row->values[S_BODY]));

	if (doubt->place.object != NULL)
		steps[ASK_OBJECT].path = doubt->place.object;
	else if (resource_id != NULL && post && strstr(doubt->path, resource_id) == NULL)
		steps[ASK_OBJECT].path = object_path(doubt->path, resource_id);
	if (post && !path_is_v2(doubt->path))
	{
		if (doubt->in_metadata)
		{
			steps[ASK_SEARCH].path = doubt->place.search;
			steps[ASK_LIST].path = doubt->place.list;
		}
		steps[ASK_EVENTS].path = "/v1/events";
		if (doubt->from < now - EVENTS_REACH)
		{
			steps[ASK_EVENTS].done = steps[ASK_EVENTS].touched = true;
			steps[ASK_EVENTS].problem = "events reach back 30 days only";
			steps[ASK_EVENTS].at = now;
		}
	}
	if (!row->isnull[S_RECONCILED])
		reconcile_go_on(doubt, DatumGetJsonbP(row->values[S_RECONCILED]), time_of(row, S_CLAIMED_AT),
			  r->key.live);
}

/* ---------- asking ---------- */

/* Copy a string, or NULL, so that it lasts until the function returns. */
static char *
keep_string(Reconcile *r, const char *string)
{
	return string == NULL ? NULL : MemoryContextStrdup(r->keep, string);
}

/* A string that may be an id, a type or a state; NULL if it is too long. */
static const char *
short_string(const char *string)
{
	return string != NULL && strlen(string) <= STRIPE_ID_MAX ? string : NULL;
}

/*
 * Make one request.  Returns true if there is a body to look at.
 */
static bool
ask(Reconcile *r, Doubt *doubt, Step *step, const char *query, StripeReply *reply)
{
	StripeRequest request;
	StripeDeadline deadline;
	Duration	no_timeout = {false, 0};
	const char *problem;

	step->touched = true;
	step->at = GetCurrentTimestamp();
	if (!path_is_allowed(setting_stripe_allowed_paths, "GET", step->path))
	{
		step->problem = "not allowed by idempotency.stripe_allowed_paths";
		step->done = true;
		return false;
	}

	memset(&request, 0, sizeof(request));
	request.method = "GET";
	request.target = query == NULL ? step->path : psprintf("%s?%s", step->path, query);
	request.account = doubt->op.account;
	request.version = doubt->version;
	request.max_attempts = r->left;
	exchange_deadline(&deadline, no_timeout);
	exchange(&request, &r->key, &deadline, reply);
	log_stripe_call(request.method, step->path, request.account,
					psprintf("%s:%s", doubt->op.type, doubt->op.id), doubt->generation,
					NULL, reply, reply->result.outcome, r->key.live);

	r->left -= reply->attempts;
	doubt->requests += reply->attempts;
	step->requests += reply->attempts;
	step->http_status = reply->result.http_status;
	step->request_id = keep_string(r, reply->result.request_id);
	step->problem = NULL;
	if (reply->result.outcome == STRIPE_COMPLETED && reply->body.json != NULL)
		return true;

	/* too many large objects at once */
	if (reply->result.http_status >= 200 && reply->result.http_status < 300 && step->page > SMALL_PAGE)
	{
		step->page = SMALL_PAGE;
		return false;
	}

	problem = short_string(reply->body.error_code);
	if (problem == NULL)
		problem = short_string(reply->body.error_type);
	step->problem = keep_string(r, problem != NULL ? problem : reply->reason);

	/* no answer, 401 and 429 may change later; any other stays as it is */
	step->done = reply->result.http_status != 0 && reply->result.http_status != 401 &&
		reply->result.http_status != 429;
	if (!step->done || reply->result.http_status == 403 || reply->result.http_status >= 500)
		r->stopped = step->problem;
	return false;
}

/* Note what is about the call, whether it settles it or not. */
static void
note_found(Reconcile *r, Step *step, const char *id, const char *type, const char *status,
		   const WebhookEvent *event)
{
	MemoryContext old = MemoryContextSwitchTo(r->keep);
	StringInfoData json;

	initStringInfo(&json);
	appendStringInfoChar(&json, '{');
	json_add_string(&json, "id", short_string(id));
	json_add_string(&json, "type", short_string(type));
	json_add_string(&json, "status", short_string(status));
	if (event != NULL)
	{
		json_add_string(&json, "stripe_event_id", event->id);
		json_add_string(&json, "event_type", short_string(event->type));
	}
	appendStringInfoChar(&json, '}');
	step->found = json.data;
	MemoryContextSwitchTo(old);
}

/* Is an answer of the mode of the key, or does it not say? */
static bool
is_of_mode(Reconcile *r, JsonbContainer *object)
{
	bool		live;

	return !json_bool_member(object, "livemode", &live) || live == r->key.live;
}

/*
 * Find out what an object that seems to be the one says about the call.
 */
static void
judge_object(Reconcile *r, Doubt *doubt, Step *step, JsonbValue *value, FoundBy found_by)
{
	MemoryContext old = MemoryContextSwitchTo(r->keep);
	Jsonb	   *json = JsonbValueToJsonb(value);
	JsonbContainer *object = &json->root;
	Finding    *finding = &doubt->finding;
	char	   *id = json_string_member(object, "id");
	char	   *type = json_string_member(object, "object");
	bool		deleted = false;
	StripeOutcome outcome = STRIPE_UNKNOWN;

	note_found(r, step, id, type, json_string_member(object, "status"), NULL);
	json_bool_member(object, "deleted", &deleted);
	memset(finding, 0, sizeof(Finding));
	doubt->candidate = false;

	/*
	 * A DELETE with a verb takes something away from the object, as in
	 * customers/ID/discount.
	 */
	if (pg_strcasecmp(doubt->method, "DELETE") == 0)
		outcome = deleted && strcmp(doubt->path, step->path) == 0 ?
			STRIPE_COMPLETED : STRIPE_UNKNOWN;
	else if (!deleted)
		outcome = outcome_of_object(object, doubt->request);

	if (stripe_is_definitive(outcome) && short_string(id) != NULL && id[0] != '\0' &&
		is_of_mode(r, object))
	{
		finding->result.outcome = outcome;
		finding->result.resource_id = id;
		finding->result.resource_type = short_string(type);
		finding->result.resource_status = stripe_object_status(object);
		finding->result.livemode = livemode_of(r->key.live);
		finding->result.response = json;
		doubt->found_by = found_by;
		doubt->candidate = true;
	}
	MemoryContextSwitchTo(old);
}

/*
 * An object has the key in its metadata.  Returns whether it is the only one so
 * far: if not, the metadata was copied, and nothing tells which is the
 * original.  Sets *again if this very object was seen before.
 */
static bool
is_only_one(Reconcile *r, Doubt *doubt, Step *step, const char *id, char *page_after, bool *again)
{
	*again = step->pending != NULL && strcmp(step->pending, id) == 0;
	if (step->pending != NULL && !*again)
		doubt->several = true;
	if (step->pending == NULL)
	{
		step->pending = keep_string(r, id);
		step->pending_after = page_after;
	}
	return !doubt->several;
}

/* Once all is seen, what was found by metadata counts if it is the only one. */
static void
count_pending(Doubt *doubt, const Step *step)
{
	if (step->complete && step->pending != NULL && doubt->candidate && !doubt->several)
		doubt->known = true;
}

/*
 * Ask for the object that the row knows by its id, or that the call was about.
 */
static void
ask_object(Reconcile *r, Doubt *doubt, Step *step)
{
	StripeReply reply;
	JsonbValue	value;
	char	   *id;

	if (!ask(r, doubt, step, NULL, &reply))
		return;
	step->done = true;
	id = reply.body.resource_id;
	if (id == NULL || strcmp(id, strrchr(step->path, '/') + 1) != 0)
	{
		step->problem = "another object came back";
		return;
	}

	value.type = jbvBinary;
	value.val.binary.data = &reply.body.json->root;
	value.val.binary.len = VARSIZE(reply.body.json) - VARHDRSZ;
	judge_object(r, doubt, step, &value, BY_OBJECT);
	doubt->known = doubt->candidate;
}

/* Restrict a query to what was made when the call may have been carried out. */
static void
add_created(StringInfo query, const Doubt *doubt)
{
	appendStringInfo(query, "&created[gte]=" INT64_FORMAT "&created[lte]=" INT64_FORMAT,
					 unix_seconds(doubt->from), unix_seconds(doubt->to));
}

/*
 * The elements of a page.  Sets where the next page begins, and *more if there
 * is one.  Returns NULL if the answer is no page.
 */
static JsonbContainer *
open_page(Reconcile *r, Step *step, const StripeReply *reply, bool *more)
{
	JsonbContainer *root = &reply->body.json->root;
	JsonbContainer *data;
	JsonbValue	value;
	int			n;

	*more = false;
	if (!json_member(root, "data", &value) || value.type != jbvBinary ||
		!JsonContainerIsArray(value.val.binary.data))
	{
		step->problem = "not a list";
		step->done = true;
		return NULL;
	}
	data = value.val.binary.data;
	n = JsonContainerSize(data);
	step->seen += n;
	json_bool_member(root, "has_more", more);

	step->after = NULL;
	if (*more && n > 0)
	{
		JsonbValue *last = getIthJsonbValueFromContainer(data, n - 1);

		if (last->type == jbvBinary)
			step->after = keep_string(r, short_string(json_string_member(last->val.binary.data,
																		 "id")));
	}
	if (step->after == NULL)
	{
		step->done = true;
		step->complete = !*more;
	}
	return data;
}

/*
 * Look in a page of objects for one that has the key in its metadata.
 */
static void
look_at_objects(Reconcile *r, Doubt *doubt, Step *step, const StripeReply *reply)
{
	char	   *page_after = step->after;
	bool		more;
	JsonbContainer *data = open_page(r, step, reply, &more);
	int			i;

	for (i = 0; data != NULL && i < JsonContainerSize(data); i++)
	{
		JsonbValue *value = getIthJsonbValueFromContainer(data, i);
		char	   *key;
		char	   *id;
		bool		again;

		if (value->type != jbvBinary)
			continue;
		key = key_in_metadata(json_object_member(value->val.binary.data, "metadata"));
		id = json_string_member(value->val.binary.data, "id");
		if (key == NULL || id == NULL || strcmp(key, doubt->key) != 0)
			continue;
		if (is_only_one(r, doubt, step, id, page_after, &again) && !again)
			judge_object(r, doubt, step, value, BY_METADATA);
	}
	if (doubt->several)
		step->done = true;
	count_pending(doubt, step);
}

/* Search for objects that have the key in their metadata. */
static void
ask_search(Reconcile *r, Doubt *doubt, Step *step)
{
	StringInfoData query;
	StringInfoData text;
	const char *parts[2] = {doubt->metadata_name, doubt->key};
	StripeReply reply;
	int			i;

	/* metadata['NAME']:'KEY' */
	initStringInfo(&text);
	for (i = 0; i < lengthof(parts); i++)
	{
		const char *p;

		appendStringInfoString(&text, i == 0 ? "metadata['" : "']:'");
		for (p = parts[i]; *p != '\0'; p++)
		{
			if (*p == '\'' || *p == '\\')
				appendStringInfoChar(&text, '\\');
			appendStringInfoChar(&text, *p);
		}
	}
	appendStringInfoChar(&text, '\'');

	initStringInfo(&query);
	appendStringInfo(&query, "limit=%d", SMALL_PAGE);
	form_append(&query, false, "query", text.data);
	if (ask(r, doubt, step, query.data, &reply))
	{
		look_at_objects(r, doubt, step, &reply);
		step->done = true;
		step->after = NULL;
	}
}

/* Ask for one page of the objects made at that time. */
static void
ask_list(Reconcile *r, Doubt *doubt, Step *step)
{
	StringInfoData query;
	StripeReply reply;

	initStringInfo(&query);
	appendStringInfo(&query, "limit=%d", step->page);
	if (doubt->place.list_created)
		add_created(&query, doubt);
	if (doubt->place.list_query[0] != '\0')
		appendStringInfo(&query, "&%s", doubt->place.list_query);
	if (step->after != NULL)
		form_append(&query, false, "starting_after", step->after);
	if (ask(r, doubt, step, query.data, &reply))
		look_at_objects(r, doubt, step, &reply);
}

/*
 * Ask for one page of events, newest first, and look for one that the call has
 * caused.
 */
static void
ask_events(Reconcile *r, Doubt *doubt, Step *step)
{
	StringInfoData query;
	StripeReply reply;
	JsonbContainer *data;
	char	   *page_after;
	bool		more;
	int			i;

	initStringInfo(&query);
	appendStringInfo(&query, "limit=%d", step->page);
	if (doubt->place.events != NULL)
		form_append(&query, false, "type", doubt->place.events);
	add_created(&query, doubt);
	if (step->after != NULL)
		form_append(&query, false, "starting_after", step->after);
	if (!ask(r, doubt, step, query.data, &reply))
		return;

	page_after = step->after;
	data = open_page(r, step, &reply, &more);
	for (i = 0; data != NULL && i < JsonContainerSize(data) && !doubt->known; i++)
	{
		JsonbValue *value = getIthJsonbValueFromContainer(data, i);
		WebhookEvent event;
		Finding		finding;
		FoundBy		found_by;
		MemoryContext old;
		bool		again;

		/* an event that names no account is of the one that was asked for */
		if (value->type != jbvBinary ||
			!webhook_event_read(JsonbValueToJsonb(value), &event) ||
			(event.account[0] != '\0' && !may_be_of_account(&event, doubt->op.account)) ||
			(event.livemode_known && event.livemode != r->key.live))
			continue;
		if (event.idempotency_key != NULL && strcmp(event.idempotency_key, doubt->key) == 0)
			found_by = BY_KEY;
		else if (event.metadata_key != NULL && strcmp(event.metadata_key, doubt->key) == 0)
			found_by = BY_METADATA;
		else
			continue;

		note_found(r, step, event.object_id, event.object_type,
				   json_string_member(event.object, "status"), &event);
		if (!finding_of_event(&event, found_by, doubt->request, &finding) ||
			(found_by == BY_METADATA &&
			 (!is_only_one(r, doubt, step, event.object_id, page_after, &again) || again)))
			continue;

		/* read it once more, into memory that lasts */
		old = MemoryContextSwitchTo(r->keep);
		(void) webhook_event_read(JsonbValueToJsonb(value), &event);
		doubt->candidate = finding_of_event(&event, found_by, doubt->request, &doubt->finding);
		doubt->known = doubt->candidate && found_by == BY_KEY;
		doubt->found_by = found_by;
		doubt->event_id = event.id;
		doubt->event_type = event.type;
		MemoryContextSwitchTo(old);
	}
	count_pending(doubt, step);
}

/*
 * Ask about one operation until it is known, or there is nothing left to ask.
 */
void
reconcile_ask(Reconcile *r, Doubt *doubt)
{
	static void (*const steps[ASK_NSTEPS]) (Reconcile *r, Doubt *doubt, Step *step) = {
		ask_object, ask_search, ask_list, ask_events
	};
	MemoryContext old = MemoryContextSwitchTo(r->work);
	bool		found = false;
	int			i;

	MemoryContextReset(r->work);
	doubt->told = settle_by_kept_events(doubt->op.key, 0, true);
	MemoryContextSwitchTo(old);
	if (doubt->told)
		return;

	doubt->asked = doubt->skipped != NULL;
	for (i = 0; i < ASK_NSTEPS && doubt->skipped == NULL; i++)
	{
		Step	   *step = &doubt->steps[i];

		/* what was found by one way is not looked for by the next */
		if (found && (i == ASK_SEARCH || i == ASK_LIST))
			step->done = true;

		step->page = i == ASK_LIST || i == ASK_EVENTS ? PAGE : SMALL_PAGE;
		while (step->path != NULL && !step->done && !doubt->known &&
			   r->left > 0 && r->stopped == NULL)
		{
			CHECK_FOR_INTERRUPTS();
			MemoryContextReset(r->work);
			old = MemoryContextSwitchTo(r->work);
			steps[i] (r, doubt, step);
			MemoryContextSwitchTo(old);
		}
		found = found || step->found != NULL;
	}

	/* an operation that there was no time to ask about keeps its place */
	doubt->asked = doubt->asked || doubt->requests > 0 || r->stopped == NULL;
}
