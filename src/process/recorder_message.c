/*-------------------------------------------------------------------------
 *
 * recorder_message.c
 *	  Arguments of an order, on their way to the recorder.
 *
 * A caller packs them into the segment of its order, the recorder unpacks them.
 * What is packed and what is unpacked stand side by side here, in the same
 * order.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/process/recorder_message.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/builtins.h"
#include "utils/datum.h"

#include "process/recorder_message.h"

static void
put_datum(OrderArguments *arguments, Datum value, bool isnull, bool byval)
{
	Assert(arguments->n < ORDER_MAX_ARGUMENTS);
	arguments->values[arguments->n] = value;
	arguments->isnull[arguments->n] = isnull;
	arguments->byval[arguments->n] = byval;
	arguments->n++;
}

static void
put_int(OrderArguments *arguments, int64 value)
{
	put_datum(arguments, Int64GetDatum(value), false, true);
}

static void
put_pointer(OrderArguments *arguments, const void *varlena)
{
	put_datum(arguments, PointerGetDatum(varlena), varlena == NULL, false);
}

static void
put_string(OrderArguments *arguments, const char *string)
{
	put_pointer(arguments, string == NULL ? NULL : cstring_to_text(string));
}

static int16
typlen(const OrderArguments *arguments, int i)
{
	return arguments->byval[i] ? (int16) sizeof(int64) : -1;
}

Size
arguments_size(const OrderArguments *arguments)
{
	Size		size = 0;
	int			i;

	for (i = 0; i < arguments->n; i++)
		size += datumEstimateSpace(arguments->values[i], arguments->isnull[i],
								   arguments->byval[i], typlen(arguments, i));
	return size;
}

void
arguments_write(const OrderArguments *arguments, char *to)
{
	int			i;

	for (i = 0; i < arguments->n; i++)
		datumSerialize(arguments->values[i], arguments->isnull[i],
					   arguments->byval[i], typlen(arguments, i), &to);
}

/* Read what was put, in the same order; copies in the current context. */
static int64
get_int(char **from)
{
	bool		isnull;

	return DatumGetInt64(datumRestore(from, &isnull));
}

static void *
get_pointer(char **from)
{
	bool		isnull;
	Datum		value = datumRestore(from, &isnull);

	return isnull ? NULL : DatumGetPointer(value);
}

static char *
get_string(char **from)
{
	text	   *value = get_pointer(from);

	return value == NULL ? NULL : text_to_cstring(value);
}

/* ---------- claim ---------- */

void
pack_claim(OrderArguments *arguments, const StripeClaim *claim)
{
	arguments->n = 0;
	put_pointer(arguments, claim->request);
	put_string(arguments, claim->send.method);
	put_string(arguments, claim->send.path);
	put_string(arguments, claim->send.api_version);
	put_pointer(arguments, claim->send.body);
	put_int(arguments, claim->send.livemode);
	put_string(arguments, claim->caller_vxid);
	put_int(arguments, claim->caller_life);
	put_string(arguments, claim->rules.compare_ignore);
	put_int(arguments, claim->rules.resend_margin);
	put_int(arguments, claim->lease);
	put_int(arguments, claim->resend);
}

void
unpack_claim(char *from, StripeClaim *claim)
{
	claim->request = get_pointer(&from);
	claim->send.method = get_string(&from);
	claim->send.path = get_string(&from);
	claim->send.api_version = get_string(&from);
	claim->send.body = get_pointer(&from);
	claim->send.livemode = (Livemode) get_int(&from);
	claim->caller_vxid = get_string(&from);
	claim->caller_life = get_int(&from);
	claim->rules.compare_ignore = get_string(&from);
	claim->rules.resend_margin = get_int(&from);
	claim->lease = get_int(&from);
	claim->resend = get_int(&from) != 0;
}

/* ---------- reopen ---------- */

void
pack_reopen(OrderArguments *arguments, bool force, int from_generation, const char *user)
{
	arguments->n = 0;
	put_int(arguments, force);
	put_int(arguments, from_generation);
	put_string(arguments, user);
}

void
unpack_reopen(char *from, bool *force, int *from_generation, char **user)
{
	*force = get_int(&from) != 0;
	*from_generation = (int) get_int(&from);
	*user = get_string(&from);
}

/* ---------- record ---------- */

void
pack_result(OrderArguments *arguments, const CallResult *result)
{
	arguments->n = 0;
	put_int(arguments, result->outcome);
	put_int(arguments, result->sent);
	put_int(arguments, result->http_status);
	put_string(arguments, result->resource_id);
	put_string(arguments, result->resource_type);
	put_string(arguments, result->resource_status);
	put_string(arguments, result->request_id);
	put_pointer(arguments, result->response);
	put_pointer(arguments, result->error);
	put_int(arguments, result->livemode);
}

void
unpack_result(char *from, CallResult *result)
{
	result->outcome = (StripeOutcome) get_int(&from);
	result->sent = get_int(&from) != 0;
	result->http_status = (int) get_int(&from);
	result->resource_id = get_string(&from);
	result->resource_type = get_string(&from);
	result->resource_status = get_string(&from);
	result->request_id = get_string(&from);
	result->response = get_pointer(&from);
	result->error = get_pointer(&from);
	result->livemode = (Livemode) get_int(&from);
}
