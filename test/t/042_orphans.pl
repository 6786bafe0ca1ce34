
# What Stripe has done for transactions that never committed is listed, and
# nothing else is: under savepoints, after a retry has adopted the operation,
# after a restore elsewhere and on a promoted standby.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

needs_debug_points();

# what workers do here, the test does, in its own time
my $node = new_node('main', debug => 1, init => { allows_streaming => 1 },
	conf => "idempotency.stripe_record_timeout = 60s\nidempotency.expiry = off\n");
sql($node, 'CREATE TABLE orders (id text)');

sub orphans
{
	my ($on, %params) = @_;

	return join(' ', split /\n/, sql($on // $node,
			q{SELECT operation_id || ':' || outcome || ':' || fate FROM idempotency.stripe_orphans ORDER BY 1},
			%params)) =~ s/rolled back/rolled_back/gr;
}

sub callers
{
	my ($id) = @_;

	return sql($node, qq{SELECT COALESCE(cardinality(callers)::text, 'none')
		FROM idempotency.stripe_idempotency_keys WHERE operation_id = '$id'});
}

my $session = $node->background_psql('postgres', on_error_stop => 0);

# commit and rollback
like($session->query_safe(q{BEGIN; SELECT test_stripe_call('call', 'a')}), qr/completed/, 'called');
is(orphans(), '', 'an open transaction may still commit');
run_fails($node, q{SELECT idempotency.stripe_acknowledge('call', 'a', 'seen')}, 'IK002', 'no orphan yet');
$session->query_safe('COMMIT');
is(orphans(), '', 'it has');
run_fails($node, q{SELECT idempotency.stripe_acknowledge('call', 'a', 'seen')}, 'IK002', 'no orphan at all');
$session->query_safe(q{BEGIN; SELECT test_stripe_call('call', 'b'); ROLLBACK});
is(orphans(), 'b:completed:rolled_back', 'a rollback makes an orphan');
$node->poll_query_until('postgres', q{SELECT callers IS NULL FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'a'})
  && $node->poll_query_until('postgres', q{SELECT callers = '{}' FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'b'});
is(callers('a') . ' ' . callers('b'), 'none 0', 'the recorder writes the fate down');
is(orphans(), 'b:completed:rolled_back', 'which changes nothing');

# savepoints
$session->query_safe(q{
	BEGIN;
	SAVEPOINT s;
	SELECT test_stripe_call('call', 'sub lost');
	ROLLBACK TO s;
	SELECT test_stripe_call('call', 'top');
	SAVEPOINT t;
	SELECT test_stripe_call('call', 'sub kept');
	SAVEPOINT u;
	SELECT test_stripe_call('call', 'sub sub kept');
	RELEASE u;
	RELEASE t;
	SAVEPOINT v;
	SAVEPOINT w;
	SELECT test_stripe_call('call', 'sub sub lost');
	RELEASE w;
	ROLLBACK TO v;
	COMMIT});
is(orphans(), 'b:completed:rolled_back sub lost:completed:rolled_back sub sub lost:completed:rolled_back',
	'rolled-back savepoints under a committed transaction');

# only what Stripe did, or may have
$session->query_safe(q{
	BEGIN;
	SELECT test_stripe_call('call', 'declined', status => 402);
	SELECT test_stripe_call('call', 'never sent', status => -1);
	SELECT test_stripe_call('call', 'doubtful', status => 0);
	SELECT idempotency.stripe_claim('call', 'application', lease => '1 microsecond');
	ROLLBACK});
sql($node, q{SELECT idempotency.stripe_acknowledge('call', i, 'refunded') FROM unnest('{b,sub lost,sub sub lost}'::text[]) i});
is(orphans(), 'application:unknown:rolled_back doubtful:unknown:rolled_back', 'completed and unknown ones, not those acknowledged');
is(sql($node, q{SELECT acknowledged - 'at', acknowledged ? 'at' FROM idempotency.stripe_lookup('call', 'b')}),
	'{"by": "' . sql($node, 'SELECT session_user') . '", "note": "refunded"}|t', 'who, when and note are kept');
foreach my $id ('declined', 'never sent')
{
	run_fails($node, "SELECT idempotency.stripe_acknowledge('call', '$id', 'x')", 'IK002', "$id is no orphan");
}
sql($node, q{SELECT idempotency.stripe_acknowledge('call', i, 'seen') FROM unnest('{application,doubtful}'::text[]) i});

# a retry adopts the operation, if it commits
$session->query_safe(q{BEGIN; SELECT test_stripe_call('call', 'adopted'); ROLLBACK});
$session->query_safe(q{BEGIN; SELECT test_stripe_call('call', 'adopted'); ROLLBACK});
$session->query_safe(q{BEGIN; SAVEPOINT s; SELECT test_stripe_call('call', 'adopted'); ROLLBACK TO s; COMMIT});
is(orphans(), 'adopted:completed:rolled_back', 'a retry that rolls back, too, or its savepoint does, changes nothing');
like($session->query_safe(q{BEGIN; SELECT test_stripe_call('call', 'adopted')}), qr/^replay completed/, 'replayed');
is(orphans(), '', 'while it is open');
$session->query_safe('COMMIT');
is(orphans(), '', 'and for good once it has committed');
sql($node, q{SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE backend_type = 'idempotency recorder'});
like($session->query_safe(q{BEGIN; SELECT test_stripe_call('call', 'adopted'); ROLLBACK}), qr/^replay/, 'replayed once more');
is(orphans(), '', 'which is nobody\'s loss');
$session->query_safe(q{BEGIN; SELECT test_stripe_call('call', 'adopted 2'); SAVEPOINT s; SELECT test_stripe_call('call', 'adopted 2'); ROLLBACK TO s; COMMIT});
is(orphans(), '', 'given again within the transaction that called');
$session->query_safe(q{BEGIN; SELECT test_stripe_call('call', 'adopted 3')});
my $other = $node->background_psql('postgres', on_error_stop => 0);
$other->query_safe(q{BEGIN; SELECT test_stripe_call('call', 'adopted 3'); ROLLBACK});
$session->query_safe('COMMIT');
is(orphans(), '', 'the first commits after the second has rolled back');
$session->query_safe(q{BEGIN; SELECT test_stripe_call('call', 'adopted 4')});
$other->query_safe(q{BEGIN; SELECT test_stripe_call('call', 'adopted 4')});
$session->query_safe('ROLLBACK');
is(orphans(), '', 'one rolls back, the other is open');
$other->query_safe('COMMIT');
is(orphans(), '', 'and commits');

# whatever happens to the recorder meanwhile
foreach my $point ('recorder-taken', 'recorder-before-commit', 'recorder-after-commit')
{
	foreach my $action ('error', 'fatal')
	{
		$session->query_safe(qq{BEGIN; SELECT test_stripe_call('call', '$action $point'); ROLLBACK});
		arm($node, $point, $action);
		like($session->query_safe(qq{BEGIN; SELECT test_stripe_call('call', '$action $point'); COMMIT}), qr/^replay/,
			"replayed, with '$action' at $point");
		is(orphans(), '', 'and adopted');
		disarm($node, $point);
	}
}
$session->query_safe(q{BEGIN; SELECT test_stripe_call('call', 'not started'); ROLLBACK});
sql($node, q{SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE backend_type = 'idempotency recorder'});
arm($node, 'recorder-start', 'error');
like($session->query_safe(q{BEGIN; SELECT test_stripe_call('call', 'not started'); COMMIT}), qr/^replay/,
	'replayed, while a recorder fails to start');
is(orphans(), '', 'and adopted');

# a retry that comes while the recorder is noting how the last caller ended isn't told that somebody else is at it
my $third = $node->background_psql('postgres', on_error_stop => 0);
$session->query_safe(q{BEGIN; SELECT test_stripe_call('call', 'noted', status => 0)});
arm($node, 'recorder-taken', 'wait');
$other->query_until(qr/begun/, "\\echo begun\nSELECT test_stripe_call('call', 'company');\n");
wait_for_point($node, 'recorder-taken');
$session->query_safe('ROLLBACK');
select(undef, undef, undef, 0.5);
arm($node, 'recorder-before-commit', 'wait');
disarm($node, 'recorder-taken');
wait_for_point($node, 'recorder-before-commit');
is(sql($node, q{SELECT count(*) FROM idempotency.stripe_idempotency_keys t WHERE operation_id = 'noted' AND t.xmax <> 0}),
	'1', 'the recorder is writing the row');
$third->query_until(qr/begun/, "\\echo begun\nSELECT test_stripe_call('call', 'noted');\n");
select(undef, undef, undef, 0.5);
disarm($node, 'recorder-before-commit');
like($third->query_safe('SELECT 1'), qr/claimed completed/, 'it claims when the recorder has done');
$other->query_safe('SELECT 1');
is(orphans(), '', 'and nobody is left alone');

# prepared transactions
$session->query_safe(q{BEGIN; SELECT test_stripe_call('call', 'prepared'); PREPARE TRANSACTION 'p'});
is(orphans(), '', 'a prepared transaction may still commit');
$session->query_safe(q{ROLLBACK PREPARED 'p'});
is(orphans(), 'prepared:completed:rolled_back', 'and rolls back');
sql($node, q{SELECT idempotency.stripe_acknowledge('call', 'prepared', 'seen')});

# settling makes an orphan known, not forgotten
$session->query_safe(q{BEGIN; SELECT test_stripe_call('call', 'settled', status => 0); ROLLBACK});
sql($node, q{SELECT idempotency.stripe_settle('call', 'settled', 'completed', 'pi_s', 'seen in the Dashboard')});
is(orphans(), 'settled:completed:rolled_back', 'a settled orphan is one');
sql($node, q{SELECT idempotency.stripe_acknowledge('call', 'settled', 'refunded')});

# who waits for it is told
my $listener = $node->background_psql('postgres', on_error_stop => 0);
$listener->query_safe('LISTEN idempotency_settled');
sub told
{
	my ($test_name, @expected) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	my @told = $listener->query('SELECT 1') =~ /payload "(\{.*\})" received/g;
	return is_deeply(\@told, \@expected, $test_name);
}
sql($node, q{SELECT test_stripe_call('call', id, status => 0) FROM unnest('{told,told 2,told 3,"told \"4\\\\"}'::text[]) id;
	SELECT idempotency.stripe_settle('call', 'told', 'not_executed');
	BEGIN; SELECT idempotency.stripe_settle('call', 'told 2', 'failed'); ROLLBACK;
	SELECT idempotency.stripe_settle('call', 'told "4\\', 'completed', 're_"1')});
told('settled by a person',
	'{"account": "", "operation_type": "call", "operation_id": "told", "outcome": "not_executed", "resource_id": null}',
	'{"account": "", "operation_type": "call", "operation_id": "told \"4\\\\", "outcome": "completed", "resource_id": "re_\"1"}');
sql($node, q{SELECT test_stripe_call('call', 'told 2'); SELECT test_stripe_call('call', 'told 5')});
told('by an answer that came at last',
	'{"account": "", "operation_type": "call", "operation_id": "told 2", "outcome": "completed", "resource_id": "pi_1"}');
sql($node, q{
	SELECT token AS t FROM idempotency.stripe_claim('call', 'told 6') \gset
	SELECT idempotency.stripe_record('call', 'told 6', :t);
	SELECT idempotency.stripe_record('call', 'told 6', :t, 're_6')});
told('or by one that is recorded late',
	'{"account": "", "operation_type": "call", "operation_id": "told 6", "outcome": "completed", "resource_id": "re_6"}');
$listener->quit;

# a crash loses what the recorder had in mind
$session->query_safe(q{BEGIN; SELECT test_stripe_call('call', 'crash open')});
$other->query_safe(q{BEGIN; SELECT test_stripe_call('call', 'crash committed'); INSERT INTO orders VALUES (1); COMMIT});
$node->stop('immediate');
$node->start;
eval { $_->quit } foreach $session, $other;
is(orphans(), 'crash open:completed:rolled_back', 'a crash rolls back what was open');

#
# Dump and restore: transaction ids of another system mean nothing here
#

$session = $node->background_psql('postgres', on_error_stop => 0);
$session->query_safe(q{BEGIN; SELECT test_stripe_call('call', 'dumped')});
cmp_ok(sql($node, q{SELECT test_note_fates(100)}), '>=', 3, 'there is something to be written down');
is(sql($node, q{SELECT operation_id, cardinality(callers) FROM idempotency.stripe_idempotency_keys
		WHERE callers IS NOT NULL AND operation_id IN ('crash open', 'crash committed', 'dumped') ORDER BY 1}),
	"crash open|0\ndumped|1", 'a worker does that, but for what is open');
my $dump = "$PostgreSQL::Test::Utils::tmp_check/orphans.sql";
$node->command_ok([ 'pg_dump', '-f', $dump, $node->connstr('postgres') ], 'dumped');
$session->quit;
is(orphans(), 'crash open:completed:rolled_back dumped:completed:rolled_back', 'rolled back here');

my $elsewhere = new_node('elsewhere', debug => 1, extension => 0, conf => "autovacuum = off\nidempotency.stripe_record_timeout = 60s\n");
sql($elsewhere, 'DROP FUNCTION test_stripe_call, test_note_fates, test_occupy_workers');
$elsewhere->command_ok([ 'psql', '-Xq', '-v', 'ON_ERROR_STOP=1', '-f', $dump, $elsewhere->connstr('postgres') ],
	'restored into another system');
is(orphans($elsewhere), 'crash open:completed:rolled_back dumped:completed:not known',
	'there the fate of what was open isn\'t known');
like(sql($elsewhere, q{SELECT test_stripe_call('call', 'dumped')}), qr/^replay completed/, 'a retry there');
is(orphans($elsewhere), 'crash open:completed:rolled_back', 'adopts it');
sql($elsewhere, q{UPDATE idempotency.stripe_idempotency_keys SET callers = '{3}', callers_system = 1
	WHERE operation_id = 'dumped'});
is(orphans($elsewhere), 'crash open:completed:rolled_back dumped:completed:not known', 'not known again');
sql($elsewhere, q{SELECT idempotency.stripe_acknowledge('call', i, 'seen') FROM unnest('{crash open,dumped}'::text[]) i});
is(orphans($elsewhere), '', 'what nobody knows can be acknowledged');
is(sql($elsewhere, q{SELECT idempotency.stripe_callers_fate('{18446744073709551615}', (SELECT system_identifier FROM pg_control_system()))}),
	'not known', 'an id of the future raises nothing');
$elsewhere->stop;

# the transaction that called commits while the recorder notes that another one was given the result
$session = $node->background_psql('postgres', on_error_stop => 0);
$other = $node->background_psql('postgres', on_error_stop => 0);
$session->query_safe(q{BEGIN; SELECT test_stripe_call('call', 'adopted late')});
arm($node, 'recorder-taken', 'wait');
$other->query_until(qr/adopting/, "\\echo adopting\nBEGIN; SELECT test_stripe_call('call', 'adopted late');\n");
wait_for_point($node, 'recorder-taken');
$session->query_safe('COMMIT');
disarm($node, 'recorder-taken');
$other->query_safe('ROLLBACK');
is(callers('adopted late'), 'none', 'a call whose transaction has committed meanwhile needs nobody else');
is(orphans() =~ /adopted late/ ? 'listed' : '', '', 'and is no orphan');

# claimed by a transaction that rolled back, and still held
$session->query_safe(q{BEGIN; SELECT FROM idempotency.stripe_claim('call', 'held', lease => '1 hour'); ROLLBACK});
my ($rc, $stdout, $stderr) = $node->psql('postgres', q{SELECT idempotency.stripe_acknowledge('call', 'held', 'x')});
like($stderr, qr/ERROR:  Stripe operation "call:held" is no orphan\nDETAIL:  It is in progress\./, 'what is held is no orphan yet');
lapse_stripe_lease($node, 'call', 'held');
sql($node, q{SELECT idempotency.stripe_acknowledge('call', 'held', 'x')});
pass('but is one when the lease has lapsed');
$_->quit foreach $session, $other;

#
# A standby
#

$node->backup('backup');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($node, 'backup', has_streaming => 1);
mkdir $standby->data_dir . '/debug_points';
unlink $standby->data_dir . '/debug_points/call-sent';
$standby->start;

arm($node, 'call-sent', 'wait');
$session = $node->background_psql('postgres', on_error_stop => 0);
$session->query_until(qr/calling/, "\\echo calling\nBEGIN; SELECT test_stripe_call('call', 'failover');\n");
wait_for_point($node, 'call-sent');
$node->wait_for_catchup($standby, 'replay', $node->lsn('flush'));
my $reading = q{SELECT l.outcome, l.idempotency_key FROM idempotency.stripe_lookup('call', 'failover') l;
	SELECT operation_id, fate FROM idempotency.stripe_orphans ORDER BY 1;
	SELECT operation_id FROM idempotency.stripe_unknown ORDER BY 1};
my $read = sql($node, $reading);
like($read, qr/^in_progress\|/, 'a call in flight');
is(sql($standby, $reading), $read, 'a standby says what the primary says');
foreach my $call (q{stripe_settle('call', 'failover', 'completed')}, q{stripe_acknowledge('call', 'dumped', 'x')})
{
	run_fails($standby, "SELECT idempotency.$call", '25006', "$call is refused there");
}
$node->stop('immediate');
eval { $session->quit };
$standby->promote;
is(sql($standby, $reading) =~ s/\n.*//sr, $read =~ s/^in_progress(.*?)\n.*/unknown$1/sr,
	'promoted: what was in flight is unknown, its key the same');
like(sql($standby, q{SELECT test_stripe_call('call', 'failover')}), qr/^claimed completed pi_1 attempt 2/,
	'and is sent again, with the same key');
is(sql($standby, q{SELECT idempotency_key FROM idempotency.stripe_lookup('call', 'failover')}),
	(split /\|/, (split /\n/, $read)[0])[1], 'which is recorded');
$standby->stop;

done_testing();
