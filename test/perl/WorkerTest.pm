
=pod

=head1 NAME

WorkerTest - helpers for the tests of workers' passes

=head1 DESCRIPTION

Calls and a node whose workers come every second, once they may.

=cut

package WorkerTest;

use strict;
use warnings;

use Exporter 'import';
use IdempotencyTest;
use Test::More;

our @EXPORT = qw(worker_node holds expires calls here rolled_back workers state_of wait_for_pass is_noted);

my $node;
my $here = '(SELECT system_identifier FROM pg_control_system())';

=pod

=over

=item worker_node()

A running server without workers, for which all of the following is.

=item holds($node, $query, $test_name), expires($node, $test_name)

wait_until() and wait_until_expired(); what doesn't come to be ends the test,
because it would hold up all that follows.

=item calls($n, $prefix, $callers, $system, large => 1)

So many calls in the ledger, as a recorder has left them; large ones have some
1,900 bytes, so that 5,000 are more than a worker reads at a time.

=item here(), rolled_back()

This system's identifier, and the callers of a call whose transaction has rolled
back, in SQL.

=item workers($n)

How many may run.

=item state_of($columns)

What the view says.

=item wait_for_pass($test_name)

Test that a whole pass goes by, and the next isn't due at once.

=item is_noted($id, $test_name)

Test that it is written down that a call's transactions have rolled back.

=back

=cut

sub worker_node
{
	$node = new_node('main', preload => 1, conf => q{
idempotency.expiry_interval = 1s
idempotency.stripe_ledger = transaction
idempotency.max_workers = 0
autovacuum = off
});
	return $node;
}

sub here
{
	return $here;
}

sub holds
{
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return wait_until(@_) || die 'what follows would wait, too';
}

sub expires
{
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return wait_until_expired(@_) || die 'what follows would wait, too';
}

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

sub rolled_back
{
	return "'{" . sql($node, "BEGIN;\nSELECT pg_current_xact_id();\nROLLBACK") . "}'";
}

sub workers
{
	my ($n) = @_;

	$node->append_conf('postgresql.conf', "idempotency.max_workers = $n\n");
	$node->reload;
	holds($node, q{SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'idempotency worker')},
		'no worker is left') if $n == 0;
	return;
}

sub state_of
{
	my ($columns, %params) = @_;

	return sql($node, "SELECT $columns FROM idempotency.workers WHERE database = current_database()", %params);
}

sub wait_for_pass
{
	my ($test_name, %params) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $now = sql($node, 'SELECT clock_timestamp()');

	return holds($node, "SELECT last_run > '$now' AND next_run - last_run > interval '0.35 s'
		FROM idempotency.workers WHERE database = current_database()", $test_name, %params);
}

sub is_noted
{
	my ($id, $test_name, %params) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return holds($node, "SELECT callers = '{}' FROM idempotency.stripe_idempotency_keys WHERE operation_id = '$id'",
		$test_name, %params);
}

1;
