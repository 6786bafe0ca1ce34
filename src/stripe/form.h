/*-------------------------------------------------------------------------
 *
 * form.h
 *	  Parameters as Stripe's API v1 takes them.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/stripe/form.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_FORM_H
#define IDEMPOTENCY_FORM_H

#include "lib/stringinfo.h"
#include "utils/jsonb.h"

extern void form_append(StringInfo out, bool first, const char *name, const char *value);
extern void form_encode(StringInfo out, Jsonb *params, Size max_size);
extern void json_encode(StringInfo out, Jsonb *params, Size max_size);

#endif							/* IDEMPOTENCY_FORM_H */
