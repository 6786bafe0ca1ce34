
# make torture: sessions of every kind use the extension, while everything that
# can be struck is struck at random, every setting changes, and the server moves
# to its standby.  In the end everybody has an answer, and a checker proves the
# invariants from what the sessions have written down, the ledgers, and what
# arrived at the fake Stripe.
#
# Much that is wrong hides behind the next session, which makes it good.  So now
# and then all sessions but those that only talk to the recorder are held (hush):
# then something is done to it, and either the server is killed or nothing happens
# for a while (a lull), in which all that is owed must be done.
#
# test/torture/*.py: the sessions and the checker; test/torture/TortureSettings.pm:
# which values settings take.  TORTURE_SECONDS and
# TORTURE_SEED: the seed gives the same faults and the same intentions again, not
# the same interleaving.

use strict;
use warnings;

use Cwd qw(abs_path);
use FakeStripe;
use File::Basename qw(dirname);
use IdempotencyTest;
use IPC::Open2;
use PayingApplication;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StripeTest;
use lib dirname(__FILE__) . '/torture';
use POSIX ();
use Test::More;
use Time::HiRes qw(time);
use TortureSettings;

needs_debug_points();

my $seconds = $ENV{TORTURE_SECONDS} || 120;
my $seed = $ENV{TORTURE_SEED} || int(rand(1_000_000_000));
my $sessions = abs_path(dirname(__FILE__)) . '/torture';
my @kinds = ([ keys => 4 ], [ paying => 4 ], [ sending => 2 ], [ late => 1 ], [ reconciling => 1 ], [ person => 1 ],
	[ bulk => 1 ], [ detached => 2 ], [ crowd => 3 ],
	[ dumping => 1 ], [ events => 2 ]);
# how long a lull is
my $lull = 8;
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
max_connections = 60
max_prepared_transactions = 30
shared_buffers = '32MB'
restart_after_crash = on
synchronous_commit = off
wal_writer_delay = '10s'
wal_keep_size = '1GB'
log_statement = all
wal_retrieve_retry_interval = 100ms
idempotency.webhook_secret_file = '$directory/webhook_secret'
idempotency.webhook_max_attempts = 3
idempotency.stripe_max_retries = 1
idempotency.stripe_timeout = '5 s'
idempotency.stripe_record_timeout = '5 s'
idempotency.expiry_interval = '1 s'
idempotency.abandoned_retention = '5 s'
});
my @logs = ($node->logfile);
my (@points, @gentle, @unreplayed);
append_to_file("$directory/$_", '') foreach qw(succeeded lulls);
sql($node, PAYING_APPLICATION);
sql($node, 'CREATE TABLE handled (event text, session text)');
sql($node, 'CREATE DATABASE small TEMPLATE template0');
sql($node, 'CREATE EXTENSION idempotency; CREATE VIEW depends AS SELECT key FROM idempotency.idempotency_keys', db => 'small');
# more databases than there are places for their recorders
$ENV{TORTURE_DATABASES} = 12;
foreach my $database (map { "crowd$_" } 0 .. $ENV{TORTURE_DATABASES} - 1)
{
	sql($node, "CREATE DATABASE $database");
	sql($node, 'CREATE EXTENSION idempotency', db => $database);
}

# Another server, where dumps are restored.  It has an API key of its own, so that what it sends is told apart.
use constant ELSEWHERE_KEY => 'sk_test_elsewhere';
my $elsewhere = stripe_node('elsewhere', $stripe, debug => 1, extension => 0, conf => qq{
max_connections = 20
shared_buffers = '16MB'
idempotency.expiry_interval = '1 s'
});
write_key($elsewhere, ELSEWHERE_KEY);
push @logs, $elsewhere->logfile;
append_to_file("$directory/elsewhere", 'host=' . $elsewhere->host . ' port=' . $elsewhere->port . ' dbname=postgres');

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
	my $lags = rand() < 0.6;
	my $lag;

	# a crash would make visible what the standby hasn't; without replay there
	# would be no new connection to it, either
	disarm($node, $_) foreach @points;
	free_places(1);
	$standby->safe_psql('postgres', 'SELECT pg_wal_replay_pause()') if $lags;
	my $until = time + ($lags ? 2 + rand(4) : 0);
	while (time < $until)
	{
		choose(@gentle)->();
		pause(0.02 + rand(0.1));
	}

	if (!is_up_to_date())
	{
		$standby->safe_psql('postgres', 'SELECT pg_wal_replay_resume()') if $lags;
		return;
	}
	leave(choose('immediate', 'fast'));
	$lag = $standby->safe_psql('postgres', 'SELECT pg_wal_lsn_diff(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn())')
	  if $lags;
	succeed();
	push @unreplayed, $lag if $lag;
	return 1;
}

# What a crash made visible before the standby had it, it has now.
sub is_up_to_date
{
	my $visible = try_sql('SELECT pg_current_wal_flush_lsn()');

	return defined $visible && eventually(qq{SELECT EXISTS (SELECT FROM pg_stat_replication
		WHERE sync_state = 'sync' AND flush_lsn >= '$visible')});
}

# The node stops, and with it everybody there.
sub leave
{
	my ($mode) = @_;
	my $name = $node->name;
	my $connected = try_sql(q{SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend'}) // '';

	$node->stop($mode);
	is(join(' ', grep { title($_) =~ /^postgres: \Q$name\E: / } split /\n/, $connected), '', "nobody is left at $name");
	return;
}

# The standby takes its place.
sub succeed
{
	my $old = $node;

	$standby->append_conf('postgresql.conf', "synchronous_standby_names = ''");
	$standby->promote;
	append_to_file("$directory/succeeded", $old->port . ' ' . time . "\n");
	$node = $standby;
	publish();
	$old->clean_node;
	add_standby();
	return;
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

# Whatever the settings have become, this script has its own.
my %undisturbed = (PGOPTIONS => join(' ', map { "-c $_" } 'lock_timeout=0', 'statement_timeout=0', 'search_path=public',
		'default_transaction_read_only=off', 'default_transaction_isolation=read\\ committed', 'synchronous_commit=local',
		'DateStyle=ISO'));

# What the statements say, or undef.
my ($from_statements, $to_statements);
sub try_sql
{
	my ($text) = @_;

	unless (defined $to_statements)
	{
		local %ENV = (%ENV, %undisturbed);
		open2($from_statements, $to_statements, '/usr/bin/python3', "$sessions/statements.py");
	}
	print $to_statements JSON::PP->new->canonical->encode({ conninfo => $node->connstr('postgres'), text => $text }) . "\n";
	$to_statements->flush;
	return JSON::PP->new->allow_nonref->decode(scalar readline($from_statements));
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
	(map { ([$_], [ $_, effect => JSON::PP::true ]) } qw(502 503 504 redirect)),
	[ 'huge', bytes => 300_000 ],
	(\&gateway) x 12,
	(map { [ $_, ms => 300 ] } qw(hang_before hang_in_use hang_after)),
	(map { [ $_, on_leave => 'continue', ms => 300 ] } qw(hang_before hang_in_use)));

sub choose { return $_[ int(rand(@_)) ] }

# The answer of something on the way: before Stripe has had the request, or after it has executed it.  Nothing here is
# Stripe's: no error object, and no object with a success.
sub gateway
{
	my $status = choose(400, 401, 403, 404, 404, 407, 409, 413, 421, 429, 451, 200, 200, 204, 301, 303, 500, 502);
	my @bodies = ([], [ body => '' ], map { [ type => 'application/json', body => $_ ] } '[]', '"no"', 'null', '{"message": ');

	push @bodies, map { [ type => 'application/json', body => $_ ] } '{"message": "Forbidden"}', '{"error": "denied"}',
	  '{"errors": [{"code": 4}], "error": null}', '{}'
	  if $status >= 300;
	return [ 'gateway', status => $status, effect => choose(JSON::PP::true, JSON::PP::false), @{ choose(@bodies) } ];
}

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
	my $what = choose(@at_stripe);
	$stripe->fault(ref $what eq 'CODE' ? @{ $what->() } : @$what);
	return;
}

# A setting for the server, for the database or for the role, or back to what it was.
my $settings = torture_settings(sub { return sql($node, $_[0]) });
sub set
{
	my ($name, $context, @values) = @{ choose(@$settings) };
	my $value = rand() < 0.25 ? undef : choose(@values);
	my $whose = $context eq 'sighup' ? 'SYSTEM' : choose('SYSTEM', 'SYSTEM', 'DATABASE postgres', 'ROLE CURRENT_USER');

	change($whose, $name, $value);
	return;
}

sub change
{
	my ($whose, $name, $value) = @_;

	# lists are lists
	$value = join(', ', map { literal($_) } $name =~ /search_path|compare_ignore/ ? split(/, */, $value) : $value)
	  if defined $value;
	try_sql("ALTER $whose " . (defined $value ? "SET $name = $value" : "RESET $name"));
	try_sql('SELECT pg_reload_conf()') if $whose eq 'SYSTEM';
	return;
}

sub reset_settings
{
	try_sql("ALTER $_ RESET ALL") foreach 'SYSTEM', 'DATABASE postgres', 'ROLE CURRENT_USER';
	try_sql('SELECT pg_reload_conf()');
	return;
}

# All places for background processes are taken for a while: until free_places() is called after that.
my $free_at;
sub take_places
{
	my ($least, $most) = @_;
	my $until = time + $least + rand($most - $least);

	arm($node, 'occupied', 'all');
	try_sql('SELECT test_occupy_workers()');
	$free_at = $until unless defined $free_at && $free_at > $until;
	return;
}

sub free_places
{
	my ($at_once) = @_;

	return unless defined $free_at && ($at_once || time >= $free_at);
	disarm($node, 'occupied');
	undef $free_at;
	return;
}

# Statements beside all else, each in a transaction of its own unless it has more than one; at most three at a time.
my %beside;
sub beside
{
	my ($db, $timeout, @statements) = @_;

	reap();
	return if keys %beside >= 3;
	my $connection = $node->connstr($db);
	my $pid = fork() // die "could not fork: $!";
	if ($pid == 0)
	{
		$ENV{PGOPTIONS} = "$undisturbed{PGOPTIONS} -c statement_timeout=$timeout";
		open(STDIN, '<', '/dev/null');
		open(STDOUT, '>>', "$directory/beside.out");
		open(STDERR, '>&', \*STDOUT);
		exec('psql', '-XAtqe', '-v', 'ON_ERROR_STOP=1', '-d', $connection, map { ('-c', $_) } @statements)
		  or POSIX::_exit(1);
	}
	$beside{$pid} = 1;
	return;
}

# Those that have ended, or all.
sub reap
{
	my ($all) = @_;

	foreach my $pid (keys %beside)
	{
		delete $beside{$pid} if waitpid($pid, $all ? 0 : POSIX::WNOHANG()) != 0;
	}
	return;
}

# What changes the catalog, is refused, or comes to nothing.  The database stays, as a subscription is in it.
sub keep_database
{
	my ($keep) = @_;

	try_sql($keep ? q{CREATE SUBSCRIPTION keeper CONNECTION 'dbname=none' PUBLICATION none WITH (connect = false, slot_name = NONE)}
		: 'DROP SUBSCRIPTION IF EXISTS keeper');
	return;
}

my @ddl = (
	sub { beside('template1', 1000, 'DROP DATABASE postgres') },
	sub { beside('template1', 5000, 'DROP DATABASE IF EXISTS copied', 'CREATE DATABASE copied TEMPLATE small', 'DROP DATABASE copied') },
	sub { beside('template1', 5000, 'ALTER DATABASE small RENAME TO other', 'ALTER DATABASE other RENAME TO small') },
	sub { beside('template1', 5000, 'ALTER DATABASE other RENAME TO small') },
	sub { beside('small', 1000, 'DROP EXTENSION idempotency') },
	sub { beside('postgres', 1000, 'SET lock_timeout = 200', 'DROP EXTENSION idempotency') },
	sub { beside('postgres', 1000, 'SET lock_timeout = 300', 'BEGIN; DROP EXTENSION idempotency CASCADE; ROLLBACK') },
	sub { beside('postgres', 1000, 'SET lock_timeout = 200', 'DROP TABLE idempotency.stripe_idempotency_keys') },
	sub {
		my $table = choose(qw(idempotency_keys stripe_idempotency_keys stripe_webhook_events));
		beside('postgres', 2000, 'SET lock_timeout = 400', choose(
				"BEGIN; LOCK TABLE idempotency.$table; SELECT pg_sleep(" . rand(0.6) . '); ROLLBACK',
				"BEGIN; ALTER TABLE idempotency.$table ADD COLUMN more int; ROLLBACK",
				"VACUUM FULL idempotency.$table", "REINDEX TABLE CONCURRENTLY idempotency.$table"));
	});

# Eight databases that nobody has ever used are dropped, one after the other.
sub drop_eight
{
	my @names = map { "dropped$_" } 1 .. 8;

	beside('template1', 20000, (map { ("DROP DATABASE IF EXISTS $_", "CREATE DATABASE $_ TEMPLATE template0") } @names),
		map { "DROP DATABASE $_" } @names);
	return;
}

# The postmaster alone is killed; the others notice, and leave.
sub kill_postmaster
{
	my $name = $node->name;
	my @others = grep { title($_) =~ /^postgres: \Q$name\E: / } map { m{^/proc/(\d+)$} } glob('/proc/[0-9]*');

	my $postmaster = $node->{_pid};

	$node->kill9;
	foreach (1 .. 600)
	{
		last unless grep { title($_) ne '' && title($_) =~ /^postgres: \Q$name\E: |postgres -D/ } $postmaster, @others;
		pause(0.1);
	}
	# where nobody has taken note of its end yet, its id looks alive
	unlink $node->data_dir . '/postmaster.pid', $node->host . '/.s.PGSQL.' . $node->port . '.lock';
	$node->start;
	return;
}

# with its weight
my @strikes = (
	[ cancel => 20, sub { signal('pg_cancel_backend', caller_pid()) } ],
	[ terminate => 15, sub { signal('pg_terminate_backend', caller_pid()) } ],
	[ kill => 3, sub { kill_process(caller_pid()) } ],
	[ terminate_recorder => 15, sub { signal('pg_terminate_backend', recorder_pid()) } ],
	[ terminate_worker => 5, sub { signal('pg_terminate_backend', one_of(q{backend_type = 'idempotency worker'})) } ],
	[ terminate_launcher => 2, sub { signal('pg_terminate_backend', one_of(q{backend_type = 'idempotency launcher'})) } ],
	[ setting => 20, \&set ],
	[ take_places => 6, sub { take_places(0.1, 3) } ],
	[ ddl => 8, sub { choose(@ddl)->() } ],
	[ kill_recorder => 2, sub { kill_process(recorder_pid()) } ],
	[ error_at_point => 15, sub { arm($node, choose(@points), 'error') } ],
	[ end_at_point => 15, sub { arm($node, choose(@points), 'fatal') } ],
	[ kill_at_point => 4, sub { arm($node, choose(@points), 'kill') } ],
	[ stripe => 40, \&fault ],
	[ restart => 1, sub { $node->restart } ],
	[ crash => 1, sub { $node->stop('immediate'); $node->start } ],
	[ kill_postmaster => 1, \&kill_postmaster ],
	[ cut_off_standby => 1, sub { signal('pg_terminate_backend', one_of(q{backend_type = 'walsender'})) } ]);
my @by_weight = map { my $strike = $_; ($strike) x $strike->[1] } @strikes;
# those that leave the server alive
@gentle = map { $_->[2] } grep { $_->[0] =~ /^(cancel|terminate|terminate_(recorder|worker|launcher)|stripe|setting|take_places)$/ }
  @by_weight;

keep_database(1);
add_standby();
publish();
my $deadline = time + $seconds;
my %children;

# each endpoint gets all events
my @endpoints = map { $stripe->webhook_endpoint(secrets => [$webhook_secret], enabled_events => [qw(payment_intent.* charge.*)]) } 1 .. 2;

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

#
# A hush
#

# Those that are held, and those that aren't
sub hold
{
	my ($signal, $kinds) = @_;

	$kinds //= qr/^(?!detached)/;
	kill $signal, grep { $children{$_} =~ $kinds } keys %children;
	return;
}

# The server's life, as sessions write it down
sub server_life
{
	my $start = try_sql(q{SELECT extract(epoch FROM backend_start) FROM pg_stat_activity WHERE backend_type = 'checkpointer'});

	return defined $start ? [ 0 + $node->port, $start ] : undef;
}

# Nothing is in the way, and nothing happens.
sub lull
{
	my ($seconds) = @_;

	reap(1);
	free_places(1);
	pause(0.2);
	my $start = time;
	pause($seconds);
	append_to_file("$directory/lulls", JSON::PP->new->encode({ start => $start, end => time, life => server_life() }) . "\n");
	return;
}

# A recorder has begun when it was to wait for disk and standby, and now it isn't any more.
sub less_durable
{
	change('DATABASE postgres', 'synchronous_commit', undef);
	change('SYSTEM', 'synchronous_commit', 'on');
	signal('pg_terminate_backend', recorder_pid());
	pause(0.7 + rand(0.5));
	change('SYSTEM', 'synchronous_commit', choose(@_));
	return;
}

# Calls of both detached sessions are at Stripe, and nothing else happens; or they don't come.
sub calls_are_out
{
	my $fault = $stripe->fault('hang_after', ms => 4000, times => 0, match => { body => 'detached' });
	my $until = time + 3;

	pause(0.02) while time < $until && $stripe->control('GET', "faults/$fault")->{holding} < 2;
	return;
}

my %hushes = (
	# a call's answer comes when there is no recorder, and no place for one
	places => sub {
		my $until = time + 4 + rand(2);

		$stripe->fault('hang_after', ms => 2300, times => 0, match => { path => '/v1/customers' });
		while (time < $until)
		{
			pause(rand(0.6));
			free_places();
			pause(0.1);
			take_places(0.1, 1.5);
			signal('pg_terminate_backend', recorder_pid()) if rand() < 0.4;
		}
		free_places(1);
		pause(1);
		append_to_file("$directory/hold", '');
		take_places(10, 11);
		signal('pg_terminate_backend', recorder_pid());
		take_places(10, 11);
		pause(3.5);
		lull($lull);
	},
	# the database is about to be dropped, and then isn't, since others are there
	refused => sub {
		keep_database(0);
		$stripe->fault('hang_after', ms => 400, times => 0, match => { path => '/v1/customers' });
		pause(1);
		foreach (1 .. 3)
		{
			beside('template1', choose(300, 1000, 9000), 'DROP DATABASE postgres');
			append_to_file("$directory/hold", '') if $_ == 3;
			reap(1);
			pause(rand(0.5));
		}
		keep_database(1);
		lull($lull);
	},
	# many databases want the few places there are
	crowd => sub {
		hold('CONT', qr/^crowd/);
		lull($lull);
		hold('STOP', qr/^crowd/);
	},
	# other databases are, and calls go on
	dropped => sub {
		drop_eight();
		lull($lull);
	},
	# what isn't flushed is lost
	crash => sub {
		less_durable(qw(off off local remote_write));
		pause(rand(1));
		calls_are_out();
		if (rand() < 0.5)
		{
			$node->stop('immediate');
			$node->start;
		}
		else
		{
			kill_postmaster();
		}
	},
	# what the standby hasn't got is lost
	behind => sub {
		my $name = $standby->name;

		return unless is_up_to_date();
		my @receiver = grep { title($_) =~ /^postgres: \Q$name\E: walreceiver/ } map { m{^/proc/(\d+)$} } glob('/proc/[0-9]*');
		less_durable(qw(off local)) if rand() < 0.6;
		kill 'STOP', @receiver;
		# one that waits for the standby, as its caller does for a second
		pause(0.3 + rand(0.6));
		signal('pg_terminate_backend', recorder_pid()) if rand() < 0.5;
		calls_are_out();
		leave('immediate');
		# nor shall it read what the socket holds
		kill 'TERM', @receiver;
		kill 'CONT', @receiver;
		succeed();
	});
my @hushes = (qw(crash places refused crowd behind dropped crash crowd places));

# All but the recorder's callers are held, and something is done to it.
sub hush
{
	my $kind = $hushes[ $_[0] % @hushes ];

	return unless defined try_sql('SELECT true');
	disarm($node, $_) foreach @points;
	free_places(1);
	$stripe->clear_faults;
	hold('STOP');
	# what they have begun comes to its end, as far as it does
	change('SYSTEM', $_->[0], $_->[1]) foreach [ 'idempotency.max_workers' => undef ], [ 'force_parallel_mode' => undef ];
	pause(0.5);
	diag(sprintf('hush %d, %s: %.3f', $_[0], $kind, time));
	$hushes{$kind}->();
	unlink "$directory/hold";
	$stripe->clear_faults;
	hold('CONT');
	return $kind;
}

my (%struck, $hushed);
my $next_hush = time + 10 + rand(10);
my $next_failover = time + 20 + rand(20);
while (time < $deadline)
{
	if (time > $next_failover)
	{
		$struck{failover}++ if fail_over();
		$next_failover = time + 40 + rand(40);
	}
	if (time > $next_hush && time + 20 < $deadline)
	{
		$struck{'hush ' . (hush($hushed++) // 'none')}++;
		$next_hush = time + 15 + rand(20);
	}
	free_places();
	my $strike = choose(@by_weight);
	my $began = time;

	$strike->[2]->();
	append_to_file("$directory/strikes", sprintf("%.3f %s %.3f\n", $began, $strike->[0], time - $began));
	$struck{ $strike->[0] }++;
	pause(0.02 + rand(0.1));
}
disarm($node, $_) foreach @points;
$stripe->clear_faults;
wait_until_up($node);
free_places(1);
reset_settings();
reap(1);
diag(join(', ', map { "$_ $struck{$_}" } sort keys %struck));
diag(scalar(@unreplayed) . ' of the fail-overs to a standby with WAL it had not replayed: ' . join(', ', @unreplayed) . ' bytes');
foreach my $pid (sort { $a <=> $b } keys %children)
{
	waitpid($pid, 0);
	is($?, 0, "$children{$pid} has come to its end") or diag(slurp_file("$directory/$children{$pid}.err"));
}

# nothing is in the way any more
lull($lull);

# callers that were killed are found out, and events that came too early looked at again
eventually(q{SELECT NOT EXISTS (SELECT FROM idempotency.stripe_unknown WHERE operation_type = 'payment')
	AND NOT EXISTS (SELECT FROM idempotency.stripe_orphans WHERE operation_type = 'payment')
	AND NOT EXISTS (SELECT FROM idempotency.idempotency_keys WHERE expires_at < clock_timestamp() - interval '30 s')});

symlink($_, "$directory/" . ($_ =~ s{.*/}{}r)) foreach @logs;
my ($stdout, $stderr) = ('', '');
my $checked = IPC::Run::run([ '/usr/bin/python3', "$sessions/check.py", $directory, $node->connstr('postgres'),
		$stripe->{control} =~ s{^http://}{}r, TEST_KEY, $webhook_secret, ELSEWHERE_KEY ], '>', \$stdout, '2>', \$stderr);
diag($stdout);
ok($checked, 'every invariant holds') or diag($stderr);

$elsewhere->stop;
$node->stop;
$standby->stop;
$stripe->stop;

done_testing();
