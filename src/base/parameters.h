/*-------------------------------------------------------------------------
 *
 * parameters.h
 *	  Parameters of a statement, in order: the first to be added is $1.
 *
 * A pointer of NULL is a NULL.  The null flags are as SPI takes them.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/parameters.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_PARAMETERS_H
#define IDEMPOTENCY_PARAMETERS_H

#include "datatype/timestamp.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "base/arguments.h"
#include "base/owner_spi.h"

/* Parameters that were added so far. */
typedef struct Parameters
{
	int			n;
	Datum		values[OWNER_STATEMENT_MAX_ARGS];
	char		nulls[OWNER_STATEMENT_MAX_ARGS];
} Parameters;

static inline void
parameter_nullable(Parameters *parameters, Datum value, bool isnull)
{
	Assert(parameters->n < OWNER_STATEMENT_MAX_ARGS);
	parameters->values[parameters->n] = value;
	parameters->nulls[parameters->n++] = isnull ? 'n' : ' ';
}

static inline void
parameter_datum(Parameters *parameters, Datum value)
{
	parameter_nullable(parameters, value, false);
}

/* Begin, with the key of a row: nkeys values that are not NULL. */
static inline void
parameters_begin(Parameters *parameters, const Datum *key, int nkeys)
{
	int			i;

	parameters->n = 0;
	for (i = 0; i < nkeys; i++)
		parameter_datum(parameters, key[i]);
}

/* A varlena, such as a text, bytea, jsonb or array; NULL for a null pointer. */
static inline void
parameter_pointer(Parameters *parameters, const void *varlena)
{
	parameter_nullable(parameters, PointerGetDatum(varlena), varlena == NULL);
}

/* A C string as text; NULL for a null pointer. */
static inline void
parameter_string(Parameters *parameters, const char *string)
{
	parameter_pointer(parameters, string == NULL ? NULL : cstring_to_text(string));
}

static inline void
parameter_int32(Parameters *parameters, int32 value)
{
	parameter_datum(parameters, Int32GetDatum(value));
}

static inline void
parameter_int64(Parameters *parameters, int64 value)
{
	parameter_datum(parameters, Int64GetDatum(value));
}

static inline void
parameter_bool(Parameters *parameters, bool value)
{
	parameter_datum(parameters, BoolGetDatum(value));
}

static inline void
parameter_timestamp(Parameters *parameters, TimestampTz value)
{
	parameter_datum(parameters, TimestampTzGetDatum(value));
}

/* A length of time from argument_duration(); NULL if none was given. */
static inline void
parameter_duration(Parameters *parameters, Duration duration)
{
	if (duration.given)
		parameter_datum(parameters, interval_datum(duration.usecs));
	else
		parameter_nullable(parameters, (Datum) 0, true);
}

#endif							/* IDEMPOTENCY_PARAMETERS_H */
