/*-------------------------------------------------------------------------
 *
 * webhook_signature.c
 *	  The signature of a webhook of Stripe's.
 *
 * The header Stripe-Signature is a list of elements, scheme=value, separated by
 * commas:
 *
 *		t=1795300000,v1=82e1...fb05,v0=6ffb...9a39
 *
 * The MAC is HMAC-SHA256, keyed with the whole secret of the endpoint, over
 * the digits of t, a dot and the body's bytes.  There is one v1 for each
 * secret that is active, so any of them may match; other schemes are not
 * signatures (v0 is a fake one that comes with test events).
 *
 * Client libraries disagree about what is well-formed.  Here:
 *
 *	- white space is not allowed;
 *	- an element is empty, which is ignored, or scheme=value;
 *	- t is there once: 1 to 18 decimal digits, no sign, no leading zero, so
 *	  that the number that is compared is the text that was signed;
 *	- a v1 that is not 64 lower-case hexadecimal digits matches nothing, and is
 *	  no error;
 *	- the length of the header and the number of v1s are limited.
 *
 * An attacker can choose the header, so it is parsed without allocating
 * anything, and the time to compare MACs does not depend on where they differ.
 * The age is checked last: a header that is reported as too old is known to be
 * Stripe's.  Nothing in this file knows about SQL; test/fuzz tries it with
 * arbitrary bytes.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/stripe/webhook_signature.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/mac.h"
#include "stripe/webhook_signature.h"

#define USECS_PER_SECOND INT64CONST(1000000)

static bool
is_digit(char c)
{
	return c >= '0' && c <= '9';
}

static bool
is_scheme_char(char c)
{
	return is_digit(c) || c == '_' || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

/* Take the value of a "t".  Returns false if it is malformed. */
static bool
parse_time(const char *value, size_t len, WebhookHeader *parsed)
{
	size_t		i;

	if (len < 1 || len > WEBHOOK_TIME_MAX_DIGITS || (value[0] == '0' && len > 1))
		return false;

	parsed->time = 0;
	for (i = 0; i < len; i++)
	{
		if (!is_digit(value[i]))
			return false;
		parsed->time = parsed->time * 10 + (value[i] - '0');
	}
	parsed->time_text = value;
	parsed->time_len = (int) len;
	return true;
}

static bool
is_signature(const char *value, size_t len)
{
	size_t		i;

	if (len != WEBHOOK_SIGNATURE_LEN)
		return false;
	for (i = 0; i < len; i++)
	{
		if (!is_digit(value[i]) && !(value[i] >= 'a' && value[i] <= 'f'))
			return false;
	}
	return true;
}

/*
 * Parse a header.  Returns WEBHOOK_VALID, WEBHOOK_NO_SIGNATURE or
 * WEBHOOK_MALFORMED_HEADER; *parsed is complete only if it is valid.
 */
WebhookVerdict
webhook_parse_header(const char *header, size_t len, WebhookHeader *parsed)
{
	const char *end;
	const char *p;
	int			nv1 = 0;

	memset(parsed, 0, sizeof(*parsed));

	if (header == NULL || len == 0)
		return WEBHOOK_NO_SIGNATURE;
	if (len > WEBHOOK_HEADER_MAX)
		return WEBHOOK_MALFORMED_HEADER;

	end = header + len;
	for (p = header; p < end; p++)
	{
		const char *scheme = p;
		const char *value;
		size_t		scheme_len;

		while (p < end && is_scheme_char(*p))
			p++;
		scheme_len = p - scheme;
		if (p == end || *p == ',')
		{
			if (scheme_len > 0)
				return WEBHOOK_MALFORMED_HEADER;
			continue;			/* an empty element */
		}
		if (*p != '=' || scheme_len == 0)
			return WEBHOOK_MALFORMED_HEADER;

		value = ++p;
		while (p < end && *p != ',')
		{
			if (*p <= ' ' || *p > '~')
				return WEBHOOK_MALFORMED_HEADER;
			p++;
		}

		if (scheme_len == 1 && scheme[0] == 't')
		{
			if (parsed->time_text != NULL || !parse_time(value, p - value, parsed))
				return WEBHOOK_MALFORMED_HEADER;
		}
		else if (scheme_len == 2 && scheme[0] == 'v' && scheme[1] == '1')
		{
			if (++nv1 > WEBHOOK_SIGNATURES_MAX)
				return WEBHOOK_MALFORMED_HEADER;
			if (is_signature(value, p - value))
				parsed->signatures[parsed->nsignatures++] = value;
		}
	}

	if (parsed->time_text == NULL)
		return WEBHOOK_MALFORMED_HEADER;
	return nv1 > 0 ? WEBHOOK_VALID : WEBHOOK_NO_SIGNATURE;
}

static void
mac_hex(const uint8 mac[MAC_LEN], char hex[WEBHOOK_SIGNATURE_LEN])
{
	static const char digits[] = "0123456789abcdef";
	int			i;

	for (i = 0; i < MAC_LEN; i++)
	{
		hex[2 * i] = digits[mac[i] >> 4];
		hex[2 * i + 1] = digits[mac[i] & 0xf];
	}
}

/* Compare in constant time. */
static bool
same_signature(const char *a, const char *b)
{
	volatile unsigned char difference = 0;
	int			i;

	for (i = 0; i < WEBHOOK_SIGNATURE_LEN; i++)
		difference |= (unsigned char) (a[i] ^ b[i]);
	return difference == 0;
}

/*
 * Is this body signed with one of the secrets, and not too long ago?
 *
 * "now" is in seconds since 1970.  An age of exactly the tolerance is valid,
 * and so is a time in the future, however far: Stripe's clock and ours need
 * not agree, and a signature from the future is still a signature.
 *
 * Raises what mac_concatenated() raises.
 */
WebhookVerdict
webhook_verify(const char *payload, size_t payloadlen,
			   const char *header, size_t headerlen,
			   const WebhookSecret *secrets, int nsecrets,
			   int64 now, int64 tolerance_usecs)
{
	WebhookHeader parsed;
	WebhookVerdict verdict = webhook_parse_header(header, headerlen, &parsed);
	MacField	signed_text[3];
	bool		matches = false;
	int			i;

	if (verdict != WEBHOOK_VALID)
		return verdict;
	if (nsecrets == 0)
		return WEBHOOK_NO_SECRET;
	if (parsed.nsignatures == 0)
		return WEBHOOK_NO_MATCHING_SIGNATURE;

	signed_text[0].data = parsed.time_text;
	signed_text[0].len = parsed.time_len;
	signed_text[1].data = ".";
	signed_text[1].len = 1;
	signed_text[2].data = payload;
	signed_text[2].len = payloadlen;

	for (i = 0; i < nsecrets && !matches; i++)
	{
		uint8		mac[MAC_LEN];
		char		hex[WEBHOOK_SIGNATURE_LEN];
		int			j;

		mac_concatenated((const uint8 *) secrets[i].data, secrets[i].len,
						 signed_text, 3, mac);
		mac_hex(mac, hex);
		for (j = 0; j < parsed.nsignatures; j++)
			matches |= same_signature(parsed.signatures[j], hex);
	}
	if (!matches)
		return WEBHOOK_NO_MATCHING_SIGNATURE;

	/* t has 18 digits at most, so that neither side overflows */
	if (now > parsed.time &&
		(now - parsed.time > tolerance_usecs / USECS_PER_SECOND))
		return WEBHOOK_TOO_OLD;

	return WEBHOOK_VALID;
}

/* The word for a verdict that stripe_webhook_verify() returns. */
const char *
webhook_verdict_word(WebhookVerdict verdict)
{
	switch (verdict)
	{
		case WEBHOOK_VALID:
			return "valid";
		case WEBHOOK_NO_SIGNATURE:
			return "no_signature";
		case WEBHOOK_MALFORMED_HEADER:
			return "malformed_header";
		case WEBHOOK_NO_MATCHING_SIGNATURE:
			return "no_matching_signature";
		case WEBHOOK_TOO_OLD:
			return "too_old";
		case WEBHOOK_NO_SECRET:
			return "no_secret";
	}

	return "malformed_header";	/* keep compiler quiet */
}
