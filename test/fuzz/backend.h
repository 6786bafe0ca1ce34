/*-------------------------------------------------------------------------
 *
 * backend.h
 *	  Fuzz targets that need a server around them.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * test/fuzz/backend.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_FUZZ_BACKEND_H
#define IDEMPOTENCY_FUZZ_BACKEND_H

#include "fuzz.h"

/* In a memory context that is emptied afterwards.  May raise no error. */
extern int	fuzz_form(const uint8 *data, size_t size);
extern int	fuzz_fingerprint(const uint8 *data, size_t size);
extern int	fuzz_answer(const uint8 *data, size_t size);
extern int	fuzz_json_text(const uint8 *data, size_t size);

#endif							/* IDEMPOTENCY_FUZZ_BACKEND_H */
