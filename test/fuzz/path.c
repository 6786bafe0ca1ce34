/*-------------------------------------------------------------------------
 *
 * path.c
 *	  Fuzz target: paths of Stripe's API, lists of allowed ones, API bases and
 *	  versions (src/stripe/api_path.c).
 *
 * An input is a list, a zero byte, and a path; each is also tried as
 * everything else.  What is accepted is checked by other means: a path,
 * decoded as a server might do it, stays below /v1 or /v2 and contains no
 * query, no header and no other host; a base is a host and a port; and a list
 * is matched by a second matcher.
 *
 * Built by test/fuzz/run, with libFuzzer, or with mutator.c.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * test/fuzz/path.c
 *
 *-------------------------------------------------------------------------
 */
#include "fuzz.h"

#include "stripe/api_path.h"

int			LLVMFuzzerTestOneInput(const uint8 *data, size_t size);

const char *const fuzz_tokens[] = {
	"/v1/", "/v2/", "/", "..", ".", "%2e", "%2F", "%", "%00", "?", "#", "@", "\\", "*", "**", ",", " ", "\t",
	"GET ", "POST ", "DELETE ", "payment_intents", "https://", "http://", "127.0.0.1", "[::1]", "localhost",
	":80", ":65536", "2026-10-28.endive", "\r\n", "api.stripe.com", NULL
};

/* The only function of the server that api_path.c needs. */
int
pg_strncasecmp(const char *a, const char *b, size_t n)
{
	return strncasecmp(a, b, n);
}

static void
check_path(const char *path)
{
	char	   *decoded;
	char	   *out;

	if (path_problem(path) != NULL)
		return;

	CHECK(strlen(path) <= 1024);
	CHECK(strncmp(path, "/v1/", 4) == 0 || strncmp(path, "/v2/", 4) == 0);
	CHECK(path_is_v2(path) == (path[2] == '2'));
	CHECK(strspn(path, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~:,+=%/") == strlen(path));
	(void) path_takes_metadata(path);

	/* decoded it has the same segments, and none that leads elsewhere */
	decoded = out = malloc(strlen(path) + 1);
	for (const char *p = path; *p != '\0'; p++)
	{
		if (*p == '%')
		{
			unsigned int byte;

			CHECK(isxdigit((unsigned char) p[1]) && isxdigit((unsigned char) p[2]));
			CHECK(sscanf(p + 1, "%2x", &byte) == 1);
			CHECK(byte >= 32 && byte != 127 && byte != '/' && byte != '\\' && byte != '.');
			*out++ = (char) byte;
			p += 2;
		}
		else
			*out++ = *p;
	}
	*out = '\0';
	CHECK(strstr(decoded, "//") == NULL && strstr(decoded, "/../") == NULL && strstr(decoded, "/./") == NULL);
	CHECK(out[-1] != '/' && !(out - decoded >= 2 && strcmp(out - 2, "/.") == 0) &&
		  !(out - decoded >= 3 && strcmp(out - 3, "/..") == 0));
	free(decoded);
}

/*
 * The second matcher: a table of which prefix of the pattern matches which
 * prefix of the path.
 */
static bool
fits(const char *pattern, size_t len, const char *path)
{
	size_t		n = strlen(path);
	bool	   *reached = calloc(n + 1, 1);
	bool	   *next = calloc(n + 1, 1);
	bool		result;

	reached[0] = true;
	for (size_t i = 0; i < len; i++)
	{
		bool		star = pattern[i] == '*';
		bool		anything = star && i + 1 < len && pattern[i + 1] == '*';

		memset(next, 0, n + 1);
		for (size_t j = 0; j <= n; j++)
		{
			if (star)
				next[j] = reached[j] || (j > 0 && next[j - 1] && (anything || path[j - 1] != '/'));
			else
				next[j] = j > 0 && reached[j - 1] && path[j - 1] == pattern[i];
		}
		memcpy(reached, next, n + 1);
		if (anything)
			i++;
	}
	result = reached[n];
	free(reached);
	free(next);
	return result;
}

static bool
is_allowed(const char *list, const char *method, const char *path)
{
	char	   *copy = strdup(list);
	char	   *rest = copy;
	char	   *entry;
	bool		result = false;

	while ((entry = strsep(&rest, ",")) != NULL)
	{
		char	   *end;
		char	   *space;

		entry += strspn(entry, " \t\n");
		end = entry + strlen(entry);
		while (end > entry && strchr(" \t\n", end[-1]) != NULL)
			*--end = '\0';
		if (*entry == '\0')
			continue;
		space = strpbrk(entry, " \t");
		if (space != NULL)
		{
			*space++ = '\0';
			if (strcmp(entry, method) != 0)
				continue;
			entry = space + strspn(space, " \t");
		}
		if (strcmp(entry, "*") == 0 || fits(entry, strlen(entry), path))
			result = true;
	}
	free(copy);
	return result;
}

static void
check_list(const char *list, const char *path)
{
	static const char *const methods[] = {"GET", "POST", "DELETE"};
	size_t		stars = 0;

	if (path_list_problem(list) != NULL)
		return;

	/* a pattern is a superuser's, who won't write what takes for ever */
	for (const char *p = list; *p != '\0'; p++)
		stars += *p == '*';
	if (stars > 6 || strlen(list) > 300 || strlen(path) > 100)
		return;
	for (size_t i = 0; i < lengthof(methods); i++)
		CHECK(path_is_allowed(list, methods[i], path) == is_allowed(list, methods[i], path));
}

static void
check_base(const char *base)
{
	const char *host;
	const char *end;

	if (api_base_problem(base) != NULL)
		return;

	CHECK(strncmp(base, "https://", 8) == 0 || strncmp(base, "http://", 7) == 0);
	host = strstr(base, "//") + 2;
	CHECK(strspn(host, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.:[]") == strlen(host));
	end = host[0] == '[' ? strchr(host, ']') + 1 : host + strcspn(host, ":");
	CHECK(end > host && (*end == '\0' || *end == ':'));
	if (*end == ':')
		CHECK(strspn(end + 1, "0123456789") == strlen(end + 1) && atol(end + 1) > 0 && atol(end + 1) < 65536);
	if (base[4] == ':')
		CHECK(strncasecmp(host, "localhost", 9) == 0 || strncmp(host, "[::1]", 5) == 0 ||
			  (strncmp(host, "127.", 4) == 0 && (int) strspn(host, "0123456789.") == end - host));
}

static void
check_version(const char *version)
{
	if (api_version_problem(version) != NULL)
		return;

	CHECK(strlen(version) >= 10 && strlen(version) <= 255);
	for (const char *p = version; *p != '\0'; p++)
		CHECK(*p >= 32 && *p < 127);
}

int
LLVMFuzzerTestOneInput(const uint8 *data, size_t size)
{
	const char *zero = memchr(data, 0, size);
	size_t		len = zero != NULL ? (size_t) (zero - (const char *) data) : size;
	char	   *first = malloc(len + 1);
	char	   *second = zero != NULL ? strndup(zero + 1, size - len - 1) : strdup("/v1/charges");

	memcpy(first, data, len);
	first[len] = '\0';

	check_list(first, second);
	check_list(second, first);
	check_path(first);
	check_path(second);
	check_base(first);
	check_version(first);

	free(first);
	free(second);
	return 0;
}
