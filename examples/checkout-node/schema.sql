-- What the example keeps beside the extension's ledgers.

-- stands for your login: who holds this token is that user
CREATE TABLE sessions (
    token text PRIMARY KEY,
    user_id text NOT NULL
);

-- what there is to pay; an amount doesn't change any more
CREATE TABLE carts (
    id text PRIMARY KEY,
    user_id text NOT NULL,
    amount integer NOT NULL CHECK (amount > 0)      -- in cents
);

CREATE TABLE orders (
    id uuid PRIMARY KEY,                            -- operation_uuid(key, user_id)
    user_id text NOT NULL,
    cart text NOT NULL REFERENCES carts,
    amount integer NOT NULL,
    payment_method text NOT NULL,
    state text NOT NULL DEFAULT 'new',              -- paid, declined, checking, or what Stripe says
    payment text,                                   -- Stripe's pi_...
    created_at timestamptz NOT NULL DEFAULT now()
);

INSERT INTO sessions VALUES ('session-of-ada', 'ada'), ('session-of-ben', 'ben');
INSERT INTO carts VALUES ('ada-1', 'ada', 1990), ('ada-2', 'ada', 4200), ('ben-1', 'ben', 700);

-- the role that the application logs in as
CREATE ROLE shop LOGIN;
GRANT SELECT ON sessions, carts TO shop;
GRANT SELECT, INSERT, UPDATE ON orders TO shop;
SELECT idempotency.grant_role('shop', 'application');
SELECT idempotency.grant_role('shop', 'stripe_caller');
SELECT idempotency.grant_role('shop', 'webhook');
