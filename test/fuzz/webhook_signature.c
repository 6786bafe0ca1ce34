/*-------------------------------------------------------------------------
 *
 * webhook_signature.c
 *	  Fuzz target: the header of a webhook's signature.
 *
 * An input is a header, and after a zero byte, if there is one, a body.  The
 * header is parsed by src/stripe/webhook_signature.c and by a second, plain
 * parser here, and both must agree; then the body is verified against the
 * header, and against headers in which the input is only a part.  The MAC is a
 * stand-in, cheap and linear, so that the fuzzer can't spend its time on
 * SHA-256.
 *
 * Built by test/fuzz/run, with libFuzzer, or with mutator.c.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * test/fuzz/webhook_signature.c
 *
 *-------------------------------------------------------------------------
 */
#include "fuzz.h"

#include "base/mac.h"
#include "stripe/webhook_signature.h"

int			LLVMFuzzerTestOneInput(const uint8 *data, size_t size);

const char *const fuzz_tokens[] = {
	",", "=", "t=", ",t=", "v1=", ",v1=", ",v0=", "v2=", "1795300000", "0", "-1", " ", "\t", "=,",
	",v1=0000000000000000000000000000000000000000000000000000000000000000",
	"999999999999999999", "9999999999999999999", "t=1,", "\n", "\"", ";", "a", "g", "F", NULL
};

/* Stands in for HMAC-SHA256. */
void
mac_concatenated(const uint8 *key, size_t keylen,
				 const MacField *parts, int nparts, uint8 out[MAC_LEN])
{
	uint32		state = 2166136261u;
	int			i;

	CHECK(keylen > 0);
	for (size_t k = 0; k < keylen; k++)
		state = (state ^ key[k]) * 16777619u;
	for (i = 0; i < nparts; i++)
	{
		for (size_t k = 0; k < parts[i].len; k++)
			state = (state ^ (uint8) parts[i].data[k]) * 16777619u;
	}
	for (i = 0; i < MAC_LEN; i++)
	{
		state = (state ^ i) * 16777619u;
		out[i] = state >> 24;
	}
}

static void
hex_of_mac(const char *secret, const char *t, size_t tlen, const char *body, size_t bodylen,
		   char hex[2 * MAC_LEN + 1])
{
	MacField	parts[3] = {{t, tlen}, {".", 1}, {body, bodylen}};
	uint8		mac[MAC_LEN];

	mac_concatenated((const uint8 *) secret, strlen(secret), parts, 3, mac);
	for (int i = 0; i < MAC_LEN; i++)
	{
		hex[2 * i] = "0123456789abcdef"[mac[i] / 16];
		hex[2 * i + 1] = "0123456789abcdef"[mac[i] % 16];
	}
	hex[2 * MAC_LEN] = '\0';
}

/* The second parser: copies each element and looks at it with the C library. */
typedef struct Plain
{
	WebhookVerdict verdict;
	char		t[32];
	long long	time;
	int			n;
	char		v1[WEBHOOK_SIGNATURES_MAX][2 * MAC_LEN + 1];
} Plain;

static void
parse_plainly(const char *header, size_t len, Plain *plain)
{
	char	   *copy = malloc(len + 1);
	char	   *rest = copy;
	char	   *element;
	int			nt = 0;
	int			nv1 = 0;
	bool		malformed = len > WEBHOOK_HEADER_MAX;

	memset(plain, 0, sizeof(*plain));
	memcpy(copy, header, len);
	copy[len] = '\0';

	while ((element = strsep(&rest, ",")) != NULL)
	{
		char	   *value = strchr(element, '=');

		if (element[0] == '\0')
			continue;
		if (value == NULL || value == element)
		{
			malformed = true;
			continue;
		}
		*value++ = '\0';
		if (strspn(element, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_") != strlen(element))
			malformed = true;
		for (char *p = value; *p != '\0'; p++)
		{
			if ((unsigned char) *p <= 32 || (unsigned char) *p >= 127)
				malformed = true;
		}
		if (strcmp(element, "t") == 0)
		{
			if (nt++ > 0 || strspn(value, "0123456789") != strlen(value) ||
				strlen(value) < 1 || strlen(value) > 18 || (value[0] == '0' && value[1] != '\0'))
				malformed = true;
			else
			{
				strcpy(plain->t, value);
				plain->time = strtoll(value, NULL, 10);
			}
		}
		else if (strcmp(element, "v1") == 0)
		{
			if (++nv1 > WEBHOOK_SIGNATURES_MAX)
				malformed = true;
			else if (strspn(value, "0123456789abcdef") == 64 && value[64] == '\0')
				strcpy(plain->v1[plain->n++], value);
		}
	}
	free(copy);

	if (len == 0)
		plain->verdict = WEBHOOK_NO_SIGNATURE;
	else if (malformed || nt == 0)
		plain->verdict = WEBHOOK_MALFORMED_HEADER;
	else
		plain->verdict = nv1 > 0 ? WEBHOOK_VALID : WEBHOOK_NO_SIGNATURE;
}

/* Verify and compare with what the plain parser expects. */
static WebhookVerdict
verify(const char *header, size_t len, const char *body, size_t bodylen, const char *secret)
{
	WebhookSecret secrets[2] = {{"whsec_another", 13}, {secret, strlen(secret)}};
	WebhookVerdict verdict = webhook_verify(body, bodylen, header, len, secrets, 2,
											INT64CONST(1795300000), INT64CONST(300000000));
	WebhookVerdict expected;
	Plain		plain;

	parse_plainly(header, len, &plain);
	expected = plain.verdict;
	if (expected == WEBHOOK_VALID)
	{
		char		hex[2][2 * MAC_LEN + 1];

		for (int s = 0; s < 2; s++)
			hex_of_mac(secrets[s].data, plain.t, strlen(plain.t), body, bodylen, hex[s]);
		expected = WEBHOOK_NO_MATCHING_SIGNATURE;
		for (int i = 0; i < plain.n; i++)
		{
			if (strcmp(plain.v1[i], hex[0]) == 0 || strcmp(plain.v1[i], hex[1]) == 0)
				expected = 1795300000LL - plain.time > 300 ? WEBHOOK_TOO_OLD : WEBHOOK_VALID;
		}
	}
	CHECK(verdict == expected);
	CHECK(webhook_verify(body, bodylen, header, len, NULL, 0, 0, 1) ==
		  (plain.verdict == WEBHOOK_VALID ? WEBHOOK_NO_SECRET : plain.verdict));
	CHECK(strlen(webhook_verdict_word(verdict)) > 0);
	return verdict;
}

int
LLVMFuzzerTestOneInput(const uint8 *data, size_t size)
{
	const char *zero = memchr(data, 0, size);
	size_t		len = zero != NULL ? (size_t) (zero - (const char *) data) : size;
	const char *body = zero != NULL ? zero + 1 : "";
	size_t		bodylen = zero != NULL ? size - len - 1 : 0;
	char	   *header = malloc(Max(len, 1));	/* so that a sanitizer sees
												 * its end */
	char	   *longer = malloc(len + 256);
	char		hex[2 * MAC_LEN + 1];
	WebhookHeader parsed;
	WebhookVerdict verdict;
	Plain		plain;
	int			n;

	memcpy(header, data, len);
	verdict = webhook_parse_header(header, len, &parsed);
	parse_plainly(header, len, &plain);
	CHECK(verdict == plain.verdict);
	if (verdict == WEBHOOK_VALID)
	{
		CHECK(parsed.time == plain.time);
		CHECK(parsed.time_text >= header && parsed.time_text + parsed.time_len <= header + len);
		CHECK(parsed.time_len == (int) strlen(plain.t) &&
			  memcmp(parsed.time_text, plain.t, parsed.time_len) == 0);
		CHECK(parsed.nsignatures == plain.n);
		for (int i = 0; i < plain.n; i++)
			CHECK(parsed.signatures[i] >= header &&
				  parsed.signatures[i] + WEBHOOK_SIGNATURE_LEN <= header + len &&
				  memcmp(parsed.signatures[i], plain.v1[i], WEBHOOK_SIGNATURE_LEN) == 0);
	}
	verify(header, len, body, bodylen, "whsec_test");

	/* signed, with the input as further elements before or after */
	hex_of_mac("whsec_test", "1795299700", 10, body, bodylen, hex);
	n = sprintf(longer, "t=1795299700,v1=%s,", hex);
	CHECK(verify(longer, n, body, bodylen, "whsec_test") == WEBHOOK_VALID);
	memcpy(longer + n, header, len);
	verify(longer, n + len, body, bodylen, "whsec_test");
	memcpy(longer, header, len);
	n = sprintf(longer + len, ",v1=%s,t=1795299699", hex);
	verify(longer, len + n, body, bodylen, "whsec_test");

	/* and with the header's own time, where it has one */
	if (plain.t[0] != '\0' && plain.verdict != WEBHOOK_MALFORMED_HEADER)
	{
		hex_of_mac("whsec_test", plain.t, strlen(plain.t), body, bodylen, hex);
		memcpy(longer, header, len);
		n = sprintf(longer + len, ",v1=%s", hex);
		verify(longer, len + n, body, bodylen, "whsec_test");
	}

	free(longer);
	free(header);
	return 0;
}
