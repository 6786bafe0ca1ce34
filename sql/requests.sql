--
-- claim(), record() and what else a claimant does: verdicts and transitions
--
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS idempotency;
RESET client_min_messages;
\set SHOW_CONTEXT never

-- all of an answer that isn't NULL; the time and the random as true or false
CREATE FUNCTION pg_temp.shown(c idempotency.claim_result) RETURNS jsonb
LANGUAGE sql AS $$
	SELECT jsonb_strip_nulls(to_jsonb(c) || jsonb_build_object(
		'token', c.token BETWEEN 1 AND 9007199254740991,
		'retry_after', c.retry_after >= 1,
		'lease_expires_at', c.lease_expires_at > clock_timestamp(),
		'expires_at', c.expires_at > clock_timestamp()))
$$;

--
-- The two ways of use
--

-- one transaction: claim, work, record, commit
BEGIN;
SELECT token, pg_temp.shown(c) FROM idempotency.claim('one', 'shop') c \gset
\echo :shown
-- the transaction that holds the key meets it in progress
SELECT pg_temp.shown(c) FROM idempotency.claim('one', 'shop') c;
SELECT pg_temp.shown(c) FROM idempotency.claim('one', 'shop', wait => false) c;
SELECT idempotency.record('one', 'shop', :token, '{"order": 1}', 201) - clock_timestamp()
	BETWEEN '23:59:00' AND '24:00:00' AS a_day;
SELECT pg_temp.shown(c) FROM idempotency.claim('one', 'shop') c;
COMMIT;
SELECT pg_temp.shown(c) FROM idempotency.claim('one', 'shop') c;
SELECT pg_temp.shown(c) FROM idempotency.claim('one', 'shop', wait => false) c;
SELECT pg_temp.shown(c) FROM idempotency.claim('one', 'shop', lease => '1 hour') c;

-- a rollback makes the key absent again
BEGIN;
SELECT pg_temp.shown(c) FROM idempotency.claim('two', 'shop') c;
ROLLBACK;
BEGIN;
SELECT token, pg_temp.shown(c) FROM idempotency.claim('two', 'shop') c \gset
\echo :shown
SELECT idempotency.record('two', 'shop', :token) IS NOT NULL AS recorded;
ROLLBACK;
SELECT idempotency.lookup('two', 'shop') IS NULL AS absent;

-- claim with a lease, commit, work elsewhere, record
SELECT token, pg_temp.shown(c) FROM idempotency.claim('three', 'shop', lease => '1 hour') c \gset
\echo :shown
SELECT pg_temp.shown(c) FROM idempotency.claim('three', 'shop') c;
SELECT pg_temp.shown(c) FROM idempotency.claim('three', 'shop', wait => false) c;
SELECT pg_temp.shown(c) FROM idempotency.claim('three', 'shop', lease => '1 hour') c;
SELECT retry_after BETWEEN 3000 AND 3600 AS an_hour FROM idempotency.claim('three', 'shop');
SELECT idempotency.record('three', 'shop', :token, response_status => 204) IS NOT NULL AS recorded;
SELECT pg_temp.shown(c) FROM idempotency.claim('three', 'shop') c;

-- keys of different scopes have nothing to do with each other, nor key with scope
SELECT pg_temp.shown(c) FROM idempotency.claim('one', 'another shop', lease => '1 hour') c;
SELECT pg_temp.shown(c) FROM idempotency.claim('one', '', lease => '1 hour') c;
SELECT pg_temp.shown(c) FROM idempotency.claim('shop', 'one', lease => '1 hour') c;
SELECT pg_temp.shown(c) FROM idempotency.claim('One', 'shop', lease => '1 hour') c;
SELECT pg_temp.shown(c) FROM idempotency.claim('one ', 'shop', lease => '1 hour') c;
SELECT pg_temp.shown(c) FROM idempotency.claim(' one', 'shop', lease => '1 hour') c;
SELECT pg_temp.shown(c) FROM idempotency.claim('one', 'shop ', lease => '1 hour') c;
SELECT l.scope, l.key, l.status, l.attempt, l.http_status, l.response, l.has_request, l.lease, l.lapsed,
	l.lease_expires_at > l.claimed_at AS leased, l.recorded_at >= l.claimed_at AS recorded,
	l.expires_at > l.recorded_at AS expires
FROM idempotency.idempotency_keys k, LATERAL idempotency.lookup(k.key, k.scope) l
ORDER BY k.scope, k.key;

-- what hasn't happened yet is NULL
SELECT * FROM idempotency.lookup('never claimed', 'shop');
SELECT idempotency.lookup('never claimed', 'shop') IS NULL AS absent;

--
-- mismatch: nothing runs, and nothing of the other request is shown
--
SELECT token FROM idempotency.claim('m', 'shop', '{"amount": 1}', lease => '1 hour') \gset
SELECT c FROM idempotency.claim('m', 'shop', '{"amount": 2}') c;
SELECT idempotency.checkpoint('m', 'shop', :token, 'charged', '{"secret": 1}') IS NOT NULL AS kept;
SELECT c FROM idempotency.claim('m', 'shop', '{"amount": 2}', lease => '1 hour') c;
SELECT c FROM idempotency.claim('m', 'shop', '{"amount": 2}', wait => false) c;
-- lapsed: still another request, which doesn't take it over
UPDATE idempotency.idempotency_keys SET lease_expires_at = now() - interval '1 second' WHERE key = 'm';
SELECT c FROM idempotency.claim('m', 'shop', '{"amount": 2}', lease => '1 hour') c;
SELECT pg_temp.shown(c) FROM idempotency.claim('m', 'shop', '{"amount": 1}', lease => '1 hour') c;
SELECT token FROM idempotency.idempotency_keys WHERE key = 'm' \gset
-- recorded
SELECT idempotency.record('m', 'shop', :token, '{"secret": 2}', 200, '{"X": "secret"}', '\x73') IS NOT NULL AS recorded;
SELECT c FROM idempotency.claim('m', 'shop', '{"amount": 2}') c;
SELECT c FROM idempotency.claim('m', 'shop', '{}') c;
SELECT pg_temp.shown(c) FROM idempotency.claim('m', 'shop', '{"amount": 1}') c;
-- expired: a new life, with whatever request
UPDATE idempotency.idempotency_keys SET expires_at = now() - interval '1 second' WHERE key = 'm';
SELECT pg_temp.shown(c) FROM idempotency.claim('m', 'shop', '{"amount": 2}', lease => '1 hour') c;
SELECT c FROM idempotency.claim('m', 'shop', '{"amount": 1}') c;

-- compared by value
CREATE FUNCTION pg_temp.same(a jsonb, b jsonb) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
	t bigint;
	v idempotency.verdict;
BEGIN
	SELECT token INTO STRICT t FROM idempotency.claim('compared', 'shop', a, lease => '1 hour');
	SELECT verdict INTO STRICT v FROM idempotency.claim('compared', 'shop', b);
	PERFORM idempotency.release('compared', 'shop', t);
	RETURN CASE v WHEN 'in_progress' THEN true WHEN 'mismatch' THEN false END;
END $$;
SELECT a, b, pg_temp.same(a, b), a = b AS equal
FROM (VALUES
	('{"a": 1, "b": 2}'::jsonb, '{"b": 2, "a": 1}'::jsonb),
	('1', '1.0'), ('1', '1e0'), ('100', '1E2'), ('0', '-0'), ('0.1', '0.10'), ('-0.0', '0'),
	('1', '"1"'), ('1', 'true'), ('null', 'false'), ('null', '"null"'), ('""', 'null'),
	('[1, 2]', '[2, 1]'), ('[1, 2]', '[1, 2, 2]'), ('[]', '{}'), ('[]', '[[]]'), ('[1]', '1'),
	('{}', '{"a": null}'), ('{"a": {"b": 1}}', '{"a": {"b": 1.00}}'), ('{"a": "b"}', '{"b": "a"}'),
	('["ab", "c"]', '["a", "bc"]'), ('"A"', '"a"'), ('"a"', '"a "'),
	('9007199254740993', '9007199254740992'), ('1e-40', '0'), ('12345678901234567890.1', '12345678901234567890.10'),
	-- nothing is ignored here: that's the Stripe ledger's
	('{"metadata": 1}', '{"metadata": 2}')
) r (a, b);

-- NULL on either side isn't compared, and the first that isn't NULL is kept
SELECT token FROM idempotency.claim('n', 'shop', '{"a": 1}', lease => '1 hour') \gset
SELECT verdict FROM idempotency.claim('n', 'shop');
SELECT idempotency.record('n', 'shop', :token) IS NOT NULL AS recorded;
SELECT verdict FROM idempotency.claim('n', 'shop');
SELECT verdict FROM idempotency.claim('n', 'shop', '{"a": 2}');
-- JSON's null is a request
SELECT verdict FROM idempotency.claim('n', 'shop', 'null');

SELECT token FROM idempotency.claim('n2', 'shop', lease => '1 hour') \gset
SELECT verdict FROM idempotency.claim('n2', 'shop', '{"a": 1}');
SELECT has_request FROM idempotency.lookup('n2', 'shop');
UPDATE idempotency.idempotency_keys SET lease_expires_at = now() - interval '1 second' WHERE key = 'n2';
SELECT verdict, attempt FROM idempotency.claim('n2', 'shop', '{"a": 1}', lease => '1 hour');
SELECT has_request FROM idempotency.lookup('n2', 'shop');
SELECT verdict FROM idempotency.claim('n2', 'shop', '{"a": 2}');
UPDATE idempotency.idempotency_keys SET lease_expires_at = now() - interval '1 second' WHERE key = 'n2';
SELECT verdict, attempt FROM idempotency.claim('n2', 'shop', lease => '1 hour');
SELECT verdict FROM idempotency.claim('n2', 'shop', '{"a": 2}');
SELECT verdict FROM idempotency.claim('n2', 'shop', '{"a": 1}');
-- not beyond the key's expiry
SELECT idempotency.record('n2', 'shop', (SELECT token FROM idempotency.idempotency_keys WHERE key = 'n2'))
	IS NOT NULL AS recorded;
UPDATE idempotency.idempotency_keys SET expires_at = now() - interval '1 second' WHERE key = 'n2';
SELECT verdict, attempt FROM idempotency.claim('n2', 'shop', lease => '1 hour');
SELECT has_request FROM idempotency.lookup('n2', 'shop');

--
-- A dead claimant: its lease lapses, a successor is handed the recovery point
--
SELECT token AS first FROM idempotency.claim('dead', 'shop', '{"a": 1}', lease => '1 hour') \gset
SELECT idempotency.checkpoint('dead', 'shop', :first, 'order written', '{"order": 7}') > clock_timestamp() AS held;
SELECT idempotency.checkpoint('dead', 'shop', :first, 'mailed') > clock_timestamp() AS held;
SELECT status, recovery_point, recovery_data, lapsed FROM idempotency.lookup('dead', 'shop');
SELECT idempotency.checkpoint('dead', 'shop', :first, 'charged', '{"charge": "ch_1"}') > clock_timestamp() AS held;
UPDATE idempotency.idempotency_keys SET lease_expires_at = now() - interval '1 second' WHERE key = 'dead';
SELECT status, recovery_point, recovery_data, lapsed FROM idempotency.lookup('dead', 'shop');
SELECT token AS second, pg_temp.shown(c) FROM idempotency.claim('dead', 'shop', '{"a": 1}', lease => '1 hour') c \gset
\echo :shown
SELECT :first = :second AS same_token;
SELECT pg_temp.shown(c) FROM idempotency.claim('dead', 'shop', '{"a": 1}') c;
-- the one that was taken over is fenced off
SELECT idempotency.record('dead', 'shop', :first, '{"wrong": true}');
SELECT idempotency.checkpoint('dead', 'shop', :first, 'wrong');
SELECT idempotency.extend('dead', 'shop', :first);
SELECT idempotency.release('dead', 'shop', :first);
-- the successor dies, too
UPDATE idempotency.idempotency_keys SET lease_expires_at = now() - interval '1 second' WHERE key = 'dead';
SELECT token AS third, pg_temp.shown(c) FROM idempotency.claim('dead', 'shop', lease => '1 hour') c \gset
\echo :shown
SELECT idempotency.record('dead', 'shop', :second);
SELECT idempotency.record('dead', 'shop', :third, '{"right": true}') IS NOT NULL AS recorded;
SELECT pg_temp.shown(c) FROM idempotency.claim('dead', 'shop') c;
-- recorded: the recovery point is of no more use
SELECT recovery_point, recovery_data, lease, lease_expires_at, lapsed FROM idempotency.lookup('dead', 'shop');
SELECT idempotency.record('dead', 'shop', :second, '{"right": true}');
SELECT idempotency.checkpoint('dead', 'shop', :third, 'late');
SELECT idempotency.extend('dead', 'shop', :third, '1 hour');
SELECT idempotency.release('dead', 'shop', :third);

-- a lapsed lease that nobody took over can still record, checkpoint, be extended and released
SELECT token FROM idempotency.claim('late', 'shop', lease => '1 hour') \gset
UPDATE idempotency.idempotency_keys SET lease_expires_at = now() - interval '1 second' WHERE key = 'late';
SELECT idempotency.checkpoint('late', 'shop', :token, 'awake') > clock_timestamp() AS held;
SELECT verdict FROM idempotency.claim('late', 'shop');
UPDATE idempotency.idempotency_keys SET lease_expires_at = now() - interval '1 second' WHERE key = 'late';
SELECT idempotency.extend('late', 'shop', :token) > clock_timestamp() AS held;
SELECT verdict FROM idempotency.claim('late', 'shop');
UPDATE idempotency.idempotency_keys SET lease_expires_at = now() - interval '1 second' WHERE key = 'late';
SELECT idempotency.record('late', 'shop', :token, '1') IS NOT NULL AS recorded;
SELECT pg_temp.shown(c) FROM idempotency.claim('late', 'shop') c;
SELECT token FROM idempotency.claim('late2', 'shop', lease => '1 hour') \gset
UPDATE idempotency.idempotency_keys SET lease_expires_at = now() - interval '1 second' WHERE key = 'late2';
SELECT idempotency.release('late2', 'shop', :token);
SELECT idempotency.lookup('late2', 'shop') IS NULL AS absent;

--
-- Release: the key is absent again
--
SELECT token FROM idempotency.claim('r', 'shop', '{"a": 1}', lease => '1 hour') \gset
SELECT idempotency.checkpoint('r', 'shop', :token, 'half way') IS NOT NULL AS kept;
SELECT idempotency.release('r', 'shop', :token);
SELECT idempotency.lookup('r', 'shop') IS NULL AS absent;
SELECT idempotency.release('r', 'shop', :token);
SELECT idempotency.record('r', 'shop', :token);
SELECT idempotency.checkpoint('r', 'shop', :token, 'more');
SELECT idempotency.extend('r', 'shop', :token);
-- another request, first attempt, no recovery point; the old token doesn't fit
SELECT pg_temp.shown(c) FROM idempotency.claim('r', 'shop', '{"a": 2}', lease => '1 hour') c;
SELECT idempotency.record('r', 'shop', :token);
SELECT idempotency.release('r', 'shop', :token);

-- with a key and token that never were
SELECT idempotency.record('never claimed', 'shop', 1);
SELECT idempotency.checkpoint('never claimed', 'shop', 1, 'x');
SELECT idempotency.extend('never claimed', 'shop', 1);
SELECT idempotency.release('never claimed', 'shop', 1);
-- with the token of another key
SELECT token FROM idempotency.claim('r2', 'shop', lease => '1 hour') \gset
SELECT idempotency.record('r', 'shop', :token);
SELECT idempotency.record('r2', 'another shop', :token);
SELECT idempotency.record('r2', 'shop', -:token);
SELECT idempotency.record('r2', 'shop', 0);

--
-- Recording again
--
SELECT token FROM idempotency.claim('again', 'shop', lease => '1 hour') \gset
SELECT idempotency.record('again', 'shop', :token, '{"a": 1}', 201, '{"Location": "/1"}', '\x0001') AS expires \gset
SELECT xmin AS before FROM idempotency.idempotency_keys WHERE key = 'again' \gset
-- the same: nothing changes
SELECT idempotency.record('again', 'shop', :token, '{"a": 1.0}', 201, '{"Location": "/1"}', '\x0001', ttl => '1 year')
	= :'expires' AS unchanged;
SELECT xmin = :'before' AS not_written FROM idempotency.idempotency_keys WHERE key = 'again';
-- another: refused
SELECT idempotency.record('again', 'shop', :token, '{"a": 2}', 201, '{"Location": "/1"}', '\x0001');
SELECT idempotency.record('again', 'shop', :token, '{"a": 1}', 200, '{"Location": "/1"}', '\x0001');
SELECT idempotency.record('again', 'shop', :token, '{"a": 1}', 201, '{"Location": "/2"}', '\x0001');
SELECT idempotency.record('again', 'shop', :token, '{"a": 1}', 201, '{"Location": "/1"}', '\x0002');
SELECT idempotency.record('again', 'shop', :token, '{"a": 1}', 201, NULL, '\x0001');
SELECT idempotency.record('again', 'shop', :token, '{"a": 1}', 201, '{"Location": "/1"}', '');
SELECT idempotency.record('again', 'shop', :token, '{"a": 1}', 201, '{"Location": "/1"}');
SELECT idempotency.record('again', 'shop', :token, NULL, 201, '{"Location": "/1"}', '\x0001');
SELECT idempotency.record('again', 'shop', :token, 'null', 201, '{"Location": "/1"}', '\x0001');
SELECT xmin = :'before' AS not_written FROM idempotency.idempotency_keys WHERE key = 'again';
SELECT pg_temp.shown(c) FROM idempotency.claim('again', 'shop') c;
-- in the transaction that recorded
BEGIN;
SELECT token FROM idempotency.claim('again2', 'shop') \gset
SELECT idempotency.record('again2', 'shop', :token, '1') IS NOT NULL AS recorded;
SELECT idempotency.record('again2', 'shop', :token, '1.0') IS NOT NULL AS recorded;
SAVEPOINT s;
SELECT idempotency.record('again2', 'shop', :token, '2');
ROLLBACK TO s;
COMMIT;
-- expired: the claim that recorded is history
UPDATE idempotency.idempotency_keys SET expires_at = now() - interval '1 second' WHERE key = 'again2';
SELECT idempotency.record('again2', 'shop', :token, '1');
SELECT idempotency.checkpoint('again2', 'shop', :token, 'x', lease => '1 hour');
SELECT idempotency.extend('again2', 'shop', :token, '1 hour');
SELECT idempotency.release('again2', 'shop', :token);

--
-- Expiry: a key past expires_at counts as absent at once
--
SELECT idempotency.lookup('again2', 'shop') IS NULL AS absent, count(*) AS rows
FROM idempotency.idempotency_keys WHERE key = 'again2';
SELECT token AS newer, pg_temp.shown(c) FROM idempotency.claim('again2', 'shop', lease => '1 hour') c \gset
\echo :shown
-- everything of the old life is gone, and its token is fenced off
SELECT attempt, http_status, response, response_headers, response_body, recorded_at, expires_at, recovery_point, fingerprint
FROM idempotency.idempotency_keys WHERE key = 'again2';
SELECT idempotency.record('again2', 'shop', :token, '1');
SELECT idempotency.release('again2', 'shop', :token);
SELECT idempotency.record('again2', 'shop', :newer, '3') IS NOT NULL AS recorded;

-- the time to live: record's, then claim's, then the setting's
CREATE FUNCTION pg_temp.lives(claims interval, records interval) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
	t bigint;
	e timestamptz;
	r timestamptz;
BEGIN
	SELECT token INTO STRICT t FROM idempotency.claim('ttl', 'shop', ttl => claims);
	e := idempotency.record('ttl', 'shop', t, ttl => records);
	SELECT recorded_at INTO STRICT r FROM idempotency.idempotency_keys WHERE key = 'ttl' AND expires_at = e;
	DELETE FROM idempotency.idempotency_keys WHERE key = 'ttl';
	RETURN justify_hours(e - r);
END $$;
SELECT pg_temp.lives(NULL, NULL) AS setting, pg_temp.lives('2 days', NULL) AS claims,
	pg_temp.lives('2 days', '3 days') AS records, pg_temp.lives(NULL, '1 month 3 days') AS records;
SET idempotency.key_ttl = '7d';
SELECT pg_temp.lives(NULL, NULL) AS setting, pg_temp.lives('2 days', NULL) AS claims;
RESET idempotency.key_ttl;
SELECT pg_temp.lives('1000 years', NULL) AS longest, pg_temp.lives('1 microsecond', NULL) AS shortest;
-- a successor's own, not its predecessor's
SELECT token FROM idempotency.claim('ttl', 'shop', ttl => '2 days', lease => '1 hour') \gset
UPDATE idempotency.idempotency_keys SET lease_expires_at = now() - interval '1 second' WHERE key = 'ttl';
SELECT token FROM idempotency.claim('ttl', 'shop', lease => '1 hour') \gset
SELECT idempotency.record('ttl', 'shop', :token) < now() + interval '25 hours' AS a_day;
-- a replay doesn't renew it
SELECT expires_at AS expires FROM idempotency.claim('ttl', 'shop') \gset
SELECT expires_at = :'expires' AS unchanged FROM idempotency.claim('ttl', 'shop', ttl => '1 year');
-- the shortest has passed at once, in the same transaction, too
BEGIN;
SELECT token FROM idempotency.claim('short', 'shop') \gset
SELECT idempotency.record('short', 'shop', :token, ttl => '1 microsecond') IS NOT NULL AS recorded;
SELECT verdict, attempt, token <> :token AS new_token FROM idempotency.claim('short', 'shop', lease => '1 hour');
COMMIT;

--
-- Leases: extend and checkpoint repeat the one given last
--
CREATE FUNCTION pg_temp.leased(k text) RETURNS text
LANGUAGE sql AS $$
	SELECT lease || ' until ' || CASE
		WHEN lease_expires_at BETWEEN clock_timestamp() + lease - interval '1 minute' AND clock_timestamp() + lease
		THEN 'then' ELSE 'some other time' END
	FROM idempotency.lookup(k, 'shop')
$$;
SELECT token FROM idempotency.claim('lease', 'shop', lease => '1 hour') \gset
SELECT pg_temp.leased('lease');
SELECT idempotency.extend('lease', 'shop', :token) AS until \gset
SELECT lease_expires_at = :'until' AS so_long FROM idempotency.lookup('lease', 'shop');
SELECT pg_temp.leased('lease');
SELECT idempotency.extend('lease', 'shop', :token, '2 hours') IS NOT NULL AS extended;
SELECT pg_temp.leased('lease');
SELECT idempotency.checkpoint('lease', 'shop', :token, 'a') IS NOT NULL AS kept;
SELECT pg_temp.leased('lease');
SELECT idempotency.checkpoint('lease', 'shop', :token, 'b', lease => '30 minutes') IS NOT NULL AS kept;
SELECT pg_temp.leased('lease');
SELECT idempotency.extend('lease', 'shop', :token) IS NOT NULL AS extended;
SELECT pg_temp.leased('lease');
-- days have 24 hours and months 30 days, wherever that is
SET timezone = 'Europe/Berlin';
SELECT idempotency.extend('lease', 'shop', :token, '1 month 1 day') IS NOT NULL AS extended;
SELECT pg_temp.leased('lease');
RESET timezone;
-- it may get shorter
SELECT idempotency.extend('lease', 'shop', :token, '1 microsecond') IS NOT NULL AS extended;
SELECT lapsed FROM idempotency.lookup('lease', 'shop');
SELECT verdict, attempt, recovery_point FROM idempotency.claim('lease', 'shop', lease => '1000 years');
SELECT verdict, retry_after FROM idempotency.claim('lease', 'shop');

-- a claim without a lease has none to repeat
BEGIN;
SELECT token FROM idempotency.claim('none', 'shop') \gset
SELECT idempotency.checkpoint('none', 'shop', :token, 'a', '[1]');
SELECT status, lapsed, lease, recovery_point, recovery_data FROM idempotency.lookup('none', 'shop');
SAVEPOINT s;
SELECT idempotency.extend('none', 'shop', :token);
ROLLBACK TO s;
SELECT pg_temp.shown(c) FROM idempotency.claim('none', 'shop') c;
SELECT idempotency.extend('none', 'shop', :token, '1 hour') IS NOT NULL AS extended;
COMMIT;
SELECT pg_temp.shown(c) FROM idempotency.claim('none', 'shop') c;

--
-- How it is called
--

-- in FROM; expanding the row claims once a column
SELECT (idempotency.claim('expanded', 'shop', lease => '1 hour')).verdict;
BEGIN;
SELECT verdict, token IS NULL AS lost, attempt, http_status
FROM (SELECT (idempotency.claim('expanded twice', 'shop', lease => '1 hour')).*) c;
ROLLBACK;
-- two claims in one statement
SELECT a.verdict, a.token IS NOT NULL AS token, b.verdict, b.token IS NOT NULL AS token
FROM idempotency.claim('both', 'shop', lease => '1 hour') a, idempotency.claim('both', 'shop', lease => '1 hour') b;
SELECT k, (SELECT verdict FROM idempotency.claim(k, 'shop', lease => '1 hour'))
FROM unnest(ARRAY['list 1', 'list 2', 'list 1', 'list 3', 'list 2']) WITH ORDINALITY u (k, n) ORDER BY n;
-- claim and record in one statement
SELECT c.verdict, idempotency.record('at once', 'shop', c.token, '{"a": 1}') IS NOT NULL AS recorded
FROM idempotency.claim('at once', 'shop') c;
SELECT pg_temp.shown(c) FROM idempotency.claim('at once', 'shop') c;
-- in PL/pgSQL
DO $$
DECLARE
	c idempotency.claim_result;
	v idempotency.verdict;
BEGIN
	c := idempotency.claim('assigned', 'shop');
	RAISE NOTICE '%', c.verdict;
	PERFORM idempotency.record('assigned', 'shop', c.token, to_jsonb('x'::text));
	SELECT * INTO c FROM idempotency.claim('assigned', 'shop');
	RAISE NOTICE '% %', c.verdict, c.response;
	SELECT verdict INTO v FROM idempotency.claim('assigned', 'shop');
	RAISE NOTICE '%', v;
END $$;
-- a read-only transaction replays, but can't claim
BEGIN READ ONLY;
SELECT pg_temp.shown(c) FROM idempotency.claim('at once', 'shop') c;
SELECT status FROM idempotency.lookup('at once', 'shop');
SELECT pg_temp.shown(c) FROM idempotency.claim('three', 'shop') c;
SELECT verdict FROM idempotency.claim('new', 'shop');
ROLLBACK;
-- lookup is of the query's snapshot, a claim is not
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT idempotency.lookup('snapshot', 'shop') IS NULL AS absent;
SELECT verdict, idempotency.lookup('snapshot', 'shop') IS NULL AS absent FROM idempotency.claim('snapshot', 'shop', lease => '1 hour');
SELECT status FROM idempotency.lookup('snapshot', 'shop');
ROLLBACK;

--
-- Savepoints and exception blocks
--
BEGIN;
SAVEPOINT s;
SELECT token AS lost FROM idempotency.claim('sp', 'shop') \gset
ROLLBACK TO s;
-- absent again, and its token worth nothing
SAVEPOINT t;
SELECT idempotency.record('sp', 'shop', :lost);
ROLLBACK TO t;
SELECT token, pg_temp.shown(c) FROM idempotency.claim('sp', 'shop') c \gset
\echo :shown
SELECT :token = :lost AS same_token;
SAVEPOINT u;
SELECT idempotency.record('sp', 'shop', :token, '1') IS NOT NULL AS recorded;
SELECT verdict FROM idempotency.claim('sp', 'shop');
ROLLBACK TO u;
SELECT verdict FROM idempotency.claim('sp', 'shop');
SELECT idempotency.record('sp', 'shop', :token, '2') IS NOT NULL AS recorded;
COMMIT;
SELECT pg_temp.shown(c) FROM idempotency.claim('sp', 'shop') c;

-- a takeover that is rolled back leaves the key to its lapsed holder
SELECT token AS holder FROM idempotency.claim('sp2', 'shop', lease => '1 hour') \gset
UPDATE idempotency.idempotency_keys SET lease_expires_at = now() - interval '1 second' WHERE key = 'sp2';
BEGIN;
SAVEPOINT s;
SELECT verdict, attempt FROM idempotency.claim('sp2', 'shop', lease => '1 hour');
SAVEPOINT t;
SELECT idempotency.record('sp2', 'shop', :holder, '1');
ROLLBACK TO s;
SELECT idempotency.record('sp2', 'shop', :holder, '1') IS NOT NULL AS recorded;
COMMIT;

DO $$
DECLARE
	c idempotency.claim_result;
BEGIN
	BEGIN
		c := idempotency.claim('block', 'shop');
		RAISE NOTICE 'inside: %', c.verdict;
		RAISE EXCEPTION 'out of stock';
	EXCEPTION WHEN raise_exception THEN
		RAISE NOTICE 'caught: %', SQLERRM;
	END;
	BEGIN
		PERFORM idempotency.record('block', 'shop', c.token);
	EXCEPTION WHEN SQLSTATE 'IK001' THEN
		RAISE NOTICE 'caught: %', SQLERRM;
	END;
	c := idempotency.claim('block', 'shop');
	RAISE NOTICE 'outside: % %', c.verdict, c.attempt;
	BEGIN
		PERFORM idempotency.record('block', 'shop', c.token, '1');
		PERFORM idempotency.record('block', 'shop', c.token, '2');
	EXCEPTION WHEN SQLSTATE 'IK002' THEN
		RAISE NOTICE 'caught: %', SQLERRM;
	END;
	PERFORM idempotency.record('block', 'shop', c.token, '3');
END $$;
SELECT pg_temp.shown(c) FROM idempotency.claim('block', 'shop') c;

--
-- Tokens: random, from 1 to 2^53 - 1
--
BEGIN;
CREATE TEMP TABLE tokens ON COMMIT DROP AS
	SELECT token FROM generate_series(1, 10000) i, LATERAL idempotency.claim('token ' || i, 'shop', lease => '1 hour') c;
SELECT count(*), count(DISTINCT token), min(token) >= 1 AS at_least_1, max(token) <= 9007199254740991 AS at_most,
	-- of 10000 random numbers none of the 53 bits is always or never set
	bit_and(token) AS always, bit_or(token) = 9007199254740991 AS each_bit
FROM tokens;
ROLLBACK;

--
-- A transaction of 100,000 claims
--
BEGIN;
SELECT c.verdict, count(*), count(DISTINCT token) AS tokens,
	count(idempotency.record('bulk ' || i, 'shop', c.token, to_jsonb(i))) AS recorded
FROM generate_series(1, 100000) i, LATERAL idempotency.claim('bulk ' || i, 'shop') c
GROUP BY c.verdict;
-- no lock a claim
SELECT count(*) < 20 AS few_locks FROM pg_locks WHERE pid = pg_backend_pid();
SELECT verdict, count(*), sum(response::int)
FROM generate_series(1, 100000) i, LATERAL idempotency.claim('bulk ' || i, 'shop') c
GROUP BY verdict;
ROLLBACK;
-- and of 10,000 that don't wait, each in a block of its own, every other rolled back
DO $$
DECLARE
	c idempotency.claim_result;
BEGIN
	FOR i IN 1 .. 10000 LOOP
		BEGIN
			c := idempotency.claim('bulk ' || i, 'shop', wait => false);
			IF i % 2 = 0 THEN
				RAISE EXCEPTION 'no';
			END IF;
			PERFORM idempotency.release('bulk ' || i, 'shop', c.token);
		EXCEPTION WHEN raise_exception THEN
		END;
	END LOOP;
END $$;
SELECT count(*) FROM idempotency.idempotency_keys WHERE key LIKE 'bulk %';

--
-- Where the table isn't the plain one that CREATE EXTENSION made
--
SELECT count(*) FROM generate_series(1, 14) i, LATERAL idempotency.claim('lapsed ' || i, 'shop', '1', lease => '1 hour') c;
UPDATE idempotency.idempotency_keys SET lease_expires_at = now() - interval '1 second' WHERE key LIKE 'lapsed %';

CREATE PROCEDURE pg_temp.life(n int)
LANGUAGE plpgsql AS $$
DECLARE
	a idempotency.claim_result;
	b idempotency.claim_result;
	c idempotency.claim_result;
	d idempotency.claim_result;
	k text := 'lapsed ' || n;
BEGIN
	a := idempotency.claim('table ' || n, 'shop', '1', lease => '1 hour');
	b := idempotency.claim('table ' || n, 'shop', '1');
	ASSERT idempotency.extend('table ' || n, 'shop', a.token) - clock_timestamp()
		BETWEEN interval '59 minutes' AND interval '1 hour';
	ASSERT idempotency.checkpoint('table ' || n, 'shop', a.token, 'p', lease => '2 hours') - clock_timestamp()
		BETWEEN interval '119 minutes' AND interval '2 hours';
	ASSERT idempotency.extend('table ' || n, 'shop', a.token) - clock_timestamp()
		BETWEEN interval '119 minutes' AND interval '2 hours', 'the lease given last';
	c := idempotency.claim(k, 'shop', '1', wait => n % 2 = 0, ttl => CASE n % 2 WHEN 0 THEN interval '3 days' END);
	ASSERT idempotency.record(k, 'shop', c.token, '{"a": 1}') - clock_timestamp()
		BETWEEN CASE n % 2 WHEN 0 THEN interval '71 hours' ELSE '23 hours' END
			AND CASE n % 2 WHEN 0 THEN interval '72 hours' ELSE '24 hours' END;
	d := idempotency.claim(k, 'shop', '1');
	RAISE NOTICE '%: %, %, % %, % %, %, %', n, a.verdict, b.verdict, c.verdict, c.attempt, d.verdict, d.response,
		(idempotency.claim(k, 'shop', '2')).verdict, (idempotency.lookup(k, 'shop')).status;
	PERFORM idempotency.release('table ' || n, 'shop', a.token);
END $$;

BEGIN;
-- rows that only the planner finds, as those of a distributed table
CALL pg_temp.life(1);
CREATE TABLE child () INHERITS (idempotency.idempotency_keys);
WITH moved AS (DELETE FROM ONLY idempotency.idempotency_keys WHERE key = 'lapsed 1' RETURNING *)
	INSERT INTO child SELECT * FROM moved;
SELECT verdict, response FROM idempotency.claim('lapsed 1', 'shop', '1');
SELECT status FROM idempotency.lookup('lapsed 1', 'shop');
ROLLBACK;
BEGIN;
CALL pg_temp.life(1);
ALTER TABLE idempotency.idempotency_keys ADD COLUMN mine text DEFAULT 'x';
CALL pg_temp.life(2);
ALTER TABLE idempotency.idempotency_keys ENABLE ROW LEVEL SECURITY;
CALL pg_temp.life(3);
ALTER TABLE idempotency.idempotency_keys DISABLE ROW LEVEL SECURITY;
CREATE RULE r AS ON DELETE TO idempotency.idempotency_keys WHERE old.key = 'kept' DO INSTEAD NOTHING;
CALL pg_temp.life(4);
DROP RULE r ON idempotency.idempotency_keys;
CREATE TABLE child () INHERITS (idempotency.idempotency_keys);
CALL pg_temp.life(5);
DROP TABLE child;
ALTER TABLE idempotency.idempotency_keys DROP CONSTRAINT idempotency_keys_pkey,
	ADD CONSTRAINT another UNIQUE (scope, key);
CALL pg_temp.life(6);
ALTER TABLE idempotency.idempotency_keys DROP CONSTRAINT another,
	ADD CONSTRAINT another PRIMARY KEY (key, scope);
CALL pg_temp.life(7);
CLUSTER idempotency.idempotency_keys USING another;
CALL pg_temp.life(8);
SET LOCAL enable_indexscan = off;
SET LOCAL enable_bitmapscan = off;
SET LOCAL enable_indexonlyscan = off;
CALL pg_temp.life(9);
-- the columns are known by number
ALTER TABLE idempotency.idempotency_keys RENAME COLUMN ttl TO time_to_live;
SELECT idempotency.claim('table 10', 'shop');
ROLLBACK;
BEGIN;
ALTER TABLE idempotency.idempotency_keys DROP COLUMN fingerprint;
SELECT idempotency.claim('table 10', 'shop');
ROLLBACK;
BEGIN;
ALTER TABLE idempotency.idempotency_keys RENAME TO elsewhere;
SELECT idempotency.claim('table 10', 'shop');
ROLLBACK;
BEGIN;
-- of another owner, who sees its own rows even if it is to be subject to row-level security
CREATE ROLE regress_idempotency_owner;
GRANT USAGE ON SCHEMA idempotency TO regress_idempotency_owner;
ALTER TABLE idempotency.idempotency_keys OWNER TO regress_idempotency_owner;
ALTER TABLE idempotency.idempotency_keys ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CALL pg_temp.life(11);
SET LOCAL row_security = off;
CALL pg_temp.life(12);
ROLLBACK;
-- partitioned
ALTER TABLE idempotency.idempotency_keys RENAME TO before;
CREATE TABLE idempotency.idempotency_keys (LIKE idempotency.before INCLUDING DEFAULTS,
	PRIMARY KEY (scope, key)) PARTITION BY HASH (scope);
CREATE TABLE part_0 PARTITION OF idempotency.idempotency_keys FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE part_1 PARTITION OF idempotency.idempotency_keys FOR VALUES WITH (MODULUS 2, REMAINDER 1);
INSERT INTO idempotency.idempotency_keys TABLE idempotency.before;
BEGIN;
CALL pg_temp.life(14);
ROLLBACK;
-- the limits that Citus would hand on to other nodes are taken back here
SET citus.propagate_set_commands = 'none';
SELECT token FROM idempotency.claim('leased', 'shop', lease => '1 hour') \gset
SELECT verdict FROM idempotency.claim('leased', 'shop', wait => false);
CREATE FUNCTION pg_temp.locked() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE lock_not_available; END';
CREATE TRIGGER locked BEFORE INSERT ON idempotency.idempotency_keys FOR EACH ROW EXECUTE FUNCTION pg_temp.locked();
SELECT verdict FROM idempotency.claim('locked', 'shop', lease => '1 hour');
SHOW lock_timeout;
SHOW citus.propagate_set_commands;
RESET citus.propagate_set_commands;
SELECT idempotency.release('leased', 'shop', :token);
DROP TABLE idempotency.idempotency_keys;
ALTER TABLE idempotency.before RENAME TO idempotency_keys;
CALL pg_temp.life(13);

--
-- A trigger that sets lock_timeout, too, and fails
--
CREATE FUNCTION pg_temp.fail() RETURNS trigger LANGUAGE plpgsql SET lock_timeout = '7s' AS
	$$ BEGIN RAISE 'not this one'; END $$;
CREATE TRIGGER fail BEFORE INSERT OR UPDATE OR DELETE ON idempotency.idempotency_keys
	FOR EACH ROW EXECUTE FUNCTION pg_temp.fail();
SELECT verdict FROM idempotency.claim('fails', 'shop', lease => '1 hour');
SHOW lock_timeout;
SELECT verdict FROM idempotency.claim('fails', 'shop', lease => '1 hour', wait => false);
SHOW lock_timeout;
SET lock_timeout = '1h';
SELECT verdict FROM idempotency.claim('fails', 'shop', lease => '1 hour');
SHOW lock_timeout;
RESET lock_timeout;
DROP TRIGGER fail ON idempotency.idempotency_keys;

-- without its primary key a table holds no claims, and says so
BEGIN;
ALTER TABLE idempotency.idempotency_keys DROP CONSTRAINT idempotency_keys_pkey;
SELECT verdict FROM idempotency.claim('k', 's');
ROLLBACK;
-- one that is no good for that doesn't count
BEGIN;
ALTER TABLE idempotency.idempotency_keys DROP CONSTRAINT idempotency_keys_pkey,
	ADD CONSTRAINT late UNIQUE (scope, key) DEFERRABLE;
CREATE UNIQUE INDEX partly ON idempotency.idempotency_keys (scope, key) WHERE token > 0;
CREATE UNIQUE INDEX more ON idempotency.idempotency_keys (scope, key, token);
\set VERBOSITY terse
SELECT verdict FROM idempotency.claim('k', 's');
\set VERBOSITY default
ROLLBACK;
SELECT verdict, attempt FROM idempotency.claim('k', 's', '{"a": 1}', lease => '1 microsecond');

-- a fingerprint that a later version has written is not taken for a match
UPDATE idempotency.idempotency_keys SET fingerprint = set_byte(fingerprint, 0, 2) WHERE key = 'k';
SELECT verdict FROM idempotency.claim('k', 's', '{"a": 1}', lease => '1 hour');
UPDATE idempotency.idempotency_keys SET fingerprint = '\x01' WHERE key = 'k';
SELECT verdict FROM idempotency.claim('k', 's', '{"a": 1}', lease => '1 hour');
SELECT attempt FROM idempotency.idempotency_keys WHERE key = 'k';

-- a namespace that is gone
BEGIN;
ALTER TABLE idempotency.namespace RENAME TO elsewhere;
SELECT idempotency.operation_uuid('k', 's');
ROLLBACK;
-- and one of many
BEGIN;
SELECT idempotency.operation_uuid('k', 's') AS uuid \gset
INSERT INTO idempotency.namespace (value, system_identifier, database, created_at)
	SELECT sha256(int4send(n)), system_identifier, database, created_at + '1 day'
	FROM idempotency.namespace, generate_series(1, 40) n;
SELECT idempotency.operation_uuid('k', 's') = :'uuid' AS the_oldest;
ROLLBACK;

-- who doesn't wait at all still gets what nobody has: a lapsed claim, and a key of a table whose INSERT may take its time
SET idempotency.wait_timeout = 0;
SELECT FROM idempotency.claim('no wait', 'shop', lease => '1 microsecond');
SELECT verdict, attempt FROM idempotency.claim('no wait', 'shop', lease => '1 hour');
SELECT verdict FROM idempotency.claim('no wait', 'shop', lease => '1 hour');
CREATE FUNCTION pg_temp.same() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
CREATE TRIGGER same BEFORE INSERT ON idempotency.idempotency_keys FOR EACH ROW EXECUTE FUNCTION pg_temp.same();
SELECT verdict FROM idempotency.claim('no wait, with a trigger', 'shop', lease => '1 hour');
DROP TRIGGER same ON idempotency.idempotency_keys;
RESET idempotency.wait_timeout;

DELETE FROM idempotency.idempotency_keys;
