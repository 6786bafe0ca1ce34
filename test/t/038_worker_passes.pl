
# A worker's pass always comes to its end, and looks at each row once: what can't
# be done now holds up neither what is behind it nor the other ledgers.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use Digest::SHA qw(hmac_sha256_hex);
use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_node('main', preload => 1, conf => q{
idempotency.expiry_interval = 1s
idempotency.stripe_ledger = transaction
idempotency.max_workers = 0
autovacuum = off
});

# Calls in the ledger, as a recorder has left them; filled up to some 1,900 bytes
# each, so that 5,000 are more than a worker reads at a time.
sub calls
{
	my ($n, $prefix, $callers, $system, %params) = @_;
	my $filler = $params{large} ? q{(SELECT jsonb_agg(md5(i::text || j)) FROM generate_series(1, 50) j)} : 'NULL';

	sql($node, qq{
		INSERT INTO idempotency.stripe_idempotency_keys (token, created_at, claimed_at, recorded_at, attempt, generation,
			outcome, uncertain, account, operation_type, operation_id, idempotency_key, callers, callers_system, request)
		SELECT i, now(), now(), now(), 1, 1, 'completed', false, '', 'call', '$prefix' || i, '$prefix' || i,
			$callers, $system, $filler
		FROM generate_series(1, $n) i}, db => $params{db});
	return;
}

my $here = '(SELECT system_identifier FROM pg_control_system())';

sub rolled_back
{
	return "'{" . sql($node, "BEGIN;\nSELECT pg_current_xact_id();\nROLLBACK") . "}'";
}

sub workers
{
	my ($n) = @_;

	$node->append_conf('postgresql.conf', "idempotency.max_workers = $n\n");
	$node->reload;
	wait_until($node, q{SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'idempotency worker')},
		'no worker is left') if $n == 0;
	return;
}

sub state_of
{
	my ($columns, %params) = @_;

	return sql($node, "SELECT $columns FROM idempotency.workers WHERE database = current_database()", %params);
}

# From now on a whole pass has gone by, and the next is a second away.
sub wait_for_pass
{
	my ($test_name, %params) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $now = sql($node, 'SELECT clock_timestamp()');

	return wait_until($node, "SELECT last_run > '$now' AND next_run - last_run > interval '0.35 s'
		FROM idempotency.workers WHERE database = current_database()", $test_name, %params);
}

sub is_noted
{
	my ($id, $test_name, %params) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return wait_until($node, "SELECT callers = '{}' FROM idempotency.stripe_idempotency_keys WHERE operation_id = '$id'",
		$test_name, %params);
}

#
# Callers that are open, or of another system
#
foreach my $case ('small', 'large')
{
	my @size = $case eq 'large' ? (large => 1) : ();
	my $session = $node->background_psql('postgres');
	my $xid = $session->query_safe("BEGIN;\nSELECT pg_current_xact_id()");

	calls(400, 'open', "'{$xid}'", $here, @size);
	calls(5000, 'filler', 'NULL', 'NULL', @size);
	calls(1, 'behind', rolled_back(), $here, @size);
	workers(2);
	is_noted('behind1', "$case: behind 400 calls of an open transaction");
	wait_for_pass("$case: a pass comes to its end");
	expired_rows($node, 10);
	wait_until_expired($node, "$case: and what expires goes");
	wait_for_pass("$case: once more");
	is(state_of('status, last_error IS NULL'), 'idle|t', "$case: all is well");
	$session->query_safe('ROLLBACK');
	$session->quit;
	wait_until($node, q{SELECT count(*) = 400 FROM idempotency.stripe_idempotency_keys
		WHERE operation_id LIKE 'open%' AND callers = '{}'}, "$case: once it is over that is written down");
	workers(0);
	sql($node, 'DELETE FROM idempotency.stripe_idempotency_keys; VACUUM idempotency.stripe_idempotency_keys');

	calls(400, 'elsewhere', "'{3}'", 1, @size);
	calls(5000, 'filler', 'NULL', 'NULL', @size);
	calls(1, 'behind', rolled_back(), $here, @size);
	workers(2);
	is_noted('behind1', "$case: behind 400 calls of another system");
	wait_for_pass("$case: a pass comes to its end");
	is(sql($node, q{SELECT count(*) FROM idempotency.stripe_idempotency_keys WHERE callers = '{3}'}), '400',
		"$case: nobody knows of them, and nobody says so");
	workers(0);
	sql($node, 'DELETE FROM idempotency.stripe_idempotency_keys; VACUUM idempotency.stripe_idempotency_keys');
}

#
# Calls that raise an error
#
sql($node, q{
	CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'not this one'; END$$;
	CREATE TRIGGER refuse BEFORE UPDATE ON idempotency.stripe_idempotency_keys
		FOR EACH ROW WHEN (OLD.operation_id LIKE 'refused%') EXECUTE FUNCTION refuse()});
my $xid = rolled_back();
calls(250, 'refused', $xid, $here);
calls(1, 'behind', $xid, $here);
my $offset = -s $node->logfile;
workers(2);
is_noted('behind1', 'behind 250 calls that raise an error');
wait_until($node, q{SELECT status = 'rows refused' AND refused = 250 FROM idempotency.workers
	WHERE database = current_database()}, 'each is counted once a pass');
is(state_of('last_error'), '(account, operation_type, operation_id)=(, call, refused1): not this one', 'one is named');
is(state_of('next_step'), 'SELECT * FROM idempotency.stripe_unknown;', 'and where to look');
wait_for_pass('another pass');
wait_for_pass('and another');
is(scalar(() = substr(slurp_file($node->logfile), $offset) =~ /DETAIL:  Row .*not this one/g), 1, 'logged once');
my $locker = $node->background_psql('postgres');
workers(0);
calls(150, 'locked', $xid, $here);
calls(1, 'behind locked', $xid, $here);
$locker->query_safe(q{BEGIN; SELECT FROM idempotency.stripe_idempotency_keys WHERE operation_id LIKE 'locked%' FOR UPDATE});
workers(2);
is_noted('behind locked1', 'behind 150 calls that somebody has locked');
$locker->query_safe('COMMIT');
$locker->quit;
is_noted('locked150', 'which come later');
sql($node, q{DROP TRIGGER refuse ON idempotency.stripe_idempotency_keys});
is_noted('refused250', 'and those that were refused, once they aren\'t');
workers(0);
sql($node, 'DELETE FROM idempotency.stripe_idempotency_keys; VACUUM idempotency.stripe_idempotency_keys');

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
		INSERT INTO idempotency.stripe_webhook_events (token, received_at, attempts, success, processed_at, account, stripe_event_id,
			consumer, event_type, pending_key, payload_snapshot)
		SELECT i, now(), 1, true, now(), '', 'evt_' || i, '', 'refund.created', $key,
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
wait_until($node, q{SELECT count(*) = 1 FROM idempotency.stripe_webhook_events
	WHERE stripe_event_id LIKE 'evt_needless%' AND pending_key IS NOT NULL},
	'one behind the others, and behind one that raises an error, is forgotten');
wait_until($node, q{SELECT status = 'rows refused' AND refused = 1 FROM idempotency.workers
	WHERE database = current_database()}, 'which the view says');
is(state_of('last_error'), '(account, stripe_event_id, consumer)=(, evt_needless_1, ): not this one', 'and which');
sql($node, 'DROP TRIGGER refuse ON idempotency.stripe_webhook_events');
wait_until($node, q{SELECT NOT EXISTS (SELECT FROM idempotency.stripe_webhook_events
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
wait_until($node, q{SELECT outcome = 'completed' FROM idempotency.stripe_lookup('refund', 'next')}, 'a call behind it is settled');
is(sql($node, q{SELECT outcome FROM idempotency.stripe_lookup('refund', 'refused')}), 'unknown', 'and it is not');
workers(0);
sql($node, 'DROP TRIGGER refuse ON idempotency.stripe_idempotency_keys');

#
# Rows that can't be removed, in a table that isn't read directly: more than one
# run gives up at
#
sql($node, q{
	ALTER TABLE idempotency.idempotency_keys ENABLE ROW LEVEL SECURITY;
	CREATE TRIGGER refuse BEFORE DELETE ON idempotency.idempotency_keys
		FOR EACH ROW WHEN (OLD.key LIKE 'a%') EXECUTE FUNCTION refuse()});
expired_rows($node, 150, prefix => 'a');
expired_rows($node, 20, prefix => 'b');
workers(2);
wait_until($node, q{SELECT count(*) = 150 FROM idempotency.idempotency_keys}, 'by key: behind 150 that refuse');
sql($node, q{DROP TRIGGER refuse ON idempotency.idempotency_keys;
	ALTER TABLE idempotency.idempotency_keys DISABLE ROW LEVEL SECURITY});
wait_until_expired($node, 'by key: and those, too, once they don\'t');

# By key, calls, too
workers(0);
sql($node, 'ALTER TABLE idempotency.stripe_idempotency_keys ENABLE ROW LEVEL SECURITY');
calls(250, 'a', "'{3}'", 1);
$xid = rolled_back();
calls(150, 'b', $xid, $here);
workers(2);
is_noted('b150', 'by key: calls');
sql($node, 'ALTER TABLE idempotency.stripe_idempotency_keys DISABLE ROW LEVEL SECURITY');

# A row that ends the process: the other ledgers have their turn all the same.
workers(0);
sql($node, q{
	CREATE FUNCTION kill() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); PERFORM pg_sleep(60); END';
	CREATE TRIGGER kill BEFORE DELETE ON idempotency.idempotency_keys
		FOR EACH ROW WHEN (OLD.key LIKE 'a%') EXECUTE FUNCTION kill()});
expired_rows($node, 1, prefix => 'a');
calls(1, 'c', rolled_back(), $here);
workers(2);
is_noted('c1', 'behind a row that ends the worker');
sql($node, 'DROP TRIGGER kill ON idempotency.idempotency_keys');
wait_until_expired($node, 'which goes, too, once it doesn\'t');

$node->stop;
done_testing();
