/*-------------------------------------------------------------------------
 *
 * request_fingerprint.h
 *	  Comparing a request with the recorded fingerprint of an earlier one.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/ledger/request_fingerprint.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_REQUEST_FINGERPRINT_H
#define IDEMPOTENCY_REQUEST_FINGERPRINT_H

#include "utils/jsonb.h"

typedef struct RequestPrint
{
	Jsonb	   *request;		/* NULL: not compared, nothing kept */
	const char *const *ignore;	/* names of members that are ignored */
	int			nignore;
	bytea	   *print;			/* made with the namespace in force, when
								 * it is first needed */
} RequestPrint;

extern bytea *request_print(RequestPrint *rp);
extern bool request_matches(RequestPrint *rp, bytea *recorded);

#endif							/* IDEMPOTENCY_REQUEST_FINGERPRINT_H */
