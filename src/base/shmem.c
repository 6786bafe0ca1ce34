/*-------------------------------------------------------------------------
 *
 * shmem.c
 *	  Shared memory of the background processes.
 *
 * It exists only if the library is preloaded; everything that needs it asks
 * shmem_is_there() first and says what it cannot do without.
 *
 * Each part belongs to one file; _PG_init() has the list of them.  The parts are
 * set up under AddinShmemInitLock, once when the server starts and again after
 * a crash: the server's life, a random number, tells one from the other.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/shmem.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "miscadmin.h"
#include "storage/ipc.h"
#include "storage/shmem.h"

#include "base/compat.h"
#include "base/shmem.h"

#define TRANCHE "idempotency"

static Size life_size(void);
static void life_init(void *area);
static void life_attach(void *area, LWLockPadded *locks);

static const ShmemPart life_part = {
	"idempotency server life", 0, life_size, life_init, life_attach
};

/* The parts that other files have, after our own. */
static const ShmemPart *other_parts = NULL;
static int	nother_parts = 0;

static int64 *server_life = NULL;

static shmem_request_hook_type prev_shmem_request_hook = NULL;
static shmem_startup_hook_type prev_shmem_startup_hook = NULL;

static Size
life_size(void)
{
	return sizeof(int64);
}

static void
life_init(void *area)
{
	int64	   *life = area;

	do
	{
		if (!pg_strong_random(life, sizeof(int64)))
			ereport(ERROR,
					(errcode(ERRCODE_INTERNAL_ERROR),
					 errmsg("could not generate random values")));
	} while (*life == 0);
}

static void
life_attach(void *area, LWLockPadded *locks)
{
	server_life = area;
}

static const ShmemPart *
get_part(int i)
{
	return i == 0 ? &life_part : &other_parts[i - 1];
}

static void
request_shmem(void)
{
	int			nlocks = 0;
	int			i;

	if (prev_shmem_request_hook)
		prev_shmem_request_hook();

	for (i = 0; i <= nother_parts; i++)
	{
		const ShmemPart *part = get_part(i);

		RequestAddinShmemSpace(MAXALIGN(part->size()));
		nlocks += part->nlocks;
	}
	if (nlocks > 0)
		RequestNamedLWLockTranche(TRANCHE, nlocks);
}

static void
startup_shmem(void)
{
	LWLockPadded *locks = NULL;
	int			i;

	if (prev_shmem_startup_hook)
		prev_shmem_startup_hook();

	LWLockAcquire(AddinShmemInitLock, LW_EXCLUSIVE);
	for (i = 0; i <= nother_parts; i++)
	{
		const ShmemPart *part = get_part(i);
		void	   *area;
		bool		found;

		if (part->nlocks > 0 && locks == NULL)
			locks = GetNamedLWLockTranche(TRANCHE);

		area = ShmemInitStruct(part->name, part->size(), &found);
		if (!found)
		{
			memset(area, 0, part->size());
			part->init(area);
		}
		part->attach(area, locks);
		if (locks != NULL)
			locks += part->nlocks;
	}
	LWLockRelease(AddinShmemInitLock);
}

/*
 * Ask for the memory.  To be called by _PG_init() while
 * process_shared_preload_libraries_in_progress.  The array is kept.
 */
void
shmem_request_at_preload(const ShmemPart *parts, int nparts)
{
	other_parts = parts;
	nother_parts = nparts;
	prev_shmem_request_hook = shmem_request_hook;
	shmem_request_hook = request_shmem;
	prev_shmem_startup_hook = shmem_startup_hook;
	shmem_startup_hook = startup_shmem;
}

/* Is there shared memory, that is, was the library preloaded? */
bool
shmem_is_there(void)
{
	return server_life != NULL;
}

/*
 * The server's life: a random number, never 0, that changes with every start
 * and every crash restart.  To be called only if shmem_is_there().
 */
int64
shmem_server_life(void)
{
	Assert(server_life != NULL);
	return *server_life;
}
