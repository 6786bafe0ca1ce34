/*-------------------------------------------------------------------------
 *
 * derived_key.h
 *	  UUIDs derived from the namespace, and the idempotency key of a call to
 *	  Stripe.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/ledger/derived_key.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_DERIVED_KEY_H
#define IDEMPOTENCY_DERIVED_KEY_H

#include "utils/uuid.h"

#include "base/mac.h"

/* Stripe takes keys of up to 255 characters: type, ':', id, ':', UUID */
#define STRIPE_KEY_MAX			255
#define STRIPE_KEY_UUID_LEN		36
#define STRIPE_OPERATION_MAX	217 /* type and id together */

/* The name of a call's key in metadata: idempotency.stripe_key_in_metadata */
#define METADATA_NAME "idempotency_key"

extern void derive_uuid(const uint8 *ns, size_t nslen, const char *label,
						const MacField *fields, int nfields, pg_uuid_t *uuid);
extern void derive_operation_uuid(const uint8 *ns, size_t nslen,
								  const char *scope, size_t scopelen,
								  const char *key, size_t keylen,
								  pg_uuid_t *uuid);
extern char *derive_stripe_key(const uint8 *ns, size_t nslen,
							   const char *account,
							   const char *operation_type,
							   const char *operation_id, int generation);
extern const char *stripe_operation_problem(const char *type, const char *id);

#endif							/* IDEMPOTENCY_DERIVED_KEY_H */
