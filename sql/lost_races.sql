--
-- A write that changes nothing: somebody was faster, so that it is tried again.
-- A trigger stands for the others: it suppresses so many writes as are set.
--
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS idempotency;
RESET client_min_messages;
\set SHOW_CONTEXT never
SET idempotency.stripe_ledger = transaction;

CREATE FUNCTION suppress() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
	n int := current_setting('test.suppress')::int;
BEGIN
	IF n > 0 THEN
		PERFORM set_config('test.suppress', (n - 1)::text, false);
		RETURN NULL;
	END IF;
	RETURN COALESCE(NEW, OLD);
END $$;
SET test.suppress = 0;
CREATE TRIGGER suppress BEFORE INSERT OR UPDATE OR DELETE ON idempotency.idempotency_keys
	FOR EACH ROW EXECUTE FUNCTION suppress();
CREATE TRIGGER suppress BEFORE INSERT OR UPDATE OR DELETE ON idempotency.stripe_idempotency_keys
	FOR EACH ROW EXECUTE FUNCTION suppress();
CREATE TRIGGER suppress BEFORE INSERT OR UPDATE OR DELETE ON idempotency.stripe_webhook_events
	FOR EACH ROW EXECUTE FUNCTION suppress();

-- what a statement says where its first two writes are in vain, and where all are
CREATE FUNCTION twice(statement text) RETURNS TABLE (tried text, said text) LANGUAGE plpgsql AS $$
BEGIN
	PERFORM set_config('test.suppress', '1000', false);
	tried := 'always';
	BEGIN
		EXECUTE statement INTO said;
	EXCEPTION WHEN object_not_in_prerequisite_state THEN
		said := SQLERRM;
	END;
	RETURN NEXT;
	PERFORM set_config('test.suppress', '2', false);
	tried := 'twice';
	EXECUTE statement INTO said;
	RETURN NEXT;
	PERFORM set_config('test.suppress', '0', false);
END $$;

-- requests
CREATE FUNCTION t(k text) RETURNS bigint LANGUAGE sql AS
	'SELECT token FROM idempotency.idempotency_keys WHERE key = k';
SELECT * FROM twice($$SELECT verdict FROM idempotency.claim('k', 's', lease => '1 hour')$$);
SELECT * FROM twice($$SELECT idempotency.extend('k', 's', t('k'), '2 hours') > now() + '1 hour'$$);
SELECT * FROM twice($$SELECT idempotency.checkpoint('k', 's', t('k'), 'paid', lease => '1 microsecond') <= clock_timestamp()$$);
SELECT * FROM twice($$SELECT verdict || ' ' || attempt FROM idempotency.claim('k', 's', lease => '1 hour')$$);
SELECT * FROM twice($$SELECT idempotency.record('k', 's', t('k')) > now()$$);
SELECT verdict, attempt, recovery_point FROM idempotency.claim('k', 's');
SELECT verdict FROM idempotency.claim('released', 's', lease => '1 hour');
SELECT * FROM twice($$SELECT idempotency.release('released', 's', t('released'))::text$$);
SELECT count(*) FROM idempotency.idempotency_keys WHERE key = 'released';

-- calls to Stripe
CREATE FUNCTION s(id text) RETURNS bigint LANGUAGE sql AS
	'SELECT token FROM idempotency.stripe_idempotency_keys WHERE operation_id = id';
SELECT * FROM twice($$SELECT verdict FROM idempotency.stripe_claim('pay', '1')$$);
SELECT * FROM twice($$SELECT idempotency.stripe_extend('pay', '1', s('1'), '1 hour') > now()$$);
SELECT * FROM twice($$SELECT idempotency.stripe_release('pay', '1', s('1'))::text$$);
SELECT * FROM twice($$SELECT verdict || ' ' || attempt FROM idempotency.stripe_claim('pay', '1')$$);
SELECT * FROM twice($$SELECT idempotency.stripe_record('pay', '1', s('1'), http_status => 402, response => '{"error": {"type": "card_error"}}')$$);
SELECT * FROM twice($$SELECT idempotency.stripe_reopen('pay', '1') <> ''$$);
SELECT verdict, generation FROM idempotency.stripe_claim('pay', '1');
SELECT idempotency.stripe_record('pay', '1', s('1'), http_status => 500);
SELECT * FROM twice($$SELECT idempotency.stripe_settle('pay', '1', 'completed', 'pi_1')::text$$);
SELECT outcome, attempt, generation, resource_id FROM idempotency.stripe_lookup('pay', '1');

-- events: two deliveries
CREATE FUNCTION delivery(id text) RETURNS TABLE (body bytea, signature text) LANGUAGE plpgsql AS $$
DECLARE
	key bytea := 'whsec_test' || decode(repeat('00', 54), 'hex');
	inner_pad bytea := '';
	outer_pad bytea := '';
BEGIN
	FOR i IN 0 .. 63 LOOP
		inner_pad := inner_pad || set_byte('\x00', 0, get_byte(key, i) # 54);
		outer_pad := outer_pad || set_byte('\x00', 0, get_byte(key, i) # 92);
	END LOOP;
	body := convert_to(format('{"id": "%s", "object": "event", "type": "a.b", "data": {"object": {"id": "o"}}}', id), 'UTF8');
	signature := 't=1795300000,v1=' || encode(sha256(outer_pad || sha256(inner_pad || '1795300000.'::bytea || body)), 'hex');
	RETURN NEXT;
END $$;
CREATE FUNCTION e(id text) RETURNS bigint LANGUAGE sql AS
	'SELECT token FROM idempotency.stripe_webhook_events WHERE stripe_event_id = id';
SELECT * FROM twice($$SELECT c.verdict FROM delivery('evt_1') d,
	idempotency.stripe_webhook_claim(d.body, d.signature, '{whsec_test}', '1000 years', '1 hour') c$$);
SELECT * FROM twice($$SELECT idempotency.stripe_webhook_record('evt_1', e('evt_1'), error_message => 'no')::text$$);
SELECT * FROM twice($$SELECT verdict || ' ' || attempt FROM idempotency.stripe_webhook_reclaim('evt_1', lease => '1 microsecond')$$);
UPDATE idempotency.stripe_webhook_events SET next_attempt_at = now();
SELECT * FROM twice($$SELECT verdict || ' ' || attempt FROM idempotency.stripe_webhook_next('1 hour')$$);
SELECT * FROM twice($$SELECT r.stored FROM delivery('evt_2') d,
	idempotency.stripe_webhook_receive(d.body, d.signature, '{whsec_test}', '1000 years') r$$);
SELECT stripe_event_id, attempts FROM idempotency.stripe_webhook_events ORDER BY 1;

DROP EXTENSION idempotency;
DROP FUNCTION suppress, twice, t, s, e, delivery;
