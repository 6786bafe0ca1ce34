--
-- What we receive settles what we sent: an event tells what came of a call
-- whose answer was lost
--
\set VERBOSITY terse
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS idempotency;
RESET client_min_messages;

CREATE SCHEMA webhook_settle;
SET search_path = webhook_settle;

-- an event that was received just now
CREATE FUNCTION receive(id text, type text, object jsonb, more jsonb = '{}', consumer text = '') RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
	body bytea := convert_to((jsonb_build_object('id', id, 'object', 'event', 'type', type, 'created', 1795300000,
		'livemode', true, 'data', jsonb_build_object('object', object)) || more)::text, 'UTF8');
	key bytea := 'whsec_test' || decode(repeat('00', 54), 'hex');
	t text := floor(extract(epoch FROM clock_timestamp()))::text;
	inner_pad bytea := '';
	outer_pad bytea := '';
BEGIN
	FOR i IN 0 .. 63 LOOP
		inner_pad := inner_pad || set_byte('\x00', 0, get_byte(key, i) # 54);
		outer_pad := outer_pad || set_byte('\x00', 0, get_byte(key, i) # 92);
	END LOOP;
	RETURN (idempotency.stripe_webhook_receive(body, format('t=%s,v1=%s', t,
		encode(sha256(outer_pad || sha256(inner_pad || convert_to(t || '.', 'UTF8') || body)), 'hex')),
		'{whsec_test}', consumer => consumer)).stored;
END $$;

-- the call that caused it
CREATE FUNCTION by(key text, more jsonb = '{}') RETURNS jsonb LANGUAGE sql
RETURN jsonb_build_object('request', jsonb_build_object('id', 'req_1', 'idempotency_key', key)) || more;

CREATE FUNCTION obj(type text, id text, more jsonb = '{}') RETURNS jsonb LANGUAGE sql
RETURN jsonb_build_object('id', id, 'object', type) || more;

CREATE FUNCTION key(id text, account text = '') RETURNS text LANGUAGE sql
RETURN idempotency.stripe_idempotency_key('t', id, account);

-- calls without an answer
CREATE PROCEDURE call(id text, path text, params jsonb = '{}', account text = '', unknown boolean = true) LANGUAGE plpgsql AS $$
DECLARE
	c idempotency.stripe_claim_result;
BEGIN
	SELECT * INTO c FROM idempotency.stripe_claim('t', id, jsonb_build_object('method', 'POST', 'path', path, 'params', params), account);
	IF unknown THEN
		PERFORM idempotency.stripe_record('t', id, c.token, account => account);
	END IF;
END $$;
SET idempotency.stripe_ledger = 'transaction';

CREATE FUNCTION state(id text, account text = '') RETURNS text LANGUAGE sql
RETURN (SELECT concat_ws(' ', outcome, resource_id, resource_type, response ->> 'status', error ->> 'code',
		CASE WHEN resource_status IS DISTINCT FROM response ->> 'status' THEN '[' || COALESCE(resource_status, 'no status') || ']' END)
	FROM idempotency.stripe_lookup('t', id, account));

--
-- By the key of the call that caused the event
--
CALL call('1', '/v1/payment_intents', '{"amount": 100, "confirm": true}');
SELECT state('1');
-- that it was created says nothing about the confirmation
SELECT receive('evt_1a', 'payment_intent.created', obj('payment_intent', 'pi_1', '{"status": "requires_payment_method"}'), by(key('1')));
SELECT state('1');
-- a charge carries the key, too, but isn't what was asked for
SELECT receive('evt_1b', 'charge.succeeded', obj('charge', 'ch_1', '{"payment_intent": "pi_1", "status": "succeeded"}'), by(key('1')));
SELECT state('1');
SELECT receive('evt_1c', 'payment_intent.succeeded', obj('payment_intent', 'pi_1', '{"status": "succeeded"}'), by(key('1')));
SELECT state('1');
SELECT verdict, outcome, resource_id, resource_type, http_status, response, error, livemode, attempt, generation
FROM idempotency.stripe_claim('t', '1') \gx
SELECT request_id, recorded_at IS NOT NULL AS recorded, lease_expires_at,
	jsonb_pretty(jsonb_set(settled, '{at}', to_jsonb((settled ->> 'at')::timestamptz = recorded_at))) AS settled
FROM idempotency.stripe_idempotency_keys WHERE operation_id = '1' \gx
-- what is recorded stays
SELECT receive('evt_1d', 'payment_intent.payment_failed', obj('payment_intent', 'pi_1', '{"status": "requires_payment_method"}'), by(key('1')));
SELECT state('1');

-- declined
CALL call('2', '/v1/payment_intents', '{"amount": 100, "confirm": "true"}');
SELECT receive('evt_2', 'payment_intent.payment_failed', obj('payment_intent', 'pi_2',
	'{"status": "requires_payment_method", "last_payment_error": {"code": "card_declined", "type": "card_error"}}'), by(key('2')));
SELECT verdict, outcome, resource_id, response, error FROM idempotency.stripe_claim('t', '2');

-- a recorded result is final
CALL call('3', '/v1/payment_intents', '{"confirm": true}', unknown => false);
SELECT FROM idempotency.stripe_idempotency_keys s, idempotency.stripe_record('t', '3', s.token, http_status => 402,
	response => '{"error": {"type": "card_error", "code": "card_declined"}}') WHERE s.operation_id = '3';
SELECT receive('evt_3', 'payment_intent.succeeded', obj('payment_intent', 'pi_3'), by(key('3')));
SELECT state('3');

-- what was never sent has nothing to settle
SELECT FROM idempotency.stripe_claim('t', '4', '{"method": "POST", "path": "/v1/refunds"}') c, idempotency.stripe_release('t', '4', c.token);
SELECT receive('evt_4', 'refund.created', obj('refund', 're_4'), by(key('4')));
SELECT state('4');

-- what was recorded as not executed, and was: a library repeats by itself, and its last attempt is refused
CREATE PROCEDURE refused(id text, status int = 429) LANGUAGE sql AS $$
	SELECT FROM idempotency.stripe_idempotency_keys s, idempotency.stripe_record('t', id, s.token, http_status => status,
		response => '{"error": {"type": "invalid_request_error"}}') WHERE s.operation_id = id
$$;
CALL call('d1', '/v1/payment_intents', '{"confirm": true}', unknown => false);
CALL refused('d1');
SELECT state('d1');
-- its object alone doesn't say that this call has made it
SELECT receive('evt_d1a', 'payment_intent.succeeded', obj('payment_intent', 'pi_d1', jsonb_build_object('metadata', jsonb_build_object('key', key('d1')))));
SELECT state('d1');
SELECT receive('evt_d1b', 'payment_intent.succeeded', obj('payment_intent', 'pi_d1', '{"status": "succeeded"}'), by(key('d1')));
SELECT state('d1'), settled ->> 'was' AS was FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'd1';
SELECT verdict, resource_id, token FROM idempotency.stripe_claim('t', 'd1');
-- declined, as the event says
CALL call('d2', '/v1/payment_intents', '{"confirm": true}', unknown => false);
CALL refused('d2', 401);
SELECT receive('evt_d2', 'payment_intent.payment_failed', obj('payment_intent', 'pi_d2', '{"last_payment_error": {"code": "card_declined"}}'), by(key('d2')));
SELECT state('d2');
-- the event comes first, and is kept
CALL call('d3', '/v1/refunds', unknown => false);
SELECT receive('evt_d3', 'refund.created', obj('refund', 're_d3'), by(key('d3')));
CALL refused('d3', 409);
SELECT state('d3');
SELECT count(*) FROM idempotency.stripe_webhook_next(consumer => 'nobody');
SELECT state('d3'), (SELECT pending_key FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_d3');
-- the next attempt is at it: then the event waits for that
CALL call('d4', '/v1/refunds', unknown => false);
CALL refused('d4');
CALL call('d4', '/v1/refunds', unknown => false);
SELECT receive('evt_d4', 'refund.created', obj('refund', 're_d4'), by(key('d4')));
SELECT state('d4'), (SELECT pending_key = key('d4') AS kept FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_d4');
CALL refused('d4');
SELECT verdict, resource_id, token FROM idempotency.stripe_claim('t', 'd4');
-- a reopened operation has another key
CALL call('d5', '/v1/refunds', unknown => false);
CALL refused('d5', 400);
SELECT key('d5') AS d5_key \gset
SELECT idempotency.stripe_reopen('t', 'd5') IS NOT NULL AS reopened;
CALL call('d5', '/v1/refunds', unknown => false);
CALL refused('d5');
SELECT receive('evt_d5', 'refund.created', obj('refund', 're_d5'), by(:'d5_key'));
SELECT state('d5');

-- every kind of call, and events about what it made, changed, or merely touched
CREATE TABLE kinds (n int GENERATED ALWAYS AS IDENTITY, path text, params jsonb, type text, object text, id text);
INSERT INTO kinds (path, params, type, object, id) VALUES
	('/v1/payment_intents', '{}', 'payment_intent.created', 'payment_intent', 'pi_k'),
	('/v1/payment_intents', '{}', 'customer.updated', 'customer', 'cus_k'),
	('/v1/payment_intents', '{"confirm": true}', 'payment_intent.processing', 'payment_intent', 'pi_k'),
	('/v1/payment_intents', '{"confirm": true}', 'payment_intent.requires_action', 'payment_intent', 'pi_k'),
	('/v1/payment_intents/pi_k/confirm', '{}', 'payment_intent.succeeded', 'payment_intent', 'pi_k'),
	('/v1/payment_intents/pi_k/confirm', '{}', 'payment_intent.payment_failed', 'payment_intent', 'pi_k'),
	('/v1/payment_intents/pi_k/confirm', '{}', 'payment_intent.created', 'payment_intent', 'pi_k'),
	('/v1/payment_intents/pi_k/confirm', '{}', 'payment_intent.succeeded', 'payment_intent', 'pi_other'),
	('/v1/payment_intents/pi_k/cancel', '{}', 'payment_intent.canceled', 'payment_intent', 'pi_k'),
	('/v1/setup_intents', '{"confirm": true}', 'setup_intent.setup_failed', 'setup_intent', 'seti_k'),
	('/v1/charges', '{}', 'charge.succeeded', 'charge', 'ch_k'),
	('/v1/charges', '{}', 'charge.failed', 'charge', 'ch_k'),
	('/v1/charges/ch_k/refunds', '{}', 'refund.created', 'refund', 're_k'),
	('/v1/charges/ch_k/refunds', '{}', 'charge.refunded', 'charge', 'ch_k'),
	('/v1/charges/ch_k', '{}', 'charge.updated', 'charge', 'ch_k'),
	('/v1/refunds?expand[0]=charge', '{}', 'refund.created', 'refund', 're_k'),
	('/v1/refunds', '{}', 'charge.refunded', 'charge', 'ch_k'),
	('/v1/checkout/sessions', '{}', 'checkout.session.completed', 'checkout.session', 'cs_k'),
	('/v1/billing_portal/sessions', '{}', 'billing_portal.session.created', 'billing_portal.session', 'bps_k'),
	('/v1/transfers/tr_k/reversals', '{}', 'transfer.reversed', 'transfer', 'tr_k'),
	('/v1/transfers/tr_k/reversals', '{}', 'transfer_reversal.created', 'transfer_reversal', 'trr_k'),
	('/v1/customers/cus_k/balance_transactions', '{}', 'customer.updated', 'customer', 'cus_k'),
	('/v1/customers/cus_k/balance_transactions', '{}', 'a.created', 'customer_balance_transaction', 'cbtxn_k'),
	('/v1/application_fees/fee_k/refunds', '{}', 'a.created', 'fee_refund', 'fr_k'),
	('/v1/subscriptions', '{}', 'customer.subscription.created', 'subscription', 'sub_k'),
	('/v1/subscriptions', '{}', 'invoice.payment_failed', 'invoice', 'in_k'),
	('/v1/invoices/in_k/pay', '{}', 'invoice.paid', 'invoice', 'in_k'),
	('/v1/invoices/in_k/pay', '{}', 'invoice.payment_failed', 'invoice', 'in_k'),
	('/v1/invoices/in_k/pay', '{}', 'invoice.updated', 'invoice', 'in_k'),
	('/v1/invoices/in_k/finalize', '{}', 'invoice.finalized', 'invoice', 'in_k'),
	('/v1/invoices/in_k/add_lines', '{}', 'invoice.updated', 'invoice', 'in_k'),
	('/v1/customers/cus_k', '{}', 'customer.updated', 'customer', 'cus_k'),
	('/v1/customers/cus_k2', '{}', 'customer.updated', 'customer', 'cus_k'),
	('/v1/treasury/outbound_payments', '{}', 'a.created', 'treasury.outbound_payment', 'obp_k'),
	('/v2/core/accounts', '{}', 'v2.core.account.created', 'v2.core.account', 'acct_k'),
	('payment_intents', '{}', 'payment_intent.created', 'payment_intent', 'pi_k'),
	('/v1/invoices/in_k/pay', '{}', 'invoice.finalized', 'invoice', 'in_k'),
	('/v1/invoices/in_k/pay', '{}', 'invoice.payment_action_required', 'invoice', 'in_k'),
	('/v1/invoices/in_k/pay', '{}', 'invoice.of_a_new_kind', 'invoice', 'in_k'),
	('/v1/payment_intents', '{"confirm": 1}', 'payment_intent.created', 'payment_intent', 'pi_k'),
	('/v1/payment_intents', '{"confirm": false}', 'payment_intent.created', 'payment_intent', 'pi_k'),
	('/v1/payment_intents', '{"confirm": "true"}', 'payment_intent.canceled', 'payment_intent', 'pi_k'),
	('/v1/payment_intents', '"amount=1&confirm=true"', 'payment_intent.created', 'payment_intent', 'pi_k'),
	('/v1/setup_intents', 'null', 'setup_intent.created', 'setup_intent', 'seti_k'),
	('/v1/customers', '"name=a"', 'customer.created', 'customer', 'cus_k'),
	('/v1/', '{}', 'payment_intent.created', 'payment_intent', 'pi_k'),
	('/v1/payment_intents/', '{}', 'payment_intent.created', 'payment_intent', 'pi_k'),
	('/v1/capabilities', '{}', 'capability.updated', 'capability', 'cap_k'),
	('/v2/core/accounts', '{}', 'core.account.created', 'core.account', 'acct_k');
DO $$
DECLARE
	k kinds;
BEGIN
	FOR k IN SELECT * FROM kinds ORDER BY n LOOP
		CALL call('kind ' || k.n, k.path, k.params);
		PERFORM receive('evt_k' || k.n, k.type, obj(k.object, k.id), by(key('kind ' || k.n)));
	END LOOP;
END $$;
SELECT path || CASE WHEN params <> '{}' THEN ' ' || params::text ELSE '' END AS call, type AS event, state('kind ' || n)
FROM kinds ORDER BY n;

-- a payment that fails by itself, days after its call was answered
CALL call('late', '/v1/payment_intents', '{"confirm": true}');
SELECT receive('evt_late', 'payment_intent.payment_failed', obj('payment_intent', 'pi_late'),
	jsonb_build_object('request', jsonb_build_object('id', NULL, 'idempotency_key', key('late'))));
SELECT state('late');

-- the other mode's event, as a copy of the database may be sent: both have the same keys
CALL call('mode', '/v1/refunds');
UPDATE idempotency.stripe_idempotency_keys SET livemode = false WHERE operation_id = 'mode';
SELECT receive('evt_mode1', 'refund.created', obj('refund', 're_live'), by(key('mode')));
SELECT state('mode'), livemode FROM idempotency.stripe_lookup('t', 'mode');
SELECT receive('evt_mode2', 'refund.created', obj('refund', 're_test'), by(key('mode'), '{"livemode": false}'));
SELECT state('mode'), livemode FROM idempotency.stripe_lookup('t', 'mode');

-- thin events tell it, too
CALL call('thin', '/v2/core/accounts');
SELECT receive('evt_thin', 'v2.core.account.created', '{}', jsonb_build_object('object', 'v2.core.event',
	'related_object', obj('x', 'acct_thin') || '{"type": "v2.core.account"}',
	'reason', jsonb_build_object('type', 'request', 'request', jsonb_build_object('id', 'req_2', 'idempotency_key', key('thin')))));
SELECT state('thin');

-- a connected account's may have any key: who sees it as a context says nothing about a call that names no account
CALL call('thinc', '/v2/core/accounts');
SELECT receive('evt_thinc', 'v2.core.account.created', '{}', jsonb_build_object('object', 'v2.core.event', 'context', 'acct_2',
	'related_object', obj('x', 'acct_thin') || '{"type": "v2.core.account"}',
	'reason', jsonb_build_object('type', 'request', 'request', jsonb_build_object('id', 'req_2', 'idempotency_key', key('thinc')))));
SELECT state('thinc');
CALL call('thinc', '/v2/core/accounts', account => 'acct_2');
SELECT receive('evt_thina', 'v2.core.account.created', '{}', jsonb_build_object('object', 'v2.core.event', 'context', 'acct_2',
	'related_object', obj('x', 'acct_thin') || '{"type": "v2.core.account"}',
	'reason', jsonb_build_object('type', 'request', 'request', jsonb_build_object('id', 'req_2', 'idempotency_key', key('thinc', 'acct_2')))));
SELECT state('thinc', 'acct_2'), state('thinc') AS own;

-- a call that isn't a POST, or whose path nobody knows
SELECT FROM idempotency.stripe_claim('t', 'get', '{"method": "GET", "path": "/v1/refunds"}') c, idempotency.stripe_record('t', 'get', c.token);
SELECT FROM idempotency.stripe_claim('t', 'none') c, idempotency.stripe_record('t', 'none', c.token);
SELECT FROM idempotency.stripe_claim('t', 'list', '{"path": ["/v1/refunds"]}') c, idempotency.stripe_record('t', 'list', c.token);
SELECT receive('evt_x' || id, 'refund.created', obj('refund', 're_x'), by(key(id)))
FROM unnest(ARRAY['get', 'none', 'list']) id;
SELECT id, state(id) FROM unnest(ARRAY['get', 'none', 'list']) id;

--
-- By metadata, whatever its name
--
CREATE FUNCTION meta(key text, more jsonb = '{}') RETURNS jsonb LANGUAGE sql
RETURN jsonb_build_object('metadata', jsonb_build_object('a', 'b', 'our key', key)) || more;

CALL call('m1', '/v1/payment_intents');
SELECT receive('evt_m1', 'payment_intent.payment_failed', obj('payment_intent', 'pi_m1', meta(key('m1'))));
SELECT state('m1');
-- somebody else's attempt with an object of ours doesn't tell about our own attempt
CALL call('m2', '/v1/payment_intents', '{"confirm": true}');
SELECT receive('evt_m2a', 'payment_intent.payment_failed', obj('payment_intent', 'pi_m2', meta(key('m2'))));
SELECT receive('evt_m2b', 'payment_intent.created', obj('payment_intent', 'pi_m2', meta(key('m2'))), by('k-1'));
SELECT receive('evt_m2c', 'charge.succeeded', obj('charge', 'ch_m2', meta(key('m2'))));
SELECT state('m2');
SELECT receive('evt_m2d', 'payment_intent.succeeded', obj('payment_intent', 'pi_m2', meta(key('m2'), '{"status": "succeeded"}')));
SELECT state('m2');
-- a payment that another call has made, with metadata copied from one that was never made
CALL call('copied', '/v1/payment_intents', '{"confirm": true}');
CALL call('copy', '/v1/payment_intents', '{"confirm": true}');
SELECT receive('evt_copy', 'payment_intent.succeeded', obj('payment_intent', 'pi_copy',
	jsonb_build_object('status', 'succeeded', 'metadata', jsonb_build_object('key', key('copied')))), by(key('copy')));
SELECT state('copy'), state('copied');
-- what a request with another key has made is a copy, and so may be what has two keys
CALL call('m5', '/v1/customers');
SELECT receive('evt_m5a', 'customer.created', obj('customer', 'cus_copy', meta(key('m5'))), by('k-2'));
SELECT receive('evt_m5b', 'customer.updated', obj('customer', 'cus_copy', meta(key('m5')) || jsonb_build_object('metadata',
	jsonb_build_object('a', key('m5'), 'b', key('m6')))));
SELECT receive('evt_m5c', 'customer.updated', obj('customer', 'cus_copy', jsonb_build_object('metadata',
	jsonb_build_object('a', key('m5'), 'idempotency_key', key('m6')))));
SELECT state('m5');
SELECT receive('evt_m5d', 'customer.created', obj('customer', 'cus_m5', jsonb_build_object('metadata',
	jsonb_build_object('a', key('m6'), 'idempotency_key', key('m5')))), by(key('m5')));
SELECT state('m5');
CALL call('m3', '/v1/payment_intents/pi_m3/capture');
SELECT receive('evt_m3', 'payment_intent.succeeded', obj('payment_intent', 'pi_m3', meta(key('m3'))));
SELECT state('m3');
CALL call('m4', '/v1/customers/cus_m4');
SELECT receive('evt_m4', 'customer.updated', obj('customer', 'cus_m4', meta(key('m4'))));
SELECT state('m4');

--
-- By the id of an object that the row knows
--
CALL call('o1', '/v1/payment_intents', '{"confirm": true}', unknown => false);
SELECT FROM idempotency.stripe_idempotency_keys s, idempotency.stripe_record('t', 'o1', s.token, http_status => 500,
	response => '{"error": {"type": "api_error", "payment_intent": {"id": "pi_o1"}}}') WHERE s.operation_id = 'o1';
SELECT state('o1');
SELECT receive('evt_o1a', 'payment_intent.succeeded', obj('payment_intent', 'pi_other'));
SELECT receive('evt_o1b', 'payment_intent.succeeded', obj('payment_intent', 'pi_o1'), '{"account": "acct_1"}');
SELECT receive('evt_o1c', 'payment_intent.payment_failed', obj('payment_intent', 'pi_o1'));
SELECT state('o1');
SELECT receive('evt_o1d', 'payment_intent.succeeded', obj('payment_intent', 'pi_o1', '{"status": "succeeded"}'));
SELECT state('o1'), (SELECT settled #>> '{evidence,found_by}' FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'o1');
-- an event about an object that the call was to change tells nothing
CALL call('o2', '/v1/payment_intents/pi_o2/capture', unknown => false);
SELECT FROM idempotency.stripe_idempotency_keys s, idempotency.stripe_record('t', 'o2', s.token, http_status => 500, resource_id => 'pi_o2',
	response => '{"error": {"type": "api_error"}}')
WHERE s.operation_id = 'o2';
SELECT receive('evt_o2', 'payment_intent.succeeded', obj('payment_intent', 'pi_o2'));
SELECT state('o2');

-- a gateway's word leaves it open, and brings no id by which an event would be found
CALL call('o3', '/v1/refunds', unknown => false);
SELECT FROM idempotency.stripe_idempotency_keys s, idempotency.stripe_record('t', 'o3', s.token, http_status => 404,
	response => '{"id": "re_gateway", "message": "not found"}') WHERE s.operation_id = 'o3';
SELECT receive('evt_o3a', 'refund.created', obj('refund', 're_gateway'));
SELECT state('o3');
SELECT receive('evt_o3b', 'refund.created', obj('refund', 're_o3'), by(key('o3')));
SELECT state('o3');

--
-- Which row: type and id may have colons, accounts and generations differ
--
SET idempotency.stripe_ledger = 'transaction';
SELECT FROM idempotency.stripe_claim('a:b', 'c:d', '{"path": "/v1/refunds"}') c, idempotency.stripe_record('a:b', 'c:d', c.token);
SELECT FROM idempotency.stripe_claim('a', 'b:c:d', '{"path": "/v1/refunds"}') c, idempotency.stripe_record('a', 'b:c:d', c.token);
SELECT receive('evt_c', 'refund.created', obj('refund', 're_c'), by(idempotency.stripe_idempotency_key('a:b', 'c:d')));
SELECT operation_type, operation_id, outcome FROM idempotency.stripe_idempotency_keys WHERE operation_id LIKE '%c:d' ORDER BY 1;

CALL call('acct', '/v1/refunds', account => 'acct_1');
CALL call('acct', '/v1/refunds');
SELECT receive('evt_acct', 'refund.created', obj('refund', 're_acct'), by(key('acct', 'acct_1'), '{"account": "acct_1"}'));
SELECT state('acct', 'acct_1'), state('acct') AS own;
-- what comes from a connected account says nothing about a call of one's own
SELECT receive('evt_acct3', 'refund.created', obj('refund', 're_acct3'), by(key('acct'), '{"account": "acct_2"}'));
SELECT state('acct') AS own;
CALL call('acct', '/v1/refunds');
SELECT state('acct') AS own;
-- an account that sees its own events under its name
SELECT receive('evt_acct2', 'refund.created', obj('refund', 're_acct2'), by(key('acct'), '{"context": "acct_me"}'));
SELECT state('acct') AS own;

CALL call('gen', '/v1/refunds');
SELECT key('gen') AS first_key \gset
SELECT idempotency.stripe_reopen('t', 'gen', force => true) <> :'first_key' AS reopened;
CALL call('gen', '/v1/refunds');
SELECT receive('evt_gen', 'refund.created', obj('refund', 're_gen'), by(:'first_key'));
SELECT state('gen');
SELECT pending_key FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_gen';

-- what settled it goes to the history with its generation
CALL call('ev', '/v1/charges');
SELECT receive('evt_ev', 'charge.failed', obj('charge', 'ch_ev'), by(key('ev')));
SELECT idempotency.stripe_reopen('t', 'ev') IS NOT NULL AS reopened;
SELECT settled, history #>> '{0,settled,evidence,stripe_event_id}' AS history FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'ev';

-- somebody else's keys, and what only looks like one
SELECT receive('evt_f' || n, 'refund.created', obj('refund', 're_f'), by(k))
FROM unnest(ARRAY['stripe-node-retry-018c2b5e-0000-4000-8000-000000000001', 'a:b', ':', '', 'a::018c2b5e-0000-8000-8000-000000000001',
	':b:018c2b5e-0000-8000-8000-000000000001', 'a:b:018c2b5e-0000-4000-8000-000000000001',
	'a:' || repeat('b', 218) || ':018c2b5e-0000-8000-8000-000000000001']) WITH ORDINALITY v (k, n);
SELECT count(pending_key) FROM idempotency.stripe_webhook_events WHERE stripe_event_id LIKE 'evt\_f%';

--
-- The event comes first
--
-- the caller is still at it: its lease is live
CALL call('w1', '/v1/payment_intents', '{"confirm": true}', unknown => false);
SELECT receive('evt_w1', 'payment_intent.succeeded', obj('payment_intent', 'pi_w1', '{"status": "succeeded"}'), by(key('w1')));
SELECT state('w1'), (SELECT pending_key = key('w1') FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_w1') AS kept;
SELECT verdict FROM idempotency.stripe_claim('t', 'w1');
-- it dies: whoever comes next is given the result, and sends nothing
UPDATE idempotency.stripe_idempotency_keys SET lease_expires_at = clock_timestamp() WHERE operation_id = 'w1';
SELECT verdict, outcome, resource_id, token, response ->> 'status' AS status FROM idempotency.stripe_claim('t', 'w1');
SELECT verdict, outcome, resource_id FROM idempotency.stripe_claim('t', 'w1');

-- the caller comes back after all, and its own answer is recorded as ever
CALL call('w2', '/v1/payment_intents', '{"confirm": true}', unknown => false);
SELECT receive('evt_w2', 'payment_intent.succeeded', obj('payment_intent', 'pi_w2'), by(key('w2')));
SELECT r FROM idempotency.stripe_idempotency_keys s, idempotency.stripe_record('t', 'w2', s.token, http_status => 200,
	response => '{"id": "pi_w2", "object": "payment_intent", "status": "succeeded"}') r WHERE s.operation_id = 'w2';
SELECT state('w2'), settled FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'w2';
-- also where an event has settled it meanwhile
CALL call('w3', '/v1/payment_intents', '{"confirm": true}', unknown => false);
UPDATE idempotency.stripe_idempotency_keys SET lease_expires_at = clock_timestamp() WHERE operation_id = 'w3';
SELECT receive('evt_w3', 'payment_intent.succeeded', obj('payment_intent', 'pi_w3'), by(key('w3')));
SELECT r FROM idempotency.stripe_idempotency_keys s, idempotency.stripe_record('t', 'w3', s.token, http_status => 200,
	response => '{"id": "pi_w3", "object": "payment_intent"}') r WHERE s.operation_id = 'w3';
SELECT r FROM idempotency.stripe_idempotency_keys s, idempotency.stripe_record('t', 'w3', s.token, http_status => 200,
	response => '{"id": "pi_another", "object": "payment_intent"}') r WHERE s.operation_id = 'w3';

-- the caller's transaction has rolled back, its row with it, but not what Stripe did
BEGIN;
SELECT idempotency_key AS lost_key FROM idempotency.stripe_claim('t', 'w4', '{"method": "POST", "path": "/v1/refunds"}') \gset
ROLLBACK;
SELECT receive('evt_w4', 'refund.created', obj('refund', 're_w4'), by(:'lost_key'));
SELECT verdict, outcome, resource_id, token, attempt FROM idempotency.stripe_claim('t', 'w4', '{"method": "POST", "path": "/v1/refunds"}');

-- looked at once more by the transaction that processes the event
CALL call('w5', '/v1/refunds', unknown => false);
SELECT receive('evt_w5', 'refund.created', obj('refund', 're_w5'), by(key('w5')), 'w');
UPDATE idempotency.stripe_idempotency_keys SET lease_expires_at = clock_timestamp() WHERE operation_id = 'w5';
SELECT stripe_event_id FROM idempotency.stripe_webhook_next('1 h', 'w');
SELECT state('w5'), (SELECT pending_key FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_w5');
-- or by the next event about the call
CALL call('w6', '/v1/refunds', unknown => false);
SELECT receive('evt_w6a', 'refund.created', obj('refund', 're_w6'), by(key('w6')));
UPDATE idempotency.stripe_idempotency_keys SET lease_expires_at = clock_timestamp() WHERE operation_id = 'w6';
SELECT receive('evt_w6b', 'refund.updated', obj('refund', 're_w6'), by(key('w6')));
SELECT state('w6');

-- or by a worker that has nothing to do
CALL call('w9', '/v1/refunds', unknown => false);
SELECT receive('evt_w9', 'refund.created', obj('refund', 're_w9'), by(key('w9')));
SELECT count(*) FROM idempotency.stripe_webhook_next(consumer => 'nobody');
SELECT state('w9'), (SELECT pending_key IS NOT NULL AS kept FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_w9');
UPDATE idempotency.stripe_idempotency_keys SET lease_expires_at = clock_timestamp() WHERE operation_id = 'w9';
SELECT count(*) FROM idempotency.stripe_webhook_next(consumer => 'nobody');
SELECT state('w9'), (SELECT pending_key IS NOT NULL AS kept FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_w9');

-- an unknown row past Stripe's window, and one that Stripe would only repeat itself about
CALL call('w7', '/v1/refunds', unknown => false);
SELECT receive('evt_w7', 'refund.created', obj('refund', 're_w7'), by(key('w7')));
SELECT FROM idempotency.stripe_idempotency_keys s, idempotency.stripe_record('t', 'w7', s.token, http_status => 500, response => '{"error": {"type": "api_error"}}') WHERE s.operation_id = 'w7';
SELECT verdict, outcome, resource_id FROM idempotency.stripe_claim('t', 'w7');

-- many events about what the call merely touched don't hide the one about what it made
SELECT count(receive('evt_w10_' || n, 'invoiceitem.updated', obj('invoiceitem', 'ii_' || n), by(key('w10')))) FROM generate_series(1, 50) n;
SELECT receive('evt_w10_last', 'refund.created', obj('refund', 're_w10'), by(key('w10')));
SELECT verdict, outcome, resource_id FROM idempotency.stripe_claim('t', 'w10', '{"method": "POST", "path": "/v1/refunds"}');

-- a payment that has failed, and was made by another card before anybody looked, is made
CALL call('w11', '/v1/payment_intents', '{"confirm": true}', unknown => false);
SELECT receive('evt_w11_a', 'payment_intent.payment_failed', obj('payment_intent', 'pi_w11', '{"status": "requires_payment_method"}'),
	by(key('w11'), '{"created": 1795300001}'));
SELECT receive('evt_w11_b', 'payment_intent.succeeded', obj('payment_intent', 'pi_w11',
	jsonb_build_object('status', 'succeeded', 'metadata', jsonb_build_object('key', key('w11')))), '{"created": 1795300060}');
UPDATE idempotency.stripe_idempotency_keys SET lease_expires_at = clock_timestamp() WHERE operation_id = 'w11';
SELECT verdict, outcome, resource_id, response ->> 'status' AS status FROM idempotency.stripe_claim('t', 'w11');

-- as far as the payload is kept: one that may settle something is
SET idempotency.webhook_payload = 'none';
CALL call('w8', '/v1/refunds', unknown => false);
SELECT receive('evt_w8', 'refund.created', obj('refund', 're_w8'), by(key('w8')), 'w');
SELECT FROM idempotency.stripe_webhook_next('1 h', 'w') c, idempotency.stripe_webhook_record(c.stripe_event_id, c.token, consumer => 'w');
UPDATE idempotency.stripe_idempotency_keys SET lease_expires_at = clock_timestamp() WHERE operation_id = 'w8';
SELECT verdict, resource_id FROM idempotency.stripe_claim('t', 'w8');
RESET idempotency.webhook_payload;

-- kept by its object's metadata, when no request of the call has caused it
SELECT receive('evt_w20', 'refund.created', obj('refund', 're_w20', jsonb_build_object('metadata', jsonb_build_object('ours', key('w20')))));
SELECT verdict, outcome, resource_id FROM idempotency.stripe_claim('t', 'w20', '{"method": "POST", "path": "/v1/refunds"}');
SELECT settled #>> '{evidence,found_by}' AS found_by FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'w20';

-- by its object, whose id the call has; one that only names the object says nothing
SELECT receive('evt_w21', 'refund.created', obj('refund', 're_w21'));
SELECT receive('evt_w22', 'v2.refund.created', '{}', '{"object": "v2.core.event", "data": {}, "related_object": {"id": "re_w22", "type": "refund"}}');
SELECT stripe_event_id, object_id FROM idempotency.stripe_webhook_events WHERE stripe_event_id IN ('evt_w21', 'evt_w22') ORDER BY 1;
CALL call('w21', '/v1/refunds', unknown => false);
CALL call('w22', '/v1/refunds', unknown => false);
SELECT s.operation_id, idempotency.stripe_record('t', s.operation_id, s.token, http_status => 500, resource_id => 're_' || s.operation_id,
	response => '{"error": {"type": "api_error"}}')
FROM idempotency.stripe_idempotency_keys s WHERE s.operation_id IN ('w21', 'w22') ORDER BY 1;
SELECT verdict, outcome, resource_id FROM idempotency.stripe_claim('t', 'w21');
SELECT settled #>> '{evidence,found_by}' AS found_by FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'w21';
SELECT verdict, outcome, resource_id FROM idempotency.stripe_claim('t', 'w22');

-- an id that ends as the key's parts do, and what only looks like a key of ours
CALL call('w23:', '/v1/refunds');
SELECT receive('evt_w23', 'refund.created', obj('refund', 're_w23'), by(key('w23:')));
SELECT state('w23:');
SELECT receive('evt_w24', 'refund.created', obj('refund', 're_w24'), by('t:w24:018c2b5ef00008008d0000000000000001ab'));
SELECT pending_key FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_w24';
SELECT receive('evt_w15', 'refund.created', obj('refund', 're_w15'), by('t:none::018c2b5e-0000-8000-8000-000000000001'));
SELECT pending_key FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_w15';

-- rolled back with the transaction that took the event in
CALL call('r1', '/v1/refunds');
BEGIN;
SELECT receive('evt_r1', 'refund.created', obj('refund', 're_r1'), by(key('r1')));
SELECT state('r1');
ROLLBACK;
SELECT state('r1');

SET client_min_messages = warning;
DELETE FROM idempotency.stripe_webhook_events;
DELETE FROM idempotency.stripe_idempotency_keys WHERE operation_type IN ('t', 'a', 'a:b');
RESET search_path;
DROP SCHEMA webhook_settle CASCADE;
