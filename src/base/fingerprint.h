/*-------------------------------------------------------------------------
 *
 * fingerprint.h
 *	  Canonical fingerprint of a request.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/fingerprint.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_FINGERPRINT_H
#define IDEMPOTENCY_FINGERPRINT_H

#include "utils/jsonb.h"

/* version (1 byte), namespace id (8), MAC (32) */
#define FINGERPRINT_VERSION	1
#define NAMESPACE_ID_LEN	8
#define FINGERPRINT_LEN		41

extern void namespace_id(const uint8 *ns, size_t nslen,
						 uint8 id[NAMESPACE_ID_LEN]);
extern void fingerprint_compute(Jsonb *request,
								const char *const *ignore, int nignore,
								const uint8 *ns, size_t nslen,
								uint8 out[FINGERPRINT_LEN]);

#endif							/* IDEMPOTENCY_FINGERPRINT_H */
