/*-------------------------------------------------------------------------
 *
 * stripe_lookup.c
 *	  Where at Stripe to look for what a call has done.
 *
 * A path of API v1 has one of these forms:
 *
 *	/v1/COLLECTION						makes an object
 *	/v1/COLLECTION/ID, and a verb		changes one
 *	/v1/COLLECTION/ID/COLLECTION		makes an object that belongs to another
 *
 * Most objects can be listed.  The lists below can be restricted to a time of
 * creation, and some can be searched; for other lists Stripe refuses these
 * parameters.  See the "list" page of each resource at
 * https://docs.stripe.com/api, and https://docs.stripe.com/search.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/stripe/stripe_lookup.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "stripe/stripe_lookup.h"

static const struct
{
	const char *collection;
	bool		search;
	const char *events;			/* their types begin like this */
	const char *query;
}			resources[] = {
	{"charges", true, "charge", ""},
	{"checkout/sessions", false, "checkout.session", ""},
	{"customers", true, "customer", ""},
	{"invoices", true, "invoice", ""},
	{"payment_intents", true, "payment_intent", ""},
	{"payouts", false, "payout", ""},
	{"prices", true, "price", ""},
	{"products", true, "product", ""},
	{"refunds", false, "refund", ""},
	{"setup_intents", false, "setup_intent", ""},

	/* otherwise canceled ones are not listed */
	{"subscriptions", true, "customer.subscription", "status=all"},
	{"topups", false, "topup", ""},
	{"transfers", false, "transfer", ""}
};

/* Lists that cannot be restricted to a time. */
static const char *const inner_lists[][2] = {
	{"application_fees", "refunds"}, {"charges", "refunds"},
	{"customers", "balance_transactions"}, {"transfers", "reversals"}
};

/* Collections whose names have two parts begin with these. */
static const char *const prefixes[] = {
	"billing", "billing_portal", "checkout", "climate", "financial_connections",
	"identity", "issuing", "radar", "reporting", "tax", "terminal", "test_helpers",
	"treasury"
};

/* The segments of a path after /v1/; returns how many, at most max. */
static int
split_path(const char *path, char **segments, int max)
{
	char	   *copy = pstrdup(path + strlen("/v1/"));
	int			n = 0;

	while (n < max)
	{
		segments[n++] = copy;
		copy = strchr(copy, '/');
		if (copy == NULL)
			return n;
		*copy++ = '\0';
	}
	return max + 1;
}

static bool
has_two_parts(const char *segment)
{
	int			i;

	for (i = 0; i < lengthof(prefixes); i++)
	{
		if (strcmp(segment, prefixes[i]) == 0)
			return true;
	}
	return false;
}

static bool
is_collection(const char *segment)
{
	return segment[0] != '\0' && segment[strlen(segment) - 1] == 's';
}

/*
 * Find out where to look for what a POST or DELETE of this path, which has no
 * query string, has done.  Everything is NULL for a path of another form.
 */
void
place_of_call(const char *path, CallPlace *place)
{
	char	   *segments[4];
	int			n;
	int			rest;
	char	   *collection;
	int			i;

	memset(place, 0, sizeof(CallPlace));
	place->list_query = "";
	if (strncmp(path, "/v1/", 4) != 0)
		return;

	n = split_path(path, segments, lengthof(segments));
	if (n > lengthof(segments))
		return;
	if (n > 1 && has_two_parts(segments[0]))
		collection = psprintf("%s/%s", segments[0], segments[1]);
	else
		collection = segments[0];
	rest = n - (collection == segments[0] ? 1 : 2);

	if (rest == 2 && is_collection(segments[n - 1]))
	{
		place->creates = true;
		for (i = 0; i < lengthof(inner_lists); i++)
		{
			if (strcmp(collection, inner_lists[i][0]) == 0 &&
				strcmp(segments[n - 1], inner_lists[i][1]) == 0)
				place->list = pstrdup(path);
		}
		return;
	}

	if (rest == 0)
		place->creates = true;
	else if (rest <= 2)
		place->object = psprintf("/v1/%s/%s", collection, segments[n - rest]);
	else
		return;

	for (i = 0; i < lengthof(resources); i++)
	{
		if (strcmp(collection, resources[i].collection) != 0)
			continue;
		place->events = psprintf("%s.*", resources[i].events);
		if (place->creates)
		{
			place->list = pstrdup(path);
			place->list_query = resources[i].query;
			place->list_created = true;
			if (resources[i].search)
				place->search = psprintf("%s/search", path);
		}
	}
}
