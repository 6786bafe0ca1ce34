/*-------------------------------------------------------------------------
 *
 * webhook_payload.c
 *	  The body of a webhook, as an argument.
 *
 * What is signed is a string of bytes.  Some clients have it as such, others as
 * characters, and many do not say which type they send; PostgreSQL then chooses
 * text.  So there are functions for both types:
 *
 * - bytea is the bytes;
 * - text is characters, and what was signed is their UTF-8.
 *
 * But a client may also write bytes down as PostgreSQL does, as \x7b22...,
 * without saying that this is a bytea.  No JSON begins with a backslash, so text
 * of that form is the bytes that it stands for.  The older form of bytea, with
 * octal escapes, cannot be told from JSON with escapes of its own: it is text.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/events/webhook_payload.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "mb/pg_wchar.h"
#include "utils/builtins.h"

#include "base/arguments.h"
#include "base/compat.h"
#include "events/webhook_payload.h"

/* Is it a bytea that was written down: \x and pairs of hexadecimal digits? */
static bool
is_written_bytea(const char *value, int len)
{
	int			i;

	if (len < 2 || len % 2 != 0 || value[0] != '\\' || value[1] != 'x')
		return false;
	for (i = 2; i < len; i++)
	{
		if (!isxdigit((unsigned char) value[i]))
			return false;
	}
	return true;
}

WebhookBytes
payload_of_bytea(FunctionCallInfo fcinfo, int argno)
{
	WebhookBytes payload = {NULL, false};

	payload.bytes = (bytea *) argument_text(fcinfo, argno, "payload");
	return payload;
}

/*
 * In a database in SQL_ASCII nobody knows what the bytes of a text mean, so they
 * are taken as the client has sent them.
 */
WebhookBytes
payload_of_text(FunctionCallInfo fcinfo, int argno)
{
	WebhookBytes payload = {NULL, true};
	text	   *value = argument_text(fcinfo, argno, "payload");
	const char *data = VARDATA_ANY(value);
	int			len = VARSIZE_ANY_EXHDR(value);

	if (is_written_bytea(data, len))
	{
		payload.bytes = DatumGetByteaPP(DirectFunctionCall1(byteain,
															CStringGetDatum(pnstrdup(data, len))));
		payload.of_text = false;
	}
	else if (GetDatabaseEncoding() == PG_UTF8 || GetDatabaseEncoding() == PG_SQL_ASCII)
		payload.bytes = (bytea *) value;
	else
	{
		/* as a text of the same bytes: what a bytea is */
		char	   *utf8 = pg_server_to_any(data, len, PG_UTF8);

		payload.bytes = (bytea *) cstring_to_text_with_len(utf8, utf8 == data ? len : strlen(utf8));
	}
	return payload;
}
