/*-------------------------------------------------------------------------
 *
 * namespace.h
 *	  The secret that this database's keys and fingerprints are derived from.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/ledger/namespace.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_NAMESPACE_H
#define IDEMPOTENCY_NAMESPACE_H

#include "base/fingerprint.h"

#define NAMESPACE_LEN 32

typedef struct Namespace
{
	uint8		value[NAMESPACE_LEN];
} Namespace;

extern void namespace_in_force(Namespace *ns);
extern void namespace_for_stripe(Namespace *ns);
extern void namespace_write_down(void);
extern bool namespace_by_id(const uint8 *id, Namespace *ns);

#endif							/* IDEMPOTENCY_NAMESPACE_H */
