/*-------------------------------------------------------------------------
 *
 * result_row.c
 *	  Composite and enum results of the SQL functions.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/result_row.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "catalog/pg_enum.h"
#include "funcapi.h"
#include "utils/builtins.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/syscache.h"
#include "utils/typcache.h"

#include "base/result_row.h"

/*
 * Values of our enums, remembered until pg_enum changes.  The first letter of a
 * label selects the entry: the labels of an enum differ in it.
 */
typedef struct EnumValue
{
	Oid			enumtype;
	char		label[NAMEDATALEN];
	Oid			value;
} EnumValue;

static EnumValue enum_values[32];

/*
 * Begin a row of the function's result type, with all columns NULL.
 *
 * The type must have at least ncolumns columns, which callers know by number.
 * A later version of the extension may have added more, which stay NULL.
 */
void
result_begin(ResultRow *result, FunctionCallInfo fcinfo, int ncolumns)
{
	static Oid	last_function = InvalidOid;
	static Oid	last_type = InvalidOid;
	Oid			function = fcinfo->flinfo->fn_oid;
	TupleDesc	desc;

	if (function != last_function)
	{
		last_type = get_func_rettype(function);
		last_function = function;
	}

	desc = lookup_rowtype_tupdesc(last_type, -1);
	if (desc->natts < ncolumns)
		elog(ERROR, "result type of function %u has %d columns instead of %d",
			 function, desc->natts, ncolumns);

	result->desc = desc;
	result->values = palloc0(desc->natts * sizeof(Datum));
	result->isnull = palloc(desc->natts * sizeof(bool));
	memset(result->isnull, true, desc->natts * sizeof(bool));
}

/* Set all columns to NULL again. */
void
result_reset(ResultRow *result)
{
	memset(result->isnull, true, result->desc->natts * sizeof(bool));
}

/* Set a column to a value. */
void
result_set(ResultRow *result, int column, Datum value)
{
	result->values[column] = value;
	result->isnull[column] = false;
}

/* Set a column to a value or NULL. */
void
result_copy(ResultRow *result, int column, Datum value, bool isnull)
{
	result->values[column] = value;
	result->isnull[column] = isnull;
}

/* Set a column to a text; a null pointer leaves it as it is. */
void
result_set_text(ResultRow *result, int column, const char *value)
{
	if (value != NULL)
		result_set(result, column, CStringGetTextDatum(value));
}

/* Set a column of an enum type to the value with this label. */
void
result_set_enum(ResultRow *result, int column, const char *label)
{
	result_set(result, column,
			   enum_datum(TupleDescAttr(result->desc, column)->atttypid, label));
}

/* Form the row and return it as a datum, with large values detoasted. */
Datum
result_end(ResultRow *result)
{
	HeapTuple	tuple = heap_form_tuple(result->desc, result->values, result->isnull);

	ReleaseTupleDesc(result->desc);
	return HeapTupleGetDatum(tuple);
}

/* Callback for changes of pg_enum. */
static void
forget_enum_values(Datum arg, int cacheid, uint32 hashvalue)
{
	memset(enum_values, 0, sizeof(enum_values));
}

/* The value of an enum with this label.  Raises an error if there is none. */
Datum
enum_datum(Oid enumtype, const char *label)
{
	static bool registered = false;
	EnumValue  *kept = &enum_values[(enumtype + (unsigned char) label[0]) % lengthof(enum_values)];
	HeapTuple	tuple;

	if (kept->enumtype == enumtype && strcmp(kept->label, label) == 0)
		return ObjectIdGetDatum(kept->value);

	if (!registered)
	{
		CacheRegisterSyscacheCallback(ENUMTYPOIDNAME, forget_enum_values, (Datum) 0);
		registered = true;
	}

	tuple = SearchSysCache2(ENUMTYPOIDNAME, ObjectIdGetDatum(enumtype),
							CStringGetDatum(label));
	if (!HeapTupleIsValid(tuple))
		elog(ERROR, "enum type %u has no label \"%s\"", enumtype, label);
	kept->enumtype = enumtype;
	strlcpy(kept->label, label, sizeof(kept->label));
	kept->value = ((Form_pg_enum) GETSTRUCT(tuple))->oid;
	ReleaseSysCache(tuple);

	return ObjectIdGetDatum(kept->value);
}

/* The label of an enum's value, palloc'd. */
char *
enum_label(Datum value)
{
	HeapTuple	tuple = SearchSysCache1(ENUMOID, value);
	char	   *label;

	if (!HeapTupleIsValid(tuple))
		elog(ERROR, "cache lookup failed for enum value %u", DatumGetObjectId(value));
	label = pstrdup(NameStr(((Form_pg_enum) GETSTRUCT(tuple))->enumlabel));
	ReleaseSysCache(tuple);

	return label;
}
