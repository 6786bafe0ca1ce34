
# Where more databases call than the server has places for processes, their
# recorders take turns, and every call is made.  And of the shared memory that a
# call needs, a session keeps next to nothing.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

needs_debug_points();

my $node = new_node('main', debug => 1, conf => q{
max_worker_processes = 8
max_connections = 60
});
my @all = map { "d$_" } 1 .. 20;

$node->psql('postgres', 'CREATE DATABASE template');
sql($node, 'CREATE EXTENSION idempotency', db => 'template');
create_test_caller($node, db => 'template');
wait_for_no_recorder($node);
foreach my $db (@all)
{
	sql($node, "CREATE DATABASE $db TEMPLATE template");
	sql($node, q{SELECT idempotency.stripe_namespace('new')}, db => $db);
}

#
# Twenty databases at once, with everything else as it is by default, but for the
# time that a busy machine may take
#

my %session = map { $_ => $node->background_psql($_, on_error_stop => 0) } @all;
foreach my $db (@all)
{
	# three calls, each of which needs the recorder twice
	$session{$db}->query_safe(q{SET idempotency.stripe_record_timeout = '30s'});
	$session{$db}->query_until(qr/begun/, "\\echo begun\n" . join('', map { "SELECT test_stripe_call('call', '$_');\n" } 1 .. 3));
}
foreach my $db (@all)
{
	my $said = $session{$db}->query('SELECT 1');

	is(scalar(() = $said =~ /^claimed completed/mg), 3, "$db: three calls are made")
	  || diag($said . $session{$db}{stderr});
}
$_->quit foreach values %session;
is( join(' ', map { sql($node, q{SELECT count(*) FROM idempotency.stripe_idempotency_keys WHERE outcome = 'completed'}, db => $_) } @all),
	join(' ', (3) x @all), 'and each is recorded');

#
# One place, for two that take turns
#

$node->append_conf('postgresql.conf', q{
max_worker_processes = 2
max_logical_replication_workers = 0
max_parallel_workers = 0
idempotency.max_workers = 0
});
$node->restart;
wait_until($node, q{SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'idempotency launcher'}, 'there is a launcher');

sub recorders
{
	my ($condition) = @_;

	return sql($node, "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'idempotency recorder' AND $condition");
}

my $turns = 20;
my $calls = join('', map { "SELECT test_stripe_call('call', 'turn $_');\n" } 1 .. $turns);
my $offset = -s $node->logfile;
foreach my $db (qw(d1 d2))
{
	$session{$db} = $node->background_psql($db, on_error_stop => 0);
	$session{$db}->query_safe(q{SET idempotency.stripe_record_timeout = '60s'});
	$session{$db}->query_until(qr/begun/, "\\echo begun\n$calls");
}
foreach my $db (qw(d1 d2))
{
	my $said = $session{$db}->query('SELECT 1');

	is(scalar(() = $said =~ /^claimed completed/mg), $turns, "$db: $turns calls by turns");
	$session{$db}->quit;
}

# whoever has something to do stays
arm($node, 'recorder-taken', 'wait');
$session{d1} = $node->background_psql('d1', on_error_stop => 0);
$session{d1}->query_until(qr/begun/, qq{\\echo begun
	SET idempotency.stripe_record_timeout = '60s';
	SELECT test_stripe_call('call', 'at work');\n});
my $pid = wait_for_point($node, 'recorder-taken');
my (undef, undef, $stderr) = $node->psql('d2', q{SET idempotency.stripe_record_timeout = '500ms'; SELECT test_stripe_call('call', 'waits')});
like($stderr, qr/ERROR:  the recorder of Stripe operations is out of reach, and nothing was sent\nDETAIL:  There is no free slot/,
	'a recorder at work does not leave, and a caller waits no longer than its time');
is(recorders("pid = $pid"), '1', 'it is still there');
disarm($node, 'recorder-taken');
like($session{d1}->query('SELECT 1'), qr/^claimed completed/m, 'and has done its work');
$session{d1}->quit;

# nor does one whose order is to be tried again
sql($node, q{
	CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''held'' USING ERRCODE = ''55P03''; END';
	CREATE TRIGGER hold BEFORE UPDATE ON idempotency.stripe_idempotency_keys
		FOR EACH ROW WHEN (NEW.outcome = 'completed') EXECUTE FUNCTION hold()}, db => 'd1');
$node->psql('d1', q{SET idempotency.stripe_record_timeout = '1500ms'; SELECT test_stripe_call('call', 'held')});
run_fails($node, q{SET idempotency.stripe_record_timeout = '500ms'; SELECT test_stripe_call('call', 'waits')}, 'IK008',
	'one that has an answer to record stays, too', db => 'd2');
sql($node, 'DROP FUNCTION hold CASCADE', db => 'd1');
wait_until($node, q{SELECT outcome = 'completed' FROM idempotency.stripe_lookup('call', 'held')}, 'until it is recorded', db => 'd1');

# what nobody waits for gets a place, too: the launcher wants it
wait_for_no_recorder($node);
arm($node, 'call-sent', 'wait');
$session{d1} = $node->background_psql('d1', on_error_stop => 0);
$session{d1}->query_until(qr/begun/, qq{\\echo begun
	SET idempotency.stripe_record_timeout = '1s';
	SELECT test_stripe_call('call', 'left');\n});
wait_for_point($node, 'call-sent');
my $busy = $node->background_psql('d2', on_error_stop => 0);
$busy->query_until(qr/begun/, qq{\\echo begun
	SET idempotency.stripe_record_timeout = '60s';
	DO \$\$ BEGIN FOR i IN 1 .. 2000 LOOP PERFORM idempotency.stripe_claim('call', 'busy ' || i); PERFORM pg_sleep(0.1); END LOOP; END \$\$;\n});
wait_until($node, q{SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'idempotency recorder' AND datname = 'd2'}, 'the place is taken, by one who is never idle for long');
sql($node, q{SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE query LIKE '%''left''%' AND pid <> pg_backend_pid()});
eval { $session{d1}->quit };
disarm($node, 'call-sent');
wait_until($node, q{SELECT outcome = 'unknown' AND caller_vxid IS NULL FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'left'},
	'what is known of a call whose caller is gone is recorded all the same', db => 'd1');
is(sql($node, q{SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE datname = 'd2' AND state = 'active' AND backend_type = 'client backend'}),
	't', 'while the other one goes on');
$busy->query('SELECT 1');
unlike($busy->{stderr}, qr/recorder of Stripe operations is out of reach/, 'without an error');
$busy->quit;

#
# Shared memory
#

# The segments that a process has mapped, by their size; PostgreSQL's own is there
# from the start.
sub segments
{
	my (@pids) = @_;
	my %size;

	foreach my $pid (@pids)
	{
		foreach (split /\n/, slurp_file("/proc/$pid/maps"))
		{
			$size{$3} = hex($2) - hex($1) if m{^(\w+)-(\w+) .* (/dev/shm/PostgreSQL\.\d+)};
		}
	}
	return \%size;
}

SKIP:
{
	skip 'no /proc, or no /dev/shm', 4
	  if !-r '/proc/self/maps' || sql($node, 'SHOW dynamic_shared_memory_type') ne 'posix';

	my $session = $node->background_psql('postgres', on_error_stop => 0);
	my $backend = $session->query_safe('SELECT pg_backend_pid()');
	my $before = segments($backend);
	my $added = sub {
		my $now = segments($backend, map { split /\n/ } sql($node,
				q{SELECT pid FROM pg_stat_activity WHERE backend_type = 'idempotency recorder'}));
		return join(' ', sort { $a <=> $b } map { $now->{$_} } grep { !exists $before->{$_} } keys %$now);
	};

	$session->query_safe(q{SET idempotency.stripe_record_timeout = '60s'});
	$session->query_safe(q{BEGIN; SELECT test_stripe_call('call', 'room', room => 240 * 1024)});
	is($added->(), 262144, 'a call needs room for its answer');
	$session->query_safe('COMMIT');
	is($added->(), '', 'which goes with the transaction');
	$session->query_safe(q{SELECT idempotency.stripe_claim('call', 'small')});
	is($added->(), 16384, 'a small one stays');
	$session->query_safe(q{SELECT idempotency.stripe_claim('call', 'large',
		jsonb_build_object('text', (SELECT string_agg(md5(i::text), '') FROM generate_series(1, 20000) i)))});
	is($added->(), '', 'a large request does not');
	$session->query(q{SELECT test_stripe_call('call', 'error', room => 240 * 1024), 1/0});
	is($added->(), '', 'nor does what an error has left');
	$session->quit;
}

$node->stop;

done_testing();
