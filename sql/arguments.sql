--
-- Bad arguments: each is an error that changes nothing, and none is a NULL result
--
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS idempotency;
RESET client_min_messages;
\set SHOW_CONTEXT never

-- runs one statement after the other: SQLSTATE and message, or what it returned
CREATE FUNCTION pg_temp.try(VARIADIC statements text[])
RETURNS TABLE (statement text, state text, message text)
LANGUAGE plpgsql AS $$
DECLARE
	s text;
BEGIN
	FOREACH s IN ARRAY statements LOOP
		-- long arguments are shown short
		statement := regexp_replace(s, '^(.{75}).+$', '\1...');
		BEGIN
			EXECUTE s INTO message;
			state := '00000';
			message := COALESCE(message, 'NULL');
		EXCEPTION WHEN OTHERS THEN
			state := SQLSTATE;
			message := regexp_replace(SQLERRM, '^(.{80}).+$', '\1...');
		END;
		RETURN NEXT;
	END LOOP;
END $$;

SELECT token FROM idempotency.claim('held', 's', lease => '1 hour') \gset
SELECT token AS stripe_token FROM idempotency.stripe_claim('charge', 'held') \gset
CREATE TEMP TABLE before AS
	SELECT to_jsonb(k) AS r FROM idempotency.idempotency_keys k
	UNION ALL
	SELECT to_jsonb(k) FROM idempotency.stripe_idempotency_keys k;

--
-- NULL where a value is needed
--
SELECT * FROM pg_temp.try(
	$$SELECT idempotency.claim(NULL, 's')$$,
	$$SELECT idempotency.claim('k', NULL)$$,
	$$SELECT idempotency.claim('k', 's', wait => NULL)$$,
	$$SELECT idempotency.record(NULL, 's', 1)$$,
	$$SELECT idempotency.record('k', NULL, 1)$$,
	$$SELECT idempotency.record('k', 's', NULL)$$,
	$$SELECT idempotency.record('k', 's', 1, response_status => NULL)$$,
	$$SELECT idempotency.checkpoint(NULL, 's', 1, 'p')$$,
	$$SELECT idempotency.checkpoint('k', NULL, 1, 'p')$$,
	$$SELECT idempotency.checkpoint('k', 's', NULL, 'p')$$,
	$$SELECT idempotency.checkpoint('k', 's', 1, NULL)$$,
	$$SELECT idempotency.extend(NULL, 's', 1)$$,
	$$SELECT idempotency.extend('k', NULL, 1)$$,
	$$SELECT idempotency.extend('k', 's', NULL)$$,
	$$SELECT idempotency.release(NULL, 's', 1)$$,
	$$SELECT idempotency.release('k', NULL, 1)$$,
	$$SELECT idempotency.release('k', 's', NULL)$$,
	$$SELECT idempotency.lookup(NULL, 's')$$,
	$$SELECT idempotency.lookup('k', NULL)$$,
	$$SELECT idempotency.operation_uuid(NULL, 's')$$,
	$$SELECT idempotency.operation_uuid('k', NULL)$$);
SELECT * FROM pg_temp.try(
	$$SELECT idempotency.stripe_idempotency_key(NULL, 'i')$$,
	$$SELECT idempotency.stripe_idempotency_key('t', NULL)$$,
	$$SELECT idempotency.stripe_idempotency_key('t', 'i', NULL)$$,
	$$SELECT idempotency.stripe_claim(NULL, 'i')$$,
	$$SELECT idempotency.stripe_claim('t', NULL)$$,
	$$SELECT idempotency.stripe_claim('t', 'i', account => NULL)$$,
	$$SELECT idempotency.stripe_record(NULL, 'i', 1)$$,
	$$SELECT idempotency.stripe_record('t', NULL, 1)$$,
	$$SELECT idempotency.stripe_record('t', 'i', NULL)$$,
	$$SELECT idempotency.stripe_record('t', 'i', 1, account => NULL)$$,
	$$SELECT idempotency.stripe_release(NULL, 'i', 1)$$,
	$$SELECT idempotency.stripe_release('t', NULL, 1)$$,
	$$SELECT idempotency.stripe_release('t', 'i', NULL)$$,
	$$SELECT idempotency.stripe_release('t', 'i', 1, NULL)$$,
	$$SELECT idempotency.stripe_extend(NULL, 'i', 1)$$,
	$$SELECT idempotency.stripe_extend('t', NULL, 1)$$,
	$$SELECT idempotency.stripe_extend('t', 'i', NULL)$$,
	$$SELECT idempotency.stripe_extend('t', 'i', 1, account => NULL)$$,
	$$SELECT idempotency.stripe_reopen(NULL, 'i')$$,
	$$SELECT idempotency.stripe_reopen('t', NULL)$$,
	$$SELECT idempotency.stripe_reopen('t', 'i', NULL)$$,
	$$SELECT idempotency.stripe_reopen('t', 'i', force => NULL)$$,
	$$SELECT idempotency.stripe_lookup(NULL, 'i')$$,
	$$SELECT idempotency.stripe_lookup('t', NULL)$$,
	$$SELECT idempotency.stripe_lookup('t', 'i', NULL)$$,
	$$SELECT idempotency.stripe_namespace(NULL)$$,
	$$SELECT idempotency.grant_role(NULL, 'application')$$,
	$$SELECT idempotency.grant_role(current_user::regrole, NULL)$$);

--
-- Keys: 1 to 255 characters, not bytes, none of them a control character
--
CREATE FUNCTION pg_temp.try_key(VARIADIC keys text[])
RETURNS TABLE (key text, state text, message text)
LANGUAGE sql AS $$
	SELECT CASE WHEN length(k) > 10 THEN repeat(left(k, 1), 3) || '... ' || length(k)
		WHEN k ~ '[\u0001-\u001F\u007F-\u00A0\u2028]' THEN encode(convert_to(k, 'UTF8'), 'hex')
		ELSE quote_literal(k) END,
		t.state, CASE WHEN t.state = '00000' THEN '' ELSE t.message END
	FROM unnest(keys) k,
		LATERAL pg_temp.try(format('SELECT idempotency.claim(%L, ''s'', lease => ''1 hour'')', k)) t
$$;
SELECT * FROM pg_temp.try_key('', 'x', ' ', repeat('x', 255), repeat('x', 256), repeat('x', 1000000),
	repeat('ü', 255), repeat('ü', 256), repeat('注', 255), repeat('注', 256), repeat('😀', 255), repeat('😀', 256),
	'"quoted"', '''', '\', '%', E'a\u00A0b', E'\u2028', '注文-1');
SELECT * FROM pg_temp.try_key(E'\n', E'a\r\nb', E'\t', E'x\x01', E'\x1F', E'\x7F', E'a\u0080', E'\u0085b', E'\u009F');
-- every function takes the same keys and scopes
SELECT t.state, t.message, count(*)
FROM unnest(ARRAY['', repeat('x', 256), E'\x07', E'\u0085']) k,
	LATERAL pg_temp.try(
		format('SELECT idempotency.claim(%L, ''s'')', k),
		format('SELECT idempotency.record(%L, ''s'', 1)', k),
		format('SELECT idempotency.checkpoint(%L, ''s'', 1, ''p'')', k),
		format('SELECT idempotency.extend(%L, ''s'', 1)', k),
		format('SELECT idempotency.release(%L, ''s'', 1)', k),
		format('SELECT idempotency.lookup(%L, ''s'')', k),
		format('SELECT idempotency.operation_uuid(%L, ''s'')', k)) t
GROUP BY 1, 2 ORDER BY 1, 2;
SELECT t.state, t.message, count(*)
FROM unnest(ARRAY[repeat('x', 256), repeat('注', 256), E'\x07', E'\u0085']) s,
	LATERAL pg_temp.try(
		format('SELECT idempotency.claim(''k'', %L)', s),
		format('SELECT idempotency.record(''k'', %L, 1)', s),
		format('SELECT idempotency.checkpoint(''k'', %L, 1, ''p'')', s),
		format('SELECT idempotency.extend(''k'', %L, 1)', s),
		format('SELECT idempotency.release(''k'', %L, 1)', s),
		format('SELECT idempotency.lookup(''k'', %L)', s),
		format('SELECT idempotency.operation_uuid(''k'', %L)', s)) t
GROUP BY 1, 2 ORDER BY 1, 2;
-- the longest of both, the emptiest scope
SELECT verdict FROM idempotency.claim(repeat('😀', 255), repeat('😀', 255), lease => '1 hour');
SELECT verdict FROM idempotency.claim(repeat('😀', 255), repeat('😀', 255), lease => '1 hour');
SELECT verdict FROM idempotency.claim('k', '', lease => '1 hour');
SELECT status FROM idempotency.lookup('k', '');

--
-- Lengths of time
--
SELECT * FROM pg_temp.try(
	$$SELECT idempotency.claim('k', 's', lease => '0')$$,
	$$SELECT idempotency.claim('k', 's', lease => '-1 second')$$,
	$$SELECT idempotency.claim('k', 's', lease => '1 day -24 hours')$$,
	$$SELECT idempotency.claim('k', 's', lease => '1 month -31 days')$$,
	$$SELECT idempotency.claim('k', 's', lease => '1014 years')$$,
	$$SELECT idempotency.claim('k', 's', lease => '178000000 years')$$,
	$$SELECT idempotency.claim('k', 's', lease => '-178000000 years')$$,
	$$SELECT idempotency.claim('k', 's', lease => make_interval(days => 2147483647, hours => 2147483647))$$,
	$$SELECT idempotency.claim('k', 's', lease => make_interval(days => -2147483648))$$,
	$$SELECT idempotency.claim('k', 's', ttl => '0')$$,
	$$SELECT idempotency.claim('k', 's', ttl => '-1 day')$$,
	$$SELECT idempotency.claim('k', 's', ttl => '1014 years')$$,
	$$SELECT idempotency.record('held', 's', 1, ttl => '0')$$,
	$$SELECT idempotency.record('held', 's', 1, ttl => '-1 second')$$,
	$$SELECT idempotency.record('held', 's', 1, ttl => '1014 years')$$,
	$$SELECT idempotency.checkpoint('held', 's', 1, 'p', lease => '0')$$,
	$$SELECT idempotency.checkpoint('held', 's', 1, 'p', lease => '1014 years')$$,
	$$SELECT idempotency.extend('held', 's', 1, '0')$$,
	$$SELECT idempotency.extend('held', 's', 1, '-1 microsecond')$$,
	$$SELECT idempotency.extend('held', 's', 1, '1014 years')$$,
	$$SELECT idempotency.stripe_claim('charge', 'i', lease => '0')$$,
	$$SELECT idempotency.stripe_claim('charge', 'i', lease => '1014 years')$$,
	$$SELECT idempotency.stripe_extend('charge', 'held', 1, '-1 day')$$,
	$$SELECT idempotency.stripe_extend('charge', 'held', 1, '1014 years')$$);
-- infinite ones, where there are any
DO $$
DECLARE
	v text;
	s text;
BEGIN
	IF current_setting('server_version_num')::int >= 170000 THEN
		FOREACH v IN ARRAY ARRAY['infinity', '-infinity'] LOOP
			FOREACH s IN ARRAY ARRAY['idempotency.claim(''k'', ''s'', lease => %L)',
				'idempotency.claim(''k'', ''s'', ttl => %L)',
				'idempotency.record(''held'', ''s'', 1, ttl => %L)',
				'idempotency.checkpoint(''held'', ''s'', 1, ''p'', lease => %L)',
				'idempotency.extend(''held'', ''s'', 1, %L)',
				'idempotency.stripe_claim(''charge'', ''i'', lease => %L)',
				'idempotency.stripe_extend(''charge'', ''held'', 1, %L)'] LOOP
				BEGIN
					EXECUTE 'SELECT ' || format(s, v);
					RAISE WARNING '% was accepted', format(s, v);
				EXCEPTION WHEN SQLSTATE 'IK003' THEN
				END;
			END LOOP;
		END LOOP;
	END IF;
END $$;

--
-- What is recorded
--
SELECT * FROM pg_temp.try(
	$$SELECT idempotency.record('held', 's', 1, response_status => 0)$$,
	$$SELECT idempotency.record('held', 's', 1, response_status => 99)$$,
	$$SELECT idempotency.record('held', 's', 1, response_status => 600)$$,
	$$SELECT idempotency.record('held', 's', 1, response_status => -200)$$,
	$$SELECT idempotency.record('held', 's', 1, response_status => 2147483647)$$,
	$$SELECT idempotency.record('held', 's', 1, response_headers => '[]')$$,
	$$SELECT idempotency.record('held', 's', 1, response_headers => '"Content-Type: text/plain"')$$,
	$$SELECT idempotency.record('held', 's', 1, response_headers => 'null')$$,
	$$SELECT idempotency.record('held', 's', 1, response_headers => '[{"a": "b"}]')$$,
	$$SELECT idempotency.checkpoint('held', 's', 1, '')$$,
	$$SELECT idempotency.checkpoint('held', 's', 1, repeat('x', 256))$$,
	$$SELECT idempotency.checkpoint('held', 's', 1, E'a\nb')$$,
	$$SELECT idempotency.stripe_record('charge', 'held', 1, http_status => 0)$$,
	$$SELECT idempotency.stripe_record('charge', 'held', 1, http_status => 99)$$,
	$$SELECT idempotency.stripe_record('charge', 'held', 1, http_status => 600)$$,
	$$SELECT idempotency.stripe_record('charge', 'held', 1, '')$$,
	$$SELECT idempotency.stripe_record('charge', 'held', 1, repeat('x', 256))$$,
	$$SELECT idempotency.stripe_record('charge', 'held', 1, E'pi_1\r\nX: y')$$,
	$$SELECT idempotency.stripe_record('charge', 'held', 1, request_id => '')$$,
	$$SELECT idempotency.stripe_record('charge', 'held', 1, request_id => E'req_1\n')$$,
	$$SELECT idempotency.stripe_reopen('charge', 'held', from_generation => 0)$$,
	$$SELECT idempotency.stripe_reopen('charge', 'held', from_generation => -1)$$,
	$$SELECT idempotency.stripe_namespace('')$$,
	$$SELECT idempotency.stripe_namespace('Keep')$$,
	$$SELECT idempotency.grant_role('-', 'application')$$,
	$$SELECT idempotency.grant_role(current_user::regrole, 'Application')$$,
	$$SELECT idempotency.grant_role(current_user::regrole, '')$$);

--
-- Where an object is meant, nothing else is taken; text that a driver has made
-- JSON of once more is JSON, but no object
--
CREATE FUNCTION pg_temp.refused(statement text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
	d text;
	h text;
BEGIN
	EXECUTE statement;
	RETURN 'taken';
EXCEPTION WHEN OTHERS THEN
	GET STACKED DIAGNOSTICS d = PG_EXCEPTION_DETAIL, h = PG_EXCEPTION_HINT;
	RETURN concat_ws(' | ', SQLSTATE, SQLERRM, nullif(d, ''), nullif(h, ''));
END $$;
SELECT pg_temp.refused(format('SELECT idempotency.stripe_claim(''charge'', ''object'', %L)', value))
FROM unnest(ARRAY['"{\"method\": \"POST\"}"', '[{"method": "POST"}]', '17', 'true', 'null', '[]', '""']) value;
SELECT DISTINCT pg_temp.refused(format(statement, '"{}"'))
FROM unnest(ARRAY[
	'SELECT idempotency.stripe_claim(''charge'', ''object'', %L)',
	'SELECT idempotency.stripe_record(''charge'', ''held'', 1, response => %L)',
	'SELECT idempotency.stripe_record(''charge'', ''held'', 1, response => %L, http_status => 200)',
	'SELECT idempotency.stripe_record(''charge'', ''held'', 1, response => %L, resource_id => ''ch_1'')',
	'SELECT idempotency.stripe_call(''charge'', ''object'', ''POST'', ''/v1/charges'', %L)',
	'SELECT idempotency.stripe_get(''/v1/charges'', %L)',
	'SELECT idempotency.record(''held'', ''s'', 1, response_headers => %L)']) statement ORDER BY 1;
SELECT pg_temp.refused(format('SELECT idempotency.stripe_record(''charge'', ''held'', 1, response => %L)', value))
FROM unnest(ARRAY['"text"', '[1, 2]', '17.5', 'false', 'null']) value;
-- nothing was changed
SELECT outcome, response FROM idempotency.stripe_lookup('charge', 'held');
SELECT idempotency.stripe_lookup('charge', 'object') IS NULL AS absent;

--
-- Operations: printable ASCII, 217 characters together
--
CREATE FUNCTION pg_temp.try_operation(t text, i text, a text DEFAULT '') RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
	d text;
BEGIN
	RETURN regexp_replace(idempotency.stripe_idempotency_key(t, i, a),
		'[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$', 'UUID');
EXCEPTION WHEN OTHERS THEN
	GET STACKED DIAGNOSTICS d = PG_EXCEPTION_DETAIL;
	RETURN concat_ws(' ', SQLSTATE, SQLERRM || '.', NULLIF(d, ''));
END $$;
SELECT pg_temp.try_operation(t, i, a)
FROM (VALUES
	('payment', 'order_1001', ''), ('refund:partial', 'order_1001', 'acct_1'), ('a', ' ~!"#$%&''()*+,-./:;<=>?@[\]^_`{|} ', ''),
	('', 'i', ''), ('t', '', ''), (' t', 'i', ''), ('t ', 'i', ''),
	('zahlung', 'ü', ''), ('ü', 'i', ''), ('t', '注文', ''), ('t', E'a\tb', ''), ('t', E'a\nb', ''), (E't\x7F', 'i', ''),
	('t', 'i', 'acct 1'), ('t', 'i', ' '), ('t', 'i', 'Zürich'), ('t', 'i', E'acct_1\r\n'), ('t', 'i', repeat('a', 256))
) o (t, i, a);
SELECT length(t) AS type, length(i) AS id, length(a) AS account,
	length(replace(k, 'UUID', repeat('0', 36))) AS length, left(k, 5)
FROM (VALUES (1, 216, 0), (216, 1, 0), (100, 117, 255)) n (nt, ni, na),
	LATERAL (SELECT repeat('t', nt), repeat('i', ni), repeat('a', na)) o (t, i, a),
	LATERAL pg_temp.try_operation(t, i, a) k;
SELECT pg_temp.try_operation(repeat('t', 1), repeat('i', 217));
SELECT pg_temp.try_operation(repeat('t', 217), repeat('i', 1));
SELECT pg_temp.try_operation(repeat('t', 100000), repeat('i', 100000));
-- every function takes the same operations and accounts
SELECT left(o::text, 20) AS operation, t.state, count(*)
FROM (VALUES ('', 'i', ''), ('t', 'ü', ''), ('t', repeat('x', 217), ''), ('t', 'i', 'a b')) o (t, i, a),
	LATERAL pg_temp.try(
		format('SELECT idempotency.stripe_idempotency_key(%L, %L, %L)', o.t, i, a),
		format('SELECT idempotency.stripe_claim(%L, %L, account => %L)', o.t, i, a),
		format('SELECT idempotency.stripe_record(%L, %L, 1, account => %L)', o.t, i, a),
		format('SELECT idempotency.stripe_release(%L, %L, 1, %L)', o.t, i, a),
		format('SELECT idempotency.stripe_extend(%L, %L, 1, account => %L)', o.t, i, a),
		format('SELECT idempotency.stripe_reopen(%L, %L, %L)', o.t, i, a),
		format('SELECT idempotency.stripe_lookup(%L, %L, %L)', o.t, i, a)) t
GROUP BY 1, 2 ORDER BY 1, 2;

-- nothing of all that changed anything
SELECT count(*) FROM before
WHERE r IN (SELECT to_jsonb(k) FROM idempotency.idempotency_keys k)
	OR r IN (SELECT to_jsonb(k) FROM idempotency.stripe_idempotency_keys k);
SELECT idempotency.release('held', 's', :token);
SELECT idempotency.stripe_release('charge', 'held', :stripe_token);

--
-- Settings have ranges of their own
--
\set VERBOSITY sqlstate
SET idempotency.key_ttl = 0;
SET idempotency.key_ttl = '-1 s';
SET idempotency.key_ttl = 'forever';
SET idempotency.stripe_lease = 0;
SET idempotency.wait_timeout = -2;
SET idempotency.wait_timeout = '1 hour';
SHOW idempotency.wait_timeout;
SET idempotency.max_response_size = 0;
SET idempotency.max_response_size = '513MB';
SET idempotency.max_response_size = '512MB';
SET idempotency.open_claim_at_commit = 'ignore';
SET idempotency.open_claim_at_commit = 'Warning';
SET idempotency.stripe_resend_margin = '59s';
SET idempotency.stripe_resend_margin = '25h';
SET idempotency.stripe_ledger = 'nobody';
SET idempotency.stripe_compare_ignore = 'a,,b';
SET idempotency.stripe_compare_ignore = 'metadata, "with a space"';
SHOW idempotency.stripe_compare_ignore;
SET idempotency.stripe_compare_ignore = '';
SELECT idempotency.stripe_idempotency_key('t', 'i') IS NOT NULL AS still_works;
-- some only for superusers
CREATE ROLE regress_idempotency_nobody;
SET ROLE regress_idempotency_nobody;
SET idempotency.max_response_size = '1MB';
SET idempotency.stripe_resend_margin = '1h';
SET idempotency.stripe_compare_ignore = '';
SET idempotency.key_ttl = '1 h';
RESET ROLE;
DROP ROLE regress_idempotency_nobody;
\c -
\set VERBOSITY default

--
-- The whole look of each message
--
SET client_min_messages = error;
\set SHOW_CONTEXT never
SELECT idempotency.claim(NULL, 's');
SELECT idempotency.claim('', 's');
SELECT idempotency.claim(repeat('x', 256), 's');
SELECT idempotency.claim(E'a\nb', 's');
SELECT idempotency.claim('k', 's', lease => '0');
SELECT idempotency.claim('k', 's', ttl => '1014 years');
SELECT idempotency.record('k', 's', 1, response_status => 42);
SELECT idempotency.record('k', 's', 1, response_headers => '[]');
SELECT idempotency.stripe_claim('t', 'ü');
SELECT idempotency.stripe_claim('t', 'i', account => 'a b');
SELECT idempotency.stripe_reopen('t', 'i', from_generation => 0);
SELECT idempotency.stripe_reopen('t', 'never claimed');
SELECT idempotency.stripe_namespace('old');
SELECT idempotency.grant_role(current_user::regrole, 'admin');
SELECT idempotency.grant_role('-', 'application');

DELETE FROM idempotency.idempotency_keys;
DELETE FROM idempotency.stripe_idempotency_keys;
