/*-------------------------------------------------------------------------
 *
 * open_claims.h
 *	  Claims that belong to the current transaction.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/ledger/open_claims.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_OPEN_CLAIMS_H
#define IDEMPOTENCY_OPEN_CLAIMS_H

extern void open_claims_init(void);
extern void open_claims_add(int64 token, const char *what, const char *name);
extern void open_claims_remove(int64 token);
extern bool open_claims_contain(int64 token);
extern int64 *open_claims_tokens(int *n);

#endif							/* IDEMPOTENCY_OPEN_CLAIMS_H */
