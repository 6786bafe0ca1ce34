/*-------------------------------------------------------------------------
 *
 * mac.c
 *	  HMAC-SHA256 over a labelled list of fields, or over bytes as they are.
 *
 * Whatever the extension derives or compares is a MAC keyed with the
 * database's namespace.  Its input is a label, which says what the MAC is for,
 * and a list of fields, each preceded by its length.  So no two uses and no
 * two lists of fields have the same input: ("ab", "c") differs from ("a",
 * "bc"), and the MACs of one label tell nothing about those of another.
 *
 * The result has to survive a dump and restore into a database of another
 * encoding, hence text goes in as UTF-8 (mac_text).
 *
 * doc/formats.md describes the format for other implementers.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/mac.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "common/hmac.h"
#include "common/sha2.h"
#include "mb/pg_wchar.h"
#include "port/pg_bswap.h"
#include "utils/memutils.h"

#include "base/mac.h"

StaticAssertDecl(MAC_LEN == PG_SHA256_DIGEST_LENGTH,
				 "MAC_LEN is the length of a SHA-256 digest");

static pg_hmac_ctx *create_hmac(void);
static void check_hmac(pg_hmac_ctx *ctx, int status);
static void update_field(pg_hmac_ctx *ctx, const char *data, size_t len);

/*
 * Compute the MAC of a label and nfields fields, in this order.
 *
 * "key" has to have at least one byte; OpenSSL's FIPS mode wants 14 or more.
 * The 32 bytes of the result are written to "out".  Raises
 * ERRCODE_INTERNAL_ERROR where the cryptographic library refuses.  It may
 * register with CurrentResourceOwner, so there has to be one.
 */
void
mac_fields(const uint8 *key, size_t keylen, const char *label,
		   const MacField *fields, int nfields, uint8 out[MAC_LEN])
{
	pg_hmac_ctx *ctx;

	Assert(keylen > 0);
	Assert(nfields >= 0);

	ctx = create_hmac();
	PG_TRY();
	{
		check_hmac(ctx, pg_hmac_init(ctx, key, keylen));
		update_field(ctx, label, strlen(label));
		for (int i = 0; i < nfields; i++)
			update_field(ctx, fields[i].data, fields[i].len);
		check_hmac(ctx, pg_hmac_final(ctx, out, MAC_LEN));
	}
	PG_FINALLY();
	{
		pg_hmac_free(ctx);
	}
	PG_END_TRY();
}

/*
 * Compute the MAC of nparts parts, one after the other and nothing between
 * them: of a message whose form somebody else has defined.
 *
 * Otherwise as mac_fields().
 */
void
mac_concatenated(const uint8 *key, size_t keylen,
				 const MacField *parts, int nparts, uint8 out[MAC_LEN])
{
	pg_hmac_ctx *ctx;

	Assert(keylen > 0);

	ctx = create_hmac();
	PG_TRY();
	{
		check_hmac(ctx, pg_hmac_init(ctx, key, keylen));
		for (int i = 0; i < nparts; i++)
		{
			if (parts[i].len > 0)
				check_hmac(ctx, pg_hmac_update(ctx, (const uint8 *) parts[i].data,
											   parts[i].len));
		}
		check_hmac(ctx, pg_hmac_final(ctx, out, MAC_LEN));
	}
	PG_FINALLY();
	{
		pg_hmac_free(ctx);
	}
	PG_END_TRY();
}

/*
 * Make a field of a text in the server's encoding, "len" bytes that needn't
 * end in a zero byte: the same text as UTF-8.
 *
 * Where nothing has to be converted the field points to "str" itself,
 * otherwise to memory of CurrentMemoryContext.  A database in SQL_ASCII
 * doesn't know what its bytes mean: they are taken as they are.
 *
 * Raises what the conversion of a text beyond ASCII raises:
 * ERRCODE_UNTRANSLATABLE_CHARACTER for a character that Unicode lacks,
 * ERRCODE_UNDEFINED_FUNCTION where the encoding has no conversion to UTF-8
 * (MULE_INTERNAL), ERRCODE_PROGRAM_LIMIT_EXCEEDED for a text that gets too
 * long.
 */
MacField
mac_text(const char *str, size_t len)
{
	MacField	field;
	size_t		ascii = 0;

	Assert(len <= MaxAllocSize);

	field.data = str;
	field.len = len;

	if (GetDatabaseEncoding() == PG_UTF8 || GetDatabaseEncoding() == PG_SQL_ASCII)
		return field;

	/* ASCII is the same in every encoding of a server */
	while (ascii < len && !IS_HIGHBIT_SET(str[ascii]))
		ascii++;
	if (ascii == len)
		return field;

	field.data = pg_server_to_any(str, (int) len, PG_UTF8);
	if (field.data != str)
		field.len = strlen(field.data);

	return field;
}

static pg_hmac_ctx *
create_hmac(void)
{
	pg_hmac_ctx *ctx = pg_hmac_create(PG_SHA256);

	if (ctx == NULL)
		check_hmac(NULL, -1);
	return ctx;
}

/*
 * Raise an error if a pg_hmac function has failed, as long as its context is
 * there to tell the reason.
 */
static void
check_hmac(pg_hmac_ctx *ctx, int status)
{
	if (status < 0)
		ereport(ERROR,
				(errcode(ERRCODE_INTERNAL_ERROR),
				 errmsg("could not compute %s: %s", "HMAC-SHA256",
						pg_hmac_error(ctx))));
}

/*
 * Add one field, its length first.
 */
static void
update_field(pg_hmac_ctx *ctx, const char *data, size_t len)
{
	uint64		prefix = pg_hton64((uint64) len);

	check_hmac(ctx, pg_hmac_update(ctx, (const uint8 *) &prefix, sizeof(prefix)));
	if (len > 0)
		check_hmac(ctx, pg_hmac_update(ctx, (const uint8 *) data, len));
}
