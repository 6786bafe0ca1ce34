/*-------------------------------------------------------------------------
 *
 * http_client.c
 *	  The way to idempotency_stripe.so.
 *
 * The HTTP client is a library of its own, because libcurl and what it needs
 * cost a backend some milliseconds and a server a package, and only those who
 * call Stripe from SQL should pay for it.  A backend loads it at its first
 * request.  All SQL functions and settings belong to idempotency.so, so that
 * CREATE EXTENSION, a restore and pg_upgrade work without it.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/send/http_client.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "fmgr.h"
#include "utils/memutils.h"

#include "base/errors.h"
#include "send/http_client.h"

/*
 * Raise IK010 with what the server said when it tried to load the library.
 */
static void
refuse_library(const char *problem)
{
	ereport(ERROR,
			(errcode(ERRCODE_STRIPE_NOT_INSTALLED),
			 errmsg("could not load library \"%s\", which calls Stripe", HTTP_CLIENT_LIBRARY),
			 errdetail_internal("%s", problem),
			 errhint("It is built and installed along with the extension where libcurl's development files are (on Debian libcurl4-openssl-dev), and needs libcurl on the server.")));
}

/*
 * The HTTP client, loaded when it is first asked for.  Raises IK010 if it is
 * not installed.
 */
const HttpClient *
http_client(void)
{
	static const HttpClient *client = NULL;

	if (client == NULL)
	{
		MemoryContext context = CurrentMemoryContext;
		volatile HttpClientFunction function = NULL;
		const HttpClient *loaded;

		PG_TRY();
		{
			function = (HttpClientFunction) (void *)
				load_external_function(HTTP_CLIENT_LIBRARY, HTTP_CLIENT_FUNCTION, true, NULL);
		}
		PG_CATCH();
		{
			ErrorData  *edata;

			MemoryContextSwitchTo(context);
			edata = CopyErrorData();
			FlushErrorState();
			refuse_library(edata->message);
		}
		PG_END_TRY();

		loaded = function();
		if (loaded->version != HTTP_CLIENT_VERSION)
			refuse_library("It belongs to another version of the extension.");
		client = loaded;
	}

	return client;
}
