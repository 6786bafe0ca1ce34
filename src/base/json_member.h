/*-------------------------------------------------------------------------
 *
 * json_member.h
 *	  Members of JSON objects.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/json_member.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_JSON_MEMBER_H
#define IDEMPOTENCY_JSON_MEMBER_H

#include "utils/jsonb.h"

extern bool json_member(JsonbContainer *object, const char *name, JsonbValue *value);
extern char *json_string_member(JsonbContainer *object, const char *name);
extern JsonbContainer *json_object_member(JsonbContainer *object, const char *name);
extern bool json_bool_member(JsonbContainer *object, const char *name, bool *value);
extern Jsonb *json_member_copy(JsonbContainer *object, const char *name);

#endif							/* IDEMPOTENCY_JSON_MEMBER_H */
