/*-------------------------------------------------------------------------
 *
 * debug_point.c
 *	  Named places where a test can hold, fail or kill a process.
 *
 * A test arms a point with a file debug_points/NAME in the data directory; its
 * first word says what to do:
 *
 *	wait	write one's process id to NAME.reached and wait until the file is
 *			gone, or says something else, which is then done; interrupts are
 *			served meanwhile
 *	error	raise an error, once
 *	errors	raise an error, each time
 *	numbered	the same, with another number in its text each time
 *	fatal	end the session, once
 *	kill	kill the process, and with it the server, once
 *
 * They are files because those work in every process, need no transaction, and
 * take no lock that would take part in what is tested.  PostgreSQL's injection
 * points exist since version 17 only.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/base/debug_point.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/debug_point.h"

#ifdef IDEMPOTENCY_DEBUG_POINTS

#include <signal.h>
#include <unistd.h>

#include "miscadmin.h"
#include "storage/latch.h"
#include "utils/wait_event.h"

#include "base/compat.h"

static bool
read_action(const char *path, char *action, int size)
{
	FILE	   *file = fopen(path, "r");
	bool		found;

	if (file == NULL)
		return false;
	found = fgets(action, size, file) != NULL;
	fclose(file);
	if (found)
		action[strcspn(action, " \n")] = '\0';
	return found;
}

/* What DEBUG_POINT() calls: do what the point is armed with, if it is. */
void
debug_point(const char *name)
{
	char		path[MAXPGPATH];
	char		reached[MAXPGPATH];
	char		action[32];
	FILE	   *file;

	snprintf(path, sizeof(path), "%s/debug_points/%s", DataDir, name);
	if (!read_action(path, action, sizeof(action)))
		return;

	snprintf(reached, sizeof(reached), "%s.reached", path);
	file = fopen(reached, "w");
	if (file != NULL)
	{
		fprintf(file, "%d\n", MyProcPid);
		fclose(file);
	}

	while (strcmp(action, "wait") == 0)
	{
		CHECK_FOR_INTERRUPTS();
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 10, WAIT_EVENT_PG_SLEEP);
		ResetLatch(MyLatch);
		if (!read_action(path, action, sizeof(action)))
			return;
	}

	if (strcmp(action, "errors") == 0)
		ereport(ERROR,
				(errcode(ERRCODE_INTERNAL_ERROR),
				 errmsg("debug point \"%s\"", name)));

	if (strcmp(action, "numbered") == 0)
	{
		static int	number = 0;

		ereport(ERROR,
				(errcode(ERRCODE_INTERNAL_ERROR),
				 errmsg("debug point \"%s\", number %d", name, ++number)));
	}

	/* the first process to remove the file is the one */
	if (unlink(path) != 0)
		return;
	if (strcmp(action, "error") == 0)
		ereport(ERROR,
				(errcode(ERRCODE_INTERNAL_ERROR),
				 errmsg("debug point \"%s\"", name)));
	else if (strcmp(action, "fatal") == 0)
		ereport(FATAL,
				(errcode(ERRCODE_INTERNAL_ERROR),
				 errmsg("debug point \"%s\"", name)));
	else if (strcmp(action, "kill") == 0)
		(void) kill(MyProcPid, SIGKILL);
}

#endif							/* IDEMPOTENCY_DEBUG_POINTS */
