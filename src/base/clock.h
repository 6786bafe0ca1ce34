/*-------------------------------------------------------------------------
 *
 * clock.h
 *	  Elapsed time, and Unix time.
 *
 * The wall clock may be set back while somebody waits.  A process measures its
 * own waits by the monotonic clock.  Processes can only tell each other moments
 * of the wall clock: so they say when a wait has begun, and not when it ends,
 * which may be years away once the clock was set.
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

/*
 * Are "usecs" microseconds over since a moment?  A moment in the future counts
 * as long ago: the clock was set back.
 */
static inline bool
is_over(TimestampTz since, int64 usecs, TimestampTz now)
{
	return now - since >= usecs || since > now;
}

/* Milliseconds by the monotonic clock. */
static inline double
milliseconds_since(instr_time then)
{
	instr_time	now;

	INSTR_TIME_SET_CURRENT(now);
	INSTR_TIME_SUBTRACT(now, then);
	return INSTR_TIME_GET_MILLISEC(now);
}

#define UNIX_EPOCH_SECS \
	(((int64) POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE) * SECS_PER_DAY)

/* A moment as seconds since 1970. */
static inline int64
unix_seconds(TimestampTz moment)
{
	return moment / USECS_PER_SEC + UNIX_EPOCH_SECS;
}

/* The moment of so many seconds since 1970. */
static inline TimestampTz
timestamp_of_unix(int64 seconds)
{
	return (seconds - UNIX_EPOCH_SECS) * USECS_PER_SEC;
}

#endif							/* IDEMPOTENCY_CLOCK_H */
