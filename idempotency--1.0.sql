/* idempotency--1.0.sql */

-- complain if script is sourced in psql, rather than via CREATE EXTENSION
\echo Use "CREATE EXTENSION idempotency" to load this file. \quit

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
	livemode boolean
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
	history jsonb
);

--
-- Tables
--
-- Fixed-width columns come first, so that a row is short.  The C code knows
-- the columns by number (src/requests.c, src/stripe_keys.c): a later version
-- adds columns at the end.  No index but the primary key: every write of the
-- hot path would pay for it.
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
	PRIMARY KEY (account, operation_type, operation_id)
) WITH (fillfactor = 80, vacuum_truncate = off, toast.vacuum_truncate = off);

-- No unique key on purpose: a restore adds the dumped row beside the one that
-- CREATE EXTENSION made (src/namespace.c says which of them is in force).
CREATE TABLE idempotency.namespace (
	value bytea NOT NULL,
	system_identifier bigint NOT NULL,
	database oid NOT NULL,
	created_at timestamptz NOT NULL,
	retired_at timestamptz
) WITH (vacuum_truncate = off);

SELECT pg_catalog.pg_extension_config_dump('idempotency.idempotency_keys', '');
SELECT pg_catalog.pg_extension_config_dump('idempotency.stripe_idempotency_keys', '');
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

CREATE FUNCTION idempotency.release(key text, scope text, token bigint)
RETURNS void
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
RETURNS void
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

CREATE FUNCTION idempotency.stripe_namespace(choice text)
RETURNS void
AS 'MODULE_PATHNAME', 'idempotency_stripe_namespace'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;

--
-- Housekeeping
--

CREATE FUNCTION idempotency.grant_role(role regrole, kind text)
RETURNS void
AS 'MODULE_PATHNAME', 'idempotency_grant_role'
LANGUAGE C VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE;

CREATE VIEW idempotency.open_claims AS
SELECT c.ledger, c.scope, c.key, c.account, c.operation_type, c.operation_id,
	c.attempt, c.claimed_at, c.lease_expires_at, c.lapsed, c.recovery_point, c.next_step
FROM (
	SELECT 'request'::text AS ledger, k.scope, k.key,
		NULL::text AS account, NULL::text AS operation_type, NULL::text AS operation_id,
		k.attempt, k.claimed_at, k.lease_expires_at, l.lapsed, k.recovery_point,
		CASE WHEN l.lapsed AND k.recovery_point IS NULL
			THEN pg_catalog.format('SELECT idempotency.release(%L, %L, %s);', k.key, k.scope, k.token)
			ELSE pg_catalog.format('SELECT * FROM idempotency.lookup(%L, %L);', k.key, k.scope)
		END AS next_step
	FROM idempotency.idempotency_keys k,
		LATERAL (SELECT k.lease_expires_at IS NULL
			OR k.lease_expires_at OPERATOR(pg_catalog.<=) pg_catalog.clock_timestamp() AS lapsed) l
	WHERE k.expires_at IS NULL
	UNION ALL
	SELECT 'stripe', NULL, NULL, s.account, s.operation_type, s.operation_id,
		s.attempt, s.claimed_at, s.lease_expires_at, l.lapsed, NULL,
		pg_catalog.format('SELECT * FROM idempotency.stripe_lookup(%L, %L, %L);',
			s.operation_type, s.operation_id, s.account)
	FROM idempotency.stripe_idempotency_keys s,
		LATERAL (SELECT s.lease_expires_at IS NULL
			OR s.lease_expires_at OPERATOR(pg_catalog.<=) pg_catalog.clock_timestamp() AS lapsed) l
	WHERE s.outcome OPERATOR(pg_catalog.=) 'in_progress'::idempotency.outcome
) c
ORDER BY c.lapsed DESC, c.lease_expires_at;

-- the first namespace of this database
SELECT idempotency.stripe_namespace('new');

--
-- Privileges: nothing for PUBLIC, idempotency.grant_role() gives what a role needs
--

REVOKE ALL ON SCHEMA idempotency FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA idempotency FROM PUBLIC;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA idempotency FROM PUBLIC;
REVOKE ALL ON TYPE idempotency.verdict, idempotency.outcome, idempotency.claim_result,
	idempotency.key_info, idempotency.stripe_claim_result, idempotency.stripe_key_info FROM PUBLIC;
