--
-- CREATE EXTENSION, what it leaves in the catalogs, and doing it again
--
\set VERBOSITY terse

CREATE EXTENSION idempotency;

SELECT extversion, extrelocatable FROM pg_extension WHERE extname = 'idempotency';

-- the schema is the extension's own
SELECT n.nspname, d.deptype
FROM pg_namespace n
	LEFT JOIN pg_depend d ON d.classid = 'pg_namespace'::regclass AND d.objid = n.oid
		AND d.refclassid = 'pg_extension'::regclass
WHERE n.nspname = 'idempotency';

\pset format unaligned
-- no function is STRICT or runs with other rights than its caller's
SELECT p.proname, pg_get_function_arguments(p.oid) AS arguments, p.prorettype::regtype AS result,
	p.provolatile, p.proparallel, p.proisstrict, p.prosecdef, p.proconfig
FROM pg_proc p
WHERE p.pronamespace = 'idempotency'::regnamespace
ORDER BY p.proname COLLATE "C", pg_get_function_arguments(p.oid) COLLATE "C";

-- tables, views and composite types
SELECT c.relname, c.relkind, c.reloptions,
	string_agg(a.attname || ' ' || format_type(a.atttypid, a.atttypmod) ||
		CASE WHEN a.attnotnull THEN ' not null' ELSE '' END, ', ' ORDER BY a.attnum) AS columns
FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
WHERE c.relnamespace = 'idempotency'::regnamespace AND c.relkind <> 'i'
	AND a.attnum > 0 AND NOT a.attisdropped
GROUP BY c.oid, c.relname, c.relkind, c.reloptions
ORDER BY c.relkind, c.relname COLLATE "C";
\pset format aligned

SELECT i.indexrelid::regclass AS index, pg_get_indexdef(i.indexrelid) AS definition
FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid
WHERE c.relnamespace = 'idempotency'::regnamespace
ORDER BY 1;

-- a new collation of the operating system must not hide a key
SELECT a.attrelid::regclass AS relation, a.attname, a.attcollation::regcollation
FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey)
WHERE i.indisprimary AND i.indrelid IN ('idempotency.idempotency_keys'::regclass,
	'idempotency.stripe_webhook_events'::regclass,
	'idempotency.stripe_idempotency_keys'::regclass)
ORDER BY 1, a.attnum;

SELECT t.typname, string_agg(e.enumlabel, ', ' ORDER BY e.enumsortorder) AS labels
FROM pg_type t JOIN pg_enum e ON e.enumtypid = t.oid
WHERE t.typnamespace = 'idempotency'::regnamespace
GROUP BY t.typname ORDER BY t.typname COLLATE "C";

-- pg_dump carries every row
SELECT c.oid::regclass AS relation, e.extconfig IS NOT NULL AS dumped, e.condition
FROM pg_class c
	LEFT JOIN (SELECT unnest(extconfig), unnest(extcondition) FROM pg_extension
		WHERE extname = 'idempotency') e (extconfig, condition) ON e.extconfig = c.oid
WHERE c.relnamespace = 'idempotency'::regnamespace AND c.relkind = 'r'
ORDER BY 1;

-- everything has a comment: nothing is listed
SELECT pg_describe_object(d.classid, d.objid, 0) AS "without a comment"
FROM pg_depend d LEFT JOIN pg_type t ON d.classid = 'pg_type'::regclass AND d.objid = t.oid
WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e'
	AND d.refobjid = (SELECT oid FROM pg_extension WHERE extname = 'idempotency')
	-- a table's row type has the table's
	AND (t.oid IS NULL OR t.typelem = 0
		AND NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = t.typrelid AND c.relkind <> 'c'))
	AND COALESCE(obj_description(d.objid, d.classid::regclass::name), '') = ''
UNION ALL
SELECT pg_describe_object('pg_class'::regclass, a.attrelid, a.attnum)
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
WHERE c.relnamespace = 'idempotency'::regnamespace AND c.relkind <> 'i'
	AND a.attnum > 0 AND NOT a.attisdropped
	AND COALESCE(col_description(a.attrelid, a.attnum), '') = ''
UNION ALL
SELECT pg_describe_object('pg_namespace'::regclass, n.oid, 0)
FROM pg_namespace n
WHERE n.nspname = 'idempotency' AND COALESCE(obj_description(n.oid, 'pg_namespace'), '') = ''
ORDER BY 1;

-- nothing is granted to PUBLIC: nothing is listed
SELECT o.object, a.privilege_type AS "granted to public"
FROM (
		SELECT pg_describe_object('pg_namespace'::regclass, oid, 0),
			COALESCE(nspacl, acldefault('n', nspowner))
		FROM pg_namespace WHERE nspname = 'idempotency'
		UNION ALL
		SELECT pg_describe_object('pg_proc'::regclass, oid, 0),
			COALESCE(proacl, acldefault('f', proowner))
		FROM pg_proc WHERE pronamespace = 'idempotency'::regnamespace
		UNION ALL
		SELECT pg_describe_object('pg_class'::regclass, oid, 0),
			COALESCE(relacl, acldefault('r', relowner))
		FROM pg_class WHERE relnamespace = 'idempotency'::regnamespace AND relkind IN ('r', 'v', 'S')
		UNION ALL
		SELECT pg_describe_object('pg_class'::regclass, a.attrelid, a.attnum), a.attacl
		FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
		WHERE c.relnamespace = 'idempotency'::regnamespace AND a.attacl IS NOT NULL
		UNION ALL
		SELECT pg_describe_object('pg_type'::regclass, t.oid, 0),
			COALESCE(t.typacl, acldefault('T', t.typowner))
		FROM pg_type t LEFT JOIN pg_class c ON c.oid = t.typrelid
		WHERE t.typnamespace = 'idempotency'::regnamespace AND t.typelem = 0
			AND (c.oid IS NULL OR c.relkind = 'c')
	) o (object, acl),
	LATERAL aclexplode(o.acl) a
WHERE a.grantee = 0
ORDER BY 1, 2;

-- settings
SELECT name, setting, unit, context, vartype, min_val, max_val, enumvals
FROM pg_settings WHERE name LIKE 'idempotency.%'
ORDER BY name COLLATE "C";
SET idempotency.no_such_setting = 1;

-- only a superuser installs it, and never into somebody else's schema
CREATE ROLE regress_idempotency_nobody;
SET ROLE regress_idempotency_nobody;
SELECT * FROM idempotency.lookup('key', 'scope');
SELECT * FROM idempotency.open_claims;
RESET ROLE;
DROP EXTENSION idempotency;
SET ROLE regress_idempotency_nobody;
CREATE EXTENSION idempotency;
RESET ROLE;
CREATE SCHEMA idempotency AUTHORIZATION regress_idempotency_nobody;
CREATE EXTENSION idempotency;
DROP SCHEMA idempotency;
DROP ROLE regress_idempotency_nobody;

--
-- Drop and create again under a session that keeps plans, OIDs and enum values
--
CREATE EXTENSION idempotency;

PREPARE requests AS
	SELECT c.verdict::text, c.attempt, c.response,
		CASE WHEN c.verdict = 'claimed'
			THEN idempotency.record('key', 'scope', c.token, '{"n": 1}') IS NOT NULL END AS recorded
	FROM idempotency.claim('key', 'scope', '{"a": 1}') c;
PREPARE calls AS
	SELECT c.verdict::text, c.outcome::text, c.attempt,
		CASE WHEN c.verdict = 'claimed'
			THEN idempotency.stripe_record('charge', 'order_1', c.token, 'ch_1')::text END AS recorded
	FROM idempotency.stripe_claim('charge', 'order_1', '{"a": 1}') c;
PREPARE shown AS
	SELECT (SELECT status FROM idempotency.lookup('key', 'scope')) AS request,
		(SELECT outcome::text FROM idempotency.stripe_lookup('charge', 'order_1')) AS call,
		(SELECT count(*) FROM idempotency.open_claims) AS open;
CREATE TEMP TABLE derived (uuid uuid, key text);

EXECUTE requests;
EXECUTE requests;
EXECUTE calls;
EXECUTE calls;
EXECUTE shown;
INSERT INTO derived SELECT idempotency.operation_uuid('key', 'scope'),
	idempotency.stripe_idempotency_key('charge', 'order_1');

DROP EXTENSION idempotency;
EXECUTE requests;
EXECUTE shown;
SELECT * FROM idempotency.lookup('key', 'scope');

CREATE EXTENSION idempotency;
EXECUTE shown;
EXECUTE requests;
EXECUTE requests;
EXECUTE calls;
EXECUTE calls;
EXECUTE shown;
-- another namespace
INSERT INTO derived SELECT idempotency.operation_uuid('key', 'scope'),
	idempotency.stripe_idempotency_key('charge', 'order_1');
SELECT count(DISTINCT uuid), count(DISTINCT key) FROM derived;

-- drop, create and use it in a transaction that rolls back: all is as before
BEGIN;
SET LOCAL idempotency.stripe_ledger = transaction;
DROP EXTENSION idempotency;
CREATE EXTENSION idempotency;
EXECUTE requests;
EXECUTE requests;
EXECUTE calls;
EXECUTE calls;
EXECUTE shown;
ROLLBACK;
EXECUTE requests;
EXECUTE calls;
EXECUTE shown;
INSERT INTO derived SELECT idempotency.operation_uuid('key', 'scope'),
	idempotency.stripe_idempotency_key('charge', 'order_1');
SELECT count(DISTINCT uuid), count(DISTINCT key) FROM derived;

BEGIN;
DROP EXTENSION idempotency;
ROLLBACK;
EXECUTE requests;
EXECUTE calls;

DROP EXTENSION idempotency;
BEGIN;
SET LOCAL idempotency.stripe_ledger = transaction;
CREATE EXTENSION idempotency;
EXECUTE requests;
EXECUTE calls;
ROLLBACK;
EXECUTE requests;
CREATE EXTENSION idempotency;
EXECUTE requests;
EXECUTE calls;
EXECUTE shown;

-- in a savepoint, too
BEGIN;
SET LOCAL idempotency.stripe_ledger = transaction;
SAVEPOINT s;
DROP EXTENSION idempotency;
CREATE EXTENSION idempotency;
EXECUTE requests;
EXECUTE calls;
ROLLBACK TO s;
EXECUTE requests;
EXECUTE calls;
COMMIT;

-- the commit of a drop is no way around an open claim
BEGIN;
SELECT verdict FROM idempotency.claim('another key', 'scope');
DROP EXTENSION idempotency;
COMMIT;
EXECUTE shown;

-- a new session
\c -
SELECT verdict FROM idempotency.claim('key', 'scope');
DROP EXTENSION idempotency;
CREATE EXTENSION idempotency;
SELECT verdict FROM idempotency.claim('key', 'scope', lease => '1 hour');
DROP EXTENSION idempotency;
