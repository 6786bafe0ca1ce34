
# What settles a call is told to those who listen, when and only when its
# transaction commits: also where that is prepared, committed by another
# session, after a crash, on a promoted standby.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use Digest::SHA qw(hmac_sha256_hex);
use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

needs_debug_points();

my $conf = "restart_after_crash = on\nautovacuum = off\nidempotency.expiry_interval = 1s\n";
my $node = new_node('main', debug => 1, init => { allows_streaming => 1 }, conf => $conf);

# Calls that nobody knows the outcome of, and something that settles one.
sub doubts
{
	my ($on, @ids) = @_;

	foreach my $id (@ids)
	{
		sql($on, qq{
			SET idempotency.stripe_ledger = 'transaction';
			SELECT token AS t FROM idempotency.stripe_claim('pay', '$id', '{"method": "POST", "path": "/v1/refunds"}') \\gset
			SELECT idempotency.stripe_record('pay', '$id', :t)});
	}
	return;
}

sub settle
{
	my ($id) = @_;

	return "SELECT idempotency.stripe_settle('pay', '$id', 'completed', 're_$id')";
}

# Stripe's event of what was made by the call
sub event
{
	my ($on, $id) = @_;
	my $key = sql($on, "SELECT idempotency_key FROM idempotency.stripe_lookup('pay', '$id')");
	my $body = qq({"id": "evt_$id", "object": "event", "type": "refund.created", "livemode": false, )
	  . qq("request": {"id": "req_1", "idempotency_key": "$key"}, )
	  . qq("data": {"object": {"id": "re_$id", "object": "refund"}}});
	my $signature = 't=1795300000,v1=' . hmac_sha256_hex("1795300000.$body", 'whsec_test');

	return "SELECT FROM idempotency.stripe_webhook_receive('\\x" . unpack('H*', $body)
	  . "', '$signature', '{whsec_test}', '1000 years')";
}

sub listener
{
	my ($on) = @_;
	my $session = $on->background_psql('postgres', on_error_stop => 0);

	$session->query_safe('LISTEN idempotency_settled');
	return $session;
}

# What a listener has heard since it was asked last: ids of operations.
sub heard
{
	my ($listener) = @_;

	return join(' ', $listener->query('SELECT 1') =~ /"operation_id": "([^"]*)"/g);
}

# ... at last
sub hears
{
	my ($listener, $expected, $test_name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $got = '';

	foreach (1 .. 600)
	{
		$got = join(' ', grep { $_ ne '' } $got, heard($listener));
		last if length $got >= length $expected;
		select(undef, undef, undef, 0.1);
	}
	return is($got, $expected, $test_name);
}

sub pending
{
	my ($on) = @_;

	return sql($on, 'SELECT count(*) FROM idempotency.pending_notices');
}

my $listener = listener($node);

# COMMIT, ROLLBACK, savepoints
doubts($node, 1 .. 9);
sql($node, 'BEGIN; ' . settle(1) . '; COMMIT');
is(heard($listener), '1', 'told with the commit');
sql($node, 'BEGIN; ' . settle(2) . '; ROLLBACK');
is(heard($listener), '', 'and not after a rollback');
sql($node, join('; ', 'BEGIN', settle(2), 'SAVEPOINT a', settle(3), 'SAVEPOINT b', settle(4), 'RELEASE b',
		'ROLLBACK TO a', 'SAVEPOINT c', settle(5), 'SAVEPOINT d', settle(6), 'ROLLBACK TO d', 'RELEASE c', settle(7), 'COMMIT'));
is(heard($listener), '2 5 7', 'savepoints that were rolled back tell nothing');

# what was not executed has made nothing, whatever an answer before named
doubts($node, 'nothing');
sql($node, q{UPDATE idempotency.stripe_idempotency_keys SET resource_id = 're_1' WHERE operation_id = 'nothing';
	SELECT idempotency.stripe_settle(operation_type, operation_id, 'not_executed')
	FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'nothing'});
like($listener->query('SELECT 1'), qr/"operation_id": "nothing", "outcome": "not_executed", "resource_id": null/,
	'not executed: no object is named');

# PREPARE TRANSACTION
foreach my $level ('READ COMMITTED', 'REPEATABLE READ', 'SERIALIZABLE')
{
	my $id = lc($level =~ s/ .*//r);

	doubts($node, "$id a", "$id b", "$id c", "$id d");
	sql($node, join('; ', "BEGIN ISOLATION LEVEL $level", settle("$id a"), 'SAVEPOINT a', settle("$id b"), 'ROLLBACK TO a',
			settle("$id c"), "PREPARE TRANSACTION '$id'"));
	is(heard($listener), '', "$level: a prepared transaction tells nothing");
	is(pending($node), '0', "$level: and nobody else sees its notices");
	sql($node, "COMMIT PREPARED '$id'");
	hears($listener, "$id a $id c", "$level: COMMIT PREPARED does");
	is(pending($node), '0', "$level: nothing is left");
	sql($node, "BEGIN ISOLATION LEVEL $level; " . settle("$id d") . "; PREPARE TRANSACTION '$id'");
	sql($node, "ROLLBACK PREPARED '$id'");
	is(heard($listener), '', "$level: ROLLBACK PREPARED tells nothing");
}

# an event of Stripe's
sql($node, 'BEGIN; ' . event($node, 8) . "; PREPARE TRANSACTION 'event'");
sql($node, "COMMIT PREPARED 'event'");
is(sql($node, q{SELECT outcome, settled ->> 'by' IS NOT NULL FROM idempotency.stripe_lookup('pay', '8')}), 'completed|t',
	'an event settles a call in a transaction that is prepared');
hears($listener, '8', 'and it is told');

# a NOTIFY of the user's own is refused as ever
run_fails($node, 'BEGIN; ' . settle(9) . "; NOTIFY own; PREPARE TRANSACTION 'own'", '0A000', 'a NOTIFY of one\'s own is refused');
is(pending($node), '0', 'and nothing is left');

# a role that has no rights on the table
doubts($node, 'role', 'read only', 'locked', 'crash', 'crash 2', 'promoted', 'dropped');
sql($node, q{CREATE ROLE operator; SELECT idempotency.grant_role('operator', 'operator')});
sql($node, 'SET ROLE operator; SET search_path = pg_temp; BEGIN; ' . settle('role') . "; PREPARE TRANSACTION 'role'");
sql($node, "SET ROLE operator; COMMIT PREPARED 'role'");
hears($listener, 'role', 'whoever may settle may prepare');

# whoever commits it can't, or somebody has the table locked: a worker sends it
sql($node, 'BEGIN; ' . settle('read only') . "; PREPARE TRANSACTION 'read only'");
sql($node, "SET default_transaction_read_only = on; COMMIT PREPARED 'read only'");
hears($listener, 'read only', 'a read-only session commits it: a worker tells');
sql($node, 'ALTER SYSTEM SET idempotency.max_workers = 0; SELECT pg_reload_conf()');
wait_until($node, q{SELECT status = 'stopped' FROM idempotency.workers WHERE database = 'postgres'}, 'no worker comes');
sql($node, 'BEGIN; ' . settle('locked') . "; PREPARE TRANSACTION 'locked'");
sql($node, "SET lock_timeout = '100ms'; COMMIT PREPARED 'locked'");
is(heard($listener), '', 'without workers nothing is told yet');
my $locker = $node->background_psql('postgres', on_error_stop => 0);
$locker->query_safe('BEGIN; LOCK idempotency.pending_notices IN EXCLUSIVE MODE');
sql($node, 'ALTER SYSTEM RESET idempotency.max_workers; SELECT pg_reload_conf()');
wait_until($node, q{SELECT last_error LIKE 'could not send the notices%' FROM idempotency.workers WHERE database = 'postgres'},
	'the table is locked: the view says that it cannot be sent');
is(heard($listener), '', 'and it is not');
$locker->query_safe('ROLLBACK');
hears($listener, 'locked', 'a worker tells when it can');
$locker->quit;

# the server crashes between the commit and the NOTIFY; after that nobody knows that there
# are notices, and the next pass finds them
sql($node, 'BEGIN; ' . settle('crash') . "; PREPARE TRANSACTION 'crash'");
sql($node, 'BEGIN; ' . settle('crash 2') . "; PREPARE TRANSACTION 'crash 2'");
arm($node, 'commit-prepared', 'kill');
my $offset = -s $node->logfile;
$node->psql('postgres', "SET synchronous_commit = on; COMMIT PREPARED 'crash'");
$node->wait_for_log(qr/all server processes terminated; reinitializing/, $offset);
wait_until_up($node);
eval { $listener->quit };
$node->poll_query_until('postgres', 'SELECT NOT EXISTS (SELECT FROM idempotency.pending_notices)') or die 'no worker has come';
pass('the server crashes right after COMMIT PREPARED: a worker sends what is left');
$listener = listener($node);
sql($node, "COMMIT PREPARED 'crash 2'");
hears($listener, 'crash 2', 'what was prepared before a crash is told after it');
$listener->quit;

# the worker that sends comes at once, however far ahead the next pass is
$node->append_conf('postgresql.conf', 'idempotency.expiry_interval = 1d');
$node->reload;
$node->poll_query_until('postgres', q{SELECT next_run > now() + interval '1 hour' FROM idempotency.workers WHERE database = 'postgres'})
  or die 'no pass has ended';
$listener = listener($node);
doubts($node, 'soon');
sql($node, 'BEGIN; ' . settle('soon') . "; PREPARE TRANSACTION 'soon'");
sql($node, "COMMIT PREPARED 'soon'");
hears($listener, 'soon', 'COMMIT PREPARED has a worker come');
$listener->quit;
$node->append_conf('postgresql.conf', 'idempotency.expiry_interval = 1s');

# a standby that is promoted
sql($node, 'BEGIN; ' . settle('promoted') . "; PREPARE TRANSACTION 'promoted'");
$node->backup('backup');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($node, 'backup', has_streaming => 1);
$standby->start;
$node->wait_for_catchup($standby, 'replay', $node->lsn('flush'));
$node->stop('immediate');
$standby->promote;
$listener = listener($standby);
sql($standby, "COMMIT PREPARED 'promoted'");
hears($listener, 'promoted', 'a promoted standby commits what was prepared, and tells');
$listener->quit;

# it takes no part in dumps, and goes with the extension
sql($standby, 'BEGIN; ' . settle('dropped') . "; PREPARE TRANSACTION 'dropped'");
run_fails($standby, q{SET lock_timeout = '100ms'; DROP EXTENSION idempotency CASCADE}, '55P03', 'DROP EXTENSION waits for what is prepared');
sql($standby, q{COMMIT PREPARED 'dropped'; SELECT pg_sleep(0)});
sql($standby, 'DROP EXTENSION idempotency CASCADE; CREATE TABLE t (); BEGIN; CREATE TABLE u (); PREPARE TRANSACTION \'other\'');
sql($standby, q{COMMIT PREPARED 'other'});
pass('COMMIT PREPARED in a database without the extension');
$standby->stop;

# not preloaded: PostgreSQL refuses, and says why
my $plain = new_node('plain');
doubts($plain, 1, 2);
my (undef, undef, $stderr) = $plain->psql('postgres', 'BEGIN; ' . settle(1) . "; PREPARE TRANSACTION 'plain'");
like($stderr, qr/cannot PREPARE a transaction that has executed LISTEN, UNLISTEN, or NOTIFY/, 'not preloaded: refused');
$listener = listener($plain);
sql($plain, 'BEGIN; ' . settle(2) . '; COMMIT');
is(heard($listener), '2', 'not preloaded: COMMIT tells as ever');
$plain->stop;

done_testing();
