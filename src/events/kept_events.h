/*-------------------------------------------------------------------------
 *
 * kept_events.h
 *	  Events that wait for the call that they are about.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/events/kept_events.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_KEPT_EVENTS_H
#define IDEMPOTENCY_KEPT_EVENTS_H

#include "calls/stripe_claim.h"
#include "ledger/derived_key.h"

/* Where to go on with the events that wait for their call. */
typedef struct KeptPlace
{
	char		key[STRIPE_KEY_MAX + 1];	/* the last one's pending key */
	int			left;			/* events with this key that were looked at
								 * and still wait */
} KeptPlace;

/*
 * Where all backends of a database share such a place.  Both leave it alone if
 * there is none.
 */
typedef struct KeptPlaceCallbacks
{
	void		(*read) (KeptPlace *place);
	void		(*write) (const KeptPlace *place);
} KeptPlaceCallbacks;

/* Some of them, which is the work of one transaction. */
typedef struct KeptBatch
{
	int			max_events;
	KeptPlace  *place;			/* moved on */

	/* what came of it */
	bool		finished;		/* there are no more: the place is the start */
	int			seen;
	int			forgotten;		/* those that wait no longer */
	int			refused;		/* those that raised an error */
	char	   *refusal;		/* which was the first, and why */
} KeptBatch;

extern bool settle_by_kept_events(const Datum *key, int64 claimed_token, bool only_look);
extern void settle_or_claim(StripeClaim *claim, Relation rel);
extern bool settle_open_call(const Datum *key);
extern void settle_kept_events(KeptBatch *batch);
extern void settle_kept_events_idly(int max_events);
extern void kept_events_share_place(const KeptPlaceCallbacks *callbacks);

#endif							/* IDEMPOTENCY_KEPT_EVENTS_H */
