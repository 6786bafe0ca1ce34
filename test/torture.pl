
# make torture: sessions of every kind use the extension, while everything that
# can be struck is struck at random, and the server moves to its standby.  In the
# end everybody has an answer, and a checker proves the invariants from what the
# sessions have written down, the ledgers, and what arrived at the fake Stripe.
#
# test/torture/*.py: the sessions and the checker.  TORTURE_SECONDS and
# TORTURE_SEED: the seed gives the same faults and the same intentions again, not
# the same interleaving.

use strict;
use warnings;

use Cwd qw(abs_path);
use FakeStripe;
use File::Basename qw(dirname);
use IdempotencyTest;
use PayingApplication;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StripeTest;
use Test::More;
use Time::HiRes qw(time);

needs_debug_points();

my $seconds = $ENV{TORTURE_SECONDS} || 120;
my $seed = $ENV{TORTURE_SEED} || int(rand(1_000_000_000));
my $sessions = abs_path(dirname(__FILE__)) . '/torture';
my @kinds = (([keys => 4], [paying => 4], [sending => 2], [late => 1], [reconciling => 1], [events => 2]));
my $webhook_secret = 'whsec_torture';

diag("seed $seed, $seconds seconds, " . join(', ', map { "$_->[1] $_->[0]" } @kinds));
srand($seed);

my $stripe = FakeStripe->start;
$stripe->settings(search_lag => 1);
my $directory = "$PostgreSQL::Test::Utils::tmp_check/torture";
mkdir $directory;
append_to_file("$directory/webhook_secret", $webhook_secret);
chmod(0600, "$directory/webhook_secret");

my $number = 1;
my $node = stripe_node("main$number", $stripe, debug => 1, init => { allows_streaming => 1 }, conf => qq{
max_connections = 50
max_prepared_transactions = 20
shared_buffers = '32MB'
restart_after_crash = on
synchronous_commit = off
log_statement = all
wal_retrieve_retry_interval = 100ms
idempotency.webhook_secret_file = '$directory/webhook_secret'
idempotency.stripe_max_retries = 1
idempotency.stripe_timeout = '5 s'
idempotency.stripe_record_timeout = '5 s'
idempotency.expiry_interval = '1 s'
idempotency.abandoned_retention = '5 s'
});
my @logs = ($node->logfile);
my (@points, @gentle, @unreplayed);
append_to_file("$directory/succeeded", '');
sql($node, PAYING_APPLICATION);
sql($node, 'CREATE TABLE handled (event text, session text)');

# Tell the sessions where to go.
sub publish
{
	append_to_file("$directory/server.new", 'host=' . $node->host . ' port=' . $node->port . ' dbname=postgres');
	rename "$directory/server.new", "$directory/server" or die "could not rename: $!";
	return;
}

# Give the node a standby, without which nothing commits.
my $standby;
sub add_standby
{
	my $name = 'main' . ++$number;

	$node->backup($name);
	$standby = PostgreSQL::Test::Cluster->new($name);
	$standby->init_from_backup($node, $name, has_streaming => 1);
	$standby->append_conf('postgresql.conf', "primary_conninfo = '" . $node->connstr . " application_name=$name'");
	$standby->start;
	$standby->{stripe_key_file} = $node->{stripe_key_file};
	push @logs, $standby->logfile;
	set_synchronous('*');
	return;
}

sub set_synchronous
{
	my ($names) = @_;

	$node->append_conf('postgresql.conf', "synchronous_standby_names = '$names'");
	$node->reload;
	return;
}

# The node is gone, and its standby takes over, with all that anybody was told,
# replayed already or not.  Returns what to call it, or undef where there was no
# standby to be had.
sub fail_over
{
	my $old = $node;
	my $name = $old->name;
	my $lags = rand() < 0.6;
	my $lag;

	# a crash would make visible what the standby hasn't; without replay there
	# would be no new connection to it, either
	disarm($old, $_) foreach @points;
	$standby->safe_psql('postgres', 'SELECT pg_wal_replay_pause()') if $lags;
	my $until = time + ($lags ? 2 + rand(4) : 0);
	while (time < $until)
	{
		choose(@gentle)->();
		pause(0.02 + rand(0.1));
	}

	# what a crash made visible before the standby had it, it has now
	my $visible = try_sql('SELECT pg_current_wal_flush_lsn()');
	if (!defined $visible || !eventually(qq{SELECT EXISTS (SELECT FROM pg_stat_replication
		WHERE sync_state = 'sync' AND flush_lsn >= '$visible')}))
	{
		$standby->safe_psql('postgres', 'SELECT pg_wal_replay_resume()') if $lags;
		return;
	}
	my $connected = try_sql(q{SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend'}) // '';
	$old->stop(choose('immediate', 'fast'));
	is(join(' ', grep { title($_) =~ /^postgres: \Q$name\E: / } split /\n/, $connected), '', "nobody is left at $name");
	$lag = $standby->safe_psql('postgres', 'SELECT pg_wal_lsn_diff(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn())')
	  if $lags;
	$standby->append_conf('postgresql.conf', "synchronous_standby_names = ''");
	$standby->promote;
	append_to_file("$directory/succeeded", $old->port . ' ' . time . "\n");
	$node = $standby;
	publish();
	$old->clean_node;
	add_standby();
	push @unreplayed, $lag if $lag;
	return 1;
}

# The title of a process, or nothing where it is gone.
sub title
{
	my ($pid) = @_;

	return eval { slurp_file("/proc/$pid/cmdline") } // '';
}

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

# Return once a query answers t, or after a minute.
sub eventually
{
	my ($query) = @_;

	foreach (1 .. 600)
	{
		return 1 if (try_sql($query) // '') eq 't';
		pause(0.1);
	}
	return 0;
}

#
# What strikes
#

@points = qw(claim-answered before-send after-answer before-record after-record
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

sub caller_pid { return one_of(q{backend_type = 'client backend' AND state <> 'idle'}) }
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

# Those that nothing has met yet are forgotten, so that they don't pile up.
my $faults = 0;
sub fault
{
	$stripe->control('DELETE', "faults/$_->{fault}")
	  foreach ++$faults % 20 == 0 ? grep { !$_->{match} || !%{ $_->{match} } } @{ $stripe->control('GET', 'faults')->{faults} } : ();
	$stripe->fault(@{ choose(@at_stripe) });
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
	[ stripe => 40, \&fault ],
	[ restart => 1, sub { $node->restart } ],
	[ crash => 1, sub { $node->stop('immediate'); $node->start } ],
	[ cut_off_standby => 1, sub { signal('pg_terminate_backend', one_of(q{backend_type = 'walsender'})) } ]);
my @by_weight = map { my $strike = $_; ($strike) x $strike->[1] } @strikes;
# those that leave the server alive
@gentle = map { $_->[2] } grep { $_->[0] =~ /^(cancel|terminate|terminate_recorder|stripe)$/ } @by_weight;

add_standby();
publish();
my $deadline = time + $seconds;
my %children;

# each endpoint gets all events
my @endpoints = map { $stripe->webhook_endpoint(secrets => [$webhook_secret]) } 1 .. 2;

foreach my $kind (@kinds)
{
	my ($name, $count) = @$kind;

	foreach my $n (0 .. $count - 1)
	{
		my $pid = fork() // die "could not fork: $!";

		if ($pid == 0)
		{
			open(STDERR, '>', "$directory/$name-$n.err") or die "could not open its log: $!";
			exec('/usr/bin/python3', "$sessions/run.py", $directory, $name, $n, $seed, $deadline, $stripe->port,
				$stripe->{control} =~ s{^http://}{}r, $endpoints[$n] // 0)
			  or die "could not start a session: $!";
		}
		$children{$pid} = "$name-$n";
	}
}

my %struck;
my $next_failover = time + 20 + rand(20);
while (time < $deadline)
{
	if (time > $next_failover)
	{
		$struck{failover}++ if fail_over();
		$next_failover = time + 40 + rand(40);
	}
	my $strike = choose(@by_weight);

	$strike->[2]->();
	$struck{ $strike->[0] }++;
	pause(0.02 + rand(0.1));
}
disarm($node, $_) foreach @points;
$stripe->clear_faults;
wait_until_up($node);
diag(join(', ', map { "$_ $struck{$_}" } sort keys %struck));
diag(scalar(@unreplayed) . ' of the fail-overs to a standby with WAL it had not replayed: ' . join(', ', @unreplayed) . ' bytes');
foreach my $pid (sort { $a <=> $b } keys %children)
{
	waitpid($pid, 0);
	is($?, 0, "$children{$pid} has come to its end") or diag(slurp_file("$directory/$children{$pid}.err"));
}

# callers that were killed are found out, and events that came too early looked at again
eventually(q{SELECT NOT EXISTS (SELECT FROM idempotency.stripe_unknown WHERE operation_type = 'payment')
	AND NOT EXISTS (SELECT FROM idempotency.stripe_orphans WHERE operation_type = 'payment')});

symlink($_, "$directory/" . ($_ =~ s{.*/}{}r)) foreach @logs;
my ($stdout, $stderr) = ('', '');
my $checked = IPC::Run::run([ '/usr/bin/python3', "$sessions/check.py", $directory, $node->connstr('postgres'),
		$stripe->{control} =~ s{^http://}{}r, TEST_KEY, $webhook_secret ], '>', \$stdout, '2>', \$stderr);
diag($stdout);
ok($checked, 'every invariant holds') or diag($stderr);

$node->stop;
$standby->stop;
$stripe->stop;

done_testing();
