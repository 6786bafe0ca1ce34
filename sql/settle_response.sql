--
-- A settlement that brings the object, and what of an object is kept for ever
--
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS idempotency;
RESET client_min_messages;

CREATE SCHEMA settle_response;
SET search_path = settle_response;
SET idempotency.stripe_ledger = 'transaction';

-- a call without an answer, or with this one
CREATE PROCEDURE call(id text, response jsonb = NULL, status int = NULL, resource text = NULL,
	request jsonb = '{"method": "POST", "path": "/v1/payment_intents", "params": {"confirm": true}}') LANGUAGE plpgsql AS $$
DECLARE
	c idempotency.stripe_claim_result;
BEGIN
	SELECT * INTO c FROM idempotency.stripe_claim('s', id, request);
	PERFORM idempotency.stripe_record('s', id, c.token, resource, response, status);
END $$;
CREATE FUNCTION intent(id text, status text, more jsonb = '{}') RETURNS jsonb LANGUAGE sql
RETURN jsonb_build_object('id', id, 'object', 'payment_intent', 'status', status, 'livemode', false) || more;
CREATE FUNCTION declined(id text) RETURNS jsonb LANGUAGE sql
RETURN jsonb_build_object('error', jsonb_build_object('type', 'card_error', 'code', 'card_declined',
	'payment_intent', intent(id, 'requires_payment_method')));
-- Stripe failed in the middle, and says what there is
CREATE FUNCTION broken(id text) RETURNS jsonb LANGUAGE sql
RETURN jsonb_build_object('error', jsonb_build_object('type', 'api_error',
	'payment_intent', intent(id, 'processing')));
-- what a caller is told, and whether both functions say the same
CREATE FUNCTION told(id text) RETURNS text LANGUAGE sql
RETURN (SELECT format('%s %s: %s %s %s livemode %s, http %s, response %s, error %s%s', c.verdict, c.outcome, c.resource_id, c.resource_type,
		c.resource_status, c.livemode, c.http_status, c.response ->> 'id', c.error ->> 'code',
		CASE WHEN (l.resource_id, l.resource_type, l.resource_status, l.livemode, l.response, l.error)
			IS DISTINCT FROM (c.resource_id, c.resource_type, c.resource_status, c.livemode, c.response, c.error) THEN ' DIFFERS' END)
	FROM idempotency.stripe_claim('s', id) c, idempotency.stripe_lookup('s', id) l);

-- settled as completed, with what Stripe shows
CALL call('made');
SELECT idempotency.stripe_settle('s', 'made', 'completed', response => intent('pi_1', 'succeeded'), note => 'looked it up');
SELECT told('made');
SELECT settled ->> 'was' AS was, settled ->> 'note' AS note FROM idempotency.stripe_lookup('s', 'made');
-- the same again, with or without; what is final stays
SELECT idempotency.stripe_settle('s', 'made', 'completed', response => intent('pi_1', 'canceled'));
SELECT idempotency.stripe_settle('s', 'made', 'completed', 'pi_1');
SELECT idempotency.stripe_settle('s', 'made', 'completed', response => intent('pi_2', 'succeeded'));
SELECT told('made');
-- with its id, without an object, without either
CALL call('both');
SELECT idempotency.stripe_settle('s', 'both', 'completed', 'pi_1', response => intent('pi_1', 'succeeded'));
SELECT told('both');
CALL call('id');
SELECT idempotency.stripe_settle('s', 'id', 'completed', 'pi_1');
SELECT told('id');
CALL call('bare');
SELECT idempotency.stripe_settle('s', 'bare', 'completed');
SELECT told('bare');
CALL call('no id');
SELECT idempotency.stripe_settle('s', 'no id', 'completed', response => '{"object": "balance"}');
SELECT told('no id');
-- settled as failed, with and without
CALL call('declined');
SELECT idempotency.stripe_settle('s', 'declined', 'failed', response => declined('pi_1'));
SELECT told('declined');
CALL call('failed');
SELECT idempotency.stripe_settle('s', 'failed', 'failed');
SELECT told('failed');

-- what contradicts is refused, and changes nothing
CALL call('doubt', broken('pi_1'), 500);
SELECT told('doubt');
CREATE TABLE before AS SELECT * FROM idempotency.stripe_idempotency_keys;
SELECT idempotency.stripe_settle('s', 'doubt', 'completed', response => declined('pi_1'));
SELECT idempotency.stripe_settle('s', 'doubt', 'completed', response => intent('pi_1', 'succeeded') || declined('pi_1'));
SELECT idempotency.stripe_settle('s', 'doubt', 'failed', response => intent('pi_1', 'requires_payment_method'));
SELECT idempotency.stripe_settle('s', 'doubt', 'failed', response => '{"error": {"type": "idempotency_error"}}');
SELECT idempotency.stripe_settle('s', 'doubt', 'failed', response => '{"error": "invalid_grant"}');
SELECT idempotency.stripe_settle('s', 'doubt', 'completed', 'pi_2', response => intent('pi_1', 'succeeded'));
SELECT idempotency.stripe_settle('s', 'doubt', 'failed', 'pi_2', response => declined('pi_1'));
SELECT idempotency.stripe_settle('s', 'doubt', 'not_executed', response => intent('pi_1', 'succeeded'));
SELECT idempotency.stripe_settle('s', 'doubt', 'completed', response => '"{\"id\": \"pi_1\"}"');
SELECT idempotency.stripe_settle('s', 'doubt', 'completed', response => '[]');
SELECT idempotency.stripe_settle('s', 'doubt', 'completed', response => 'null');
SELECT idempotency.stripe_settle('s', 'doubt', 'completed', response => intent('pi_1', 'succeeded', '{"livemode": true}'));
SET idempotency.max_response_size = '1kB';
SELECT idempotency.stripe_settle('s', 'doubt', 'completed', response => intent('pi_1', repeat('x', 2000)));
RESET idempotency.max_response_size;
SELECT count(*) FROM idempotency.stripe_idempotency_keys k FULL JOIN before b USING (account, operation_type, operation_id)
WHERE k IS DISTINCT FROM b;

-- what was known in doubt stays where it is about the object, but for its status, which was that of then,
-- and not where it is about another
SELECT idempotency.stripe_settle('s', 'doubt', 'completed', 'pi_1');
SELECT told('doubt');
CALL call('another', broken('pi_1'), 500);
SELECT idempotency.stripe_settle('s', 'another', 'completed', 'pi_2');
SELECT told('another');
CALL call('undone', broken('pi_1'), 500);
SELECT idempotency.stripe_settle('s', 'undone', 'not_executed');
SELECT outcome, resource_id, resource_type, resource_status, livemode, response IS NULL AS no_response
FROM idempotency.stripe_lookup('s', 'undone');

-- the secret of an endpoint isn't kept this way either
CALL call('endpoint', request => '{"method": "POST", "path": "/v1/webhook_endpoints"}');
SELECT idempotency.stripe_settle('s', 'endpoint', 'completed',
	response => '{"id": "we_1", "object": "webhook_endpoint", "status": "enabled", "secret": "whsec_test"}');
SELECT response FROM idempotency.stripe_lookup('s', 'endpoint');

-- recorded: a status is a string, of at most 255 bytes
CALL call('recorded', intent('pi_1', 'requires_action'), 200);
SELECT told('recorded');
CALL call('refused', declined('pi_1'), 402);
SELECT told('refused');
CALL call('by id', resource => 'pi_1');
SELECT told('by id');
CALL call('long', intent('pi_1', repeat('x', 255)), 200);
CALL call('too long', intent('pi_1', repeat('x', 256)), 200);
CALL call('number', intent('pi_1', NULL, '{"status": 7}'), 200);
CALL call('object', intent('pi_1', NULL, '{"status": {"status": "succeeded"}}'), 200);
SELECT operation_id, length(resource_status) FROM idempotency.stripe_idempotency_keys
WHERE operation_type = 's' AND operation_id IN ('long', 'too long', 'number', 'object') ORDER BY 1;
-- a second answer about the same object is the newer one, and one that doesn't say its status leaves none
SELECT token FROM idempotency.stripe_claim('s', 'twice', '{"path": "/v1/payment_intents"}') \gset
SELECT idempotency.stripe_record('s', 'twice', :token, response => broken('pi_1'), http_status => 500);
SELECT idempotency.stripe_record('s', 'twice', :token, resource_id => 'pi_1');
SELECT told('twice');

-- retention takes bodies, and leaves what a caller needs
SET idempotency.stripe_body_retention = 0;
DO $$ BEGIN PERFORM idempotency.expire(100000); END $$;
RESET idempotency.stripe_body_retention;
SELECT told(id) FROM unnest('{recorded,refused,made,declined}'::text[]) id;

-- reopening begins with nothing, and history knows
SELECT idempotency.stripe_reopen('s', 'refused') IS NOT NULL AS reopened;
SELECT outcome, resource_id, resource_type, resource_status, livemode, history -> 0 ->> 'resource_status' AS was
FROM idempotency.stripe_lookup('s', 'refused');
CALL call('refused', intent('pi_2', 'succeeded'), 200);
SELECT told('refused');

-- a refusal that stands says how a corrected request is sent
CALL call('invalid', '{"error": {"type": "invalid_request_error", "message": "Invalid integer: 19.90"}}', 400,
	request => '{"path": "/v1/payment_intents", "params": {"amount": 19.90}}');
SELECT verdict, outcome FROM idempotency.stripe_claim('s', 'invalid', '{"path": "/v1/payment_intents", "params": {"amount": 19.9}}');
SELECT verdict, outcome FROM idempotency.stripe_claim('s', 'invalid', '{"path": "/v1/payment_intents", "params": {"amount": 1990}}');
SELECT idempotency.stripe_reopen('s', 'invalid', account => '', from_generation => 1) IS NOT NULL AS reopened;
SELECT verdict, generation FROM idempotency.stripe_claim('s', 'invalid', '{"path": "/v1/payment_intents", "params": {"amount": 1990}}');
-- a declined card isn't wrong; another request than one that was made has nothing to hope for
SELECT verdict, outcome FROM idempotency.stripe_claim('s', 'failed', '{"path": "/v1/payment_intents", "params": {"confirm": true}, "method": "POST"}');
SELECT verdict, outcome FROM idempotency.stripe_claim('s', 'failed', '{"path": "/v1/refunds"}');
SELECT verdict, outcome FROM idempotency.stripe_claim('s', 'made', '{"path": "/v1/refunds"}');

DELETE FROM idempotency.stripe_idempotency_keys WHERE operation_type = 's';
SET client_min_messages = warning;
DROP SCHEMA settle_response CASCADE;
