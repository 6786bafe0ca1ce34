/*-------------------------------------------------------------------------
 *
 * reconcile_evidence.c
 *	  What stripe_reconcile() has asked and found: a jsonb for the row and
 *	  for the caller, and reading it again.
 *
 * It has nothing of a body but ids, types and states.  Where a list was cut, it
 * says where the next call goes on.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/send/reconcile_evidence.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/timestamp.h"

#include "base/json_build.h"
#include "base/json_member.h"
#include "send/reconcile.h"

static const char *const step_names[ASK_NSTEPS] = {"object", "search", "list", "events"};

/* One way of asking: as it went, or as an earlier call has noted it. */
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
	json_add_string(json, "by", step_names[kind]);
	json_add_string(json, "path", step->path);
	if (kind == ASK_EVENTS)
		json_add_string(json, "type", doubt->place.events);
	if (kind == ASK_EVENTS || (kind == ASK_LIST && doubt->place.list_created))
	{
		json_add_time(json, "from", doubt->from);
		json_add_time(json, "to", doubt->to);
	}
	json_add_time(json, "at", step->at);
	json_add_int(json, "requests", step->requests);
	if (step->http_status != 0)
		json_add_int(json, "http_status", step->http_status);
	json_add_string(json, "request_id", step->request_id);
	json_add_string(json, "problem", step->problem);
	if (kind != ASK_OBJECT)
	{
		json_add_int(json, "seen", step->seen);
		json_add_bool(json, "complete", step->complete);

		/* an object that was found is not kept, so its page is read again */
		json_add_string(json, "after", step->pending != NULL && !step->done ?
				   step->pending_after : step->after);
	}
	json_add_json(json, "found", step->found);
	appendStringInfoChar(json, '}');
}

/*
 * What was asked about an operation, and what was found: for its row and for
 * the caller.  "kept" is false if it could not be written to the row.
 */
Jsonb *
reconcile_evidence(Reconcile *r, Doubt *doubt, bool kept)
{
	StringInfoData json;
	const char *next = NULL;
	bool		first = true;
	int			i;

	initStringInfo(&json);
	appendStringInfoChar(&json, '{');
	json_add_time(&json, "at", GetCurrentTimestamp());
	json_add_string(&json, "user", GetUserNameFromId(GetSessionUserId(), false));
	json_add_bool(&json, "livemode", r->key.live);
	json_add_int(&json, "requests", doubt->requests);
	json_add_string(&json, "skipped", doubt->skipped);
	if (doubt->place.creates && !doubt->in_metadata)
		json_add_bool(&json, "key_in_metadata", false);
	if (doubt->several)
		json_add_bool(&json, "several", true);

	json_add_name(&json, "asked");
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
		json_add_string(&json, "found_by", found_by_names[doubt->found_by]);
		json_add_string(&json, "stripe_event_id", doubt->event_id);
		json_add_string(&json, "event_type", doubt->event_type);
	}
	else
	{
		/* where to go on, unless all was asked that can be */
		json_add_string(&json, "next", next);
		if (next != NULL)
			json_add_string(&json, "stopped", r->stopped != NULL ? r->stopped : "no requests left");
	}
	if (!kept)
		json_add_bool(&json, "kept", false);
	appendStringInfoChar(&json, '}');

	return DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(json.data)));
}

/* A number of a member, or 0. */
static int
int_member(JsonbContainer *object, const char *name)
{
	JsonbValue	value;

	if (!json_member(object, name, &value) || value.type != jbvNumeric)
		return 0;
	return DatumGetInt32(DirectFunctionCall1(numeric_int4, NumericGetDatum(value.val.numeric)));
}

/*
 * Go on from what an earlier call has kept, if that was cut, asked with a key
 * of the same mode, and nothing was sent since.
 */
void
reconcile_go_on(Doubt *doubt, Jsonb *before, TimestampTz claimed_at, bool live)
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

