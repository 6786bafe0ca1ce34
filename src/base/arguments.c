/*-------------------------------------------------------------------------
 *
 * arguments.c
 *	  Checks of what callers pass to the SQL functions.
 *
 * No function of the interface is STRICT.  A NULL that must be a value is the
 * caller's mistake and an error (IK003); a NULL as the result could be read as
 * "go ahead" by an application.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/arguments.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/detoast.h"
#include "common/int.h"
#include "mb/pg_wchar.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "base/arguments.h"
#include "base/compat.h"
#include "base/errors.h"
#include "base/settings.h"

/* Longest duration: a thousand years, so that no moment overflows. */
#define DURATION_MAX (INT64CONST(1000) * DAYS_PER_YEAR_ROUNDED * USECS_PER_DAY)
#define DAYS_PER_YEAR_ROUNDED 365

/* Raise IK003 if an argument is NULL. */
static void
refuse_null(FunctionCallInfo fcinfo, int argno, const char *name)
{
	if (PG_ARGISNULL(argno))
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("%s must not be null", name)));
}

/* A text argument that must not be NULL. */
text *
argument_text(FunctionCallInfo fcinfo, int argno, const char *name)
{
	refuse_null(fcinfo, argno, name);
	return PG_GETARG_TEXT_PP(argno);
}

/*
 * Raise IK003 if a text of "len" bytes cannot be part of a row's key.  It may
 * have at most KEY_MAX_CHARS characters, and no control characters, which would
 * be lost or read differently on their way through a header, a log or a
 * terminal.
 */
void
check_label(const char *value, int len, bool may_be_empty, const char *name)
{
	bool		ascii = true;
	int			nchars = len;
	int			i;

	if (len == 0 && !may_be_empty)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("%s must not be empty", name)));

	for (i = 0; i < len; i++)
	{
		unsigned char c = value[i];

		if (c < 0x20 || c == 0x7f ||
			(c == 0xc2 && i + 1 < len && (unsigned char) value[i + 1] < 0xa0 &&
			 GetDatabaseEncoding() == PG_UTF8))
			ereport(ERROR,
					(errcode(ERRCODE_BAD_ARGUMENT),
					 errmsg("%s must not contain control characters", name)));
		if (c >= 0x80)
			ascii = false;
	}

	if (!ascii)
		nchars = pg_mbstrlen_with_len(value, len);
	if (nchars > KEY_MAX_CHARS)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("%s must not be longer than %d characters", name, KEY_MAX_CHARS),
				 errdetail("It has %d characters.", nchars)));
}

/* The argument "key": a label that is not empty. */
text *
argument_key(FunctionCallInfo fcinfo, int argno)
{
	text	   *key = argument_text(fcinfo, argno, "key");

	check_label(VARDATA_ANY(key), VARSIZE_ANY_EXHDR(key), false, "key");
	return key;
}

/* The argument "scope": a label that may be empty. */
text *
argument_scope(FunctionCallInfo fcinfo, int argno)
{
	text	   *scope = argument_text(fcinfo, argno, "scope");

	check_label(VARDATA_ANY(scope), VARSIZE_ANY_EXHDR(scope), true, "scope");
	return scope;
}

/* The argument "token": a fencing token, not NULL. */
int64
argument_token(FunctionCallInfo fcinfo, int argno)
{
	refuse_null(fcinfo, argno, "token");
	return PG_GETARG_INT64(argno);
}

/* A boolean argument that must not be NULL. */
bool
argument_bool(FunctionCallInfo fcinfo, int argno, const char *name)
{
	refuse_null(fcinfo, argno, name);
	return PG_GETARG_BOOL(argno);
}

/* A jsonb argument, detoasted, or NULL. */
Jsonb *
argument_jsonb(FunctionCallInfo fcinfo, int argno)
{
	return PG_ARGISNULL(argno) ? NULL : PG_GETARG_JSONB_P(argno);
}

/*
 * Raise IK003 if JSON is not an object.  Mostly it was meant to be one: the
 * application has turned an object into text, and its driver has done so once
 * more.
 */
void
check_object(Jsonb *json, const char *name)
{
	JsonbValue	scalar;

	if (JB_ROOT_IS_OBJECT(json))
		return;

	if (!JB_ROOT_IS_SCALAR(json))
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("%s must be a JSON object", name),
				 errdetail("It is a JSON array.")));

	(void) JsonbExtractScalar(&json->root, &scalar);
	ereport(ERROR,
			(errcode(ERRCODE_BAD_ARGUMENT),
			 errmsg("%s must be a JSON object", name),
			 errdetail("It is a JSON %s.", JsonbTypeName(&scalar)),
			 scalar.type == jbvString ?
			 errhint("It was probably encoded as JSON twice, by the application and by its driver. Pass either the object itself or its text, encoded once.") :
			 scalar.type == jbvNull ?
			 errhint("Where there is none, leave it out or pass an SQL NULL.") : 0));
}

/* A jsonb argument that is an object, or NULL. */
Jsonb *
argument_object(FunctionCallInfo fcinfo, int argno, const char *name)
{
	Jsonb	   *json = argument_jsonb(fcinfo, argno);

	if (json != NULL)
		check_object(json, name);
	return json;
}

/*
 * A length of time in microseconds, or none for NULL.  Days have 24 hours and
 * months 30 days, so that a lease does not depend on anybody's time zone.
 * Raises IK003 unless it is longer than zero and at most DURATION_MAX.
 */
Duration
argument_duration(FunctionCallInfo fcinfo, int argno, const char *name)
{
	Duration	duration = {false, 0};
	Interval   *span;
	int64		days;
	int64		usecs = 0;

	if (PG_ARGISNULL(argno))
		return duration;

	span = PG_GETARG_INTERVAL_P(argno);
	days = (int64) span->month * DAYS_PER_MONTH + span->day;
	if (interval_is_infinite(span) ||
		pg_mul_s64_overflow(days, USECS_PER_DAY, &usecs) ||
		pg_add_s64_overflow(usecs, span->time, &usecs) ||
		usecs > DURATION_MAX)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("%s must be finite and at most 1000 years", name)));
	if (usecs <= 0)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("%s must be longer than zero", name)));

	duration.given = true;
	duration.usecs = usecs;
	return duration;
}

/* An HTTP status from 100 to 599. */
int
argument_http_status(FunctionCallInfo fcinfo, int argno, const char *name)
{
	int			status;

	refuse_null(fcinfo, argno, name);
	status = PG_GETARG_INT32(argno);
	if (status < 100 || status > 599)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("%s must be an HTTP status from 100 to 599", name),
				 errdetail("It is %d.", status)));
	return status;
}

/*
 * Raise IK007 if some arguments together are larger than
 * idempotency.max_response_size.
 */
void
check_size(FunctionCallInfo fcinfo, const int *argnos, int nargs, const char *what)
{
	int64		size = 0;
	int			i;

	for (i = 0; i < nargs; i++)
	{
		if (!PG_ARGISNULL(argnos[i]))
			size += toast_raw_datum_size(PG_GETARG_DATUM(argnos[i])) - VARHDRSZ;
	}

	if (size > (int64) setting_max_response_size * 1024)
		ereport(ERROR,
				(errcode(ERRCODE_TOO_LARGE),
				 errmsg("%s is too large to be recorded", what),
				 errdetail("It has " INT64_FORMAT " bytes, and idempotency.max_response_size is %d kB.",
						   size, setting_max_response_size),
				 errhint("Record what is needed to build the response again, or raise idempotency.max_response_size.")));
}

/* Microseconds as an interval of hours, minutes and seconds alone, palloc'd. */
Datum
interval_datum(int64 usecs)
{
	Interval   *span = palloc0(sizeof(Interval));

	span->time = usecs;
	return IntervalPGetDatum(span);
}

/*
 * Raise IK003 if this is no Stripe account: printable ASCII without spaces,
 * since it becomes a header.
 */
void
check_account(const char *account)
{
	const char *p = account;

	while (*p > 0x20 && *p <= 0x7e)
		p++;
	if (*p != '\0' || p - account > KEY_MAX_CHARS)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("account must be at most %d printable ASCII characters without spaces",
						KEY_MAX_CHARS)));
}
