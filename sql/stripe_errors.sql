--
-- The ledger of calls to Stripe: what is refused, how it is said, and that
-- nothing is changed by it
--
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS idempotency;
RESET client_min_messages;
\set SHOW_CONTEXT never

-- not inside a transaction block: what is noted might roll back after it was sent
BEGIN;
SELECT * FROM idempotency.stripe_claim('pay', 'in block');
ROLLBACK;
BEGIN;
SELECT idempotency.stripe_reopen('pay', 'in block');
ROLLBACK;
\set VERBOSITY sqlstate
BEGIN;
SAVEPOINT s;
SELECT * FROM idempotency.stripe_claim('pay', 'in block');
ROLLBACK;
-- an exception block is one, too
DO $$
BEGIN
	PERFORM idempotency.stripe_claim('pay', 'in block');
EXCEPTION WHEN division_by_zero THEN
END $$;
\set VERBOSITY default
-- outside: on disk when it returns, whatever synchronous_commit says
SET synchronous_commit = off;
SELECT pg_current_wal_insert_lsn() AS before \gset
SELECT verdict FROM idempotency.stripe_claim('pay', 'flushed');
SELECT pg_current_wal_flush_lsn() > :'before' AS flushed;
RESET synchronous_commit;

SELECT token AS t1 FROM idempotency.stripe_claim('pay', '1', '{"a": 1}') \gset
CREATE TEMP TABLE before AS SELECT xmin::text AS version, * FROM idempotency.stripe_idempotency_keys;

-- unknown operations and tokens
SELECT idempotency.stripe_record('pay', 'never claimed', 1, 'pi_1');
SELECT idempotency.stripe_record('pay', '1', 1, 'pi_1');
SELECT idempotency.stripe_record('pay', '1', :t1, 'pi_1', account => 'acct_1');
SELECT idempotency.stripe_release('pay', 'never claimed', 1);
SELECT idempotency.stripe_release('pay', '1', 1);
SELECT idempotency.stripe_extend('pay', 'never claimed', 1);
SELECT idempotency.stripe_extend('pay', '1', 1);
SELECT idempotency.stripe_reopen('pay', 'never claimed');
-- in progress
SELECT idempotency.stripe_reopen('pay', '1');
SELECT idempotency.stripe_reopen('pay', '1', force => true);
SELECT idempotency.stripe_reopen('pay', '1', from_generation => 2);
SELECT count(*) AS unchanged FROM before b JOIN idempotency.stripe_idempotency_keys k USING (account, operation_type, operation_id)
WHERE b.version = k.xmin::text;

-- recorded: final
SELECT idempotency.stripe_record('pay', '1', :t1, 'pi_1');
TRUNCATE before;
INSERT INTO before SELECT xmin::text AS version, * FROM idempotency.stripe_idempotency_keys;
SELECT idempotency.stripe_record('pay', '1', :t1, 'pi_2');
SELECT idempotency.stripe_record('pay', '1', :t1, http_status => 402, response => '{"error": {"type": "card_error"}}');
SELECT idempotency.stripe_release('pay', '1', :t1);
SELECT idempotency.stripe_extend('pay', '1', :t1);
SELECT idempotency.stripe_reopen('pay', '1');
SELECT idempotency.stripe_reopen('pay', '1', force => true);
SELECT count(*) AS unchanged FROM before b JOIN idempotency.stripe_idempotency_keys k USING (account, operation_type, operation_id)
WHERE b.version = k.xmin::text;

-- failed, then another result
SELECT token AS t2 FROM idempotency.stripe_claim('pay', '2') \gset
SELECT idempotency.stripe_record('pay', '2', :t2, http_status => 402, response => '{"error": {"type": "card_error"}}');
SELECT idempotency.stripe_record('pay', '2', :t2, 'pi_2');
SELECT idempotency.stripe_reopen('pay', '2', from_generation => 3);
SELECT outcome, generation FROM idempotency.stripe_lookup('pay', '2');

-- unknown
SELECT token AS t3 FROM idempotency.stripe_claim('pay', '3') \gset
SELECT idempotency.stripe_record('pay', '3', :t3);
SELECT idempotency.stripe_reopen('pay', '3');
-- lapsed: not known, either
SELECT token AS t4 FROM idempotency.stripe_claim('pay', '4', lease => '1 microsecond') \gset
SELECT idempotency.stripe_reopen('pay', '4');
-- Stripe knows the key from another request
SELECT token AS t5 FROM idempotency.stripe_claim('pay', '5') \gset
SELECT idempotency.stripe_record('pay', '5', :t5, http_status => 400, response => '{"error": {"type": "idempotency_error"}}');
SELECT idempotency.stripe_reopen('pay', '5');
SELECT idempotency.stripe_release('pay', '5', :t5);

-- taken over: a late token that contradicts
SELECT token AS t6 FROM idempotency.stripe_claim('pay', '6', lease => '1 microsecond') \gset
SELECT token AS t7 FROM idempotency.stripe_claim('pay', '6') \gset
SELECT idempotency.stripe_extend('pay', '6', :t6);
SELECT idempotency.stripe_release('pay', '6', :t6);
SELECT idempotency.stripe_record('pay', '6', :t7, 'pi_6');
SELECT idempotency.stripe_record('pay', '6', :t6, 'pi_7');
SELECT idempotency.stripe_record('pay', '6', :t6, http_status => 402, response => '{"error": {"type": "card_error"}}');
SELECT resource_id FROM idempotency.stripe_lookup('pay', '6');

-- too large
\set VERBOSITY sqlstate
SELECT verdict FROM idempotency.stripe_claim('pay', 'large', to_jsonb(repeat('x', 2000000)));
SELECT idempotency.stripe_lookup('pay', 'large') IS NULL AS absent;
\set VERBOSITY default

-- a table that isn't ours any more
BEGIN;
ALTER TABLE idempotency.stripe_idempotency_keys RENAME COLUMN request_id TO request_number;
SELECT idempotency.stripe_lookup('pay', '1');
ROLLBACK;
BEGIN;
CREATE FUNCTION pg_temp.suppress() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE TRIGGER suppress BEFORE UPDATE ON idempotency.stripe_idempotency_keys
	FOR EACH ROW EXECUTE FUNCTION pg_temp.suppress();
SELECT idempotency.stripe_record('pay', '4', :t4, 'pi_4');
ROLLBACK;

-- a read-only transaction
BEGIN READ ONLY;
SET LOCAL idempotency.stripe_ledger = transaction;
SELECT verdict FROM idempotency.stripe_claim('pay', '1');
SELECT verdict FROM idempotency.stripe_claim('pay', 'new');
ROLLBACK;
DELETE FROM idempotency.stripe_idempotency_keys;
