/*-------------------------------------------------------------------------
 *
 * request_ledger.h
 *	  The table idempotency_keys: its columns, and the states of its rows.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/ledger/request_ledger.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_REQUEST_LEDGER_H
#define IDEMPOTENCY_REQUEST_LEDGER_H

#include "ledger/ledger.h"

/*
 * The columns of idempotency_keys in the order of their attribute numbers: the
 * first, and each of those that follow it.
 */
#define REQUEST_COLUMNS(FIRST, NEXT) \
	FIRST(K_TOKEN, "token") \
	NEXT(K_CLAIMED_AT, "claimed_at") \
	NEXT(K_LEASE_EXPIRES_AT, "lease_expires_at") \
	NEXT(K_RECORDED_AT, "recorded_at") \
	NEXT(K_EXPIRES_AT, "expires_at") \
	NEXT(K_LEASE, "lease") \
	NEXT(K_TTL, "ttl") \
	NEXT(K_ATTEMPT, "attempt") \
	NEXT(K_HTTP_STATUS, "http_status") \
	NEXT(K_SCOPE, "scope") \
	NEXT(K_KEY, "key") \
	NEXT(K_FINGERPRINT, "fingerprint") \
	NEXT(K_RECOVERY_POINT, "recovery_point") \
	NEXT(K_RECOVERY_DATA, "recovery_data") \
	NEXT(K_RESPONSE, "response") \
	NEXT(K_RESPONSE_HEADERS, "response_headers") \
	NEXT(K_RESPONSE_BODY, "response_body")

#define FIRST_NUMBER(number, name) number
#define NEXT_NUMBER(number, name) , number
enum
{
	REQUEST_COLUMNS(FIRST_NUMBER, NEXT_NUMBER), K_NCOLUMNS
};
#undef FIRST_NUMBER
#undef NEXT_NUMBER

extern Ledger request_ledger;

/* Is the key's result recorded, and no longer replayed? */
static inline bool
request_is_expired(const LedgerRow *row, TimestampTz now)
{
	return !row->isnull[K_EXPIRES_AT] &&
		DatumGetTimestampTz(row->values[K_EXPIRES_AT]) <= now;
}

/*
 * Was the key given back with its request kept?  Then it is free from that
 * moment on, whatever the clock says now, and for the transaction that did it.
 */
static inline bool
request_is_given_up(const LedgerRow *row)
{
	return row->isnull[K_EXPIRES_AT] && row->isnull[K_LEASE] &&
		!row->isnull[K_LEASE_EXPIRES_AT];
}

extern char *describe_request(text *key, text *scope);

#endif							/* IDEMPOTENCY_REQUEST_LEDGER_H */
