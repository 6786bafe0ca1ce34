--
-- What is kept for ever makes nothing slower: views and expiry find what they
-- look for by an index that has nothing else
--
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS idempotency;
RESET client_min_messages;
LOAD 'idempotency';

BEGIN;
-- what other tests have left
DELETE FROM idempotency.idempotency_keys;
DELETE FROM idempotency.stripe_idempotency_keys;
DELETE FROM idempotency.stripe_webhook_events;

-- operations recorded so long ago, all at the same moment
CREATE FUNCTION pg_temp.calls(kind text, n integer, outcome idempotency.outcome, age interval,
	body boolean DEFAULT false, callers xid8[] DEFAULT NULL) RETURNS void
LANGUAGE sql AS $$
	INSERT INTO idempotency.stripe_idempotency_keys (token, created_at, claimed_at, recorded_at, attempt,
		generation, outcome, uncertain, account, operation_type, operation_id, idempotency_key, request,
		callers, callers_system)
	SELECT i, now() - age, now() - age, CASE WHEN outcome <> 'in_progress' THEN now() - age END, 1, 1, outcome,
		false, '', kind, i::text, kind || i, CASE WHEN body THEN '{}'::jsonb END, callers, 1
	FROM generate_series(1, n) i
$$;

-- the indexes that a plan uses, and the tables that it reads through
CREATE FUNCTION pg_temp.reads(query text) RETURNS TABLE (reads text)
LANGUAGE plpgsql AS $$
DECLARE
	plan jsonb;
BEGIN
	EXECUTE 'EXPLAIN (FORMAT JSON) ' || query INTO plan;
	RETURN QUERY SELECT DISTINCT COALESCE(n #>> '{}', '')
	FROM jsonb_path_query(plan, '$.**."Index Name"') n
	UNION SELECT 'all of ' || (n ->> 'Relation Name')
	FROM jsonb_path_query(plan, '$.** ? (@."Node Type" == "Seq Scan")') n
	ORDER BY 1;
END $$;

-- rows of this table that this transaction has seen by reading the table
CREATE FUNCTION pg_temp.read_through() RETURNS bigint
LANGUAGE sql AS $$
	SELECT pg_stat_get_xact_tuples_returned('idempotency.stripe_idempotency_keys'::regclass)
$$;

SELECT pg_temp.calls('kept', 3000, 'completed', '1 day'), pg_temp.calls('refused', 100, 'failed', '1 day');
SELECT pg_temp.calls('unknown', 2, 'unknown', '3 days'), pg_temp.calls('lapsed', 2, 'in_progress', '2 days'),
	pg_temp.calls('mismatch', 2, 'mismatch', '1 day'),
	pg_temp.calls('orphan', 2, 'completed', '3 days', callers => '{}'),
	pg_temp.calls('maybe', 2, 'unknown', '2 days', callers => '{}'),
	-- no orphans: Stripe did nothing, or doesn't know yet
	pg_temp.calls('declined', 2, 'failed', '3 days', callers => '{}'),
	pg_temp.calls('free', 2, 'not_executed', '3 days', callers => '{}');
ANALYZE idempotency.stripe_idempotency_keys;

--
-- The views
--
SELECT * FROM pg_temp.reads('SELECT * FROM idempotency.stripe_unknown');
SELECT * FROM pg_temp.reads('SELECT * FROM idempotency.stripe_orphans');
-- (by one index or another)
SELECT count(*) FROM pg_temp.reads($$SELECT * FROM idempotency.open_claims WHERE ledger = 'stripe'$$)
WHERE reads LIKE 'all%';
SELECT operation_type, reason, count(*) FROM idempotency.stripe_unknown GROUP BY 1, 2 ORDER BY 1, 2;
SELECT operation_type, outcome, fate, count(*) FROM idempotency.stripe_orphans GROUP BY 1, 2, 3 ORDER BY 1, 2;
SELECT operation_type, count(*) FROM idempotency.open_claims GROUP BY 1 ORDER BY 1;
-- acknowledged, an orphan leaves the index
UPDATE idempotency.stripe_idempotency_keys SET acknowledged = '{}' WHERE operation_type = 'orphan' AND operation_id = '1';
SELECT operation_type, operation_id FROM idempotency.stripe_orphans WHERE outcome = 'completed';

-- of events what isn't processed
INSERT INTO idempotency.stripe_webhook_events (token, received_at, processed_at, created, attempts, next_attempt_at, success,
	account, stripe_event_id, consumer, event_type)
SELECT i, now(), now(), now(), 1, now(), CASE WHEN i > 2 THEN true END, '', 'evt_' || i, '', 'charge.succeeded'
FROM generate_series(1, 3000) i;
ANALYZE idempotency.stripe_webhook_events;
SELECT * FROM pg_temp.reads('SELECT * FROM idempotency.stripe_webhook_pending');

--
-- Expiry
--
SELECT pg_temp.calls('whole', 5, 'completed', '31 days', true), pg_temp.calls('bare', 5, 'failed', '32 days');
SELECT pg_temp.read_through() AS before \gset
SELECT * FROM idempotency.expire(3);
SELECT sum(removed) FROM idempotency.expire(3);
SELECT pg_temp.read_through() - :before AS read_through;
SELECT pg_temp.calls('whole again', 5, 'completed', '31 days', true);
SET LOCAL idempotency.stripe_body_retention = -1;
SET LOCAL idempotency.stripe_retention = '30d';
-- first those without a body, then those with one
SELECT pg_temp.read_through() AS before \gset
SELECT sum(removed) FROM idempotency.expire(4);
SELECT sum(removed) FROM idempotency.expire(4);
SELECT sum(removed) FROM idempotency.expire(4);
SELECT sum(removed) FROM idempotency.expire(4);
SELECT sum(removed) FROM idempotency.expire(4);
SELECT pg_temp.read_through() - :before AS read_through;
SELECT count(*) FROM idempotency.stripe_idempotency_keys WHERE operation_type ~ 'bare|whole';

-- where somebody has taken the indexes away, the table is read
ALTER INDEX idempotency.stripe_idempotency_keys_settled_idx RENAME TO aside;
SELECT pg_temp.calls('whole', 5, 'completed', '31 days', true), pg_temp.calls('bare', 5, 'failed', '32 days');
SELECT sum(removed) FROM idempotency.expire(4);
SELECT sum(removed) FROM idempotency.expire(4);
SELECT sum(removed) FROM idempotency.expire(4);
-- so it is where another one has the name
CREATE INDEX stripe_idempotency_keys_settled_idx ON idempotency.stripe_idempotency_keys (operation_id);
SELECT pg_temp.calls('whole', 5, 'completed', '31 days', true);
SELECT sum(removed) FROM idempotency.expire();
ROLLBACK;
