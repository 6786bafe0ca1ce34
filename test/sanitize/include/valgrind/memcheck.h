/*-------------------------------------------------------------------------
 *
 * memcheck.h
 *	  Valgrind's requests, for AddressSanitizer.
 *
 * palloc hides overruns from AddressSanitizer, because its chunks are parts of
 * larger blocks.  PostgreSQL tells Valgrind about chunks where it is built
 * with USE_VALGRIND; this header stands in for Valgrind's own, and hands the
 * same on to AddressSanitizer.  So one byte too much is found in palloc'd
 * memory, too, and so is the use of what was pfree'd, and of a shared buffer
 * that isn't pinned.
 *
 * Whether memory was written before it is read isn't AddressSanitizer's
 * business: "undefined" is accessible, like "defined".
 *
 * Copyright (c) 2026, idempotency developers
 *
 * test/sanitize/include/valgrind/memcheck.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_MEMCHECK_H
#define IDEMPOTENCY_MEMCHECK_H

#include <stddef.h>

extern void __asan_poison_memory_region(void const volatile *addr, size_t size);
extern void __asan_unpoison_memory_region(void const volatile *addr, size_t size);

#define VALGRIND_MAKE_MEM_NOACCESS(addr, size) \
	__asan_poison_memory_region((const void *) (addr), (size))
#define VALGRIND_MAKE_MEM_UNDEFINED(addr, size) \
	__asan_unpoison_memory_region((const void *) (addr), (size))
#define VALGRIND_MAKE_MEM_DEFINED(addr, size) \
	__asan_unpoison_memory_region((const void *) (addr), (size))

#define VALGRIND_MEMPOOL_ALLOC(pool, addr, size) \
	__asan_unpoison_memory_region((const void *) (addr), (size))

/* a chunk that is freed or moved is made inaccessible by the requests above */
#define VALGRIND_CREATE_MEMPOOL(pool, redzone, zeroed) ((void) 0)
#define VALGRIND_DESTROY_MEMPOOL(pool) ((void) 0)
#define VALGRIND_MEMPOOL_FREE(pool, addr) ((void) 0)
#define VALGRIND_MEMPOOL_TRIM(pool, addr, size) ((void) 0)
#define VALGRIND_MOVE_MEMPOOL(from, to) ((void) 0)
#define VALGRIND_MEMPOOL_CHANGE(pool, old, addr, size) \
	__asan_unpoison_memory_region((const void *) (addr), (size))
#define VALGRIND_CHECK_MEM_IS_DEFINED(addr, size) ((void) 0)
#define VALGRIND_GET_VBITS(addr, bits, size) (0)
#define VALGRIND_SET_VBITS(addr, bits, size) ((void) 0)

#define RUNNING_ON_VALGRIND 0
#define VALGRIND_COUNT_ERRORS 0
#define VALGRIND_PRINTF(...) ((void) 0)

#endif							/* IDEMPOTENCY_MEMCHECK_H */
