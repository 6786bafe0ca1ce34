--
-- Giving up for now: release(keep => true)
--
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS idempotency;
RESET client_min_messages;
\set SHOW_CONTEXT never

-- what a claim answers, and what stands in the row
CREATE FUNCTION pg_temp.kept(key text) RETURNS TABLE (status text, attempt int, recovery_point text, recovery_data jsonb,
	has_request boolean, lease interval, given_up boolean, lapsed boolean) LANGUAGE sql AS $$
SELECT status, attempt, recovery_point, recovery_data, has_request, lease,
	lease_expires_at BETWEEN claimed_at AND clock_timestamp(), lapsed
FROM idempotency.lookup(key, 's') $$;

-- request, attempt and checkpoint stay; the key is free at once
SELECT token FROM idempotency.claim('k', 's', request => '{"amount": 1990}', lease => '1 hour') \gset
SELECT idempotency.checkpoint('k', 's', :token, 'charged', '{"charge": "ch_1"}') IS NOT NULL AS noted;
SELECT idempotency.release('k', 's', :token, keep => true);
SELECT * FROM pg_temp.kept('k');
SELECT key, attempt, lapsed, recovery_point, next_step FROM idempotency.open_claims WHERE key = 'k';
SELECT verdict, http_status, response, token IS NULL AS no_token FROM idempotency.claim('k', 's', request => '{"amount": 9900}');
SELECT verdict, attempt, recovery_point, recovery_data, token FROM idempotency.claim('k', 's', request => '{"amount": 1990.00}', lease => '1 hour') \gset new_
SELECT :'new_verdict', :new_attempt, :'new_recovery_point', :'new_recovery_data';

-- the old token is dead, whoever has the key now, or nobody
\set VERBOSITY sqlstate
SELECT idempotency.record('k', 's', :token, '"late"');
SELECT idempotency.release('k', 's', :token);
SELECT idempotency.release('k', 's', :new_token, keep => true);
SELECT idempotency.record('k', 's', :new_token, '"late"');
SELECT idempotency.checkpoint('k', 's', :new_token, 'late');
SELECT idempotency.extend('k', 's', :new_token, '1 hour');
SELECT idempotency.release('k', 's', :new_token, keep => true);
SELECT idempotency.release('k', 's', :token, keep => true);
\set VERBOSITY default
SELECT idempotency.release('k', 's', :new_token);

-- a second kept release counts on, and a result ends it
SELECT token, attempt FROM idempotency.claim('k', 's', request => '{"amount": 1990}', lease => '1 hour') \gset
SELECT :attempt;
SELECT idempotency.record('k', 's', :token, '"done"') IS NOT NULL AS recorded;
SELECT idempotency.release('k', 's', :token, keep => true);
SELECT verdict, attempt, response FROM idempotency.claim('k', 's', request => '{"amount": 1990}');

-- without keep all is forgotten, as ever
SELECT token FROM idempotency.claim('f', 's', request => '1', lease => '1 hour') \gset
SELECT idempotency.release('f', 's', :token, keep => false);
SELECT idempotency.lookup('f', 's') IS NULL AS absent;
SELECT idempotency.release('f', 's', 1, keep => NULL);

-- a claim without lease isn't open any more: COMMIT lets it through, and it has lapsed
BEGIN;
SELECT token FROM idempotency.claim('t', 's', request => '{"a": 1}') \gset
SELECT idempotency.release('t', 's', :token, keep => true);
COMMIT;
SELECT * FROM pg_temp.kept('t');
SELECT verdict FROM idempotency.claim('t', 's', request => '{"a": 2}');
-- the same transaction may go on
BEGIN;
SELECT verdict, attempt, token FROM idempotency.claim('t', 's', request => '{"a": 1}') \gset
SELECT :'verdict', :attempt;
SELECT verdict FROM idempotency.claim('t', 's', request => '{"a": 1}');
SELECT idempotency.release('t', 's', :token, keep => true);
SELECT verdict FROM idempotency.claim('t', 's', request => '{"a": 2}');
SELECT verdict, attempt, token FROM idempotency.claim('t', 's', request => '{"a": 1}') \gset
SELECT :'verdict', :attempt;
-- which is open again
COMMIT;
-- a rollback, of all or of a part, undoes it
BEGIN;
SELECT token FROM idempotency.claim('r', 's', request => '{"a": 1}') \gset
SELECT idempotency.release('r', 's', :token, keep => true);
ROLLBACK;
SELECT idempotency.lookup('r', 's') IS NULL AS absent;
BEGIN;
SELECT token FROM idempotency.claim('r', 's', request => '{"a": 1}') \gset
SAVEPOINT s;
SELECT idempotency.release('r', 's', :token, keep => true);
ROLLBACK TO s;
SELECT verdict FROM idempotency.claim('r', 's', request => '{"a": 1}');
COMMIT;
SELECT idempotency.lookup('r', 's') IS NULL AS absent;
SELECT token FROM idempotency.claim('r', 's', request => '{"a": 1}', lease => '1 hour') \gset
BEGIN;
SELECT idempotency.release('r', 's', :token, keep => true);
ROLLBACK;
SELECT verdict FROM idempotency.claim('r', 's', request => '{"a": 1}');
SELECT idempotency.record('r', 's', :token, '"done"') IS NOT NULL AS recorded;

-- a clock that was set back doesn't hold it
SELECT token FROM idempotency.claim('c', 's', lease => '1 hour') \gset
SELECT idempotency.release('c', 's', :token, keep => true);
UPDATE idempotency.idempotency_keys SET lease_expires_at = clock_timestamp() + interval '1 hour' WHERE key = 'c';
SELECT verdict, attempt FROM idempotency.claim('c', 's', lease => '1 hour');

-- it is forgotten when it was given up idempotency.abandoned_retention ago, however long it was held before
SELECT token FROM idempotency.claim('e1', 's', lease => '1 hour') \gset
UPDATE idempotency.idempotency_keys SET claimed_at = now() - interval '1 year' WHERE key = 'e1';
SELECT idempotency.release('e1', 's', :token, keep => true);
SELECT token FROM idempotency.claim('e2', 's', lease => '1 hour') \gset
SELECT idempotency.release('e2', 's', :token, keep => true);
UPDATE idempotency.idempotency_keys SET lease_expires_at = lease_expires_at - interval '1 year' WHERE key = 'e2';
DO $$ BEGIN PERFORM idempotency.expire(); END $$;
SELECT key, attempt FROM idempotency.idempotency_keys WHERE key LIKE 'e_';
-- expired meanwhile: the token is as dead
\set VERBOSITY sqlstate
SELECT idempotency.release('e2', 's', :token, keep => true);
\set VERBOSITY default

-- what the view says doesn't forget what was kept on purpose
SELECT lapsed, substring(next_step, '\w+\.\w+') AS next_step FROM idempotency.open_claims WHERE key = 'e1';
DO $$ BEGIN EXECUTE (SELECT next_step FROM idempotency.open_claims WHERE key = 'e1'); END $$;
SELECT idempotency.lookup('e1', 's') IS NULL AS absent;

-- a request that is another one, and a mere string, is told to be that: mostly it was encoded twice
SELECT verdict FROM idempotency.claim('s', 's', request => '{"id": 1}', lease => '1 hour');
SELECT verdict FROM idempotency.claim('s', 's', request => '"{\"id\": 1}"');
SELECT verdict FROM idempotency.claim('s', 's', request => '{"id": 2}');
SELECT verdict FROM idempotency.claim('s', 's', request => '[1]');
SELECT verdict FROM idempotency.claim('string', 's', request => '"{\"id\": 1}"', lease => '1 hour');
SELECT verdict FROM idempotency.claim('string', 's', request => '"{\"id\": 1}"');

DELETE FROM idempotency.idempotency_keys;
