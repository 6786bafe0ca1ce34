/*-------------------------------------------------------------------------
 *
 * request_fingerprint.c
 *	  Comparing a request with the recorded fingerprint of an earlier one.
 *
 * A recorded fingerprint names the namespace it was made with.  After a
 * restore or stripe_namespace('new') another one may be in force; then a second
 * fingerprint of the request is made with the old one.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/ledger/request_fingerprint.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/compat.h"
#include "base/errors.h"
#include "base/fingerprint.h"
#include "ledger/namespace.h"
#include "ledger/request_fingerprint.h"

static bytea *
compute(RequestPrint *rp, const Namespace *ns)
{
	bytea	   *print = palloc(VARHDRSZ + FINGERPRINT_LEN);

	SET_VARSIZE(print, VARHDRSZ + FINGERPRINT_LEN);
	fingerprint_compute(rp->request, rp->ignore, rp->nignore,
						ns->value, NAMESPACE_LEN, (uint8 *) VARDATA(print));
	return print;
}

/*
 * The fingerprint to store, made when it is first asked for, or NULL if there
 * is no request.  Needs an active snapshot.
 */
bytea *
request_print(RequestPrint *rp)
{
	if (rp->print == NULL && rp->request != NULL)
	{
		Namespace	ns;

		namespace_in_force(&ns);
		rp->print = compute(rp, &ns);
	}
	return rp->print;
}

/*
 * Is this the request that was recorded?  It is if either side has none.
 * Raises an error if the recorded fingerprint cannot be compared.
 */
bool
request_matches(RequestPrint *rp, bytea *recorded)
{
	const uint8 *bytes;
	const uint8 *ours;

	if (recorded == NULL || rp->request == NULL)
		return true;

	bytes = (const uint8 *) VARDATA_ANY(recorded);
	if (VARSIZE_ANY_EXHDR(recorded) != FINGERPRINT_LEN || bytes[0] != FINGERPRINT_VERSION)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("recorded fingerprint has a format that this version does not know"),
				 errdetail("It may have been written by a later version of the extension.")));

	ours = (const uint8 *) VARDATA_ANY(request_print(rp));
	if (memcmp(ours + 1, bytes + 1, NAMESPACE_ID_LEN) != 0)
	{
		Namespace	ns;

		if (!namespace_by_id(bytes + 1, &ns))
			ereport(ERROR,
					(errcode(ERRCODE_FOREIGN_NAMESPACE),
					 errmsg("recorded fingerprint was made with a namespace that this database does not have"),
					 errhint("Restore the rows of \"idempotency.namespace\" that belong to the ledgers.")));
		ours = (const uint8 *) VARDATA_ANY(compute(rp, &ns));
	}

	return memcmp(ours, bytes, FINGERPRINT_LEN) == 0;
}
