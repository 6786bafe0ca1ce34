/*-------------------------------------------------------------------------
 *
 * json_text.c
 *	  Turning JSON that others have written into jsonb.
 *
 * Stripe writes JSON, and jsonb can hold most of it.  What it cannot hold is no
 * reason to refuse an event, which Stripe would deliver for three days and then
 * forget, nor to lose the answer to a charge.  So whatever is JSON (RFC 8259,
 * in UTF-8) is written anew in a form that jsonb_in() accepts:
 *
 *	- an escaped zero byte and half a surrogate pair become U+FFFD;
 *	- a number that numeric cannot hold becomes a string;
 *	- what is nested deeper than JSON_DEPTH_MAX becomes null, so that nobody
 *	  who reads it runs out of stack;
 *	- a character that the database's encoding lacks becomes a question mark.
 *
 * Everything else keeps its meaning.  We have a parser of our own because
 * PostgreSQL's recurses, and decides about escapes by the database's encoding.
 * It allocates nothing but its result, and raises nothing but "out of memory";
 * test/fuzz tries it with arbitrary bytes.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/json_text.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/namespace.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "utils/builtins.h"

#include "base/compat.h"
#include "base/json_text.h"

/*
 * Limits of numeric: digits before the decimal point, digits after it, and the
 * exponent, even that of a zero.
 */
#define DIGITS_BEFORE_MAX 131072
#define DIGITS_AFTER_MAX 16383
#define EXPONENT_MAX INT64CONST(1073741823)

#define REPLACEMENT 0xFFFD

/* jsonb has no room for a longer text; see JENTRY_OFFLENMASK. */
#define BODY_MAX ((size_t) 0x0FFFFFFF)

/* How much is converted to the database's encoding at a time. */
#define PIECE_MAX (64 * 1024)
#define PIECE_MIN 64

typedef struct Reader
{
	const char *p;
	const char *end;
	StringInfo	out;			/* NULL while something is left out */
} Reader;

static void
put(Reader *r, const char *data, size_t len)
{
	if (r->out != NULL)
		appendBinaryStringInfo(r->out, data, (int) len);
}

static bool
at(const Reader *r, char c)
{
	return r->p < r->end && *r->p == c;
}

static bool
at_digit(const Reader *r)
{
	return r->p < r->end && *r->p >= '0' && *r->p <= '9';
}

static void
skip_space(Reader *r)
{
	while (r->p < r->end && (*r->p == ' ' || *r->p == '\t' || *r->p == '\n' || *r->p == '\r'))
		r->p++;
}

/* ---------- strings ---------- */

static void
put_character(Reader *r, uint32 c)
{
	unsigned char utf8[MAX_MULTIBYTE_CHAR_LEN + 1];

	unicode_to_utf8(c, utf8);
	put(r, (const char *) utf8, pg_encoding_mblen(PG_UTF8, (const char *) utf8));
}

/* Take four hexadecimal digits. */
static bool
take_hex(Reader *r, uint32 *value)
{
	int			i;

	*value = 0;
	if (r->end - r->p < 4)
		return false;
	for (i = 0; i < 4; i++, r->p++)
	{
		char		c = *r->p;

		if (c >= '0' && c <= '9')
			*value = *value * 16 + (c - '0');
		else if (c >= 'a' && c <= 'f')
			*value = *value * 16 + (c - 'a' + 10);
		else if (c >= 'A' && c <= 'F')
			*value = *value * 16 + (c - 'A' + 10);
		else
			return false;
	}
	return true;
}

/* Take the digits of a \u, and of the other half if this is one of a pair. */
static bool
take_unicode(Reader *r)
{
	const char *digits = r->p;
	uint32		c;
	uint32		low;

	if (!take_hex(r, &c))
		return false;
	if (c > 0 && c < 0x80)
	{
		/* control characters and quotes stay escaped */
		put(r, "\\u", 2);
		put(r, digits, 4);
		return true;
	}
	if (c >= 0xD800 && c < 0xDC00 && r->end - r->p >= 2 && r->p[0] == '\\' && r->p[1] == 'u')
	{
		const char *second = r->p;

		r->p += 2;
		if (!take_hex(r, &low))
			return false;
		if (low >= 0xDC00 && low < 0xE000)
		{
			put_character(r, 0x10000 + ((c - 0xD800) << 10) + (low - 0xDC00));
			return true;
		}
		r->p = second;			/* it is read by itself */
	}
	put_character(r, c == 0 || (c >= 0xD800 && c < 0xE000) ? REPLACEMENT : c);
	return true;
}

/* Take a string, from its first quote to its last. */
static bool
take_string(Reader *r)
{
	const char *from = r->p++;

	for (;;)
	{
		if (r->p >= r->end || (unsigned char) *r->p < ' ')
			return false;
		if (*r->p == '"')
			break;
		if (*r->p != '\\')
			r->p++;
		else if (r->end - r->p >= 2 && r->p[1] == 'u')
		{
			put(r, from, r->p - from);
			r->p += 2;
			if (!take_unicode(r))
				return false;
			from = r->p;
		}
		else if (r->end - r->p >= 2 && r->p[1] != '\0' && strchr("\"\\/bfnrt", r->p[1]) != NULL)
			r->p += 2;
		else
			return false;
	}
	r->p++;
	put(r, from, r->p - from);
	return true;
}

/* ---------- numbers and words ---------- */

/* The digits of a number, and how many of them are zeros in front. */
typedef struct Digits
{
	int64		n;
	int64		zeros;
} Digits;

static bool
take_digits(Reader *r, Digits *digits)
{
	const char *from = r->p;

	for (; at_digit(r); r->p++)
	{
		if (*r->p == '0' && digits->zeros == digits->n)
			digits->zeros++;
		digits->n++;
	}
	return r->p > from;
}

/* Take an exponent, which may have any number of digits. */
static bool
take_exponent(Reader *r, int64 *exponent)
{
	bool		negative = at(r, '-');

	if (negative || at(r, '+'))
		r->p++;
	if (!at_digit(r))
		return false;
	for (; at_digit(r); r->p++)
		*exponent = Min(*exponent * 10 + (*r->p - '0'), EXPONENT_MAX);
	if (negative)
		*exponent = -*exponent;
	return true;
}

static bool
take_number(Reader *r)
{
	const char *from = r->p;
	Digits		digits = {0, 0};
	int64		before;
	int64		exponent = 0;
	bool		fits;

	if (at(r, '-'))
		r->p++;
	if (at(r, '0'))
	{
		r->p++;
		digits.n = digits.zeros = 1;
	}
	else if (!take_digits(r, &digits))
		return false;
	before = digits.n;
	if (at(r, '.'))
	{
		r->p++;
		if (!take_digits(r, &digits))
			return false;
	}
	if (at(r, 'e') || at(r, 'E'))
	{
		r->p++;
		if (!take_exponent(r, &exponent))
			return false;
	}

	/* a zero has no digits before the point, whatever its exponent */
	fits = digits.n - before - exponent <= DIGITS_AFTER_MAX &&
		(digits.zeros == digits.n ? exponent < EXPONENT_MAX :
		 before - digits.zeros + exponent <= DIGITS_BEFORE_MAX);
	if (!fits)
		put(r, "\"", 1);
	put(r, from, r->p - from);
	if (!fits)
		put(r, "\"", 1);
	return true;
}

static bool
take_word(Reader *r, const char *word)
{
	size_t		len = strlen(word);

	if ((size_t) (r->end - r->p) < len || memcmp(r->p, word, len) != 0)
		return false;
	r->p += len;
	put(r, word, len);
	return true;
}

static bool
take_scalar(Reader *r)
{
	if (r->p >= r->end)
		return false;
	switch (*r->p)
	{
		case '"':
			return take_string(r);
		case 't':
			return take_word(r, "true");
		case 'f':
			return take_word(r, "false");
		case 'n':
			return take_word(r, "null");
		default:
			return take_number(r);
	}
}

/* ---------- the whole ---------- */

/* Take the name of a member and its colon. */
static bool
take_name(Reader *r)
{
	skip_space(r);
	if (!at(r, '"') || !take_string(r))
		return false;
	skip_space(r);
	if (!at(r, ':'))
		return false;
	put(r, r->p++, 1);
	return true;
}

/*
 * Take a value and the white space around it.  A string of closing brackets
 * says which containers are open, so that nothing recurses.
 */
static bool
take_value(Reader *r, StringInfo open)
{
	StringInfo	out = r->out;

	for (;;)
	{
		bool		empty = false;

		/* a value, or the beginning of one */
		skip_space(r);
		if (at(r, '[') || at(r, '{'))
		{
			if (open->len == JSON_DEPTH_MAX)
			{
				put(r, "null", 4);
				r->out = NULL;
			}
			appendStringInfoChar(open, *r->p == '[' ? ']' : '}');
			put(r, r->p++, 1);
			skip_space(r);
			empty = at(r, open->data[open->len - 1]);
			if (!empty)
			{
				if (open->data[open->len - 1] == '}' && !take_name(r))
					return false;
				continue;
			}
		}
		else if (!take_scalar(r))
			return false;

		/* what follows it: the end of containers, the next element, or the end */
		for (;;)
		{
			skip_space(r);
			if (open->len == 0)
				return true;
			if (!at(r, open->data[open->len - 1]))
				break;
			put(r, r->p++, 1);
			open->data[--open->len] = '\0';
			if (open->len == JSON_DEPTH_MAX)
				r->out = out;
		}
		if (!at(r, ','))
			return false;
		put(r, r->p++, 1);
		if (open->data[open->len - 1] == '}' && !take_name(r))
			return false;
	}
}

/*
 * Turn JSON in UTF-8 into a string that jsonb_in() accepts in a UTF-8 database.
 * Returns NULL if it is not JSON.
 */
char *
json_text_for_jsonb(const char *body, size_t len)
{
	StringInfoData out;
	StringInfoData open;
	Reader		r;
	bool		good;

	/* this refuses zero bytes, too */
	if (len > BODY_MAX || pg_encoding_verifymbstr(PG_UTF8, body, (int) len) != (int) len)
		return NULL;

	initStringInfo(&out);
	initStringInfo(&open);
	r.p = body;
	r.end = body + len;
	r.out = &out;
	good = take_value(&r, &open) && r.p == r.end;
	pfree(open.data);
	if (good)
		return out.data;
	pfree(out.data);
	return NULL;
}

/*
 * Convert a string from UTF-8 to the database's encoding, with a question mark
 * for each character that this lacks.
 */
static char *
to_server(char *text)
{
	int			encoding = GetDatabaseEncoding();
	unsigned char *src = (unsigned char *) text;
	int			left = strlen(text);
	unsigned char *buffer;
	int			size;
	int			piece = PIECE_MAX;
	StringInfoData out;
	Oid			proc;

	if (encoding == PG_UTF8 || encoding == PG_SQL_ASCII)
		return text;

	initStringInfo(&out);
	proc = FindDefaultConversionProc(PG_UTF8, encoding);
	size = Min(left, PIECE_MAX) * MAX_CONVERSION_GROWTH + 1;
	buffer = palloc(size);
	while (left > 0)
	{
		int			done = 0;

		CHECK_FOR_INTERRUPTS();
		/* no more at a time than there is room for in any encoding */
		if (OidIsValid(proc))
			done = pg_do_encoding_conversion_buf(proc, PG_UTF8, encoding, src,
												 pg_encoding_mbcliplen(PG_UTF8, (char *) src, left, piece),
												 buffer, size, true);
		if (done > 0)
		{
			appendStringInfoString(&out, (char *) buffer);
			piece = Min(piece * 2, PIECE_MAX);
		}
		else
		{
			/* the converter has looked at all of it first, and the next may be near */
			piece = PIECE_MIN;
			done = pg_encoding_mblen(PG_UTF8, (const char *) src);
			appendStringInfoChar(&out, done == 1 ? (char) *src : '?');
		}
		src += done;
		left -= done;
	}
	pfree(buffer);
	return out.data;
}

/*
 * Turn JSON in UTF-8 into a jsonb.  Returns NULL if it is not JSON.
 */
Jsonb *
json_read(const char *body, size_t len)
{
	char	   *text = json_text_for_jsonb(body, len);

	if (text == NULL)
		return NULL;
	return DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(to_server(text))));
}
