--
-- What an application builds around claim() and record().  doc/http.md and
-- doc/webhooks.md show the same functions; test/t/020_readme.pl checks that they
-- are the same.
--
\set VERBOSITY terse
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS idempotency;
RESET client_min_messages;

CREATE TABLE orders (
    id uuid PRIMARY KEY,
    user_id text NOT NULL,
    sku text NOT NULL,
    quantity integer NOT NULL CHECK (quantity > 0),
    payment text
);

--
-- PL/pgSQL: one request, one transaction
--
CREATE SCHEMA api;

CREATE TYPE api.http_response AS (status integer, headers jsonb, body jsonb);

-- a refusal, in the form of RFC 9457
CREATE FUNCTION api.problem(status integer, detail text, headers jsonb DEFAULT '{}')
RETURNS api.http_response
LANGUAGE sql IMMUTABLE
RETURN ROW(status, headers || '{"Content-Type": "application/problem+json"}',
           jsonb_build_object('status', status, 'detail', detail))::api.http_response;

-- the key of an Idempotency-Key header: bare, or a quoted structured field
CREATE FUNCTION api.key_of_header(header text)
RETURNS text
LANGUAGE sql IMMUTABLE
RETURN NULLIF(CASE WHEN header ~ '^\s*".*"\s*$'
                   THEN regexp_replace(regexp_replace(header, '^\s*"|"\s*$', '', 'g'),
                                       '\\(["\\])', '\1', 'g')
                   ELSE btrim(header) END, '');

CREATE FUNCTION api.create_order(idempotency_key text, user_id text, body jsonb)
RETURNS api.http_response
LANGUAGE plpgsql
AS $$
DECLARE
    key text := api.key_of_header(idempotency_key);
    c idempotency.claim_result;
    order_id uuid;
    answer api.http_response;
BEGIN
    IF key IS NULL THEN
        RETURN api.problem(400, 'The Idempotency-Key header is missing.');
    ELSIF key !~ '^[\x20-\x7e]{1,255}$' THEN
        RETURN api.problem(400, 'The Idempotency-Key header is malformed.');
    END IF;

    SELECT * INTO c FROM idempotency.claim(key, user_id, wait => false,
        request => jsonb_build_object('method', 'POST', 'path', '/orders', 'body', body));

    CASE c.verdict
        WHEN 'claimed' THEN
            NULL;               -- ours: go on below
        WHEN 'replay' THEN
            RETURN ROW(c.http_status,
                       c.response_headers || '{"Idempotent-Replayed": "true"}',
                       c.response)::api.http_response;
        WHEN 'in_progress' THEN
            RETURN api.problem(c.http_status, 'This request is being processed.',
                               jsonb_build_object('Retry-After', c.retry_after::text));
        WHEN 'mismatch' THEN
            RETURN api.problem(c.http_status,
                               'This Idempotency-Key was used with another request.');
    END CASE;

    -- What this block does is undone by its exception handler, the claim is
    -- not: a refusal is recorded like any other result.  Any other error
    -- leaves the function and takes the claim with it.
    BEGIN
        order_id := idempotency.operation_uuid(key, user_id);
        INSERT INTO public.orders (id, user_id, sku, quantity)
            VALUES (order_id, user_id, body ->> 'sku', (body ->> 'quantity')::integer)
            ON CONFLICT (id) DO NOTHING;    -- an order outlives its key
        answer.status := 201;
        answer.headers := jsonb_build_object('Location', '/orders/' || order_id);
        answer.body := (SELECT to_jsonb(o) FROM public.orders o WHERE o.id = order_id);
    EXCEPTION
        WHEN check_violation OR not_null_violation OR invalid_text_representation THEN
            answer := api.problem(400, 'The order needs a sku and a positive quantity.');
    END;

    PERFORM idempotency.record(key, user_id, c.token, response => answer.body,
        response_status => answer.status, response_headers => answer.headers);
    RETURN answer;
END
$$;

-- runs once, whatever the spelling of header and body
SELECT status, headers->>'Location' = '/orders/' || (body->>'id') AS has_location,
	headers ? 'Idempotent-Replayed' AS replayed, body - 'id' AS body
FROM api.create_order('k-1', 'user 42', '{"sku": "apple", "quantity": 3}');
SELECT status, headers->>'Location' = '/orders/' || (body->>'id') AS has_location,
	headers->'Idempotent-Replayed' AS replayed, body - 'id' AS body
FROM api.create_order('k-1', 'user 42', '{"sku": "apple", "quantity": 3}');
SELECT status, headers->'Idempotent-Replayed' AS replayed
FROM api.create_order('"k-1"', 'user 42', '{"quantity": 3.0, "sku": "\u0061pple"}');
SELECT status, headers->'Idempotent-Replayed' AS replayed
FROM api.create_order(E' "k-1"\t', 'user 42', '{"quantity": 3, "sku": "apple"}');
SELECT id = idempotency.operation_uuid('k-1', 'user 42') AS derived, user_id, sku, quantity
FROM orders;

-- the same key of another user is another key
SELECT status, headers ? 'Idempotent-Replayed' AS replayed
FROM api.create_order('k-1', 'user 7', '{"sku": "apple", "quantity": 1}');

-- another request with the same key: nothing runs, nothing is shown
SELECT * FROM api.create_order('k-1', 'user 42', '{"sku": "apple", "quantity": 4}');

-- somebody else is at it
SELECT verdict FROM idempotency.claim('k-2', 'user 42', lease => interval '1 hour');
SELECT status, (headers->>'Retry-After')::integer BETWEEN 1 AND 3600 AS retry_after,
	headers - 'Retry-After' AS headers, body
FROM api.create_order('k-2', 'user 42', '{"sku": "pear", "quantity": 1}');

-- headers that hold no key
SELECT * FROM api.create_order(NULL, 'user 42', '{"sku": "pear", "quantity": 1}');
SELECT * FROM api.create_order('', 'user 42', '{"sku": "pear", "quantity": 1}');
SELECT * FROM api.create_order(' "" ', 'user 42', '{"sku": "pear", "quantity": 1}');
SELECT * FROM api.create_order(repeat('x', 256), 'user 42', '{"sku": "pear", "quantity": 1}');
SELECT * FROM api.create_order(E'"a\nb"', 'user 42', '{"sku": "pear", "quantity": 1}');
SELECT status FROM api.create_order(repeat('x', 255), 'user 42', '{"sku": "pear", "quantity": 1}');
SELECT header, api.key_of_header(header)
FROM (VALUES ('bare'), ('"quoted"'), ('" in side "'), ('"a\"b\\c"'), ('half"'), ('"'), ('""')) h (header);

-- a refusal is recorded and replayed, the order isn't there
SELECT * FROM api.create_order('k-3', 'user 42', '{"sku": "pear", "quantity": 0}');
SELECT * FROM api.create_order('k-3', 'user 42', '{"sku": "pear", "quantity": 0}');
SELECT * FROM api.create_order('k-4', 'user 42', '{"quantity": 1}');
SELECT * FROM api.create_order('k-5', 'user 42', '{"sku": "pear", "quantity": "many"}');
SELECT status, http_status FROM idempotency.lookup('k-3', 'user 42');

-- an error that nobody has foreseen takes the claim with it, so a retry may succeed
SELECT * FROM api.create_order('k-6', 'user 42', '{"sku": "plum", "quantity": 5000000000}');
SELECT status FROM idempotency.lookup('k-6', 'user 42');
DO $$
BEGIN
	PERFORM api.create_order('k-6', 'user 42', '{"sku": "plum", "quantity": 5000000000}');
EXCEPTION
	WHEN numeric_value_out_of_range THEN
		RAISE NOTICE 'caught: %', SQLERRM;
END
$$;
SELECT status, headers ? 'Idempotent-Replayed' AS replayed
FROM api.create_order('k-6', 'user 42', '{"sku": "plum", "quantity": 5}');

-- so does a rollback of the caller's
BEGIN;
SELECT status FROM api.create_order('k-7', 'user 42', '{"sku": "fig", "quantity": 1}');
ROLLBACK;
SELECT count(*) FROM orders WHERE sku = 'fig';
SELECT status, headers ? 'Idempotent-Replayed' AS replayed
FROM api.create_order('k-7', 'user 42', '{"sku": "fig", "quantity": 1}');

-- without a user there is no scope
SELECT * FROM api.create_order('k-8', NULL, '{"sku": "fig", "quantity": 1}');

-- long after: the key is forgotten, the order isn't
UPDATE idempotency.idempotency_keys SET expires_at = '2020-01-01'
WHERE scope = 'user 42' AND key = 'k-1';
SELECT status, headers ? 'Idempotent-Replayed' AS replayed, body - 'id' AS body
FROM api.create_order('k-1', 'user 42', '{"sku": "apple", "quantity": 3}');
SELECT count(*) FROM orders WHERE id = idempotency.operation_uuid('k-1', 'user 42');

--
-- PostgREST: the same by its settings
--
CREATE SCHEMA rest;

CREATE FUNCTION rest.orders(jsonb)
RETURNS json
LANGUAGE plpgsql
AS $$
DECLARE
    answer api.http_response;
BEGIN
    answer := api.create_order(
        NULLIF(current_setting('request.headers', true), '')::json ->> 'idempotency-key',
        NULLIF(current_setting('request.jwt.claims', true), '')::json ->> 'sub',
        $1);

    PERFORM set_config('response.status', answer.status::text, true);
    PERFORM set_config('response.headers', json_agg(json_build_object(h.key, h.value))::text, true)
        FROM jsonb_each_text(answer.headers) h;
    RETURN answer.body;
END
$$;

CREATE ROLE regress_authenticator NOINHERIT;
CREATE ROLE regress_web_user;
GRANT regress_web_user TO regress_authenticator;
GRANT USAGE ON SCHEMA rest, api TO regress_web_user;
GRANT SELECT, INSERT ON orders TO regress_web_user;
SELECT idempotency.grant_role('regress_web_user', 'application');

-- the transaction that PostgREST makes of a request
SET SESSION AUTHORIZATION regress_authenticator;
BEGIN;
SET LOCAL ROLE regress_web_user;
SELECT set_config('request.headers', '{"idempotency-key": "\"r-1\"", "accept": "*/*"}', true) IS NOT NULL
	AND set_config('request.jwt.claims', '{"sub": "user 42", "role": "regress_web_user"}', true) IS NOT NULL AS set;
SELECT rest.orders('{"sku": "date", "quantity": 2}')::jsonb - 'id' AS body;
SELECT current_setting('response.status') AS status,
	regexp_replace(current_setting('response.headers'), '[0-9a-f-]{36}', '...') AS headers;
COMMIT;

BEGIN;
SET LOCAL ROLE regress_web_user;
SELECT set_config('request.headers', '{"idempotency-key": "r-1"}', true) IS NOT NULL
	AND set_config('request.jwt.claims', '{"sub": "user 42", "role": "regress_web_user"}', true) IS NOT NULL AS set;
SELECT rest.orders('{"sku": "date", "quantity": 2}')::jsonb - 'id' AS body;
SELECT current_setting('response.status') AS status,
	regexp_replace(current_setting('response.headers'), '[0-9a-f-]{36}', '...') AS headers;
COMMIT;

-- no header
BEGIN;
SET LOCAL ROLE regress_web_user;
SELECT set_config('request.headers', '{"accept": "*/*"}', true) IS NOT NULL
	AND set_config('request.jwt.claims', '{"sub": "user 42", "role": "regress_web_user"}', true) IS NOT NULL AS set;
SELECT rest.orders('{"sku": "date", "quantity": 2}');
SELECT current_setting('response.status') AS status, current_setting('response.headers') AS headers;
COMMIT;

-- no token: an error, which PostgREST answers with its own status
BEGIN;
SET LOCAL ROLE regress_web_user;
SELECT set_config('request.headers', '{"idempotency-key": "r-1"}', true) IS NOT NULL AS set;
SELECT rest.orders('{"sku": "date", "quantity": 2}');
ROLLBACK;

-- the role sees nothing of the ledger, and before SET ROLE there is nothing to call
BEGIN;
SET LOCAL ROLE regress_web_user;
SELECT count(*) FROM idempotency.idempotency_keys;
ROLLBACK;
SELECT rest.orders('{"sku": "date", "quantity": 2}');
RESET SESSION AUTHORIZATION;

--
-- PostgREST: an event of Stripe's, the body as json, which keeps its text
--
CREATE FUNCTION api.handle_event(e idempotency.webhook_claim_result)
RETURNS void
LANGUAGE plpgsql
AS $$
DECLARE
    metadata jsonb := e.event #> '{data,object,metadata}';
BEGIN
    -- ours is what carries our mark; others may use the same account of Stripe's
    IF e.event_type = 'payment_intent.succeeded' AND metadata ->> 'shop' = 'example' THEN
        UPDATE public.orders SET payment = e.object_id WHERE id = (metadata ->> 'order_id')::uuid;
        IF NOT FOUND THEN
            RAISE EXCEPTION 'there is no order %, or not yet', metadata ->> 'order_id';
        END IF;
    END IF;
END
$$;

CREATE FUNCTION rest.stripe_webhook(json)
RETURNS void
LANGUAGE plpgsql
AS $$
DECLARE
    e idempotency.webhook_claim_result;
BEGIN
    SELECT * INTO e FROM idempotency.stripe_webhook_claim(
        convert_to($1::text, 'UTF8'),
        NULLIF(current_setting('request.headers', true), '')::json ->> 'stripe-signature',
        wait => false);

    IF e.verdict = 'in_progress' THEN
        PERFORM set_config('response.status', '409', true);
    ELSIF e.verdict = 'claimed' THEN
        -- what fails is undone and recorded; Stripe delivers the event again
        BEGIN
            PERFORM api.handle_event(e);
            PERFORM idempotency.stripe_webhook_record(e.stripe_event_id, e.token, account => e.account);
        EXCEPTION WHEN OTHERS THEN
            PERFORM idempotency.stripe_webhook_record(e.stripe_event_id, e.token, account => e.account,
                error_message => SQLERRM);
            PERFORM set_config('response.status', '503', true);
        END;
    END IF;
END
$$;

GRANT UPDATE ON orders TO regress_web_user;
SELECT idempotency.grant_role('regress_web_user', 'webhook');
GRANT EXECUTE ON FUNCTION rest.stripe_webhook(json), api.handle_event(idempotency.webhook_claim_result) TO regress_web_user;

-- a header for this body, now
CREATE FUNCTION api.sign(body text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	key bytea := 'whsec_test' || decode(repeat('00', 54), 'hex');
	t text := floor(extract(epoch FROM clock_timestamp()))::text;
	inner_pad bytea := '';
	outer_pad bytea := '';
BEGIN
	FOR i IN 0 .. 63 LOOP
		inner_pad := inner_pad || set_byte('\x00', 0, get_byte(key, i) # 54);
		outer_pad := outer_pad || set_byte('\x00', 0, get_byte(key, i) # 92);
	END LOOP;
	RETURN format('t=%s,v1=%s', t,
		encode(sha256(outer_pad || sha256(inner_pad || convert_to(t || '.' || body, 'UTF8'))), 'hex'));
END $$;

-- the file with the secret
COPY (SELECT 'whsec_test') TO PROGRAM 'umask 077; cat > regress_webhook_secret';
SELECT set_config('idempotency.webhook_secret_file', current_setting('data_directory') || '/regress_webhook_secret', false)
	IS NOT NULL AS set;

-- spacing as odd as JSON allows
SELECT id AS order_id FROM orders ORDER BY id LIMIT 1 \gset
SELECT E'\t{"id"  :"evt_1" ,\r\n "object": "event","type":"payment_intent.succeeded"  , "data":{ "object" :{"id":"pi_\\u00fc\u00fc","object":"payment_intent", "metadata": {"shop": "example", "order_id": "' || :'order_id' || E'"}}}\n\n}\n ' AS body \gset
SELECT api.sign(:'body') AS signature \gset
SELECT json_build_object('stripe-signature', :'signature', 'accept', '*/*') AS headers \gset

BEGIN;
SET LOCAL ROLE regress_web_user;
SELECT set_config('request.headers', :'headers', true) IS NOT NULL AS set;
SELECT rest.stripe_webhook(:'body');
SELECT current_setting('response.status', true) AS status;
COMMIT;
SELECT payment = U&'pi_\00fc\00fc' AS paid FROM orders WHERE id = :'order_id';
SELECT stripe_event_id, success, payload = convert_to(:'body', 'UTF8') AS same_bytes, object_id = U&'pi_\00fc\00fc' AS object
FROM idempotency.stripe_webhook_events;

-- delivered again
BEGIN;
SET LOCAL ROLE regress_web_user;
SELECT set_config('request.headers', :'headers', true) IS NOT NULL AS set;
SELECT rest.stripe_webhook(:'body');
COMMIT;
SELECT attempts, success FROM idempotency.stripe_webhook_events;

-- keys that repeat: json keeps them, and so the signature
SELECT '{"id": "evt_2", "object":  "event", "type": "a", "id": "evt_2"}' AS twice \gset
SELECT api.sign(:'twice') AS signature \gset
SELECT json_build_object('stripe-signature', :'signature') AS headers \gset
SELECT idempotency.stripe_webhook_verify(convert_to((:'twice'::json)::text, 'UTF8'), :'signature', '{whsec_test}') AS json,
	idempotency.stripe_webhook_verify(convert_to((:'twice'::jsonb)::text, 'UTF8'), :'signature', '{whsec_test}') AS jsonb;
\set VERBOSITY default
\set SHOW_CONTEXT never
BEGIN;
SET LOCAL ROLE regress_web_user;
SELECT set_config('request.headers', :'headers', true) IS NOT NULL AS set;
SELECT rest.stripe_webhook(:'twice');
ROLLBACK;
-- no header, or none at all
BEGIN;
SET LOCAL ROLE regress_web_user;
SELECT set_config('request.headers', '{"accept": "*/*"}', true) IS NOT NULL AS set;
SELECT rest.stripe_webhook(:'body');
ROLLBACK;
BEGIN;
SET LOCAL ROLE regress_web_user;
SELECT set_config('request.headers', '', true) IS NOT NULL AS set;
SELECT rest.stripe_webhook(:'body');
ROLLBACK;
\set VERBOSITY terse

-- what fails is recorded, and 503 makes Stripe deliver it again
SELECT '{"id": "evt_3", "object": "event", "type": "payment_intent.succeeded", "data": {"object": {"metadata": {"shop": "example", "order_id": "17"}}}}' AS body \gset
SELECT json_build_object('stripe-signature', api.sign(:'body')) AS headers \gset
BEGIN;
SET LOCAL ROLE regress_web_user;
SELECT set_config('request.headers', :'headers', true) IS NOT NULL AS set;
SELECT rest.stripe_webhook(:'body');
SELECT current_setting('response.status', true) AS status;
COMMIT;
SELECT stripe_event_id, attempts, success, error_message FROM idempotency.stripe_webhook_events ORDER BY stripe_event_id;

-- what isn't ours is processed; ours whose order isn't there is told to come again
SELECT '{"id": "evt_4", "object": "event", "type": "payment_intent.succeeded", "data": {"object": {"metadata": {"order_id": "17"}}}}' AS others \gset
SELECT '{"id": "evt_5", "object": "event", "type": "payment_intent.succeeded", "data": {"object": {"metadata": {"shop": "example", "order_id": "018c2b5e-0000-7000-8000-000000000000"}}}}' AS early \gset
BEGIN;
SET LOCAL ROLE regress_web_user;
SELECT set_config('request.headers', json_build_object('stripe-signature', api.sign(:'others'))::text, true) IS NOT NULL AS set;
SELECT rest.stripe_webhook(:'others');
SELECT current_setting('response.status', true) AS status;
SELECT set_config('request.headers', json_build_object('stripe-signature', api.sign(:'early'))::text, true) IS NOT NULL AS set;
SELECT rest.stripe_webhook(:'early');
SELECT current_setting('response.status', true) AS status;
COMMIT;
SELECT stripe_event_id, success, error_message FROM idempotency.stripe_webhook_events WHERE stripe_event_id IN ('evt_4', 'evt_5') ORDER BY 1;

-- somebody else is at it
SELECT verdict FROM idempotency.stripe_webhook_reclaim('evt_3', lease => '1 hour');
BEGIN;
SET LOCAL ROLE regress_web_user;
SELECT set_config('request.headers', :'headers', true) IS NOT NULL AS set;
SELECT rest.stripe_webhook(:'body');
SELECT current_setting('response.status', true) AS status;
COMMIT;

-- clean up
RESET idempotency.webhook_secret_file;
COPY (SELECT 1) TO PROGRAM 'cat > /dev/null; rm -f regress_webhook_secret';
DELETE FROM idempotency.stripe_webhook_events;

--
-- A table of the application's own with the key of the operation
--
CREATE TABLE wallet_entries (
    user_id text NOT NULL,
    amount numeric NOT NULL,
    idempotency_key uuid NOT NULL UNIQUE
);

BEGIN;
SELECT verdict, token FROM idempotency.claim('topup-7', 'user 42') \gset
\echo :verdict
INSERT INTO wallet_entries (user_id, amount, idempotency_key)
    VALUES ('user 42', 50.00, idempotency.operation_uuid('topup-7', 'user 42'))
    ON CONFLICT (idempotency_key) DO NOTHING;
SELECT idempotency.record('topup-7', 'user 42', :token, response => '{"credited": 50.00}') IS NOT NULL AS recorded;
COMMIT;

-- the key is forgotten, and the client tries again
UPDATE idempotency.idempotency_keys SET expires_at = '2020-01-01'
WHERE scope = 'user 42' AND key = 'topup-7';
BEGIN;
SELECT verdict, token FROM idempotency.claim('topup-7', 'user 42') \gset
\echo :verdict
INSERT INTO wallet_entries (user_id, amount, idempotency_key)
    VALUES ('user 42', 50.00, idempotency.operation_uuid('topup-7', 'user 42'))
    ON CONFLICT (idempotency_key) DO NOTHING;
SELECT idempotency.record('topup-7', 'user 42', :token, response => '{"credited": 50.00}') IS NOT NULL AS recorded;
COMMIT;
SELECT user_id, amount, idempotency_key = idempotency.operation_uuid('topup-7', 'user 42') AS derived
FROM wallet_entries;

-- and whoever forgets to ask the ledger is stopped by the table
INSERT INTO wallet_entries (user_id, amount, idempotency_key)
    VALUES ('user 42', 50.00, idempotency.operation_uuid('topup-7', 'user 42'));

-- clean up
DROP TABLE wallet_entries, orders;
DROP SCHEMA rest CASCADE;
DROP SCHEMA api CASCADE;
DROP OWNED BY regress_web_user;
DROP ROLE regress_authenticator, regress_web_user;
DELETE FROM idempotency.idempotency_keys WHERE scope IN ('user 42', 'user 7');
