/*-------------------------------------------------------------------------
 *
 * json_build.h
 *	  Building the text of a JSON object, member by member.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/json_build.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_JSON_BUILD_H
#define IDEMPOTENCY_JSON_BUILD_H

#include "datatype/timestamp.h"
#include "lib/stringinfo.h"
#include "utils/jsonb.h"

extern void json_begin(StringInfo json);
extern void json_end(StringInfo json);
extern Jsonb *json_end_jsonb(StringInfo json);
extern void json_add_name(StringInfo json, const char *name);
extern void json_add_string(StringInfo json, const char *name, const char *value);
extern void json_add_json(StringInfo json, const char *name, const char *value);
extern void json_add_int(StringInfo json, const char *name, int value);
extern void json_add_bool(StringInfo json, const char *name, bool value);
extern void json_add_time(StringInfo json, const char *name, TimestampTz value);

#endif							/* IDEMPOTENCY_JSON_BUILD_H */
