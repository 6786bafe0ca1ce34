# Workers settle calls by events that came before they could be, and look whether
# events still have to wait: other people's events, however many, and those that
# raise an error hold up none of that.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use Digest::SHA qw(hmac_sha256_hex);
use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use WorkerTest;

my $node = worker_node();

sql($node, q{
	CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'not this one'; END$$});

#
# Events: many of other people's keys, and one of ours that came before its call
# could be seen
#
sub receive
{
	my ($id, $key, $type) = @_;
	my $body = qq({"id": "$id", "object": "event", "type": "$type", "created": 1795300000, "livemode": false,)
	  . qq( "request": {"id": "req_1", "idempotency_key": "$key"},)
	  . qq( "data": {"object": {"id": "re_$id", "object": "refund", "status": "succeeded"}}});
	my $now = time();

	return sql($node, "SELECT stored FROM idempotency.stripe_webhook_receive(convert_to(\$\$$body\$\$, 'UTF8'),
		't=$now,v1=" . hmac_sha256_hex("$now.$body", 'whsec_test') . "', '{whsec_test}')");
}

sub foreign_events
{
	my ($from, $to, $key) = @_;

	sql($node, qq{
		INSERT INTO idempotency.stripe_webhook_events (token, received_at, next_attempt_at, attempts, success, processed_at, account, stripe_event_id,
			consumer, event_type, pending_key, payload_snapshot)
		SELECT i, now(), now(), 1, true, now(), '', 'evt_' || i, '', 'refund.created', $key,
			jsonb_build_object('id', 'evt_' || i, 'object', 'event', 'type', 'refund.created',
				'request', jsonb_build_object('idempotency_key', $key),
				'data', '{"object": {"id": "re_1", "object": "refund", "status": "succeeded"}}'::jsonb)
		FROM generate_series($from, $to) i});
	return;
}

my $uuid = q{'018c2b5e-0000-8000-8000-' || lpad(i::text, 12, '0')};
foreign_events(1, 30_000, "'a foreign key:' || lpad(i::text, 6, '0') || ':' || $uuid");
foreign_events(30_001, 30_300, q{'a foreign key of many events:1:018c2b5e-0000-8000-8000-000000000001'});
sql($node, 'ANALYZE idempotency.stripe_webhook_events');
my $key = sql($node, q{SELECT idempotency.stripe_idempotency_key('refund', 'early')});
my $caller = $node->background_psql('postgres');
$caller->query_safe(q{BEGIN;
	SELECT idempotency.stripe_record('refund', 'early', token) FROM idempotency.stripe_claim('refund', 'early',
		'{"method": "POST", "path": "/v1/refunds"}')});
is(receive('evt_early', $key, 'refund.created'), 't', 'an event comes before its call has committed');
is(sql($node, q{SELECT pending_key IS NOT NULL FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_early'}),
	't', 'and waits for it');
$caller->query_safe('COMMIT');
$caller->quit;
workers(2);
wait_for_pass('one pass');
is(sql($node, q{SELECT outcome, resource_id FROM idempotency.stripe_lookup('refund', 'early')}), 'completed|re_evt_early',
	'settles the call');
is(sql($node, q{SELECT pending_key IS NULL FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_early'}),
	't', 'and the event waits no longer');
workers(0);

# Those that needn't wait any more are found among the others, bit by bit.
my @needless = map { "evt_needless_$_" } 1 .. 3;
sql($node, q{DELETE FROM idempotency.stripe_webhook_events WHERE stripe_event_id ~ '^evt_\d+$' AND token BETWEEN 2501 AND 30000;
	VACUUM idempotency.stripe_webhook_events});
receive($_, $key, 'refund.updated') foreach @needless;
sql($node, qq{UPDATE idempotency.stripe_webhook_events SET pending_key = '$key' WHERE stripe_event_id LIKE 'evt_needless%';
	CREATE TRIGGER refuse BEFORE UPDATE ON idempotency.stripe_webhook_events
		FOR EACH ROW WHEN (OLD.stripe_event_id = 'evt_needless_1') EXECUTE FUNCTION refuse()});
my $waiting = q{SELECT count(*) FROM idempotency.stripe_webhook_events WHERE pending_key IS NOT NULL};
is(sql($node, $waiting), '2803', 'events that wait');
workers(2);
holds($node, q{SELECT count(*) = 1 FROM idempotency.stripe_webhook_events
	WHERE stripe_event_id LIKE 'evt_needless%' AND pending_key IS NOT NULL},
	'one behind the others, and behind one that raises an error, is forgotten');
holds($node, q{SELECT status = 'rows refused' AND refused = 1 FROM idempotency.workers
	WHERE database = current_database()}, 'which the view says');
is(state_of('last_error'), '(account, stripe_event_id, consumer)=(, evt_needless_1, ): not this one', 'and which');
sql($node, 'DROP TRIGGER refuse ON idempotency.stripe_webhook_events');
holds($node, q{SELECT NOT EXISTS (SELECT FROM idempotency.stripe_webhook_events
	WHERE stripe_event_id LIKE 'evt_needless%' AND pending_key IS NOT NULL)}, 'it is, too, once it can be');
is(sql($node, $waiting), '2800', 'and the others wait on');

# A call that can't be settled doesn't keep others from it.  (A claim sees the
# event at once; take that back.)
workers(0);
foreach my $id ('refused', 'next')
{
	receive("evt_$id", sql($node, "SELECT idempotency.stripe_idempotency_key('refund', '$id')"), 'refund.created');
	sql($node, qq{SELECT FROM idempotency.stripe_claim('refund', '$id', '{"method": "POST", "path": "/v1/refunds"}')});
}
sql($node, q{
	UPDATE idempotency.stripe_idempotency_keys SET outcome = 'unknown', resource_id = NULL, settled = NULL
	WHERE operation_type = 'refund' AND operation_id IN ('refused', 'next');
	CREATE TRIGGER refuse BEFORE UPDATE ON idempotency.stripe_idempotency_keys
		FOR EACH ROW WHEN (NEW.outcome = 'completed' AND OLD.operation_id = 'refused') EXECUTE FUNCTION refuse()});
workers(2);
holds($node, q{SELECT outcome = 'completed' FROM idempotency.stripe_lookup('refund', 'next')}, 'a call behind it is settled');
is(sql($node, q{SELECT outcome FROM idempotency.stripe_lookup('refund', 'refused')}), 'unknown', 'and it is not');
workers(0);
sql($node, 'DROP TRIGGER refuse ON idempotency.stripe_idempotency_keys');

$node->stop;
done_testing();
