
# An error that the recorder meets before it can take anything up: it rests, and
# logs it once, callers who haven't sent anything hear of it, and what must be
# recorded is recorded when it can be.  One such error is real: the server has no
# more transaction ids to give.

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
autovacuum = off
wal_level = logical
max_replication_slots = 1
idempotency.max_workers = 0
idempotency.stripe_record_timeout = 60s
});

# A call whose answer comes when the test says so.
sub call_and_hold
{
	my ($id) = @_;
	my $session = $node->background_psql('postgres', on_error_stop => 0);

	# the server warns when it is short of transaction ids
	$session->query_safe(q{SET client_min_messages = error;
		SELECT test_stripe_call('call', 'first ' || random()); RESET client_min_messages});
	arm($node, 'call-sent', 'wait');
	$session->query_until(qr/begun/, qq{\\echo begun
		SET idempotency.stripe_record_timeout = '1500ms';
		SELECT test_stripe_call('call', '$id');\n});
	wait_for_point($node, 'call-sent');
	return $session;
}

sub logged
{
	my ($pattern, $offset) = @_;

	return scalar(() = substr(slurp_file($node->logfile), $offset) =~ /$pattern/g);
}

#
# Whatever the error is
#

my $session = call_and_hold('answered');
arm($node, 'recorder-begins', 'errors');
my $offset = -s $node->logfile;
disarm($node, 'call-sent');
like($session->query('SELECT 1'), qr/^claimed completed/m, 'the caller has the truth');
like($session->{stderr}, qr/WARNING:  outcome "completed" of Stripe operation "call:answered" is not recorded yet/, 'with a warning');
$session->quit;

foreach my $call (q{test_stripe_call('call', 'refused')}, q{idempotency.stripe_claim('call', 'refused')},
	q{idempotency.stripe_reopen('call', 'answered')})
{
	my (undef, undef, $stderr) = $node->psql('postgres', "SELECT $call");
	like($stderr, qr/ERROR:  debug point "recorder-begins"\nCONTEXT:  recorder of Stripe operations; nothing was sent/,
		"$call: the recorder's error is the caller's");
}
select(undef, undef, undef, 5);
cmp_ok(logged('ERROR:  debug point "recorder-begins"\n', $offset), '<=', 4, 'the log has it once, and the three callers');
is(sql($node, q{SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'idempotency recorder'}), '1', 'the recorder stays');
cmp_ok(sql($node, q{SELECT xact_rollback FROM pg_stat_database WHERE datname = 'postgres'}), '<', 200, 'and rests');
disarm($node, 'recorder-begins');
ok($node->poll_query_until('postgres', q{SELECT outcome = 'completed' FROM idempotency.stripe_lookup('call', 'answered')}),
	'when it can, the recorder records');
is(sql($node, q{SELECT verdict FROM idempotency.stripe_claim('call', 'refused')}), 'claimed', 'and claims');

# it can be terminated, and sent away, while it rests
$session = call_and_hold('terminated');
arm($node, 'recorder-begins', 'errors');
disarm($node, 'call-sent');
$session->query('SELECT 1');
$session->quit;
is(sql($node, q{SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE backend_type = 'idempotency recorder'}), 't',
	'a recorder that rests can be terminated');
disarm($node, 'recorder-begins');
ok($node->poll_query_until('postgres', q{SELECT outcome = 'completed' FROM idempotency.stripe_lookup('call', 'terminated')}),
	'and its successor goes on');

# Another number in its text doesn't make it another error.
$session = call_and_hold('numbered');
arm($node, 'recorder-begins', 'numbered');
$offset = -s $node->logfile;
disarm($node, 'call-sent');
$session->query('SELECT 1');
$session->quit;
select(undef, undef, undef, 5);
is(logged('ERROR:  debug point "recorder-begins", number', $offset), 1, 'the same error with other numbers is logged once');
disarm($node, 'recorder-begins');
ok($node->poll_query_until('postgres', q{SELECT outcome = 'completed' FROM idempotency.stripe_lookup('call', 'numbered')}),
	'then it goes on');

# It can be ended, or cancelled, when its commit has failed and it hasn't said so yet.
foreach my $how (qw(terminate cancel))
{
	$session = $node->background_psql('postgres', on_error_stop => 0);
	arm($node, 'call-sent', 'wait');
	$session->query_until(qr/begun/, "\\echo begun\nSELECT test_stripe_call('call', 'failed, $how');\n");
	wait_for_point($node, 'call-sent');
	arm($node, 'recorder-before-commit', 'error');
	arm($node, 'recorder-rolled-back', 'wait');
	disarm($node, 'call-sent');
	my $pid = wait_for_point($node, 'recorder-rolled-back');
	sql($node, "SELECT pg_${how}_backend($pid)");
	disarm($node, 'recorder-rolled-back');
	like($session->query('SELECT 1'), qr/^claimed completed/m, "$how after a failed commit: the caller is told");
	is($session->{stderr} =~ /is not recorded yet/ ? 'not yet' : sql($node, "SELECT outcome FROM idempotency.stripe_lookup('call', 'failed, $how')"),
		'completed', "$how after a failed commit: when it is recorded");
	$session->quit;
}

# What is noted of a caller's end, in a transaction that fails, is noted in the
# next.  The recorder is still there, and has nothing else to do.
arm($node, 'notes-before-commit', 'error');
sql($node, q{BEGIN; SELECT test_stripe_call('call', 'noted'); COMMIT});
wait_for_point($node, 'notes-before-commit');
ok($node->poll_query_until('postgres', q{SELECT callers IS NULL FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'noted'}),
	'a note that was lost with its transaction is written again');

#
# No more transaction ids
#

# what keeps vacuum from giving any back
sql($node, q{SELECT pg_create_logical_replication_slot('old', 'pgoutput')});
my $oldest = sql($node, q{SELECT min(datfrozenxid::text::bigint) FROM pg_database});
$node->stop;
my $limit = $oldest + 2**31 - 1 - 3_000_000;
my $next = $limit - 100;
my $segment = sprintf('%s/pg_xact/%04X', $node->data_dir, $next / 2**20);
append_to_file($segment, "\0" x (256 * 1024)) unless -e $segment;
command_ok([ 'pg_resetwal', '-x', $next, $node->data_dir ], 'a server near its last transaction id');
$node->start;

$session = call_and_hold('no more');
my $burner = $node->background_psql('postgres', on_error_stop => 0);
$burner->query(q{DO $$ BEGIN FOR i IN 1 .. 20000 LOOP PERFORM txid_current(); COMMIT; END LOOP; END $$});
like($burner->{stderr}, qr/database is not accepting commands/, 'no more transaction ids');
$burner->{stderr} = '';
$burner->quit;
$offset = -s $node->logfile;
disarm($node, 'call-sent');
like($session->query('SELECT 1'), qr/^claimed completed/m, 'an answer comes then');
select(undef, undef, undef, 5);
is(logged('ERROR:  database is not accepting commands', $offset), 1, 'and the recorder says once that it cannot record it');
$session->{stderr} = '';
$session->query(q{SELECT test_stripe_call('call', 'later')});
like($session->{stderr}, qr/ERROR:  database is not accepting commands/, 'a caller hears PostgreSQL\'s own error');
$session->quit;
is(sql($node, q{SELECT outcome FROM idempotency.stripe_lookup('call', 'no more')}), 'unknown', 'it waits');
$node->stop('immediate');

done_testing();
