
# An answer that nobody waits for any more is recorded all the same, though no
# process is to be had at that moment, the recorder is terminated or can't start,
# or the database is being dropped, and isn't dropped after all: the launcher
# comes for it.  In each case everybody else who could is gone.

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
max_worker_processes = 4
max_logical_replication_workers = 0
max_parallel_workers = 0
idempotency.max_workers = 0
idempotency.stripe_record_timeout = 60s
});

# A call whose answer comes when the test says so.  There is a recorder, so that
# a short timeout is long enough for the claim.
sub call_and_hold
{
	my ($id, %params) = @_;
	my $session = $node->background_psql($params{db} // 'postgres', on_error_stop => 0);
	my $timeout = $params{timeout} // '1500ms';

	$session->query_safe("SELECT test_stripe_call('call', '$id, first')");
	arm($node, 'call-sent', 'wait');
	$session->query_until(qr/begun/, qq{\\echo begun
		SET idempotency.stripe_record_timeout = '$timeout';
		SELECT test_stripe_call('call', '$id');\n});
	wait_for_point($node, 'call-sent');
	return $session;
}

sub answer
{
	my ($session) = @_;

	disarm($node, 'call-sent');
	$session->{stderr} = '';
	my $said = $session->query('SELECT 1');
	return $said . $session->{stderr};
}

sub becomes_completed
{
	my ($id, $test_name, %params) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return ok($node->poll_query_until($params{db} // 'postgres',
			"SELECT outcome = 'completed' FROM idempotency.stripe_lookup('call', '$id')"), $test_name);
}

sub hold
{
	my ($id, %params) = @_;

	return sql($node, qq{
		CREATE OR REPLACE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS
			'BEGIN RAISE ''held'' USING ERRCODE = ''55P03''; END';
		CREATE TRIGGER hold BEFORE UPDATE ON idempotency.stripe_idempotency_keys
			FOR EACH ROW WHEN (NEW.outcome = 'completed' AND NEW.operation_id = '$id')
			EXECUTE FUNCTION hold()}, %params);
}

sub let_go
{
	my (%params) = @_;

	return sql($node, 'DROP FUNCTION hold CASCADE', %params);
}

# An answer that waits for its row, with nobody connected.
sub leave_answer
{
	my ($id, %params) = @_;
	my ($rc, $stdout, $stderr);

	hold($id, %params);
	($rc, $stdout, $stderr) = $node->psql($params{db} // 'postgres',
		"SELECT count(idempotency.stripe_claim('call', '$id, first'));
		SET idempotency.stripe_record_timeout = '1500ms'; SELECT test_stripe_call('call', '$id')");
	like("$stdout\n$stderr", qr/^1\nclaimed completed .*WARNING:  outcome "completed" of Stripe operation "call:$id" is not recorded yet/s,
		"$id: an answer is left behind");
	return;
}

my $recorder = q{SELECT pid FROM pg_stat_activity WHERE backend_type = 'idempotency recorder'};

#
# No process is to be had
#

my $session = call_and_hold('no place');
wait_for_no_recorder($node);
cmp_ok(occupy_workers($node), '>=', 1, 'a call takes long, and meanwhile others take all places');
my $said = answer($session);
like($said, qr/claimed completed/, 'the caller has the truth');
like($said, qr/WARNING:  outcome "completed" of Stripe operation "call:no place" is not recorded yet\n.*DETAIL:  There is no free slot for a background process\. It will be recorded as soon as there is one;/,
	'and is told why it is not recorded yet');
$session->quit;
is(sql($node, q{SELECT outcome FROM idempotency.stripe_lookup('call', 'no place')}), 'unknown', 'it is unknown');
$node->wait_for_log(qr/LOG:  idempotency launcher: there is no free slot for a recorder of Stripe operations/);
free_workers($node);
becomes_completed('no place', 'as soon as there is a place, it is recorded, and nobody has called');

# a caller waits for a place, before the send and after it
wait_for_no_recorder($node);
occupy_workers($node);
$session = $node->background_psql('postgres', on_error_stop => 0);
$session->query_until(qr/begun/, "\\echo begun\nSET idempotency.stripe_record_timeout = '60s';\nSELECT test_stripe_call('call', 'waits before');\n");
select(undef, undef, undef, 1);
free_workers($node);
like($session->query('SELECT 1'), qr/^claimed completed/m, 'before the send a caller waits for a place');
$session->quit;

$session = call_and_hold('waits after', timeout => '60s');
wait_for_no_recorder($node);
occupy_workers($node);
$session->{stderr} = '';
disarm($node, 'call-sent');
select(undef, undef, undef, 1);
free_workers($node);
$said = $session->query('SELECT 1');
like($said, qr/^claimed completed/m, 'and after it');
is($session->{stderr}, '', 'without a warning');
$session->quit;

#
# The recorder is terminated while the other places are taken
#

leave_answer('terminated');
occupy_workers($node);
sql($node, "SELECT pg_terminate_backend(($recorder), 10000)");
let_go();
becomes_completed('terminated', 'a recorder that is terminated has a successor');
free_workers($node);

# the launcher is, too
leave_answer('launcher');
sql($node, q{SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE backend_type = 'idempotency launcher'});
sql($node, "SELECT pg_terminate_backend(($recorder), 10000)");
let_go();
becomes_completed('launcher', 'so it has when the launcher is terminated, too');

# However often that happens the next one doesn't come later.
my $longest = 0;
foreach my $n (1 .. 6)
{
	leave_answer("again $n");
	sql($node, "SELECT pg_terminate_backend(($recorder), 10000)");
	let_go();
	my $since = time;
	becomes_completed("again $n", "the $n. that is terminated has a successor");
	$longest = time - $since if time - $since > $longest;
}
cmp_ok($longest, '<', 10, 'which comes soon, each time');

#
# It can't start: asked for again and again, but not at once
#

leave_answer('start');
arm($node, 'recorder-start', 'errors');
my $offset = -s $node->logfile;
sql($node, "SELECT pg_terminate_backend(($recorder), 10000)");
let_go();
$node->wait_for_log(qr/debug point "recorder-start"/, $offset);
select(undef, undef, undef, 10);
my $tries = () = substr(slurp_file($node->logfile), $offset) =~ /ERROR:  debug point "recorder-start"/g;
cmp_ok($tries, '>=', 2, 'one that cannot start is asked for again');
cmp_ok($tries, '<=', 6, 'with a pause that grows');
disarm($node, 'recorder-start');
becomes_completed('start', 'until it can');

#
# DROP DATABASE that PostgreSQL refuses
#

sql($node, 'CREATE DATABASE stays');
sql($node, 'CREATE EXTENSION idempotency', db => 'stays');
create_test_caller($node, db => 'stays');

# the answer comes meanwhile
$session = call_and_hold('meanwhile', db => 'stays');
my $dropper = $node->background_psql('postgres', on_error_stop => 0);
$dropper->query_until(qr/begun/, "\\echo begun\nDROP DATABASE stays;\n");
$node->poll_query_until('postgres', q{SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'object'
	AND classid = 'pg_database'::regclass AND mode = 'AccessExclusiveLock' AND granted)}) or die 'nobody drops';
select(undef, undef, undef, 0.3);
$said = answer($session);
like($said, qr/WARNING:  outcome "completed" of Stripe operation "call:meanwhile" is not recorded yet\n.*DETAIL:  It will be as soon as the recorder can write its row/,
	'an answer comes while its database is about to be dropped');
$dropper->query('SELECT 1');
like($dropper->{stderr}, qr/ERROR:  database "stays" is being accessed by other users/, 'which PostgreSQL refuses');
$dropper->{stderr} = '';
becomes_completed('meanwhile', 'then the answer is recorded', db => 'stays');
$session->quit;

# it has come before
leave_answer('before', db => 'stays');
$session = $node->background_psql('stays');
$session->query_safe('SELECT 1');
$offset = -s $node->logfile;
foreach (1 .. 2)
{
	my (undef, undef, $stderr) = $node->psql('postgres', 'DROP DATABASE stays');
	like($stderr, qr/is being accessed by other users/, 'a database is not dropped');
}
$session->quit;
let_go(db => 'stays');
becomes_completed('before', 'what waits to be recorded there is not thrown away', db => 'stays');
unlike(substr(slurp_file($node->logfile), $offset), qr/"call:before" is not recorded\n/, 'nor is it said to be');

# another reason to refuse it
leave_answer('template', db => 'stays');
sql($node, 'ALTER DATABASE stays IS_TEMPLATE true');
run_fails($node, 'DROP DATABASE stays', '42809', 'a template is not dropped');
let_go(db => 'stays');
becomes_completed('template', 'and what waits there is recorded', db => 'stays');
sql($node, 'ALTER DATABASE stays IS_TEMPLATE false');

# the session that drops is terminated in the middle
leave_answer('ended', db => 'stays');
$session = $node->background_psql('stays');
$session->query_safe('SELECT 1');
$dropper->query_until(qr/begun/, "\\echo begun\nDROP DATABASE stays;\n");
$node->poll_query_until('postgres', q{SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'object'
	AND classid = 'pg_database'::regclass AND mode = 'AccessExclusiveLock' AND granted)}) or die 'nobody drops';
sql($node, q{SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity WHERE query LIKE 'DROP DATABASE stays%' AND pid <> pg_backend_pid()});
eval { $dropper->quit };
$session->quit;
let_go(db => 'stays');
becomes_completed('ended', 'whoever dropped a database is terminated: what waits there is recorded', db => 'stays');

# and one that is dropped takes what waits along
leave_answer('gone', db => 'stays');
$offset = -s $node->logfile;
sql($node, 'DROP DATABASE stays');
$node->wait_for_log(qr/what is known of Stripe operation "call:gone" is not recorded\n.*Its database has been dropped/, $offset);
pass('a database that is dropped takes along what waits, and the log says so');

#
# Many are dropped in a row
#

wait_for_no_recorder($node);
sql($node, "CREATE DATABASE d$_") foreach 1 .. 5;

$node->psql('postgres', join("\n", map { "DROP DATABASE d$_;" } 1 .. 5));
is(sql($node, q{SET idempotency.stripe_record_timeout = '2s'; SELECT verdict FROM idempotency.stripe_claim('call', 'others')}),
	'claimed', 'after five databases that were dropped there is a recorder for others');

$node->stop;

done_testing();
