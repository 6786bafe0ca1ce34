/*-------------------------------------------------------------------------
 *
 * slow_clock.c
 *	  A wall clock that goes a thousand times slower, from when it is loaded.
 *
 * To be loaded by LD_PRELOAD into a server whose instructions are counted.
 * Such a server runs some fifty times slower, and a statement that takes
 * longer than 10 ms is taken to have waited for somebody: what it wrote is
 * renewed by a second statement, which must not be counted.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * test/bench/slow_clock.c
 *
 *-------------------------------------------------------------------------
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <sys/time.h>
#include <time.h>

#define NSECS_PER_SEC INT64_C(1000000000)
#define SLOWNESS 1000

static int	(*real_clock_gettime) (clockid_t, struct timespec *);
static int64_t started;

static int64_t
real_now(void)
{
	struct timespec ts;

	real_clock_gettime(CLOCK_REALTIME, &ts);
	return ts.tv_sec * NSECS_PER_SEC + ts.tv_nsec;
}

__attribute__((constructor)) static void
start(void)
{
	*(void **) &real_clock_gettime = dlsym(RTLD_NEXT, "clock_gettime");
	started = real_now();
}

int
clock_gettime(clockid_t clock, struct timespec *now)
{
	int64_t		slow;

	if (clock != CLOCK_REALTIME && clock != CLOCK_REALTIME_COARSE)
		return real_clock_gettime(clock, now);
	slow = started + (real_now() - started) / SLOWNESS;
	now->tv_sec = slow / NSECS_PER_SEC;
	now->tv_nsec = slow % NSECS_PER_SEC;
	return 0;
}

int
gettimeofday(struct timeval *restrict now, void *restrict zone)
{
	struct timespec ts;

	(void) zone;
	clock_gettime(CLOCK_REALTIME, &ts);
	now->tv_sec = ts.tv_sec;
	now->tv_usec = ts.tv_nsec / 1000;
	return 0;
}
