--
-- What isn't meant for others stays hidden: whatever default privileges say,
-- behind views, and in errors of constraints that an owner has added
--
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS idempotency;
RESET client_min_messages;
\set SHOW_CONTEXT never

CREATE ROLE regress_idempotency_reader;
CREATE ROLE regress_idempotency_watcher;
SELECT idempotency.grant_role('regress_idempotency_watcher', 'observer');

--
-- Default privileges
--
SELECT current_database() AS here \gset
SET client_min_messages = warning;
DROP DATABASE IF EXISTS regress_idempotency_defaults;
RESET client_min_messages;
CREATE DATABASE regress_idempotency_defaults;
\c regress_idempotency_defaults
ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO regress_idempotency_reader WITH GRANT OPTION;
ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO PUBLIC;
ALTER DEFAULT PRIVILEGES GRANT ALL ON FUNCTIONS TO regress_idempotency_reader;
ALTER DEFAULT PRIVILEGES GRANT ALL ON SEQUENCES TO regress_idempotency_reader;
ALTER DEFAULT PRIVILEGES GRANT ALL ON TYPES TO regress_idempotency_reader;
ALTER DEFAULT PRIVILEGES GRANT ALL ON SCHEMAS TO regress_idempotency_reader;
CREATE EXTENSION idempotency;

-- who has what, but for the owner: nobody anything
SELECT o.kind, o.name, a.grantee::regrole, a.privilege_type
FROM (
	SELECT 'schema', nspname::text, nspowner, coalesce(nspacl, acldefault('n', nspowner))
	FROM pg_namespace WHERE nspname = 'idempotency'
	UNION ALL
	SELECT 'relation', relname, relowner, coalesce(relacl, acldefault(CASE relkind WHEN 'S' THEN 's'::"char" ELSE 'r' END, relowner))
	FROM pg_class WHERE relnamespace = 'idempotency'::regnamespace AND relkind <> 'c' AND relkind <> 'i'
	UNION ALL
	SELECT 'function', proname, proowner, coalesce(proacl, acldefault('f', proowner))
	FROM pg_proc WHERE pronamespace = 'idempotency'::regnamespace
	UNION ALL
	SELECT 'type', t.typname, t.typowner, coalesce(t.typacl, acldefault('T', t.typowner))
	FROM pg_type t LEFT JOIN pg_class c ON c.oid = t.typrelid
	WHERE t.typnamespace = 'idempotency'::regnamespace AND t.typelem = 0 AND (c.oid IS NULL OR c.relkind = 'c')
) o (kind, name, owner, acl), aclexplode(o.acl) a
WHERE a.grantee <> o.owner
ORDER BY 1, 2, 3, 4;

-- and what a dump restores is what the script leaves
SELECT count(*) FROM pg_init_privs p, aclexplode(p.initprivs) a
WHERE a.grantee <> a.grantor AND p.classoid = 'pg_class'::regclass
	AND p.objoid IN (SELECT oid FROM pg_class WHERE relnamespace = 'idempotency'::regnamespace);

SELECT idempotency.grant_role('regress_idempotency_reader', 'observer');
SET ROLE regress_idempotency_reader;
SELECT * FROM idempotency.idempotency_keys;
SELECT * FROM idempotency.open_claims;
RESET ROLE;
DROP EXTENSION idempotency;
\c :here
DROP DATABASE regress_idempotency_defaults;
\set SHOW_CONTEXT never

--
-- Views: a cheap function in WHERE sees no more than the view shows
--
BEGIN;
SELECT token FROM idempotency.claim('exposure-done', 'exposure') \gset
SELECT idempotency.record('exposure-done', 'exposure', :token, '{"secret": true}') IS NOT NULL AS done;
COMMIT;
SELECT token FROM idempotency.claim('exposure-open', 'exposure', lease => '1 hour') \gset
CREATE SCHEMA regress_idempotency_watcher AUTHORIZATION regress_idempotency_watcher;
SET ROLE regress_idempotency_watcher;
CREATE FUNCTION regress_idempotency_watcher.sees(text) RETURNS boolean LANGUAGE plpgsql COST 0.0000001 AS $$
BEGIN
	RAISE NOTICE 'seen: %', $1;
	RETURN true;
END
$$;
RESET ROLE;

SET ROLE regress_idempotency_watcher;
SELECT key, attempt FROM idempotency.open_claims WHERE regress_idempotency_watcher.sees(key) AND scope = 'exposure';
RESET ROLE;

--
-- Errors: a row that an owner's constraint refuses is not quoted
--
ALTER TABLE idempotency.idempotency_keys ADD CONSTRAINT no_marker
	CHECK (response::text NOT LIKE '%marker%') NOT VALID;
SELECT idempotency.record('exposure-open', 'exposure', :token, '{"marker": "secret"}');
ALTER TABLE idempotency.idempotency_keys DROP CONSTRAINT no_marker;
ALTER TABLE idempotency.stripe_idempotency_keys ADD CONSTRAINT no_marker
	CHECK (response::text NOT LIKE '%marker%') NOT VALID;
SELECT token FROM idempotency.stripe_claim('exposure', '1') \gset
SELECT idempotency.stripe_record('exposure', '1', :token, response => '{"id": "pi_1", "marker": "secret"}', http_status => 200);
ALTER TABLE idempotency.stripe_idempotency_keys DROP CONSTRAINT no_marker;
CREATE UNIQUE INDEX one_marker ON idempotency.stripe_idempotency_keys ((response ->> 'marker'));
SELECT idempotency.stripe_record('exposure', '1', :token, response => '{"id": "pi_1", "marker": "secret"}', http_status => 200);
SELECT token FROM idempotency.stripe_claim('exposure', '2') \gset
SELECT idempotency.stripe_record('exposure', '2', :token, response => '{"id": "pi_2", "marker": "secret"}', http_status => 200);
DROP INDEX idempotency.one_marker;

DELETE FROM idempotency.idempotency_keys WHERE scope = 'exposure';
DELETE FROM idempotency.stripe_idempotency_keys WHERE operation_type = 'exposure';
DROP SCHEMA regress_idempotency_watcher CASCADE;
DROP OWNED BY regress_idempotency_watcher;
DROP ROLE regress_idempotency_reader, regress_idempotency_watcher;
