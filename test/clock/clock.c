/*-------------------------------------------------------------------------
 *
 * clock.c
 *	  A wall clock that a test can set.
 *
 * To be loaded into a server by LD_PRELOAD.  All its processes see the time
 * moved by the number of seconds in the file $CLOCK_FILE, eight bytes that are
 * mapped: a change takes effect at once, also in running processes.  Monotonic
 * clocks, and so all waits, are not changed.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * test/clock/clock.c
 *
 *-------------------------------------------------------------------------
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile const int64_t *offset;

static int	(*real_clock_gettime) (clockid_t, struct timespec *);

__attribute__((constructor)) static void
start(void)
{
	const char *name = getenv("CLOCK_FILE");
	int			fd = name != NULL ? open(name, O_RDONLY) : -1;
	void	   *map = MAP_FAILED;

	*(void **) &real_clock_gettime = dlsym(RTLD_NEXT, "clock_gettime");
	if (fd >= 0)
	{
		map = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, fd, 0);
		close(fd);
	}
	if (map != MAP_FAILED)
		offset = map;
}

int
clock_gettime(clockid_t clock, struct timespec *now)
{
	int			result = real_clock_gettime(clock, now);

	if (result == 0 && offset != NULL &&
		(clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
		now->tv_sec += *offset;
	return result;
}

int
gettimeofday(struct timeval *restrict now, void *restrict zone)
{
	struct timespec ts;
	int			result = clock_gettime(CLOCK_REALTIME, &ts);

	(void) zone;
	now->tv_sec = ts.tv_sec;
	now->tv_usec = ts.tv_nsec / 1000;
	return result;
}

time_t
time(time_t *now)
{
	struct timespec ts;

	clock_gettime(CLOCK_REALTIME, &ts);
	if (now != NULL)
		*now = ts.tv_sec;
	return ts.tv_sec;
}
