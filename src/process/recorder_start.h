/*-------------------------------------------------------------------------
 *
 * recorder_start.h
 *	  Asking for a recorder.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/process/recorder_start.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_RECORDER_START_H
#define IDEMPOTENCY_RECORDER_START_H

#include "datatype/timestamp.h"
#include "postmaster/bgworker.h"

/* What came of asking for a recorder. */
typedef enum RecorderAsked
{
	RECORDER_RUNS,
	RECORDER_COMES,				/* we, or somebody else, have asked for it */
	RECORDER_IS_BLOCKED,		/* the database is being dropped */
	RECORDER_HAS_NO_PLACE
} RecorderAsked;

extern RecorderAsked ask_for_recorder(Oid database, TimestampTz *since,
									  BackgroundWorkerHandle **handle);

#endif							/* IDEMPOTENCY_RECORDER_START_H */
