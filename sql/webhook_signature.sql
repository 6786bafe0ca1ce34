--
-- Signatures of webhooks: every vector of the official libraries, and the
-- edges that they leave open
--
\set VERBOSITY terse
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS idempotency;
RESET client_min_messages;
\getenv abs_srcdir PG_ABS_SRCDIR

CREATE SCHEMA webhook_signature;
SET search_path = webhook_signature;

CREATE TABLE vectors AS
SELECT v ->> 'id' AS id, v ->> 'header' AS header, v ->> 'secret' AS secret,
	decode(v ->> 'payload_base64', 'base64') AS payload,
	make_interval(secs => (v ->> 'tolerance')::float8) AS tolerance,
	(v ->> 'received_at')::bigint AS received_at,
	v ->> 'suggested_verdict' AS suggested_verdict
FROM json_array_elements(pg_read_file(:'abs_srcdir' || '/test/vectors/webhook_signatures.json')::json
	-> 'vectors') v;

CREATE FUNCTION now_s() RETURNS bigint LANGUAGE sql AS
	$$SELECT floor(extract(epoch FROM clock_timestamp()))::bigint$$;

-- what the whole says: "accept" is an event that was taken in
CREATE FUNCTION verdict(v vectors, OUT signature text, OUT taken_in text) LANGUAGE plpgsql AS $$
DECLARE
	s bigint;
	tolerance interval;
BEGIN
	FOR i IN 1 .. 1000 LOOP
		-- the clock goes on, so the age that is tolerated grows with it; it mustn't tick meanwhile
		s := now_s();
		-- vector age_old_tolerance_0 is about the argument itself
		tolerance := CASE WHEN v.tolerance = '0' THEN v.tolerance
			ELSE v.tolerance + make_interval(secs => greatest(0, s - v.received_at)) END;
		BEGIN
			signature := idempotency.stripe_webhook_verify(v.payload, v.header, ARRAY[v.secret], tolerance);
			IF idempotency.stripe_webhook_is_valid(v.payload, v.header, ARRAY[v.secret], tolerance)
					IS DISTINCT FROM (signature = 'valid') AND now_s() = s THEN
				RAISE 'stripe_webhook_is_valid says something else';
			END IF;
		EXCEPTION WHEN SQLSTATE 'IK003' THEN
			signature := 'IK003: ' || SQLERRM;
		END;
		BEGIN
			taken_in := (SELECT stripe_event_id FROM idempotency.stripe_webhook_receive(v.payload, v.header,
				ARRAY[v.secret], tolerance, consumer => v.id));
		EXCEPTION
			WHEN SQLSTATE 'IK003' THEN
				taken_in := 'IK003';
			WHEN SQLSTATE 'IK004' THEN
				GET STACKED DIAGNOSTICS taken_in = PG_EXCEPTION_DETAIL;
				taken_in := 'IK004: ' || taken_in;
		END;
		EXIT WHEN now_s() = s;
	END LOOP;
END $$;

SELECT count(*) AS vectors FROM vectors;
SELECT v.id, v.suggested_verdict AS suggested, s.signature, s.taken_in
FROM vectors v, verdict(v) s ORDER BY v.id;

-- all are taken in as suggested but one: a tolerance of zero is no tolerance
SELECT v.id, v.suggested_verdict FROM vectors v
WHERE (v.suggested_verdict = 'accept') <>
	EXISTS (SELECT FROM idempotency.stripe_webhook_events e WHERE e.consumer = v.id)
ORDER BY v.id;

-- what is kept are the bytes that were signed
SELECT count(*) AS kept, bool_and(e.payload = v.payload) AS same
FROM idempotency.stripe_webhook_events e JOIN vectors v ON v.id = e.consumer;
DELETE FROM idempotency.stripe_webhook_events;

--
-- Our own signatures, by another way to the same HMAC
--
CREATE FUNCTION hmac_sha256(key bytea, message bytea) RETURNS bytea LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
	inner_pad bytea := '';
	outer_pad bytea := '';
BEGIN
	IF length(key) > 64 THEN
		key := sha256(key);
	END IF;
	key := key || decode(repeat('00', 64 - length(key)), 'hex');
	FOR i IN 0 .. 63 LOOP
		inner_pad := inner_pad || set_byte('\x00', 0, get_byte(key, i) # 54);
		outer_pad := outer_pad || set_byte('\x00', 0, get_byte(key, i) # 92);
	END LOOP;
	RETURN sha256(outer_pad || sha256(inner_pad || message));
END $$;

CREATE FUNCTION mac(payload bytea, t text, secret text = 'whsec_test') RETURNS text LANGUAGE sql IMMUTABLE
RETURN encode(hmac_sha256(convert_to(secret, 'UTF8'), convert_to(t || '.', 'UTF8') || payload), 'hex');

CREATE FUNCTION word(header text, secrets text[] = '{whsec_test}', tolerance interval = '1000 years')
RETURNS text LANGUAGE sql
RETURN idempotency.stripe_webhook_verify('{}', header, secrets, tolerance);

SELECT format('t=%s,v1=%s', t, mac('{}', t)) AS good, 'v1=' || mac('{}', t) AS v1, t
FROM (VALUES ('1795300000')) v (t) \gset

SELECT word(:'good') AS good;

-- both edges: an age of exactly the tolerance is good, one second more isn't, and
-- a time in the future is, however far
CREATE FUNCTION at_age(age bigint, tolerance interval) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	s bigint;
	answer text;
BEGIN
	-- the clock mustn't tick meanwhile
	FOR i IN 1 .. 1000 LOOP
		s := now_s();
		answer := word(format('t=%s,v1=%s', s - age, mac('{}', (s - age)::text)), tolerance => tolerance);
		IF now_s() = s THEN
			RETURN answer;
		END IF;
	END LOOP;
	RETURN 'the clock ticks all the time';
END $$;

SELECT age, at_age(age, '300 s') FROM (VALUES (0), (1), (299), (300), (301), (302), (-1), (-300), (-301),
	(-1000000000)) v (age);
SELECT age, at_age(age, NULL) AS default FROM (VALUES (300), (301)) v (age);
SELECT age, at_age(age, '1.5 s') AS fractional FROM (VALUES (1), (2)) v (age);
SET idempotency.webhook_tolerance = '1h';
SELECT age, at_age(age, NULL) AS setting FROM (VALUES (3600), (3601)) v (age);
RESET idempotency.webhook_tolerance;
SELECT word(:'good', tolerance => '0');
SELECT word(:'good', tolerance => '-1 s');
-- (from 18 on the message has units)
\set VERBOSITY sqlstate
SET idempotency.webhook_tolerance = 0;
\set VERBOSITY terse

-- a time with as many digits as may be is far in the future
SELECT n, word(format('t=%s,v1=%s', t, mac('{}', t)))
FROM (VALUES (18), (19), (30)) d (n), repeat('9', n) t;

--
-- Grammar
--
SELECT label, word(replace(replace(replace(replace(header, 'T', :'t'), 'GOOD', substr(:'v1', 4)),
	'BAD', repeat('0', 64)), E'\\n', E'\n'))
FROM (VALUES
	(1, 'two signatures, the second matches', 't=T,v1=BAD,v1=GOOD'),
	(2, 'empty elements', ',,t=T,,v1=GOOD,,'),
	(3, 'nothing but empty elements', ',,,'),
	(4, 'no v1', 't=T,v0=GOOD'),
	(5, 'no other scheme stands in for v1', 't=T,v10=GOOD,v=GOOD,V1=GOOD,v1_=GOOD'),
	(6, 'no t', 'v0=GOOD,v1=GOOD'),
	(7, 'an element without =', 't=T,hello,v1=GOOD'),
	(8, 'an element without a scheme', 't=T,=GOOD,v1=GOOD'),
	(9, 'white space before', ' t=T,v1=GOOD'),
	(10, 'white space after', 't=T,v1=GOOD '),
	(11, 'white space around =', 't =T,v1=GOOD'),
	(12, 'white space around =', 't= T,v1=GOOD'),
	(13, 'line end', E't=T,v1=GOOD\\n'),
	(14, 'tabulator', E't=T,\tv1=GOOD'),
	(15, 'semicolon', 't=T;v1=GOOD'),
	(16, 'quotes', 't="T",v1=GOOD'),
	(17, 'sign', 't=+T,v1=GOOD'),
	(18, 'leading zero', 't=0T,v1=GOOD'),
	(19, 'empty t', 't=,v1=GOOD'),
	(20, 'same t twice', 't=T,t=T,v1=GOOD'),
	(21, 'an unknown scheme with any value', 't=T,v2=a=b;c,v1=GOOD'),
	(22, 'something after the signature', 't=T,v1=GOODx'),
	(23, 'something after the signature', 't=T,v1=GOOD=x'),
	(24, 'shorter', 't=T,v1=' || substr(:'v1', 4, 63)),
	(25, 'not ASCII', 't=T,v1=GOOD,v2=' || chr(228)),
	(26, 'not hexadecimal, then good', 't=T,v1=' || repeat('g', 64) || ',v1=GOOD')
) v (n, label, header) ORDER BY n;

-- bounds
SELECT n, word(format('t=%s%s,%s', :'t', repeat(',v1=0', n - 1), :'v1')) FROM (VALUES (32), (33), (200)) v (n);
SELECT length(h), word(h)
FROM (VALUES (4096), (4097), (1000000)) v (n), concat(:'good', ',v2=', repeat('x', n - length(:'good') - 4)) h;

-- no header at all
SELECT word(NULL) AS "null", word('') AS empty;
SELECT idempotency.stripe_webhook_is_valid('{}', NULL, '{whsec_test}') AS "null";
SELECT idempotency.stripe_webhook_verify(NULL, :'good', '{whsec_test}');
SELECT idempotency.stripe_webhook_is_valid(NULL, :'good', '{whsec_test}');

--
-- Secrets
--
SELECT word(:'good', '{whsec_old,whsec_test}') AS second,
	word(:'good', '{whsec_test,whsec_new}') AS first,
	word(:'good', '{whsec_old,whsec_new}') AS neither,
	word(:'good', '{}') AS none,
	word(:'good', NULL) AS not_configured;
-- the whole of it is the key
SELECT word(:'good', '{whsec_tes}') AS shorter, word(:'good', '{whsec_test_}') AS longer, word(:'good', '{test}') AS bare;
-- one that is longer than a block is hashed first
SELECT word(format('t=%s,v1=%s', :'t', mac('{}', :'t', s)), ARRAY[s]) AS long FROM repeat('whsec_', 50) s;
SELECT word(:'good', ARRAY['']);
SELECT word(:'good', ARRAY['whsec_test', NULL]);
SELECT word(:'good', ARRAY['whsec_test', ' whsec_test']);
SELECT word(:'good', ARRAY[E'whsec_test\n']);
SELECT word(:'good', ARRAY['whsec_tëst']);
SELECT word(:'good', array_agg('whsec_' || i)) FROM generate_series(1, 16) i;
SELECT word(:'good', array_agg('whsec_' || i)) FROM generate_series(1, 17) i;

-- a secret isn't in any message: nothing is listed
DO $$
DECLARE
	message text;
	detail text;
	hint text;
	secret text;
BEGIN
	FOREACH secret IN ARRAY ARRAY['whsec_in sight', E'whsec_in\tsight', 'whsec_in_sight'] LOOP
		BEGIN
			PERFORM idempotency.stripe_webhook_receive('{}', 't=1,v1=', ARRAY[secret]);
		EXCEPTION WHEN OTHERS THEN
			GET STACKED DIAGNOSTICS message = MESSAGE_TEXT, detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
			IF concat(message, detail, hint) ~ 'sight' THEN
				RAISE WARNING '% % %', message, detail, hint;
			END IF;
		END;
	END LOOP;
END $$;

--
-- Any body: the signature covers its bytes, whatever they are
--
SELECT label, idempotency.stripe_webhook_verify(p, format('t=%s,v1=%s', :'t', mac(p, :'t')), '{whsec_test}', '1000 years')
FROM (VALUES
	('empty', ''::bytea),
	('zero bytes', '\x000000'),
	('not UTF-8', '\xff00fe'),
	('a block of SHA-256 less t and dot', convert_to(repeat('x', 53), 'UTF8')),
	('a block more', convert_to(repeat('x', 117), 'UTF8')),
	('1 MB', convert_to(repeat('{"a": "b"}', 104858), 'UTF8'))) v (label, p);
-- one bit
SELECT count(*) FILTER (WHERE word = 'no_matching_signature') AS refused, count(*)
FROM generate_series(0, 8 * 100 - 1) bit, LATERAL (SELECT idempotency.stripe_webhook_verify(
		set_bit(p, bit, 1 - get_bit(p, bit)), h, '{whsec_test}', '1000 years') AS word
	FROM (SELECT p, format('t=%s,v1=%s', :'t', mac(p, :'t')) AS h
		FROM (SELECT convert_to(repeat('0123456789', 10), 'UTF8') AS p OFFSET 0) b OFFSET 0) s) w;

-- a file of secrets is named from the root on
SET idempotency.webhook_secret_file = 'secrets';

SET client_min_messages = warning;
DROP SCHEMA webhook_signature CASCADE;
