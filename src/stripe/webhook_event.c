/*-------------------------------------------------------------------------
 *
 * webhook_event.c
 *	  What an event of Stripe's says.
 *
 * A body is parsed after its signature has been verified.  Stripe delivers
 * again, for three days, what is refused, so nothing is refused that Stripe
 * may have meant: what jsonb cannot hold is replaced (json_text.c), and of a
 * member that occurs twice jsonb has the last value.  The bytes that were
 * signed are kept beside it.
 *
 * There are events of API v1 and thin ones of API v2, and every release of
 * Stripe's adds types.  Each must have an id and a type; anything else that has
 * an unexpected shape counts as absent.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/stripe/webhook_event.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/builtins.h"
#include "utils/datetime.h"
#include "utils/fmgrprotos.h"

#include "base/arguments.h"
#include "base/clock.h"
#include "base/compat.h"
#include "base/json_member.h"
#include "base/json_text.h"
#include "ledger/derived_key.h"
#include "stripe/webhook_event.h"

/* ---------- the body ---------- */

/*
 * Parse a body, and say whether it is an event or what else it is.
 */
WebhookBody
webhook_body_parse(const char *body, size_t len, WebhookEvent *event)
{
	Jsonb	   *json = json_read(body, len);

	if (json == NULL)
		return WEBHOOK_BODY_NOT_JSON;
	return webhook_event_read(json, event) ? WEBHOOK_BODY_EVENT : WEBHOOK_BODY_NOT_AN_EVENT;
}

/* ---------- values ---------- */

/* Can this string, which may be NULL, be the id of a row? */
static bool
is_id(const char *value, bool may_be_empty)
{
	const char *p;

	if (value == NULL || (value[0] == '\0' && !may_be_empty))
		return false;
	for (p = value; *p != '\0'; p++)
	{
		if ((unsigned char) *p < 0x20 || *p == 0x7f)
			return false;
	}
	return p - value <= KEY_MAX_CHARS;
}

/* A UUID in its usual form: 8-4-4-4-12 hexadecimal digits. */
static bool
is_uuid(const char *value)
{
	int			i;

	for (i = 0; i < STRIPE_KEY_UUID_LEN; i++)
	{
		if (i == 8 || i == 13 || i == 18 || i == 23)
		{
			if (value[i] != '-')
				return false;
		}
		else if (!isxdigit((unsigned char) value[i]))
			return false;
	}
	return value[i] == '\0';
}

/*
 * Does a string have the form of the keys that this extension derives:
 * "type:id:UUID", with a UUID of version 8?  So do the keys of other databases.
 */
bool
is_stripe_key(const char *key)
{
	size_t		len = strlen(key);
	const char *uuid;
	const char *colon;

	if (len > STRIPE_KEY_MAX || len < STRIPE_KEY_UUID_LEN + 4)
		return false;
	uuid = key + len - STRIPE_KEY_UUID_LEN;
	colon = strchr(key, ':');
	return uuid[-1] == ':' && colon > key && colon < uuid - 2 &&
		is_uuid(uuid) && uuid[14] == '8';
}

/* A string member that is a UUID, or NULL. */
static pg_uuid_t *
uuid_member(JsonbContainer *object, const char *name)
{
	char	   *value = json_string_member(object, name);

	if (value == NULL || !is_uuid(value))
		return NULL;
	return DatumGetUUIDP(DirectFunctionCall1(uuid_in, CStringGetDatum(value)));
}

/*
 * The key of ours that is a value in an object's metadata, whatever its name,
 * or NULL.  If there are several, the metadata was copied, or it names another
 * call, too; then only the key under the name that stripe_call() gives it
 * counts.
 */
char *
key_in_metadata(JsonbContainer *metadata)
{
	JsonbIterator *it;
	JsonbIteratorToken token;
	JsonbValue	value;
	char	   *key;

	if (metadata == NULL)
		return NULL;
	key = json_string_member(metadata, METADATA_NAME);
	if (key != NULL && is_stripe_key(key))
		return key;

	key = NULL;
	it = JsonbIteratorInit(metadata);
	while ((token = JsonbIteratorNext(&it, &value, true)) != WJB_DONE)
	{
		char	   *member;

		if (token != WJB_VALUE || value.type != jbvString)
			continue;
		member = pnstrdup(value.val.string.val, value.val.string.len);
		if (!is_stripe_key(member))
			continue;
		if (key != NULL && strcmp(key, member) != 0)
			return NULL;
		key = member;
	}
	return key;
}

/* Take n digits.  Returns false if there are fewer. */
static bool
take_digits(const char **p, int n, int *value)
{
	*value = 0;
	while (n-- > 0)
	{
		if (!isdigit((unsigned char) **p))
			return false;
		*value = *value * 10 + (*(*p)++ - '0');
	}
	return true;
}

static bool
take_char(const char **p, char c)
{
	return *(*p)++ == c;
}

/* The time of a thin event: RFC 3339 in UTC, such as 2026-11-21T22:26:40.000Z. */
static bool
parse_rfc3339(const char *p, TimestampTz *moment)
{
	struct pg_tm tm;
	fsec_t		fsec = 0;
	fsec_t		unit = USECS_PER_SEC / 10;
	int			utc = 0;

	memset(&tm, 0, sizeof(tm));
	if (!take_digits(&p, 4, &tm.tm_year) || !take_char(&p, '-') ||
		!take_digits(&p, 2, &tm.tm_mon) || !take_char(&p, '-') ||
		!take_digits(&p, 2, &tm.tm_mday) || !take_char(&p, 'T') ||
		!take_digits(&p, 2, &tm.tm_hour) || !take_char(&p, ':') ||
		!take_digits(&p, 2, &tm.tm_min) || !take_char(&p, ':') ||
		!take_digits(&p, 2, &tm.tm_sec))
		return false;
	if (*p == '.')
	{
		for (p++; isdigit((unsigned char) *p); p++)
		{
			fsec += (*p - '0') * unit;
			unit /= 10;
		}
	}
	if (strcmp(p, "Z") != 0)
		return false;

	if (tm.tm_year < 1970 || tm.tm_mon < 1 || tm.tm_mon > 12 || tm.tm_mday < 1 ||
		tm.tm_mday > day_tab[isleap(tm.tm_year)][tm.tm_mon - 1] ||
		tm.tm_hour > 23 || tm.tm_min > 59 || tm.tm_sec > 60)
		return false;
	return tm2timestamp(&tm, fsec, &utc, moment) == 0;
}

/*
 * Read when Stripe made the event: seconds since 1970, or in a thin event a
 * string.
 */
static bool
read_created(JsonbContainer *root, TimestampTz *moment)
{
	JsonbValue	value;
	char	   *digits;
	char	   *end;
	int64		seconds;

	if (!json_member(root, "created", &value))
		return false;
	if (value.type == jbvString)
		return parse_rfc3339(pnstrdup(value.val.string.val, value.val.string.len), moment);
	if (value.type != jbvNumeric)
		return false;

	digits = DatumGetCString(DirectFunctionCall1(numeric_out, NumericGetDatum(value.val.numeric)));
	errno = 0;
	seconds = strtoi64(digits, &end, 10);
	if (errno != 0 || *end != '\0' || seconds < 0 || seconds > INT64CONST(99999999999))
		return false;
	*moment = timestamp_of_unix(seconds);
	return true;
}

/* ---------- the event ---------- */

/*
 * Read an event.  Returns false if the JSON is none.  What *event points to is
 * palloc'd, or part of the JSON.
 */
bool
webhook_event_read(Jsonb *json, WebhookEvent *event)
{
	JsonbContainer *root = &json->root;
	JsonbContainer *request;
	JsonbContainer *metadata = NULL;
	char	   *kind = json_string_member(root, "object");
	char	   *account;
	char	   *context;
	bool		thin;

	memset(event, 0, sizeof(*event));
	event->json = json;
	event->id = json_string_member(root, "id");
	event->type = json_string_member(root, "type");

	if (kind == NULL || !is_id(event->id, false) || !is_id(event->type, false))
		return false;
	thin = strcmp(kind, "v2.core.event") == 0;
	if (!thin && strcmp(kind, "event") != 0)
		return false;

	/*
	 * A thin event never has a member "account": its context names the
	 * connected account, if the endpoint listens to those.  The context of an
	 * event of API v1 without "account" is one's own account.
	 */
	account = json_string_member(root, "account");
	context = json_string_member(root, "context");
	event->account = account != NULL ? account : context != NULL ? context : "";
	event->connected = account != NULL || (thin && context != NULL);
	if (!is_id(event->account, true))
		return false;

	event->livemode_known = json_bool_member(root, "livemode", &event->livemode);
	event->created_known = read_created(root, &event->created);
	event->api_version = json_string_member(root, "api_version");

	if (thin)
	{
		JsonbContainer *related = json_object_member(root, "related_object");

		event->object_id = json_string_member(related, "id");
		event->object_type = json_string_member(related, "type");
		request = json_object_member(json_object_member(root, "reason"), "request");
	}
	else
	{
		event->object = json_object_member(json_object_member(root, "data"), "object");
		event->object_id = json_string_member(event->object, "id");
		event->object_type = json_string_member(event->object, "object");
		metadata = json_object_member(event->object, "metadata");
		request = json_object_member(root, "request");
	}
	if (!is_id(event->object_id, false))
		event->object_id = NULL;

	event->request_id = json_string_member(request, "id");
	event->idempotency_key = json_string_member(request, "idempotency_key");
	event->metadata_key = key_in_metadata(metadata);

	event->reference = json_string_member(event->object, "client_reference_id");
	if (event->reference == NULL)
		event->reference = json_string_member(metadata, "reference");
	if (event->object_type != NULL && strcmp(event->object_type, "checkout.session") == 0)
		event->checkout_session_id = event->object_id;
	else
		event->checkout_session_id = json_string_member(metadata, "checkout_session_id");
	event->order_id = uuid_member(metadata, "order_id");
	event->correlation_id = uuid_member(metadata, "correlation_id");

	return true;
}
