--
-- Events that Stripe sends: taken in once, claimed, recorded
--
\set VERBOSITY terse
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS idempotency;
RESET client_min_messages;

CREATE SCHEMA webhooks;
SET search_path = webhooks;

-- a body, and the header that Stripe would send with it now
CREATE FUNCTION event(id text, type text = 'payment_intent.succeeded', object jsonb = '{"id": "pi_1", "object": "payment_intent"}',
	more jsonb = '{}') RETURNS bytea LANGUAGE sql IMMUTABLE
RETURN convert_to((jsonb_build_object('id', id, 'object', 'event', 'type', type, 'created', 1795300000,
	'livemode', false, 'api_version', '2026-10-28.endive', 'data', jsonb_build_object('object', object)) || more)::text, 'UTF8');

CREATE FUNCTION signature(body bytea, secret text = 'whsec_test', age interval = '0') RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	key bytea := convert_to(secret, 'UTF8');
	t text := floor(extract(epoch FROM clock_timestamp() - age))::text;
	inner_pad bytea := '';
	outer_pad bytea := '';
BEGIN
	key := key || decode(repeat('00', 64 - length(key)), 'hex');
	FOR i IN 0 .. 63 LOOP
		inner_pad := inner_pad || set_byte('\x00', 0, get_byte(key, i) # 54);
		outer_pad := outer_pad || set_byte('\x00', 0, get_byte(key, i) # 92);
	END LOOP;
	RETURN format('t=%s,v1=%s', t,
		encode(sha256(outer_pad || sha256(inner_pad || convert_to(t || '.', 'UTF8') || body)), 'hex'));
END $$;

CREATE FUNCTION claim(body bytea, lease interval = NULL, consumer text = '') RETURNS idempotency.webhook_claim_result LANGUAGE sql
RETURN idempotency.stripe_webhook_claim(body, signature(body), '{whsec_test}', lease => lease, consumer => consumer);

CREATE FUNCTION receive(body bytea, consumer text = '') RETURNS idempotency.webhook_receipt LANGUAGE sql
RETURN idempotency.stripe_webhook_receive(body, signature(body), '{whsec_test}', consumer => consumer);

-- what a refusal says
CREATE FUNCTION refusal(body bytea, header text = NULL) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	detail text;
BEGIN
	PERFORM idempotency.stripe_webhook_claim(body, coalesce(header, signature(body)), '{whsec_test}', lease => '1 h');
	RETURN 'claimed';
EXCEPTION WHEN SQLSTATE 'IK004' THEN
	GET STACKED DIAGNOSTICS detail = PG_EXCEPTION_DETAIL;
	RETURN detail;
END $$;

-- tokens are random: remember them by name
CREATE TABLE tokens (name text PRIMARY KEY, token bigint);
CREATE FUNCTION token(name text) RETURNS bigint LANGUAGE sql RETURN (SELECT t.token FROM tokens t WHERE t.name = $1);

--
-- In one transaction: claim, work, record
--
BEGIN;
SELECT verdict, stripe_event_id, event_type, event -> 'data' AS data, token BETWEEN 1 AND 2^53 - 1 AS token, attempt,
	account, livemode, created AT TIME ZONE 'UTC' AS created, object_type, object_id, superseded_by, twin_of, last_error, retry_after
FROM claim(event('evt_1')) \gx
-- the transaction that has it gets no second claim
SELECT verdict, token, attempt, retry_after FROM claim(event('evt_1'));
SELECT FROM idempotency.stripe_webhook_record('evt_1', (SELECT token FROM idempotency.stripe_webhook_events));
COMMIT;
SELECT verdict, stripe_event_id, event ->> 'type' AS type, token, attempt, superseded_by FROM claim(event('evt_1'));
SELECT account, stripe_event_id, consumer, event_type, api_version, object_type, object_id, livemode, attempts, success, error_message,
	received_at <= processed_at AS times, lease, lease_expires_at, payload_snapshot ->> 'id' AS snapshot, payload = event('evt_1') AS payload
FROM idempotency.stripe_webhook_events \gx

-- a forgotten record takes everything back
BEGIN;
SELECT verdict FROM claim(event('evt_2'));
COMMIT;
-- so does a rollback
BEGIN;
SELECT verdict FROM claim(event('evt_2'));
ROLLBACK;
BEGIN;
SAVEPOINT a;
SELECT verdict FROM claim(event('evt_2'));
ROLLBACK TO a;
SELECT count(*) FROM idempotency.stripe_webhook_events;
COMMIT;

--
-- With a lease
--
INSERT INTO tokens SELECT 'first', token FROM claim(event('evt_2'), '1 h');
SELECT verdict, token, attempt, retry_after BETWEEN 3500 AND 3600 AS soon FROM claim(event('evt_2'));
SELECT FROM idempotency.stripe_webhook_record('evt_2', 12345);
-- lapsed: the next one takes it over, and the first can't record any more
UPDATE idempotency.stripe_webhook_events SET lease_expires_at = clock_timestamp() WHERE stripe_event_id = 'evt_2';
INSERT INTO tokens SELECT 'second', token FROM claim(event('evt_2'), '1 h');
SELECT attempts FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_2';
SELECT FROM idempotency.stripe_webhook_record('evt_2', token('first'));
-- lapsed, but not taken over: it can
UPDATE idempotency.stripe_webhook_events SET lease_expires_at = clock_timestamp() WHERE stripe_event_id = 'evt_2';
SELECT FROM idempotency.stripe_webhook_record('evt_2', token('second'));
-- again the same, or something else
SELECT FROM idempotency.stripe_webhook_record('evt_2', token('second'));
SELECT FROM idempotency.stripe_webhook_record('evt_2', token('second'), success => true);
SELECT FROM idempotency.stripe_webhook_record('evt_2', token('second'), success => false);
SELECT FROM idempotency.stripe_webhook_record('evt_2', token('second'), error_message => 'no');
SELECT FROM idempotency.stripe_webhook_record('evt_2', token('first'));

--
-- Failure isn't final
--
INSERT INTO tokens SELECT 'third', token FROM claim(event('evt_3'), '1 h');
SELECT FROM idempotency.stripe_webhook_record('evt_3', token('third'), error_message => 'no such order', reference => 'A-17',
	order_id => '018c2b5e-0000-7000-8000-000000000001', correlation_id => '018c2b5e-0000-7000-8000-000000000002');
SELECT success, error_message, processed_at IS NOT NULL AS at, reference, order_id, correlation_id, lease_expires_at
FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_3';
SELECT FROM idempotency.stripe_webhook_record('evt_3', token('third'), error_message => 'no such order');
SELECT FROM idempotency.stripe_webhook_record('evt_3', token('third'));
-- delivered again
INSERT INTO tokens SELECT 'fourth', token FROM claim(event('evt_3'), '1 h');
SELECT verdict, attempt, last_error FROM claim(event('evt_3'));
SELECT FROM idempotency.stripe_webhook_record('evt_3', token('fourth'), success => false);
SELECT success, error_message, reference FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_3';
-- or by hand, when no signature is young enough any more
BEGIN;
SELECT verdict, attempt, event ->> 'id' AS event, account, object_id, last_error FROM idempotency.stripe_webhook_reclaim('evt_3');
SELECT FROM idempotency.stripe_webhook_events e,
	idempotency.stripe_webhook_record(e.stripe_event_id, e.token, error_message => 'warned only', success => true)
WHERE e.stripe_event_id = 'evt_3';
COMMIT;
SELECT verdict, attempt, last_error FROM idempotency.stripe_webhook_reclaim('evt_3');
SELECT verdict FROM idempotency.stripe_webhook_reclaim('evt_4');
SELECT verdict FROM idempotency.stripe_webhook_reclaim('evt_3', account => 'acct_1');

--
-- Keep it now, work later
--
SELECT * FROM receive(event('evt_5'));
SELECT * FROM receive(event('evt_5'));
SELECT * FROM receive(event('evt_1'));
SELECT * FROM receive(event('evt_6', 'charge.updated', '{"id": "ch_1", "object": "charge"}', '{"account": "acct_1"}'));
SELECT attempts, claimed_at, success FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_5';
-- a row that nobody has claimed can't be recorded, whatever the token
SELECT FROM idempotency.stripe_webhook_events e, idempotency.stripe_webhook_record('evt_5', e.token)
WHERE e.stripe_event_id = 'evt_5';

-- oldest first, none twice
BEGIN;
SELECT verdict, stripe_event_id, account, event_type, attempt FROM idempotency.stripe_webhook_next();
SELECT verdict, stripe_event_id, account, event_type, attempt FROM idempotency.stripe_webhook_next();
SELECT verdict, stripe_event_id FROM idempotency.stripe_webhook_next();
COMMIT;
INSERT INTO tokens SELECT stripe_event_id, token FROM idempotency.stripe_webhook_next('1 h');
-- a failed one waits, and lets the others pass
SELECT FROM idempotency.stripe_webhook_record('evt_5', token('evt_5'), success => false);
SELECT stripe_event_id, attempt FROM idempotency.stripe_webhook_next('1 h');
-- its pause is over (nothing sleeps here: ends of pauses are moved)
CREATE FUNCTION due(id text) RETURNS void LANGUAGE sql AS
	'UPDATE idempotency.stripe_webhook_events SET next_attempt_at = clock_timestamp(),
		lease_expires_at = least(lease_expires_at, clock_timestamp()) WHERE stripe_event_id = id';
SELECT FROM due('evt_5');
SELECT stripe_event_id, attempt FROM idempotency.stripe_webhook_next('1 h');
SELECT stripe_event_id, attempt FROM idempotency.stripe_webhook_next('1 h');
SELECT stripe_event_id, attempt FROM idempotency.stripe_webhook_next('1 h');
-- and so does one whose worker died
SELECT FROM due('evt_6');
SELECT stripe_event_id, account, attempt FROM idempotency.stripe_webhook_next('1 h');
-- claimed in a savepoint that is rolled back
SELECT FROM due('evt_5');
BEGIN;
SAVEPOINT a;
SELECT stripe_event_id, attempt FROM idempotency.stripe_webhook_next();
ROLLBACK TO a;
SELECT stripe_event_id, attempt FROM idempotency.stripe_webhook_next();
SELECT FROM idempotency.stripe_webhook_events e, idempotency.stripe_webhook_record('evt_5', e.token)
WHERE e.stripe_event_id = 'evt_5';
SELECT stripe_event_id, attempt FROM idempotency.stripe_webhook_next();
COMMIT;

-- what is received may be claimed the direct way, too
SELECT stored FROM receive(event('evt_7'));
BEGIN;
SELECT verdict, attempt FROM claim(event('evt_7'));
SELECT stripe_event_id FROM idempotency.stripe_webhook_next();
ROLLBACK;

--
-- What is pending, and what to do about it
--
SELECT stored FROM receive(event('evt_''8'), 'mail''s');
INSERT INTO tokens SELECT 'evt_9', token FROM claim(event('evt_9'), '1 h');
SELECT FROM idempotency.stripe_webhook_record('evt_9', token('evt_9'), error_message => 'broken');
SELECT verdict FROM claim(event('evt_10'), '1 h');
UPDATE idempotency.stripe_webhook_events SET lease_expires_at = clock_timestamp() WHERE stripe_event_id = 'evt_10';
SELECT account, stripe_event_id, consumer, event_type, object_id, state, attempts, last_error, next_step
FROM idempotency.stripe_webhook_pending ORDER BY stripe_event_id \gx
-- each of the statements works
DO $$
DECLARE
	step text;
BEGIN
	FOR step IN SELECT next_step FROM idempotency.stripe_webhook_pending LOOP
		EXECUTE step;
	END LOOP;
END $$;
SELECT state, count(*) FROM idempotency.stripe_webhook_pending GROUP BY state;

--
-- Events that fail
--
-- each pause is twice as long as the one before, at most an hour, less up to a half
CREATE TEMP TABLE pauses (attempt int, pause interval);
DO $$
DECLARE
	c record;
BEGIN
	PERFORM receive(event('evt_fails', object => '{"id": "pi_fails"}'), 'fails');
	FOR i IN 1 .. 20 LOOP
		SELECT * INTO STRICT c FROM idempotency.stripe_webhook_next('1 h', 'fails');
		PERFORM idempotency.stripe_webhook_record(c.stripe_event_id, c.token, error_message => 'no', consumer => 'fails');
		EXIT WHEN i = 20;
		INSERT INTO pauses SELECT attempts, next_attempt_at - processed_at
			FROM idempotency.stripe_webhook_events WHERE consumer = 'fails';
		PERFORM due('evt_fails');
	END LOOP;
END $$;
SELECT count(*), bool_and(pause <= least(2 ^ (attempt - 1), 3600) * interval '1 s') AS at_most,
	bool_and(pause >= least(2 ^ (attempt - 1), 3600) * interval '0.5 s') AS at_least,
	count(DISTINCT extract(epoch FROM pause) / least(2 ^ (attempt - 1), 3600)) > 1 AS jitter
FROM pauses;
-- after the last attempt it is dead: nobody is handed it
SELECT count(*) FROM idempotency.stripe_webhook_next('1 h', 'fails');
SELECT state, attempts, last_error, next_attempt_at, next_step FROM idempotency.stripe_webhook_pending
WHERE consumer = 'fails' \gx
-- the statement revives it, and the count begins anew
SELECT next_step FROM idempotency.stripe_webhook_pending WHERE consumer = 'fails' \gset
SELECT verdict, attempt, last_error
FROM idempotency.stripe_webhook_reclaim('evt_fails', account => '', lease => '1 second', consumer => 'fails', again => true);
SELECT FROM due('evt_fails');
SELECT attempt FROM idempotency.stripe_webhook_next('1 h', 'fails');
SELECT reclaimed #- '{0,at}' #- '{0,by}' #- '{0,processed_at}' AS reclaimed
FROM idempotency.stripe_webhook_events WHERE consumer = 'fails';
-- a lapsed claim counts, too: the pause is booked with the claim
SELECT next_attempt_at - lease_expires_at BETWEEN '1 s' AND '2 s' AS booked
FROM idempotency.stripe_webhook_events WHERE consumer = 'fails';
SET idempotency.webhook_max_attempts = 3;
SELECT FROM due('evt_fails');
SELECT attempt FROM idempotency.stripe_webhook_next('1 microsecond', 'fails');
SELECT state, next_attempt_at FROM idempotency.stripe_webhook_pending WHERE consumer = 'fails';
-- what Stripe delivers is claimed as ever, and may succeed
SELECT verdict, attempt, token AS fails_token FROM claim(event('evt_fails', object => '{"id": "pi_fails"}'), '1 h', 'fails') \gset
SELECT FROM idempotency.stripe_webhook_record('evt_fails', :fails_token, consumer => 'fails');
SELECT count(*) FROM idempotency.stripe_webhook_pending WHERE consumer = 'fails';
-- without a limit
SET idempotency.webhook_max_attempts = -1;
INSERT INTO tokens SELECT 'evt_ever', token FROM claim(event('evt_ever'), '1 h', 'fails');
UPDATE idempotency.stripe_webhook_events SET attempts = 1000000 WHERE stripe_event_id = 'evt_ever';
SELECT FROM idempotency.stripe_webhook_record('evt_ever', token('evt_ever'), error_message => 'no', consumer => 'fails');
SELECT next_attempt_at - processed_at <= '1 h' AS within_the_hour FROM idempotency.stripe_webhook_events
WHERE stripe_event_id = 'evt_ever';
SET idempotency.webhook_max_attempts = 0;
SET idempotency.webhook_max_attempts = -2;
RESET idempotency.webhook_max_attempts;

-- by place, and without types, as drivers pass arguments, it is told apart what is meant
SELECT verdict FROM idempotency.stripe_webhook_reclaim('evt_fails', '', '1 h', 'fails');
PREPARE reclaim3 AS SELECT FROM idempotency.stripe_webhook_reclaim($1, $2, $3);
PREPARE reclaim2 AS SELECT FROM idempotency.stripe_webhook_reclaim($1, $2);
PREPARE reclaim_again AS SELECT FROM idempotency.stripe_webhook_reclaim($1, again => $2);
PREPARE reclaim_again5 AS SELECT FROM idempotency.stripe_webhook_reclaim($1, $2, $3, $4, $5);
SELECT name, parameter_types FROM pg_prepared_statements WHERE name LIKE 'reclaim%' ORDER BY 1;
DEALLOCATE reclaim3;
DEALLOCATE reclaim2;
DEALLOCATE reclaim_again;
DEALLOCATE reclaim_again5;

-- a processed event is run again, from what is stored, and on record
SELECT verdict FROM idempotency.stripe_webhook_reclaim('evt_fails', lease => '1 h', consumer => 'fails');
SELECT verdict FROM idempotency.stripe_webhook_reclaim('evt_fails', again => false, lease => '1 h', consumer => 'fails');
SELECT verdict, attempt, event ->> 'id' AS event, token AS fails_token
FROM idempotency.stripe_webhook_reclaim('evt_fails', again => true, lease => '1 h', consumer => 'fails') \gset
SELECT :'verdict' AS verdict, :attempt AS attempt, :'event' AS event;
SELECT verdict FROM idempotency.stripe_webhook_reclaim('evt_fails', again => true, lease => '1 h', consumer => 'fails');
SELECT FROM idempotency.stripe_webhook_record('evt_fails', :fails_token, consumer => 'fails');
SELECT jsonb_array_length(reclaimed), reclaimed #>> '{1,success}' AS success, reclaimed #>> '{1,by}' = session_user AS by
FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_fails';
DO $$
DECLARE
	c record;
BEGIN
	FOR i IN 1 .. 30 LOOP
		c := idempotency.stripe_webhook_reclaim('evt_fails', again => true, lease => '1 h', consumer => 'fails');
		PERFORM idempotency.stripe_webhook_record('evt_fails', c.token, consumer => 'fails');
	END LOOP;
END $$;
SELECT jsonb_array_length(reclaimed), attempts FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_fails';

-- fresh ones aren't behind those that have failed, however many and however long ago
INSERT INTO idempotency.stripe_webhook_events (account, stripe_event_id, consumer, event_type, token, received_at,
	claimed_at, processed_at, attempts, success, next_attempt_at)
SELECT '', 'evt_f' || i, 'many', 'a.b', i, now() - interval '1 day', now(), now(), 1, false, now() - interval '1 hour'
FROM generate_series(1, 1000) i;
SELECT stored FROM receive(event('evt_fresh'), 'many');
SELECT stripe_event_id, attempt FROM idempotency.stripe_webhook_next('1 h', 'many');
SELECT attempt FROM idempotency.stripe_webhook_next('1 h', 'many');
DELETE FROM idempotency.stripe_webhook_events WHERE consumer = 'many';

-- no event is handed out while another of its object is claimed
SELECT stored FROM receive(event('evt_same1', object => '{"id": "sub_1"}'), 'same');
SELECT stored FROM receive(event('evt_same2', object => '{"id": "sub_1"}'), 'same');
SELECT stored FROM receive(event('evt_other', object => '{"id": "sub_2"}'), 'same');
INSERT INTO tokens SELECT stripe_event_id, token FROM idempotency.stripe_webhook_next('1 h', 'same');
SELECT stripe_event_id FROM idempotency.stripe_webhook_next('1 h', 'same');
SELECT stripe_event_id FROM idempotency.stripe_webhook_next('1 h', 'same');
SELECT FROM idempotency.stripe_webhook_record('evt_same1', token('evt_same1'), consumer => 'same');
SELECT stripe_event_id, superseded_by FROM idempotency.stripe_webhook_next('1 h', 'same');
-- nor by this transaction
BEGIN;
SELECT stored FROM receive(event('evt_own1', object => '{"id": "sub_3"}'), 'own');
SELECT stored FROM receive(event('evt_own2', object => '{"id": "sub_3"}'), 'own');
SELECT stripe_event_id FROM idempotency.stripe_webhook_next(consumer => 'own');
SELECT stripe_event_id FROM idempotency.stripe_webhook_next(consumer => 'own');
SELECT FROM idempotency.stripe_webhook_events e, idempotency.stripe_webhook_record(e.stripe_event_id, e.token, consumer => 'own')
WHERE e.stripe_event_id = 'evt_own1';
SELECT stripe_event_id FROM idempotency.stripe_webhook_next(consumer => 'own');
ROLLBACK;
-- a lease counts from the answer, however long that took
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	PERFORM pg_sleep(0.02), set_config('webhooks.noted', clock_timestamp()::text, false);
	RETURN NEW;
END $$;
CREATE TRIGGER slow BEFORE UPDATE ON idempotency.stripe_webhook_events
	FOR EACH ROW WHEN (old.token <> new.token) EXECUTE FUNCTION slow();
SELECT stored FROM receive(event('evt_slow'), 'slow');
SELECT stripe_event_id FROM idempotency.stripe_webhook_next('1 h', 'slow');
SELECT lease_expires_at - interval '1 h' >= current_setting('webhooks.noted')::timestamptz AS lease_after,
	next_attempt_at - lease_expires_at BETWEEN '0.5 s' AND '1 s' AS booked_after
FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_slow';
DROP TRIGGER slow ON idempotency.stripe_webhook_events;
DROP FUNCTION slow;
DELETE FROM idempotency.stripe_webhook_events WHERE consumer IN ('fails', 'same', 'slow');

--
-- Consumers and accounts have rows of their own
--
SELECT verdict FROM claim(event('evt_11'), '1 h');
SELECT verdict FROM claim(event('evt_11'), '1 h', 'mails');
SELECT verdict FROM claim(event('evt_11', more => '{"account": "acct_1"}'), '1 h');
SELECT verdict, account FROM claim(event('evt_11', more => '{"account": "acct_1"}'), '1 h');
SELECT verdict, account FROM claim(event('evt_11', more => '{"context": "acct_2"}'), '1 h');
SELECT account, consumer, attempts FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_11' ORDER BY 1, 2;
SELECT stripe_event_id FROM idempotency.stripe_webhook_next(consumer => 'nobody');

--
-- Columns are taken from the payload
--
SELECT stored FROM receive(event('evt_12', 'checkout.session.completed', '{"id": "cs_test_1", "object": "checkout.session",
	"client_reference_id": "cart 7", "metadata": {"order_id": "018C2B5E-0000-7000-8000-000000000003",
	"correlation_id": "018c2b5e-0000-7000-8000-000000000004", "reference": "another"}}',
	'{"request": {"id": "req_1", "idempotency_key": "k-1"}}'), 'columns');
SELECT stored FROM receive(event('evt_13', 'payment_intent.created', '{"id": "pi_2", "object": "payment_intent",
	"metadata": {"order_id": "17", "correlation_id": "{018c2b5e000070008000000000000004}", "reference": "R",
	"checkout_session_id": "cs_test_2"}}', '{"request": null}'), 'columns');
SELECT stored FROM receive(event('evt_14', 'balance.available', '{"object": "balance", "metadata": "none"}',
	'{"created": 1795300000.5, "livemode": "no", "request": {"id": null, "idempotency_key": null}}'), 'columns');
SELECT stored FROM receive(event('evt_15', 'some.new.type', '{}', '{"data": null, "created": -1, "api_version": null}'), 'columns');
SELECT stripe_event_id, object_type, object_id, created AT TIME ZONE 'UTC' AS created, livemode, request_id, idempotency_key,
	reference, order_id, correlation_id, checkout_session_id
FROM idempotency.stripe_webhook_events WHERE consumer = 'columns' ORDER BY received_at \gx

-- thin events
SELECT stored, stripe_event_id, event_type, account FROM receive(convert_to('{"id": "evt_test_65", "object": "v2.core.event",
	"type": "v1.billing.meter.error_report_triggered", "livemode": false, "created": "2026-11-21T22:26:40.250Z", "context": "acct_7",
	"reason": {"type": "request", "request": {"id": "req_v2", "idempotency_key": "ik-1"}},
	"related_object": {"id": "mtr_1", "type": "billing.meter", "url": "/v1/billing/meters/mtr_1"}}', 'UTF8'), 'thin');
SELECT object_type, object_id, created AT TIME ZONE 'UTC' AS created, livemode, request_id, idempotency_key
FROM idempotency.stripe_webhook_events WHERE consumer = 'thin';
-- times of theirs
SELECT t, (SELECT created AT TIME ZONE 'UTC' FROM claim(convert_to(format('{"id": %s, "object": "v2.core.event", "type": "a", "created": %s}',
	to_json(t), to_json(t)), 'UTF8'), '1 h')) AS created
FROM unnest(ARRAY['2024-02-29T23:59:59Z', '2023-02-29T00:00:00Z', '2026-13-01T00:00:00Z', '2026-01-01T24:00:00Z',
	'2026-01-01T00:00:00.123456789Z', '2026-01-01T00:00:00+01:00', '2026-01-01 00:00:00Z', '2026-01-01T00:00Z', 'now',
	'2026-01-01T00:00:00.Z']) t;

--
-- What is refused stores nothing
--
SELECT count(*) AS before FROM idempotency.stripe_webhook_events \gset
SELECT label, refusal(body)
FROM (VALUES
	(1, 'nothing', ''::bytea),
	(2, 'not JSON', convert_to('hello', 'UTF8')),
	(3, 'cut', substr(event('evt_r'), 1, 100)),
	(4, 'two values', event('evt_r') || event('evt_r')),
	(5, 'not UTF-8', convert_to('{"id": "evt_r', 'UTF8') || '\xe4'::bytea || convert_to('", "object": "event", "type": "a"}', 'UTF8')),
	(6, 'a surrogate in UTF-8', convert_to('{"id": "evt_r', 'UTF8') || '\xeda080'::bytea || convert_to('", "object": "event", "type": "a"}', 'UTF8')),
	(7, 'half an escape', convert_to('{"id": "evt_r", "object": "event", "type": "\ud80"}', 'UTF8')),
	(8, 'zero byte', event('evt_r') || '\x00'::bytea),
	(10, 'byte order mark', '\xefbbbf'::bytea || event('evt_r')),
	(13, 'number', convert_to('1', 'UTF8')),
	(14, 'null', convert_to('null', 'UTF8')),
	(15, 'array', convert_to('[{"id": "evt_r", "object": "event", "type": "a"}]', 'UTF8')),
	(16, 'not an event', convert_to('{"id": "pi_1", "object": "payment_intent", "type": "a"}', 'UTF8')),
	(17, 'wrapped', convert_to('{"detail": {"id": "evt_r", "object": "event", "type": "a"}}', 'UTF8')),
	(18, 'no id', convert_to('{"object": "event", "type": "a"}', 'UTF8')),
	(19, 'empty id', convert_to('{"id": "", "object": "event", "type": "a"}', 'UTF8')),
	(20, 'id is a number', convert_to('{"id": 7, "object": "event", "type": "a"}', 'UTF8')),
	(21, 'long id', convert_to(format('{"id": "%s", "object": "event", "type": "a"}', repeat('x', 256)), 'UTF8')),
	(22, 'control character in the id', convert_to('{"id": "evt\u0007", "object": "event", "type": "a"}', 'UTF8')),
	(23, 'no type', convert_to('{"id": "evt_r", "object": "event"}', 'UTF8')),
	(24, 'long account', convert_to(format('{"id": "evt_r", "object": "event", "type": "a", "account": "%s"}', repeat('x', 256)), 'UTF8'))
) v (n, label, body) ORDER BY n;
-- and what jsonb can't hold is no reason to refuse what Stripe has signed
BEGIN;
CREATE TEMP TABLE odd (n int, label text, body bytea) ON COMMIT DROP;
INSERT INTO odd VALUES
	(1, 'escaped zero byte', convert_to('{"id": "evt_o1", "object": "event", "type": "a", "name": "a\u0000\\u0000\\\u0000b"}', 'UTF8')),
	(2, 'key twice', convert_to('{"id": "evt_o2", "object": "event", "type": "a", "name": 1, "name": 2}', 'UTF8')),
	(3, 'high half of a pair', convert_to('{"id": "evt_o3", "object": "event", "type": "a", "name": "a\ud83d"}', 'UTF8')),
	(4, 'low half', convert_to('{"id": "evt_o4", "object": "event", "type": "a", "name": "\ude00a"}', 'UTF8')),
	(5, 'halves in the wrong order', convert_to('{"id": "evt_o5", "object": "event", "type": "a", "name": "\ude00\ud83d\ud83d\ude00\uD83D\u0041"}', 'UTF8')),
	(6, 'large number', convert_to('{"id": "evt_o6", "object": "event", "type": "a", "created": 1e400000, "name": -1e400000}', 'UTF8')),
	(7, 'small number', convert_to('{"id": "evt_o7", "object": "event", "type": "a", "created": -1, "name": 1E-20000}', 'UTF8')),
	(8, 'exponent beyond all', convert_to(format('{"id": "evt_o8", "object": "event", "type": "a", "name": 1e%s}', repeat('9', 30)), 'UTF8')),
	(9, 'many digits', convert_to(format('{"id": "evt_o9", "object": "event", "type": "a", "name": true, "n": [%s, 0.%s]}', repeat('9', 131073), repeat('1', 16384)), 'UTF8')),
	(10, 'deep', convert_to(format('{"id": "evt_o10", "object": "event", "type": "a", "name": {"a": %s1%s}}', repeat('[', 100000), repeat(']', 100000)), 'UTF8')),
	(11, 'in a name', convert_to('{"id": "evt_o11", "object": "event", "type": "a", "\u006eame": "\u0061", "\ud800": 1}', 'UTF8')),
	(12, 'escapes', convert_to('{"id": "evt_o12", "object": "event", "type": "a", "name": "\u0022\u005c\u000a\/\b\u00e9\ud83d\ude00\uffff"}', 'UTF8'));
SELECT n, c.verdict, left(c.event ->> 'name', 30) AS name, c.created FROM odd, LATERAL claim(body, '1 h') c ORDER BY n;
SELECT jsonb_typeof(payload_snapshot #> '{n,0}') AS before, jsonb_typeof(payload_snapshot #> '{n,1}') AS after FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_o9';
SELECT length(replace(payload_snapshot ->> 'name', 'null', '')) AS brackets, payload_snapshot ->> 'name' LIKE '%[null]%' AS the_rest FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_o10';
SELECT label, e.payload = body AS bytes_kept
FROM odd JOIN idempotency.stripe_webhook_events e ON e.stripe_event_id = 'evt_o' || n ORDER BY n;
ROLLBACK;
SELECT refusal(event('evt_r'), header) FROM (VALUES (''), ('t=1'), ('t=1,v1=' || repeat('0', 64)), ('hello')) v (header);
SELECT refusal(event('evt_r'), signature(event('evt_r'), age => '301 s')) AS old;
SELECT FROM idempotency.stripe_webhook_receive(event('evt_r'), signature(event('evt_r'), 'whsec_other'), '{whsec_test}');
\set VERBOSITY default
SELECT FROM idempotency.stripe_webhook_claim(event('evt_r'), signature(event('evt_r'), 'whsec_other'), '{whsec_test}');
SELECT FROM idempotency.stripe_webhook_claim(event('evt_r'), signature(event('evt_r')));
\set VERBOSITY terse

-- the mode that is expected
SET idempotency.webhook_livemode = 'live';
SELECT refusal(event('evt_r')) AS test, refusal(event('evt_r', more => '{"livemode": null}')) AS unknown,
	refusal(event('evt_live', more => '{"livemode": true}')) AS live;
SET idempotency.webhook_livemode = 'test';
SELECT refusal(event('evt_test')) AS test, refusal(event('evt_r', more => '{"livemode": null}')) AS unknown,
	refusal(event('evt_r', more => '{"livemode": true}')) AS live;
RESET idempotency.webhook_livemode;
SELECT count(*) - :before AS stored FROM idempotency.stripe_webhook_events;

--
-- Arguments
--
SELECT FROM claim(event('evt_20'), '0');
SELECT FROM claim(event('evt_20'), consumer => E'a\nb');
SELECT FROM claim(event('evt_20'), consumer => NULL);
SELECT FROM receive(event('evt_20'), consumer => repeat('x', 256));
SELECT FROM idempotency.stripe_webhook_claim(NULL, 't=1,v1=0', '{whsec_test}');
SELECT FROM idempotency.stripe_webhook_claim('', 't=1,v1=0', '{whsec_test}', wait => NULL);
SELECT FROM idempotency.stripe_webhook_next(consumer => NULL);
SELECT FROM idempotency.stripe_webhook_next('-1 s');
SELECT FROM idempotency.stripe_webhook_reclaim(NULL);
SELECT FROM idempotency.stripe_webhook_reclaim('evt_1', again => NULL);
SELECT FROM idempotency.stripe_webhook_reclaim('');
SELECT FROM idempotency.stripe_webhook_reclaim('evt_1', account => NULL);
SELECT FROM idempotency.stripe_webhook_record(NULL, 1);
SELECT FROM idempotency.stripe_webhook_record('evt_1', NULL);
SELECT FROM idempotency.stripe_webhook_record('evt_1', 1, account => NULL);
SELECT FROM idempotency.stripe_webhook_record('evt_1', 1, consumer => NULL);

--
-- Out of order, and twins
--
CREATE FUNCTION process(body bytea, consumer text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	c idempotency.webhook_claim_result;
BEGIN
	c := claim(body, consumer => consumer);
	PERFORM idempotency.stripe_webhook_record(c.stripe_event_id, c.token, account => c.account, consumer => consumer);
	RETURN format('superseded by %s, twin of %s', coalesce(c.superseded_by, 'none'), coalesce(c.twin_of, 'none'));
END $$;
CREATE FUNCTION at(s int, more jsonb = '{}') RETURNS jsonb LANGUAGE sql RETURN jsonb_build_object('created', 1795300000 + s) || more;
CREATE FUNCTION pi(status text) RETURNS jsonb LANGUAGE sql
RETURN jsonb_build_object('id', 'pi_o', 'object', 'payment_intent', 'status', status);

SELECT process(event('evt_o2', 'payment_intent.succeeded', pi('succeeded'), at(2)), 'order') AS second;
SELECT process(event('evt_o1', 'payment_intent.created', pi('new'), at(1)), 'order') AS "first, late";
SELECT process(event('evt_o3', 'payment_intent.amount_capturable_updated', pi('succeeded'), at(2)), 'order') AS "same second";
SELECT process(event('evt_o4', 'charge.succeeded', '{"id": "ch_o", "object": "charge"}', at(1)), 'order') AS "another object";
SELECT process(event('evt_o5', 'payment_intent.created', pi('new'), at(1, '{"account": "acct_1"}')), 'order') AS "another account";
SELECT process(event('evt_o1', 'payment_intent.created', pi('new'), at(1)), 'order2') AS "another consumer";
-- what has failed or is only received doesn't count
SELECT stored FROM receive(event('evt_o6', 'payment_intent.canceled', pi('canceled'), at(6)), 'order');
SELECT process(event('evt_o7', 'payment_intent.processing', pi('processing'), at(4)), 'order') AS "before one that is received";
-- two events of one fact
SELECT process(event('evt_t2', 'payment_intent.succeeded', pi('succeeded'), at(2)), 'order') AS twin;
SELECT process(event('evt_t3', 'payment_intent.succeeded', pi('succeeded'), at(9, '{"request": {"id": "req_9"}}')), 'order') AS "another request";
SELECT process(event('evt_t4', 'payment_intent.succeeded', pi('succeeded') || '{"amount": 1}', at(9)), 'order') AS "other data";
SELECT process(event('evt_t5', 'payment_intent.created', pi('succeeded'), at(9)), 'order') AS "another type";
SELECT process(event('evt_t8', 'payment_intent.succeeded', pi('succeeded'), at(3602)), 'order') AS "an hour later";
SELECT process(event('evt_t9', 'payment_intent.succeeded', pi('succeeded'), at(7203)), 'order') AS "more than an hour later";
SELECT process(event('evt_t10', 'payment_intent.succeeded', pi('succeeded'), '{"created": null}'), 'order') AS "no time";
-- without an object there is nothing to compare
SELECT process(event('evt_t6', 'balance.available', '{"object": "balance"}', at(1)), 'order') AS balance;
SELECT process(event('evt_t7', 'balance.available', '{"object": "balance"}', at(1)), 'order') AS "same again";
-- the same by stripe_webhook_next() and stripe_webhook_reclaim()
SELECT stripe_event_id, superseded_by, twin_of FROM idempotency.stripe_webhook_next('1 h', 'order');
SELECT stored FROM receive(event('evt_o8', 'payment_intent.created', pi('new'), at(0)), 'order');
SELECT superseded_by, twin_of FROM idempotency.stripe_webhook_reclaim('evt_o8', lease => '1 h', consumer => 'order');

--
-- How much is kept
--
SET idempotency.webhook_payload = 'jsonb';
SELECT process(event('evt_k1'), 'keep');
SET idempotency.webhook_payload = 'none';
SELECT process(event('evt_k2'), 'keep');
SELECT stored FROM receive(event('evt_k3'), 'keep');
SELECT verdict FROM claim(event('evt_k4'), '1 h', 'keep');
SELECT FROM idempotency.stripe_webhook_events e,
	idempotency.stripe_webhook_record(e.stripe_event_id, e.token, success => false, consumer => 'keep')
WHERE e.stripe_event_id = 'evt_k4';
SELECT FROM due('evt_k4');
SELECT stripe_event_id, event ->> 'id' AS event FROM idempotency.stripe_webhook_next('1 h', 'keep');
SELECT stripe_event_id, event ->> 'id' AS event FROM idempotency.stripe_webhook_next('1 h', 'keep');
RESET idempotency.webhook_payload;
SELECT process(event('evt_k5'), 'keep');
SELECT stripe_event_id, success, payload_snapshot IS NOT NULL AS jsonb, payload IS NOT NULL AS bytes
FROM idempotency.stripe_webhook_events WHERE consumer = 'keep' ORDER BY 1;
SELECT verdict, event FROM idempotency.stripe_webhook_reclaim('evt_k2', consumer => 'keep');
SELECT verdict, event FROM idempotency.stripe_webhook_reclaim('evt_k2', consumer => 'keep', again => true);
SELECT verdict, event ->> 'id' AS event FROM claim(event('evt_k2'), consumer => 'keep');

--
-- Privileges: a role of kind webhook, and nobody else
--
CREATE ROLE regress_idempotency_hook;
CREATE ROLE regress_idempotency_nothing;
SELECT FROM idempotency.grant_role('regress_idempotency_hook', 'webhook');
GRANT USAGE ON SCHEMA webhooks TO regress_idempotency_hook, regress_idempotency_nothing;
GRANT USAGE ON SCHEMA idempotency TO regress_idempotency_nothing;
SET ROLE regress_idempotency_hook;
BEGIN;
SELECT verdict FROM claim(event('evt_p1'));
ROLLBACK;
SELECT stored FROM receive(event('evt_p1'), 'p');
RESET ROLE;
-- operators and functions of the caller's don't get in
CREATE FUNCTION webhooks.hostile(text, text) RETURNS boolean LANGUAGE plpgsql
	AS $$ BEGIN RAISE 'ran as %', current_user; END $$;
CREATE OPERATOR webhooks.= (FUNCTION = webhooks.hostile, LEFTARG = text, RIGHTARG = text);
CREATE OPERATOR webhooks.<> (FUNCTION = webhooks.hostile, LEFTARG = text, RIGHTARG = text);
CREATE FUNCTION webhooks.format(text, VARIADIC "any") RETURNS text LANGUAGE internal AS 'text_format';
\c -
SET search_path = webhooks, pg_catalog;
SET ROLE regress_idempotency_hook;
SELECT verdict, superseded_by, twin_of FROM claim(event('evt_p2', 'payment_intent.succeeded',
	'{"id": "pi_p", "object": "payment_intent", "metadata": {"key": "payment:p:018c2b5e-0000-8000-8000-000000000001"}}'), '1 h', 'p');
SELECT stripe_event_id FROM idempotency.stripe_webhook_next('1 h', 'p');
SELECT verdict FROM idempotency.stripe_webhook_reclaim('evt_p1', consumer => 'p');
SELECT 'a' = 'b'::text;
SET search_path = webhooks;
SELECT count(*) FROM idempotency.stripe_webhook_events;
SELECT count(*) FROM idempotency.stripe_webhook_pending;
SET ROLE regress_idempotency_nothing;
SELECT idempotency.stripe_webhook_is_valid('', '');
SELECT FROM idempotency.stripe_webhook_next();
RESET ROLE;

-- read-only
BEGIN READ ONLY;
SELECT stripe_event_id FROM idempotency.stripe_webhook_next();
ROLLBACK;

SET client_min_messages = warning;
DELETE FROM idempotency.stripe_webhook_events;
DROP OWNED BY regress_idempotency_hook, regress_idempotency_nothing;
DROP ROLE regress_idempotency_hook, regress_idempotency_nothing;
RESET search_path;
DROP SCHEMA webhooks CASCADE;
