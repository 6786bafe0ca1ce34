/*-------------------------------------------------------------------------
 *
 * webhook_secret.h
 *	  Secrets that webhooks are signed with.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/events/webhook_secret.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_WEBHOOK_SECRET_H
#define IDEMPOTENCY_WEBHOOK_SECRET_H

#include "fmgr.h"

#include "stripe/webhook_signature.h"

extern int	webhook_secrets(FunctionCallInfo fcinfo, int argno, WebhookSecret **secrets);

#endif							/* IDEMPOTENCY_WEBHOOK_SECRET_H */
