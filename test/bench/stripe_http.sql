/*
 * test/bench/stripe_http.sql
 *
 * The same request by pgsql-http, where it is installed: nothing is recorded.
 */
CREATE EXTENSION http;

CREATE PROCEDURE bench.http_calls(calls integer)
LANGUAGE plpgsql AS $$
DECLARE
	url text := pg_catalog.current_setting('idempotency.stripe_api_base') || '/v1/payment_intents';
	status integer;
	started timestamptz;
	ms float8[] := '{}';
BEGIN
	-- it keeps connections only with this option
	PERFORM http_set_curlopt('CURLOPT_TCP_KEEPALIVE', '1');
	FOR i IN 1 .. 20 + calls LOOP
		started := pg_catalog.clock_timestamp();
		SELECT h.status INTO status
		FROM http_post(url, 'amount=2000&currency=eur&confirm=true&payment_method=pm_card_visa',
			'application/x-www-form-urlencoded') h;
		IF i > 20 THEN
			ms := ms || EXTRACT(epoch FROM pg_catalog.clock_timestamp() - started)::float8 * 1000;
		END IF;
		IF status IS DISTINCT FROM 200 THEN
			RAISE EXCEPTION 'status of call %: %', i, status;
		END IF;
		COMMIT;
	END LOOP;
	RAISE INFO '%', ms;
END
$$;
