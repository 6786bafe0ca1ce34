/*-------------------------------------------------------------------------
 *
 * fingerprint.c
 *	  Canonical fingerprint of a request.
 *
 * Two requests have the same fingerprint exactly if they are equal as jsonb
 * values, without the members that are ignored.  The text of a jsonb will not
 * do for that: 1.0 and 1 are equal and print differently.  Nor will its bytes:
 * PostgreSQL may lay them out in another way one day, while a fingerprint is
 * stored for years and compared after an upgrade or a restore elsewhere.  So
 * the value is encoded anew, in a form of our own:
 *
 *		n, t, f		null, true, false
 *		d			number: length, text DIGITSeEXPONENT
 *		s			string: length, UTF-8 bytes
 *		a			array: number of elements, the elements
 *		o			object: number of members, the members (length of the
 *					name, name, value), shorter names first, names of one
 *					length in order of their bytes
 *
 * Lengths and counts are 8 bytes, most significant first.  Each value tells
 * where it ends, so no two values have one encoding in common.  Numbers go
 * without their outer zeros because a short request may have a great many:
 * 1e131071 is followed by 131,071 of them.
 *
 * The fingerprint is a MAC of the encoding, keyed with the namespace: whoever
 * reads the ledger cannot find a request by trying likely ones.  It is preceded
 * by the version of this format and an id of the namespace, so that the reader
 * of a stored fingerprint knows how to compute another one like it.
 *
 * doc/formats.md describes the format, with test vectors.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/fingerprint.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "lib/stringinfo.h"
#include "libpq/pqformat.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "port/pg_bswap.h"
#include "utils/builtins.h"
#include "utils/numeric.h"

#include "base/fingerprint.h"
#include "base/mac.h"

StaticAssertDecl(FINGERPRINT_LEN == 1 + NAMESPACE_ID_LEN + MAC_LEN,
				 "a fingerprint is version, namespace id and MAC");

/* Decimal digits in one digit of numeric's wire format */
#define DIGITS_A_GROUP 4

/* Names of members that are left out */
typedef struct Ignored
{
	const char *const *names;
	int			count;
} Ignored;

/* A member of an object */
typedef struct Member
{
	MacField	name;			/* in UTF-8 */
	const char *stored_name;	/* in the jsonb, name.data may point there */
	JsonbValue	value;
	const Ignored *ignored;		/* directly inside value */
	size_t		position;		/* among the members of the jsonb */
} Member;

static void encode_container(StringInfo buf, JsonbContainer *container,
							 const Ignored *ignored, bool top);
static void encode_array(StringInfo buf, JsonbContainer *array);
static void encode_object(StringInfo buf, JsonbContainer *object,
						  const Ignored *ignored, bool top);
static void encode_value(StringInfo buf, const JsonbValue *value,
						 const Ignored *ignored);
static void encode_member(StringInfo buf, const Member *member);
static void encode_number(StringInfo buf, Numeric number);
static bool is_name(const JsonbValue *string, const char *name);
static bool is_ignored(const JsonbValue *name, const Ignored *ignored);
static int	compare_members(const void *a, const void *b);
static void append_uint64(StringInfo buf, uint64 value);
static void append_bytes(StringInfo buf, const char *data, size_t len);

static const Ignored ignore_nothing = {NULL, 0};

/*
 * Compute the public id of a namespace: it says which one a fingerprint was
 * made with, and does not reveal it.
 *
 * Raises what mac_fields raises.
 */
void
namespace_id(const uint8 *ns, size_t nslen, uint8 id[NAMESPACE_ID_LEN])
{
	uint8		mac[MAC_LEN];

	mac_fields(ns, nslen, "namespace-id/1", NULL, 0, mac);
	memcpy(id, mac, NAMESPACE_ID_LEN);
}

/*
 * Compute the fingerprint of a request, a detoasted jsonb.
 *
 * Members with one of the "nignore" names (in the server's encoding) are
 * ignored if they are members of the request itself or of its member "params".
 *
 * Memory is allocated in CurrentMemoryContext and freed, unless an error is
 * raised: that of the encoding, which is less than three times as long as the
 * jsonb.
 *
 * Raises ERRCODE_PROGRAM_LIMIT_EXCEEDED if 1 GB is not enough,
 * ERRCODE_STATEMENT_TOO_COMPLEX for nesting deeper than the stack, and what
 * mac_text and mac_fields raise.
 */
void
fingerprint_compute(Jsonb *request, const char *const *ignore, int nignore,
					const uint8 *ns, size_t nslen,
					uint8 out[FINGERPRINT_LEN])
{
	Ignored		ignored;
	StringInfoData buf;
	MacField	field;

	ignored.names = ignore;
	ignored.count = nignore;

	initStringInfo(&buf);
	encode_container(&buf, &request->root, &ignored, true);

	field.data = buf.data;
	field.len = buf.len;

	out[0] = FINGERPRINT_VERSION;
	namespace_id(ns, nslen, out + 1);
	mac_fields(ns, nslen, "fingerprint/1", &field, 1,
			   out + 1 + NAMESPACE_ID_LEN);

	pfree(buf.data);
}

/*
 * Append the encoding of a container; "top" is true for the whole request.
 * "ignored" applies to the members of this object and to no deeper level,
 * except that it is passed on from the top to "params".
 */
static void
encode_container(StringInfo buf, JsonbContainer *container,
				 const Ignored *ignored, bool top)
{
	JsonbValue	scalar;

	check_stack_depth();

	/* a lone scalar is stored as an array with a flag */
	if (JsonContainerIsScalar(container))
	{
		if (!JsonbExtractScalar(container, &scalar))
			elog(ERROR, "invalid jsonb scalar");
		encode_value(buf, &scalar, &ignore_nothing);
	}
	else if (JsonContainerIsObject(container))
		encode_object(buf, container, ignored, top);
	else if (JsonContainerIsArray(container))
		encode_array(buf, container);
	else
		elog(ERROR, "unexpected jsonb container header 0x%08x",
			 container->header);
}

static void
encode_array(StringInfo buf, JsonbContainer *array)
{
	JsonbIterator *it = JsonbIteratorInit(array);
	JsonbValue	value;

	if (JsonbIteratorNext(&it, &value, true) != WJB_BEGIN_ARRAY)
		elog(ERROR, "unexpected jsonb token");

	appendStringInfoChar(buf, 'a');
	append_uint64(buf, value.val.array.nElems);

	/* the end of the container frees the iterator */
	while (JsonbIteratorNext(&it, &value, true) == WJB_ELEM)
		encode_value(buf, &value, &ignore_nothing);
}

static void
encode_object(StringInfo buf, JsonbContainer *object, const Ignored *ignored,
			  bool top)
{
	JsonbIterator *it = JsonbIteratorInit(object);
	JsonbValue	name;
	Member		member;
	Member	   *members = NULL;
	size_t		count = 0;
	int			count_at;
	uint64		big_endian;

	if (JsonbIteratorNext(&it, &name, true) != WJB_BEGIN_OBJECT)
		elog(ERROR, "unexpected jsonb token");

	/*
	 * jsonb keeps members in our order, but by their names in the server's
	 * encoding.  Where these are what we encode, each member can be written
	 * at once; otherwise all have to be seen before the first is.
	 */
	if (GetDatabaseEncoding() != PG_UTF8 &&
		GetDatabaseEncoding() != PG_SQL_ASCII)
		members = MemoryContextAllocHuge(CurrentMemoryContext,
										 (Size) Max(name.val.object.nPairs, 1) *
										 sizeof(Member));

	appendStringInfoChar(buf, 'o');
	count_at = buf->len;
	append_uint64(buf, 0);		/* filled in below */

	/* the end of the container frees the iterator */
	while (JsonbIteratorNext(&it, &name, true) == WJB_KEY)
	{
		if (JsonbIteratorNext(&it, &member.value, true) != WJB_VALUE)
			elog(ERROR, "unexpected jsonb token");
		if (is_ignored(&name, ignored))
			continue;

		member.stored_name = name.val.string.val;
		member.name = mac_text(name.val.string.val, name.val.string.len);
		member.ignored = (top && is_name(&name, "params")) ? ignored : &ignore_nothing;
		member.position = count++;

		if (members == NULL)
			encode_member(buf, &member);
		else
			members[member.position] = member;
	}

	if (members != NULL)
	{
		qsort(members, count, sizeof(Member), compare_members);
		for (size_t i = 0; i < count; i++)
			encode_member(buf, &members[i]);
		pfree(members);
	}

	big_endian = pg_hton64((uint64) count);
	memcpy(buf->data + count_at, &big_endian, sizeof(big_endian));
}

/*
 * Append a member's name and value, and free the name if it is a copy.
 */
static void
encode_member(StringInfo buf, const Member *member)
{
	append_bytes(buf, member->name.data, member->name.len);
	if (member->name.data != member->stored_name)
		pfree(unconstify(char *, member->name.data));
	encode_value(buf, &member->value, member->ignored);
}

/*
 * Append the encoding of a value inside the request; "ignored" applies to
 * its members if it is an object.
 */
static void
encode_value(StringInfo buf, const JsonbValue *value, const Ignored *ignored)
{
	MacField	utf8;

	CHECK_FOR_INTERRUPTS();

	switch (value->type)
	{
		case jbvNull:
			appendStringInfoChar(buf, 'n');
			break;

		case jbvBool:
			appendStringInfoChar(buf, value->val.boolean ? 't' : 'f');
			break;

		case jbvNumeric:
			encode_number(buf, value->val.numeric);
			break;

		case jbvString:
			utf8 = mac_text(value->val.string.val, value->val.string.len);
			appendStringInfoChar(buf, 's');
			append_bytes(buf, utf8.data, utf8.len);
			if (utf8.data != value->val.string.val)
				pfree(unconstify(char *, utf8.data));
			break;

		case jbvBinary:
			encode_container(buf, value->val.binary.data, ignored, false);
			break;

		default:
			elog(ERROR, "unexpected jsonb value type %d", (int) value->type);
	}
}

/*
 * Append the encoding of a number: its digits from the first to the last that
 * isn't 0, as an integer, and the power of ten to multiply that by.
 *
 * numeric's wire format has both without ever writing the zeros out: digits to
 * the base of 10,000, none of them 0 at either end, and the power of the first.
 */
static void
encode_number(StringInfo buf, Numeric number)
{
	StringInfoData wire;
	bytea	   *sent = DatumGetByteaPP(DirectFunctionCall1(numeric_send, NumericGetDatum(number)));
	int			ngroups;
	int			weight;
	bool		negative;
	char	   *text;
	char	   *digits;
	int			len;
	int			exponent;
	char		suffix[16];
	int			suffix_len;

	wire.data = VARDATA_ANY(sent);
	wire.len = wire.maxlen = VARSIZE_ANY_EXHDR(sent);
	wire.cursor = 0;
	ngroups = pq_getmsgint(&wire, 2);
	weight = (int16) pq_getmsgint(&wire, 2);
	negative = pq_getmsgint(&wire, 2) != 0;
	(void) pq_getmsgint(&wire, 2);	/* how many decimals to show */

	len = DIGITS_A_GROUP * ngroups;
	digits = text = palloc(len + 1);
	for (int i = 0; i < ngroups; i++)
	{
		int			group = pq_getmsgint(&wire, 2);

		for (int j = DIGITS_A_GROUP - 1; j >= 0; j--)
		{
			text[DIGITS_A_GROUP * i + j] = '0' + group % 10;
			group /= 10;
		}
	}
	exponent = DIGITS_A_GROUP * (weight + 1 - ngroups);

	while (len > 0 && digits[0] == '0')
	{
		digits++;
		len--;
	}
	while (len > 0 && digits[len - 1] == '0')
	{
		len--;
		exponent++;
	}
	if (len == 0)
	{
		digits = "0";
		len = 1;
		exponent = 0;
		negative = false;
	}

	suffix_len = snprintf(suffix, sizeof(suffix), "e%d", exponent);

	appendStringInfoChar(buf, 'd');
	append_uint64(buf, (uint64) (negative ? 1 : 0) + len + suffix_len);
	if (negative)
		appendStringInfoChar(buf, '-');
	appendBinaryStringInfo(buf, digits, len);
	appendBinaryStringInfo(buf, suffix, suffix_len);

	pfree(text);
	pfree(sent);
}

static bool
is_name(const JsonbValue *string, const char *name)
{
	size_t		len = string->val.string.len;

	return len == strlen(name) && memcmp(string->val.string.val, name, len) == 0;
}

static bool
is_ignored(const JsonbValue *name, const Ignored *ignored)
{
	for (int i = 0; i < ignored->count; i++)
	{
		if (is_name(name, ignored->names[i]))
			return true;
	}
	return false;
}

/*
 * qsort comparator for members: jsonb's own order, applied to UTF-8.
 */
static int
compare_members(const void *a, const void *b)
{
	const Member *left = (const Member *) a;
	const Member *right = (const Member *) b;
	int			cmp;

	if (left->name.len != right->name.len)
		return left->name.len < right->name.len ? -1 : 1;

	cmp = memcmp(left->name.data, right->name.data, left->name.len);
	if (cmp != 0)
		return cmp;

	/* some encodings have two ways to write one character */
	return left->position < right->position ? -1 : 1;
}

static void
append_uint64(StringInfo buf, uint64 value)
{
	uint64		big_endian = pg_hton64(value);

	appendBinaryStringInfo(buf, (const char *) &big_endian, sizeof(big_endian));
}

/*
 * Append bytes, their number first.
 */
static void
append_bytes(StringInfo buf, const char *data, size_t len)
{
	append_uint64(buf, (uint64) len);
	appendBinaryStringInfo(buf, data, (int) len);
}
