/*-------------------------------------------------------------------------
 *
 * mac.h
 *	  HMAC-SHA256 over a labelled list of fields, or over bytes as they are.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/mac.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_MAC_H
#define IDEMPOTENCY_MAC_H

#define MAC_LEN 32

typedef struct MacField
{
	const char *data;			/* not looked at if len is 0 */
	size_t		len;
} MacField;

extern void mac_fields(const uint8 *key, size_t keylen, const char *label,
					   const MacField *fields, int nfields, uint8 out[MAC_LEN]);
extern void mac_concatenated(const uint8 *key, size_t keylen,
							 const MacField *parts, int nparts, uint8 out[MAC_LEN]);
extern MacField mac_text(const char *str, size_t len);

#endif							/* IDEMPOTENCY_MAC_H */
