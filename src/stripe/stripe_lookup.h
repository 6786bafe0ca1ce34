/*-------------------------------------------------------------------------
 *
 * stripe_lookup.h
 *	  Where at Stripe to look for what a call has done.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/stripe/stripe_lookup.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_STRIPE_LOOKUP_H
#define IDEMPOTENCY_STRIPE_LOOKUP_H

/* Where to look.  Paths are palloc'd, or NULL if there are none. */
typedef struct CallPlace
{
	bool		creates;		/* does it make an object? */
	char	   *object;			/* of the object that it changes otherwise */
	char	   *list;			/* of the objects like the one that it makes */
	const char *list_query;		/* without it some are not listed, or "" */
	bool		list_created;	/* can the list be restricted to a time? */
	char	   *search;
	char	   *events;			/* types of events about it; NULL: any */
} CallPlace;

extern void place_of_call(const char *path, CallPlace *place);

#endif							/* IDEMPOTENCY_STRIPE_LOOKUP_H */
