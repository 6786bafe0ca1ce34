/*-------------------------------------------------------------------------
 *
 * grant_role.c
 *	  grant_role(): what a role of each kind needs, and no more.
 *
 * The extension grants nothing to PUBLIC, nor to anybody else: its script
 * revokes what ALTER DEFAULT PRIVILEGES has granted.  The functions access
 * tables with the table owner's rights, so EXECUTE is all that a caller needs,
 * and no kind gets a privilege on a table.  The GRANTs run as the caller of
 * grant_role(), who must therefore be the owner of the extension's objects.
 *
 * Copyright (c) 2026, idempotency developers
 *
 * src/grant_role.c
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "catalog/namespace.h"
#include "catalog/pg_namespace.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/syscache.h"

#include "base/arguments.h"
#include "base/errors.h"

PG_FUNCTION_INFO_V1(idempotency_grant_role);
PG_FUNCTION_INFO_V1(idempotency_revoke_all);

typedef enum RoleKind
{
	KIND_APPLICATION = 1 << 0,	/* claims requests and records their results */
	KIND_WEBHOOK = 1 << 1,		/* takes in Stripe's events */
	KIND_STRIPE_CALLER = 1 << 2,	/* calls Stripe */
	KIND_OBSERVER = 1 << 3,		/* sees what is open, but no bodies */
	KIND_OPERATOR = 1 << 4		/* settles what is open */
} RoleKind;

static const struct
{
	const char *name;
	RoleKind	kind;
}			kinds[] = {
	{"application", KIND_APPLICATION},
	{"webhook", KIND_WEBHOOK},
	{"stripe_caller", KIND_STRIPE_CALLER},
	{"observer", KIND_OBSERVER},
	{"operator", KIND_OPERATOR}
};

static const struct
{
	const char *privilege;
	int			kinds;
}			privileges[] = {

	{"USAGE ON SCHEMA idempotency",
	KIND_APPLICATION | KIND_WEBHOOK | KIND_STRIPE_CALLER | KIND_OBSERVER | KIND_OPERATOR},
	{"USAGE ON TYPE idempotency.verdict", KIND_APPLICATION | KIND_STRIPE_CALLER | KIND_WEBHOOK},
	{"USAGE ON TYPE idempotency.outcome", KIND_STRIPE_CALLER | KIND_OPERATOR},
	{"USAGE ON TYPE idempotency.claim_result", KIND_APPLICATION},
	{"USAGE ON TYPE idempotency.key_info", KIND_APPLICATION | KIND_OPERATOR},
	{"USAGE ON TYPE idempotency.stripe_claim_result", KIND_STRIPE_CALLER},
	{"USAGE ON TYPE idempotency.stripe_key_info", KIND_STRIPE_CALLER | KIND_OPERATOR},
	{"USAGE ON TYPE idempotency.webhook_claim_result", KIND_WEBHOOK | KIND_OPERATOR},
	{"USAGE ON TYPE idempotency.webhook_receipt", KIND_WEBHOOK},
	{"EXECUTE ON FUNCTION idempotency.claim", KIND_APPLICATION},
	{"EXECUTE ON FUNCTION idempotency.record", KIND_APPLICATION},
	{"EXECUTE ON FUNCTION idempotency.checkpoint", KIND_APPLICATION},
	{"EXECUTE ON FUNCTION idempotency.extend", KIND_APPLICATION},
	{"EXECUTE ON FUNCTION idempotency.release", KIND_APPLICATION | KIND_OPERATOR},
	{"EXECUTE ON FUNCTION idempotency.lookup", KIND_APPLICATION | KIND_OPERATOR},
	{"EXECUTE ON FUNCTION idempotency.operation_uuid", KIND_APPLICATION | KIND_STRIPE_CALLER},
	{"EXECUTE ON FUNCTION idempotency.stripe_idempotency_key", KIND_STRIPE_CALLER | KIND_OPERATOR},
	{"EXECUTE ON FUNCTION idempotency.stripe_claim", KIND_STRIPE_CALLER},
	{"EXECUTE ON FUNCTION idempotency.stripe_record", KIND_STRIPE_CALLER},
	{"EXECUTE ON FUNCTION idempotency.stripe_release", KIND_STRIPE_CALLER},
	{"EXECUTE ON FUNCTION idempotency.stripe_extend", KIND_STRIPE_CALLER},
	{"EXECUTE ON FUNCTION idempotency.stripe_reopen", KIND_STRIPE_CALLER | KIND_OPERATOR},
	{"EXECUTE ON FUNCTION idempotency.stripe_lookup", KIND_STRIPE_CALLER | KIND_OPERATOR},
	{"EXECUTE ON FUNCTION idempotency.stripe_call", KIND_STRIPE_CALLER},
	{"EXECUTE ON FUNCTION idempotency.stripe_retry", KIND_STRIPE_CALLER | KIND_OPERATOR},
	{"EXECUTE ON FUNCTION idempotency.stripe_get", KIND_STRIPE_CALLER | KIND_OPERATOR},
	{"EXECUTE ON FUNCTION idempotency.stripe_namespace", KIND_OPERATOR},
	{"EXECUTE ON FUNCTION idempotency.stripe_reconcile", KIND_OPERATOR},
	{"EXECUTE ON FUNCTION idempotency.stripe_settle", KIND_OPERATOR},
	{"EXECUTE ON FUNCTION idempotency.stripe_acknowledge", KIND_OPERATOR},
	{"EXECUTE ON FUNCTION idempotency.stripe_webhook_verify(pg_catalog.bytea, pg_catalog.text, pg_catalog.text[], interval)",
	KIND_WEBHOOK | KIND_OPERATOR},
	{"EXECUTE ON FUNCTION idempotency.stripe_webhook_verify(pg_catalog.text, pg_catalog.text, pg_catalog.text[], interval)",
	KIND_WEBHOOK | KIND_OPERATOR},
	{"EXECUTE ON FUNCTION idempotency.stripe_webhook_is_valid(pg_catalog.bytea, pg_catalog.text, pg_catalog.text[], interval)",
	KIND_WEBHOOK | KIND_OPERATOR},
	{"EXECUTE ON FUNCTION idempotency.stripe_webhook_is_valid(pg_catalog.text, pg_catalog.text, pg_catalog.text[], interval)",
	KIND_WEBHOOK | KIND_OPERATOR},
	{"EXECUTE ON FUNCTION idempotency.stripe_webhook_claim(pg_catalog.bytea, pg_catalog.text, pg_catalog.text[], interval, interval, boolean, pg_catalog.text)",
	KIND_WEBHOOK},
	{"EXECUTE ON FUNCTION idempotency.stripe_webhook_claim(pg_catalog.text, pg_catalog.text, pg_catalog.text[], interval, interval, boolean, pg_catalog.text)",
	KIND_WEBHOOK},
	{"EXECUTE ON FUNCTION idempotency.stripe_webhook_record", KIND_WEBHOOK | KIND_OPERATOR},
	{"EXECUTE ON FUNCTION idempotency.stripe_webhook_receive(pg_catalog.bytea, pg_catalog.text, pg_catalog.text[], interval, pg_catalog.text)",
	KIND_WEBHOOK},
	{"EXECUTE ON FUNCTION idempotency.stripe_webhook_receive(pg_catalog.text, pg_catalog.text, pg_catalog.text[], interval, pg_catalog.text)",
	KIND_WEBHOOK},
	{"EXECUTE ON FUNCTION idempotency.stripe_webhook_next", KIND_WEBHOOK},
	{"EXECUTE ON FUNCTION idempotency.stripe_webhook_reclaim(pg_catalog.text, pg_catalog.text, interval, pg_catalog.text)",
	KIND_WEBHOOK | KIND_OPERATOR},
	{"EXECUTE ON FUNCTION idempotency.stripe_webhook_reclaim(pg_catalog.text, boolean, interval, pg_catalog.text, pg_catalog.text)",
	KIND_OPERATOR},

	/* a view's functions are called with the rights of its reader */
	{"EXECUTE ON FUNCTION idempotency.stripe_has_lapsed", KIND_OBSERVER | KIND_OPERATOR},
	{"EXECUTE ON FUNCTION idempotency.stripe_resend_may_settle", KIND_OBSERVER | KIND_OPERATOR},
	{"EXECUTE ON FUNCTION idempotency.stripe_callers_fate", KIND_OBSERVER | KIND_OPERATOR},
	{"SELECT ON idempotency.open_claims", KIND_OBSERVER | KIND_OPERATOR},
	{"SELECT ON idempotency.stripe_unknown", KIND_OBSERVER | KIND_OPERATOR},
	{"SELECT ON idempotency.stripe_orphans", KIND_OBSERVER | KIND_OPERATOR},
	{"SELECT ON idempotency.stripe_webhook_pending", KIND_OBSERVER | KIND_OPERATOR},

	{"EXECUTE ON FUNCTION idempotency.expire", KIND_OPERATOR},
	{"EXECUTE ON FUNCTION idempotency.worker_states", KIND_OBSERVER | KIND_OPERATOR},
	{"SELECT ON idempotency.workers", KIND_OBSERVER | KIND_OPERATOR}
};

/*
 * Raise an error unless the current user owns the extension: a GRANT by anybody
 * else would only warn that nothing was granted.
 */
static void
check_owner(void)
{
	Oid			schema = get_namespace_oid("idempotency", false);
	HeapTuple	tuple = SearchSysCache1(NAMESPACEOID, ObjectIdGetDatum(schema));
	Oid			owner;

	if (!HeapTupleIsValid(tuple))
		elog(ERROR, "cache lookup failed for schema %u", schema);
	owner = ((Form_pg_namespace) GETSTRUCT(tuple))->nspowner;
	ReleaseSysCache(tuple);

	if (!has_privs_of_role(GetUserId(), owner))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("must be owner of extension %s", "idempotency")));
}

/*
 * grant_role(role, kind)
 */
Datum
idempotency_grant_role(PG_FUNCTION_ARGS)
{
	Oid			role;
	const char *rolename;
	char	   *name;
	RoleKind	kind = 0;
	int			i;

	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("%s must not be null", "role")));
	role = PG_GETARG_OID(0);
	name = text_to_cstring(argument_text(fcinfo, 1, "kind"));

	for (i = 0; i < lengthof(kinds); i++)
	{
		if (strcmp(name, kinds[i].name) == 0)
			kind = kinds[i].kind;
	}
	if (kind == 0)
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("unrecognized kind of role: \"%s\"", name),
				 errhint("Kinds are application, webhook, stripe_caller, observer and operator.")));
	if (!OidIsValid(role))
		ereport(ERROR,
				(errcode(ERRCODE_BAD_ARGUMENT),
				 errmsg("role must be an existing role"),
				 errhint("Nothing is granted to PUBLIC.")));

	check_owner();

	rolename = quote_identifier(GetUserNameFromId(role, false));

	SPI_connect();
	for (i = 0; i < lengthof(privileges); i++)
	{
		char	   *grant;

		if ((privileges[i].kinds & kind) == 0)
			continue;
		grant = psprintf("GRANT %s TO %s", privileges[i].privilege, rolename);
		if (SPI_execute(grant, false, 0) != SPI_OK_UTILITY)
			elog(ERROR, "could not execute: %s", grant);
	}
	SPI_finish();

	PG_RETURN_BOOL(true);
}

/*
 * Makes a REVOKE for each privilege on an object of the schema that anybody but
 * the object's owner has.  (The operators need no qualification here:
 * search_path is the extension script's.)
 */
static const char *const find_grants =
"SELECT pg_catalog.format('REVOKE ALL ON %s FROM %s CASCADE', o.name,"
" CASE WHEN a.grantee = 0 THEN 'PUBLIC'"
" ELSE pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee)) END)"
" FROM (SELECT pg_catalog.format('SCHEMA %I', nspname), nspowner,"
" COALESCE(nspacl, pg_catalog.acldefault('n', nspowner))"
" FROM pg_catalog.pg_namespace WHERE nspname = 'idempotency'"
" UNION ALL SELECT pg_catalog.format(CASE relkind WHEN 'S' THEN 'SEQUENCE %I.%I' ELSE 'TABLE %I.%I' END,"
" 'idempotency', relname), relowner,"
" COALESCE(relacl, pg_catalog.acldefault(CASE relkind WHEN 'S' THEN 's'::\"char\" ELSE 'r' END, relowner))"
" FROM pg_catalog.pg_class"
" WHERE relnamespace = 'idempotency'::pg_catalog.regnamespace AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S')"
" UNION ALL SELECT pg_catalog.format('ROUTINE %s', oid::pg_catalog.regprocedure), proowner,"
" COALESCE(proacl, pg_catalog.acldefault('f', proowner))"
" FROM pg_catalog.pg_proc WHERE pronamespace = 'idempotency'::pg_catalog.regnamespace"
" UNION ALL SELECT pg_catalog.format('TYPE %I.%I', 'idempotency', t.typname), t.typowner,"
" COALESCE(t.typacl, pg_catalog.acldefault('T', t.typowner))"
" FROM pg_catalog.pg_type t LEFT JOIN pg_catalog.pg_class c ON c.oid = t.typrelid"
" WHERE t.typnamespace = 'idempotency'::pg_catalog.regnamespace"
" AND (t.typtype IN ('e', 'd', 'r') OR c.relkind = 'c')"
") o (name, owner, acl), pg_catalog.aclexplode(o.acl) a"
" WHERE a.grantee <> o.owner"
" GROUP BY o.name, a.grantee ORDER BY o.name, a.grantee";

/*
 * revoke_all(): called at the end of the extension's script, it leaves the
 * objects of the schema to their owner alone.  That takes away what PostgreSQL
 * grants to PUBLIC by default, and what ALTER DEFAULT PRIVILEGES grants:
 * whoever chose that cannot have had tokens, answers and payloads in mind.
 */
Datum
idempotency_revoke_all(PG_FUNCTION_ARGS)
{
	SPITupleTable *found;
	uint64		nfound;
	uint64		i;

	check_owner();

	SPI_connect();
	if (SPI_execute(find_grants, false, 0) != SPI_OK_SELECT)
		elog(ERROR, "could not execute: %s", find_grants);
	found = SPI_tuptable;
	nfound = SPI_processed;
	for (i = 0; i < nfound; i++)
	{
		char	   *revoke = SPI_getvalue(found->vals[i], found->tupdesc, 1);

		if (SPI_execute(revoke, false, 0) != SPI_OK_UTILITY)
			elog(ERROR, "could not execute: %s", revoke);
	}
	SPI_finish();

	PG_RETURN_VOID();
}
