-- The body of a webhook as text: PostgreSQL chooses that for an untyped literal
-- or parameter, and what counts are its bytes in UTF-8
\set VERBOSITY terse
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS idempotency;
RESET client_min_messages;

CREATE FUNCTION sign(body bytea) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	key bytea := 'whsec_test' || decode(repeat('00', 54), 'hex');
	inner_pad bytea := '';
	outer_pad bytea := '';
BEGIN
	FOR i IN 0 .. 63 LOOP
		inner_pad := inner_pad || set_byte('\x00', 0, get_byte(key, i) # 54);
		outer_pad := outer_pad || set_byte('\x00', 0, get_byte(key, i) # 92);
	END LOOP;
	RETURN 't=1795300000,v1=' || encode(sha256(outer_pad || sha256(inner_pad || convert_to('1795300000.', 'UTF8') || body)), 'hex');
END $$;

-- a quote, backslashes, what looks like octal, characters beyond ASCII
SELECT U&'{"id": "evt_1", "object": "event", "type": "a", "d": "TV 40\005C", \005C\005C \005C/ \005Cu00e9 \005Cn", "o": "\005C\005C101", "n": "Zo\00EB \+01F600", "q": "it''s"}' AS body \gset
SELECT sign(convert_to(:'body', 'UTF8')) AS signature \gset
SELECT convert_to(:'body', 'UTF8') AS bytes \gset

-- however it is told, it is the same body
SELECT how, word FROM (VALUES
	(1, 'untyped', idempotency.stripe_webhook_verify(:'body', :'signature', '{whsec_test}', '1000 years')),
	(2, 'text', idempotency.stripe_webhook_verify(:'body'::text, :'signature', '{whsec_test}', '1000 years')),
	(3, 'varchar', idempotency.stripe_webhook_verify(:'body'::varchar, :'signature', '{whsec_test}', '1000 years')),
	(4, 'bytea', idempotency.stripe_webhook_verify(:'bytes'::bytea, :'signature', '{whsec_test}', '1000 years')),
	(5, 'written bytea', idempotency.stripe_webhook_verify(:'bytes', :'signature', '{whsec_test}', '1000 years')),
	(6, 'in capitals', idempotency.stripe_webhook_verify('\x' || upper(substr(:'bytes', 3)), :'signature', '{whsec_test}', '1000 years')),
	(7, 'named', idempotency.stripe_webhook_verify(signature => :'signature', payload => :'body', tolerance => '1000 years', secrets => '{whsec_test}')),
	(8, 'mixed', idempotency.stripe_webhook_verify(:'body', :'signature', tolerance => '1000 years', secrets => '{whsec_test}')),
	(9, 'named bytea', idempotency.stripe_webhook_verify(signature => :'signature', payload => :'bytes'::bytea, tolerance => '1000 years', secrets => '{whsec_test}'))
) v (n, how, word) ORDER BY n;
SELECT idempotency.stripe_webhook_is_valid(:'body', :'signature', '{whsec_test}', '1000 years') AS untyped,
	idempotency.stripe_webhook_is_valid(:'bytes'::bytea, :'signature', '{whsec_test}', '1000 years') AS bytea;

-- neither a written bytea nor the body
SELECT body, idempotency.stripe_webhook_verify(body, :'signature', '{whsec_test}', '1000 years')
FROM (VALUES ('\x'), ('\x7'), ('\x7b7'), ('\xzz'), ('\X7b7d'), (E'\\x7b\n7d'), ('\173'), ('\\'), ('\'), ('')) v (body);

-- an untyped parameter is text; a driver with bytes says so
PREPARE untyped AS SELECT idempotency.stripe_webhook_verify($1, $2, $3, $4);
PREPARE bytea AS SELECT idempotency.stripe_webhook_verify($1::bytea, $2, $3, $4);
PREPARE claim AS SELECT verdict FROM idempotency.stripe_webhook_claim($1, $2);
SELECT name, parameter_types FROM pg_prepared_statements ORDER BY name COLLATE "C";
EXECUTE untyped (:'body', :'signature', '{whsec_test}', '1000 years');
EXECUTE bytea (:'bytes', :'signature', '{whsec_test}', '1000 years');

-- it is claimed and kept as it came
BEGIN;
SELECT verdict, stripe_event_id, event ->> 'd' AS d, token FROM idempotency.stripe_webhook_claim(:'body', :'signature', '{whsec_test}', '1000 years') \gset
SELECT :'verdict' AS verdict, :'stripe_event_id' AS id, :'d' AS d;
SELECT FROM idempotency.stripe_webhook_record('evt_1', :token);
COMMIT;
SELECT verdict FROM idempotency.stripe_webhook_claim(:'bytes'::bytea, :'signature', '{whsec_test}', '1000 years');
SELECT stored FROM idempotency.stripe_webhook_receive(:'body', :'signature', '{whsec_test}', '1000 years', consumer => 'text');
SELECT stored FROM idempotency.stripe_webhook_receive(:'bytes', :'signature', '{whsec_test}', '1000 years', consumer => 'written');
SELECT stored FROM idempotency.stripe_webhook_receive(payload => :'bytes'::bytea, signature => :'signature', secrets => '{whsec_test}', tolerance => '1000 years', consumer => 'bytea');
SELECT consumer, payload = :'bytes'::bytea AS same_bytes FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_1' ORDER BY consumer;

-- what is refused
SELECT idempotency.stripe_webhook_verify(NULL, NULL);
SELECT idempotency.stripe_webhook_is_valid(NULL::text, NULL);
SELECT FROM idempotency.stripe_webhook_claim(NULL::text, NULL);
SELECT FROM idempotency.stripe_webhook_receive(NULL::bytea, NULL);
SELECT idempotency.stripe_webhook_verify('{}'::json, NULL);
\set VERBOSITY default
SELECT FROM idempotency.stripe_webhook_claim('{}', :'signature', '{whsec_test}', '1000 years');
SELECT FROM idempotency.stripe_webhook_receive('{}'::bytea, :'signature', '{whsec_test}', '1000 years');

DELETE FROM idempotency.stripe_webhook_events;
DEALLOCATE ALL;
DROP FUNCTION sign(bytea);
