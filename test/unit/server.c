/*-------------------------------------------------------------------------
 *
 * server.c
 *	  What of a server a program lacks that is linked without one: the ends of
 *	  elog() and of an assertion, which are for what can't happen.
 *
 * Their parameters differ between majors, and nobody looks at them, so this file
 * doesn't include postgres.h.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * test/unit/server.c
 *
 *-------------------------------------------------------------------------
 */
#include <stdio.h>
#include <stdlib.h>

void		errstart(void);
void		errstart_cold(void);
void		errmsg_internal(void);
void		errfinish(void);
void		ExceptionalCondition(const char *condition);

void
errstart(void)
{
	abort();
}

void
errstart_cold(void)
{
	abort();
}

void
errmsg_internal(void)
{
	abort();
}

void
errfinish(void)
{
	abort();
}

void
ExceptionalCondition(const char *condition)
{
	fprintf(stderr, "false assertion: %s\n", condition);
	abort();
}
