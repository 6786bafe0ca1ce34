#
# test/bench/stripe.pl: part "stripe" of test/bench/run
#
# What stripe_call() adds to the HTTP exchange.  The other end is responder.c,
# which does nothing but answer, so that no server's work is measured; what is
# compared with is curl_loop.c, libcurl in a loop on one connection.
#
#   overhead   a call's time less the loop's, beside two commits by hand; the
#              three run one after the other, over and over in short rounds,
#              and the differences are those of one round
#   clients    100 sessions at once, one recorder
#   replay     instructions of a recorded call, to stripe_lookup()'s
#   written    what a call writes, whose transaction commits right after it
#
# Its sections can be named, to have only some.
#
use strict;
use warnings;

use IPC::Open2 ();

our ($here, $dir, $base, $bindir, $major, $sockets, $port, $pairs, $seconds, @over, %case, @single_user_options);

my $key = 'sk_test_of_the_bench_0123456789';
my $params = q('{"amount": 2000, "currency": "eur", "confirm": true, "payment_method": "pm_card_visa"}');
my $calls = 100;				# in a round of one side
my $rounds = 4 * $pairs;
my %percentiles = (p5 => 0.05, p50 => 0.5, p99 => 0.99);

# A responder that answers after so many milliseconds; it ends when it is
# stopped, or with us.
sub responder
{
	my ($delay) = @_;
	my $pid = IPC::Open2::open2(my $out, my $in, "$dir/responder", $delay);
	chomp(my $its_port = readline($out));
	return { pid => $pid, in => $in, out => $out, url => "http://127.0.0.1:$its_port" };
}

sub stop_responder
{
	my ($responder) = @_;
	close($responder->{in});
	waitpid($responder->{pid}, 0);
	return;
}

sub stripe_options
{
	my ($url) = @_;
	return ('-c', 'shared_preload_libraries=idempotency', '-c', "idempotency.stripe_api_base=$url",
		'-c', "idempotency.stripe_api_key_file=$dir/stripe_key", '-c', 'max_connections=130');
}

# The value below which this part of the others lies.
sub percentile
{
	my ($part, @values) = @_;
	my @sorted = sort { $a <=> $b } @values;
	return $sorted[ int($part * $#sorted + 0.5) ];
}

sub milliseconds
{
	return sprintf('%.3f', $_[0]);
}

# Times of a procedure's calls, in milliseconds
sub procedure
{
	my ($name) = @_;
	my $said = psql('-c', "CALL bench.$name($calls)");
	return split(/,/, $said =~ /INFO:\s+\{(.*)\}/ ? $1 : die "$said\nno times of $name\n");
}

sub loop
{
	my ($url) = @_;
	run("$dir/curl_loop.log", "$dir/curl_loop", "$url/v1/payment_intents", $calls);
	return map { $_ / 1000 } split(/\n/, read_file("$dir/curl_loop.log"));
}

sub overhead
{
	my ($data) = @_;
	my %side = (
		call => sub { procedure('stripe_calls') },
		loop => sub { loop($_[0]) },
		commits => sub { procedure('two_commits') },
		http => sub { procedure('http_calls') });
	my @sides = qw(call loop commits);
	my $why_no_http;

	report_head("stripe_call() against libcurl in a loop, medians of $rounds rounds of $calls calls each, ms",
		'', 'stripe_call', 'loop', 'two commits by hand', 'call less loop', 'its quartiles',
		'call less loop and commits', 'bar', '', 'pgsql-http');
	my (%got, %added, %beyond);

	# the modes in turn, too
	foreach my $half (0, 1)
	{
		foreach my $fsync ($half ? qw(on off) : qw(off on))
		{
			my $responder = responder(0);

			start_server($data, join(' ', stripe_options($responder->{url}), '-c', "fsync=$fsync"));
			if (!defined $why_no_http)
			{
				$why_no_http = psql('-c', q{SELECT count(*) FROM pg_available_extensions WHERE name = 'http'}) > 0
				  ? '' : "it isn't installed";
				if ($why_no_http eq '')
				{
					psql('-f', "$here/stripe_http.sql");
					push @sides, 'http';
				}
			}
			foreach my $round (0 .. $rounds / 2 - 1)
			{
				my %now;

				# each goes first in its turn
				foreach my $side (map { $sides[ ($_ + $round) % @sides ] } 0 .. $#sides)
				{
					my @times = $side{$side}->($responder->{url});
					$now{$side} = { map { $_ => percentile($percentiles{$_}, @times) } keys %percentiles };
				}
				foreach my $what (keys %percentiles)
				{
					push @{ $got{$fsync}{$_}{$what} }, $now{$_}{$what} foreach @sides;
					push @{ $added{$fsync}{$what} }, $now{call}{$what} - $now{loop}{$what};
					push @{ $beyond{$fsync}{$what} }, $now{call}{$what} - $now{loop}{$what} - $now{commits}{$what};
				}
			}
			stop_server();
			stop_responder($responder);
		}
	}
	foreach my $fsync (qw(off on))
	{
		foreach my $what (qw(p50 p5 p99))
		{
			my @added = @{ $added{$fsync}{$what} };
			my @beyond = @{ $beyond{$fsync}{$what} };
			my @bar = $what eq 'p50'
			  ? verdict("stripe_call, fsync $fsync, ms", median($fsync eq 'on' ? @beyond : @added), 1.00) : ('', '');
			report_line("$what, fsync $fsync",
				(map { milliseconds(median(@{ $got{$fsync}{$_}{$what} })) } qw(call loop commits)),
				milliseconds(median(@added)), join(' to ', map { milliseconds(percentile($_, @added)) } 0.25, 0.75),
				milliseconds(median(@beyond)), @bar,
				$got{$fsync}{http} ? milliseconds(median(@{ $got{$fsync}{http}{$what} })) : '-');
		}
	}
	print "\nThe bar holds for \"call less loop\" without fsync, and for \"call less loop and commits\" with it.\n";
	print "pgsql-http: skipped, $why_no_http.\n" if $why_no_http ne '';
	return;
}

# Commits of all sessions that have ended, and flushes of WAL to disk.
sub commits
{
	my $flushes = $major >= 18 ? q{(SELECT sum(fsyncs) FROM pg_stat_io WHERE object = 'wal')}
	  : '(SELECT wal_sync FROM pg_stat_wal)';

	foreach my $try (1 .. 600)
	{
		my ($running, @counts) = split(/\|/, psql('-c', "
			SELECT (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'idempotency recorder'),
				(SELECT xact_commit FROM pg_stat_database WHERE datname = 'bench'), $flushes"));
		return @counts if !$running;
		select(undef, undef, undef, 0.1);
	}
	die "the recorder stays\n";
}

sub clients
{
	my ($data) = @_;
	my $time = 10 * $seconds;

	write_file("$dir/stripe_call.sql", "SELECT outcome = 'completed' AS ok FROM idempotency.stripe_call('bench',"
		. " nextval('bench.stripe_id')::text, 'POST', '/v1/payment_intents', $params) \\gset\n"
		. "\\if :ok\n\\else\nSELECT 1 / 0;\n\\endif\n");
	report_head("Sessions at once on one recorder, $time s each, fsync on",
		'answer after', 'sessions', 'calls a second', 'p50, ms', 'p99, ms', 'p50 of the first third', 'of the last',
		"recorder's commits a call", 'flushes of WAL a call');
	my $most;

	# the last two: calls come by chance, whether the ones before have ended or not
	foreach my $case ([ 0, 1 ], [ 0, 100 ], [ 200, 100 ], [ 0, 100, 0.5 ], [ 0, 100, 0.75 ])
	{
		my ($delay, $sessions, $part) = @$case;
		my @rate = defined $part ? ('--rate', int($part * $most)) : ();
		my $responder = responder($delay);
		my (@times, @at);

		unlink glob("$dir/stripe_log*");
		start_server($data, join(' ', stripe_options($responder->{url}), '-c', 'fsync=on'));
		my @before = commits();
		run("$dir/pgbench.log", "$bindir/pgbench", '-n', '-M', 'prepared', '-c', $sessions, '-j', $sessions > 1 ? 2 : 1,
			'-T', $time, @rate, '-l', "--log-prefix=$dir/stripe_log", '-f', "$dir/stripe_call.sql",
			'-h', $sockets, '-p', $port, '-U', 'bench', 'bench');
		my @after = commits();
		my $log = read_file("$dir/pgbench.log");
		die "$log\npgbench failed\n" if $log !~ /^tps = ([\d.]+)/m || $log =~ /number of failed transactions: [1-9]|aborted/;
		my $tps = $1;
		$most = $tps if !$delay && !@rate;

		foreach my $file (glob("$dir/stripe_log*"))
		{
			foreach my $line (split(/\n/, read_file($file)))
			{
				my @column = split(/ /, $line);
				push @times, $column[2] / 1000;
				push @at, $column[4] + $column[5] / 1e6;
			}
		}
		# sessions connect and warm up in the first tenth
		my ($begin, $end) = (percentile(0, @at), percentile(1, @at));
		my $third = sub {
			my ($from, $to) = map { $begin + ($end - $begin) * $_ } @_;
			return percentile(0.5, @times[ grep { $at[$_] >= $from && $at[$_] <= $to } 0 .. $#at ]);
		};
		report_line(($delay ? "$delay ms" : 'at once') . (@rate ? ", at $rate[1] calls a second" : ''), $sessions, commas($tps),
			(map { sprintf('%.1f', $_) } percentile(0.5, @times), percentile(0.99, @times), $third->(0.1, 0.4), $third->(0.7, 1)),
			sprintf('%.2f', ($after[0] - $before[0] - @times) / @times), sprintf('%.2f', ($after[1] - $before[1]) / @times));
		stop_server();
		stop_responder($responder);
	}
	return;
}

# Instructions of a call that is recorded, to those of looking it up.
sub replay
{
	my ($data) = @_;
	my $responder = responder(0);
	my $columns = 'outcome, resource_id, http_status, response';
	my $recorded = 2000;

	if (system('valgrind --version >/dev/null 2>&1') != 0)
	{
		print "\nReplay: skipped, valgrind isn't installed.\n";
		return;
	}

	# operations -1, -2, ... are recorded
	start_server($data, join(' ', stripe_options($responder->{url})));
	psql('-c', "SELECT count(*) FROM generate_series(1, $recorded) n, LATERAL idempotency.stripe_call('bench', (-n)::text,"
		. " 'POST', '/v1/payment_intents', $params) c WHERE c.outcome = 'completed'");
	psql('-c', "DO \$\$ BEGIN ASSERT (SELECT count(*) FROM idempotency.stripe_idempotency_keys"
		. " WHERE operation_id LIKE '-%' AND outcome = 'completed') = $recorded; END \$\$");
	commits();
	psql('-c', 'VACUUM (FREEZE, ANALYZE)', '-c', 'CHECKPOINT');
	stop_server();
	local @single_user_options = stripe_options($responder->{url});
	local $base = $data;
	stop_responder($responder);

	foreach my $what ([ '', $columns ], [ '_all', '*' ])
	{
		my ($name, $list) = @$what;
		$case{"stripe_replay$name"} = {
			prepare => "PREPARE s(text, text, jsonb) AS SELECT $list"
			  . " FROM idempotency.stripe_call(\$1, \$2, 'POST', '/v1/payment_intents', \$3)",
			call => sub { "EXECUTE s('bench', '" . -(1 + ($_[0] * 7919) % $recorded) . "', $params)" } };
		$case{"stripe_lookup$name"} = {
			prepare => "PREPARE s(text, text) AS SELECT $list FROM idempotency.stripe_lookup(\$1, \$2)",
			call => sub { "EXECUTE s('bench', '" . -(1 + ($_[0] * 7919) % $recorded) . "')" } };
	}

	report_head('Instructions of a replay', '', 'stripe_call', 'stripe_lookup', 'ratio', 'bar', '');
	foreach my $what ([ '', 'outcome, resource id, status, response' ], [ '_all', 'all columns' ])
	{
		my ($name, $title) = @$what;
		my @ours = instructions_of("stripe_replay$name");
		my @theirs = instructions_of("stripe_lookup$name");

		foreach my $i (0, 1)
		{
			my $line = $title . ($i ? ', result not printed' : '');
			my $ratio = $ours[$i] / $theirs[$i];
			report_line($line, commas($ours[$i]), commas($theirs[$i]), sprintf('%.2f', $ratio),
				verdict("replay of a call, $line", $ratio, 1.20));
		}
	}
	return;
}

# WAL and row versions of a call, up to when it is known that its caller has committed.
sub written
{
	my ($data) = @_;
	my $responder = responder(0);
	my $known = q{SELECT NOT EXISTS (SELECT FROM idempotency.stripe_idempotency_keys WHERE callers IS NOT NULL)};
	my $so_far = q{SELECT concat_ws(' ', pg_current_wal_insert_lsn() - '0/0', n_tup_ins + n_tup_upd, n_tup_hot_upd)
		FROM pg_stat_user_tables WHERE relname = 'stripe_idempotency_keys'};
	my $n = 2000;

	start_server($data, join(' ', stripe_options($responder->{url}), '-c', 'fsync=off', '-c', 'full_page_writes=off',
		'-c', 'idempotency.max_workers=0'));
	psql('-c', "CALL bench.stripe_calls($calls)");
	wait_until($known, 60);
	# the recorder says what it has done when it has nothing to do
	select(undef, undef, undef, 2);
	my @before = split(/ /, ask($so_far));
	psql('-c', 'CALL bench.stripe_calls(' . ($n - 20) . ')');
	wait_until($known, 60);
	select(undef, undef, undef, 2);
	my @after = split(/ /, ask($so_far));
	stop_server();
	stop_responder($responder);

	report_head('What a call writes', 'calls, one after the other', 'WAL, bytes a call', 'row versions a call', 'of them HOT');
	report_line($n, commas(($after[0] - $before[0]) / $n),
		map { sprintf('%.2f', ($after[$_] - $before[$_]) / $n) } 1, 2);
	return;
}

sub stripe
{
	my $responder;
	my $data;

	if (system('curl-config --version >/dev/null 2>&1') != 0)
	{
		print "\nCalls to Stripe: skipped, libcurl's development files aren't installed.\n";
		return;
	}
	compile('responder');
	compile('curl_loop', split(' ', `curl-config --cflags --libs`));
	write_file("$dir/stripe_key", $key);
	chmod(0600, "$dir/stripe_key");

	printf "\nCalls to Stripe, %s; load average %s\n", POSIX::strftime('%Y-%m-%d %H:%M', gmtime),
		-r '/proc/loadavg' ? read_file('/proc/loadavg') =~ s/( \S+){2}\n//r : 'not known';
	$data = fresh_copy('stripe');
	start_server($data);
	psql('-f', "$here/stripe.sql");
	stop_server();

	overhead($data) if wanted('overhead');
	clients($data) if wanted('clients');
	replay($data) if wanted('replay');
	written($data) if wanted('written');
	remove_tree($data);
	return;
}

1;
