--
-- Whose answer is it?  Something on the way to Stripe may answer in its place,
-- after Stripe has charged.
--
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS idempotency;
RESET client_min_messages;
\set SHOW_CONTEXT never
SET idempotency.stripe_ledger = 'transaction';

-- claims an operation and records an answer to it
CREATE FUNCTION answer(id text, status int, body jsonb DEFAULT NULL, method text DEFAULT 'POST',
	path text DEFAULT '/v1/refunds', resource text DEFAULT NULL) RETURNS idempotency.outcome
LANGUAGE sql AS $$
	SELECT idempotency.stripe_record('answers', id, c.token, resource, body, status)
	FROM idempotency.stripe_claim('answers', id, jsonb_build_object('method', method, 'path', path)) c
$$;
CREATE VIEW listed AS
SELECT operation_id, reason, http_status, resource_id, substring(next_step, 'idempotency\.(\w+)') AS next_step
FROM idempotency.stripe_unknown;

--
-- A gateway's refusal: nobody knows, and everything that is for the unknown is
-- for it
--
SELECT answer('gateway', 404, '{"id": "route_1", "object": "route", "message": "not found"}');
SELECT * FROM listed;
SELECT response, error, resource_type, livemode FROM idempotency.stripe_lookup('answers', 'gateway');
-- no new key
SELECT idempotency.stripe_reopen('answers', 'gateway');
-- the same key, as often as it takes
SELECT idempotency_key AS key FROM idempotency.stripe_lookup('answers', 'gateway') \gset
SELECT token, verdict, idempotency_key = :'key' AS same_key FROM idempotency.stripe_claim('answers', 'gateway') \gset
\echo :verdict :same_key
SELECT idempotency.stripe_record('answers', 'gateway', :token, http_status => 403);
SELECT token FROM idempotency.stripe_claim('answers', 'gateway') \gset
SELECT idempotency.stripe_record('answers', 'gateway', :token, http_status => 429,
	response => '{"error": {"type": "invalid_request_error", "code": "rate_limit"}}');
SELECT * FROM listed;
SELECT token FROM idempotency.stripe_claim('answers', 'gateway') \gset
SELECT idempotency.stripe_record('answers', 'gateway', :token, http_status => 200,
	response => '{"id": "re_1", "object": "refund", "livemode": false}');
SELECT outcome, resource_id, resource_type FROM idempotency.stripe_lookup('answers', 'gateway');
-- a late attempt's answer doesn't contradict it
SELECT idempotency.stripe_record('answers', 'gateway', :token, http_status => 404);

-- a person settles it, and what the gateway said isn't handed out as Stripe's object
SELECT answer('settled', 503, '{"id": "route_1", "object": "route"}');
SELECT idempotency.stripe_settle('answers', 'settled', 'completed', note => 'seen in the Dashboard');
SELECT verdict, outcome, resource_id, http_status, response, error FROM idempotency.stripe_claim('answers', 'settled');

-- a failure of Stripe's comes again with the same key, a gateway's may not
SELECT answer('stripe 500', 500, '{"error": {"type": "api_error"}}'), answer('gateway 500', 500, '{"error": "upstream"}');
SELECT * FROM listed;
SELECT operation_id, verdict FROM unnest('{stripe 500,gateway 500}'::text[]) operation_id,
	LATERAL idempotency.stripe_claim('answers', operation_id);

--
-- A DELETE may be answered with nothing; and that nothing is there is what was
-- wanted, where an attempt before may have deleted it
--
CREATE FUNCTION again(id text, status int, body jsonb DEFAULT NULL) RETURNS idempotency.outcome
LANGUAGE sql AS $$
	SELECT idempotency.stripe_record('answers', id, c.token, http_status => status, response => body)
	FROM idempotency.stripe_claim('answers', id) c
$$;
SELECT path, method, answer(concat('nothing ', method, path), 204, NULL, method, path)
FROM (VALUES ('/v1/customers/cus_1'), ('/v2/core/accounts/acct_1'), (NULL)) p (path), unnest('{POST,DELETE,delete,NULL}'::text[]) method
ORDER BY path, method;
SELECT path, method, first, answer(method || path || first, first, CASE WHEN first = 429 THEN '{"error": {"type": "invalid_request_error"}}'::jsonb END,
		method, path),
	again(method || path || first, 404, '{"error": {"type": "invalid_request_error", "code": "resource_missing"}}')
FROM (VALUES ('/v1/customers/cus_1'), ('/v2/core/accounts/acct_1')) p (path), unnest('{POST,DELETE}'::text[]) method,
	unnest('{503,429}'::int[]) first
ORDER BY path, method, first;
-- not by somebody else's word; a refusal for another reason may follow from what that
-- attempt has done, but not where there is a key, which Stripe would have answered by
SELECT answer('gone', 503, NULL, 'DELETE', '/v1/customers/cus_1'), again('gone', 404, '{"error": "resource_missing"}'), again('gone', 404);
SELECT again('gone', 404, '{"error": {"type": "invalid_request_error", "code": "no_such_path"}}');
SELECT verdict, outcome FROM idempotency.stripe_claim('answers', 'gone');
SELECT method, path, first, answer('again ' || method || path || first, first,
		CASE WHEN first = 429 THEN '{"error": {"type": "invalid_request_error"}}'::jsonb END, method, path),
	again('again ' || method || path || first, 400, '{"error": {"type": "invalid_request_error"}}')
FROM (VALUES ('/v1/customers/cus_1'), ('/v2/core/accounts/acct_1')) p (path), unnest('{POST,DELETE}'::text[]) method,
	unnest('{503,429}'::int[]) first
ORDER BY path, method, first;
-- of a DELETE whose path nobody has told
SELECT answer('no path', 503, NULL, 'DELETE', NULL), again('no path', 400, '{"error": {"type": "invalid_request_error"}}');
SELECT answer('no path, at first', 400, '{"error": {"type": "invalid_request_error"}}', 'DELETE', NULL);
-- an attempt that was overtaken may have been refused for what the other one has done
SELECT token AS first FROM idempotency.stripe_claim('answers', 'overtaken', '{"method": "DELETE", "path": "/v1/customers/cus_1"}') \gset
UPDATE idempotency.stripe_idempotency_keys SET lease_expires_at = clock_timestamp() WHERE operation_id = 'overtaken';
SELECT verdict FROM idempotency.stripe_claim('answers', 'overtaken');
SELECT idempotency.stripe_record('answers', 'overtaken', :first, http_status => 404,
	response => '{"error": {"type": "invalid_request_error", "code": "resource_missing"}}');
-- who has found out speaks for all attempts
SELECT idempotency.stripe_settle('answers', 'gone', 'failed', response => '{"error": {"type": "invalid_request_error", "code": "no_such_path"}}');
SELECT verdict, outcome, error ->> 'code' AS code FROM idempotency.stripe_claim('answers', 'gone');

--
-- A gateway has error codes, too, and types: those of API v1 are a short list,
-- those of v2 aren't
--
SELECT body, path, answer(concat('400', body, path), 400, body, path => path) AS "400", answer(concat('401', body, path), 401, body, path => path) AS "401",
	answer(concat('402', body, path), 402, body, path => path) AS "402", answer(concat('403', body, path), 403, body, path => path) AS "403",
	answer(concat('404', body, path), 404, body, path => path) AS "404", answer(concat('409', body, path), 409, body, path => path) AS "409",
	answer(concat('429', body, path), 429, body, path => path) AS "429"
FROM (VALUES ('{"error": {"code": "AccessDenied", "message": "no"}}'::jsonb), ('{"error": {"type": "forbidden", "code": "AccessDenied"}}'),
		('{"error": {"type": "upstream connect error", "message": "upstream connect error"}}'),
		('{"error": {"type": "invalid_request_error"}}'), ('{"error": {"type": "api_connection_error"}}')) b (body),
	(VALUES ('/v1/refunds'), ('/v2/core/accounts'), (NULL)) p (path)
ORDER BY path, body;
-- a 500 of API v2 may be sent again, also by an application
SELECT path, answer('again' || path, 500, '{"error": {"type": "api_error"}}', path => path) FROM unnest('{/v1/refunds,/v2/core/accounts}'::text[]) path;
SELECT path, verdict FROM unnest('{/v1/refunds,/v2/core/accounts}'::text[]) path, LATERAL idempotency.stripe_claim('answers', 'again' || path);
-- and settled by a person with what Stripe shows
SELECT path, answer('settle' || path, 500, path => path) FROM unnest('{/v1/refunds,/v2/core/accounts}'::text[]) path;
SELECT idempotency.stripe_settle('answers', 'settle/v1/refunds', 'failed', response => '{"error": {"code": "AccessDenied"}}');
SELECT idempotency.stripe_settle('answers', 'settle/v2/core/accounts', 'failed', response => '{"error": {"code": "invalid"}}');
TRUNCATE idempotency.stripe_idempotency_keys;

--
-- The view offers to send again what a claim would send again, to the second
--
CREATE TABLE cases AS
SELECT row_number() OVER () AS n, *
FROM unnest('{unknown,mismatch,lapsed,gone}'::text[]) state, unnest('{/v1/refunds,/v2/core/accounts}'::text[]) path,
	unnest('{1h,2h}'::interval[]) margin, unnest('{-1min,1min}'::interval[]) past,
	(VALUES (NULL::int, NULL::jsonb), (200, NULL), (302, NULL), (401, '{"error": {"type": "invalid_request_error"}}'), (403, NULL),
		(404, NULL), (409, '{"error": {"type": "invalid_request_error", "code": "idempotency_key_in_use"}}'),
		(424, '{"error": {"type": "api_error"}}'), (500, NULL), (500, '{"error": {"type": "api_error"}}'), (503, NULL)) a (status, response);
INSERT INTO idempotency.stripe_idempotency_keys
	(token, created_at, claimed_at, first_sent_at, lease_expires_at, attempt, generation, outcome, uncertain, account, operation_type, operation_id,
	idempotency_key, http_status, response, method, path, caller_life, caller_vxid)
SELECT n, now(), now(), clock_timestamp() - (CASE WHEN path LIKE '/v2/%' THEN interval '720 h' ELSE '24 h' END - margin) - past,
	CASE WHEN state = 'lapsed' THEN clock_timestamp() END, 1, 1,
	CASE WHEN state IN ('unknown', 'mismatch') THEN state ELSE 'in_progress' END::idempotency.outcome, true, '', 'view', n,
	'key ' || n, status, response, 'POST', path, CASE WHEN state = 'gone' THEN 1 END, CASE WHEN state = 'gone' THEN '3/1' END
FROM cases;
-- what a claim would do, and undone
CREATE FUNCTION would(id text, margin interval) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	verdict text;
BEGIN
	PERFORM set_config('idempotency.stripe_resend_margin', extract(epoch FROM margin) || 's', true);
	SELECT c.verdict INTO verdict FROM idempotency.stripe_claim('view', id) c;
	RAISE EXCEPTION USING errcode = 'P0001';
EXCEPTION WHEN raise_exception THEN
	RETURN verdict;
END $$;
CREATE FUNCTION offered(id text, margin interval) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
	PERFORM set_config('idempotency.stripe_resend_margin', extract(epoch FROM margin) || 's', true);
	RETURN (SELECT next_step LIKE '%stripe_retry%' FROM idempotency.stripe_unknown WHERE operation_type = 'view' AND operation_id = id);
END $$;
CREATE TABLE compared AS SELECT *, would(n::text, margin), offered(n::text, margin) FROM cases;
SELECT count(*), count(*) FILTER (WHERE offered) AS offered, count(*) FILTER (WHERE offered IS DISTINCT FROM (would = 'claimed')) AS wrong
FROM compared;
SELECT path, margin, past, count(*) FILTER (WHERE offered) AS offered, count(*) FILTER (WHERE NOT offered) AS too_late
FROM compared GROUP BY path, margin, past ORDER BY path, margin, past;
SELECT state, path, status, response IS NOT NULL AS with_body FROM compared WHERE NOT offered AND past < '0' AND margin = '1h'
	AND state <> 'mismatch' ORDER BY 1, 2, 3, 4;
-- a smaller margin of the session's reopens what was past it
SELECT count(*) FILTER (WHERE offered(n::text, '30 min')) AS offered, count(*) FROM cases WHERE past > '0' AND status = 404 AND state <> 'mismatch';
-- what an application sends is for the application
UPDATE idempotency.stripe_idempotency_keys SET method = NULL;
SELECT count(*) FILTER (WHERE next_step LIKE '%stripe_retry%') AS offered, count(*) FROM idempotency.stripe_unknown;

-- never sent
SELECT idempotency.stripe_resend_may_settle('unknown', NULL, NULL, NULL, NULL) AS unknown,
	idempotency.stripe_resend_may_settle('mismatch', NULL, NULL, NULL, NULL) AS mismatch,
	idempotency.stripe_resend_may_settle('unknown', now(), NULL, 500, '{"error": {"type": "api_error"}}') AS sticky,
	idempotency.stripe_resend_may_settle(NULL, now(), NULL, NULL, NULL) AS nothing;

DROP VIEW listed;
DROP TABLE cases, compared;
DROP FUNCTION answer, again, would, offered;
TRUNCATE idempotency.stripe_idempotency_keys;
