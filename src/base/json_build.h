/*-------------------------------------------------------------------------
 *
 * json_build.h
 *	  JSON objects, written member by member.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/json_build.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_JSON_BUILD_H
#define IDEMPOTENCY_JSON_BUILD_H

#include "lib/stringinfo.h"
#include "utils/jsonb.h"

extern void json_build_begin(StringInfo json);
extern void json_build_string(StringInfo json, const char *name, const char *value);
extern void json_build_text(StringInfo json, const char *name, const char *text);
extern void json_build_jsonb(StringInfo json, const char *name, Jsonb *value);
extern void json_build_end(StringInfo json);
extern Jsonb *json_build_end_jsonb(StringInfo json);

#endif							/* IDEMPOTENCY_JSON_BUILD_H */
