/*-------------------------------------------------------------------------
 *
 * stripe_answer.c
 *	  What stands in the body of Stripe's answers.
 *
 * A body is whatever came: nothing here raises an error for what it says.
 *
 * src/stripe_answer.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "json_member.h"
#include "stripe_answer.h"

/* Stripe's ids have 255 characters at most; what is longer is none. */
static void
drop_if_long(char **value)
{
	if (*value != NULL && strlen(*value) > STRIPE_ID_MAX)
		*value = NULL;
}

/* The status of an object, or NULL. */
char *
stripe_object_status(JsonbContainer *object)
{
	char	   *status = json_string_member(object, "status");

	drop_if_long(&status);
	return status;
}

static void
read_livemode(JsonbContainer *object, StripeBody *body)
{
	JsonbValue	value;

	if (!json_member(object, "livemode", &value) || value.type != jbvBool)
		return;
	body->livemode = value.val.boolean;
	body->livemode_isnull = false;
}

/*
 * The object that a refused call left behind: a declined card leaves its
 * payment intent in the error.
 */
static void
resource_of_error(JsonbContainer *error, StripeBody *body)
{
	static const char *const members[] = {"payment_intent", "setup_intent", "charge"};
	int			i;

	for (i = 0; i < lengthof(members); i++)
	{
		JsonbContainer *object = json_object_member(error, members[i]);
		char	   *id = json_string_member(object, "id");

		if (id == NULL)
			id = json_string_member(error, members[i]);
		if (id != NULL)
		{
			body->resource_id = id;
			body->resource_type = pstrdup(members[i]);
			body->resource_status = stripe_object_status(object);
			read_livemode(object, body);
			return;
		}
	}
}

/*
 * Make out a body, or none.
 */
void
stripe_read_body(Jsonb *json, StripeBody *body)
{
	JsonbContainer *root = json != NULL ? &json->root : NULL;
	JsonbContainer *error = json_object_member(root, "error");
	JsonbValue	value;

	memset(body, 0, sizeof(StripeBody));
	body->json = json;
	body->livemode_isnull = true;

	if (error != NULL)
	{
		if (json_member(root, "error", &value))
			body->error = JsonbValueToJsonb(&value);
		body->error_type = json_string_member(error, "type");
		body->error_code = json_string_member(error, "code");
		resource_of_error(error, body);
	}
	else
	{
		body->resource_id = json_string_member(root, "id");
		body->resource_type = json_string_member(root, "object");
		body->resource_status = stripe_object_status(root);
	}

	drop_if_long(&body->resource_id);
	drop_if_long(&body->resource_type);

	read_livemode(root, body);
}
