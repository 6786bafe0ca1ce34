/*-------------------------------------------------------------------------
 *
 * server.c
 *	  Stand-ins for functions of the server, for a program linked without one:
 *	  what elog() and a failed assertion call, which must not happen.
 *
 * Their parameters differ between majors, and are not used, so this file does
 * not include postgres.h.
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
