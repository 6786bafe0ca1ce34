/*-------------------------------------------------------------------------
 *
 * reconcile.c
 *	  Finding out at Stripe what came of calls that nobody knows about.
 *
 * stripe_reconcile() reads, and never sends a call again.  It asks about
 * one operation after the other, the one that was asked about longest ago first,
 * in steps, as long as they tell nothing and the budget of requests lasts:
 *
 *	kept events		what has come in already; costs no request
 *	object			the object that the row knows by id, or that the path names
 *	search			by the key in metadata, where the resource can be searched
 *	list			the objects made at that time, for the key in metadata
 *	events			the events of that time, for the key of their request
 *
 * Only what has this operation's key, or the id that the row knows, settles it,
 * and only as stripe_effect.c allows.  Metadata can be copied, so a list is read
 * to its end before an object counts as the one that has the key.  What isn't found is not settled, however
 * well it was looked for: a search lags, metadata can be changed, and Stripe may
 * carry out later what has failed in the middle.  What was asked, how far it
 * went, and what was found is kept in the row's column "reconciled", and next
 * time a list that was cut is gone on with.  None of it has anything of a body,
 * but for ids, types and states.
 *
 * A row of one mode isn't asked about with a key of the other.
 *
 * All requests are made first, and the rows are written after the last one, in
 * the caller's transaction: while Stripe is asked no row is locked, and whoever
 * learns of the outcome meanwhile is free to record it.  A row that isn't then as
 * it was, or that somebody has locked, is left alone.  So a rollback loses
 * nothing but what can be read again.
 *
 * An operation whose row can't be written, because a trigger of somebody's
 * refuses it, is passed over with a WARNING: it would be the first again, and
 * those behind it would never have their turn.  So is one that an open
 * transaction is changing.
 *
 * An answer that says that we ask too much, or may not ask at all, and no answer,
 * end the function; what went wrong is evidence, not an error.
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
#include "utils/datetime.h"
#include "utils/fmgrprotos.h"
#include "utils/json.h"
#include "utils/memutils.h"
#include "utils/tuplestore.h"

#include "base/arguments.h"
#include "base/debug_point.h"
#include "base/errors.h"
#include "base/json_member.h"
#include "base/result_row.h"
#include "base/settings.h"
#include "base/subtransaction.h"
#include "calls/settle_by_event.h"
#include "calls/stripe_ledger.h"
#include "send/api_key.h"
#include "send/http_client.h"
#include "send/stripe_call.h"
#include "send/stripe_request.h"
#include "stripe/api_path.h"
#include "stripe/form.h"
#include "stripe/stripe_answer.h"
#include "stripe/stripe_effect.h"
#include "stripe/stripe_lookup.h"

PG_FUNCTION_INFO_V1(idempotency_stripe_reconcile);

#define MAX_REQUESTS 1000

/* Objects in a page of a list; the smaller where so many are too large. */
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

typedef enum StepKind
{
	ASK_OBJECT,
	ASK_SEARCH,
	ASK_LIST,
	ASK_EVENTS,
	ASK_NSTEPS
} StepKind;

static const char *const step_names[ASK_NSTEPS] = {"object", "search", "list", "events"};

/* One way of asking, and how far it has got; strings are NULL where there are none. */
typedef struct Step
{
	char	   *path;			/* NULL: it can't be asked like this */
	bool		done;
	bool		touched;		/* by this call of the function */
	bool		complete;		/* was all there is looked at? */
	int			page;
	int			requests;
	int			seen;			/* objects or events */
	int			http_status;	/* of the last answer */
	char	   *request_id;
	char	   *problem;
	char	   *after;			/* the last object of a list that was cut */
	char	   *pending;		/* id of what has the key, until all is seen */
	char	   *pending_after;	/* where the page begins that it is on */
	char	   *found;			/* JSON: what tells of it, but settles nothing */
	TimestampTz at;
	char	   *before;			/* JSON: what an earlier call has noted */
} Step;

/* One operation that isn't known. */
typedef struct Doubt
{
	Operation	op;
	int64		token;
	int			generation;
	char	   *key;
	char	   *method;
	char	   *path;
	char	   *version;		/* of the API */
	Jsonb	   *request;
	TimestampTz from;			/* when it may have been carried out */
	TimestampTz to;
	bool		in_metadata;	/* may its key be in metadata? */
	char	   *metadata_name;
	CallPlace	place;
	Step		steps[ASK_NSTEPS];
	int			requests;		/* of this call of the function */
	bool		several;		/* more than one object has the key */
	const char *skipped;		/* why nothing can be asked */
	bool		asked;			/* is there anything to be kept? */
	bool		told;			/* does an event that was kept say it? */
	bool		kept;			/* was it written down? */
	bool		candidate;		/* is there a finding, */
	bool		known;			/* and does it count? */
	FoundBy		found_by;
	char	   *event_id;
	char	   *event_type;
	Finding		finding;
} Doubt;

typedef struct Reconcile
{
	ApiKey		key;
	int			left;			/* requests */
	const char *stopped;		/* why nothing more is asked */
	MemoryContext keep;			/* of the call */
	MemoryContext work;			/* of one answer */
} Reconcile;

/*
 * $2 and $3 are empty where any will do.  $4: mode of the API key.
 * Those who are at it are left out here, so that they don't use up the limit.
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

/* ---------- what is kept ---------- */

static void
add_name(StringInfo json, const char *name)
{
	appendStringInfoString(json, json->len > 0 && json->data[json->len - 1] == '{' ? "" : ", ");
	escape_json(json, name);
	appendStringInfoString(json, ": ");
}

static void
add_string(StringInfo json, const char *name, const char *value)
{
	if (value == NULL)
		return;
	add_name(json, name);
	escape_json(json, value);
}

/* Something that is JSON already, or NULL. */
static void
add_json(StringInfo json, const char *name, const char *value)
{
	if (value == NULL)
		return;
	add_name(json, name);
	appendStringInfoString(json, value);
}

static void
add_int(StringInfo json, const char *name, int value)
{
	add_name(json, name);
	appendStringInfo(json, "%d", value);
}

static void
add_bool(StringInfo json, const char *name, bool value)
{
	add_json(json, name, value ? "true" : "false");
}

static void
add_time(StringInfo json, const char *name, TimestampTz value)
{
	char		buf[MAXDATELEN + 1];

	add_string(json, name, JsonEncodeDateTime(buf, TimestampTzGetDatum(value), TIMESTAMPTZOID, NULL));
}

static void
add_step(StringInfo json, const Doubt *doubt, StepKind kind)
{
	const Step *step = &doubt->steps[kind];

	if (!step->touched)
	{
		appendStringInfoString(json, step->before);
		return;
	}

	appendStringInfoChar(json, '{');
	add_string(json, "by", step_names[kind]);
	add_string(json, "path", step->path);
	if (kind == ASK_EVENTS)
		add_string(json, "type", doubt->place.events);
	if (kind == ASK_EVENTS || (kind == ASK_LIST && doubt->place.list_created))
	{
		add_time(json, "from", doubt->from);
		add_time(json, "to", doubt->to);
	}
	add_time(json, "at", step->at);
	add_int(json, "requests", step->requests);
	if (step->http_status != 0)
		add_int(json, "http_status", step->http_status);
	add_string(json, "request_id", step->request_id);
	add_string(json, "problem", step->problem);
	if (kind != ASK_OBJECT)
	{
		add_int(json, "seen", step->seen);
		add_bool(json, "complete", step->complete);

		/* what was found isn't kept with its body, so it is read once more */
		add_string(json, "after", step->pending != NULL && !step->done ?
				   step->pending_after : step->after);
	}
	add_json(json, "found", step->found);
	appendStringInfoChar(json, '}');
}

/*
 * What was asked about an operation, and what was found: for its row and for
 * the caller.  "kept" is false where the row didn't take it.
 */
static Jsonb *
evidence(Reconcile *r, Doubt *doubt, bool kept)
{
	StringInfoData json;
	const char *next = NULL;
	bool		first = true;
	int			i;

	initStringInfo(&json);
	appendStringInfoChar(&json, '{');
	add_time(&json, "at", GetCurrentTimestamp());
	add_string(&json, "user", GetUserNameFromId(GetSessionUserId(), false));
	add_bool(&json, "livemode", r->key.live);
	add_int(&json, "requests", doubt->requests);
	add_string(&json, "skipped", doubt->skipped);
	if (doubt->place.creates && !doubt->in_metadata)
		add_bool(&json, "key_in_metadata", false);
	if (doubt->several)
		add_bool(&json, "several", true);

	add_name(&json, "asked");
	appendStringInfoChar(&json, '[');
	for (i = 0; i < ASK_NSTEPS; i++)
	{
		Step	   *step = &doubt->steps[i];

		if (step->touched || step->before != NULL)
		{
			appendStringInfoString(&json, first ? "" : ", ");
			add_step(&json, doubt, i);
			first = false;
		}
		if (next == NULL && step->path != NULL && !step->done)
			next = step_names[i];
	}
	appendStringInfoChar(&json, ']');

	if (doubt->known)
	{
		add_string(&json, "found_by", found_by_names[doubt->found_by]);
		add_string(&json, "stripe_event_id", doubt->event_id);
		add_string(&json, "event_type", doubt->event_type);
	}
	else
	{
		/* where to go on; nothing, once all is asked that can be */
		add_string(&json, "next", next);
		if (next != NULL)
			add_string(&json, "stopped", r->stopped != NULL ? r->stopped : "no requests left");
	}
	if (!kept)
		add_bool(&json, "kept", false);
	appendStringInfoChar(&json, '}');

	return DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(json.data)));
}

static int
int_member(JsonbContainer *object, const char *name)
{
	JsonbValue	value;

	if (!json_member(object, name, &value) || value.type != jbvNumeric)
		return 0;
	return DatumGetInt32(DirectFunctionCall1(numeric_int4, NumericGetDatum(value.val.numeric)));
}

/*
 * Go on from what was kept last time, if that was cut, asked with a key of the
 * same mode, and nothing was sent since.
 */
static void
go_on(Doubt *doubt, Jsonb *before, TimestampTz claimed_at, bool live)
{
	char	   *next = json_string_member(&before->root, "next");
	char	   *at = json_string_member(&before->root, "at");
	JsonbValue	asked;
	bool		was_live = live;
	int			n = 0;
	int			i;

	json_bool_member(&before->root, "livemode", &was_live);
	if (next == NULL || was_live != live || at == NULL ||
		!json_member(&before->root, "asked", &asked) || asked.type != jbvBinary ||
		DatumGetTimestampTz(DirectFunctionCall3(timestamptz_in, CStringGetDatum(at),
												ObjectIdGetDatum(InvalidOid),
												Int32GetDatum(-1))) < claimed_at)
		return;
	while (n < ASK_NSTEPS && strcmp(step_names[n], next) != 0)
		n++;
	if (n == ASK_NSTEPS)
		return;

	for (i = 0; i < JsonContainerSize(asked.val.binary.data); i++)
	{
		JsonbValue *value = getIthJsonbValueFromContainer(asked.val.binary.data, i);
		char	   *by;
		int			k;

		if (value == NULL || value->type != jbvBinary)
			continue;
		by = json_string_member(value->val.binary.data, "by");
		for (k = 0; by != NULL && k <= n; k++)
		{
			Step	   *step = &doubt->steps[k];
			Jsonb	   *found;

			if (strcmp(step_names[k], by) != 0)
				continue;
			step->before = JsonbToCString(NULL, value->val.binary.data, value->val.binary.len);
			step->requests = int_member(value->val.binary.data, "requests");
			step->seen = int_member(value->val.binary.data, "seen");
			step->after = json_string_member(value->val.binary.data, "after");
			found = json_member_copy(value->val.binary.data, "found");
			if (found != NULL && k < n)
				step->found = JsonbToCString(NULL, &found->root, VARSIZE(found));
		}
	}
	for (i = 0; i < n; i++)
		doubt->steps[i].done = true;
	json_bool_member(&before->root, "several", &doubt->several);
}

/* ---------- the operation ---------- */

static TimestampTz
time_of(LedgerRow *row, int column)
{
	return row->isnull[column] ? 0 : DatumGetTimestampTz(row->values[column]);
}

/* Has an object's metadata this value?  *name is that it goes by. */
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
 * May the object have the key in its metadata, and by which name?  The bytes
 * that were sent tell; where an application has sent them, it may have added
 * it.
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

/* The path of an object in a collection, or NULL for an id that can't be in one. */
static char *
object_path(const char *collection, const char *id)
{
	char	   *path = psprintf("%s/%s", collection, id);

	return strchr(id, '/') == NULL && path_problem(path) == NULL ? path : NULL;
}

/*
 * What is to be asked about an operation, from its row.
 */
static void
read_doubt(Reconcile *r, Doubt *doubt, LedgerRow *row, TimestampTz now)
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
		doubt->skipped = "it isn't known which path was called";
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
		go_on(doubt, DatumGetJsonbP(row->values[S_RECONCILED]), time_of(row, S_CLAIMED_AT),
			  r->key.live);
}

/* ---------- asking ---------- */

static char *
keep_string(Reconcile *r, const char *string)
{
	return string == NULL ? NULL : MemoryContextStrdup(r->keep, string);
}

/* What could be an id, a type or a state; what is longer is something else. */
static const char *
short_string(const char *string)
{
	return string != NULL && strlen(string) <= STRIPE_ID_MAX ? string : NULL;
}

/*
 * One request.  Returns true where there is a body to look at.
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

	/* the same again may be answered later; anything else stays as it is */
	step->done = reply->result.http_status != 0 && reply->result.http_status != 401 &&
		reply->result.http_status != 429;
	if (!step->done || reply->result.http_status == 403 || reply->result.http_status >= 500)
		r->stopped = step->problem;
	return false;
}

/* Remember what is about the call, whether it settles it or not. */
static void
note_found(Reconcile *r, Step *step, const char *id, const char *type, const char *status,
		   const WebhookEvent *event)
{
	MemoryContext old = MemoryContextSwitchTo(r->keep);
	StringInfoData json;

	initStringInfo(&json);
	appendStringInfoChar(&json, '{');
	add_string(&json, "id", short_string(id));
	add_string(&json, "type", short_string(type));
	add_string(&json, "status", short_string(status));
	if (event != NULL)
	{
		add_string(&json, "stripe_event_id", event->id);
		add_string(&json, "event_type", short_string(event->type));
	}
	appendStringInfoChar(&json, '}');
	step->found = json.data;
	MemoryContextSwitchTo(old);
}

/* Does an answer belong to the mode of the key?  Where it says. */
static bool
is_of_mode(Reconcile *r, JsonbContainer *object)
{
	bool		live;

	return !json_bool_member(object, "livemode", &live) || live == r->key.live;
}

/*
 * An object that seems to be the one: what does it say?
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

	/* a DELETE with a verb takes something from it: customers/ID/discount */
	if (pg_strcasecmp(doubt->method, "DELETE") == 0)
		outcome = deleted && strcmp(doubt->path, step->path) == 0 ? STRIPE_COMPLETED : STRIPE_UNKNOWN;
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
 * Something has the key in its metadata; *again tells that it was seen before.
 * Returns false where it isn't the only one: whoever has copied the metadata
 * knows which one it is.
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

/* All is seen: then what was found by metadata counts, if it is the only one. */
static void
count_pending(Doubt *doubt, const Step *step)
{
	if (step->complete && step->pending != NULL && doubt->candidate && !doubt->several)
		doubt->known = true;
}

/*
 * The object that is known by its id, or that the call was about.
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

static void
add_created(StringInfo query, const Doubt *doubt)
{
	static const int64 epoch = ((int64) POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE) * SECS_PER_DAY;

	appendStringInfo(query, "&created[gte]=" INT64_FORMAT "&created[lte]=" INT64_FORMAT,
					 doubt->from / USECS_PER_SEC + epoch, doubt->to / USECS_PER_SEC + epoch);
}

/*
 * The elements of a page, and what comes after it.  Returns NULL where it is no
 * page.
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
 * A page of objects: is there one that has the key in its metadata?
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
 * A page of events, newest first: is there one that the call has caused?
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

		/* one that names no account is of the account that was asked for */
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

		/* once more, for good */
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
static void
ask_about(Reconcile *r, Doubt *doubt)
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

		/* what was found once needn't be looked for by other ways */
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

	/* where there was no time to ask, it keeps its place */
	doubt->asked = doubt->asked || doubt->requests > 0 || r->stopped == NULL;
}

/* ---------- the function ---------- */

/* Lists of type and id. */
typedef struct Names
{
	List	   *list;
	MemoryContext context;
} Names;

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

/* An operation as it stands; nobody at it counts as unknown. */
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

/* In a subtransaction */
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
 * Write down what came of asking about an operation.  With "one" what keeps it
 * from being written is an error.
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
 * Write down what came of asking about an operation, and tell it.
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

		json = evidence(r, doubt, true);
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
			json = evidence(r, doubt, false);
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
	Datum		values[5];

	values[0] = CStringGetTextDatum(account);
	values[1] = CStringGetTextDatum(type);
	values[2] = CStringGetTextDatum(id);
	values[3] = BoolGetDatum(r->key.live);
	values[4] = Int64GetDatum(r->left);
	owner_select(&find_doubts, rel->rd_rel->relowner, values, append_name, &names);
	return names.list;
}

/*
 * May Stripe know more of an operation than we do?  Who names one may also ask
 * about what is said not to have been executed, if it was sent.
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
			read_doubt(r, doubt, &row, now);
			ask_about(r, doubt);
		}
		doubts = lappend(doubts, doubt);
	}

	DEBUG_POINT("reconcile-asked");
	foreach(lc, doubts)
		finish_doubt(r, lfirst(lc), rel, one, rsinfo);
}

/* A text argument that may be left out. */
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

	/* whatever is missing is an error, before a secret is in memory */
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
