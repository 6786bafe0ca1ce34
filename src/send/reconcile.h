/*-------------------------------------------------------------------------
 *
 * reconcile.h
 *	  Asking Stripe about calls whose outcome is not known: what the files
 *	  reconcile*.c share.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/send/reconcile.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_RECONCILE_H
#define IDEMPOTENCY_RECONCILE_H

#include "utils/jsonb.h"
#include "utils/palloc.h"

#include "calls/settle_by_event.h"
#include "calls/stripe_ledger.h"
#include "send/api_key.h"
#include "stripe/stripe_effect.h"
#include "stripe/stripe_lookup.h"

/* The ways of asking, in their order. */
typedef enum StepKind
{
	ASK_OBJECT,
	ASK_SEARCH,
	ASK_LIST,
	ASK_EVENTS,
	ASK_NSTEPS
} StepKind;

/*
 * One way of asking, and how far it has got.  Strings are NULL if there is
 * nothing to say.
 */
typedef struct Step
{
	char	   *path;			/* NULL: the call cannot be asked about like
								 * this */
	bool		done;
	bool		touched;		/* was it asked by this call of the function? */
	bool		complete;		/* was all that there is looked at? */
	int			page;			/* objects in a page */
	int			requests;
	int			seen;			/* objects or events */
	int			http_status;	/* of the last answer */
	char	   *request_id;
	char	   *problem;
	char	   *after;			/* the last object of a list that was cut */
	char	   *pending;		/* id of what has the key, until all is seen */
	char	   *pending_after;	/* the object before the page that it is on */
	char	   *found;			/* JSON: what is about the call, whether or not
								 * it settles it */
	TimestampTz at;
	char	   *before;			/* JSON: what an earlier call has noted */
} Step;

/* One operation whose outcome is not known. */
typedef struct Doubt
{
	Operation	op;
	int64		token;
	int			generation;
	char	   *key;
	char	   *method;
	char	   *path;
	char	   *version;		/* of the API */
	Jsonb	   *request;
	TimestampTz from;			/* when it may have been carried out */
	TimestampTz to;
	bool		in_metadata;	/* may its key be in metadata? */
	char	   *metadata_name;
	CallPlace	place;
	Step		steps[ASK_NSTEPS];
	int			requests;		/* of this call of the function */
	bool		several;		/* more than one object has the key */
	const char *skipped;		/* why nothing can be asked */
	bool		asked;			/* is there anything to keep in the row? */
	bool		told;			/* does a kept event settle it? */
	bool		kept;			/* was it written down? */
	bool		candidate;		/* is there a finding, */
	bool		known;			/* and does it count? */
	FoundBy		found_by;
	char	   *event_id;
	char	   *event_type;
	Finding		finding;
} Doubt;

/* One call of stripe_reconcile(). */
typedef struct Reconcile
{
	ApiKey		key;
	int			left;			/* requests */
	const char *stopped;		/* why nothing more is asked */
	MemoryContext keep;			/* of the call */
	MemoryContext work;			/* of one answer */
} Reconcile;

/* In reconcile_evidence.c */
extern Jsonb *reconcile_evidence(Reconcile *r, Doubt *doubt, bool kept);
extern void reconcile_go_on(Doubt *doubt, Jsonb *before, TimestampTz claimed_at, bool live);

/* In reconcile_search.c */
extern void reconcile_read(Reconcile *r, Doubt *doubt, LedgerRow *row, TimestampTz now);
extern void reconcile_ask(Reconcile *r, Doubt *doubt);

#endif							/* IDEMPOTENCY_RECONCILE_H */
