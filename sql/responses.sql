--
-- What is recorded is replayed: jsonb equal, bytes byte for byte
--
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS idempotency;
RESET client_min_messages;
\set SHOW_CONTEXT never

-- claims, records and claims again: is the replay what was recorded?
CREATE FUNCTION pg_temp.replayed(response jsonb DEFAULT NULL, status int DEFAULT 200, headers jsonb DEFAULT NULL,
	body bytea DEFAULT NULL) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
	c idempotency.claim_result;
	k text := 'key ' || (SELECT count(*) FROM idempotency.idempotency_keys);
BEGIN
	c := idempotency.claim(k, 's');
	PERFORM idempotency.record(k, 's', c.token, response, status, headers, body);
	c := idempotency.claim(k, 's');
	RETURN c.verdict = 'replay' AND c.http_status = status
		AND c.response IS NOT DISTINCT FROM response
		-- equal isn't enough: 1.0 stays 1.0
		AND c.response::text IS NOT DISTINCT FROM response::text
		AND c.response_headers IS NOT DISTINCT FROM headers
		AND c.response_headers::text IS NOT DISTINCT FROM headers::text
		AND c.response_body IS NOT DISTINCT FROM body
		-- lookup shows the same
		AND (c.http_status, c.response, c.response_headers, c.response_body)
			IS NOT DISTINCT FROM (SELECT (l.http_status, l.response, l.response_headers, l.response_body)
				FROM idempotency.lookup(k, 's') l);
END $$;

-- jsonb of all kinds
SELECT r, pg_temp.replayed(r)
FROM unnest(ARRAY[NULL, 'null', 'true', 'false', '0', '-0', '1.0', '1.00', '1e3', '-1.5e-7', '""', '" "', '"\n\t\u0001"',
	'"注文 😀"', '[]', '{}', '[[]]', '{"": null}', '[null, "x", 1, {"a": [true]}]',
	'{"order": 1, "items": [{"sku": "a", "n": 2}], "total": 19.90}']::jsonb[]) r;
-- nested deeply, and with many members
SELECT pg_temp.replayed((repeat('[', 1000) || repeat(']', 1000))::jsonb);
SELECT pg_temp.replayed(jsonb_object_agg('name ' || i, i)) FROM generate_series(1, 5000) i;

-- every status, failures too
SELECT bool_and(pg_temp.replayed(to_jsonb(i), i)), count(*) FROM generate_series(100, 599) i;
SELECT status, count(*), min(http_status), max(http_status)
FROM idempotency.idempotency_keys k, LATERAL (SELECT status FROM idempotency.lookup(k.key, k.scope)) l
GROUP BY 1 ORDER BY 1;

-- headers and media types
SELECT h, pg_temp.replayed(NULL, 200, h, '\x00')
FROM unnest(ARRAY['{}', '{"Content-Type": "application/pdf"}', '{"Content-Type": "text/html; charset=iso-8859-1", "ETag": "\"1\""}',
	'{"Set-Cookie": ["a=1", "b=2"]}', '{"X-Null": null, "x-number": 1}']::jsonb[]) h;

-- bytes: none, each of the 256, all of them, no valid text, an image, everything together
SELECT pg_temp.replayed(body => '');
SELECT bool_and(pg_temp.replayed(body => set_byte('\x00', 0, i))), count(*) FROM generate_series(0, 255) i;
SELECT pg_temp.replayed(body => (SELECT string_agg(set_byte('\x00', 0, i), '' ORDER BY i) FROM generate_series(0, 255) i));
SELECT pg_temp.replayed(body => '\xc328fffe00');
SELECT pg_temp.replayed('{"a": 1}', 201, '{"Content-Type": "image/png"}', '\x89504e470d0a1a0a');
SELECT response_body FROM idempotency.claim(
	(SELECT key FROM idempotency.idempotency_keys WHERE response_headers = '{"Content-Type": "image/png"}'), 's');
-- an empty body isn't a missing one
SELECT k.response_body IS NULL AS recorded, c.body IS NULL AS replayed, count(*)
FROM idempotency.idempotency_keys k, LATERAL (SELECT response_body FROM idempotency.claim(k.key, k.scope)) c (body)
WHERE k.response_headers IS NULL AND length(k.response_body) = 0 OR k.http_status = 404
GROUP BY 1, 2 ORDER BY 1, 2;

DELETE FROM idempotency.idempotency_keys;

--
-- Large ones: compressed, out of line, up to max_response_size
--
-- no two 32-byte stretches of it are alike
CREATE FUNCTION pg_temp.noise(n int) RETURNS bytea
LANGUAGE sql AS $$
	SELECT substr(string_agg(sha256(i::text::bytea), '' ORDER BY i), 1, n) FROM generate_series(0, n / 32) i
$$;
SELECT n, pg_temp.replayed(body => pg_temp.noise(n)) AS noise, pg_temp.replayed(body => decode(repeat('ab', n), 'hex')) AS even
FROM unnest(ARRAY[1, 126, 127, 128, 1990, 2048, 8192, 100000, 1024 * 1024 - 1, 1024 * 1024]) n;
SELECT pg_temp.replayed(to_jsonb(encode(pg_temp.noise(700000), 'base64')));
SELECT pg_temp.replayed(to_jsonb(repeat('x', 300000)), 200, jsonb_build_object('X', repeat('y', 300000)), pg_temp.noise(300000));
-- claimed again from a stored value, and compared with one: the same result may be recorded again
CREATE TEMP TABLE stored AS
	SELECT to_jsonb(encode(pg_temp.noise(300000), 'hex')) AS response, pg_temp.noise(300000) AS body;
SELECT token FROM idempotency.claim('stored', 's', lease => '1 hour') \gset
SELECT idempotency.record('stored', 's', :token, response, 200, NULL, body) AS expires FROM stored \gset
SELECT idempotency.record('stored', 's', :token, response, 200, NULL, body) = :'expires' AS same FROM stored;
SELECT idempotency.record('stored', 's', :token, response, 200, NULL, body || '\x00') FROM stored;
SELECT c.response = s.response AND c.response_body = s.body AS equal
FROM stored s, idempotency.claim('stored', 's') c;
-- other columns change, the row moves, the values stay
UPDATE idempotency.idempotency_keys SET expires_at = expires_at + interval '1 day' WHERE key = 'stored';
VACUUM idempotency.idempotency_keys;
SELECT c.response = s.response AND c.response_body = s.body AS equal
FROM stored s, idempotency.claim('stored', 's') c;
-- a checkpoint's data, too
SELECT token FROM idempotency.claim('recovered', 's', lease => '1 hour') \gset
SELECT idempotency.checkpoint('recovered', 's', :token, 'p', response) IS NOT NULL AS kept FROM stored;
SELECT idempotency.extend('recovered', 's', :token) IS NOT NULL AS extended;
UPDATE idempotency.idempotency_keys SET lease_expires_at = now() - interval '1 second' WHERE key = 'recovered';
SELECT c.verdict, c.recovery_data = s.response AS equal FROM stored s, idempotency.claim('recovered', 's', lease => '1 hour') c;
-- answers of many keys in one statement don't share memory
SELECT count(*), count(DISTINCT c.response_body), sum(length(c.response_body))
FROM idempotency.idempotency_keys k, LATERAL idempotency.claim(k.key, k.scope) c
WHERE k.key LIKE 'key %';
-- a large request is only remembered by its fingerprint
SELECT verdict FROM idempotency.claim('large', 's', to_jsonb(repeat('x', 10000000)), lease => '1 hour');
SELECT verdict FROM idempotency.claim('large', 's', to_jsonb(repeat('x', 10000000)));
SELECT verdict FROM idempotency.claim('large', 's', to_jsonb(repeat('x', 10000000) || 'y'));
SELECT pg_column_size(k.*) < 500 AS small FROM idempotency.idempotency_keys k WHERE key = 'large';

--
-- Too large: IK007, and nothing changes
--
SELECT token FROM idempotency.claim('too large', 's', lease => '1 hour') \gset
SELECT xmin AS before FROM idempotency.idempotency_keys WHERE key = 'too large' \gset
SELECT idempotency.record('too large', 's', :token, response_body => pg_temp.noise(1024 * 1024 + 1));
SELECT idempotency.record('too large', 's', :token, response_body => decode(repeat('00', 1024 * 1024 + 1), 'hex'));
-- all together count
SELECT idempotency.record('too large', 's', :token, to_jsonb(repeat('x', 400000)), 200, jsonb_build_object('X', repeat('y', 400000)),
	pg_temp.noise(400000));
-- so does a value that is stored compressed
\set VERBOSITY sqlstate
CREATE TEMP TABLE compressed AS SELECT to_jsonb(repeat('x', 1024 * 1024)) AS response;
SELECT idempotency.record('too large', 's', :token, response) FROM compressed;
SELECT idempotency.checkpoint('too large', 's', :token, 'p', response) FROM compressed;
SELECT idempotency.stripe_claim('charge', 'too large', response) FROM compressed;
SELECT xmin = :'before' AS unchanged FROM idempotency.idempotency_keys WHERE key = 'too large';
SELECT idempotency.stripe_lookup('charge', 'too large') IS NULL AS absent;
SELECT token AS stripe_token FROM idempotency.stripe_claim('charge', 'too large') \gset
SELECT idempotency.stripe_record('charge', 'too large', :stripe_token, response => response) FROM compressed;
SELECT outcome FROM idempotency.stripe_lookup('charge', 'too large');
\set VERBOSITY default
-- the setting
SET idempotency.max_response_size = '1kB';
SELECT idempotency.record('too large', 's', :token, response_body => pg_temp.noise(1025));
SELECT idempotency.record('too large', 's', :token, response_body => pg_temp.noise(1024)) IS NOT NULL AS recorded;
-- what is recorded is replayed all the same
SELECT length(response_body) FROM idempotency.claim('stored', 's');
RESET idempotency.max_response_size;
BEGIN;
SET LOCAL idempotency.max_response_size = '20MB';
SELECT pg_temp.replayed(body => pg_temp.noise(5000000)), pg_temp.replayed(body => decode(repeat('00', 20 * 1024 * 1024), 'hex'));
ROLLBACK;

DELETE FROM idempotency.idempotency_keys;
DELETE FROM idempotency.stripe_idempotency_keys;
