--
-- A claim without a lease belongs to its transaction, which can't commit while it is open
--
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS idempotency;
RESET client_min_messages;
\set SHOW_CONTEXT never

CREATE VIEW pg_temp.keys AS
	SELECT key, CASE WHEN expires_at IS NOT NULL THEN 'recorded' WHEN lease IS NOT NULL THEN 'leased' ELSE 'open' END AS state,
		attempt, recovery_point
	FROM idempotency.idempotency_keys ORDER BY key;

-- forgotten: COMMIT refuses and rolls everything back
CREATE TEMP TABLE orders (id int);
BEGIN;
SELECT verdict FROM idempotency.claim('forgotten', 's');
INSERT INTO orders VALUES (1);
COMMIT;
SELECT * FROM keys;
SELECT * FROM orders;
-- a statement of its own is a transaction, too
SELECT verdict FROM idempotency.claim('forgotten', 's');
SELECT * FROM keys;
-- several: the first is named
BEGIN;
SELECT verdict FROM idempotency.claim('b', 's');
SELECT verdict FROM idempotency.claim('a', 's');
COMMIT;
BEGIN;
SELECT token FROM idempotency.claim('a', '') \gset
SELECT verdict FROM idempotency.claim('b', '"quoted"');
SELECT verdict FROM idempotency.claim('c', 's');
SELECT verdict FROM idempotency.claim('d', 's');
SELECT idempotency.release('a', '', :token);
COMMIT;
BEGIN;
SELECT count(*), count(CASE WHEN i <> 777 THEN idempotency.record('k' || i, 's', c.token) END)
FROM generate_series(1, 1000) i, LATERAL idempotency.claim('k' || i, 's') c;
COMMIT;
SELECT * FROM keys;

-- closed by record, by release, by a lease given later; or never open, with a lease
BEGIN;
SELECT token FROM idempotency.claim('recorded', 's') \gset
SELECT idempotency.record('recorded', 's', :token) IS NOT NULL AS done;
SELECT token FROM idempotency.claim('released', 's') \gset
SELECT idempotency.release('released', 's', :token);
SELECT token FROM idempotency.claim('extended', 's') \gset
SELECT idempotency.extend('extended', 's', :token, '1 hour') IS NOT NULL AS done;
SELECT token FROM idempotency.claim('at a checkpoint', 's') \gset
SELECT idempotency.checkpoint('at a checkpoint', 's', :token, 'p', lease => '1 hour') IS NOT NULL AS done;
SELECT token FROM idempotency.claim('leased', 's', lease => '1 hour') \gset
COMMIT;
SELECT * FROM keys;
-- a checkpoint without a lease doesn't close it
BEGIN;
SELECT token FROM idempotency.claim('checkpoint only', 's') \gset
SELECT idempotency.checkpoint('checkpoint only', 's', :token, 'p');
COMMIT;
-- what answers otherwise opens nothing
BEGIN;
SELECT verdict FROM idempotency.claim('recorded', 's');
SELECT verdict FROM idempotency.claim('leased', 's');
SELECT token FROM idempotency.claim('twice', 's') \gset
SELECT verdict FROM idempotency.claim('twice', 's');
SELECT idempotency.record('twice', 's', :token) IS NOT NULL AS done;
SELECT verdict FROM idempotency.claim('twice', 's');
COMMIT;
-- released and claimed anew
BEGIN;
SELECT token FROM idempotency.claim('anew', 's') \gset
SELECT idempotency.release('anew', 's', :token);
SELECT verdict FROM idempotency.claim('anew', 's');
COMMIT;
-- a refused record closes nothing
BEGIN;
SELECT token FROM idempotency.claim('refused', 's') \gset
SAVEPOINT s;
SELECT idempotency.record('refused', 's', :token + 1);
ROLLBACK TO s;
SELECT idempotency.record('refused', 's', :token, response_status => 1);
ROLLBACK TO s;
COMMIT;
-- taken over without a lease: the rollback leaves it to its lapsed holder
UPDATE idempotency.idempotency_keys SET lease_expires_at = now() - interval '1 second' WHERE key = 'leased';
BEGIN;
SELECT verdict, attempt FROM idempotency.claim('leased', 's');
COMMIT;
SELECT * FROM keys;

--
-- Savepoints
--
-- what a rolled-back one claimed is closed
BEGIN;
SAVEPOINT s;
SELECT verdict FROM idempotency.claim('sp', 's');
ROLLBACK TO s;
COMMIT;
-- what it recorded is open again
BEGIN;
SELECT token FROM idempotency.claim('sp', 's') \gset
SAVEPOINT s;
SELECT idempotency.record('sp', 's', :token) IS NOT NULL AS done;
ROLLBACK TO s;
COMMIT;
BEGIN;
SELECT token FROM idempotency.claim('sp', 's') \gset
SAVEPOINT s;
SELECT idempotency.extend('sp', 's', :token, '1 hour') IS NOT NULL AS done;
ROLLBACK TO s;
COMMIT;
BEGIN;
SELECT token FROM idempotency.claim('sp', 's') \gset
SAVEPOINT s;
SELECT idempotency.release('sp', 's', :token);
SELECT verdict FROM idempotency.claim('sp', 's', lease => '1 hour');
ROLLBACK TO s;
COMMIT;
-- and may be recorded then
BEGIN;
SELECT token FROM idempotency.claim('sp', 's') \gset
SAVEPOINT s;
SELECT idempotency.record('sp', 's', :token, '1') IS NOT NULL AS done;
ROLLBACK TO s;
SELECT idempotency.record('sp', 's', :token, '2') IS NOT NULL AS done;
COMMIT;
SELECT response FROM idempotency.claim('sp', 's');
-- a released one has its parent's fate
BEGIN;
SAVEPOINT s;
SELECT verdict FROM idempotency.claim('sp1', 's');
RELEASE s;
COMMIT;
BEGIN;
SAVEPOINT s;
SAVEPOINT t;
SELECT verdict FROM idempotency.claim('sp1', 's');
RELEASE t;
ROLLBACK TO s;
COMMIT;
BEGIN;
SELECT token FROM idempotency.claim('sp1', 's') \gset
SAVEPOINT s;
SAVEPOINT t;
SELECT idempotency.record('sp1', 's', :token) IS NOT NULL AS done;
RELEASE t;
ROLLBACK TO s;
SELECT idempotency.release('sp1', 's', :token);
COMMIT;
-- nested: claimed in one, recorded in another, rolled back in a third
BEGIN;
SELECT token AS a FROM idempotency.claim('sp2', 's') \gset
SAVEPOINT one;
SELECT token AS b FROM idempotency.claim('sp3', 's') \gset
SAVEPOINT two;
SELECT idempotency.record('sp2', 's', :a) IS NOT NULL AS done;
SAVEPOINT three;
SELECT idempotency.record('sp3', 's', :b) IS NOT NULL AS done;
SELECT verdict FROM idempotency.claim('sp4', 's');
ROLLBACK TO three;
SELECT token AS c FROM idempotency.claim('sp5', 's') \gset
RELEASE three;
SELECT idempotency.record('sp5', 's', :c) IS NOT NULL AS done;
RELEASE two;
-- sp3 is open, sp2 and sp5 are not
COMMIT;
BEGIN;
SELECT token AS a FROM idempotency.claim('sp2', 's') \gset
SAVEPOINT one;
SELECT idempotency.record('sp2', 's', :a) IS NOT NULL AS done;
SAVEPOINT two;
SELECT token AS b FROM idempotency.claim('sp3', 's') \gset
ROLLBACK TO two;
SELECT token AS b FROM idempotency.claim('sp3', 's') \gset
SELECT idempotency.record('sp3', 's', :b) IS NOT NULL AS done;
RELEASE one;
COMMIT;
SELECT * FROM keys WHERE key LIKE 'sp%';
-- rolled back to twice
BEGIN;
SELECT token AS a FROM idempotency.claim('sp6', 's') \gset
SAVEPOINT s;
SELECT idempotency.record('sp6', 's', :a) IS NOT NULL AS done;
SELECT verdict FROM idempotency.claim('sp7', 's');
ROLLBACK TO s;
SELECT idempotency.record('sp6', 's', :a) IS NOT NULL AS done;
SELECT verdict FROM idempotency.claim('sp7', 's');
ROLLBACK TO s;
SELECT idempotency.record('sp6', 's', :a) IS NOT NULL AS done;
COMMIT;

--
-- Exception blocks, procedures, triggers, chains
--
DO $$
BEGIN
	BEGIN
		PERFORM idempotency.claim('block', 's');
		RAISE division_by_zero;
	EXCEPTION WHEN division_by_zero THEN
	END;
END $$;
DO $$
DECLARE
	c idempotency.claim_result;
BEGIN
	c := idempotency.claim('block', 's');
	BEGIN
		PERFORM idempotency.record('block', 's', c.token);
		RAISE division_by_zero;
	EXCEPTION WHEN division_by_zero THEN
	END;
END $$;
-- the error comes too late for a block to catch it
DO $$
BEGIN
	PERFORM idempotency.claim('block', 's');
EXCEPTION WHEN OTHERS THEN
	RAISE NOTICE 'caught %', SQLSTATE;
END $$;

CREATE PROCEDURE pg_temp.in_steps(forget boolean)
LANGUAGE plpgsql AS $$
DECLARE
	c idempotency.claim_result;
BEGIN
	c := idempotency.claim('step 1', 's');
	PERFORM idempotency.record('step 1', 's', c.token);
	COMMIT;
	c := idempotency.claim('step 2', 's');
	ROLLBACK;
	c := idempotency.claim('step 2', 's', lease => '1 hour');
	COMMIT;
	PERFORM idempotency.checkpoint('step 2', 's', c.token, 'half');
	COMMIT;
	IF NOT forget THEN
		PERFORM idempotency.record('step 2', 's', c.token);
	END IF;
	c := idempotency.claim('step 3', 's');
	IF NOT forget THEN
		PERFORM idempotency.release('step 3', 's', c.token);
	END IF;
	COMMIT;
END $$;
CALL pg_temp.in_steps(true);
SELECT * FROM keys WHERE key LIKE 'step%';
DELETE FROM idempotency.idempotency_keys;
CALL pg_temp.in_steps(false);
SELECT * FROM keys WHERE key LIKE 'step%';
-- what a deferred trigger records is in time, what it claims is not
CREATE FUNCTION pg_temp.finish() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
	IF new.id > 0 THEN
		PERFORM idempotency.record('deferred', 's', (SELECT token FROM idempotency.idempotency_keys WHERE key = 'deferred'),
			to_jsonb(new.id));
	ELSE
		PERFORM idempotency.claim('deferred claim', 's');
	END IF;
	RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER finish AFTER INSERT ON orders DEFERRABLE INITIALLY DEFERRED
	FOR EACH ROW EXECUTE FUNCTION pg_temp.finish();
BEGIN;
SELECT verdict FROM idempotency.claim('deferred', 's');
INSERT INTO orders VALUES (7);
COMMIT;
SELECT verdict, response FROM idempotency.claim('deferred', 's');
INSERT INTO orders VALUES (0);
SELECT * FROM orders;
-- a held cursor runs at COMMIT
BEGIN;
DECLARE held CURSOR WITH HOLD FOR SELECT verdict FROM idempotency.claim('cursor', 's');
COMMIT;
-- chains
BEGIN;
SELECT token FROM idempotency.claim('chain', 's') \gset
SELECT idempotency.record('chain', 's', :token) IS NOT NULL AS done;
COMMIT AND CHAIN;
SELECT verdict FROM idempotency.claim('chain 2', 's');
COMMIT AND CHAIN;
ROLLBACK;
BEGIN;
SELECT verdict FROM idempotency.claim('chain 2', 's');
ROLLBACK AND CHAIN;
COMMIT;
DELETE FROM idempotency.idempotency_keys;

--
-- The setting: warned of or allowed, the claim counts as lapsed at once
--
SET idempotency.open_claim_at_commit = warning;
BEGIN;
SELECT token FROM idempotency.claim('open', 's', '{"a": 1}') \gset
SELECT idempotency.checkpoint('open', 's', :token, 'p');
SELECT verdict FROM idempotency.claim('open 2', 's');
COMMIT;
SELECT * FROM keys;
SELECT status, lapsed FROM idempotency.lookup('open', 's');
-- still another request
SELECT verdict FROM idempotency.claim('open', 's', '{"a": 2}');
-- the lapsed holder may record, as long as nobody has taken it over
SELECT idempotency.record('open', 's', :token) IS NOT NULL AS done;
SELECT verdict, attempt FROM idempotency.claim('open 2', 's');
SET idempotency.open_claim_at_commit = allow;
SELECT verdict, attempt FROM idempotency.claim('open 2', 's', wait => false);
SELECT * FROM keys;
-- what counts is the setting at COMMIT
BEGIN;
SELECT verdict, attempt FROM idempotency.claim('open 2', 's');
SET LOCAL idempotency.open_claim_at_commit = error;
COMMIT;
RESET idempotency.open_claim_at_commit;
BEGIN;
SELECT verdict, attempt FROM idempotency.claim('open 2', 's');
SET LOCAL idempotency.open_claim_at_commit = allow;
COMMIT;
SELECT verdict, attempt FROM idempotency.claim('open 2', 's', lease => '1 hour');
DELETE FROM idempotency.idempotency_keys;

--
-- The view, and the statement that it tells to type
--
SET idempotency.open_claim_at_commit = allow;
SELECT verdict FROM idempotency.claim('without a lease', 'it''s');
RESET idempotency.open_claim_at_commit;
SELECT verdict FROM idempotency.claim('live', 's', lease => '1 hour');
SELECT verdict FROM idempotency.claim(E'la\\psed"', E'it''s a \\scope', lease => '1 hour');
SELECT token FROM idempotency.claim('lapsed with a recovery point', 's', lease => '1 hour') \gset
SELECT idempotency.checkpoint('lapsed with a recovery point', 's', :token, 'p', '{"body": "not shown"}') IS NOT NULL AS done;
SELECT token FROM idempotency.claim('recorded', 's') c, LATERAL idempotency.record('recorded', 's', c.token) \gset
SELECT verdict FROM idempotency.stripe_claim('charge', 'order''s 1', '{"body": "not shown"}', 'acct_1');
SELECT verdict FROM idempotency.stripe_claim('charge', 'lapsed', lease => '2 hours');
SELECT token FROM idempotency.stripe_claim('charge', 'recorded') c, LATERAL idempotency.stripe_record('charge', 'recorded', c.token, 'ch_1') \gset
UPDATE idempotency.idempotency_keys SET lease_expires_at = now() - interval '1 second' WHERE key LIKE 'la%';
UPDATE idempotency.stripe_idempotency_keys SET lease_expires_at = now() - interval '2 seconds' WHERE operation_id = 'lapsed';
SELECT ledger, scope, key, account, operation_type, operation_id, attempt, lapsed, recovery_point,
	regexp_replace(next_step, '\d{6,16}\)', 'TOKEN)') AS next_step
FROM idempotency.open_claims ORDER BY lapsed DESC, ledger, key, operation_id;
-- lapsed first, then by when
SELECT array_agg(lapsed ORDER BY n) AS lapsed, bool_and(lapsed > next OR until <= next_until OR next_until IS NULL) AS in_order
FROM (SELECT n, lapsed, lease_expires_at AS until, lead(lapsed) OVER (ORDER BY n) AS next,
		lead(lease_expires_at) OVER (ORDER BY n) AS next_until
	FROM (SELECT lapsed, lease_expires_at, row_number() OVER () AS n FROM idempotency.open_claims) c) d;
-- each runs, and afterwards nothing lapsed can be released any more
DO $$
DECLARE
	r record;
	n bigint;
BEGIN
	FOR r IN SELECT next_step, ledger FROM idempotency.open_claims ORDER BY ledger, key, operation_id LOOP
		EXECUTE r.next_step;
		GET DIAGNOSTICS n = ROW_COUNT;
		RAISE NOTICE '% %: % row', r.ledger, substr(r.next_step, 1, 35), n;
	END LOOP;
END $$;
SELECT ledger, key, operation_id, lapsed FROM idempotency.open_claims ORDER BY lapsed DESC, ledger, key, operation_id;
DELETE FROM idempotency.idempotency_keys;
DELETE FROM idempotency.stripe_idempotency_keys;

--
-- PREPARE TRANSACTION is a commit.  (open_claims_1.out is for a server that
-- has max_prepared_transactions = 0.)
--
SELECT setting::int > 0 AS can_prepare FROM pg_settings WHERE name = 'max_prepared_transactions' \gset
\if :can_prepare
BEGIN;
SELECT verdict FROM idempotency.claim('prepared', 's');
PREPARE TRANSACTION 'regress_idempotency_1';
SELECT * FROM keys;
-- nothing left over in the session
BEGIN;
COMMIT;
SET idempotency.open_claim_at_commit = warning;
BEGIN;
SELECT verdict FROM idempotency.claim('prepared', 's');
PREPARE TRANSACTION 'regress_idempotency_1';
RESET idempotency.open_claim_at_commit;
BEGIN;
SELECT token FROM idempotency.claim('prepared 2', 's') \gset
SELECT idempotency.record('prepared 2', 's', :token, '2') IS NOT NULL AS done;
SELECT verdict FROM idempotency.claim('prepared 3', 's', lease => '1 hour');
PREPARE TRANSACTION 'regress_idempotency_2';
-- uncommitted twins
SELECT verdict, retry_after FROM idempotency.claim('prepared', 's', wait => false);
SELECT verdict, retry_after FROM idempotency.claim('prepared 2', 's', wait => false);
SELECT verdict, retry_after FROM idempotency.claim('prepared 3', 's', wait => false, lease => '1 hour');
SET idempotency.wait_timeout = 0;
SELECT verdict, retry_after FROM idempotency.claim('prepared', 's');
SET idempotency.wait_timeout = '20ms';
SELECT verdict, retry_after FROM idempotency.claim('prepared', 's');
SELECT verdict, retry_after FROM idempotency.claim('prepared 3', 's', lease => '1 hour');
-- the user's own limit is an error
SET idempotency.wait_timeout = '1h';
SET lock_timeout = '10ms';
SELECT verdict, retry_after FROM idempotency.claim('prepared', 's');
RESET lock_timeout;
SET statement_timeout = '20ms';
SELECT verdict, retry_after FROM idempotency.claim('prepared', 's');
RESET statement_timeout;
RESET idempotency.wait_timeout;
-- a waiting claim leaves the settings as they were, and the transaction usable
BEGIN;
SET LOCAL idempotency.wait_timeout = '10ms';
SELECT verdict FROM idempotency.claim('prepared', 's');
SHOW lock_timeout;
SELECT token FROM idempotency.claim('meanwhile', 's') \gset
SELECT idempotency.record('meanwhile', 's', :token) IS NOT NULL AS done;
COMMIT;
ROLLBACK PREPARED 'regress_idempotency_1';
COMMIT PREPARED 'regress_idempotency_2';
SELECT * FROM keys;
SELECT verdict, response FROM idempotency.claim('prepared 2', 's', wait => false);
SELECT verdict, response FROM idempotency.claim('prepared 3', 's', wait => false);
-- a prepared change of a committed key: lapsed, extended, recorded, released
SELECT count(*) FROM generate_series(1, 4) i, LATERAL idempotency.claim('changed ' || i, 's', lease => '1 hour');
SELECT token AS t1 FROM idempotency.idempotency_keys WHERE key = 'changed 1' \gset
SELECT token AS t2 FROM idempotency.idempotency_keys WHERE key = 'changed 2' \gset
SELECT token AS t3 FROM idempotency.idempotency_keys WHERE key = 'changed 3' \gset
BEGIN;
SELECT idempotency.extend('changed 1', 's', :t1, '2 hours') IS NOT NULL AS done;
SELECT idempotency.record('changed 2', 's', :t2, '2') IS NOT NULL AS done;
SELECT idempotency.release('changed 3', 's', :t3);
UPDATE idempotency.idempotency_keys SET lease_expires_at = now() - interval '1 second' WHERE key = 'changed 4';
PREPARE TRANSACTION 'regress_idempotency_3';
-- committed and live: in progress at once, whoever is changing it
SET idempotency.wait_timeout = -1;
SELECT i, verdict, retry_after > 3000 AS an_hour FROM generate_series(1, 4) i, LATERAL idempotency.claim('changed ' || i, 's') c;
SELECT i, verdict, retry_after > 3000 AS an_hour FROM generate_series(1, 4) i, LATERAL idempotency.claim('changed ' || i, 's', wait => false) c;
RESET idempotency.wait_timeout;
COMMIT PREPARED 'regress_idempotency_3';
SELECT i, verdict, attempt, response FROM generate_series(1, 4) i, LATERAL idempotency.claim('changed ' || i, 's', lease => '1 hour') c;
DELETE FROM idempotency.idempotency_keys;
\endif
