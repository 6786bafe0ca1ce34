/*-------------------------------------------------------------------------
 *
 * assertion.c
 *	  What an assertion calls, for programs that are linked without a server.
 *
 * Its parameters differ between majors but for the first one, so this file
 * doesn't include postgres.h.
 *
 * test/unit/assertion.c
 *
 *-------------------------------------------------------------------------
 */
#include <stdio.h>
#include <stdlib.h>

void		ExceptionalCondition(const char *condition);

void
ExceptionalCondition(const char *condition)
{
	fprintf(stderr, "false assertion: %s\n", condition);
	abort();
}
