/*-------------------------------------------------------------------------
 *
 * shmem.c
 *	  Shared memory of the background processes.
 *
 * It is there only where the library is preloaded; everything that needs it
 * asks shmem_is_there() first and says what it can't do without.
 *
 * Each part belongs to one file and is listed below.  The parts are set up
 * under AddinShmemInitLock, once when the server starts and again after a
 * crash: the server's life, a random number, tells the one from the other.
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
#include "process/recorder_queue.h"
#include "process/worker_table.h"

#define TRANCHE "idempotency"

static Size life_size(void);
static void life_init(void *area);
static void life_attach(void *area, LWLockPadded *locks);

static const ShmemPart parts[] = {
	{"idempotency server life", 0, life_size, life_init, life_attach},
	{"idempotency recorder queue", 1, recorder_queue_size, recorder_queue_init, recorder_queue_attach},
	{"idempotency databases", 1, worker_table_size, worker_table_init, worker_table_attach},
};

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

static void
request_shmem(void)
{
	int			nlocks = 0;
	int			i;

	if (prev_shmem_request_hook)
		prev_shmem_request_hook();

	for (i = 0; i < lengthof(parts); i++)
	{
		RequestAddinShmemSpace(MAXALIGN(parts[i].size()));
		nlocks += parts[i].nlocks;
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
	for (i = 0; i < lengthof(parts); i++)
	{
		void	   *area;
		bool		found;

		if (parts[i].nlocks > 0 && locks == NULL)
			locks = GetNamedLWLockTranche(TRANCHE);

		area = ShmemInitStruct(parts[i].name, parts[i].size(), &found);
		if (!found)
		{
			memset(area, 0, parts[i].size());
			parts[i].init(area);
		}
		parts[i].attach(area, locks);
		if (locks != NULL)
			locks += parts[i].nlocks;
	}
	LWLockRelease(AddinShmemInitLock);
}

/*
 * Ask for the memory.  To be called by _PG_init while
 * process_shared_preload_libraries_in_progress.
 */
void
shmem_request_at_preload(void)
{
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
 * and every crash restart.  Only where shmem_is_there().
 */
int64
shmem_server_life(void)
{
	Assert(server_life != NULL);
	return *server_life;
}
