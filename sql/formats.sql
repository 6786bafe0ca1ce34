--
-- Derived keys, UUIDs and fingerprints are those of doc/formats.md: its test
-- vectors, which another implementation (test/vectors/formats.py) makes, too
--
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS idempotency;
RESET client_min_messages;
\set SHOW_CONTEXT never
\set vectors `cat "$PG_ABS_SRCDIR/test/vectors/formats.json"`
CREATE TEMP TABLE vectors AS SELECT :'vectors'::jsonb AS v;

BEGIN;
SET LOCAL idempotency.stripe_ledger = transaction;
-- a namespace made elsewhere is in force
INSERT INTO idempotency.namespace (value, system_identifier, database, created_at)
	SELECT decode(v ->> 'namespace', 'hex'), 1, 1, '2020-01-01' FROM vectors;

SELECT count(*), count(*) FILTER (WHERE idempotency.operation_uuid(u ->> 'key', u ->> 'scope') = (u ->> 'uuid')::uuid) AS right
FROM vectors, jsonb_array_elements(v -> 'operation_uuid') u;

-- each generation has a key of its own
CREATE FUNCTION pg_temp.key_of(type text, id text, account text, generation int) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
	t bigint;
	k text;
BEGIN
	k := idempotency.stripe_idempotency_key(type, id, account);
	FOR g IN 2 .. generation LOOP
		IF (SELECT l.generation FROM idempotency.stripe_lookup(type, id, account) l) >= g THEN
			CONTINUE;
		END IF;
		SELECT token INTO STRICT t FROM idempotency.stripe_claim(type, id, account => account);
		PERFORM idempotency.stripe_record(type, id, t, http_status => 402, response => '{"error": {"type": "card_error"}}', account => account);
		k := idempotency.stripe_reopen(type, id, account);
	END LOOP;
	RETURN k;
END $$;
SELECT count(*), count(*) FILTER (WHERE pg_temp.key_of(u ->> 'operation_type', u ->> 'operation_id', u ->> 'account',
	(u ->> 'generation')::int) = u ->> 'key') AS right, max(length(u ->> 'key')) AS longest
FROM (SELECT u FROM vectors, jsonb_array_elements(v -> 'stripe_key') WITH ORDINALITY e (u, n)
	-- the format takes any account, the functions only what Stripe does
	WHERE u ->> 'account' ~ '^[!-~]*$'
	ORDER BY (u ->> 'generation')::int, n) o;

-- fingerprints: version, id of the namespace, HMAC
CREATE FUNCTION pg_temp.print_of(request jsonb, ignore text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
	f bytea;
BEGIN
	PERFORM set_config('idempotency.stripe_compare_ignore', ignore, true);
	-- the ledger of calls to Stripe takes objects
	IF jsonb_typeof(request) = 'object' THEN
		PERFORM verdict FROM idempotency.stripe_claim('print', 'of', request);
		SELECT fingerprint INTO STRICT f FROM idempotency.stripe_idempotency_keys WHERE operation_type = 'print';
		DELETE FROM idempotency.stripe_idempotency_keys WHERE operation_type = 'print';
	END IF;
	IF ignore = '' OR f IS NULL THEN
		-- the ledger of requests takes anything, and has the same for an object
		PERFORM verdict FROM idempotency.claim('print', 'of', request, lease => '1 hour');
		SELECT CASE WHEN f <> fingerprint THEN '\x00' ELSE fingerprint END INTO STRICT f
		FROM idempotency.idempotency_keys WHERE scope = 'of';
		DELETE FROM idempotency.idempotency_keys WHERE scope = 'of';
	END IF;
	RETURN encode(f, 'hex');
END $$;
SELECT count(*), count(*) FILTER (WHERE f = u ->> 'fingerprint') AS right,
	count(*) FILTER (WHERE u -> 'ignore' <> '[]') AS with_ignored_members
FROM vectors, jsonb_array_elements(v -> 'fingerprint') u,
	LATERAL (SELECT string_agg(i, ', ') FROM jsonb_array_elements_text(u -> 'ignore') i) s (ignored),
	LATERAL pg_temp.print_of((u ->> 'request')::jsonb, COALESCE(ignored, '')) f;
-- the wrong ones, if any
SELECT u ->> 'name' AS name, f
FROM vectors, jsonb_array_elements(v -> 'fingerprint') u,
	LATERAL (SELECT string_agg(i, ', ') FROM jsonb_array_elements_text(u -> 'ignore') i) s (ignored),
	LATERAL pg_temp.print_of((u ->> 'request')::jsonb, COALESCE(ignored, '')) f
WHERE f <> u ->> 'fingerprint';

-- the id in a fingerprint is that of the namespace
SELECT bool_and(substr(u ->> 'fingerprint', 1, 18) = '01' || (v ->> 'namespace_id')) AS right
FROM vectors, jsonb_array_elements(v -> 'fingerprint') u;

-- no request is too much: a large one, a deep one, one of many members, numbers of all sizes
SELECT count(*)
FROM (VALUES (to_jsonb(repeat('x', 5000000))), ((repeat('[', 3000) || repeat(']', 3000))::jsonb),
	((SELECT jsonb_object_agg(i, i) FROM generate_series(1, 50000) i)),
	('1e131071'), ('1e-16383'), ('-1e131071')) v (r),
	LATERAL idempotency.claim(md5(r::text), 'much', r, lease => '1 hour');
SELECT count(DISTINCT fingerprint), max(length(fingerprint)) FROM idempotency.idempotency_keys WHERE scope = 'much';
ROLLBACK;

-- a request that nests without end is an error, not a crash
\set VERBOSITY sqlstate
SELECT verdict FROM idempotency.claim('deep', 's', (repeat('[', 100000) || repeat(']', 100000))::jsonb, lease => '1 hour');
\set VERBOSITY default
DELETE FROM idempotency.idempotency_keys;

-- what a namespace has to say about a restored row: compared with the one it was made with
SELECT verdict FROM idempotency.claim('before', 's', '{"a": 1}', lease => '1 hour');
BEGIN;
INSERT INTO idempotency.namespace (value, system_identifier, database, created_at)
	VALUES (decode(repeat('ab', 32), 'hex'), 1, 1, '2020-01-01');
SELECT verdict FROM idempotency.claim('before', 's', '{"a": 1}');
SELECT verdict FROM idempotency.claim('before', 's', '{"a": 2}');
-- lost: nothing can be said
DELETE FROM idempotency.namespace WHERE value <> decode(repeat('ab', 32), 'hex');
SAVEPOINT s;
SELECT verdict FROM idempotency.claim('before', 's', '{"a": 1}');
ROLLBACK TO s;
SELECT verdict FROM idempotency.claim('before', 's');
-- none at all
DELETE FROM idempotency.namespace;
SAVEPOINT s;
SELECT idempotency.operation_uuid('k', 's');
ROLLBACK TO s;
SELECT idempotency.stripe_idempotency_key('t', 'i');
ROLLBACK TO s;
SELECT verdict FROM idempotency.claim('new', 's', '{"a": 1}', lease => '1 hour');
ROLLBACK TO s;
-- what isn't derived goes on
SELECT verdict FROM idempotency.claim('new', 's', lease => '1 hour');
SELECT idempotency.stripe_namespace('keep');
ROLLBACK TO s;
SELECT idempotency.stripe_namespace('new');
SELECT idempotency.stripe_idempotency_key('t', 'i') IS NOT NULL AS works;
-- damaged
UPDATE idempotency.namespace SET value = '\x00';
SELECT idempotency.stripe_idempotency_key('t', 'i');
ROLLBACK;

-- decided already
SELECT idempotency.stripe_namespace('keep');
SELECT idempotency.stripe_namespace('new');
SELECT count(*) AS namespaces FROM idempotency.namespace;
DELETE FROM idempotency.idempotency_keys;
