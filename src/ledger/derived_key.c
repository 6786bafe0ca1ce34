/*-------------------------------------------------------------------------
 *
 * derived_key.c
 *	  UUIDs derived from the namespace, and the idempotency key of a call to
 *	  Stripe.
 *
 * A key that is drawn at random is gone with the transaction that drew it,
 * and with it the only protection against a second charge.  So keys are
 * derived: the same operation in the same namespace gets the same key, after
 * a rollback, a crash or a restore.  The UUID is the beginning of a MAC, so
 * nobody without the namespace can guess it, and two databases that name their
 * operations alike do not share keys at Stripe.
 *
 * The UUID alone tells operations apart.  Type and id precede it for the
 * benefit of whoever reads Stripe's log; ("a:b", "c") and ("a", "b:c") look
 * alike there and have different UUIDs.
 *
 * doc/formats.md describes the derivation, with test vectors.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/ledger/derived_key.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/fmgrprotos.h"

#include "ledger/derived_key.h"

StaticAssertDecl(STRIPE_OPERATION_MAX + 2 + STRIPE_KEY_UUID_LEN == STRIPE_KEY_MAX,
				 "the longest operation makes the longest key");
StaticAssertDecl(MAC_LEN >= UUID_LEN, "a MAC fills a UUID");

static bool is_printable_ascii(const char *s);

/*
 * Derive a UUID of version 8 (RFC 9562, section 5.8) from a label and fields:
 * the first 16 bytes of their MAC, with version and variant set.
 *
 * Raises what mac_fields raises.
 */
void
derive_uuid(const uint8 *ns, size_t nslen, const char *label,
			const MacField *fields, int nfields, pg_uuid_t *uuid)
{
	uint8		mac[MAC_LEN];

	mac_fields(ns, nslen, label, fields, nfields, mac);
	memcpy(uuid->data, mac, UUID_LEN);
	uuid->data[6] = (uuid->data[6] & 0x0f) | 0x80;	/* version 8 */
	uuid->data[8] = (uuid->data[8] & 0x3f) | 0x80;	/* RFC 9562's variant */
}

/*
 * Derive the UUID of a request's operation from its scope and key, both in the
 * server's encoding.  They may be empty.
 *
 * Raises what mac_text and mac_fields raise.
 */
void
derive_operation_uuid(const uint8 *ns, size_t nslen,
					  const char *scope, size_t scopelen,
					  const char *key, size_t keylen, pg_uuid_t *uuid)
{
	MacField	fields[2];

	fields[0] = mac_text(scope, scopelen);
	fields[1] = mac_text(key, keylen);
	derive_uuid(ns, nslen, "operation-uuid/1", fields, lengthof(fields), uuid);
}

/*
 * Derive the idempotency key of an operation's generation (1, 2, ...).
 *
 * Type and id must be free of problems that stripe_operation_problem() finds.
 * The caller has checked that, with a better message; it is checked again
 * here, because the key becomes an HTTP header.  The account may be anything.
 * Returns "type:id:UUID" in CurrentMemoryContext, printable ASCII of at most
 * STRIPE_KEY_MAX characters.  Raises what mac_text and mac_fields raise.
 */
char *
derive_stripe_key(const uint8 *ns, size_t nslen, const char *account,
				  const char *operation_type, const char *operation_id,
				  int generation)
{
	const char *problem = stripe_operation_problem(operation_type, operation_id);
	char		digits[12];
	MacField	fields[4];
	pg_uuid_t	uuid;

	if (problem != NULL)
		elog(ERROR, "cannot derive a Stripe key: %s", problem);
	if (generation < 1)
		elog(ERROR, "cannot derive a Stripe key: generation %d", generation);

	snprintf(digits, sizeof(digits), "%d", generation);
	fields[0] = mac_text(account, strlen(account));
	fields[1] = mac_text(operation_type, strlen(operation_type));
	fields[2] = mac_text(operation_id, strlen(operation_id));
	fields[3] = mac_text(digits, strlen(digits));
	derive_uuid(ns, nslen, "stripe-key/1", fields, lengthof(fields), &uuid);

	return psprintf("%s:%s:%s", operation_type, operation_id,
					DatumGetCString(DirectFunctionCall1(uuid_out,
														UUIDPGetDatum(&uuid))));
}

/*
 * What keeps an operation's type and id from being part of a Stripe key?
 *
 * Returns NULL if nothing does, otherwise a fragment for an error's DETAIL,
 * marked for translation but not translated: errdetail("%s.", _(problem)).
 * It never quotes the input.
 */
const char *
stripe_operation_problem(const char *type, const char *id)
{
	StaticAssertStmt(STRIPE_OPERATION_MAX == 217, "the message says 217");

	if (type[0] == '\0')
		return gettext_noop("operation type is empty");
	if (id[0] == '\0')
		return gettext_noop("operation id is empty");
	if (!is_printable_ascii(type))
		return gettext_noop("operation type has a character that is not printable ASCII");
	if (!is_printable_ascii(id))
		return gettext_noop("operation id has a character that is not printable ASCII");

	/* the id may begin with one, being inside the header's value */
	if (type[0] == ' ')
		return gettext_noop("operation type starts with a space, which an HTTP header loses");

	if (strlen(type) + strlen(id) > STRIPE_OPERATION_MAX)
		return gettext_noop("operation type and operation id have more than 217 characters together");

	return NULL;
}

static bool
is_printable_ascii(const char *s)
{
	for (; *s != '\0'; s++)
	{
		if (*s < 0x20 || *s > 0x7e)
			return false;
	}
	return true;
}
