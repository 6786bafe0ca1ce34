--
-- Nothing grows with every try
--
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS idempotency;
RESET client_min_messages;
\set VERBOSITY terse

-- an operation that stays unknown is tried again and again: its last tokens are kept
CREATE TEMP TABLE tries (try int, token bigint);
\set ECHO none
SELECT format('INSERT INTO tries SELECT %s, token FROM idempotency.stripe_claim(''bounded'', ''1'', lease => ''1 microsecond'')', i)
FROM generate_series(1, 200) i \gexec
\set ECHO all
SELECT attempt, cardinality(past_tokens),
	past_tokens = (SELECT array_agg(token ORDER BY try) FROM tries WHERE try BETWEEN 136 AND 199) AS the_last
FROM idempotency.stripe_idempotency_keys WHERE operation_type = 'bounded';
SELECT token FROM tries WHERE try = 135 \gset
SELECT idempotency.stripe_record('bounded', '1', :token, response => '{"id": "pi_1", "object": "payment_intent"}', http_status => 200);
SELECT token FROM tries WHERE try = 136 \gset
SELECT idempotency.stripe_record('bounded', '1', :token, response => '{"id": "pi_1", "object": "payment_intent"}', http_status => 200);

-- numbers with very many zeros, very many times: nothing writes the zeros out
SELECT verdict FROM idempotency.claim('zeros', 'bounded', (SELECT jsonb_agg(1e131071) FROM generate_series(1, 20000)), lease => '1 hour');
SELECT verdict FROM idempotency.claim('zeros', 'bounded', (SELECT jsonb_agg(-1e131071) FROM generate_series(1, 20000)), lease => '1 hour');
SELECT verdict FROM idempotency.claim('zeros', 'bounded', (SELECT jsonb_agg(1e131070 * 10.0) FROM generate_series(1, 20000)), lease => '1 hour');

DELETE FROM idempotency.stripe_idempotency_keys WHERE operation_type = 'bounded';
DELETE FROM idempotency.idempotency_keys WHERE scope = 'bounded';
