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

#include "ledger/expiry.h"
#include "ledger/ledger.h"

/* Columns of idempotency_keys, in order of attribute number; see ledger.h. */
#define REQUEST_COLUMNS(FIRST, NEXT) \
	FIRST(TOKEN, token) \
	NEXT(CLAIMED_AT, claimed_at) \
	NEXT(LEASE_EXPIRES_AT, lease_expires_at) \
	NEXT(RECORDED_AT, recorded_at) \
	NEXT(EXPIRES_AT, expires_at) \
	NEXT(LEASE, lease) \
	NEXT(TTL, ttl) \
	NEXT(ATTEMPT, attempt) \
	NEXT(HTTP_STATUS, http_status) \
	NEXT(SCOPE, scope) \
	NEXT(KEY, key) \
	NEXT(FINGERPRINT, fingerprint) \
	NEXT(RECOVERY_POINT, recovery_point) \
	NEXT(RECOVERY_DATA, recovery_data) \
	NEXT(RESPONSE, response) \
	NEXT(RESPONSE_HEADERS, response_headers) \
	NEXT(RESPONSE_BODY, response_body)

#define REQUEST_COLUMN_NUMBER(id, name) K_##id,

enum
{
	REQUEST_COLUMNS(REQUEST_COLUMN_NUMBER, REQUEST_COLUMN_NUMBER)
	K_NCOLUMNS
};

extern Ledger request_ledger;
extern Expiry request_expiry;

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
