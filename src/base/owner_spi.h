/*-------------------------------------------------------------------------
 *
 * owner_spi.h
 *	  Kept SPI statements that run with a table owner's rights.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/owner_spi.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_OWNER_SPI_H
#define IDEMPOTENCY_OWNER_SPI_H

#include "executor/spi.h"

#define OWNER_STATEMENT_MAX_ARGS 26

/*
 * One statement and, once it has run in this backend, its plan.  Every name
 * and every operator in the text is qualified.
 */
typedef struct OwnerStatement
{
	const char *sql;
	int			nargs;
	Oid			argtypes[OWNER_STATEMENT_MAX_ARGS];
	SPIPlanPtr	plan;
} OwnerStatement;

extern uint64 owner_execute(OwnerStatement *statement, Oid owner,
							Datum *values, const char *nulls, bool read_only,
							Datum *out, bool *outnull, int nout);
extern uint64 owner_execute_latest(OwnerStatement *statement, Oid owner,
								   Datum *values, const char *nulls,
								   Datum *out, bool *outnull, int nout);
extern void owner_select(OwnerStatement *statement, Oid owner, Datum *values,
						 void (*row) (HeapTuple tuple, TupleDesc desc, void *arg), void *arg);
extern bool owner_plan_is_local_scan(OwnerStatement *statement, Oid owner, Oid relid);

#endif							/* IDEMPOTENCY_OWNER_SPI_H */
