/*-------------------------------------------------------------------------
 *
 * fuzz.h
 *	  What fuzz targets have in common.
 *
 * A target looks at an input, and aborts by CHECK() where something is wrong.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * test/fuzz/fuzz.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_FUZZ_H
#define IDEMPOTENCY_FUZZ_H

#include "postgres.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>

/* the server's postgres.h has these for a server */
#undef printf
#undef fprintf
#undef sprintf
#undef snprintf

#define CHECK(condition) \
	do { \
		if (!(condition)) \
		{ \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
			abort(); \
		} \
	} while (0)

typedef int (*FuzzTarget) (const uint8 *data, size_t size);

/* What a mutator without knowledge of the program may well insert; ends with NULL. */
extern const char *const fuzz_tokens[];

extern void fuzz_at_random(FuzzTarget target, int seconds, const char *directory, uint64 seed);

#endif							/* IDEMPOTENCY_FUZZ_H */
