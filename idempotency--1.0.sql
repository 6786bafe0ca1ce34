/* idempotency--1.0.sql */

-- complain if script is sourced in psql, rather than via CREATE EXTENSION
\echo Use "CREATE EXTENSION idempotency" to load this file. \quit

-- The schema is the extension's own: one that is there already, and may be
-- somebody else's, is an error, and DROP EXTENSION takes it along.
CREATE SCHEMA idempotency;

--
-- Types
--

CREATE TYPE idempotency.verdict AS ENUM
	('claimed', 'replay', 'in_progress', 'mismatch', 'unknown');

CREATE TYPE idempotency.outcome AS ENUM
	('completed', 'failed', 'not_executed', 'unknown', 'in_progress', 'mismatch');

CREATE TYPE idempotency.claim_result AS (
	verdict idempotency.verdict,
	token bigint,
	attempt integer,
	recovery_point text,
	recovery_data jsonb,
	http_status integer,
	response jsonb,
	response_headers jsonb,
	response_body bytea,
	retry_after integer,
	lease_expires_at timestamptz,
	expires_at timestamptz
);

CREATE TYPE idempotency.key_info AS (
	scope text,
	key text,
	status text,
	attempt integer,
	recovery_point text,
	recovery_data jsonb,
	http_status integer,
	response jsonb,
	response_headers jsonb,
	response_body bytea,
	has_request boolean,
	claimed_at timestamptz,
	lease interval,
	lease_expires_at timestamptz,
	lapsed boolean,
	recorded_at timestamptz,
	expires_at timestamptz
);

CREATE TYPE idempotency.stripe_claim_result AS (
	verdict idempotency.verdict,
	outcome idempotency.outcome,
	idempotency_key text,
	token bigint,
	attempt integer,
	generation integer,
	request jsonb,
	resource_id text,
	resource_type text,
	http_status integer,
	response jsonb,
	error jsonb,
	retry_after integer,
	resend_until timestamptz,
	livemode boolean,
	resource_status text
);

CREATE TYPE idempotency.stripe_key_info AS (
	account text,
	operation_type text,
	operation_id text,
	idempotency_key text,
	generation integer,
	attempt integer,
	outcome idempotency.outcome,
	request jsonb,
	resource_id text,
	resource_type text,
	http_status integer,
	response jsonb,
	error jsonb,
	request_id text,
	livemode boolean,
	created_at timestamptz,
	claimed_at timestamptz,
	lease_expires_at timestamptz,
	lapsed boolean,
	first_sent_at timestamptz,
	resend_until timestamptz,
	recorded_at timestamptz,
	history jsonb,
	method text,
	path text,
	api_version text,
	settled jsonb,
	acknowledged jsonb,
	reconciled jsonb,
	resource_status text
);

CREATE TYPE idempotency.webhook_claim_result AS (
	verdict idempotency.verdict,
	stripe_event_id text,
	event_type text,
	event jsonb,
	token bigint,
	attempt integer,
	account text,
	livemode boolean,
	created timestamptz,
	object_type text,
	object_id text,
	superseded_by text,
	twin_of text,
	last_error text,
	retry_after integer
);

CREATE TYPE idempotency.webhook_receipt AS (
	stored boolean,
	stripe_event_id text,
	event_type text,
	account text
);

CREATE TYPE idempotency.stripe_call_result AS (
	outcome idempotency.outcome,
	replayed boolean,
	resource_id text,
	resource_type text,
	http_status integer,
	response jsonb,
	error jsonb,
	idempotency_key text,
	request_id text,
	attempts integer,
	generation integer,
	retry_after integer,
	livemode boolean,
	resource_status text
);

--
-- Tables
--
-- Fixed-width columns come first, so that a row is short.  The C code knows
-- the columns by number (src/ledger/requests.c, src/calls/stripe_ledger.h, src/events/webhook_ledger.h): a
-- later version adds columns at the end.  No index on idempotency_keys but the
-- primary key: every claim would pay for it.
--

CREATE TABLE idempotency.idempotency_keys (
	token bigint NOT NULL,
	claimed_at timestamptz NOT NULL,
	lease_expires_at timestamptz,
	recorded_at timestamptz,
	expires_at timestamptz,
	lease interval,
	ttl interval,
	attempt integer NOT NULL,
	http_status integer,
	scope text COLLATE "C" NOT NULL,
	key text COLLATE "C" NOT NULL,
	fingerprint bytea,
	recovery_point text,
	recovery_data jsonb,
	response jsonb,
	response_headers jsonb,
	response_body bytea,
	PRIMARY KEY (scope, key)
) WITH (fillfactor = 80, vacuum_truncate = off, toast.vacuum_truncate = off);

CREATE TABLE idempotency.stripe_idempotency_keys (
	token bigint NOT NULL,
	created_at timestamptz NOT NULL,
	claimed_at timestamptz NOT NULL,
	lease_expires_at timestamptz,
	first_sent_at timestamptz,
	recorded_at timestamptz,
	lease interval,
	attempt integer NOT NULL,
	generation integer NOT NULL,
	http_status integer,
	outcome idempotency.outcome NOT NULL,
	uncertain boolean NOT NULL,
	livemode boolean,
	account text COLLATE "C" NOT NULL,
	operation_type text COLLATE "C" NOT NULL,
	operation_id text COLLATE "C" NOT NULL,
	idempotency_key text COLLATE "C" NOT NULL,
	resource_id text,
	resource_type text,
	request_id text,
	fingerprint bytea,
	past_tokens bigint[],
	request jsonb,
	response jsonb,
	error jsonb,
	history jsonb,
	method text,
	path text,
	api_version text,
	body bytea,
	caller_life bigint,
	caller_vxid text,
	callers xid8[],
	callers_system bigint,
	settled jsonb,
	acknowledged jsonb,
	reconciled jsonb,
	resource_status text,
	PRIMARY KEY (account, operation_type, operation_id)
) WITH (fillfactor = 80, vacuum_truncate = off, toast.vacuum_truncate = off);

-- calls that an event about their object may settle (src/calls/settle_by_event.c)
CREATE INDEX stripe_idempotency_keys_unsettled_idx
	ON idempotency.stripe_idempotency_keys (resource_id)
	WHERE outcome OPERATOR(pg_catalog.=) 'unknown'::idempotency.outcome
		OR outcome OPERATOR(pg_catalog.=) 'in_progress'::idempotency.outcome;
-- what somebody has to see to: the views stripe_unknown, stripe_orphans and
-- open_claims repeat this condition, as the planner wants it (and src/events/call_sweep.c)
CREATE INDEX stripe_idempotency_keys_open_idx
	ON idempotency.stripe_idempotency_keys (claimed_at)
	WHERE outcome OPERATOR(pg_catalog.=) 'unknown'::idempotency.outcome
		OR outcome OPERATOR(pg_catalog.=) 'in_progress'::idempotency.outcome
		OR outcome OPERATOR(pg_catalog.=) 'mismatch'::idempotency.outcome
		OR (outcome OPERATOR(pg_catalog.=) 'completed'::idempotency.outcome
			AND callers IS NOT NULL AND acknowledged IS NULL)
		OR pg_catalog.cardinality(callers) OPERATOR(pg_catalog.>) 0;
-- what expires, with a body and without one (src/calls/stripe_expiry.c)
CREATE INDEX stripe_idempotency_keys_settled_idx
	ON idempotency.stripe_idempotency_keys
		((request IS NOT NULL OR body IS NOT NULL OR response IS NOT NULL OR error IS NOT NULL),
		recorded_at)
	WHERE outcome OPERATOR(pg_catalog.=) 'failed'::idempotency.outcome
		OR (outcome OPERATOR(pg_catalog.=) 'completed'::idempotency.outcome
			AND (callers IS NULL OR acknowledged IS NOT NULL));

CREATE TABLE idempotency.stripe_webhook_events (
	token bigint NOT NULL,
	received_at timestamptz NOT NULL,
	claimed_at timestamptz,
	lease_expires_at timestamptz,
	processed_at timestamptz,
	created timestamptz,
	lease interval,
	attempts integer NOT NULL,
	success boolean,
	livemode boolean,
	order_id uuid,
	correlation_id uuid,
	account text COLLATE "C" NOT NULL,
	stripe_event_id text COLLATE "C" NOT NULL,
	consumer text COLLATE "C" NOT NULL,
	event_type text COLLATE "C" NOT NULL,
	api_version text,
	object_type text,
	object_id text COLLATE "C",
	request_id text,
	idempotency_key text COLLATE "C",
	reference text,
	checkout_session_id text,
	error_message text,
	pending_key text COLLATE "C",
	payload_snapshot jsonb,
	payload bytea,
	next_attempt_at timestamptz NOT NULL,
	reclaimed jsonb,
	PRIMARY KEY (account, stripe_event_id, consumer)
) WITH (vacuum_truncate = off, toast.vacuum_truncate = off);

-- what stripe_webhook_next() hands out, in its order: fresh events first
CREATE INDEX stripe_webhook_events_due_idx
	ON idempotency.stripe_webhook_events
		(consumer, (LEAST(attempts, 1)), next_attempt_at)
	WHERE success IS NOT TRUE;
-- objects that somebody is at
CREATE INDEX stripe_webhook_events_claimed_idx
	ON idempotency.stripe_webhook_events
		(object_id, account, consumer, lease_expires_at)
	WHERE claimed_at IS NOT NULL AND success IS NULL;
-- superseded_by and twin_of, and what an operation's object went through
CREATE INDEX stripe_webhook_events_object_idx
	ON idempotency.stripe_webhook_events (object_id, account, consumer, created)
	WHERE object_id IS NOT NULL;
-- events that wait for the call that they are about
CREATE INDEX stripe_webhook_events_pending_key_idx
	ON idempotency.stripe_webhook_events (pending_key) WHERE pending_key IS NOT NULL;

-- No unique key on purpose: a restore adds the dumped row beside the one that
-- CREATE EXTENSION made (src/ledger/namespace.c says which of them is in force).
CREATE TABLE idempotency.namespace (
	value bytea NOT NULL,
	system_identifier bigint NOT NULL,
	database oid NOT NULL,
	created_at timestamptz NOT NULL,
	retired_at timestamptz,
	in_force boolean NOT NULL DEFAULT true,
	carried boolean NOT NULL DEFAULT false
) WITH (vacuum_truncate = off);
-- rows have no key by which their changes could be replicated
ALTER TABLE idempotency.namespace REPLICA IDENTITY FULL;

-- What prepared transactions have to NOTIFY when they are committed.  It is not
-- dumped: a restore has nobody to tell.
CREATE TABLE idempotency.pending_notices (
	prepared_at timestamptz NOT NULL,
	number integer NOT NULL,
	channel text NOT NULL,
	payload text NOT NULL
) WITH (vacuum_truncate = off);
-- so that a publication of all tables does not keep its rows from being deleted
ALTER TABLE idempotency.pending_notices REPLICA IDENTITY FULL;

SELECT pg_catalog.pg_extension_config_dump('idempotency.idempotency_keys', '');
SELECT pg_catalog.pg_extension_config_dump('idempotency.stripe_idempotency_keys', '');
SELECT pg_catalog.pg_extension_config_dump('idempotency.stripe_webhook_events', '');
SELECT pg_catalog.pg_extension_config_dump('idempotency.namespace', '');

--
-- Requests your API receives
--

CREATE FUNCTION idempotency.claim(key text, scope text, request jsonb DEFAULT NULL,
	ttl interval DEFAULT NULL, lease interval DEFAULT NULL, wait boolean DEFAULT true)
RETURNS idempotency.claim_result
AS 'MODULE_PATHNAME', 'idempotency_claim'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;

CREATE FUNCTION idempotency.record(key text, scope text, token bigint,
	response jsonb DEFAULT NULL, response_status integer DEFAULT 200,
	response_headers jsonb DEFAULT NULL, response_body bytea DEFAULT NULL,
	ttl interval DEFAULT NULL)
RETURNS timestamptz
AS 'MODULE_PATHNAME', 'idempotency_record'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;

CREATE FUNCTION idempotency.checkpoint(key text, scope text, token bigint,
	recovery_point text, recovery_data jsonb DEFAULT NULL, lease interval DEFAULT NULL)
RETURNS timestamptz
AS 'MODULE_PATHNAME', 'idempotency_checkpoint'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;

CREATE FUNCTION idempotency.extend(key text, scope text, token bigint,
	lease interval DEFAULT NULL)
RETURNS timestamptz
AS 'MODULE_PATHNAME', 'idempotency_extend'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;

CREATE FUNCTION idempotency.release(key text, scope text, token bigint,
	keep boolean DEFAULT false)
RETURNS boolean
AS 'MODULE_PATHNAME', 'idempotency_release'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;

CREATE FUNCTION idempotency.lookup(key text, scope text)
RETURNS idempotency.key_info
AS 'MODULE_PATHNAME', 'idempotency_lookup'
LANGUAGE C STABLE CALLED ON NULL INPUT PARALLEL RESTRICTED;

CREATE FUNCTION idempotency.operation_uuid(key text, scope text)
RETURNS uuid
AS 'MODULE_PATHNAME', 'idempotency_operation_uuid'
LANGUAGE C STABLE CALLED ON NULL INPUT PARALLEL RESTRICTED;

--
-- Calls you send to Stripe
--

CREATE FUNCTION idempotency.stripe_idempotency_key(operation_type text, operation_id text,
	account text DEFAULT '')
RETURNS text
AS 'MODULE_PATHNAME', 'idempotency_stripe_idempotency_key'
LANGUAGE C STABLE CALLED ON NULL INPUT PARALLEL RESTRICTED;

CREATE FUNCTION idempotency.stripe_claim(operation_type text, operation_id text,
	request jsonb DEFAULT NULL, account text DEFAULT '', lease interval DEFAULT NULL)
RETURNS idempotency.stripe_claim_result
AS 'MODULE_PATHNAME', 'idempotency_stripe_claim'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;

CREATE FUNCTION idempotency.stripe_record(operation_type text, operation_id text, token bigint,
	resource_id text DEFAULT NULL, response jsonb DEFAULT NULL,
	http_status integer DEFAULT NULL, request_id text DEFAULT NULL, account text DEFAULT '')
RETURNS idempotency.outcome
AS 'MODULE_PATHNAME', 'idempotency_stripe_record'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;

CREATE FUNCTION idempotency.stripe_release(operation_type text, operation_id text, token bigint,
	account text DEFAULT '')
RETURNS boolean
AS 'MODULE_PATHNAME', 'idempotency_stripe_release'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;

CREATE FUNCTION idempotency.stripe_extend(operation_type text, operation_id text, token bigint,
	lease interval DEFAULT NULL, account text DEFAULT '')
RETURNS timestamptz
AS 'MODULE_PATHNAME', 'idempotency_stripe_extend'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;

CREATE FUNCTION idempotency.stripe_reopen(operation_type text, operation_id text,
	account text DEFAULT '', force boolean DEFAULT false, from_generation integer DEFAULT NULL)
RETURNS text
AS 'MODULE_PATHNAME', 'idempotency_stripe_reopen'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;

CREATE FUNCTION idempotency.stripe_lookup(operation_type text, operation_id text,
	account text DEFAULT '')
RETURNS idempotency.stripe_key_info
AS 'MODULE_PATHNAME', 'idempotency_stripe_lookup'
LANGUAGE C STABLE CALLED ON NULL INPUT PARALLEL RESTRICTED;

CREATE FUNCTION idempotency.stripe_call(operation_type text, operation_id text, method text,
	path text, params jsonb DEFAULT '{}', account text DEFAULT '', timeout interval DEFAULT NULL)
RETURNS idempotency.stripe_call_result
AS 'MODULE_PATHNAME', 'idempotency_stripe_call'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;

CREATE FUNCTION idempotency.stripe_retry(operation_type text, operation_id text,
	account text DEFAULT '', timeout interval DEFAULT NULL)
RETURNS idempotency.stripe_call_result
AS 'MODULE_PATHNAME', 'idempotency_stripe_retry'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;

CREATE FUNCTION idempotency.stripe_get(path text, params jsonb DEFAULT '{}',
	account text DEFAULT '', timeout interval DEFAULT NULL)
RETURNS idempotency.stripe_call_result
AS 'MODULE_PATHNAME', 'idempotency_stripe_get'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;

CREATE FUNCTION idempotency.stripe_reconcile(operation_type text DEFAULT NULL,
	operation_id text DEFAULT NULL, account text DEFAULT '', max_requests integer DEFAULT 20)
RETURNS TABLE (account text, operation_type text, operation_id text,
	outcome idempotency.outcome, resource_id text, evidence jsonb)
AS 'MODULE_PATHNAME', 'idempotency_stripe_reconcile'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE ROWS 20;

CREATE FUNCTION idempotency.stripe_settle(operation_type text, operation_id text,
	outcome idempotency.outcome, resource_id text DEFAULT NULL, note text DEFAULT NULL,
	account text DEFAULT '', response jsonb DEFAULT NULL)
RETURNS boolean
AS 'MODULE_PATHNAME', 'idempotency_stripe_settle'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;

CREATE FUNCTION idempotency.stripe_acknowledge(operation_type text, operation_id text,
	note text, account text DEFAULT '')
RETURNS boolean
AS 'MODULE_PATHNAME', 'idempotency_stripe_acknowledge'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;

CREATE FUNCTION idempotency.stripe_has_lapsed(lease_expires_at timestamptz, server_life bigint,
	virtual_xid text)
RETURNS boolean
AS 'MODULE_PATHNAME', 'idempotency_stripe_has_lapsed'
LANGUAGE C STABLE CALLED ON NULL INPUT PARALLEL RESTRICTED;

CREATE FUNCTION idempotency.stripe_resend_may_settle(outcome idempotency.outcome,
	first_sent_at timestamptz, path text, http_status integer, response jsonb)
RETURNS boolean
AS 'MODULE_PATHNAME', 'idempotency_stripe_resend_may_settle'
LANGUAGE C STABLE CALLED ON NULL INPUT PARALLEL RESTRICTED;

CREATE FUNCTION idempotency.stripe_callers_fate(callers xid8[], system_identifier bigint)
RETURNS text
AS 'MODULE_PATHNAME', 'idempotency_stripe_callers_fate'
LANGUAGE C STABLE CALLED ON NULL INPUT PARALLEL RESTRICTED;

CREATE FUNCTION idempotency.stripe_namespace(choice text)
RETURNS boolean
AS 'MODULE_PATHNAME', 'idempotency_stripe_namespace'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;

--
-- Events you receive from Stripe
--
-- What takes a body takes it as bytea or as text; an untyped literal or parameter
-- is text to PostgreSQL.
--

CREATE FUNCTION idempotency.stripe_webhook_verify(payload bytea, signature text,
	secrets text[] DEFAULT NULL, tolerance interval DEFAULT NULL)
RETURNS text
AS 'MODULE_PATHNAME', 'idempotency_stripe_webhook_verify'
LANGUAGE C STABLE CALLED ON NULL INPUT PARALLEL RESTRICTED;

CREATE FUNCTION idempotency.stripe_webhook_verify(payload text, signature text,
	secrets text[] DEFAULT NULL, tolerance interval DEFAULT NULL)
RETURNS text
AS 'MODULE_PATHNAME', 'idempotency_stripe_webhook_verify_text'
LANGUAGE C STABLE CALLED ON NULL INPUT PARALLEL RESTRICTED;

CREATE FUNCTION idempotency.stripe_webhook_is_valid(payload bytea, signature text,
	secrets text[] DEFAULT NULL, tolerance interval DEFAULT NULL)
RETURNS boolean
AS 'MODULE_PATHNAME', 'idempotency_stripe_webhook_is_valid'
LANGUAGE C STABLE CALLED ON NULL INPUT PARALLEL RESTRICTED;

CREATE FUNCTION idempotency.stripe_webhook_is_valid(payload text, signature text,
	secrets text[] DEFAULT NULL, tolerance interval DEFAULT NULL)
RETURNS boolean
AS 'MODULE_PATHNAME', 'idempotency_stripe_webhook_is_valid_text'
LANGUAGE C STABLE CALLED ON NULL INPUT PARALLEL RESTRICTED;

CREATE FUNCTION idempotency.stripe_webhook_claim(payload bytea, signature text,
	secrets text[] DEFAULT NULL, tolerance interval DEFAULT NULL,
	lease interval DEFAULT NULL, wait boolean DEFAULT true, consumer text DEFAULT '')
RETURNS idempotency.webhook_claim_result
AS 'MODULE_PATHNAME', 'idempotency_stripe_webhook_claim'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;

CREATE FUNCTION idempotency.stripe_webhook_claim(payload text, signature text,
	secrets text[] DEFAULT NULL, tolerance interval DEFAULT NULL,
	lease interval DEFAULT NULL, wait boolean DEFAULT true, consumer text DEFAULT '')
RETURNS idempotency.webhook_claim_result
AS 'MODULE_PATHNAME', 'idempotency_stripe_webhook_claim_text'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;

CREATE FUNCTION idempotency.stripe_webhook_record(stripe_event_id text, token bigint,
	success boolean DEFAULT NULL, error_message text DEFAULT NULL,
	reference text DEFAULT NULL, order_id uuid DEFAULT NULL,
	correlation_id uuid DEFAULT NULL, account text DEFAULT '', consumer text DEFAULT '')
RETURNS boolean
AS 'MODULE_PATHNAME', 'idempotency_stripe_webhook_record'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;

CREATE FUNCTION idempotency.stripe_webhook_receive(payload bytea, signature text,
	secrets text[] DEFAULT NULL, tolerance interval DEFAULT NULL, consumer text DEFAULT '')
RETURNS idempotency.webhook_receipt
AS 'MODULE_PATHNAME', 'idempotency_stripe_webhook_receive'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;

CREATE FUNCTION idempotency.stripe_webhook_receive(payload text, signature text,
	secrets text[] DEFAULT NULL, tolerance interval DEFAULT NULL, consumer text DEFAULT '')
RETURNS idempotency.webhook_receipt
AS 'MODULE_PATHNAME', 'idempotency_stripe_webhook_receive_text'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;

-- a set, so that there is no row where there is no event
CREATE FUNCTION idempotency.stripe_webhook_next(lease interval DEFAULT NULL,
	consumer text DEFAULT '')
RETURNS SETOF idempotency.webhook_claim_result
AS 'MODULE_PATHNAME', 'idempotency_stripe_webhook_next'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE ROWS 1;

CREATE FUNCTION idempotency.stripe_webhook_reclaim(stripe_event_id text,
	account text DEFAULT '', lease interval DEFAULT NULL, consumer text DEFAULT '')
RETURNS idempotency.webhook_claim_result
AS 'MODULE_PATHNAME', 'idempotency_stripe_webhook_reclaim'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;

-- lease is where the other form has it, so that arguments without a type are told apart
CREATE FUNCTION idempotency.stripe_webhook_reclaim(stripe_event_id text, again boolean,
	lease interval DEFAULT NULL, account text DEFAULT '', consumer text DEFAULT '')
RETURNS idempotency.webhook_claim_result
AS 'MODULE_PATHNAME', 'idempotency_stripe_webhook_again'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;

--
-- Housekeeping
--

CREATE FUNCTION idempotency.grant_role(role regrole, kind text)
RETURNS boolean
AS 'MODULE_PATHNAME', 'idempotency_grant_role'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;

CREATE FUNCTION idempotency.expire(max_rows integer DEFAULT NULL)
RETURNS TABLE (ledger text, removed bigint)
AS 'MODULE_PATHNAME', 'idempotency_expire'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE ROWS 4;

CREATE FUNCTION idempotency.worker_states()
RETURNS TABLE (database text, status text, pid integer, last_run timestamptz,
	removed bigint, refused bigint, oldest_expired timestamptz, last_error text,
	last_error_at timestamptz, next_run timestamptz, next_step text)
AS 'MODULE_PATHNAME', 'idempotency_worker_states'
LANGUAGE C STABLE CALLED ON NULL INPUT PARALLEL RESTRICTED ROWS 10;

CREATE VIEW idempotency.workers WITH (security_barrier) AS
SELECT w.database, w.status, w.pid, w.last_run, w.removed, w.refused, w.oldest_expired,
	pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) w.oldest_expired AS lag,
	w.last_error, w.last_error_at, w.next_run, w.next_step
FROM idempotency.worker_states() w
ORDER BY w.database;

CREATE VIEW idempotency.open_claims WITH (security_barrier) AS
SELECT c.ledger, c.scope, c.key, c.account, c.operation_type, c.operation_id,
	c.attempt, c.claimed_at, c.lease_expires_at, c.lapsed, c.recovery_point, c.next_step
FROM (
	SELECT 'request'::text AS ledger, k.scope, k.key,
		NULL::text AS account, NULL::text AS operation_type, NULL::text AS operation_id,
		k.attempt, k.claimed_at, k.lease_expires_at, k.lapsed, k.recovery_point,
		-- what was given up on purpose keeps its request for the retry
		CASE WHEN k.lapsed AND NOT k.kept AND k.recovery_point IS NULL
			THEN pg_catalog.format('SELECT idempotency.release(%L, %L, %s);', k.key, k.scope, k.token)
			ELSE pg_catalog.format('SELECT * FROM idempotency.lookup(%L, %L);', k.key, k.scope)
		END AS next_step
	-- no LATERAL, which Citus refuses
	FROM (SELECT r.scope, r.key, r.token, r.attempt, r.claimed_at, r.lease_expires_at, r.recovery_point,
			r.lease IS NULL AND r.lease_expires_at IS NOT NULL AS kept,
			r.lease_expires_at IS NULL
				OR r.lease_expires_at OPERATOR(pg_catalog.<=) pg_catalog.clock_timestamp() AS lapsed
		FROM idempotency.idempotency_keys r
		WHERE r.expires_at IS NULL) k
	UNION ALL
	SELECT 'stripe', NULL, NULL, s.account, s.operation_type, s.operation_id,
		s.attempt, s.claimed_at, s.lease_expires_at,
		idempotency.stripe_has_lapsed(s.lease_expires_at, s.caller_life, s.caller_vxid), NULL,
		pg_catalog.format('SELECT * FROM idempotency.stripe_lookup(%L, %L, %L);',
			s.operation_type, s.operation_id, s.account)
	FROM idempotency.stripe_idempotency_keys s
	WHERE s.outcome OPERATOR(pg_catalog.=) 'in_progress'::idempotency.outcome
) c
ORDER BY c.lapsed DESC, c.lease_expires_at;

CREATE VIEW idempotency.stripe_webhook_pending WITH (security_barrier) AS
SELECT e.account, e.stripe_event_id, e.consumer, e.event_type, e.object_id, s.state,
	e.attempts, e.received_at, e.claimed_at, e.lease_expires_at,
	e.error_message AS last_error,
	CASE WHEN s.state OPERATOR(pg_catalog.=) 'claimed'
		THEN pg_catalog.format('SELECT * FROM idempotency.stripe_webhook_pending'
			' WHERE stripe_event_id = %L AND account = %L AND consumer = %L;',
			e.stripe_event_id, e.account, e.consumer)
		ELSE pg_catalog.format('SELECT * FROM idempotency.stripe_webhook_reclaim(%L, account => %L,'
			' lease => %L, consumer => %L%s);',
			e.stripe_event_id, e.account,
			CASE WHEN s.state OPERATOR(pg_catalog.=) 'dead' THEN '1 second' ELSE '5 minutes' END,
			e.consumer,
			CASE WHEN s.state OPERATOR(pg_catalog.=) 'dead' THEN ', again => true' ELSE '' END)
	END AS next_step,
	e.next_attempt_at
FROM idempotency.stripe_webhook_events e,
	LATERAL (SELECT CASE
			WHEN e.lease_expires_at OPERATOR(pg_catalog.>) pg_catalog.clock_timestamp() THEN 'claimed'
			WHEN e.next_attempt_at OPERATOR(pg_catalog.=) 'infinity'::timestamptz THEN 'dead'
			WHEN NOT e.success THEN 'failed'
			WHEN e.claimed_at IS NULL THEN 'received'
			ELSE 'lapsed' END AS state) s
WHERE e.success IS NOT TRUE
ORDER BY COALESCE(e.lease_expires_at, e.processed_at, e.received_at);

CREATE VIEW idempotency.stripe_unknown WITH (security_barrier) AS
SELECT u.account, u.operation_type, u.operation_id, u.reason, u.idempotency_key,
	u.generation, u.attempt, u.http_status, u.resource_id, u.request_id, u.livemode,
	u.first_sent_at, u.claimed_at, u.recorded_at, u.reconciled_at,
	CASE WHEN u.resendable
			THEN pg_catalog.format('SELECT * FROM idempotency.stripe_retry(%L, %L, account => %L);',
				u.operation_type, u.operation_id, u.account)
		WHEN u.askable
			THEN pg_catalog.format('SELECT * FROM idempotency.stripe_reconcile(%L, %L, account => %L);',
				u.operation_type, u.operation_id, u.account)
		ELSE pg_catalog.format('SELECT idempotency.stripe_settle(%L, %L, outcome => %L, '
			'resource_id => %L, note => %L, account => %L);', u.operation_type, u.operation_id,
			'<completed, failed or not_executed>', '<id at Stripe, or leave it out>',
			'<how you know>', u.account)
	END AS next_step
FROM (
	SELECT s.*, a.reconciled_at,
		-- what the database has sent, while to send it again is safe and may help
		s.method IS NOT NULL AND idempotency.stripe_resend_may_settle(s.outcome,
			s.first_sent_at,
			COALESCE(s.path, s.request OPERATOR(pg_catalog.->>) 'path'::text),
			s.http_status, s.response) AS resendable,
		-- until Stripe was asked all that it can be asked, since the last attempt
		s.outcome OPERATOR(pg_catalog.<>) 'mismatch'::idempotency.outcome
			AND (s.reconciled IS NULL
				OR s.reconciled OPERATOR(pg_catalog.?) 'next'
				OR a.reconciled_at OPERATOR(pg_catalog.<) s.claimed_at) AS askable,
		CASE WHEN s.outcome OPERATOR(pg_catalog.=) 'unknown'::idempotency.outcome
				THEN 'no definitive answer'
			WHEN s.outcome OPERATOR(pg_catalog.=) 'mismatch'::idempotency.outcome
				THEN 'Stripe knows the key from another request'
			WHEN s.outcome OPERATOR(pg_catalog.=) 'in_progress'::idempotency.outcome
				AND idempotency.stripe_has_lapsed(s.lease_expires_at, s.caller_life, s.caller_vxid)
				THEN CASE WHEN s.caller_life IS NULL THEN 'lease has lapsed'
					ELSE 'caller is gone' END
		END AS reason
	FROM idempotency.stripe_idempotency_keys s,
		LATERAL (SELECT (s.reconciled OPERATOR(pg_catalog.->>) 'at')::timestamptz AS reconciled_at) a
	WHERE s.outcome OPERATOR(pg_catalog.=) 'unknown'::idempotency.outcome
		OR s.outcome OPERATOR(pg_catalog.=) 'in_progress'::idempotency.outcome
		OR s.outcome OPERATOR(pg_catalog.=) 'mismatch'::idempotency.outcome
) u
WHERE u.reason IS NOT NULL
ORDER BY u.first_sent_at;

CREATE VIEW idempotency.stripe_orphans WITH (security_barrier) AS
SELECT o.account, o.operation_type, o.operation_id, o.outcome, o.fate, o.resource_id,
	o.resource_type, o.livemode, o.claimed_at, o.recorded_at,
	pg_catalog.format('/* best: run again what called it, in a transaction that commits; '
		'what was undone or booked instead: */ '
		'SELECT idempotency.stripe_acknowledge(%L, %L, note => %L, account => %L);',
		o.operation_type, o.operation_id, '<what was done about it>', o.account) AS next_step
FROM (
	SELECT s.account, s.operation_type, s.operation_id, s.resource_id, s.resource_type,
		s.livemode, s.claimed_at, s.recorded_at,
		idempotency.stripe_callers_fate(s.callers, s.callers_system) AS fate,
		CASE WHEN s.outcome OPERATOR(pg_catalog.=) 'in_progress'::idempotency.outcome
				AND idempotency.stripe_has_lapsed(s.lease_expires_at, s.caller_life, s.caller_vxid)
				THEN 'unknown'::idempotency.outcome
			ELSE s.outcome
		END AS outcome
	FROM idempotency.stripe_idempotency_keys s
	WHERE (s.outcome OPERATOR(pg_catalog.=) 'unknown'::idempotency.outcome
			OR s.outcome OPERATOR(pg_catalog.=) 'in_progress'::idempotency.outcome
			OR s.outcome OPERATOR(pg_catalog.=) 'mismatch'::idempotency.outcome
			OR (s.outcome OPERATOR(pg_catalog.=) 'completed'::idempotency.outcome
				AND s.callers IS NOT NULL AND s.acknowledged IS NULL)
			OR pg_catalog.cardinality(s.callers) OPERATOR(pg_catalog.>) 0)
		AND s.callers IS NOT NULL AND s.acknowledged IS NULL
) o
WHERE (o.fate OPERATOR(pg_catalog.=) 'rolled back' OR o.fate OPERATOR(pg_catalog.=) 'not known')
	AND (o.outcome OPERATOR(pg_catalog.=) 'completed'::idempotency.outcome
		OR o.outcome OPERATOR(pg_catalog.=) 'unknown'::idempotency.outcome)
ORDER BY o.claimed_at;

-- which namespace is in force is decided when its row comes, however it comes
CREATE FUNCTION idempotency.namespace_comes()
RETURNS trigger
AS 'MODULE_PATHNAME', 'idempotency_namespace_comes'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;

CREATE TRIGGER namespace_comes BEFORE INSERT ON idempotency.namespace
	FOR EACH ROW EXECUTE FUNCTION idempotency.namespace_comes();
ALTER TABLE idempotency.namespace ENABLE ALWAYS TRIGGER namespace_comes;

-- the first namespace of this database
SELECT idempotency.stripe_namespace('new');

--
-- Comments
--

COMMENT ON SCHEMA idempotency IS
	'Retries made safe: claim a key, do the work, record its result, replay it ever after';

COMMENT ON TYPE idempotency.verdict IS
	'Answer of a claim. claimed: the caller, and nobody else, runs the operation now; '
	'replay: it was recorded before, here is the result; in_progress: someone else holds it; '
	'mismatch: the same key came with another request; '
	'unknown: sending again cannot settle a call to Stripe any more';
COMMENT ON TYPE idempotency.outcome IS
	'What Stripe did with a call. completed: executed (2xx), which says nothing about money; '
	'failed: definitive refusal; not_executed: Stripe did nothing, free to be claimed again; '
	'unknown: it may or may not have happened; in_progress: claimed and not recorded; '
	'mismatch: Stripe knows the key from another request';

COMMENT ON TYPE idempotency.claim_result IS 'Answer of claim()';
COMMENT ON COLUMN idempotency.claim_result.verdict IS
	'claimed, replay, in_progress or mismatch';
COMMENT ON COLUMN idempotency.claim_result.token IS
	'Proof of the claim for record(), checkpoint(), extend() and release(): '
	'random, 1 to 2^53 - 1; NULL unless claimed';
COMMENT ON COLUMN idempotency.claim_result.attempt IS
	'Which claim of this key it is, from 1; on replay, the one that recorded the result';
COMMENT ON COLUMN idempotency.claim_result.recovery_point IS
	'Where claimed after an earlier attempt: its last checkpoint, or NULL';
COMMENT ON COLUMN idempotency.claim_result.recovery_data IS
	'What the earlier attempt left with that checkpoint, or NULL';
COMMENT ON COLUMN idempotency.claim_result.http_status IS
	'Status to answer with: the recorded one on replay, 409 in_progress, 422 mismatch; NULL if claimed';
COMMENT ON COLUMN idempotency.claim_result.response IS
	'On replay, the recorded response as jsonb, or NULL';
COMMENT ON COLUMN idempotency.claim_result.response_headers IS
	'On replay, the recorded headers, or NULL';
COMMENT ON COLUMN idempotency.claim_result.response_body IS
	'On replay, the recorded body byte for byte, or NULL';
COMMENT ON COLUMN idempotency.claim_result.retry_after IS
	'If in_progress, seconds after which to try again, at least 1 (for Retry-After)';
COMMENT ON COLUMN idempotency.claim_result.lease_expires_at IS
	'If claimed with a lease, until when the key is held';
COMMENT ON COLUMN idempotency.claim_result.expires_at IS
	'On replay, until when the result is replayed';

COMMENT ON TYPE idempotency.key_info IS 'Answer of lookup()';
COMMENT ON COLUMN idempotency.key_info.scope IS 'Tenant or user that the key belongs to';
COMMENT ON COLUMN idempotency.key_info.key IS 'The client''s Idempotency-Key';
COMMENT ON COLUMN idempotency.key_info.status IS
	'in_progress; once recorded failed for an HTTP status from 400 on, otherwise completed';
COMMENT ON COLUMN idempotency.key_info.attempt IS 'How often the key was claimed';
COMMENT ON COLUMN idempotency.key_info.recovery_point IS 'Last checkpoint of an unfinished key, or NULL';
COMMENT ON COLUMN idempotency.key_info.recovery_data IS 'What was left with that checkpoint, or NULL';
COMMENT ON COLUMN idempotency.key_info.http_status IS 'Recorded status, or NULL';
COMMENT ON COLUMN idempotency.key_info.response IS 'Recorded response as jsonb, or NULL';
COMMENT ON COLUMN idempotency.key_info.response_headers IS 'Recorded headers, or NULL';
COMMENT ON COLUMN idempotency.key_info.response_body IS 'Recorded body, or NULL';
COMMENT ON COLUMN idempotency.key_info.has_request IS
	'Is a request known that later claims are compared with?';
COMMENT ON COLUMN idempotency.key_info.claimed_at IS 'When the key was claimed last';
COMMENT ON COLUMN idempotency.key_info.lease IS 'For how long it was claimed or extended last, or NULL';
COMMENT ON COLUMN idempotency.key_info.lease_expires_at IS
	'Until when it is held; without a lease NULL, or when it was released with its request kept';
COMMENT ON COLUMN idempotency.key_info.lapsed IS
	'If in_progress, is the key free to be claimed again?  Otherwise NULL';
COMMENT ON COLUMN idempotency.key_info.recorded_at IS 'When the result was recorded, or NULL';
COMMENT ON COLUMN idempotency.key_info.expires_at IS 'Until when the result is replayed, or NULL';

COMMENT ON TYPE idempotency.stripe_claim_result IS 'Answer of stripe_claim()';
COMMENT ON COLUMN idempotency.stripe_claim_result.verdict IS
	'claimed, replay, in_progress, mismatch or unknown';
COMMENT ON COLUMN idempotency.stripe_claim_result.outcome IS 'What Stripe did with the call';
COMMENT ON COLUMN idempotency.stripe_claim_result.idempotency_key IS
	'Idempotency-Key of the operation''s current generation; '
	'NULL only where another transaction has just claimed it and is not committed';
COMMENT ON COLUMN idempotency.stripe_claim_result.token IS
	'Proof of the claim for stripe_record(), stripe_extend() and stripe_release(): '
	'random, 1 to 2^53 - 1; NULL unless claimed';
COMMENT ON COLUMN idempotency.stripe_claim_result.attempt IS 'Which claim of this generation it is, from 1';
COMMENT ON COLUMN idempotency.stripe_claim_result.generation IS
	'1, and one more for each stripe_reopen()';
COMMENT ON COLUMN idempotency.stripe_claim_result.request IS
	'The request as first claimed: if claimed, send this one';
COMMENT ON COLUMN idempotency.stripe_claim_result.resource_id IS 'Stripe''s id of what was made, or NULL';
COMMENT ON COLUMN idempotency.stripe_claim_result.resource_type IS 'Its type, such as payment_intent, or NULL';
COMMENT ON COLUMN idempotency.stripe_claim_result.http_status IS 'Status of Stripe''s last recorded answer, or NULL';
COMMENT ON COLUMN idempotency.stripe_claim_result.response IS
	'Stripe''s last recorded answer; NULL also where it was settled without, was too large, or is not kept any more';
COMMENT ON COLUMN idempotency.stripe_claim_result.error IS 'The error object of that answer, or NULL';
COMMENT ON COLUMN idempotency.stripe_claim_result.retry_after IS
	'If in_progress, seconds after which to try again, at least 1';
COMMENT ON COLUMN idempotency.stripe_claim_result.resend_until IS
	'Until when the same key and request may be sent again, or NULL where they never were';
COMMENT ON COLUMN idempotency.stripe_claim_result.livemode IS 'Stripe''s livemode as recorded, or NULL';
COMMENT ON COLUMN idempotency.stripe_claim_result.resource_status IS
	'Status of what was made, as Stripe told it with the outcome, such as succeeded; kept for ever; or NULL';

COMMENT ON TYPE idempotency.stripe_key_info IS 'Answer of stripe_lookup()';
COMMENT ON COLUMN idempotency.stripe_key_info.account IS 'Stripe account, '''' for one''s own';
COMMENT ON COLUMN idempotency.stripe_key_info.operation_type IS 'What the call does, such as payment';
COMMENT ON COLUMN idempotency.stripe_key_info.operation_id IS 'Id of the operation within its type';
COMMENT ON COLUMN idempotency.stripe_key_info.idempotency_key IS 'Idempotency-Key of the current generation';
COMMENT ON COLUMN idempotency.stripe_key_info.generation IS '1, and one more for each stripe_reopen()';
COMMENT ON COLUMN idempotency.stripe_key_info.attempt IS 'How often this generation was claimed';
COMMENT ON COLUMN idempotency.stripe_key_info.outcome IS 'What Stripe did with the call';
COMMENT ON COLUMN idempotency.stripe_key_info.request IS 'The request as first claimed, or NULL';
COMMENT ON COLUMN idempotency.stripe_key_info.resource_id IS 'Stripe''s id of what was made, or NULL';
COMMENT ON COLUMN idempotency.stripe_key_info.resource_type IS 'Its type, such as payment_intent, or NULL';
COMMENT ON COLUMN idempotency.stripe_key_info.http_status IS 'Status of Stripe''s last recorded answer, or NULL';
COMMENT ON COLUMN idempotency.stripe_key_info.response IS
	'Stripe''s last recorded answer; NULL also where it was settled without, was too large, or is not kept any more';
COMMENT ON COLUMN idempotency.stripe_key_info.error IS 'The error object of that answer, or NULL';
COMMENT ON COLUMN idempotency.stripe_key_info.request_id IS 'Stripe''s Request-Id, or NULL';
COMMENT ON COLUMN idempotency.stripe_key_info.livemode IS 'Stripe''s livemode as recorded, or NULL';
COMMENT ON COLUMN idempotency.stripe_key_info.created_at IS 'When the operation was claimed first';
COMMENT ON COLUMN idempotency.stripe_key_info.claimed_at IS 'When it was claimed last';
COMMENT ON COLUMN idempotency.stripe_key_info.lease_expires_at IS 'If in_progress, until when it is held';
COMMENT ON COLUMN idempotency.stripe_key_info.lapsed IS
	'If in_progress, is the operation free to be claimed again?  Otherwise NULL';
COMMENT ON COLUMN idempotency.stripe_key_info.first_sent_at IS
	'When this generation may have been sent first, or NULL where it never was';
COMMENT ON COLUMN idempotency.stripe_key_info.resend_until IS
	'Until when the same key and request may be sent again';
COMMENT ON COLUMN idempotency.stripe_key_info.recorded_at IS 'When the outcome was recorded, or NULL';
COMMENT ON COLUMN idempotency.stripe_key_info.history IS
	'Earlier generations, oldest first, each as stripe_reopen() found it, or NULL';
COMMENT ON COLUMN idempotency.stripe_key_info.method IS 'Method of the call, where the database has sent it';
COMMENT ON COLUMN idempotency.stripe_key_info.path IS 'Its path, where the database has sent it';
COMMENT ON COLUMN idempotency.stripe_key_info.api_version IS
	'Its Stripe-Version, where the database has sent it';
COMMENT ON COLUMN idempotency.stripe_key_info.settled IS
	'Who settled it, when, by which note or evidence, and what it was before; or NULL';
COMMENT ON COLUMN idempotency.stripe_key_info.acknowledged IS
	'Who acknowledged an orphan, when and with which note, or NULL';
COMMENT ON COLUMN idempotency.stripe_key_info.reconciled IS
	'What stripe_reconcile() has asked last without settling it, when, and what it has found, or NULL';

COMMENT ON COLUMN idempotency.stripe_key_info.resource_status IS
	'Status of what was made, as Stripe told it with the outcome, such as succeeded; kept for ever; or NULL';

COMMENT ON TYPE idempotency.webhook_claim_result IS
	'Answer of stripe_webhook_claim(), stripe_webhook_next() and stripe_webhook_reclaim()';
COMMENT ON COLUMN idempotency.webhook_claim_result.verdict IS 'claimed, replay or in_progress';
COMMENT ON COLUMN idempotency.webhook_claim_result.stripe_event_id IS 'Stripe''s id of the event';
COMMENT ON COLUMN idempotency.webhook_claim_result.event_type IS 'Stripe''s type, such as payment_intent.succeeded';
COMMENT ON COLUMN idempotency.webhook_claim_result.event IS 'The event; NULL where it is not kept any more';
COMMENT ON COLUMN idempotency.webhook_claim_result.token IS
	'Proof of the claim for stripe_webhook_record(): random, 1 to 2^53 - 1; NULL unless claimed';
COMMENT ON COLUMN idempotency.webhook_claim_result.attempt IS 'Which claim of this event it is, from 1';
COMMENT ON COLUMN idempotency.webhook_claim_result.account IS 'Connected account, '''' for one''s own';
COMMENT ON COLUMN idempotency.webhook_claim_result.livemode IS 'Stripe''s livemode';
COMMENT ON COLUMN idempotency.webhook_claim_result.created IS 'When Stripe made the event, to the second';
COMMENT ON COLUMN idempotency.webhook_claim_result.object_type IS 'Type of what it is about, or NULL';
COMMENT ON COLUMN idempotency.webhook_claim_result.object_id IS 'Stripe''s id of what it is about, or NULL';
COMMENT ON COLUMN idempotency.webhook_claim_result.superseded_by IS
	'If claimed, the newest event about the same object that was made in a later second '
	'and is processed already, or NULL';
COMMENT ON COLUMN idempotency.webhook_claim_result.twin_of IS
	'If claimed, another event of the same type, object, request and data that was made within an hour of it '
	'and is processed already, or NULL';
COMMENT ON COLUMN idempotency.webhook_claim_result.last_error IS
	'What the last attempt recorded as error_message, or NULL';
COMMENT ON COLUMN idempotency.webhook_claim_result.retry_after IS
	'If in_progress, seconds after which to try again, at least 1';

COMMENT ON TYPE idempotency.webhook_receipt IS 'Answer of stripe_webhook_receive()';
COMMENT ON COLUMN idempotency.webhook_receipt.stored IS 'Is it new?  false: it was received before';
COMMENT ON COLUMN idempotency.webhook_receipt.stripe_event_id IS 'Stripe''s id of the event';
COMMENT ON COLUMN idempotency.webhook_receipt.event_type IS 'Stripe''s type, such as payment_intent.succeeded';
COMMENT ON COLUMN idempotency.webhook_receipt.account IS 'Connected account, '''' for one''s own';

COMMENT ON TYPE idempotency.stripe_call_result IS
	'Answer of stripe_call(), stripe_retry() and stripe_get()';
COMMENT ON COLUMN idempotency.stripe_call_result.outcome IS 'What Stripe did with the call';
COMMENT ON COLUMN idempotency.stripe_call_result.replayed IS
	'Does the answer come from an earlier execution?';
COMMENT ON COLUMN idempotency.stripe_call_result.resource_id IS
	'Stripe''s id of the object, also of one that a refused call left behind; or NULL';
COMMENT ON COLUMN idempotency.stripe_call_result.resource_type IS 'Its type, such as payment_intent, or NULL';
COMMENT ON COLUMN idempotency.stripe_call_result.http_status IS
	'HTTP status of the last attempt, NULL where no answer came';
COMMENT ON COLUMN idempotency.stripe_call_result.response IS
	'Body of the answer, {"error": ...} included; NULL where none came whole, and in a replay '
	'also where it was settled without, was too large, or is not kept any more';
COMMENT ON COLUMN idempotency.stripe_call_result.error IS
	'Stripe''s error object, or one that says why no answer came (type api_connection_error or api_error); '
	'NULL if there was none';
COMMENT ON COLUMN idempotency.stripe_call_result.idempotency_key IS
	'Idempotency-Key of the operation''s current generation; NULL of stripe_get()';
COMMENT ON COLUMN idempotency.stripe_call_result.request_id IS 'Stripe''s Request-Id of the last attempt, or NULL';
COMMENT ON COLUMN idempotency.stripe_call_result.attempts IS
	'How often the request was sent or tried to be sent in this call; 0 if it was not';
COMMENT ON COLUMN idempotency.stripe_call_result.generation IS 'Generation of the operation; NULL of stripe_get()';
COMMENT ON COLUMN idempotency.stripe_call_result.retry_after IS
	'If in_progress, not_executed or unknown, seconds after which to try again, at least 1';
COMMENT ON COLUMN idempotency.stripe_call_result.livemode IS
	'true: Stripe''s live mode, false: test mode';
COMMENT ON COLUMN idempotency.stripe_call_result.resource_status IS
	'Status of what was made, as Stripe told it with the outcome, such as succeeded; kept for ever; or NULL';

COMMENT ON TABLE idempotency.idempotency_keys IS
	'Requests that the API received, and their results; change it through the functions only';
COMMENT ON COLUMN idempotency.idempotency_keys.token IS 'Token of the last claim';
COMMENT ON COLUMN idempotency.idempotency_keys.claimed_at IS 'When the key was claimed last';
COMMENT ON COLUMN idempotency.idempotency_keys.lease_expires_at IS
	'Until when an unfinished key is held; without a lease NULL, or when it was released with its request kept; '
	'NULL once recorded';
COMMENT ON COLUMN idempotency.idempotency_keys.recorded_at IS 'When the result was recorded, NULL before';
COMMENT ON COLUMN idempotency.idempotency_keys.expires_at IS
	'Until when the result is replayed, after which the key counts as absent; NULL until recorded';
COMMENT ON COLUMN idempotency.idempotency_keys.lease IS
	'For how long it was claimed or extended last; NULL without a lease, and once recorded';
COMMENT ON COLUMN idempotency.idempotency_keys.ttl IS
	'Time to live that claim() asked for; NULL if none, and once recorded';
COMMENT ON COLUMN idempotency.idempotency_keys.attempt IS 'How often the key was claimed, from 1';
COMMENT ON COLUMN idempotency.idempotency_keys.http_status IS 'Recorded status, NULL before';
COMMENT ON COLUMN idempotency.idempotency_keys.scope IS 'Tenant or user that the key belongs to';
COMMENT ON COLUMN idempotency.idempotency_keys.key IS 'The client''s Idempotency-Key';
COMMENT ON COLUMN idempotency.idempotency_keys.fingerprint IS
	'Fingerprint of the first request known, keyed with the namespace; NULL if none was given';
COMMENT ON COLUMN idempotency.idempotency_keys.recovery_point IS
	'Last checkpoint of an unfinished key, or NULL';
COMMENT ON COLUMN idempotency.idempotency_keys.recovery_data IS 'What was left with that checkpoint, or NULL';
COMMENT ON COLUMN idempotency.idempotency_keys.response IS 'Recorded response as jsonb, or NULL';
COMMENT ON COLUMN idempotency.idempotency_keys.response_headers IS 'Recorded headers, or NULL';
COMMENT ON COLUMN idempotency.idempotency_keys.response_body IS 'Recorded body, or NULL';

COMMENT ON TABLE idempotency.stripe_idempotency_keys IS
	'Calls sent to Stripe, one row an operation, never deleted; change it through the functions only';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.token IS 'Token of the last claim';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.created_at IS 'When the operation was claimed first';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.claimed_at IS 'When it was claimed last';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.lease_expires_at IS
	'Until when an operation in progress is held, otherwise NULL';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.first_sent_at IS
	'When this generation may have been sent first: Stripe keeps its key for 24 hours from then; '
	'NULL where it never was';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.recorded_at IS
	'When the outcome of the last attempt was recorded, or NULL';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.lease IS
	'For how long it was claimed or extended last, or NULL';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.attempt IS
	'How often this generation was claimed';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.generation IS
	'1, and one more for each stripe_reopen(); each has a key of its own';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.http_status IS
	'Status of Stripe''s last recorded answer, or NULL';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.outcome IS 'What Stripe did with the call';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.uncertain IS
	'Did an attempt of this generation end without a definitive answer?';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.livemode IS 'Stripe''s livemode as recorded, or NULL';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.account IS 'Stripe account, '''' for one''s own';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.operation_type IS 'What the call does, such as payment';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.operation_id IS 'Id of the operation within its type';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.idempotency_key IS
	'Idempotency-Key of the current generation: once stored it is read, never derived again';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.resource_id IS 'Stripe''s id of what was made, or NULL';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.resource_type IS
	'Its type, such as payment_intent, or NULL';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.request_id IS 'Stripe''s Request-Id, or NULL';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.fingerprint IS
	'Fingerprint of the request without what idempotency.stripe_compare_ignore names, or NULL';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.past_tokens IS
	'Tokens of earlier attempts of this generation: they used the same key, so a late answer of theirs counts';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.request IS
	'The request as first claimed, for whoever has to send it again; or NULL';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.response IS
	'Stripe''s last recorded answer; NULL also where it was settled without, was too large, or is not kept any more';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.error IS 'The error object of that answer, or NULL';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.history IS
	'Earlier generations, oldest first, each as stripe_reopen() found it, or NULL';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.method IS
	'Method of a call that the database sends, as first sent; NULL where an application sends';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.path IS 'Its path with the query string, likewise';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.api_version IS 'Its Stripe-Version, likewise';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.body IS
	'Its exact bytes, for whoever has to send them again, likewise';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.caller_life IS
	'Of a call in flight: the server''s life in which it is made, otherwise NULL';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.caller_vxid IS
	'Of a call in flight: the virtual transaction that makes it, otherwise NULL';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.callers IS
	'Transactions that called it or were given its result, of which none is known to have committed; '
	'empty: all have rolled back; NULL: one has committed, or has written the row itself';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.callers_system IS
	'Database system that those transaction ids belong to';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.settled IS
	'Who settled it, when, by which note or evidence, and what it was before; or NULL';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.acknowledged IS
	'Who acknowledged an orphan, when and with which note, or NULL';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.reconciled IS
	'What stripe_reconcile() has asked last without settling it, when, and what it has found, or NULL';
COMMENT ON COLUMN idempotency.stripe_idempotency_keys.resource_status IS
	'Status of what was made, as Stripe told it with the outcome, such as succeeded; kept for ever; or NULL';

COMMENT ON TABLE idempotency.stripe_webhook_events IS
	'Events that Stripe has sent, one row an event and consumer; change it through the functions only';
COMMENT ON COLUMN idempotency.stripe_webhook_events.token IS 'Token of the last claim; of nobody before the first';
COMMENT ON COLUMN idempotency.stripe_webhook_events.received_at IS 'When it was received first';
COMMENT ON COLUMN idempotency.stripe_webhook_events.claimed_at IS 'When it was claimed last, or NULL';
COMMENT ON COLUMN idempotency.stripe_webhook_events.lease_expires_at IS
	'Until when it is held by its claimant; NULL where it was claimed without a lease, and once recorded';
COMMENT ON COLUMN idempotency.stripe_webhook_events.processed_at IS
	'When success or failure of the last attempt was recorded, NULL before';
COMMENT ON COLUMN idempotency.stripe_webhook_events.created IS 'When Stripe made the event, to the second';
COMMENT ON COLUMN idempotency.stripe_webhook_events.lease IS
	'For how long it was claimed; NULL without a lease, and once recorded';
COMMENT ON COLUMN idempotency.stripe_webhook_events.attempts IS 'How often it was claimed';
COMMENT ON COLUMN idempotency.stripe_webhook_events.success IS
	'true: processed, final; false: failed, may be claimed again; NULL: neither yet';
COMMENT ON COLUMN idempotency.stripe_webhook_events.livemode IS 'Stripe''s livemode';
COMMENT ON COLUMN idempotency.stripe_webhook_events.order_id IS
	'As recorded, otherwise order_id of the object''s metadata where that is a UUID';
COMMENT ON COLUMN idempotency.stripe_webhook_events.correlation_id IS
	'As recorded, otherwise correlation_id of the object''s metadata where that is a UUID';
COMMENT ON COLUMN idempotency.stripe_webhook_events.account IS 'Connected account, '''' for one''s own';
COMMENT ON COLUMN idempotency.stripe_webhook_events.stripe_event_id IS 'Stripe''s id of the event';
COMMENT ON COLUMN idempotency.stripe_webhook_events.consumer IS
	'Who processes it; each consumer has a row of its own';
COMMENT ON COLUMN idempotency.stripe_webhook_events.event_type IS 'Stripe''s type, such as payment_intent.succeeded';
COMMENT ON COLUMN idempotency.stripe_webhook_events.api_version IS
	'Version of the API that it is written in, or NULL';
COMMENT ON COLUMN idempotency.stripe_webhook_events.object_type IS 'Type of what it is about, or NULL';
COMMENT ON COLUMN idempotency.stripe_webhook_events.object_id IS 'Stripe''s id of what it is about, or NULL';
COMMENT ON COLUMN idempotency.stripe_webhook_events.request_id IS
	'Stripe''s Request-Id of the call that caused it, or NULL';
COMMENT ON COLUMN idempotency.stripe_webhook_events.idempotency_key IS
	'Idempotency-Key of the call that caused it, or NULL';
COMMENT ON COLUMN idempotency.stripe_webhook_events.reference IS
	'As recorded, otherwise client_reference_id of the object or reference of its metadata';
COMMENT ON COLUMN idempotency.stripe_webhook_events.checkout_session_id IS
	'Id of the object if it is a Checkout session, otherwise checkout_session_id of its metadata';
COMMENT ON COLUMN idempotency.stripe_webhook_events.error_message IS 'As recorded by the last attempt, or NULL';
COMMENT ON COLUMN idempotency.stripe_webhook_events.pending_key IS
	'Key of a call that the event may settle as soon as that can be seen or has lapsed, otherwise NULL';
COMMENT ON COLUMN idempotency.stripe_webhook_events.payload_snapshot IS
	'The body as jsonb; see idempotency.webhook_payload';
COMMENT ON COLUMN idempotency.stripe_webhook_events.payload IS
	'The body''s bytes as they were signed; see idempotency.webhook_payload';
COMMENT ON COLUMN idempotency.stripe_webhook_events.next_attempt_at IS
	'When stripe_webhook_next() may hand it out (again): longer after each failure; '
	'infinity: it is dead, idempotency.webhook_max_attempts have failed';
COMMENT ON COLUMN idempotency.stripe_webhook_events.reclaimed IS
	'Who had it run again, when, and what had come of it before: the last twenty times, or NULL';

COMMENT ON TABLE idempotency.namespace IS
	'Secrets that keys, operation UUIDs and fingerprints are derived from; in_force says which of them is';
COMMENT ON COLUMN idempotency.namespace.value IS '32 random bytes; whoever reads them can derive every key';
COMMENT ON COLUMN idempotency.namespace.system_identifier IS 'Database system that it was made in';
COMMENT ON COLUMN idempotency.namespace.database IS 'OID of the database that it was made in';
COMMENT ON COLUMN idempotency.namespace.created_at IS 'When it was made';
COMMENT ON COLUMN idempotency.namespace.retired_at IS
	'When stripe_namespace(''new'') replaced it, or NULL; its fingerprints are compared all the same';
COMMENT ON COLUMN idempotency.namespace.in_force IS
	'Are keys derived from it? Decided when the row comes, by CREATE EXTENSION, a restore or replication: '
	'one that was in force where it comes from takes the place of one that was made here';
COMMENT ON COLUMN idempotency.namespace.carried IS
	'Did it come from another database, by a restore or replication?';

COMMENT ON TABLE idempotency.pending_notices IS
	'What prepared transactions have to NOTIFY when they are committed; empty otherwise';
COMMENT ON COLUMN idempotency.pending_notices.prepared_at IS 'When the transaction was prepared';
COMMENT ON COLUMN idempotency.pending_notices.number IS 'Which of the transaction''s notices it is, from 0';
COMMENT ON COLUMN idempotency.pending_notices.channel IS 'Channel to notify';
COMMENT ON COLUMN idempotency.pending_notices.payload IS 'Text to send there';

COMMENT ON VIEW idempotency.open_claims IS
	'Claims neither recorded nor released, lapsed ones first, without any bodies';
COMMENT ON COLUMN idempotency.open_claims.ledger IS 'request or stripe';
COMMENT ON COLUMN idempotency.open_claims.scope IS 'Of a request: tenant or user that the key belongs to';
COMMENT ON COLUMN idempotency.open_claims.key IS 'Of a request: the client''s Idempotency-Key';
COMMENT ON COLUMN idempotency.open_claims.account IS 'Of a call to Stripe: its account';
COMMENT ON COLUMN idempotency.open_claims.operation_type IS 'Of a call to Stripe: what it does';
COMMENT ON COLUMN idempotency.open_claims.operation_id IS 'Of a call to Stripe: id within its type';
COMMENT ON COLUMN idempotency.open_claims.attempt IS 'How often it was claimed';
COMMENT ON COLUMN idempotency.open_claims.claimed_at IS 'When it was claimed last';
COMMENT ON COLUMN idempotency.open_claims.lease_expires_at IS 'Until when it is held, or NULL without a lease';
COMMENT ON COLUMN idempotency.open_claims.lapsed IS 'Is it free to be claimed again?';
COMMENT ON COLUMN idempotency.open_claims.recovery_point IS 'Of a request: its last checkpoint, or NULL';
COMMENT ON COLUMN idempotency.open_claims.next_step IS 'The statement to type';

COMMENT ON VIEW idempotency.stripe_webhook_pending IS
	'Events that are not processed, the one that waits longest first, without any bodies';
COMMENT ON COLUMN idempotency.stripe_webhook_pending.account IS 'Connected account, '''' for one''s own';
COMMENT ON COLUMN idempotency.stripe_webhook_pending.stripe_event_id IS 'Stripe''s id of the event';
COMMENT ON COLUMN idempotency.stripe_webhook_pending.consumer IS 'Who processes it';
COMMENT ON COLUMN idempotency.stripe_webhook_pending.event_type IS 'Stripe''s type';
COMMENT ON COLUMN idempotency.stripe_webhook_pending.object_id IS 'What it is about, or NULL';
COMMENT ON COLUMN idempotency.stripe_webhook_pending.state IS
	'received: nobody had it yet; claimed: somebody is at it; lapsed: and did not finish; failed: recorded so; '
	'dead: as often as idempotency.webhook_max_attempts says, and not handed out any more';
COMMENT ON COLUMN idempotency.stripe_webhook_pending.attempts IS 'How often it was claimed';
COMMENT ON COLUMN idempotency.stripe_webhook_pending.received_at IS 'When it was received first';
COMMENT ON COLUMN idempotency.stripe_webhook_pending.claimed_at IS 'When it was claimed last, or NULL';
COMMENT ON COLUMN idempotency.stripe_webhook_pending.lease_expires_at IS 'Until when it is held, or NULL';
COMMENT ON COLUMN idempotency.stripe_webhook_pending.last_error IS 'What the last attempt recorded, or NULL';
COMMENT ON COLUMN idempotency.stripe_webhook_pending.next_step IS 'The statement to type';
COMMENT ON COLUMN idempotency.stripe_webhook_pending.next_attempt_at IS
	'When stripe_webhook_next() may hand it out; infinity: never, unless it is revived';
COMMENT ON VIEW idempotency.workers IS
	'Removal of expired rows in the background: this database, '
	'and for members of pg_read_all_stats the others, too';
COMMENT ON COLUMN idempotency.workers.database IS 'Name of the database';
COMMENT ON COLUMN idempotency.workers.status IS
	'not preloaded: no worker runs; standby: none until promotion; unknown: nobody has looked yet; '
	'waiting: the first run comes; running; idle: done until next_run; rows refused: done but for these; '
	'failing: see last_error; off: idempotency.expiry; read only: default_transaction_read_only; '
	'no slot: of max_worker_processes; no launcher: nor for the process that starts workers; '
	'no connections: the database takes none; '
	'stopped: idempotency.max_workers is 0';
COMMENT ON COLUMN idempotency.workers.pid IS 'Process of the worker that runs now, or NULL';
COMMENT ON COLUMN idempotency.workers.last_run IS 'When a worker ended last, or NULL';
COMMENT ON COLUMN idempotency.workers.removed IS
	'Rows removed, or stripped of their bodies, since the server started';
COMMENT ON COLUMN idempotency.workers.refused IS
	'Rows that raised an error when they were last due, and so are still there';
COMMENT ON COLUMN idempotency.workers.oldest_expired IS
	'Since when the oldest row was due that the last run left: locked, refused or not reached yet; '
	'NULL if there is none';
COMMENT ON COLUMN idempotency.workers.lag IS 'How long ago that is';
COMMENT ON COLUMN idempotency.workers.last_error IS 'What went wrong last, or NULL; also of a run long ago';
COMMENT ON COLUMN idempotency.workers.last_error_at IS 'When that was';
COMMENT ON COLUMN idempotency.workers.next_run IS 'When the next worker is due, or NULL';
COMMENT ON COLUMN idempotency.workers.next_step IS 'The statement to type; NULL where all is well';

COMMENT ON VIEW idempotency.stripe_unknown IS
	'Calls to Stripe of which it is not known whether Stripe has executed them, oldest first, without any bodies';
COMMENT ON COLUMN idempotency.stripe_unknown.account IS 'Stripe account, '''' for one''s own';
COMMENT ON COLUMN idempotency.stripe_unknown.operation_type IS 'What the call does, such as payment';
COMMENT ON COLUMN idempotency.stripe_unknown.operation_id IS 'Id of the operation within its type';
COMMENT ON COLUMN idempotency.stripe_unknown.reason IS
	'no definitive answer, Stripe knows the key from another request, caller is gone, or lease has lapsed';
COMMENT ON COLUMN idempotency.stripe_unknown.idempotency_key IS 'Idempotency-Key of the current generation';
COMMENT ON COLUMN idempotency.stripe_unknown.generation IS '1, and one more for each stripe_reopen()';
COMMENT ON COLUMN idempotency.stripe_unknown.attempt IS 'How often this generation was claimed';
COMMENT ON COLUMN idempotency.stripe_unknown.http_status IS 'Status of Stripe''s last recorded answer, or NULL';
COMMENT ON COLUMN idempotency.stripe_unknown.resource_id IS 'Stripe''s id of what was made, or NULL';
COMMENT ON COLUMN idempotency.stripe_unknown.request_id IS 'Stripe''s Request-Id, or NULL';
COMMENT ON COLUMN idempotency.stripe_unknown.livemode IS 'Stripe''s livemode, or NULL';
COMMENT ON COLUMN idempotency.stripe_unknown.first_sent_at IS 'When this generation may have been sent first';
COMMENT ON COLUMN idempotency.stripe_unknown.claimed_at IS 'When it was claimed last';
COMMENT ON COLUMN idempotency.stripe_unknown.recorded_at IS 'When an outcome was recorded last, or NULL';
COMMENT ON COLUMN idempotency.stripe_unknown.reconciled_at IS
	'When stripe_reconcile() has asked Stripe about it last, or NULL';
COMMENT ON COLUMN idempotency.stripe_unknown.next_step IS
	'The statement to type: a retry, then asking Stripe, then what a person has found out';

COMMENT ON VIEW idempotency.stripe_orphans IS
	'What Stripe has done, or may have, for transactions that never committed, oldest first';
COMMENT ON COLUMN idempotency.stripe_orphans.account IS 'Stripe account, '''' for one''s own';
COMMENT ON COLUMN idempotency.stripe_orphans.operation_type IS 'What the call does, such as payment';
COMMENT ON COLUMN idempotency.stripe_orphans.operation_id IS 'Id of the operation within its type';
COMMENT ON COLUMN idempotency.stripe_orphans.outcome IS 'completed or unknown';
COMMENT ON COLUMN idempotency.stripe_orphans.fate IS
	'Of the transactions that called it or were given its result: rolled back, '
	'or not known, after a restore elsewhere';
COMMENT ON COLUMN idempotency.stripe_orphans.resource_id IS 'Stripe''s id of what was made, or NULL';
COMMENT ON COLUMN idempotency.stripe_orphans.resource_type IS 'Its type, such as payment_intent, or NULL';
COMMENT ON COLUMN idempotency.stripe_orphans.livemode IS 'Stripe''s livemode, or NULL';
COMMENT ON COLUMN idempotency.stripe_orphans.claimed_at IS 'When it was claimed last';
COMMENT ON COLUMN idempotency.stripe_orphans.recorded_at IS 'When its outcome was recorded, or NULL';
COMMENT ON COLUMN idempotency.stripe_orphans.next_step IS
	'What to do: run it again, which adopts it; or, once it is undone or booked, the statement to type';

COMMENT ON FUNCTION idempotency.claim(text, text, jsonb, interval, interval, boolean) IS
	'Claims a key: says whether the caller runs the operation, or what came of it. '
	'Call it in FROM; (claim(...)).* would claim once a column. '
	'key: 1 to 255 characters, no control characters; scope: likewise, may be empty, from the session; '
	'request: the whole request, compared by value, NULL: not compared; '
	'ttl: how long a result is replayed (default idempotency.key_ttl, 24 h); '
	'lease: how long the claim outlives COMMIT (NULL: it must be recorded or released before COMMIT, or IK005); '
	'wait (default true): wait for an uncommitted twin, at most idempotency.wait_timeout, 10 s. '
	'Raises IK003 for a bad argument';
COMMENT ON FUNCTION idempotency.record(text, text, bigint, jsonb, integer, jsonb, bytea, interval) IS
	'Records the result of a claim, success or failure, and returns when it expires. '
	'response: as jsonb; response_status: 100 to 599 (default 200); response_headers: an object; '
	'response_body: any bytes; ttl: how long it is replayed (default the claim''s, then idempotency.key_ttl, 24 h). '
	'Recording the same again changes nothing. Raises IK001 for a token that does not hold the key, '
	'IK002 where another result is recorded, IK003 for a bad argument, '
	'IK007 over idempotency.max_response_size';
COMMENT ON FUNCTION idempotency.checkpoint(text, text, bigint, text, jsonb, interval) IS
	'Keeps a recovery point, which a successor is handed, and renews the lease; returns until when it is held. '
	'recovery_point: 1 to 255 characters; recovery_data: anything; '
	'lease: default the one given last, none if there was none. '
	'Raises IK001, IK002 if recorded, IK003, IK007 over idempotency.max_response_size';
COMMENT ON FUNCTION idempotency.extend(text, text, bigint, interval) IS
	'Renews the lease of a claim and returns until when it is held. '
	'lease: from now on (default the one given last). '
	'Raises IK001, IK002 if recorded, IK003, also where there is no lease to repeat';
COMMENT ON FUNCTION idempotency.release(text, text, bigint, boolean) IS
	'Gives a claim up and returns true: the key is absent again, its checkpoint forgotten. '
	'keep (default false): the claim lapses at once, and keeps request, attempt and checkpoint, '
	'for a result that is not known yet. '
	'Raises IK001, IK002 if recorded, IK003';
COMMENT ON FUNCTION idempotency.lookup(text, text) IS
	'Shows a key as the query''s snapshot sees it, NULL where it is absent or expired. '
	'For display: only claim() decides. Raises IK003 for a bad argument';
COMMENT ON FUNCTION idempotency.operation_uuid(text, text) IS
	'Derives a UUID from scope and key: the same on every retry, after rollback, crash and restore. '
	'Raises IK003 for a bad argument';

COMMENT ON FUNCTION idempotency.stripe_idempotency_key(text, text, text) IS
	'Returns the Idempotency-Key that an operation has or will have. '
	'operation_type and operation_id: printable ASCII, 217 characters together; '
	'account: printable ASCII without spaces, default '''', one''s own. '
	'Raises IK003 for a bad argument, IK009 in a copied database that has not decided on its namespace';
COMMENT ON FUNCTION idempotency.stripe_claim(text, text, jsonb, text, interval) IS
	'Claims a call to Stripe: says whether the caller sends it, with which key and request, or what came of it. '
	'Call it in FROM. '
	'request: what is sent, compared without idempotency.stripe_compare_ignore, NULL: not compared; '
	'account: default ''''; lease: how long the caller holds it (default idempotency.stripe_lease, 5 min). '
	'Raises IK003, IK006 where this transaction has written the row, and inside a transaction block '
	'without preloaded library unless idempotency.stripe_ledger is transaction, IK008 without a recorder, '
	'IK007 over idempotency.max_response_size, IK009';
COMMENT ON FUNCTION idempotency.stripe_record(text, text, bigint, text, jsonb, integer, text, text) IS
	'Records Stripe''s answer and returns the outcome. '
	'resource_id: what was made (default the response''s id); response: the body as Stripe sent it, errors included; '
	'http_status: 100 to 599, NULL: completed where there is a resource id, otherwise unknown; '
	'a success without an object or id (204 to a DELETE aside) is unknown, and so is a refusal '
	'without an error object of one of Stripe''s types (API v2: any type or code): something on the way may have made it; '
	'request_id: Stripe''s Request-Id; account: default ''''. '
	'A late token of the same generation may still record. Raises IK001 for a token of neither, '
	'IK002 where another result is recorded, IK003, IK007 over idempotency.max_response_size, IK009';
COMMENT ON FUNCTION idempotency.stripe_release(text, text, bigint, text) IS
	'Gives a claim up because nothing was sent: free to be claimed again, with the same key. '
	'account: default ''''. Raises IK001, IK002 if recorded, IK003, IK009';
COMMENT ON FUNCTION idempotency.stripe_extend(text, text, bigint, interval, text) IS
	'Renews the lease of a claim and returns until when it is held. '
	'lease: from now on (default the one given last); account: default ''''. '
	'Raises IK001, IK002 if recorded, IK003, IK009';
COMMENT ON FUNCTION idempotency.stripe_reopen(text, text, text, boolean, integer) IS
	'Starts an operation''s next generation and returns its new key: for another request than the one that failed, '
	'also where a refused one (400) was corrected. '
	'account: default ''''; force (default false): also where the outcome is not known, '
	'which may charge a second time; from_generation: does nothing where that one is reopened already. '
	'Raises IK002 for an operation completed, in progress or, without force, unknown; '
	'IK003, also for one never claimed; IK006 and IK008 as stripe_claim(); IK009';
COMMENT ON FUNCTION idempotency.stripe_lookup(text, text, text) IS
	'Shows an operation as the query''s snapshot sees it, NULL where it was never claimed. '
	'account: default ''''. For display: only stripe_claim() decides. Raises IK003, IK009';
COMMENT ON FUNCTION idempotency.stripe_call(text, text, text, text, jsonb, text, interval) IS
	'Calls Stripe once for an operation, however often it is called, and whatever becomes of the transaction. '
	'Call it in FROM; (stripe_call(...)).* would call once a column. '
	'operation_type and operation_id: as in stripe_claim(), must exist before the transaction; '
	'method: POST or DELETE; path: /v1/... or /v2/...; params: become the body (default {}); '
	'account: default ''''; timeout: of the whole call (default idempotency.stripe_timeout, 30 s). '
	'What Stripe or the network does is a result. Raises IK002 for an operation begun in the other mode, '
	'IK003, IK006 where this transaction has changed the operation or nothing can commit for it, '
	'IK007, IK008, IK009, IK010, 42501 for a path that idempotency.stripe_allowed_paths does not allow, '
	'F0000 without a usable API key';
COMMENT ON FUNCTION idempotency.stripe_retry(text, text, text, interval) IS
	'Sends what is stored of an operation again, with the same key, where that may settle it; '
	'otherwise says what is known, as stripe_call(). account: default ''''; '
	'timeout: default idempotency.stripe_timeout, 30 s. '
	'Raises IK003 also for an operation never claimed or sent by an application, otherwise as stripe_call()';
COMMENT ON FUNCTION idempotency.stripe_get(text, jsonb, text, interval) IS
	'Reads from Stripe''s API; nothing is recorded. Call it in FROM. '
	'path: /v1/... or /v2/...; params: become the query string (default {}); account: default ''''; '
	'timeout: of the whole call (default idempotency.stripe_timeout, 30 s). '
	'What Stripe or the network does is a result. Raises IK003, IK007, IK009, '
	'IK010 where the library idempotency_stripe is not installed, '
	'42501 for a path that idempotency.stripe_allowed_paths does not allow, F0000 without a usable API key';
COMMENT ON FUNCTION idempotency.stripe_reconcile(text, text, text, integer) IS
	'Asks Stripe what came of operations whose outcome is not known, those asked about longest ago first, '
	'and settles what is found, as stripe_settle(). Call it in FROM. Only reads there; commits with the caller. '
	'operation_type: which (default all); operation_id: which one of that type (default all); account: default ''''; '
	'max_requests: how many requests to Stripe, 1 to 1000 (default 20). '
	'What Stripe or the network does is evidence. Raises IK003, also for one never claimed, IK009, '
	'IK010 where the library idempotency_stripe is not installed, F0000 without a usable API key';
COMMENT ON FUNCTION idempotency.stripe_settle(text, text, idempotency.outcome, text, text, text, jsonb) IS
	'Settles an operation whose outcome is not known, by somebody who has found out; keeps who, when and note, '
	'and sends NOTIFY idempotency_settled. '
	'outcome: completed, failed or not_executed; resource_id: what Stripe has made; note: how you know; '
	'account: default ''''; response: the object that was made, or {"error": ...} of a refusal, as Stripe shows it. '
	'Raises IK002 where another outcome is recorded, it is in progress or the response is of the other mode, '
	'IK003, also for one never claimed and for a response that contradicts outcome or resource_id, '
	'IK007 over idempotency.max_response_size, IK009';
COMMENT ON FUNCTION idempotency.stripe_acknowledge(text, text, text, text) IS
	'Takes an operation off the list stripe_orphans; keeps who, when and note. '
	'note: what was done about it; account: default ''''. '
	'Raises IK002 for one that is no orphan, IK003, also for one never claimed, IK009';
COMMENT ON FUNCTION idempotency.stripe_has_lapsed(timestamptz, bigint, text) IS
	'Does nobody hold a call to Stripe any more that is in progress?  For the views. '
	'lease_expires_at, server_life and virtual_xid: as in stripe_idempotency_keys';
COMMENT ON FUNCTION idempotency.stripe_resend_may_settle(idempotency.outcome, timestamptz, text, integer, jsonb) IS
	'Is it still time to send a call to Stripe again, and might that settle it?  For the views. '
	'outcome, first_sent_at, path (or that of request), http_status and response: as in stripe_idempotency_keys';
COMMENT ON FUNCTION idempotency.stripe_callers_fate(xid8[], bigint) IS
	'What became of the transactions behind a call to Stripe: committed, open, rolled back or not known. '
	'For the views. callers and system_identifier: as in stripe_idempotency_keys';
COMMENT ON FUNCTION idempotency.stripe_namespace(text) IS
	'Decides once in a copied database. choice: keep, where the copy replaces its original, '
	'or new, where both live on. Raises IK003, IK009 where it is decided already';
COMMENT ON FUNCTION idempotency.namespace_comes() IS
	'Trigger of the table namespace: decides whether a row that comes is in force, and writes it down in in_force';
COMMENT ON TRIGGER namespace_comes ON idempotency.namespace IS
	'Decides whether a row that comes is in force; also while rows are restored or replicated';

COMMENT ON FUNCTION idempotency.stripe_webhook_verify(bytea, text, text[], interval) IS
	'Says what is wrong with the signature of a webhook, for diagnosis: valid, no_signature, '
	'malformed_header, no_matching_signature, too_old or no_secret. '
	'payload: the body''s bytes as they came; signature: the header Stripe-Signature; '
	'secrets: of the endpoints (default those of idempotency.webhook_secret_file, otherwise of the postmaster''s '
	'environment variable IDEMPOTENCY_WEBHOOK_SECRET); '
	'tolerance: how old it may be (default idempotency.webhook_tolerance, 300 s). Raises IK003';
COMMENT ON FUNCTION idempotency.stripe_webhook_verify(text, text, text[], interval) IS
	'The same for a body that is text: its bytes in UTF-8 are what is verified. payload: the body as it came, '
	'or its bytes as PostgreSQL writes a bytea, \x...; everything else as for the function of bytea';
COMMENT ON FUNCTION idempotency.stripe_webhook_is_valid(bytea, text, text[], interval) IS
	'Is the signature of a webhook valid?  Never NULL. Arguments as for stripe_webhook_verify(). Raises IK003';
COMMENT ON FUNCTION idempotency.stripe_webhook_is_valid(text, text, text[], interval) IS
	'The same for a body that is text: its bytes in UTF-8 are what is verified. payload: the body as it came, '
	'or its bytes as PostgreSQL writes a bytea, \x...; everything else as for the function of bytea';
COMMENT ON FUNCTION idempotency.stripe_webhook_claim(bytea, text, text[], interval, interval, boolean, text) IS
	'Verifies an event and claims it: says whether the caller processes it now, or somebody has. '
	'Call it in FROM. payload, signature, secrets, tolerance: as for stripe_webhook_verify(); '
	'lease: how long the claim outlives COMMIT (NULL: it must be recorded before COMMIT, or IK005); '
	'wait (default true): wait for an uncommitted twin, at most idempotency.wait_timeout, 10 s; '
	'consumer: who processes it (default ''''). Raises IK003, IK004 for a signature or body that is refused';
COMMENT ON FUNCTION idempotency.stripe_webhook_claim(text, text, text[], interval, interval, boolean, text) IS
	'The same for a body that is text: its bytes in UTF-8 are what is verified. payload: the body as it came, '
	'or its bytes as PostgreSQL writes a bytea, \x...; everything else as for the function of bytea';
COMMENT ON FUNCTION idempotency.stripe_webhook_record(text, bigint, boolean, text, text, uuid, uuid, text, text) IS
	'Records that a claimed event is processed, which is final, or that this has failed, so that it is due again later. '
	'success: default true unless there is an error_message; '
	'reference, order_id, correlation_id: kept beside the event; account, consumer: as claimed (default ''''). '
	'Recording the same again changes nothing. Raises IK001 for a token that does not hold the event, '
	'IK002 where another result is recorded, IK003';
COMMENT ON FUNCTION idempotency.stripe_webhook_receive(bytea, text, text[], interval, text) IS
	'Verifies an event and keeps it for stripe_webhook_next(): answer 200 and work later. '
	'What it stores sends NOTIFY idempotency_event, unless idempotency.webhook_notify is off. '
	'payload, signature, secrets, tolerance: as for stripe_webhook_verify(); '
	'consumer: who processes it (default ''''). Raises IK003, IK004 for a signature or body that is refused, '
	'55P03 where another transaction has the event for longer than idempotency.wait_timeout';
COMMENT ON FUNCTION idempotency.stripe_webhook_receive(text, text, text[], interval, text) IS
	'The same for a body that is text: its bytes in UTF-8 are what is verified. payload: the body as it came, '
	'or its bytes as PostgreSQL writes a bytea, \x...; everything else as for the function of bytea';
COMMENT ON FUNCTION idempotency.stripe_webhook_next(interval, text) IS
	'Claims the event that waits longest of those that nobody has claimed before, otherwise of those that have failed '
	'or lapsed and are due again, but none of an object of which another event is claimed; no row if there is none. '
	'lease: how long the claim outlives COMMIT (NULL: it must be recorded before COMMIT, or IK005); '
	'consumer: whose events (default ''''). Raises IK003';
COMMENT ON FUNCTION idempotency.stripe_webhook_reclaim(text, text, interval, text) IS
	'Claims an event that was received before, from what is stored, however old its signature is. '
	'account: default ''''; '
	'lease: how long the claim outlives COMMIT (NULL: it must be recorded before COMMIT, or IK005); '
	'consumer: default ''''. Raises IK003, also for an event that is not known';
COMMENT ON FUNCTION idempotency.stripe_webhook_reclaim(text, boolean, interval, text, text) IS
	'For operators: again => true claims an event whatever came of it, also one that is processed or dead, '
	'begins the count of its attempts anew and notes in "reclaimed" who has done so. '
	'lease, account, consumer: as above. '
	'Raises IK002 where it is processed and what it said is not kept, IK003, also for an event that is not known';
COMMENT ON FUNCTION idempotency.expire(integer) IS
	'Does by hand what the background workers do: removes rows whose time has come, in one batch a ledger, '
	'and returns how many there were; call it until it returns 0. '
	'max_rows: of each ledger, 1 to 100000 (default idempotency.expiry_batch_size, 1000). '
	'Rows that raise an error are skipped with a WARNING. Raises IK003 for a bad argument';
COMMENT ON FUNCTION idempotency.worker_states() IS
	'What the view idempotency.workers shows';

COMMENT ON FUNCTION idempotency.grant_role(regrole, text) IS
	'Grants a role what it needs, and no more; run it as the owner of the extension''s objects. '
	'kind: application, webhook, stripe_caller, observer or operator. Raises IK003 for a bad argument, 42501 for anybody else';

--
-- Privileges: nothing for PUBLIC, nor for whom default privileges name;
-- idempotency.grant_role() gives what a role needs
--

CREATE FUNCTION idempotency.revoke_all() RETURNS void
AS 'MODULE_PATHNAME', 'idempotency_revoke_all' LANGUAGE C;
SELECT idempotency.revoke_all();
DROP FUNCTION idempotency.revoke_all();

--
-- Wake the launcher of the background workers once this has committed
--

CREATE FUNCTION idempotency.created() RETURNS void
AS 'MODULE_PATHNAME', 'idempotency_created' LANGUAGE C;
SELECT idempotency.created();
DROP FUNCTION idempotency.created();
