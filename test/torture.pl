
# make torture: applications pay, in pairs that click on the same orders, while
# everything that can be struck is struck at random.  In the end everybody has an
# answer, and a checker compares what the application, the ledger and Stripe say.
#
# TORTURE_SECONDS and TORTURE_SEED: the seed gives the same faults and the same
# intentions again, not the same interleaving.

use strict;
use warnings;

use FakeStripe;
use IdempotencyTest;
use PayingApplication;
use POSIX ();
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StripeTest;
use Test::More;
use Time::HiRes qw(time);

needs_debug_points();

my $seconds = $ENV{TORTURE_SECONDS} || 120;
my $seed = $ENV{TORTURE_SEED} || int(rand(1_000_000_000));
my $applications = 6;

diag("seed $seed, $seconds seconds, $applications applications");
srand($seed);

my $stripe = FakeStripe->start;
my $node = stripe_node('main', $stripe, debug => 1, conf => q{
restart_after_crash = on
synchronous_commit = off
log_statement = none
idempotency.stripe_max_retries = 1
idempotency.stripe_timeout = '5 s'
idempotency.stripe_record_timeout = '5 s'
});
sql($node, PAYING_APPLICATION);

sub pause
{
	select(undef, undef, undef, $_[0]);
	return;
}

# What the statements say, or undef.  psql may be gone before it is written to.
sub try_sql
{
	my ($statements) = @_;
	my ($status, $stdout) = eval { $node->psql('postgres', $statements) };

	return defined $status && $status == 0 ? $stdout : undef;
}

#
# An application: one order after the other, each until it has an answer
#

sub is_declined { return $_[0] % 7 == 0 }

sub application
{
	my ($number, $deadline) = @_;
	my $pair = int($number / 2);

	srand($seed + $number);
	for (my $n = 1; time < $deadline; $n++)
	{
		my $card = is_declined($n) ? 'pm_card_chargeDeclined' : 'pm_card_visa';
		my $answer = '';

		for (my $try = 1; $answer !~ /^(201|402) /; $try++)
		{
			# an order that isn't answered in the end is found by the checker
			return if time > $deadline + 120;

			my $whim = time > $deadline ? 1 : rand;
			my $pay = $whim < 0.1 && !is_declined($n) ? "pay_in_savepoint('$pair $n')" : "pay('$pair $n', '$card')";
			my $end = $whim > 0.1 && $whim < 0.25 ? 'ROLLBACK' : 'COMMIT';
			# what the client is told must be on disk; the server's default isn't
			my $got = try_sql("SET synchronous_commit = on; BEGIN; SELECT $pay; $end");

			$answer = $end eq 'COMMIT' ? $got // '' : '';
			pause(0.05) if $answer eq '';
		}
	}
	return;
}

#
# What strikes
#

my @points = qw(claim-answered before-send after-answer before-record after-record
  recorder-start recorder-taken recorder-before-commit recorder-after-commit);
my @at_stripe = (
	(map { [$_] } qw(close_before reset_before close_after reset_after cut garbled not_json 401 409 409_in_use
		  424 429 429_lock_timeout)),
	(map { ([$_], [ $_, effect => JSON::PP::true ]) } qw(502 503 504)),
	(map { [ $_, ms => 300 ] } qw(hang_before hang_in_use hang_after)),
	(map { [ $_, on_leave => 'continue', ms => 300 ] } qw(hang_before hang_in_use)));

sub choose { return $_[ int(rand(@_)) ] }

# One of those processes, or none, where the server is down or they are.
sub one_of
{
	my ($condition) = @_;
	my $pids = try_sql("SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND $condition ORDER BY pid");

	return choose(split /\n/, $pids // '');
}

sub caller_pid { return one_of(q{query LIKE '%pay%' AND state <> 'idle'}) }
sub recorder_pid { return one_of(q{backend_type = 'idempotency recorder'}) }

sub signal
{
	my ($function, $pid) = @_;

	try_sql("SELECT $function($pid)") if defined $pid;
	return;
}

sub kill_process
{
	my ($pid) = @_;

	kill 9, $pid if defined $pid;
	return;
}

# with its weight
my @strikes = (
	[ cancel => 20, sub { signal('pg_cancel_backend', caller_pid()) } ],
	[ terminate => 15, sub { signal('pg_terminate_backend', caller_pid()) } ],
	[ kill => 3, sub { kill_process(caller_pid()) } ],
	[ terminate_recorder => 15, sub { signal('pg_terminate_backend', recorder_pid()) } ],
	[ kill_recorder => 2, sub { kill_process(recorder_pid()) } ],
	[ error_at_point => 15, sub { arm($node, choose(@points), 'error') } ],
	[ end_at_point => 15, sub { arm($node, choose(@points), 'fatal') } ],
	[ kill_at_point => 4, sub { arm($node, choose(@points), 'kill') } ],
	[ stripe => 40, sub { $stripe->fault(@{ choose(@at_stripe) }) } ],
	[ restart => 1, sub { $node->restart } ],
	[ crash => 1, sub { $node->stop('immediate'); $node->start } ]);
my @by_weight = map { my $strike = $_; ($strike) x $strike->[1] } @strikes;

my $deadline = time + $seconds;
my @children;

foreach my $number (0 .. $applications - 1)
{
	my $pid = fork() // die "could not fork: $!";

	if ($pid == 0)
	{
		eval { application($number, $deadline) };
		print STDERR $@ if $@;
		POSIX::_exit($@ ? 1 : 0);
	}
	push @children, $pid;
}

my %struck;
while (time < $deadline)
{
	my $strike = choose(@by_weight);

	$strike->[2]->();
	$struck{ $strike->[0] }++;
	pause(0.02 + rand(0.1));
}
disarm($node, $_) foreach @points;
$stripe->clear_faults;
wait_until_up($node);
foreach my $pid (@children)
{
	waitpid($pid, 0);
	is($?, 0, "application $pid has come to its end");
}
diag(join(', ', map { "$_ $struck{$_}" } sort keys %struck));

#
# The checker
#

# by operation id: what the client was told at last
my %orders;
foreach (split /\n/, sql($node, q{
		SELECT key, idempotency.operation_uuid(key, 'user 1'), http_status,
			COALESCE(response->>'payment', response->>'declined')
		FROM idempotency.idempotency_keys WHERE scope = 'user 1'}))
{
	my ($key, $operation, $status, $response) = split /\|/;
	$orders{$operation} = { key => $key, status => $status, response => $response };
}

# what the application's table, the ledger and the fake say of each
my %ledger;
foreach (split /\n/, sql($node, q{
		SELECT COALESCE(o.operation::text, s.operation_id), o.status, o.payment,
			s.outcome, s.resource_id, s.idempotency_key, s.generation
		FROM orders o FULL JOIN idempotency.stripe_idempotency_keys s
			ON s.operation_type = 'payment' AND s.operation_id = o.operation::text}))
{
	my ($operation, @row) = split /\|/;
	$ledger{$operation} = \@row;
}
my $payments = payments($stripe);

sub problem
{
	my ($operation) = @_;
	my $order = $orders{$operation} or return 'the client has no answer';
	my $sent = $payments->{$operation} or return 'nothing was sent';
	my $row = $ledger{$operation} or return 'the ledger does not know it';
	my ($status, $payment, $outcome, $resource, $key, $generation) = @$row;
	my ($n) = $order->{key} =~ / (\d+)/;
	my $charges = is_declined($n) ? 0 : 1;

	return 'charged ' . @{ $sent->{charges} } . ' times' if @{ $sent->{charges} } != $charges;
	return 'sent with ' . join(', ', sort keys %{ $sent->{keys} }) if join('', keys %{ $sent->{keys} }) ne $key;
	return 'sent with different bytes' if keys %{ $sent->{bodies} } != 1;
	return "of generation $generation" if $generation != 1;
	return "$status, $outcome, $order->{status}"
	  if "$status $outcome $order->{status}" ne ($charges ? 'succeeded completed 201' : 'declined failed 402');
	return "another payment: $resource, $payment, $order->{response}"
	  if $resource ne $payment || ($charges && ($resource ne $order->{response} || $resource ne $sent->{charges}[0]));
	return;
}

my %all = map { $_ => 1 } keys %orders, keys %ledger, keys %$payments;
my $requests = 0;
$requests += $_->{requests} foreach values %$payments;
diag(scalar(keys %all) . " operations, $requests requests, " . $stripe->charges . ' charges');
cmp_ok(scalar(keys %all), '>', $applications, 'there was something to do');
is_deeply([ map { my $problem = problem($_); $problem ? "$_: $problem" : () } sort keys %all ], [],
	'each was charged once, by one key and the same bytes, and everybody agrees');
foreach my $view (qw(stripe_orphans stripe_unknown open_claims))
{
	my $left = sql($node, "SELECT * FROM idempotency.$view");
	diag("$view: $left") if $left ne '';
}
is(sql($node, q{SELECT (SELECT count(*) FROM idempotency.stripe_orphans),
		(SELECT count(*) FROM idempotency.stripe_unknown), (SELECT count(*) FROM idempotency.open_claims)}), '0|0|0',
	'no orphan, nothing unknown, no claim left open');

$node->stop;
$stripe->stop;

done_testing();
