/*-------------------------------------------------------------------------
 *
 * webhook_secret.c
 *	  Secrets that webhooks are signed with.
 *
 * Each endpoint at Stripe has a secret, and two for a while after one was rolled;
 * one function of an application may serve several endpoints.  So there are
 * several.  They come from the first of these that has any: the argument, the
 * file that idempotency.webhook_secret_file names (per role or database), the
 * postmaster's environment.  The sources are not combined.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/events/webhook_secret.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type_d.h"
#include "utils/array.h"

#include "base/compat.h"
#include "base/errors.h"
#include "base/secret_file.h"
#include "base/settings.h"
#include "events/webhook_secret.h"

/* A body is hashed once for each. */
#define WEBHOOK_SECRETS_MAX 16

static int
secrets_of_argument(ArrayType *array, WebhookSecret **secrets)
{
	Datum	   *elements;
	bool	   *nulls;
	int			n;
	int			i;

	deconstruct_array(array, TEXTOID, -1, false, TYPALIGN_INT, &elements, &nulls, &n);
	if (n > WEBHOOK_SECRETS_MAX)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("there must not be more than %d secrets", WEBHOOK_SECRETS_MAX)));

	*secrets = palloc(Max(n, 1) * sizeof(WebhookSecret));
	for (i = 0; i < n; i++)
	{
		const char *problem;
		text	   *secret;

		if (nulls[i])
			ereport(ERROR,
					(errcode(ERRCODE_BAD_ARGUMENT),
					 errmsg("%s must not be null", "a secret")));
		secret = DatumGetTextPP(elements[i]);
		(*secrets)[i].data = VARDATA_ANY(secret);
		(*secrets)[i].len = VARSIZE_ANY_EXHDR(secret);
		problem = secret_problem((*secrets)[i].data, (*secrets)[i].len);
		if (problem != NULL)
			ereport(ERROR,
					(errcode(ERRCODE_BAD_ARGUMENT),
					 errmsg("secret %d cannot be one of Stripe's", i + 1),
					 errdetail_internal("%s", _(problem))));
	}
	return n;
}

/*
 * The secrets of a call, palloc'd: those of a text[] argument if that is not NULL,
 * otherwise those that are configured.  Returns how many there are.
 */
int
webhook_secrets(FunctionCallInfo fcinfo, int argno, WebhookSecret **secrets)
{
	List	   *list;
	ListCell   *lc;
	int			n = 0;

	if (!PG_ARGISNULL(argno))
		return secrets_of_argument(PG_GETARG_ARRAYTYPE_P(argno), secrets);

	if (setting_webhook_secret_file[0] != '\0')
		list = secret_file_read(setting_webhook_secret_file);
	else
		list = secret_environment_read("IDEMPOTENCY_WEBHOOK_SECRET");
	if (list_length(list) > WEBHOOK_SECRETS_MAX)
		ereport(ERROR,
				(errcode(ERRCODE_CONFIG_FILE_ERROR),
				 errmsg("there must not be more than %d secrets", WEBHOOK_SECRETS_MAX)));

	*secrets = palloc(Max(list_length(list), 1) * sizeof(WebhookSecret));
	foreach(lc, list)
	{
		(*secrets)[n].data = lfirst(lc);
		(*secrets)[n].len = strlen(lfirst(lc));
		n++;
	}
	return n;
}
