/*-------------------------------------------------------------------------
 *
 * shmem.h
 *	  Shared memory of the background processes.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/shmem.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_SHMEM_H
#define IDEMPOTENCY_SHMEM_H

#include "storage/lwlock.h"

/*
 * A part of shared memory, owned by one file.  init runs once per server life,
 * on zeroed memory; attach runs in every process that maps it, and keeps the
 * two pointers: to the memory and to as many locks as the part asks for.
 */
typedef struct ShmemPart
{
	const char *name;
	int			nlocks;
	Size		(*size) (void);
	void		(*init) (void *area);
	void		(*attach) (void *area, LWLockPadded *locks);
} ShmemPart;

extern void shmem_request_at_preload(const ShmemPart *parts, int nparts);
extern bool shmem_is_there(void);
extern int64 shmem_server_life(void);

#endif							/* IDEMPOTENCY_SHMEM_H */
