--
-- The shop of the demo: what an API behind a checkout button would have.
--
CREATE EXTENSION idempotency;
CREATE SCHEMA shop;

CREATE TABLE shop.orders (
	id uuid PRIMARY KEY,
	customer text NOT NULL,
	cents integer NOT NULL
);

-- one row for each time that a card was charged: nothing here prevents a second one
CREATE TABLE shop.charges (
	id bigint GENERATED ALWAYS AS IDENTITY,
	customer text NOT NULL,
	cents integer NOT NULL
);

-- what each client was told
CREATE TABLE shop.answers (
	story text NOT NULL,
	client integer NOT NULL,
	verdict text NOT NULL,
	http_status integer,
	body jsonb,
	answered_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- The card network takes its time.
CREATE FUNCTION shop.charge(customer text, cents integer)
RETURNS void
LANGUAGE sql
BEGIN ATOMIC
	SELECT pg_sleep(0.1);
	INSERT INTO shop.charges (customer, cents) VALUES (customer, cents);
END;

-- POST /checkout: one request, one transaction
CREATE FUNCTION shop.checkout(key text, customer text, cents integer,
	OUT verdict text, OUT http_status integer, OUT body jsonb)
LANGUAGE plpgsql
AS $$
DECLARE
	c idempotency.claim_result;
	order_id uuid;
BEGIN
	SELECT * INTO c FROM idempotency.claim(key, customer,
		request => jsonb_build_object('method', 'POST', 'path', '/checkout',
			'body', jsonb_build_object('cents', cents)));
	verdict := c.verdict;
	http_status := c.http_status;
	body := c.response;

	IF c.verdict = 'claimed' THEN
		-- the same on every attempt, whatever becomes of this one
		order_id := idempotency.operation_uuid(key, customer);
		INSERT INTO shop.orders VALUES (order_id, customer, cents);
		PERFORM shop.charge(customer, cents);

		http_status := 201;
		body := jsonb_build_object('order', order_id, 'cents', cents);
		PERFORM idempotency.record(key, customer, c.token, body, http_status);
	END IF;
END $$;

-- For contrast: look whether it is there, otherwise do it.
CREATE TABLE shop.naive_orders (
	id uuid DEFAULT gen_random_uuid() PRIMARY KEY,
	key text NOT NULL
);

CREATE FUNCTION shop.naive_checkout(the_key text, customer text, cents integer)
RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
	IF NOT EXISTS (SELECT FROM shop.naive_orders WHERE key = the_key) THEN
		PERFORM shop.charge(customer, cents);
		INSERT INTO shop.naive_orders (key) VALUES (the_key);
	END IF;
END $$;

-- the application's role
CREATE ROLE app LOGIN;
SELECT idempotency.grant_role('app', 'application');
SELECT idempotency.grant_role('app', 'stripe_caller');
GRANT USAGE ON SCHEMA shop TO app;
GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA shop TO app;
