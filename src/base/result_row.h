/*-------------------------------------------------------------------------
 *
 * result_row.h
 *	  Composite and enum results of the SQL functions.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/result_row.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_RESULT_ROW_H
#define IDEMPOTENCY_RESULT_ROW_H

#include "access/tupdesc.h"
#include "fmgr.h"

/* A row under construction; columns are NULL until they are set. */
typedef struct ResultRow
{
	TupleDesc	desc;
	Datum	   *values;
	bool	   *isnull;
} ResultRow;

extern void result_begin(ResultRow *result, FunctionCallInfo fcinfo, int ncolumns);
extern void result_reset(ResultRow *result);
extern void result_set(ResultRow *result, int column, Datum value);
extern void result_copy(ResultRow *result, int column, Datum value, bool isnull);
extern void result_set_text(ResultRow *result, int column, const char *value);
extern void result_set_enum(ResultRow *result, int column, const char *label);
extern Datum result_end(ResultRow *result);

extern Datum enum_datum(Oid enumtype, const char *label);
extern char *enum_label(Datum value);

#endif							/* IDEMPOTENCY_RESULT_ROW_H */
