/*
 * test/bench/stripe.sql
 *
 * Calls to Stripe, each in a transaction of its own.  The times are those of
 * the statements, measured in the session itself: what a client's way to the
 * database costs is the same whatever it calls.  The first twenty calls, which
 * connect and warm up, aren't counted.
 */
CREATE SEQUENCE bench.stripe_id;
CREATE TABLE bench.payments (
	id bigint PRIMARY KEY,
	state text NOT NULL
);

CREATE PROCEDURE bench.stripe_calls(calls integer)
LANGUAGE plpgsql AS $$
DECLARE
	id text;
	outcome text;
	started timestamptz;
	ms float8[] := '{}';
BEGIN
	FOR i IN 1 .. 20 + calls LOOP
		id := pg_catalog.nextval('bench.stripe_id');
		started := pg_catalog.clock_timestamp();
		SELECT c.outcome INTO outcome
		FROM idempotency.stripe_call('bench', id, 'POST', '/v1/payment_intents',
			'{"amount": 2000, "currency": "eur", "confirm": true, "payment_method": "pm_card_visa"}') c;
		IF i > 20 THEN
			ms := ms || EXTRACT(epoch FROM pg_catalog.clock_timestamp() - started)::float8 * 1000;
		END IF;
		IF outcome IS DISTINCT FROM 'completed' THEN
			RAISE EXCEPTION 'outcome of call %: %', i, outcome;
		END IF;
		COMMIT;
	END LOOP;
	RAISE INFO '%', ms;
END
$$;

-- what a careful person would commit before the call and after it
CREATE PROCEDURE bench.two_commits(calls integer)
LANGUAGE plpgsql AS $$
DECLARE
	n bigint;
	started timestamptz;
	ms float8[] := '{}';
BEGIN
	FOR i IN 1 .. 20 + calls LOOP
		n := pg_catalog.nextval('bench.stripe_id');
		COMMIT;
		started := pg_catalog.clock_timestamp();
		INSERT INTO bench.payments VALUES (n, 'in progress');
		COMMIT;
		UPDATE bench.payments SET state = 'completed' WHERE id = n;
		COMMIT;
		IF i > 20 THEN
			ms := ms || EXTRACT(epoch FROM pg_catalog.clock_timestamp() - started)::float8 * 1000;
		END IF;
	END LOOP;
	RAISE INFO '%', ms;
END
$$;
