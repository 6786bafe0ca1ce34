/*-------------------------------------------------------------------------
 *
 * expire.h
 *	  The kinds of rows that expire, of all ledgers.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/process/expire.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_EXPIRE_H
#define IDEMPOTENCY_EXPIRE_H

#include "ledger/expiry.h"

#define EXPIRY_KINDS 4

/* In the order in which they are removed. */
extern Expiry *const expiry_kinds[];

#endif							/* IDEMPOTENCY_EXPIRE_H */
