/*-------------------------------------------------------------------------
 *
 * json_text.h
 *	  Turning JSON that others have written into jsonb.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/json_text.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_JSON_TEXT_H
#define IDEMPOTENCY_JSON_TEXT_H

#include "utils/jsonb.h"

/* What is nested deeper than this becomes null. */
#define JSON_DEPTH_MAX 500

extern char *json_text_for_jsonb(const char *body, size_t len);
extern Jsonb *json_read(const char *body, size_t len);

#endif							/* IDEMPOTENCY_JSON_TEXT_H */
