--
-- Privileges: nothing for PUBLIC, a kind gets what it needs and no more, and
-- nothing is looked up by the caller's search_path
--
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS idempotency;
RESET client_min_messages;
\set SHOW_CONTEXT never
\set VERBOSITY terse

CREATE ROLE regress_idempotency_nobody;
CREATE ROLE regress_idempotency_application;
CREATE ROLE regress_idempotency_stripe_caller;
CREATE ROLE regress_idempotency_webhook;
CREATE ROLE regress_idempotency_observer;
CREATE ROLE "regress idempotency ""operator""";
SELECT idempotency.grant_role('regress_idempotency_application', 'application');
SELECT idempotency.grant_role('regress_idempotency_stripe_caller', 'stripe_caller');
SELECT idempotency.grant_role('regress_idempotency_webhook', 'webhook');
SELECT idempotency.grant_role('regress_idempotency_observer', 'observer');
SELECT idempotency.grant_role('"regress idempotency ""operator"""', 'operator');
-- again: no harm
SELECT idempotency.grant_role('regress_idempotency_application', 'application');

-- what each may do with each object of the schema
SELECT r.rolname, string_agg(o.name, ', ' ORDER BY o.name COLLATE "C") AS may
FROM pg_roles r,
	LATERAL (
		SELECT p.proname::text || '()' FROM pg_proc p
		WHERE p.pronamespace = 'idempotency'::regnamespace AND has_function_privilege(r.oid, p.oid, 'EXECUTE')
		UNION ALL
		SELECT privilege || ' ' || c.relname FROM pg_class c,
			unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']) privilege
		WHERE c.relnamespace = 'idempotency'::regnamespace AND c.relkind IN ('r', 'v')
			AND has_table_privilege(r.oid, c.oid, privilege)
		UNION ALL
		SELECT privilege || ' ON SCHEMA' FROM unnest(ARRAY['USAGE', 'CREATE']) privilege
		WHERE has_schema_privilege(r.oid, 'idempotency', privilege)
	) o (name)
WHERE r.rolname LIKE 'regress%idempotency%'
GROUP BY r.rolname ORDER BY r.rolname COLLATE "C";

-- and with its types: as columns of tables of one's own, for one
SELECT r.rolname, string_agg(t.typname::text, ', ' ORDER BY t.typname COLLATE "C") AS types
FROM pg_roles r, pg_type t
WHERE r.rolname LIKE 'regress%idempotency%' AND t.typnamespace = 'idempotency'::regnamespace AND t.typelem = 0
	AND has_type_privilege(r.oid, t.oid, 'USAGE')
	-- a table's row type is the table's
	AND NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = t.typrelid AND c.relkind <> 'c')
GROUP BY r.rolname ORDER BY r.rolname COLLATE "C";

-- a role that may do nothing
SET ROLE regress_idempotency_nobody;
SELECT * FROM idempotency.claim('k', 's');
RESET ROLE;

-- every kind at work; what it may not is refused
SET ROLE regress_idempotency_application;
SELECT token FROM idempotency.claim('k', 's', '{"a": 1}', lease => '1 hour') \gset
SELECT idempotency.checkpoint('k', 's', :token, 'p') IS NOT NULL AS done;
SELECT idempotency.extend('k', 's', :token) IS NOT NULL AS done;
SELECT idempotency.record('k', 's', :token, '"secret"') IS NOT NULL AS done;
SELECT verdict, response FROM idempotency.claim('k', 's');
SELECT status FROM idempotency.lookup('k', 's');
SELECT idempotency.operation_uuid('k', 's') IS NOT NULL AS done;
SELECT token FROM idempotency.claim('k2', 's', lease => '1 hour') \gset
SELECT idempotency.release('k2', 's', :token);
SELECT * FROM idempotency.idempotency_keys;
SELECT * FROM idempotency.namespace;
SELECT * FROM idempotency.open_claims;
DELETE FROM idempotency.idempotency_keys;
SELECT * FROM idempotency.stripe_claim('t', 'i');
SELECT idempotency.stripe_lookup('t', 'i');
SELECT idempotency.stripe_namespace('new');
SELECT idempotency.grant_role('regress_idempotency_nobody', 'application');
CREATE TABLE idempotency.mine ();
RESET ROLE;

SET ROLE regress_idempotency_stripe_caller;
SELECT token FROM idempotency.stripe_claim('t', 'i', '{"a": 1}') \gset
SELECT idempotency.stripe_extend('t', 'i', :token) IS NOT NULL AS done;
SELECT idempotency.stripe_record('t', 'i', :token, http_status => 402, response => '{"error": {"type": "card_error"}}');
SELECT left(idempotency.stripe_reopen('t', 'i'), 4) AS key;
SELECT token FROM idempotency.stripe_claim('t', 'i') \gset
SELECT idempotency.stripe_release('t', 'i', :token);
SELECT outcome FROM idempotency.stripe_lookup('t', 'i');
-- who reopened it is the session's user, whatever role it has taken
SELECT history -> 0 ->> 'reopened_by' = session_user AS by FROM idempotency.stripe_lookup('t', 'i');
SELECT * FROM idempotency.stripe_idempotency_keys;
SELECT * FROM idempotency.claim('k', 's');
SELECT * FROM idempotency.lookup('k', 's');
RESET ROLE;

SET ROLE regress_idempotency_observer;
SELECT count(*) FROM idempotency.open_claims;
SELECT * FROM idempotency.lookup('k', 's');
SELECT idempotency.release('k', 's', 1);
SELECT * FROM idempotency.idempotency_keys;
RESET ROLE;

SET ROLE "regress idempotency ""operator""";
SELECT count(*) FROM idempotency.open_claims;
SELECT status FROM idempotency.lookup('k', 's');
SELECT outcome FROM idempotency.stripe_lookup('t', 'i');
SELECT * FROM idempotency.claim('k', 's');
SELECT * FROM idempotency.stripe_claim('t', 'i');
-- may be called, but there is nothing to decide
SELECT idempotency.stripe_namespace('new');
RESET ROLE;

-- a token proves the claim, whoever has it
SET ROLE regress_idempotency_application;
SELECT token FROM idempotency.claim('lent', 's', lease => '1 hour') \gset
RESET ROLE;
SELECT idempotency.record('lent', 's', :token) IS NOT NULL AS done;

-- inside a SECURITY DEFINER function
CREATE FUNCTION public.regress_idempotency_claim(key text) RETURNS text LANGUAGE sql SECURITY DEFINER SET search_path = ''
	AS $$ SELECT verdict::text FROM idempotency.claim(key, 's', lease => '1 hour') $$;
ALTER FUNCTION public.regress_idempotency_claim OWNER TO regress_idempotency_application;
SET ROLE regress_idempotency_nobody;
SELECT public.regress_idempotency_claim('by definer');
RESET ROLE;
DROP FUNCTION public.regress_idempotency_claim;

-- the owner's rights end with the function: a check of the current user sees the caller
SET ROLE regress_idempotency_application;
SELECT current_user, verdict FROM idempotency.claim('k', 's');
SELECT current_user;
-- also after an error in it
SELECT idempotency.record('k', 's', 1);
SELECT current_user;
RESET ROLE;

--
-- A hostile search_path: operators, functions, types and tables of the caller's
--
SELECT idempotency.grant_role('regress_idempotency_application', 'stripe_caller');
SELECT idempotency.grant_role('regress_idempotency_application', 'operator');
CREATE SCHEMA hostile AUTHORIZATION regress_idempotency_application;
SET ROLE regress_idempotency_application;
CREATE TABLE hostile.trapped (what text, who text);
CREATE FUNCTION hostile.trap(what text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO hostile.trapped VALUES (what, current_user);
END $$;
GRANT ALL ON hostile.trapped TO PUBLIC;
CREATE FUNCTION hostile.eq(text, text) RETURNS boolean LANGUAGE plpgsql AS 'BEGIN PERFORM hostile.trap(''text =''); RETURN true; END';
CREATE FUNCTION hostile.eq8(bigint, bigint) RETURNS boolean LANGUAGE plpgsql AS 'BEGIN PERFORM hostile.trap(''bigint =''); RETURN true; END';
CREATE FUNCTION hostile.eq4(int, int) RETURNS boolean LANGUAGE plpgsql AS 'BEGIN PERFORM hostile.trap(''int =''); RETURN true; END';
CREATE FUNCTION hostile.plus(int, int) RETURNS int LANGUAGE plpgsql AS 'BEGIN PERFORM hostile.trap(''int +''); RETURN 0; END';
CREATE FUNCTION hostile.later(timestamptz, interval) RETURNS timestamptz LANGUAGE plpgsql AS 'BEGIN PERFORM hostile.trap(''timestamptz +''); RETURN $1; END';
CREATE FUNCTION hostile.le(timestamptz, timestamptz) RETURNS boolean LANGUAGE plpgsql AS 'BEGIN PERFORM hostile.trap(''timestamptz <=''); RETURN true; END';
CREATE FUNCTION hostile.eqo(idempotency.outcome, idempotency.outcome) RETURNS boolean LANGUAGE plpgsql AS 'BEGIN PERFORM hostile.trap(''outcome =''); RETURN true; END';
CREATE FUNCTION hostile.cat(jsonb, jsonb) RETURNS jsonb LANGUAGE plpgsql AS 'BEGIN PERFORM hostile.trap(''jsonb ||''); RETURN $1; END';
CREATE OPERATOR hostile.= (FUNCTION = hostile.eq, LEFTARG = text, RIGHTARG = text);
CREATE OPERATOR hostile.= (FUNCTION = hostile.eq8, LEFTARG = bigint, RIGHTARG = bigint);
CREATE OPERATOR hostile.= (FUNCTION = hostile.eq4, LEFTARG = int, RIGHTARG = int);
CREATE OPERATOR hostile.+ (FUNCTION = hostile.plus, LEFTARG = int, RIGHTARG = int);
CREATE OPERATOR hostile.+ (FUNCTION = hostile.later, LEFTARG = timestamptz, RIGHTARG = interval);
CREATE OPERATOR hostile.<= (FUNCTION = hostile.le, LEFTARG = timestamptz, RIGHTARG = timestamptz);
CREATE OPERATOR hostile.= (FUNCTION = hostile.eqo, LEFTARG = idempotency.outcome, RIGHTARG = idempotency.outcome);
CREATE OPERATOR hostile.|| (FUNCTION = hostile.cat, LEFTARG = jsonb, RIGHTARG = jsonb);
CREATE FUNCTION hostile.now() RETURNS timestamptz LANGUAGE plpgsql AS 'BEGIN PERFORM hostile.trap(''now()''); RETURN NULL; END';
CREATE FUNCTION hostile.clock_timestamp() RETURNS timestamptz LANGUAGE plpgsql AS 'BEGIN PERFORM hostile.trap(''clock_timestamp()''); RETURN NULL; END';
CREATE FUNCTION hostile.array_append(bigint[], bigint) RETURNS bigint[] LANGUAGE plpgsql AS 'BEGIN PERFORM hostile.trap(''array_append()''); RETURN NULL; END';
CREATE FUNCTION hostile.format(text, VARIADIC text[]) RETURNS text LANGUAGE plpgsql AS 'BEGIN PERFORM hostile.trap(''format()''); RETURN NULL; END';
CREATE TYPE hostile.outcome AS ENUM ('completed');
CREATE TABLE hostile.idempotency_keys (LIKE hostile.trapped);
CREATE TABLE hostile.namespace (LIKE hostile.trapped);
CREATE TEMP TABLE idempotency_keys (x int);
CREATE TEMP TABLE stripe_idempotency_keys (x int);
CREATE TEMP TABLE namespace (x int);
-- does the trap work?
SET search_path = hostile, pg_catalog, pg_temp;
SELECT 'a'::text = 'b'::text AS trapped;
SELECT count(*) OPERATOR(pg_catalog.>) 0 AS trapped FROM hostile.trapped;
DELETE FROM hostile.trapped;

-- the whole life of a key, in a session without plans of its own
RESET ROLE;
\c -
\set VERBOSITY terse
SET ROLE regress_idempotency_application;
SET search_path = hostile, pg_catalog, pg_temp;
SELECT token FROM idempotency.claim('h', 's', '{"a": 1}', ttl => '1 hour', lease => '1 microsecond') \gset
SELECT verdict, attempt FROM idempotency.claim('h', 's', '{"a": 1}', lease => '1 hour', wait => false);
SELECT verdict FROM idempotency.claim('h', 's', '{"a": 2}');
SELECT token FROM idempotency.claim('h2', 's', '{"a": 1}', lease => '1 hour') \gset
SELECT idempotency.checkpoint('h2', 's', :token, 'p', '[]') IS NOT NULL AS done;
SELECT idempotency.extend('h2', 's', :token) IS NOT NULL AS done;
SELECT idempotency.record('h2', 's', :token, '"r"', ttl => '1 microsecond') IS NOT NULL AS done;
SELECT verdict, attempt, token FROM idempotency.claim('h2', 's', lease => '1 hour') \gset
SELECT idempotency.release('h2', 's', :token);
SELECT status FROM idempotency.lookup('h', 's');
SELECT idempotency.operation_uuid('h', 's') IS NOT NULL AS done;
SELECT token FROM idempotency.stripe_claim('h', '1', '{"a": 1}', lease => '1 microsecond') \gset
SELECT token FROM idempotency.stripe_claim('h', '1', '{"a": 1}') \gset
SELECT idempotency.stripe_extend('h', '1', :token) IS NOT NULL AS done;
SELECT idempotency.stripe_record('h', '1', :token, http_status => 402, response => '{"error": {"type": "card_error"}}');
SELECT pg_catalog.left(idempotency.stripe_reopen('h', '1'), 4) AS key;
SELECT token FROM idempotency.stripe_claim('h', '1') \gset
SELECT idempotency.stripe_release('h', '1', :token);
SELECT outcome FROM idempotency.stripe_lookup('h', '1');
SELECT count(*) FROM idempotency.open_claims;
SELECT idempotency.stripe_namespace('new');
-- nothing fell into the trap
SELECT * FROM hostile.trapped;
RESET search_path;

-- grant_role with it, too; and by whom doesn't own anything
RESET ROLE;
SET search_path = hostile, pg_catalog, pg_temp;
SELECT idempotency.grant_role('regress_idempotency_nobody', 'observer');
SELECT * FROM hostile.trapped;
RESET search_path;
-- also where the types of its overloaded functions are somebody's
CREATE DOMAIN hostile.text AS pg_catalog.int4;
CREATE DOMAIN hostile.bytea AS pg_catalog.int4;
SET search_path = hostile, pg_catalog, pg_temp;
SELECT idempotency.grant_role('regress_idempotency_nobody', 'webhook');
RESET search_path;
DROP DOMAIN hostile.text, hostile.bytea;
GRANT EXECUTE ON FUNCTION idempotency.grant_role TO regress_idempotency_application;
SET ROLE regress_idempotency_application;
SELECT idempotency.grant_role('regress_idempotency_nobody', 'application');
RESET ROLE;

-- what a role was given is taken back with it
SET client_min_messages = warning;
DROP OWNED BY regress_idempotency_nobody, regress_idempotency_application, regress_idempotency_stripe_caller,
	regress_idempotency_webhook, regress_idempotency_observer, "regress idempotency ""operator""" CASCADE;
DROP ROLE regress_idempotency_nobody, regress_idempotency_application, regress_idempotency_stripe_caller,
	regress_idempotency_webhook, regress_idempotency_observer, "regress idempotency ""operator""";
DELETE FROM idempotency.idempotency_keys;
DELETE FROM idempotency.stripe_idempotency_keys;
