--
-- Expiry by hand, and the settings of the background workers
--
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS idempotency;
RESET client_min_messages;
LOAD 'idempotency';
\set SHOW_CONTEXT never

-- what other tests have left
BEGIN;
DELETE FROM idempotency.idempotency_keys;
DELETE FROM idempotency.stripe_idempotency_keys;
DELETE FROM idempotency.stripe_webhook_events;

-- rows in any state, their times moved to the past
CREATE FUNCTION pg_temp.recorded(n integer, expired interval) RETURNS void
LANGUAGE sql AS $$
	INSERT INTO idempotency.idempotency_keys
		(token, claimed_at, recorded_at, expires_at, attempt, http_status, scope, key)
	SELECT i, t - interval '1 hour', t - interval '1 hour', t, 1, 200, 's',
		'k' || i || CASE WHEN expired < interval '0' THEN ' live' ELSE '' END
	FROM generate_series(1, n) i, (SELECT clock_timestamp() - expired AS t) t
$$;

--
-- Settings
--
SELECT name, setting, unit, min_val, max_val, context
FROM pg_settings
WHERE name ~ '^idempotency\.(abandoned|stripe_(body_)?retention|expiry|max_workers)'
ORDER BY name;

\set VERBOSITY sqlstate
SAVEPOINT s;
SET idempotency.abandoned_retention = 0;
ROLLBACK TO s;
SET idempotency.abandoned_retention = '-1';
ROLLBACK TO s;
SET idempotency.stripe_body_retention = -2;
ROLLBACK TO s;
SET idempotency.stripe_retention = -2;
ROLLBACK TO s;
SET idempotency.stripe_retention = '23h';
ROLLBACK TO s;
SET idempotency.stripe_retention = 'forever';
ROLLBACK TO s;
SET idempotency.expiry_interval = 0;
ROLLBACK TO s;
SET idempotency.expiry_interval = '2d';
ROLLBACK TO s;
SET idempotency.expiry_batch_size = 0;
ROLLBACK TO s;
SET idempotency.expiry_batch_size = 100001;
ROLLBACK TO s;
SET idempotency.expiry = 'perhaps';
ROLLBACK TO s;
SET idempotency.max_workers = 1;
ROLLBACK TO s;
\set VERBOSITY default

SET idempotency.abandoned_retention = '90min';
SHOW idempotency.abandoned_retention;
SET idempotency.stripe_retention = '24h';
SHOW idempotency.stripe_retention;
ROLLBACK TO s;

-- a database may have its own
DO $$ BEGIN
	EXECUTE format('ALTER DATABASE %I SET idempotency.expiry = off', current_database());
	EXECUTE format('ALTER DATABASE %I SET idempotency.abandoned_retention = %L', current_database(), '1d');
END $$;
SELECT setting FROM pg_db_role_setting, unnest(setconfig) AS setting
WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())
	AND setting ~ '^idempotency' ORDER BY 1;
ROLLBACK TO s;

--
-- Recorded keys
--
SELECT pg_temp.recorded(5, interval '1 second'), pg_temp.recorded(3, interval '-1 hour');
SELECT * FROM idempotency.expire(2);
SELECT * FROM idempotency.expire(2);
SELECT * FROM idempotency.expire();
SELECT * FROM idempotency.expire();
SELECT key FROM idempotency.idempotency_keys ORDER BY key;

-- rolled back, they are there again, and found again
SELECT pg_temp.recorded(4, interval '1 second');
SAVEPOINT expired;
SELECT sum(removed) FROM idempotency.expire();
ROLLBACK TO expired;
SELECT sum(removed) FROM idempotency.expire(3);
SELECT sum(removed) FROM idempotency.expire(3);

-- the batch size is the default
SELECT pg_temp.recorded(10, interval '1 second');
SET LOCAL idempotency.expiry_batch_size = 7;
SELECT sum(removed) FROM idempotency.expire();
SELECT sum(removed) FROM idempotency.expire();
RESET idempotency.expiry_batch_size;

-- more than a window of the table
SELECT pg_temp.recorded(40000, interval '1 second');
SELECT sum(removed) FROM idempotency.expire(30000);
SELECT sum(removed) FROM idempotency.expire(30000);
SELECT sum(removed) FROM idempotency.expire(30000);

-- arguments
SAVEPOINT s;
SELECT idempotency.expire(0);
ROLLBACK TO s;
SELECT idempotency.expire(-1);
ROLLBACK TO s;
SELECT idempotency.expire(100001);
ROLLBACK TO s;
COMMIT;

BEGIN READ ONLY;
SELECT idempotency.expire();
ROLLBACK;
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT pg_temp.recorded(2, interval '1 second');
SELECT sum(removed) FROM idempotency.expire();
COMMIT;

--
-- Abandoned claims
--
SELECT token AS lapsed FROM idempotency.claim('lapsed', 's', lease => '1 hour') \gset
SELECT token AS pointed FROM idempotency.claim('pointed', 's', lease => '1 hour') \gset
SELECT idempotency.checkpoint('pointed', 's', :pointed, 'charged') IS NOT NULL AS pointed;
SELECT verdict FROM idempotency.claim('held', 's', lease => '1 hour');
BEGIN;
SET LOCAL idempotency.open_claim_at_commit = allow;
SELECT verdict FROM idempotency.claim('left', 's');
COMMIT;
-- six days ago, nothing is abandoned; eight days ago, the lapsed are
UPDATE idempotency.idempotency_keys SET claimed_at = claimed_at - interval '6 days',
	lease_expires_at = CASE WHEN key = 'held' THEN lease_expires_at
		ELSE clock_timestamp() - interval '6 days' END
WHERE expires_at IS NULL AND key <> 'left';
SELECT sum(removed) FROM idempotency.expire();
UPDATE idempotency.idempotency_keys SET claimed_at = claimed_at - interval '8 days',
	lease_expires_at = CASE WHEN key = 'held' THEN lease_expires_at
		ELSE lease_expires_at - interval '2 days' END
WHERE expires_at IS NULL;
SELECT sum(removed) FROM idempotency.expire();
SELECT key FROM idempotency.idempotency_keys WHERE expires_at IS NULL ORDER BY key;
SELECT sum(removed) FROM idempotency.expire();
DELETE FROM idempotency.idempotency_keys;

-- what is claimed and not committed is not there to be abandoned
SET idempotency.abandoned_retention = '1s';
BEGIN;
SELECT verdict, token FROM idempotency.claim('own', 's') \gset
UPDATE idempotency.idempotency_keys SET claimed_at = claimed_at - interval '1 year' WHERE key = 'other';
SELECT sum(removed) FROM idempotency.expire();
SELECT idempotency.record('own', 's', :token) IS NOT NULL AS recorded;
COMMIT;
RESET idempotency.abandoned_retention;
DELETE FROM idempotency.idempotency_keys;

--
-- Calls to Stripe
--
CREATE FUNCTION pg_temp.call(id text, status integer, body jsonb) RETURNS idempotency.outcome
LANGUAGE sql AS $$
	SELECT idempotency.stripe_record('payment', id, c.token, http_status => status, response => body,
		request_id => 'req_' || id)
	FROM idempotency.stripe_claim('payment', id, request => '{"amount": 1}', lease => '1 hour') c
$$;
SET idempotency.stripe_ledger = transaction;
SELECT pg_temp.call('again', 402, '{"error": {"type": "card_error", "payment_intent": {"id": "pi_0"}}}');
SELECT idempotency.stripe_reopen('payment', 'again') IS NOT NULL AS reopened;
SELECT pg_temp.call('again', 200, '{"id": "pi_1", "object": "payment_intent", "livemode": true}');
SELECT pg_temp.call('declined', 402, '{"error": {"type": "card_error", "code": "card_declined"}}');
SELECT pg_temp.call('lost', 500, '{"error": {"type": "api_error"}}');
SELECT pg_temp.call('free', 429, '{"error": {"type": "rate_limit_error"}}');
SELECT verdict FROM idempotency.stripe_claim('payment', 'held', request => '{"amount": 1}');
SELECT sum(removed) FROM idempotency.expire();
CREATE TEMP TABLE before AS SELECT * FROM idempotency.stripe_idempotency_keys;
UPDATE idempotency.stripe_idempotency_keys SET recorded_at = recorded_at - interval '31 days';
SELECT * FROM idempotency.expire(1);
SELECT * FROM idempotency.expire();
SELECT * FROM idempotency.expire();
-- what a settled row has lost
SELECT operation_id, o.key AS lost
FROM before b JOIN idempotency.stripe_idempotency_keys s USING (operation_id),
	jsonb_each(to_jsonb(b) - 'recorded_at') o
WHERE o.value IS DISTINCT FROM to_jsonb(s) -> o.key
ORDER BY 1, 2;
SELECT operation_id, outcome, resource_id, request_id, http_status, request, response, error,
	history -> 0 ->> 'resource_id' AS before, history -> 0 ->> 'error' AS error_before
FROM idempotency.stripe_idempotency_keys ORDER BY operation_id;
-- it replays all the same
SELECT verdict, outcome, resource_id, response FROM idempotency.stripe_claim('payment', 'again', '{"amount": 1}');
SELECT verdict FROM idempotency.stripe_claim('payment', 'again', '{"amount": 2}');
SELECT verdict, outcome, error FROM idempotency.stripe_claim('payment', 'declined', '{"amount": 1}');
-- a refused one is still reopened, and its bodies are new
SELECT idempotency.stripe_reopen('payment', 'declined') IS NOT NULL AS reopened;
SELECT pg_temp.call('declined', 200, '{"id": "pi_2"}');
SELECT sum(removed) FROM idempotency.expire();
-- kept for ever
SET idempotency.stripe_body_retention = -1;
UPDATE idempotency.stripe_idempotency_keys SET recorded_at = recorded_at - interval '10 years';
SELECT sum(removed) FROM idempotency.expire();
RESET idempotency.stripe_body_retention;
-- or not
SET idempotency.stripe_retention = '24h';
SELECT * FROM idempotency.expire();
SELECT operation_id, outcome FROM idempotency.stripe_idempotency_keys ORDER BY operation_id;
RESET idempotency.stripe_retention;
DELETE FROM idempotency.stripe_idempotency_keys;

--
-- Rows that can't be removed
--
CREATE TABLE pg_temp.refused (key text);
CREATE FUNCTION pg_temp.refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF OLD.key IN (SELECT key FROM pg_temp.refused) THEN
		RAISE EXCEPTION 'not this one';
	END IF;
	RETURN OLD;
END $$;
CREATE TRIGGER refuse BEFORE DELETE ON idempotency.idempotency_keys
	FOR EACH ROW EXECUTE FUNCTION pg_temp.refuse();
INSERT INTO pg_temp.refused VALUES ('k1'), ('k17'), ('k18'), ('k500'), ('k1000');
SELECT pg_temp.recorded(1000, interval '1 second');
SELECT sum(removed) FROM idempotency.expire(900);
SELECT sum(removed) FROM idempotency.expire(900);
SELECT sum(removed) FROM idempotency.expire(900);
SELECT key FROM idempotency.idempotency_keys ORDER BY key;
DELETE FROM pg_temp.refused;
SELECT sum(removed) FROM idempotency.expire();

-- where all of them refuse, it gives up
SELECT pg_temp.recorded(300, interval '1 second');
INSERT INTO pg_temp.refused SELECT key FROM idempotency.idempotency_keys;
SELECT sum(removed) FROM idempotency.expire();
DROP TRIGGER refuse ON idempotency.idempotency_keys;

-- one that a trigger keeps silently
CREATE FUNCTION pg_temp.keep() RETURNS trigger LANGUAGE plpgsql AS
	$$ BEGIN RETURN CASE WHEN OLD.key <> 'k7' THEN OLD END; END $$;
CREATE TRIGGER keep BEFORE DELETE ON idempotency.idempotency_keys
	FOR EACH ROW EXECUTE FUNCTION pg_temp.keep();
SELECT sum(removed) FROM idempotency.expire();
SELECT sum(removed) FROM idempotency.expire();
SELECT key FROM idempotency.idempotency_keys;
DROP TRIGGER keep ON idempotency.idempotency_keys;
SELECT sum(removed) FROM idempotency.expire();

-- one that sets lock_timeout, too, and fails
SELECT pg_temp.recorded(5, interval '1 second');
CREATE FUNCTION pg_temp.fail() RETURNS trigger LANGUAGE plpgsql SET lock_timeout = '7s' AS
	$$ BEGIN RAISE 'not this one'; END $$;
CREATE TRIGGER fail BEFORE DELETE ON idempotency.idempotency_keys
	FOR EACH ROW WHEN (OLD.key = 'k3') EXECUTE FUNCTION pg_temp.fail();
SELECT sum(removed) FROM idempotency.expire();
SHOW lock_timeout;
DROP TRIGGER fail ON idempotency.idempotency_keys;
SELECT sum(removed) FROM idempotency.expire();

--
-- A table that the planner must be asked about
--
ALTER TABLE idempotency.idempotency_keys ENABLE ROW LEVEL SECURITY;
ALTER TABLE idempotency.stripe_idempotency_keys ENABLE ROW LEVEL SECURITY;
SELECT pg_temp.recorded(25, interval '1 second'), pg_temp.recorded(2, interval '-1 hour');
INSERT INTO idempotency.idempotency_keys (token, claimed_at, expires_at, attempt, http_status, scope, key)
	SELECT token, claimed_at, expires_at, attempt, http_status, '', key
	FROM idempotency.idempotency_keys WHERE key LIKE 'k1%';
SELECT verdict FROM idempotency.claim('abandoned', 's', lease => '1 hour');
UPDATE idempotency.idempotency_keys SET lease_expires_at = lease_expires_at - interval '8 days' WHERE key = 'abandoned';
SELECT pg_temp.call('one', 200, '{"id": "pi_1"}');
UPDATE idempotency.stripe_idempotency_keys SET recorded_at = recorded_at - interval '31 days';
SELECT * FROM idempotency.expire(10);
SELECT * FROM idempotency.expire(10);
SELECT * FROM idempotency.expire(100);
SELECT * FROM idempotency.expire(100);
SELECT scope, key FROM idempotency.idempotency_keys ORDER BY scope, key;
SELECT request, response FROM idempotency.stripe_idempotency_keys;
SET idempotency.stripe_retention = '24h';
SELECT * FROM idempotency.expire(100);
RESET idempotency.stripe_retention;
-- keys so long that they are in TOAST, and vacuumed away from there
ALTER TABLE idempotency.idempotency_keys SET (toast_tuple_target = 128);
INSERT INTO idempotency.idempotency_keys (token, claimed_at, expires_at, attempt, http_status, scope, key, response_body)
	SELECT i, now(), now() - interval '1 second', 1, 200, 's',
		i || string_agg(md5(i || ' ' || j), '') FILTER (WHERE j <= 7), convert_to(string_agg(md5(i || ' ' || j), ''), 'UTF8')
	FROM generate_series(1, 2) i, generate_series(1, 70) j GROUP BY i;
SELECT sum(removed) FROM idempotency.expire(1);
VACUUM idempotency.idempotency_keys;
SELECT sum(removed) FROM idempotency.expire(1);
ALTER TABLE idempotency.idempotency_keys RESET (toast_tuple_target);
ALTER TABLE idempotency.idempotency_keys DISABLE ROW LEVEL SECURITY;
ALTER TABLE idempotency.stripe_idempotency_keys DISABLE ROW LEVEL SECURITY;

--
-- A search_path that means ill
--
CREATE SCHEMA expire_hostile;
CREATE FUNCTION expire_hostile.yes(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT true';
CREATE FUNCTION expire_hostile.yes(timestamptz, timestamptz) RETURNS boolean LANGUAGE sql AS 'SELECT true';
CREATE OPERATOR expire_hostile.= (LEFTARG = text, RIGHTARG = text, FUNCTION = expire_hostile.yes);
CREATE OPERATOR expire_hostile.<= (LEFTARG = timestamptz, RIGHTARG = timestamptz, FUNCTION = expire_hostile.yes);
SELECT pg_temp.recorded(2, interval '1 second');
SET search_path = expire_hostile, pg_catalog;
SELECT sum(removed) FROM idempotency.expire();
SELECT pg_catalog.count(*) FROM idempotency.idempotency_keys;
RESET search_path;
SET client_min_messages = warning;
DROP SCHEMA expire_hostile CASCADE;
RESET client_min_messages;

--
-- Who may
--
CREATE ROLE regress_expire_operator;
CREATE ROLE regress_expire_observer;
SELECT idempotency.grant_role('regress_expire_operator', 'operator'),
	idempotency.grant_role('regress_expire_observer', 'observer');
SELECT pg_temp.recorded(1, interval '1 second');
SET ROLE regress_expire_observer;
SELECT idempotency.expire();
SELECT count(*) FROM idempotency.workers;
SET ROLE regress_expire_operator;
SELECT sum(removed) FROM idempotency.expire();
SELECT count(*) FROM idempotency.workers;
SET idempotency.abandoned_retention = '1s';
RESET ROLE;
DROP OWNED BY regress_expire_operator, regress_expire_observer;
DROP ROLE regress_expire_operator, regress_expire_observer;

-- what a trigger may say: an error of the machine, of another transaction, or of its row,
-- and of another row the second time
CREATE TEMP SEQUENCE said;
CREATE FUNCTION pg_temp.say() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF OLD.key = 'k2' OR (nextval('pg_temp.said') > 1 AND OLD.key = 'k1') THEN
		RAISE EXCEPTION 'no: %', OLD.key USING ERRCODE = current_setting('test.sqlstate');
	END IF;
	RETURN OLD;
END $$;
CREATE TRIGGER say BEFORE DELETE ON idempotency.idempotency_keys FOR EACH ROW EXECUTE FUNCTION pg_temp.say();
SELECT pg_temp.recorded(3, interval '1 second');
SET test.sqlstate = '53200';
SELECT removed FROM idempotency.expire() WHERE ledger = 'request';
SET test.sqlstate = '40P01';
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT setval('pg_temp.said', 1, false);
SELECT removed FROM idempotency.expire() WHERE ledger = 'request';
ROLLBACK;
SELECT key FROM idempotency.idempotency_keys ORDER BY 1;
BEGIN;
SELECT setval('pg_temp.said', 1, false);
SELECT removed FROM idempotency.expire() WHERE ledger = 'request';
SELECT key FROM idempotency.idempotency_keys ORDER BY 1;
ROLLBACK;
SET test.sqlstate = '22000';
SELECT setval('pg_temp.said', 1, false);
SELECT removed FROM idempotency.expire() WHERE ledger = 'request';
SELECT key FROM idempotency.idempotency_keys ORDER BY 1;

DROP TRIGGER say ON idempotency.idempotency_keys;

-- a retention of -1 keeps every event
INSERT INTO idempotency.stripe_webhook_events
SELECT (jsonb_populate_record(NULL::idempotency.stripe_webhook_events, jsonb_build_object('token', 1,
	'received_at', t, 'next_attempt_at', t, 'claimed_at', t, 'success', true, 'processed_at', t, 'created', t, 'attempts', 1, 'livemode', false,
	'account', '', 'consumer', '', 'event_type', 'test', 'stripe_event_id', 'evt_1'))).*
FROM (SELECT now() - interval '100 years' AS t) t;
SET idempotency.webhook_retention = -1;
SELECT removed FROM idempotency.expire() WHERE ledger = 'webhook';
RESET idempotency.webhook_retention;
SELECT removed FROM idempotency.expire() WHERE ledger = 'webhook';
DELETE FROM idempotency.idempotency_keys;
DELETE FROM idempotency.stripe_idempotency_keys;
