--
-- The ledger of calls to Stripe: states and transitions
--
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS idempotency;
RESET client_min_messages;
\set SHOW_CONTEXT never

-- all of an answer that isn't NULL; the derived, the time and the random are replaced
CREATE FUNCTION pg_temp.shown(c idempotency.stripe_claim_result) RETURNS jsonb
LANGUAGE sql AS $$
	SELECT jsonb_strip_nulls(to_jsonb(c) || jsonb_build_object(
		'token', c.token BETWEEN 1 AND 9007199254740991,
		'retry_after', c.retry_after >= 1,
		'resend_until', c.resend_until > clock_timestamp(),
		'idempotency_key', regexp_replace(c.idempotency_key,
			'[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$', 'UUID')))
$$;
-- a row
CREATE FUNCTION pg_temp.op(id text, OUT outcome idempotency.outcome, OUT attempt int, OUT gen int, OUT uncertain boolean,
	OUT sent boolean, OUT held boolean, OUT recorded boolean, OUT http_status int, OUT resource_id text)
LANGUAGE sql AS $$
	SELECT outcome, attempt, generation, uncertain, first_sent_at IS NOT NULL, lease_expires_at > clock_timestamp(),
		recorded_at IS NOT NULL, http_status, resource_id
	FROM idempotency.stripe_idempotency_keys WHERE operation_id = id AND account = ''
$$;

--
-- Claim, send, record, replay
--
SELECT idempotency.stripe_idempotency_key('payment', 'order_1') AS key \gset
SELECT idempotency.stripe_lookup('payment', 'order_1') IS NULL AS absent;
SELECT token, idempotency_key = :'key' AS same_key, pg_temp.shown(c)
FROM idempotency.stripe_claim('payment', 'order_1', '{"method": "POST", "path": "/v1/payment_intents", "params": {"amount": 1000}}') c \gset
\echo :same_key :shown
SELECT * FROM pg_temp.op('order_1');
SELECT pg_temp.shown(c) FROM idempotency.stripe_claim('payment', 'order_1') c;
SELECT retry_after BETWEEN 240 AND 300 AS five_minutes, resend_until BETWEEN clock_timestamp() + interval '22 h 59 min'
	AND clock_timestamp() + interval '23 h' AS window FROM idempotency.stripe_claim('payment', 'order_1');
SELECT idempotency.stripe_record('payment', 'order_1', :token, request_id => 'req_1', http_status => 200,
	response => '{"id": "pi_1", "object": "payment_intent", "livemode": false, "status": "succeeded"}');
SELECT * FROM pg_temp.op('order_1');
SELECT pg_temp.shown(c) FROM idempotency.stripe_claim('payment', 'order_1') c;
SELECT pg_temp.shown(c) FROM idempotency.stripe_claim('payment', 'order_1',
	'{"path": "/v1/payment_intents", "method": "POST", "params": {"amount": 1000.00}}') c;
-- another request: what is known is told, the caller is the application itself
SELECT pg_temp.shown(c) FROM idempotency.stripe_claim('payment', 'order_1',
	'{"method": "POST", "path": "/v1/payment_intents", "params": {"amount": 2000}}') c;
SELECT account, operation_type, operation_id, idempotency_key = :'key' AS same_key, generation, attempt, outcome, resource_id,
	resource_type, http_status, request_id, livemode, lapsed, lease_expires_at, history, recorded_at >= claimed_at AS recorded,
	first_sent_at = claimed_at AS sent, created_at = claimed_at AS created, resend_until - first_sent_at AS window
FROM idempotency.stripe_lookup('payment', 'order_1');
SELECT idempotency.stripe_idempotency_key('payment', 'order_1') = :'key' AS same_key;
-- recorded again: the same, or less, changes nothing
SELECT xmin AS before FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'order_1' \gset
SELECT idempotency.stripe_record('payment', 'order_1', :token, 'pi_1');
SELECT idempotency.stripe_record('payment', 'order_1', :token, http_status => 200);
SELECT idempotency.stripe_record('payment', 'order_1', :token, http_status => 503);
SELECT idempotency.stripe_record('payment', 'order_1', :token, http_status => 429, response => '{"error": {"type": "invalid_request_error"}}');
SELECT idempotency.stripe_record('payment', 'order_1', :token);
SELECT xmin = :'before' AS unchanged FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'order_1';

-- operations of another type, id or account are others; so are those that look alike in the key
SELECT i, c.verdict, c.attempt, regexp_replace(c.idempotency_key, '[^:]*$', '') AS key
FROM (VALUES (1, 'payment', 'order_1', 'acct_1'), (2, 'payment', 'order_1', 'acct_2'), (3, 'refund', 'order_1', ''),
	(4, 'payment:order', '_1', ''), (5, 'payment', 'Order_1', ''), (6, 'a', 'b:c', ''), (7, 'a:b', 'c', '')) o (i, t, id, a),
	LATERAL idempotency.stripe_claim(t, id, account => a) c ORDER BY i;
SELECT count(*), count(DISTINCT idempotency_key), count(DISTINCT right(idempotency_key, 36)) FROM idempotency.stripe_idempotency_keys;
SELECT account, outcome FROM unnest(ARRAY['', 'acct_1', 'acct_2']) a, LATERAL idempotency.stripe_lookup('payment', 'order_1', a) ORDER BY account;
DELETE FROM idempotency.stripe_idempotency_keys;

--
-- Every answer, what it is recorded as, and what the next claim is told
--
CREATE FUNCTION pg_temp.answered(n int, status int, response jsonb, id text DEFAULT NULL,
	OUT outcome idempotency.outcome, OUT res_id text, OUT res_type text, OUT err boolean, OUT live boolean,
	OUT kept boolean, OUT next idempotency.verdict, OUT told idempotency.outcome, OUT same_key boolean)
LANGUAGE plpgsql AS $$
DECLARE
	c idempotency.stripe_claim_result;
	d idempotency.stripe_claim_result;
BEGIN
	c := idempotency.stripe_claim('answer', n::text, '{"a": 1}');
	outcome := idempotency.stripe_record('answer', n::text, c.token, id, response, status);
	SELECT resource_id, resource_type, error IS NOT NULL, livemode, l.response IS NOT NULL
	INTO res_id, res_type, err, live, kept
	FROM idempotency.stripe_lookup('answer', n::text) l;
	d := idempotency.stripe_claim('answer', n::text, '{"a": 1}');
	next := d.verdict;
	told := d.outcome;
	same_key := d.idempotency_key = c.idempotency_key;
END $$;
CREATE TEMP TABLE answers (n serial, status int, response jsonb, id text);
INSERT INTO answers (status, response, id) VALUES
	(200, '{"id": "pi_1", "object": "payment_intent", "livemode": true}', NULL),
	(201, '{"id": "re_1"}', NULL),
	(200, '{"object": "account_link"}', NULL),
	(200, NULL, NULL),
	(200, NULL, 'pi_2'),
	(200, '{"id": "pi_3", "livemode": "yes"}', 'pi_4'),
	(299, '{}', NULL),
	(200, '{"id": 7, "object": null}', NULL),
	(200, '{"error": {"type": "api_error"}}', NULL),
	(200, '{"error": {"type": "api_error"}}', 'pi_3'),
	(200, '{"error": "upstream", "id": "req_of_a_gateway"}', NULL),
	(200, '{"error": null, "id": "pi_3"}', NULL),
	(200, '{"error": "a run that failed", "id": "frr_1", "object": "reporting.report_run"}', NULL),
	(204, NULL, NULL),
	(204, NULL, 'pi_3'),
	(100, NULL, NULL),
	(302, NULL, NULL),
	(399, NULL, NULL),
	(400, '{"error": {"type": "invalid_request_error", "code": "parameter_missing"}}', NULL),
	(400, NULL, NULL),
	(400, NULL, 'pi_4'),
	(400, '{"error": {"type": "idempotency_error"}}', NULL),
	(404, '{"error": {"type": "idempotency_error"}}', NULL),
	(404, '{"error": {"type": "invalid_request_error", "code": "resource_missing"}}', NULL),
	(404, '{"id": "4711", "object": "route", "livemode": true, "message": "not found"}', NULL),
	(404, '{"error": "not found"}', NULL),
	(404, '{"error": {}}', NULL),
	(404, '{"error": {"code": 404, "message": "not found", "status": "NOT_FOUND"}}', NULL),
	(404, '{"error": null, "errors": [{"type": "invalid_request_error"}]}', NULL),
	(404, '{"error": [{"type": "invalid_request_error"}]}', NULL),
	(404, NULL, NULL),
	(401, '{"error": {"type": "invalid_request_error"}}', NULL),
	(401, '{"error": "invalid_token", "error_description": "expired"}', NULL),
	(401, NULL, NULL),
	(403, '{"error": {"type": "invalid_request_error"}}', NULL),
	(403, '{"message": "Forbidden"}', NULL),
	(403, NULL, NULL),
	(402, '{"error": {"type": "card_error", "code": "card_declined", "payment_intent": {"id": "pi_5", "object": "payment_intent"}, "charge": "ch_5"}}', NULL),
	(402, '{"error": {"type": "card_error", "setup_intent": {"id": "seti_6"}, "charge": "ch_6"}}', NULL),
	(402, '{"error": {"type": "card_error", "charge": "ch_7"}}', NULL),
	(402, '{"error": {"type": "card_error", "payment_intent": null, "setup_intent": [], "charge": {"id": 1}}}', NULL),
	(402, NULL, NULL),
	(408, NULL, NULL),
	(409, '{"error": {"type": "invalid_request_error", "code": "idempotency_key_in_use"}}', NULL),
	(409, '{"error": {"type": "idempotency_error", "code": "idempotency_key_in_use"}}', NULL),
	(409, '{"error": {"type": "idempotency_error"}}', NULL),
	(409, '{"error": {"type": "invalid_request_error"}}', NULL),
	(409, '{"error": {"type": "invalid_request_error", "code": "lock_timeout"}}', NULL),
	(409, '{"error": "conflict"}', NULL),
	(409, NULL, NULL),
	(418, NULL, NULL),
	(424, '{"error": {"type": "api_error"}}', NULL),
	(429, '{"error": {"type": "invalid_request_error", "code": "lock_timeout"}}', NULL),
	(429, '{"error": {"type": "invalid_request_error", "code": "rate_limit"}}', NULL),
	(429, '{"message": "API rate limit exceeded"}', NULL),
	(429, NULL, NULL),
	(499, NULL, NULL),
	(500, '{"error": {"type": "api_error"}}', NULL),
	(500, NULL, NULL),
	(500, NULL, 'pi_8'),
	(500, '{"message": "internal"}', NULL),
	(500, '{"error": {"message": "internal"}}', NULL),
	(502, NULL, NULL),
	(503, NULL, NULL),
	(504, NULL, NULL),
	(599, NULL, NULL),
	-- without a status: completed where there is an id, otherwise unknown
	(NULL, NULL, NULL),
	(NULL, NULL, 'pi_9'),
	(NULL, '{"id": "pi_10", "object": "payment_intent"}', NULL),
	(NULL, '{"id": 10}', NULL),
	(NULL, '{"object": "account_link"}', NULL),
	(NULL, '{"error": {"type": "card_error", "charge": "ch_11"}}', NULL),
	(NULL, '{"error": {"type": "card_error"}}', 'pi_12'),
	(NULL, '{"error": null, "id": "pi_13"}', NULL),
	(NULL, '{"error": "upstream", "id": "req_of_a_gateway"}', NULL);
SELECT a.n, a.status, left(a.response::text, 75) AS response, a.id, r.*
FROM answers a, LATERAL pg_temp.answered(n, status, response, id) r ORDER BY a.n;
DELETE FROM idempotency.stripe_idempotency_keys;

--
-- Not executed: free at once, with the same key and the same request
--
SELECT token AS t1, idempotency_key AS key FROM idempotency.stripe_claim('payment', 'busy', '{"amount": 1}') \gset
SELECT idempotency.stripe_record('payment', 'busy', :t1, http_status => 429, response => '{"error": {"type": "rate_limit_error", "code": "rate_limit"}}');
SELECT * FROM pg_temp.op('busy');
SELECT verdict FROM idempotency.stripe_claim('payment', 'busy', '{"amount": 2}');
SELECT token AS t2, idempotency_key = :'key' AS same_key, pg_temp.shown(c) FROM idempotency.stripe_claim('payment', 'busy') c \gset
\echo :same_key :shown
SELECT * FROM pg_temp.op('busy');
SELECT idempotency.stripe_record('payment', 'busy', :t2, http_status => 401, response => '{"error": {"type": "invalid_request_error"}}');
SELECT token AS t3, pg_temp.shown(c) FROM idempotency.stripe_claim('payment', 'busy') c \gset
\echo :shown
SELECT idempotency.stripe_record('payment', 'busy', :t3, 'pi_1');
SELECT * FROM pg_temp.op('busy');

-- unknown once, then not executed: still unknown, but it may be sent again
SELECT token FROM idempotency.stripe_claim('payment', 'doubtful') \gset
SELECT idempotency.stripe_record('payment', 'doubtful', :token, http_status => 503);
SELECT pg_temp.shown(c) FROM idempotency.stripe_claim('payment', 'doubtful', lease => '1 hour') c;
SELECT token FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'doubtful' \gset
SELECT idempotency.stripe_record('payment', 'doubtful', :token, http_status => 429, response => '{"error": {"type": "invalid_request_error"}}');
SELECT * FROM pg_temp.op('doubtful');
SELECT token FROM idempotency.stripe_claim('payment', 'doubtful') \gset
SELECT idempotency.stripe_release('payment', 'doubtful', :token);
SELECT * FROM pg_temp.op('doubtful');
SELECT token FROM idempotency.stripe_claim('payment', 'doubtful') \gset
SELECT idempotency.stripe_record('payment', 'doubtful', :token, http_status => 400, response => '{"error": {"type": "invalid_request_error"}}');
SELECT * FROM pg_temp.op('doubtful');
-- with one and the same token, too
SELECT token FROM idempotency.stripe_claim('payment', 'doubtful 2') \gset
SELECT idempotency.stripe_record('payment', 'doubtful 2', :token);
SELECT idempotency.stripe_record('payment', 'doubtful 2', :token, http_status => 429, response => '{"error": {"type": "invalid_request_error"}}');
SELECT idempotency.stripe_record('payment', 'doubtful 2', :token, 'pi_2');
SELECT * FROM pg_temp.op('doubtful 2');
-- the other way round: what was not executed isn't certain after all
SELECT token FROM idempotency.stripe_claim('payment', 'doubtful 3') \gset
SELECT idempotency.stripe_record('payment', 'doubtful 3', :token, http_status => 429, response => '{"error": {"type": "invalid_request_error"}}');
SELECT idempotency.stripe_record('payment', 'doubtful 3', :token);
SELECT * FROM pg_temp.op('doubtful 3');
-- a saved 500 is what the same key brings for ever: only a look at Stripe settles it
SELECT token FROM idempotency.stripe_claim('payment', 'sticky') \gset
SELECT idempotency.stripe_record('payment', 'sticky', :token, http_status => 500, response => '{"error": {"type": "api_error"}}');
SELECT pg_temp.shown(c) FROM idempotency.stripe_claim('payment', 'sticky') c;
SELECT idempotency.stripe_record('payment', 'sticky', :token, 'pi_3');
SELECT verdict, outcome FROM idempotency.stripe_claim('payment', 'sticky');
-- Stripe knows the key from another request
SELECT token FROM idempotency.stripe_claim('payment', 'taken') \gset
SELECT idempotency.stripe_record('payment', 'taken', :token, http_status => 400, response => '{"error": {"type": "idempotency_error"}}');
SELECT pg_temp.shown(c) FROM idempotency.stripe_claim('payment', 'taken') c;

--
-- A dead claimant: its successor is handed the stored request and the same key
--
SELECT token AS t1, idempotency_key AS key
FROM idempotency.stripe_claim('payment', 'dead', '{"params": {"amount": 1, "metadata": {"try": 1}}, "description": "first"}') \gset
UPDATE idempotency.stripe_idempotency_keys SET lease_expires_at = now() - interval '1 second' WHERE operation_id = 'dead';
SELECT outcome, lapsed FROM idempotency.stripe_lookup('payment', 'dead');
SELECT token AS t2, idempotency_key = :'key' AS same_key, pg_temp.shown(c)
FROM idempotency.stripe_claim('payment', 'dead', '{"params": {"amount": 1, "metadata": {"try": 2}}, "description": "second"}') c \gset
\echo :same_key :shown
SELECT * FROM pg_temp.op('dead');
-- the first one speaks for the same key: it can't say what isn't definitive...
SELECT idempotency.stripe_record('payment', 'dead', :t1);
SELECT idempotency.stripe_record('payment', 'dead', :t1, http_status => 429, response => '{"error": {"type": "invalid_request_error"}}');
SELECT * FROM pg_temp.op('dead');
-- ... but records where nothing is recorded yet
SELECT idempotency.stripe_record('payment', 'dead', :t1, 'pi_1', request_id => 'req_1');
SELECT * FROM pg_temp.op('dead');
-- and its successor, which was answered the same, agrees
SELECT idempotency.stripe_record('payment', 'dead', :t2, 'pi_1', request_id => 'req_2');
SELECT pg_temp.shown(c) FROM idempotency.stripe_claim('payment', 'dead') c;
-- a late token agrees with what its successor has recorded, too; three of them
SELECT token AS t1 FROM idempotency.stripe_claim('payment', 'dead 2') \gset
UPDATE idempotency.stripe_idempotency_keys SET lease_expires_at = now() - interval '1 second' WHERE operation_id = 'dead 2';
SELECT token AS t2 FROM idempotency.stripe_claim('payment', 'dead 2') \gset
UPDATE idempotency.stripe_idempotency_keys SET lease_expires_at = now() - interval '1 second' WHERE operation_id = 'dead 2';
SELECT token AS t3 FROM idempotency.stripe_claim('payment', 'dead 2') \gset
SELECT idempotency.stripe_record('payment', 'dead 2', :t3, http_status => 402, response => '{"error": {"type": "card_error"}}');
SELECT idempotency.stripe_record('payment', 'dead 2', :t1, http_status => 402, response => '{"error": {"type": "card_error"}}');
SELECT idempotency.stripe_record('payment', 'dead 2', :t2);
SELECT * FROM pg_temp.op('dead 2');
-- without a request the successor's is kept
SELECT token AS t1 FROM idempotency.stripe_claim('payment', 'dead 3') \gset
UPDATE idempotency.stripe_idempotency_keys SET lease_expires_at = now() - interval '1 second' WHERE operation_id = 'dead 3';
SELECT request FROM idempotency.stripe_claim('payment', 'dead 3', '{"a": 1}');
SELECT verdict FROM idempotency.stripe_claim('payment', 'dead 3', '{"a": 2}');
SELECT verdict, request FROM idempotency.stripe_claim('payment', 'dead 3', '{"a": 1}');

--
-- Stripe's window: 24 hours after first_sent_at, less a margin
--
SELECT token FROM idempotency.stripe_claim('payment', 'old', '{"a": 1}') \gset
SELECT idempotency.stripe_record('payment', 'old', :token, http_status => 502);
UPDATE idempotency.stripe_idempotency_keys SET first_sent_at = now() - interval '22 h 59 min' WHERE operation_id = 'old';
SELECT token, pg_temp.shown(c) FROM idempotency.stripe_claim('payment', 'old') c \gset
\echo :shown
-- an attempt more doesn't move it
SELECT now() - first_sent_at > '22 hours' AS unchanged FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'old';
UPDATE idempotency.stripe_idempotency_keys SET first_sent_at = now() - interval '23 hours' WHERE operation_id = 'old';
-- still held: in progress
SELECT pg_temp.shown(c) FROM idempotency.stripe_claim('payment', 'old') c;
-- lapsed: nobody may send it any more
UPDATE idempotency.stripe_idempotency_keys SET lease_expires_at = now() - interval '1 second' WHERE operation_id = 'old';
SELECT pg_temp.shown(c) FROM idempotency.stripe_claim('payment', 'old') c;
SELECT outcome, lapsed FROM idempotency.stripe_lookup('payment', 'old');
SELECT verdict, outcome FROM idempotency.stripe_claim('payment', 'old', '{"a": 2}');
-- its holder comes back after all
SELECT idempotency.stripe_record('payment', 'old', :token, http_status => 504);
SELECT pg_temp.shown(c) FROM idempotency.stripe_claim('payment', 'old') c;
-- the margin
SET idempotency.stripe_resend_margin = '1min';
SELECT verdict FROM idempotency.stripe_claim('payment', 'old');
RESET idempotency.stripe_resend_margin;
SELECT token FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'old' \gset
SELECT idempotency.stripe_record('payment', 'old', :token, 'pi_1');
SELECT verdict, outcome, resource_id FROM idempotency.stripe_claim('payment', 'old');
-- never sent: no window
SELECT token FROM idempotency.stripe_claim('payment', 'never sent') \gset
SELECT idempotency.stripe_release('payment', 'never sent', :token);
UPDATE idempotency.stripe_idempotency_keys SET created_at = now() - interval '1 year', claimed_at = now() - interval '1 year'
WHERE operation_id = 'never sent';
SELECT pg_temp.shown(c) FROM idempotency.stripe_claim('payment', 'never sent') c;

--
-- Release: nothing was sent
--
SELECT token AS t1, idempotency_key AS key FROM idempotency.stripe_claim('payment', 'released', '{"a": 1}') \gset
SELECT idempotency.stripe_release('payment', 'released', :t1);
SELECT * FROM pg_temp.op('released');
SELECT resend_until FROM idempotency.stripe_lookup('payment', 'released');
SELECT verdict, outcome FROM idempotency.stripe_claim('payment', 'released', '{"a": 2}');
SELECT token AS t2, idempotency_key = :'key' AS same_key, pg_temp.shown(c) FROM idempotency.stripe_claim('payment', 'released') c \gset
\echo :same_key :shown
-- sent before by somebody else: that stands
UPDATE idempotency.stripe_idempotency_keys SET lease_expires_at = now() - interval '1 second' WHERE operation_id = 'released';
SELECT token AS t3 FROM idempotency.stripe_claim('payment', 'released') \gset
SELECT idempotency.stripe_release('payment', 'released', :t3);
SELECT * FROM pg_temp.op('released');

--
-- Leases
--
SELECT token FROM idempotency.stripe_claim('payment', 'lease', lease => '1 hour') \gset
SELECT retry_after BETWEEN 3000 AND 3600 AS an_hour FROM idempotency.stripe_claim('payment', 'lease');
SELECT idempotency.stripe_extend('payment', 'lease', :token) BETWEEN now() + interval '50 min' AND now() + interval '1 h 10 min' AS an_hour;
SELECT idempotency.stripe_extend('payment', 'lease', :token, '3 hours') BETWEEN now() + interval '2 h 50 min' AND now() + interval '3 h 10 min' AS three_hours;
SELECT idempotency.stripe_extend('payment', 'lease', :token) BETWEEN now() + interval '2 h 50 min' AND now() + interval '3 h 10 min' AS three_hours;
SELECT retry_after BETWEEN 10000 AND 10800 AS three_hours FROM idempotency.stripe_claim('payment', 'lease');
-- a lapsed one that nobody took over may be extended
UPDATE idempotency.stripe_idempotency_keys SET lease_expires_at = now() - interval '1 second' WHERE operation_id = 'lease';
SELECT idempotency.stripe_extend('payment', 'lease', :token) > now() AS extended;
SELECT verdict FROM idempotency.stripe_claim('payment', 'lease');
SET idempotency.stripe_lease = '2h';
SELECT verdict FROM idempotency.stripe_claim('payment', 'lease 2');
RESET idempotency.stripe_lease;
SELECT retry_after BETWEEN 7000 AND 7200 AS two_hours FROM idempotency.stripe_claim('payment', 'lease 2');

--
-- Reopen: the next generation, with another key
--
SELECT token AS t1, idempotency_key AS key FROM idempotency.stripe_claim('payment', 'declined', '{"card": 1}') \gset
SELECT idempotency.stripe_record('payment', 'declined', :t1, request_id => 'req_1', http_status => 402,
	response => '{"error": {"type": "card_error", "code": "card_declined", "payment_intent": {"id": "pi_1"}}}');
SELECT idempotency.stripe_reopen('payment', 'declined', from_generation => 1) AS key2 \gset
SELECT :'key' = :'key2' AS same_key, left(:'key2', 17) AS key;
-- repeated, it finds its work done
SELECT idempotency.stripe_reopen('payment', 'declined', from_generation => 1) = :'key2' AS same;
SELECT idempotency.stripe_idempotency_key('payment', 'declined') = :'key2' AS same;
SELECT * FROM pg_temp.op('declined');
SELECT request, response, error, request_id, livemode, resource_type, resend_until, claimed_at IS NOT NULL AS claimed
FROM idempotency.stripe_lookup('payment', 'declined');
-- another request is welcome
SELECT token AS t2, pg_temp.shown(c) FROM idempotency.stripe_claim('payment', 'declined', '{"card": 2}') c \gset
\echo :shown
SELECT idempotency.stripe_record('payment', 'declined', :t2, 'pi_2');
SELECT pg_temp.shown(c) FROM idempotency.stripe_claim('payment', 'declined') c;
SELECT idempotency.stripe_reopen('payment', 'declined', from_generation => 1) = :'key2' AS same;
-- what became of the first
SELECT (h - 'first_sent_at' - 'recorded_at' - 'reopened_at' - 'idempotency_key' - 'reopened_by') || jsonb_build_object(
		'times', (h->>'first_sent_at')::timestamptz <= (h->>'recorded_at')::timestamptz
			AND (h->>'recorded_at')::timestamptz <= (h->>'reopened_at')::timestamptz,
		'key', h->>'idempotency_key' = :'key', 'by', h->>'reopened_by' = session_user) AS history
FROM idempotency.stripe_lookup('payment', 'declined'), jsonb_array_elements(history) h;
-- unknown: only by force
SELECT token AS t1 FROM idempotency.stripe_claim('payment', 'forced') \gset
SELECT idempotency.stripe_record('payment', 'forced', :t1, http_status => 500, response => '{"error": {"type": "api_error"}}');
SELECT left(idempotency.stripe_reopen('payment', 'forced', force => true), 15) AS key;
SELECT verdict, attempt, generation FROM idempotency.stripe_claim('payment', 'forced');
UPDATE idempotency.stripe_idempotency_keys SET lease_expires_at = now() - interval '1 second' WHERE operation_id = 'forced';
SELECT left(idempotency.stripe_reopen('payment', 'forced', force => true, from_generation => 2), 15) AS key;
-- not executed: free already, but it may have another request
SELECT left(idempotency.stripe_reopen('payment', 'forced'), 15) AS key;
SELECT generation, jsonb_path_query_array(history, '$[*].generation') AS generations,
	jsonb_path_query_array(history, '$[*].outcome') AS outcomes, jsonb_path_query_array(history, '$[*].forced') AS forced
FROM idempotency.stripe_lookup('payment', 'forced');
SELECT count(DISTINCT k) AS keys
FROM (SELECT h->>'idempotency_key' FROM idempotency.stripe_lookup('payment', 'forced'), jsonb_array_elements(history) h
	UNION ALL SELECT idempotency.stripe_idempotency_key('payment', 'forced')) k (k);

--
-- What takes no part in the comparison: members of the request and of its params
--
CREATE FUNCTION pg_temp.same(n int, a jsonb, b jsonb) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
	v idempotency.verdict;
BEGIN
	PERFORM idempotency.stripe_claim('compare', n::text, a);
	SELECT verdict INTO STRICT v FROM idempotency.stripe_claim('compare', n::text, b);
	DELETE FROM idempotency.stripe_idempotency_keys WHERE operation_type = 'compare';
	RETURN CASE v WHEN 'in_progress' THEN true WHEN 'mismatch' THEN false END;
END $$;
CREATE TEMP TABLE compared (n serial, a jsonb, b jsonb);
INSERT INTO compared (a, b) VALUES
	('{"a": 1}', '{"a": 1.0}'),
	('{"metadata": 1, "a": 1}', '{"a": 1}'),
	('{"description": "x"}', '{"description": "y"}'),
	('{"expand": ["customer"]}', '{}'),
	('{"params": {"amount": 1, "metadata": {"a": 1}}}', '{"params": {"expand": [], "amount": 1}}'),
	('{"params": {"amount": 1}}', '{"params": {"amount": 2}}'),
	('{"params": {"x": {"metadata": 1}}}', '{"params": {"x": {"metadata": 2}}}'),
	('{"params": {"params": {"metadata": 1}}}', '{"params": {"params": {"metadata": 2}}}'),
	('{"body": {"metadata": 1}}', '{"body": {"metadata": 2}}'),
	('{"Metadata": 1}', '{"Metadata": 2}'),
	('{"note": 1, "with a space": 1}', '{"note": 2, "with a space": 2}');
SELECT a, b, pg_temp.same(n, a, b) FROM compared ORDER BY n;
SET idempotency.stripe_compare_ignore = 'note, "with a space"';
SELECT a, b, pg_temp.same(n, a, b) FROM compared WHERE n IN (2, 3, 11) ORDER BY n;
SET idempotency.stripe_compare_ignore = '';
SELECT a, b, pg_temp.same(n, a, b) FROM compared WHERE n IN (1, 2, 11) ORDER BY n;
RESET idempotency.stripe_compare_ignore;

--
-- In the caller's transaction, where that is chosen
--
SET idempotency.stripe_ledger = transaction;
SELECT idempotency.stripe_idempotency_key('payment', 'in block') AS key \gset
BEGIN;
SELECT token, idempotency_key = :'key' AS same_key, pg_temp.shown(c) FROM idempotency.stripe_claim('payment', 'in block') c \gset
\echo :same_key :shown
SELECT pg_temp.shown(c) FROM idempotency.stripe_claim('payment', 'in block') c;
SELECT idempotency.stripe_record('payment', 'in block', :token, 'pi_1');
SELECT verdict, resource_id FROM idempotency.stripe_claim('payment', 'in block');
ROLLBACK;
-- everything is lost but the key
SELECT idempotency.stripe_lookup('payment', 'in block') IS NULL AS absent;
BEGIN;
SAVEPOINT s;
SELECT idempotency_key = :'key' AS same_key FROM idempotency.stripe_claim('payment', 'in block') c;
ROLLBACK TO s;
SELECT token, idempotency_key = :'key' AS same_key, pg_temp.shown(c) FROM idempotency.stripe_claim('payment', 'in block') c \gset
\echo :same_key :shown
SELECT idempotency.stripe_record('payment', 'in block', :token, http_status => 402, response => '{"error": {"type": "card_error"}}');
SELECT left(idempotency.stripe_reopen('payment', 'in block'), 17) AS key;
COMMIT;
SELECT * FROM pg_temp.op('in block');
DO $$
BEGIN
	RAISE NOTICE '%', (SELECT verdict FROM idempotency.stripe_claim('payment', 'in block'));
END $$;
-- a claim of this ledger has a lease: no COMMIT minds it
SELECT outcome FROM idempotency.stripe_lookup('payment', 'in block');
RESET idempotency.stripe_ledger;
-- recording, releasing, extending and looking are welcome in any transaction
SELECT token AS t1 FROM idempotency.stripe_claim('payment', 'block 1') \gset
SELECT token AS t2 FROM idempotency.stripe_claim('payment', 'block 2') \gset
BEGIN;
SELECT idempotency.stripe_extend('payment', 'block 1', :t1) IS NOT NULL AS extended;
SELECT idempotency.stripe_record('payment', 'block 1', :t1, 'pi_1');
SELECT idempotency.stripe_release('payment', 'block 2', :t2);
SELECT outcome FROM idempotency.stripe_lookup('payment', 'block 1');
SELECT left(idempotency.stripe_idempotency_key('payment', 'block 1'), 16) AS key;
ROLLBACK;
SELECT outcome FROM idempotency.stripe_lookup('payment', 'block 1');

--
-- The key never changes: a stored one is read, never derived again
--
SELECT idempotency.stripe_idempotency_key('payment', 'order_1') AS key \gset
SELECT idempotency_key = :'key' AS same_key FROM idempotency.stripe_claim('payment', 'order_1');
SELECT idempotency.stripe_idempotency_key('payment', 'order_2') AS key2 \gset
BEGIN;
SET LOCAL idempotency.stripe_ledger = transaction;
-- another namespace comes into force, as by a restore
INSERT INTO idempotency.namespace VALUES (decode(repeat('ab', 32), 'hex'), 1, 1, '2020-01-01');
SELECT idempotency.stripe_idempotency_key('payment', 'order_1') = :'key' AS same_key,
	idempotency.stripe_idempotency_key('payment', 'order_2') = :'key2' AS derived_anew;
SELECT verdict, idempotency_key = :'key' AS same_key FROM idempotency.stripe_claim('payment', 'order_1');
SELECT verdict, idempotency_key = :'key2' AS same_key FROM idempotency.stripe_claim('payment', 'order_2');
UPDATE idempotency.stripe_idempotency_keys SET lease_expires_at = now() - interval '1 second' WHERE operation_id = 'dead 3';
SELECT verdict, request FROM idempotency.stripe_claim('payment', 'dead 3', '{"a": 2}');
SELECT verdict, request FROM idempotency.stripe_claim('payment', 'dead 3', '{"a": 1}');
ROLLBACK;
SELECT idempotency.stripe_idempotency_key('payment', 'order_2') = :'key2' AS same_key;

DELETE FROM idempotency.stripe_idempotency_keys;

-- a success whose body was cut: done, nobody knows what; the same key fetches it
SELECT token, idempotency_key AS key FROM idempotency.stripe_claim('payment', 'cut') \gset
SELECT idempotency.stripe_record('payment', 'cut', :token, http_status => 200);
SELECT verdict, idempotency_key = :'key' AS same_key, token FROM idempotency.stripe_claim('payment', 'cut') \gset
SELECT :'verdict' AS verdict, :'same_key' AS same_key;
SELECT idempotency.stripe_record('payment', 'cut', :token, http_status => 200, response => '{"id": "pi_cut", "object": "payment_intent"}');
SELECT token FROM idempotency.stripe_claim('payment', 'nothing to say') \gset
SELECT idempotency.stripe_record('payment', 'nothing to say', :token, http_status => 204);
SELECT token FROM idempotency.stripe_claim('payment', 'nothing to say') \gset
SELECT idempotency.stripe_record('payment', 'nothing to say', :token, http_status => 204, resource_id => 'pi_1');
SELECT token FROM idempotency.stripe_claim('payment', 'refused') \gset
SELECT idempotency.stripe_record('payment', 'refused', :token, http_status => 402, response => '{"error": {"type": "card_error"}}');
DELETE FROM idempotency.stripe_idempotency_keys WHERE operation_id IN ('cut', 'nothing to say', 'refused');
