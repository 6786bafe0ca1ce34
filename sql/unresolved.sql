--
-- Nothing unresolved is ever removed: however old a row is, and however short
-- the retentions are, what may still happen keeps its row
--
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS idempotency;
RESET client_min_messages;
DELETE FROM idempotency.idempotency_keys;
DELETE FROM idempotency.stripe_idempotency_keys;

SET idempotency.abandoned_retention = '1s';
SET idempotency.stripe_body_retention = 0;
SET idempotency.stripe_retention = '1d';

-- requests: each combination of expires_at, lease and recovery point
INSERT INTO idempotency.idempotency_keys
	(token, claimed_at, lease_expires_at, lease, recorded_at, expires_at, attempt, http_status,
	 scope, key, recovery_point)
SELECT 1, now() - interval '10 years', now() + lease, interval '1 day',
	CASE WHEN expires IS NOT NULL THEN now() - interval '10 years' END, now() + expires, 1,
	CASE WHEN expires IS NOT NULL THEN 200 END, 's',
	concat_ws(', ', CASE WHEN expires IS NULL THEN 'unfinished'
			WHEN expires > interval '0' THEN 'recorded' ELSE 'expired' END,
		CASE WHEN lease IS NULL THEN 'no lease' WHEN lease > interval '0' THEN 'live' ELSE 'lapsed' END,
		point), point
FROM (VALUES (NULL::interval), ('1 hour'), ('-9 years')) e (expires),
	(VALUES (NULL::interval), ('1 hour'), ('-9 years')) l (lease),
	(VALUES (NULL), ('charged')) p (point);

-- calls to Stripe: each outcome, recorded ten years ago or not at all
INSERT INTO idempotency.stripe_idempotency_keys
	(token, created_at, claimed_at, first_sent_at, recorded_at, lease_expires_at, attempt, generation,
	 outcome, uncertain, account, operation_type, operation_id, idempotency_key, request, response)
SELECT 1, t, t, t, CASE WHEN recorded THEN t END, t, 1, 1, outcome, false, '', 'payment',
	outcome || CASE WHEN recorded THEN ', recorded' ELSE '' END, 'key', '{"a": 1}', '{"a": 1}'
FROM unnest(enum_range(NULL::idempotency.outcome)) outcome,
	(VALUES (false), (true)) r (recorded), (SELECT now() - interval '10 years' AS t) t;

-- events: each state, received ten years ago
SET idempotency.webhook_retention = 0;
DELETE FROM idempotency.stripe_webhook_events;
INSERT INTO idempotency.stripe_webhook_events
SELECT (jsonb_populate_record(NULL::idempotency.stripe_webhook_events, jsonb_build_object('token', 1,
	'received_at', t, 'next_attempt_at', t, 'claimed_at', CASE WHEN claimed THEN t END, 'success', success,
	'processed_at', CASE WHEN success IS NOT NULL THEN t END, 'created', t, 'attempts', 1, 'livemode', false,
	'account', '', 'consumer', '', 'event_type', 'test', 'payload', '\x00',
	'stripe_event_id', concat_ws(', ', 'evt', CASE WHEN claimed THEN 'claimed' END, 'success ' || success)))).*
FROM (VALUES (NULL::boolean), (false), (true)) s (success), (VALUES (false), (true)) c (claimed),
	(SELECT now() - interval '10 years' AS t) t;

SELECT * FROM idempotency.expire();
SELECT * FROM idempotency.expire();
SELECT stripe_event_id FROM idempotency.stripe_webhook_events ORDER BY 1;
DELETE FROM idempotency.stripe_webhook_events;
RESET idempotency.webhook_retention;
SELECT key FROM idempotency.idempotency_keys ORDER BY key;
SELECT operation_id, request, response FROM idempotency.stripe_idempotency_keys ORDER BY operation_id;

-- with the defaults no call to Stripe is ever removed
RESET idempotency.stripe_retention;
RESET idempotency.stripe_body_retention;
DELETE FROM idempotency.stripe_idempotency_keys;
INSERT INTO idempotency.stripe_idempotency_keys
	(token, created_at, claimed_at, first_sent_at, recorded_at, attempt, generation,
	 outcome, uncertain, account, operation_type, operation_id, idempotency_key)
SELECT 1, t, t, t, t, 1, 1, outcome, false, '', 'payment', outcome, 'key'
FROM unnest(enum_range(NULL::idempotency.outcome)) outcome, (SELECT now() - interval '100 years' AS t) t;
SELECT * FROM idempotency.expire();
SELECT count(*) FROM idempotency.stripe_idempotency_keys;

-- a row that changes between the search and the removal is looked at again:
-- the removal repeats token and condition (test/specs/expire_*.spec)
DELETE FROM idempotency.idempotency_keys;
DELETE FROM idempotency.stripe_idempotency_keys;
