/*-------------------------------------------------------------------------
 *
 * planted.c
 *	  Mistakes made on purpose, which a server with sanitizers has to find.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * test/sanitize/planted.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "fmgr.h"
#include "utils/memutils.h"

PG_MODULE_MAGIC;

PG_FUNCTION_INFO_V1(planted);

/* Keeps the compiler from seeing the mistakes. */
static volatile int one = 1;

/* planted(number): make one mistake. */
Datum
planted(PG_FUNCTION_ARGS)
{
	volatile char *chunk = palloc(100);

	switch (PG_GETARG_INT32(0))
	{
		case 0:					/* no mistake */
			chunk[98 + one] = 'x';
			break;
		case 1:					/* a byte behind a chunk */
			chunk[99 + one] = 'x';
			break;
		case 2:					/* the same, read */
			PG_RETURN_INT32(chunk[99 + one]);
		case 3:					/* a byte before it */
			chunk[-one] = 'x';
			break;
		case 4:					/* a chunk that is gone */
			pfree((void *) chunk);
			chunk[98 + one] = 'x';
			break;
		case 5:					/* a context that is gone */
			{
				MemoryContext context = AllocSetContextCreate(CurrentMemoryContext, "planted", ALLOCSET_SMALL_SIZES);

				chunk = MemoryContextAlloc(context, 100);
				MemoryContextReset(context);
				chunk[0] = 'x';
				break;
			}
		case 6:					/* undefined behaviour; a signed overflow
								 * isn't, PostgreSQL is built with -fwrapv */
			PG_RETURN_INT32(1 << (31 + one));
		case 7:
			Assert(one == 0);
			break;
	}
	PG_RETURN_INT32(0);
}
