--
-- Settling what isn't known, acknowledging orphans, and the views of both
--
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS idempotency;
RESET client_min_messages;
\set SHOW_CONTEXT never

-- an operation in each state
CREATE FUNCTION pg_temp.make(id text, status int DEFAULT NULL, recorded boolean DEFAULT true) RETURNS void
LANGUAGE plpgsql SET idempotency.stripe_ledger = 'transaction' AS $$
DECLARE
	c idempotency.stripe_claim_result := idempotency.stripe_claim('refund', id, '{"amount": 1}');
BEGIN
	IF recorded THEN
		PERFORM idempotency.stripe_record('refund', id, c.token, http_status => status,
			resource_id => CASE WHEN status = 200 THEN 're_0' END,
			response => CASE WHEN status > 200 THEN '{"error": {"type": "api_error"}}'::jsonb END);
	END IF;
END $$;
DO $$ BEGIN
	PERFORM pg_temp.make('completed', 200), pg_temp.make('failed', 402), pg_temp.make('not_executed', 429),
		pg_temp.make('unknown'), pg_temp.make('sticky', 500), pg_temp.make('held', recorded => false),
		pg_temp.make('lapsed', recorded => false), pg_temp.make('mismatch', recorded => false);
END $$;
SELECT idempotency.stripe_record('refund', 'mismatch', token, http_status => 400, response => '{"error": {"type": "idempotency_error"}}')
FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'mismatch';
UPDATE idempotency.stripe_idempotency_keys SET lease_expires_at = clock_timestamp() WHERE operation_id = 'lapsed';

-- calls of the database itself whose caller is gone
UPDATE idempotency.stripe_idempotency_keys SET first_sent_at = created_at;
INSERT INTO idempotency.stripe_idempotency_keys
	(token, created_at, claimed_at, first_sent_at, attempt, generation, outcome, uncertain, account, operation_type, operation_id,
	idempotency_key, caller_life, caller_vxid, callers, callers_system)
SELECT 1, now(), now(), now(), 1, 1, 'in_progress', false, '', 'refund', 'gone', 'key', 1, '3/1', '{3}', system_identifier
FROM pg_control_system();

SELECT operation_id, reason, attempt, http_status, resource_id FROM idempotency.stripe_unknown ORDER BY operation_id;
-- what the database has sent is sent again, while that may help; then Stripe is asked; and what that
-- hasn't told, a person has to find out
SELECT operation_id, next_step FROM idempotency.stripe_unknown ORDER BY operation_id;
BEGIN;
UPDATE idempotency.stripe_idempotency_keys SET method = 'POST' WHERE operation_id IN ('unknown', 'sticky', 'gone', 'mismatch');
SELECT operation_id, next_step FROM idempotency.stripe_unknown WHERE next_step LIKE '%stripe_retry%' ORDER BY operation_id;
UPDATE idempotency.stripe_idempotency_keys SET first_sent_at = now() - interval '1 day' WHERE operation_id = 'unknown';
SELECT operation_id, next_step FROM idempotency.stripe_unknown WHERE operation_id = 'unknown';
UPDATE idempotency.stripe_idempotency_keys
SET reconciled = jsonb_build_object('at', claimed_at + interval '1 minute', 'next', 'events') WHERE operation_id = 'sticky';
SELECT operation_id, next_step FROM idempotency.stripe_unknown WHERE operation_id = 'sticky';
UPDATE idempotency.stripe_idempotency_keys SET reconciled = jsonb_build_object('at', claimed_at - interval '1 minute')
WHERE operation_id = 'sticky';
SELECT operation_id, next_step FROM idempotency.stripe_unknown WHERE operation_id = 'sticky';
ROLLBACK;
UPDATE idempotency.stripe_idempotency_keys SET reconciled = jsonb_build_object('at', claimed_at + interval '1 minute')
WHERE operation_id = 'sticky';
SELECT next_step FROM idempotency.stripe_unknown WHERE operation_id = 'sticky';
-- it can't be typed without thinking
SELECT next_step FROM idempotency.stripe_unknown WHERE operation_id = 'sticky' \gexec
SELECT operation_id, lapsed FROM idempotency.open_claims WHERE operation_type = 'refund' ORDER BY operation_id;
SELECT outcome, lapsed FROM idempotency.stripe_lookup('refund', 'gone');
SELECT verdict, outcome FROM idempotency.stripe_claim('refund', 'mismatch');

--
-- stripe_settle
--
SELECT idempotency.stripe_settle('refund', 'unknown', 'completed', 're_1', 'seen in the Dashboard');
SELECT idempotency.stripe_settle('refund', 'sticky', 'failed', note => 'asked Stripe');
SELECT idempotency.stripe_settle('refund', 'lapsed', 'not_executed');
SELECT idempotency.stripe_settle('refund', 'gone', 'completed', 're_2');
SELECT idempotency.stripe_settle('refund', 'mismatch', 'not_executed');
SELECT operation_id, outcome, uncertain, first_sent_at IS NOT NULL AS sent, resource_id, lease_expires_at, caller_life,
	settled - 'at' - 'by' AS settled, settled ->> 'by' = session_user AS by, (settled ->> 'at')::timestamptz = recorded_at AS at
FROM idempotency.stripe_idempotency_keys WHERE settled IS NOT NULL ORDER BY operation_id;
SELECT id, verdict, outcome, resource_id FROM unnest('{unknown,sticky,gone}'::text[]) id,
	LATERAL idempotency.stripe_claim('refund', id) ORDER BY 1;
SELECT settled -> 'was' AS was, settled ->> 'note' AS note FROM idempotency.stripe_lookup('refund', 'sticky');
-- what was never executed is free, with the same key
SELECT verdict, attempt, generation, request FROM idempotency.stripe_claim('refund', 'lapsed');
-- once more changes nothing, another outcome is refused
SELECT xmin AS before FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'unknown' \gset
SELECT idempotency.stripe_settle('refund', 'unknown', 'completed');
SELECT idempotency.stripe_settle('refund', 'unknown', 'completed', 're_1');
SELECT xmin = :'before' AS unchanged FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'unknown';
SELECT idempotency.stripe_settle('refund', 'unknown', 'completed', 're_9');
SELECT idempotency.stripe_settle('refund', 'unknown', 'failed');
SELECT idempotency.stripe_settle('refund', 'completed', 'not_executed');
SELECT idempotency.stripe_settle('refund', 'failed', 'completed', 're_3');
SELECT idempotency.stripe_settle('refund', 'held', 'completed', 're_4');
SELECT idempotency.stripe_settle('refund', 'absent', 'completed');
-- who finds out that it happened after all
SELECT idempotency.stripe_settle('refund', 'not_executed', 'completed', 're_5');
-- arguments
SELECT idempotency.stripe_settle('refund', 'held', 'unknown');
SELECT idempotency.stripe_settle('refund', 'held', 'in_progress');
SELECT idempotency.stripe_settle('refund', 'held', 'mismatch');
SELECT idempotency.stripe_settle('refund', 'held', NULL);
SELECT idempotency.stripe_settle('refund', 'held', 'not_executed', 're_6');
SELECT idempotency.stripe_settle('refund', 'held', 'completed', '');
SELECT idempotency.stripe_settle('', 'held', 'completed');
SELECT idempotency.stripe_settle('refund', NULL, 'completed');
SELECT idempotency.stripe_settle('refund', 'held', 'completed', account => NULL);
-- a late answer of Stripe's wins over what a person said, where that was not the last word
SELECT token FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'mismatch' \gset
SELECT idempotency.stripe_record('refund', 'mismatch', :token, 're_7');
SELECT token FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'unknown' \gset
SELECT idempotency.stripe_record('refund', 'unknown', :token, 're_8');
-- a new generation keeps what was
SELECT length(idempotency.stripe_reopen('refund', 'sticky')) > 36 AS reopened;
SELECT settled, history -> 0 -> 'settled' -> 'note' AS note FROM idempotency.stripe_lookup('refund', 'sticky');

--
-- stripe_reconcile: its arguments
--
SELECT * FROM idempotency.stripe_reconcile(operation_id => 'held');
SELECT * FROM idempotency.stripe_reconcile('refund', '');
SELECT * FROM idempotency.stripe_reconcile('');
SELECT * FROM idempotency.stripe_reconcile(account => NULL);
SELECT * FROM idempotency.stripe_reconcile(account => 'acct 1');
SELECT * FROM idempotency.stripe_reconcile(max_requests => 0);
SELECT * FROM idempotency.stripe_reconcile(max_requests => 1001);
SELECT * FROM idempotency.stripe_reconcile(max_requests => NULL);

--
-- stripe_acknowledge
--
SELECT operation_id, outcome, fate, resource_id, next_step FROM idempotency.stripe_orphans ORDER BY 1;
SELECT idempotency.stripe_acknowledge('refund', 'gone', NULL);
SELECT idempotency.stripe_acknowledge('refund', 'absent', 'note');
SELECT idempotency.stripe_acknowledge('refund', 'completed', 'note');
-- what the view doesn't list isn't acknowledged
BEGIN;
UPDATE idempotency.stripe_idempotency_keys SET callers = '{3}', callers_system = (SELECT system_identifier FROM pg_control_system()),
	outcome = operation_id::idempotency.outcome
WHERE operation_id IN ('mismatch', 'unknown');
SELECT operation_id FROM idempotency.stripe_orphans WHERE operation_id IN ('mismatch', 'unknown');
SELECT idempotency.stripe_acknowledge('refund', 'unknown', 'note');
SELECT idempotency.stripe_acknowledge('refund', 'mismatch', 'note');
ROLLBACK;
SELECT idempotency.stripe_acknowledge('refund', 'gone', 'refunded');
SELECT idempotency.stripe_acknowledge('refund', 'gone', 'a second time');
SELECT acknowledged - 'at' - 'by' AS acknowledged FROM idempotency.stripe_lookup('refund', 'gone');
SELECT count(*) FROM idempotency.stripe_orphans;
SELECT callers, s, idempotency.stripe_callers_fate(callers, s)
FROM (VALUES (NULL::xid8[], NULL::bigint), ('{}', NULL), ('{}', 1), ('{3}', 1), ('{3}', NULL)) v (callers, s);
SELECT idempotency.stripe_callers_fate(ARRAY[pg_current_xact_id()], system_identifier),
	idempotency.stripe_callers_fate(ARRAY[pg_current_xact_id(), '3'], system_identifier) FROM pg_control_system();
SELECT idempotency.stripe_has_lapsed(NULL, 1, '3/4') AS gone, idempotency.stripe_has_lapsed('infinity', 1, '3/4') AS gone_too,
	idempotency.stripe_has_lapsed('infinity', NULL, '3/4') AS leased, idempotency.stripe_has_lapsed('-infinity', NULL, NULL) AS lapsed,
	idempotency.stripe_has_lapsed(NULL, NULL, NULL) AS without_lease, idempotency.stripe_has_lapsed('infinity', 1, NULL) AS nobody,
	idempotency.stripe_has_lapsed(NULL, 1, 'x') AS odd;

-- by roles
CREATE ROLE regress_operator;
CREATE ROLE regress_observer;
SELECT idempotency.grant_role('regress_operator', 'operator'), idempotency.grant_role('regress_observer', 'observer');
SET ROLE regress_observer;
SELECT count(*) FROM idempotency.stripe_unknown;
SELECT count(*) FROM idempotency.stripe_orphans;
SELECT idempotency.stripe_settle('refund', 'held', 'completed');
SELECT * FROM idempotency.stripe_reconcile();
SET ROLE regress_operator;
SELECT count(*) FROM idempotency.stripe_unknown;
SELECT idempotency.stripe_settle('refund', 'held', 'completed');
SELECT * FROM idempotency.stripe_reconcile(max_requests => 0);
SELECT idempotency.stripe_acknowledge('refund', 'completed', 'note');
RESET ROLE;
DROP OWNED BY regress_operator, regress_observer;
DROP ROLE regress_operator, regress_observer;
-- nothing of the answer that left it unknown is replayed with what is known now
SELECT token FROM idempotency.stripe_claim('refund', 'was 500', '{"amount": 1}') \gset
SELECT idempotency.stripe_record('refund', 'was 500', :token, http_status => 500, response => '{"error": {"type": "api_error"}}');
SELECT idempotency.stripe_settle('refund', 'was 500', 'completed', 're_500');
SELECT verdict, outcome, resource_id, http_status, response, error FROM idempotency.stripe_claim('refund', 'was 500', '{"amount": 1}');
DELETE FROM idempotency.stripe_idempotency_keys;
