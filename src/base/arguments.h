/*-------------------------------------------------------------------------
 *
 * arguments.h
 *	  Checks of what callers pass to the SQL functions.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/arguments.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_ARGUMENTS_H
#define IDEMPOTENCY_ARGUMENTS_H

#include "datatype/timestamp.h"
#include "fmgr.h"
#include "utils/jsonb.h"

/* A length of time in microseconds; not given if the argument was NULL. */
typedef struct Duration
{
	bool		given;
	int64		usecs;
} Duration;

/* Longest key, scope or other label, in characters. */
#define KEY_MAX_CHARS 255

extern text *argument_text(FunctionCallInfo fcinfo, int argno, const char *name);
extern text *argument_key(FunctionCallInfo fcinfo, int argno);
extern text *argument_scope(FunctionCallInfo fcinfo, int argno);
extern int64 argument_token(FunctionCallInfo fcinfo, int argno);
extern bool argument_bool(FunctionCallInfo fcinfo, int argno, const char *name);
extern Jsonb *argument_jsonb(FunctionCallInfo fcinfo, int argno);
extern Jsonb *argument_object(FunctionCallInfo fcinfo, int argno, const char *name);
extern void check_object(Jsonb *json, const char *name);
extern Duration argument_duration(FunctionCallInfo fcinfo, int argno, const char *name);
extern int	argument_http_status(FunctionCallInfo fcinfo, int argno, const char *name);
extern void check_size(FunctionCallInfo fcinfo, const int *argnos, int nargs, const char *what);

extern Datum interval_datum(int64 usecs);
extern void check_account(const char *account);
extern void check_label(const char *value, int len, bool may_be_empty, const char *name);

#endif							/* IDEMPOTENCY_ARGUMENTS_H */
