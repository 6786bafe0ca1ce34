/*
 * test/bench/setup.sql
 *
 * What the benchmark compares with: tables of the same shape, and a PL/pgSQL
 * function that does the whole job.  Keys are numbers of eighteen digits, so
 * that pgbench can draw them.
 */
CREATE EXTENSION idempotency;
CREATE SCHEMA bench;

-- LIKE copies everything but the table's storage parameters
CREATE TABLE bench.by_hand (LIKE idempotency.idempotency_keys INCLUDING ALL)
	WITH (fillfactor = 80, vacuum_truncate = off, toast.vacuum_truncate = off);
CREATE TABLE bench.by_plpgsql (LIKE idempotency.idempotency_keys INCLUDING ALL)
	WITH (fillfactor = 80, vacuum_truncate = off, toast.vacuum_truncate = off);

-- the same with the index that an expiry job would want
CREATE TABLE bench.by_hand_with_index (LIKE idempotency.idempotency_keys INCLUDING ALL)
	WITH (fillfactor = 80, vacuum_truncate = off, toast.vacuum_truncate = off);
CREATE INDEX ON bench.by_hand_with_index (expires_at);

/*
 * The whole job in PL/pgSQL: arguments checked, the insert decides, a recorded
 * result is replayed, a live claim is told, a lapsed one taken over.  Names
 * are qualified instead of SET search_path, and rights are the caller's:
 * SECURITY DEFINER and SET would cost more.
 */
CREATE FUNCTION bench.claim(p_key text, p_scope text, p_lease interval,
	OUT verdict text, OUT token bigint, OUT attempt integer, OUT http_status integer,
	OUT response jsonb, OUT response_headers jsonb, OUT response_body bytea,
	OUT retry_after integer, OUT lease_expires_at timestamptz, OUT expires_at timestamptz)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
	clock timestamptz := pg_catalog.clock_timestamp();
	kept bench.by_plpgsql;
BEGIN
	IF p_key IS NULL OR p_scope IS NULL OR p_key = '' OR pg_catalog.length(p_key) > 255
		OR p_key ~ '[[:cntrl:]]' THEN
		RAISE EXCEPTION 'bad key or scope';
	END IF;

	LOOP
		claim.token := 1 + pg_catalog.floor(pg_catalog.random() * 9007199254740991);
		claim.lease_expires_at := clock + p_lease;
		INSERT INTO bench.by_plpgsql
			(scope, key, token, claimed_at, lease_expires_at, lease, attempt)
		VALUES (p_scope, p_key, claim.token, clock, claim.lease_expires_at, p_lease, 1)
		ON CONFLICT (scope, key) DO NOTHING;
		IF FOUND THEN
			claim.verdict := 'claimed';
			claim.attempt := 1;
			RETURN;
		END IF;

		SELECT * INTO kept FROM bench.by_plpgsql WHERE scope = p_scope AND key = p_key;
		CONTINUE WHEN NOT FOUND;
		clock := pg_catalog.clock_timestamp();

		IF kept.expires_at > clock THEN
			claim.verdict := 'replay';
			claim.token := NULL;
			claim.lease_expires_at := NULL;
			claim.attempt := kept.attempt;
			claim.http_status := kept.http_status;
			claim.response := kept.response;
			claim.response_headers := kept.response_headers;
			claim.response_body := kept.response_body;
			claim.expires_at := kept.expires_at;
			RETURN;
		END IF;
		IF kept.expires_at IS NULL AND kept.lease_expires_at > clock THEN
			claim.verdict := 'in_progress';
			claim.token := NULL;
			claim.lease_expires_at := NULL;
			claim.http_status := 409;
			claim.retry_after :=
				pg_catalog.ceil(EXTRACT(epoch FROM kept.lease_expires_at - clock));
			RETURN;
		END IF;

		UPDATE bench.by_plpgsql SET token = claim.token, claimed_at = clock,
			lease_expires_at = claim.lease_expires_at, lease = p_lease,
			attempt = CASE WHEN kept.expires_at IS NULL THEN attempt + 1 ELSE 1 END,
			recorded_at = NULL, expires_at = NULL, http_status = NULL,
			response = NULL, response_headers = NULL, response_body = NULL
		WHERE scope = p_scope AND key = p_key AND token = kept.token
		RETURNING attempt INTO claim.attempt;
		IF FOUND THEN
			claim.verdict := 'claimed';
			RETURN;
		END IF;
	END LOOP;
END
$$;

CREATE FUNCTION bench.record(p_key text, p_scope text, p_token bigint, p_response jsonb,
	p_status integer)
RETURNS timestamptz
LANGUAGE plpgsql AS $$
DECLARE
	expires timestamptz;
	clock timestamptz := pg_catalog.clock_timestamp();
BEGIN
	UPDATE bench.by_plpgsql SET recorded_at = clock, expires_at = clock + interval '24 hours',
		http_status = p_status, response = p_response, lease = NULL, lease_expires_at = NULL
	WHERE scope = p_scope AND key = p_key AND token = p_token AND expires_at IS NULL
	RETURNING expires_at INTO expires;
	IF NOT FOUND THEN
		RAISE EXCEPTION 'not held with this token';
	END IF;
	RETURN expires;
END
$$;

/*
 * Rows, made by the extension and the same in all tables:
 *   1000000000000xxxxx	10,000 recorded, a small response
 *   1100000000000xxxxx	2,000 recorded, of a request
 *   1200000000000xxxxx	2,000 claimed, the token is the last five digits
 *   1300000000000xxxxx	50 recorded, a response of 100 kB
 */
SELECT pg_catalog.count(*)
FROM generate_series(1, 10000) n,
	LATERAL (SELECT (100000000000000000 + n)::text AS key) k,
	LATERAL idempotency.claim(k.key, 'tenant-7') c,
	LATERAL idempotency.record(k.key, 'tenant-7', c.token,
		'{"order": 17, "status": "paid", "amount": 4200}', 201, ttl => '30 days') r;
SELECT pg_catalog.count(*)
FROM generate_series(1, 2000) n,
	LATERAL (SELECT (110000000000000000 + n)::text AS key) k,
	LATERAL idempotency.claim(k.key, 'tenant-7',
		'{"method": "POST", "path": "/orders", "body": {"cart": 12, "amount": 4200}}') c,
	LATERAL idempotency.record(k.key, 'tenant-7', c.token,
		'{"order": 17, "status": "paid", "amount": 4200}', 201, ttl => '30 days') r;
SELECT pg_catalog.count(*)
FROM generate_series(1, 2000) n,
	LATERAL (SELECT (120000000000000000 + n)::text AS key) k,
	LATERAL idempotency.claim(k.key, 'tenant-7', lease => '30 days') c;
SELECT pg_catalog.count(*)
FROM generate_series(1, 50) n,
	LATERAL (SELECT (130000000000000000 + n)::text AS key) k,
	LATERAL (SELECT pg_catalog.string_agg(pg_catalog.sha256(n::text::bytea || i::text::bytea), '') AS body
		FROM generate_series(1, 3200) i) b,
	LATERAL idempotency.claim(k.key, 'tenant-7') c,
	LATERAL idempotency.record(k.key, 'tenant-7', c.token, NULL, 200,
		'{"Content-Type": "application/pdf"}', b.body, ttl => '30 days') r;

CREATE TEMP TABLE rows AS TABLE idempotency.idempotency_keys ORDER BY scope, key;
UPDATE rows SET token = key::bigint % 100000 WHERE expires_at IS NULL;
TRUNCATE idempotency.idempotency_keys;
INSERT INTO idempotency.idempotency_keys SELECT * FROM rows ORDER BY scope, key;
INSERT INTO bench.by_hand SELECT * FROM rows ORDER BY scope, key;
INSERT INTO bench.by_plpgsql SELECT * FROM rows ORDER BY scope, key;
INSERT INTO bench.by_hand_with_index SELECT * FROM rows ORDER BY scope, key;
DROP TABLE rows;
