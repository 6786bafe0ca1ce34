/*-------------------------------------------------------------------------
 *
 * api_key.c
 *	  The secret API key of the Stripe account.
 *
 * It is read anew for every call, so that a new key in the file counts at
 * once.  It lives in the caller's ApiKey only, and the caller wipes it when the
 * call is over.  It comes from
 *
 *	- the file that idempotency.stripe_api_key_file names, or
 *	- if that is empty, IDEMPOTENCY_STRIPE_API_KEY in the environment that
 *	  the postmaster was started with.
 *
 * It is never a setting's value, which every role could read in the catalogs.
 * secret_file.c says what the file must be like.  No message names it, since
 * only superusers may see the setting, and none quotes its contents.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/send/api_key.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/errors.h"
#include "base/secret_file.h"
#include "base/settings.h"
#include "send/api_key.h"

#define ENVIRONMENT_VARIABLE "IDEMPOTENCY_STRIPE_API_KEY"

/* What messages call the source of the key. */
static const char *
source_name(void)
{
	return setting_stripe_api_key_file[0] != '\0' ?
		"the file of \"idempotency.stripe_api_key_file\"" :
		"the server's environment variable " ENVIRONMENT_VARIABLE;
}

static void
refuse_key(ApiKey *key, const char *problem)
{
	api_key_wipe(key);
	ereport(ERROR,
			(errcode(ERRCODE_CONFIG_FILE_ERROR),
			 errmsg("no usable Stripe API key in %s", source_name()),
			 errdetail_internal("%s", problem),
			 errhint("It must hold one secret key (sk_...) or restricted key (rk_...), and nothing else.")));
}

static bool
has_prefix(const char **p, const char *prefix)
{
	size_t		len = strlen(prefix);

	if (strncmp(*p, prefix, len) != 0)
		return false;
	*p += len;
	return true;
}

/*
 * Drop white space around a key, and find out what kind of key it is.  Raises
 * an error if it is none.
 */
static void
check_key(ApiKey *key)
{
	char	   *secret = key->secret;
	size_t		len = strlen(secret);
	size_t		skip = strspn(secret, " \t\r\n");
	const char *p;

	while (len > skip && strchr(" \t\r\n", secret[len - 1]) != NULL)
		len--;
	memmove(secret, secret + skip, len - skip);
	explicit_bzero(secret + len - skip, sizeof(key->secret) - (len - skip));

	if (secret[0] == '\0')
		refuse_key(key, "It is empty.");

	p = secret;
	if (has_prefix(&p, "pk_"))
		refuse_key(key, "It is a publishable key, which cannot do anything.");
	if (!has_prefix(&p, "sk_") && !has_prefix(&p, "rk_"))
		refuse_key(key, "It does not begin as a secret or restricted key does.");
	key->organization = has_prefix(&p, "org_");
	if (has_prefix(&p, "live_"))
		key->live = true;
	else if (has_prefix(&p, "test_"))
		key->live = false;
	else
		refuse_key(key, "It does not say whether it is for test mode or live mode.");

	if (*p == '\0')
		refuse_key(key, "It is cut.");
	for (; *p != '\0'; p++)
	{
		if (!((*p >= 'A' && *p <= 'Z') || (*p >= 'a' && *p <= 'z') ||
			  (*p >= '0' && *p <= '9') || *p == '_'))
			refuse_key(key, "It has characters that no key has.");
	}
}

/*
 * Read the key that is in force for this session.  The caller has to wipe it.
 * Raises an error if there is none.
 */
void
api_key_read(ApiKey *key)
{
	memset(key, 0, sizeof(ApiKey));

	if (setting_stripe_api_key_file[0] != '\0')
		secret_file_load(setting_stripe_api_key_file, source_name(), key->secret, sizeof(key->secret));
	else
	{
		const char *value = getenv(ENVIRONMENT_VARIABLE);

		if (value == NULL)
			ereport(ERROR,
					(errcode(ERRCODE_CONFIG_FILE_ERROR),
					 errmsg("there is no Stripe API key"),
					 errhint("Set \"idempotency.stripe_api_key_file\" to a file that holds it, or start the server with " ENVIRONMENT_VARIABLE " in its environment.")));
		if (strlcpy(key->secret, value, sizeof(key->secret)) >= sizeof(key->secret))
			refuse_key(key, "It is longer than any key.");
	}

	check_key(key);
}

/* Overwrite a key. */
void
api_key_wipe(ApiKey *key)
{
	explicit_bzero(key->secret, sizeof(key->secret));
}
