/*-------------------------------------------------------------------------
 *
 * debug_point.h
 *	  Named places where a test can hold, fail or kill a process.
 *
 * Compiled in with -DIDEMPOTENCY_DEBUG_POINTS only; otherwise nothing is left
 * of them.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/debug_point.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_DEBUG_POINT_H
#define IDEMPOTENCY_DEBUG_POINT_H

#ifdef IDEMPOTENCY_DEBUG_POINTS
extern PGDLLEXPORT void debug_point(const char *name);
#define DEBUG_POINT(name) debug_point(name)
#else
#define DEBUG_POINT(name) ((void) 0)
#endif

#endif							/* IDEMPOTENCY_DEBUG_POINT_H */
