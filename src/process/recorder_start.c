/*-------------------------------------------------------------------------
 *
 * recorder_start.c
 *	  Asking for a recorder.
 *
 * A recorder is started by whoever needs it: a caller that waits for its
 * answer, or the launcher for orders that were left behind.  Where there is no
 * place for another process, the database waits in line (recorder_queue.c).
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/process/recorder_start.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/timestamp.h"

#include "base/clock.h"
#include "process/background_process.h"
#include "process/recorder_queue.h"
#include "process/recorder_start.h"

/* A recorder that was asked for and does not run by then is asked for again. */
#define START_PATIENCE_MS	1000

/*
 * Ask for a recorder of a database unless there is one or somebody else has
 * just asked.  Where we ask, sets *since and, unless it is NULL, *handle.
 */
RecorderAsked
ask_for_recorder(Oid database, TimestampTz *since, BackgroundWorkerHandle **handle)
{
	RecorderSlot *slot;
	TimestampTz now = GetCurrentTimestamp();
	RecorderAsked result = RECORDER_COMES;
	bool		ask = false;
	bool		started;

	LWLockAcquire(recorder_queue_lock, LW_EXCLUSIVE);
	slot = recorder_queue_slot(database, false);
	if (slot != NULL && slot->procno >= 0)
		result = RECORDER_RUNS;
	else if (slot != NULL && slot->blocked)
		result = RECORDER_IS_BLOCKED;
	else if (slot == NULL || is_over(slot->started, START_PATIENCE_MS * 1000, now))
	{
		slot = recorder_queue_is_next(database) ? recorder_queue_slot(database, true) : NULL;
		ask = slot != NULL;
		if (ask)
			*since = slot->started = now;
		else
		{
			result = RECORDER_HAS_NO_PLACE;
			recorder_queue_ask_for_room(database);
		}
	}
	LWLockRelease(recorder_queue_lock);
	if (!ask)
		return result;

	started = background_start("recorder", database, handle);
	LWLockAcquire(recorder_queue_lock, LW_EXCLUSIVE);
	if (started)
		recorder_queue_stop_wanting(database, true);
	else
	{
		result = RECORDER_HAS_NO_PLACE;
		slot = recorder_queue_slot(database, false);
		if (slot != NULL && slot->procno < 0 && !slot->blocked)
			slot->database = InvalidOid;
		recorder_queue_ask_for_room(database);
	}
	LWLockRelease(recorder_queue_lock);
	return result;
}
