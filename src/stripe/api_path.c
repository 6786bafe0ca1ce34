/*-------------------------------------------------------------------------
 *
 * api_path.c
 *	  Paths of Stripe's API, which of them may be called, and where.
 *
 * A path is joined to the API's base and sent along with a secret, so nothing
 * in it may change the host, and nothing in it may read as one path here and
 * as another at the server.
 *
 * A list of allowed paths has entries separated by commas:
 *
 *	[METHOD ]PATH	METHOD is GET, POST or DELETE, and any of them if left out
 *
 * In PATH, * stands for one segment or a part of it (anything but a slash),
 * and ** for anything at all.  An entry that is just * allows everything.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/stripe/api_path.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "stripe/api_path.h"

#define PATH_MAX_LEN 1024

static const char *const methods[] = {"GET", "POST", "DELETE"};

static int
hex_value(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	if (c >= 'A' && c <= 'F')
		return c - 'A' + 10;
	if (c >= 'a' && c <= 'f')
		return c - 'a' + 10;
	return -1;
}

static bool
is_alnum(char c)
{
	return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9');
}

/*
 * What is wrong with a path: a sentence, untranslated, or NULL if nothing is.
 */
const char *
path_problem(const char *path)
{
	const char *p;

	if (path[0] != '/')
		return gettext_noop("It must begin with a slash.");
	if (strncmp(path, "/v1/", 4) != 0 && strncmp(path, "/v2/", 4) != 0)
		return gettext_noop("It must begin with /v1/ or /v2/.");
	if (strlen(path) > PATH_MAX_LEN)
		return gettext_noop("It is too long.");

	for (p = path; *p != '\0'; p++)
	{
		if (*p == '?')
			return gettext_noop("A query string belongs into params.");
		if (*p == '%')
		{
			int			high = hex_value(p[1]);
			int			low = high < 0 ? -1 : hex_value(p[2]);
			int			c = high * 16 + low;

			if (low < 0)
				return gettext_noop("A percent sign must be followed by two hexadecimal digits.");
			if (c < 0x20 || c == 0x7f || strchr("./\\", c) != NULL)
				return gettext_noop("Dots, slashes, backslashes and control characters cannot be percent-encoded.");
			p += 2;
			continue;
		}
		if (*p == '/')
		{
			size_t		len = strcspn(p + 1, "/");

			if (len == 0)
				return gettext_noop("It must not have an empty segment.");
			if ((len == 1 && p[1] == '.') || (len == 2 && p[1] == '.' && p[2] == '.'))
				return gettext_noop("It must not have a segment of dots.");
			continue;
		}
		if (!is_alnum(*p) && strchr("-._~:,+=", *p) == NULL)
			return gettext_noop("It must consist of letters, digits, -._~:,+= and percent-encoded characters between slashes.");
	}

	return NULL;
}

/* Is a path one of API v2?  It must be a path without a problem. */
bool
path_is_v2(const char *path)
{
	return strncmp(path, "/v2/", 4) == 0;
}

/* Paths at which a POST accepts metadata; others might refuse it. */
static const char *const with_metadata[] = {
	"/v1/accounts", "/v1/application_fees/*/refunds", "/v1/charges",
	"/v1/checkout/sessions", "/v1/coupons", "/v1/credit_notes", "/v1/customers",
	"/v1/customers/*/balance_transactions", "/v1/invoiceitems", "/v1/invoices",
	"/v1/issuing/cardholders", "/v1/issuing/cards", "/v1/payment_intents",
	"/v1/payment_links", "/v1/payment_methods", "/v1/payouts", "/v1/plans",
	"/v1/prices", "/v1/products", "/v1/promotion_codes", "/v1/quotes", "/v1/refunds",
	"/v1/setup_intents", "/v1/shipping_rates", "/v1/subscription_items",
	"/v1/subscription_schedules", "/v1/subscriptions", "/v1/tax_rates", "/v1/topups",
	"/v1/transfers", "/v1/transfers/*/reversals"
};

/* The next entry of a list, without the white space around it, or NULL. */
static const char *
next_entry(const char **list, size_t *len)
{
	const char *entry;

	while (**list == ' ' || **list == '\t' || **list == '\n' || **list == ',')
		(*list)++;
	if (**list == '\0')
		return NULL;

	entry = *list;
	*len = strcspn(entry, ",");
	*list += *len;
	while (strchr(" \t\n", entry[*len - 1]) != NULL)
		(*len)--;
	return entry;
}

/* Split the method off an entry.  Returns its length, or 0 if there is none. */
static size_t
split_method(const char *entry, size_t len, const char **pattern, size_t *pattern_len)
{
	size_t		method_len = 0;
	size_t		skip;

	while (method_len < len && entry[method_len] != ' ' && entry[method_len] != '\t')
		method_len++;
	if (method_len == len)
	{
		*pattern = entry;
		*pattern_len = len;
		return 0;
	}

	skip = method_len;
	while (entry[skip] == ' ' || entry[skip] == '\t')
		skip++;
	*pattern = entry + skip;
	*pattern_len = len - skip;
	return method_len;
}

/*
 * What is wrong with a list of allowed paths: a sentence, untranslated, or
 * NULL.
 */
const char *
path_list_problem(const char *list)
{
	const char *entry;
	size_t		len;

	while ((entry = next_entry(&list, &len)) != NULL)
	{
		const char *pattern;
		size_t		pattern_len;
		size_t		method_len = split_method(entry, len, &pattern, &pattern_len);
		size_t		i;

		if (method_len > 0)
		{
			for (i = 0; i < lengthof(methods); i++)
			{
				if (strlen(methods[i]) == method_len &&
					strncmp(entry, methods[i], method_len) == 0)
					break;
			}
			if (i == lengthof(methods))
				return gettext_noop("Methods are GET, POST and DELETE.");
		}
		if (pattern[0] != '/' && !(pattern_len == 1 && pattern[0] == '*'))
			return gettext_noop("Paths begin with a slash.");
		for (i = 0; i < pattern_len; i++)
		{
			if (pattern[i] <= ' ' || pattern[i] > '~')
				return gettext_noop("Entries are separated by commas.");
		}
	}
	return NULL;
}

/*
 * Does the pattern match the path?  This takes exponential time at worst, but a
 * superuser has written the pattern, which is short, and the path is bounded.
 */
static bool
matches(const char *pattern, size_t len, const char *path)
{
	while (len > 0)
	{
		if (*pattern == '*')
		{
			bool		anything = len > 1 && pattern[1] == '*';

			pattern += anything ? 2 : 1;
			len -= anything ? 2 : 1;
			for (;; path++)
			{
				if (matches(pattern, len, path))
					return true;
				if (*path == '\0' || (*path == '/' && !anything))
					return false;
			}
		}
		if (*pattern != *path)
			return false;
		pattern++;
		path++;
		len--;
	}
	return *path == '\0';
}

/*
 * Does a POST to this path create something that has metadata?
 */
bool
path_takes_metadata(const char *path)
{
	int			i;

	for (i = 0; i < lengthof(with_metadata); i++)
	{
		if (matches(with_metadata[i], strlen(with_metadata[i]), path))
			return true;
	}
	return false;
}

/*
 * May this path be called by this method?
 */
bool
path_is_allowed(const char *list, const char *method, const char *path)
{
	const char *entry;
	size_t		len;

	while ((entry = next_entry(&list, &len)) != NULL)
	{
		const char *pattern;
		size_t		pattern_len;
		size_t		method_len = split_method(entry, len, &pattern, &pattern_len);

		if (method_len > 0 &&
			(strlen(method) != method_len || strncmp(entry, method, method_len) != 0))
			continue;
		if (pattern_len == 1 && pattern[0] == '*')
			return true;
		if (matches(pattern, pattern_len, path))
			return true;
	}
	return false;
}

/*
 * What is wrong with an API base: a sentence, untranslated, or NULL.  http is
 * for a stand-in for Stripe on this machine.
 */
const char *
api_base_problem(const char *base)
{
	const char *host;
	size_t		host_len;
	const char *p;
	bool		plain = false;

	if (strncmp(base, "https://", 8) == 0)
		host = base + 8;
	else if (strncmp(base, "http://", 7) == 0)
	{
		host = base + 7;
		plain = true;
	}
	else
		return gettext_noop("It must begin with https:// (or http:// on a loopback address).");

	if (*host == '[')
	{
		host_len = strspn(host + 1, "0123456789abcdefABCDEF:.") + 2;
		if (host_len == 2 || host[host_len - 1] != ']')
			return gettext_noop("It has no valid host.");
	}
	else
	{
		host_len = strspn(host, "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-.");
		if (host_len == 0 || host_len > 253)
			return gettext_noop("It has no valid host.");
	}

	p = host + host_len;
	if (*p == ':')
	{
		size_t		digits = strspn(p + 1, "0123456789");

		if (digits == 0 || digits > 5 || atoi(p + 1) < 1 || atoi(p + 1) > 65535)
			return gettext_noop("It has no valid port.");
		p += 1 + digits;
	}
	if (*p != '\0')
		return gettext_noop("Nothing may follow host and port.");

	if (plain &&
		!(host_len == 9 && pg_strncasecmp(host, "localhost", 9) == 0) &&
		!(host_len == 5 && strncmp(host, "[::1]", 5) == 0) &&
		!(strncmp(host, "127.", 4) == 0 && strspn(host, "0123456789.") == host_len))
		return gettext_noop("http is for loopback addresses only.");

	return NULL;
}

/*
 * What is wrong with a version of the API: a sentence, untranslated, or NULL.
 * The version becomes a header, so it must begin with a date and consist of
 * harmless characters.
 */
const char *
api_version_problem(const char *version)
{
	static const char form[] = "dddd-dd-dd";
	const char *p = version;
	int			i;

	for (i = 0; form[i] != '\0'; i++, p++)
	{
		if (form[i] == 'd' ? (*p < '0' || *p > '9') : *p != form[i])
			return gettext_noop("A version of Stripe's API begins with a date, such as \"2026-10-28.endive\".");
	}
	while (*p >= ' ' && *p <= '~')
		p++;
	if (*p != '\0' || p - version > 255)
		return gettext_noop("A version of Stripe's API is short and has printable ASCII characters only.");
	return NULL;
}
