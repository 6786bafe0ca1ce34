/*-------------------------------------------------------------------------
 *
 * stripe_answer.h
 *	  What stands in the body of Stripe's answers.
 *
 * src/stripe_answer.h
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_STRIPE_ANSWER_H
#define IDEMPOTENCY_STRIPE_ANSWER_H

#include "postgres.h"

#include "utils/jsonb.h"

#define STRIPE_ID_MAX 255

/* A body, and what is known from it; pointers are NULL where there is nothing */
typedef struct StripeBody
{
	Jsonb	   *json;			/* all of it */
	Jsonb	   *error;			/* its error object */
	char	   *error_type;
	char	   *error_code;
	char	   *resource_id;	/* what was made, also by a refused call */
	char	   *resource_type;
	char	   *resource_status;	/* its member "status", where that is a string */
	bool		livemode;
	bool		livemode_isnull;
} StripeBody;

extern char *stripe_object_status(JsonbContainer *object);
extern void stripe_read_body(Jsonb *json, StripeBody *body);

#endif							/* IDEMPOTENCY_STRIPE_ANSWER_H */
