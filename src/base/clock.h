/*-------------------------------------------------------------------------
 *
 * clock.h
 *	  How long ago is that?
 *
 * The wall clock may be set back while somebody waits.  A process measures its
 * own waits by the other clock, which only goes forward.  Processes among each
 * other know the wall clock's moments only: so they say when a wait has begun, and
 * not when it ends, which may be years away then.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/clock.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_CLOCK_H
#define IDEMPOTENCY_CLOCK_H

#include "datatype/timestamp.h"
#include "portability/instr_time.h"

/* Is "since" so many microseconds ago, or in the future, as the clock was set? */
static inline bool
is_over(TimestampTz since, int64 usecs, TimestampTz now)
{
	return now - since >= usecs || since > now;
}

static inline double
milliseconds_since(instr_time then)
{
	instr_time	now;

	INSTR_TIME_SET_CURRENT(now);
	INSTR_TIME_SUBTRACT(now, then);
	return INSTR_TIME_GET_MILLISEC(now);
}

#endif							/* IDEMPOTENCY_CLOCK_H */
