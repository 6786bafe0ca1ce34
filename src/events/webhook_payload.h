/*-------------------------------------------------------------------------
 *
 * webhook_payload.h
 *	  The body of a webhook, as an argument.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/events/webhook_payload.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_WEBHOOK_PAYLOAD_H
#define IDEMPOTENCY_WEBHOOK_PAYLOAD_H

#include "fmgr.h"

/* Its bytes, and whether they were told as text. */
typedef struct WebhookBytes
{
	bytea	   *bytes;
	bool		of_text;
} WebhookBytes;

extern WebhookBytes payload_of_bytea(FunctionCallInfo fcinfo, int argno);
extern WebhookBytes payload_of_text(FunctionCallInfo fcinfo, int argno);

#endif							/* IDEMPOTENCY_WEBHOOK_PAYLOAD_H */
