#
# test/bench/expiry.pl
#
# The part "expiry" of test/bench/run: what the removal of expired rows costs
# those who claim meanwhile, and what it leaves behind.  Here the disk is
# waited for (fsync) and autovacuum runs, as on a real server.
#
# Its sections, to name only some: ways, life, purge, steady.
#
# Environment: BENCH_EXPIRY_ROWS, expired rows to begin with (5,000,000).
#
use strict;
use warnings;

our ($dir, $base, $bindir, $here, $sockets, $port, $pairs, @over);

my $rows = $ENV{BENCH_EXPIRY_ROWS} || 5_000_000;
my $clients = 20;
my $window = 10;				# seconds of one measurement

my $expiry_options = '-c fsync=on -c autovacuum=on -c shared_buffers=512MB'
	. ' -c max_wal_size=16GB -c checkpoint_timeout=1h -c max_connections=100'
	. ' -c shared_preload_libraries=idempotency -c log_autovacuum_min_duration=0';

sub switch_expiry
{
	my ($on) = @_;
	psql('-c', 'ALTER DATABASE bench SET idempotency.expiry = ' . ($on ? 'on' : 'off'));
	wait_until("SELECT status = 'off' FROM idempotency.workers WHERE database = 'bench'", 60) if !$on;
	wait_until("SELECT status <> 'off' FROM idempotency.workers WHERE database = 'bench'", 60) if $on;
	return;
}

sub removed
{
	return ask("SELECT removed FROM idempotency.workers WHERE database = 'bench'");
}

# Rows that expired yesterday, of random keys, as $table.
sub expired_rows
{
	my ($table, $n) = @_;
	return "INSERT INTO $table (token, claimed_at, recorded_at, expires_at, attempt, http_status,"
		. ' scope, key, response)'
		. " SELECT n, now() - interval '2 days', now() - interval '2 days', now() - interval '1 day', 1, 201,"
		. " 'tenant-7', (100000000000000000 + (n * 265443576911) % 90000000000000000)::text,"
		. " '{\"order\": 17, \"status\": \"paid\", \"amount\": 4200}'"
		. " FROM generate_series(1, $n) n";
}

# Latencies of one run of pgbench, in milliseconds, sorted.
sub latencies
{
	my ($script, @options) = @_;
	unlink glob("$dir/latency.*");
	run("$dir/pgbench.log", "$bindir/pgbench", '-n', '-M', 'prepared', '-T', $window,
		'-f', "$dir/$script.sql", '-l', "--log-prefix=$dir/latency", @options,
		'-h', $sockets, '-p', $port, '-U', 'bench', 'bench');
	my @times;
	for my $file (glob("$dir/latency.*"))
	{
		open(my $fh, '<', $file) or die "$file: $!\n";
		while (<$fh>)
		{
			my (undef, undef, $usecs) = split;
			push @times, $usecs / 1000;
		}
		close($fh);
	}
	unlink glob("$dir/latency.*");
	return sort { $a <=> $b } @times;
}

sub at
{
	my ($share, @sorted) = @_;
	return $sorted[ int($share * $#sorted) ];
}

sub size_of
{
	my ($table) = @_;
	return split /\|/, ask("SELECT pg_table_size('$table'), pg_indexes_size('$table')");
}

#
# The ways to remove rows, one after the other and alone
#
sub ways
{
	my $n = 200_000;
	my $delete = "DELETE FROM %s WHERE (scope, key) IN (SELECT scope, key FROM %s"
		. ' WHERE expires_at <= now() LIMIT 1000 FOR UPDATE SKIP LOCKED) AND expires_at <= now()';
	my $loop = "DO \$\$ DECLARE n bigint; BEGIN LOOP %s; GET DIAGNOSTICS n = ROW_COUNT;"
		. ' EXIT WHEN n = 0; COMMIT; END LOOP; END $$';

	report_head('Ways to remove ' . commas($n) . ' expired rows, 1,000 a transaction, nobody else there',
		'way', 'rows a second', 'WAL bytes a row');
	for my $way (
		[ 'this extension, by a worker', 'idempotency.idempotency_keys', undef ],
		[ 'this extension, by `expire()`', 'idempotency.idempotency_keys',
			'SELECT sum(removed) INTO n FROM idempotency.expire(1000); EXIT WHEN n = 0; COMMIT' ],
		[ '`LIMIT 1000 FOR UPDATE SKIP LOCKED`, no index', 'bench.by_hand', $delete ],
		[ 'the same with an index on `expires_at`', 'bench.by_hand_with_index', $delete ])
	{
		my ($what, $table, $statement) = @$way;

		psql('-c', "TRUNCATE $table", '-c', expired_rows($table, $n),
			'-c', "VACUUM (FREEZE, ANALYZE) $table", '-c', 'CHECKPOINT');
		my $wal = ask('SELECT pg_current_wal_insert_lsn()');
		my $seconds;
		if (!defined $statement)
		{
			switch_expiry(1);
			my $before = ask('SELECT extract(epoch FROM clock_timestamp())');
			wait_until("SELECT NOT EXISTS (SELECT FROM $table)", 300);
			$seconds = ask('SELECT extract(epoch FROM clock_timestamp())') - $before;
			switch_expiry(0);
		}
		else
		{
			$statement =~ s/%s/$table/g;
			my $code = $statement =~ /EXIT/ ? "DO \$\$ DECLARE n bigint; BEGIN LOOP $statement; END LOOP; END \$\$"
				: sprintf($loop, $statement);
			my $before = ask('SELECT extract(epoch FROM clock_timestamp())');
			psql('-c', 'SET synchronous_commit = off', '-c', $code);
			$seconds = ask('SELECT extract(epoch FROM clock_timestamp())') - $before;
		}
		my $bytes = ask("SELECT pg_current_wal_insert_lsn() - '$wal'");
		report_line($what, commas($n / $seconds), sprintf('%.0f', $bytes / $n));
		psql('-c', "TRUNCATE $table");
	}
	return;
}

#
# The life of a key in WAL
#
sub life
{
	my $n = 20_000;
	my %sql = (
		'this extension' => [ 'idempotency.idempotency_keys',
			"SELECT token FROM idempotency.claim((100000000000000000 + n * 265443576911 % 90000000000000000)::text,"
			. " 'tenant-7', lease => '5 minutes') INTO t;"
			. ' COMMIT;'
			. ' PERFORM idempotency.record((100000000000000000 + n * 265443576911 % 90000000000000000)::text,'
			. " 'tenant-7', t, '{\"order\": 17, \"status\": \"paid\", \"amount\": 4200}', 201, ttl => '1 microsecond');",
			'SELECT sum(removed) INTO t FROM idempotency.expire(1000); EXIT WHEN t = 0; COMMIT' ],
		map {
			my $table = $_->[1];
			$_->[0] => [ $table,
				"INSERT INTO $table (scope, key, token, claimed_at, lease_expires_at, lease, attempt)"
				. " VALUES ('tenant-7', (100000000000000000 + n * 265443576911 % 90000000000000000)::text, n,"
				. " clock_timestamp(), clock_timestamp() + interval '5 minutes', '5 minutes', 1)"
				. ' ON CONFLICT (scope, key) DO NOTHING;'
				. ' COMMIT;'
				. " UPDATE $table SET recorded_at = clock_timestamp(), expires_at = clock_timestamp(),"
				. " http_status = 201, response = '{\"order\": 17, \"status\": \"paid\", \"amount\": 4200}',"
				. ' lease = NULL, lease_expires_at = NULL'
				. " WHERE scope = 'tenant-7' AND key = (100000000000000000 + n * 265443576911 % 90000000000000000)::text"
				. ' AND token = n;',
				"DELETE FROM $table WHERE (scope, key) IN (SELECT scope, key FROM $table"
				. ' WHERE expires_at <= now() LIMIT 1000 FOR UPDATE SKIP LOCKED) AND expires_at <= now();'
				. ' GET DIAGNOSTICS t = ROW_COUNT; EXIT WHEN t = 0; COMMIT' ]
		} ([ 'by hand, index on expires_at', 'bench.by_hand_with_index' ], [ 'by hand, no index', 'bench.by_hand' ]));
	my %bytes;

	for my $side (sort keys %sql)
	{
		my ($table, $use, $expire) = @{ $sql{$side} };
		my @at;
		psql('-c', "TRUNCATE $table", '-c', 'CHECKPOINT');
		push @at, ask('SELECT pg_current_wal_insert_lsn()');
		psql('-c', "DO \$\$ DECLARE t bigint; BEGIN FOR n IN 1 .. $n LOOP $use COMMIT; END LOOP; END \$\$");
		push @at, ask('SELECT pg_current_wal_insert_lsn()');
		psql('-c', "DO \$\$ DECLARE t bigint; BEGIN LOOP $expire; END LOOP; END \$\$");
		push @at, ask('SELECT pg_current_wal_insert_lsn()');
		psql('-c', "VACUUM $table");
		push @at, ask('SELECT pg_current_wal_insert_lsn()');
		$bytes{$side} = [ map { ask("SELECT '$at[$_]'::pg_lsn - '$at[$_ - 1]'") / $n } 1 .. 3 ];
		$bytes{$side}[3] = ask("SELECT '$at[3]'::pg_lsn - '$at[0]'") / $n;
	}

	report_head('WAL bytes in the life of a key (full_page_writes off)',
		'', 'claim + record', 'expiry', 'vacuum', 'all', 'to the table with an index', 'bar', '');
	for my $side (reverse sort keys %bytes)
	{
		my $ratio = $bytes{$side}[3] / $bytes{'by hand, index on expires_at'}[3];
		report_line($side, (map { sprintf('%.0f', $_) } @{ $bytes{$side} }), sprintf('%.2f', $ratio),
			$side eq 'this extension' ? verdict('WAL of the life of a key', $ratio, 1.00) : ('', ''));
	}
	return;
}

#
# Claims while millions of rows are removed
#
sub purge
{
	my (%ratio, %seen);
	my $table = 'idempotency.idempotency_keys';
	my @removed;

	write_file("$dir/expiry_claim.sql", "\\set k random(200000000000000000, 899999999999999999)\n"
		. "SELECT * FROM idempotency.claim(:k, 'tenant-7', lease => '5 minutes');\n");
	write_file("$dir/expiry_reclaim.sql", "\\set n random(1, $rows)\n"
		. "\\set k 100000000000000000 + (:n * 265443576911) % 90000000000000000\n"
		. "SELECT * FROM idempotency.claim(:k, 'tenant-7', lease => '1 millisecond');\n");
	psql('-c', "TRUNCATE $table", '-c', expired_rows($table, $rows),
		'-c', "VACUUM (FREEZE, ANALYZE) $table", '-c', 'CHECKPOINT');
	my ($heap, $index) = size_of($table);

	latencies('expiry_claim', '-c', $clients, '-j', 2);
	for my $load ([ 'as fast as they can', '-c', $clients, '-j', 2 ],
		[ '500 a second', '-c', $clients, '-j', 2, '-R', 500 ])
	{
		my ($what, @options) = @$load;
		for my $round (1 .. $pairs)
		{
			my %now;
			for my $on ($round % 2 ? (0, 1) : (1, 0))
			{
				switch_expiry($on);
				my $before = removed();
				my @times = latencies('expiry_claim', @options);
				push @removed, (removed() - $before) / $window if $on;
				$now{$on} = [ at(0.5, @times), at(0.99, @times), scalar @times ];
			}
			push @{ $ratio{$what}{$_} }, $now{1}[$_] / $now{0}[$_] for 0, 1;
			for my $on (0, 1)
			{
				push @{ $seen{$what}{$on}[$_] }, $now{$on}[$_] for 0 .. 2;
			}
		}
	}

	report_head(commas($rows) . " expired rows, $clients clients that claim, medians of $pairs pairs of $window s",
		'claims', 'claims a second', 'p50 without, ms', 'p50 with, ms', 'p99 without, ms',
		'p99 with, ms', 'p50, with to without', 'p99, with to without', 'bar', '');
	for my $what (sort { $b cmp $a } keys %ratio)
	{
		my $p99 = median(@{ $ratio{$what}{1} });
		report_line($what, commas(median(@{ $seen{$what}{0}[2] }) / $window),
			(map { sprintf('%.2f', median(@{ $seen{$what}{ $_->[0] }[ $_->[1] ] })) }
				[ 0, 0 ], [ 1, 0 ], [ 0, 1 ], [ 1, 1 ]),
			sprintf('%.2f', median(@{ $ratio{$what}{0} })), sprintf('%.2f', $p99),
			verdict("p99 of claims, $what", $p99, 1.25));
	}
	print "\nRemoved meanwhile: " . commas(median(@removed)) . " rows a second.\n";

	# claims of keys that are being removed at the moment
	switch_expiry(1);
	my @waits = latencies('expiry_reclaim', '-c', 4, '-j', 2);
	switch_expiry(0);
	printf "Claims of expired keys during the removal: p50 %.2f ms, p99 %.2f ms, longest %.1f ms.\n",
		at(0.5, @waits), at(0.99, @waits), $waits[-1];

	# what is left goes alone
	my $left = ask("SELECT count(*) FROM $table WHERE expires_at <= now()");
	my $before = time;
	switch_expiry(1);
	wait_until("SELECT NOT EXISTS (SELECT FROM $table WHERE expires_at <= now())", 3600);
	printf "The last %s rows, nobody else there: %s a second.\n", commas($left),
		commas($left / ((time - $before) || 1)) if $left > 0;
	switch_expiry(0);
	my ($heap_after, $index_after) = size_of($table);
	printf "Table %.0f MB and index %.0f MB before, %.0f MB and %.0f MB after.\n",
		map { $_ / 1048576 } $heap, $index, $heap_after, $index_after;
	return;
}

#
# As many rows expire as come
#
sub steady
{
	my $table = 'idempotency.idempotency_keys';
	my $seconds = 480;
	my @sizes;

	write_file("$dir/expiry_life.sql", "\\set k random(200000000000000000, 899999999999999999)\n"
		. "BEGIN;\nSELECT token FROM idempotency.claim(:k, 'tenant-7') \\gset\n"
		. "SELECT idempotency.record(:k, 'tenant-7', :token, '{\"order\": 17, \"status\": \"paid\", \"amount\": 4200}',"
		. " 201, ttl => '10 seconds');\nCOMMIT;\n");
	psql('-c', "TRUNCATE $table");
	switch_expiry(1);
	my $pid = fork() // die "fork: $!\n";
	if ($pid == 0)
	{
		open(STDOUT, '>', "$dir/steady.log");
		open(STDERR, '>&', \*STDOUT);
		exec("$bindir/pgbench", '-n', '-M', 'prepared', '-c', 4, '-j', 1, '-T', $seconds, '-R', 500,
			'-f', "$dir/expiry_life.sql", '-h', $sockets, '-p', $port, '-U', 'bench', 'bench') or POSIX::_exit(1);
	}
	for my $t (1 .. 8)
	{
		sleep $seconds / 8 - ($t == 8 ? 2 : 0);
		push @sizes, [ size_of($table), ask("SELECT count(*) FROM $table") ];
	}
	waitpid($pid, 0);
	die "pgbench failed, see $dir/steady.log\n" if $? != 0;
	switch_expiry(0);

	report_head('500 keys a second that live for 10 s, expired every second, autovacuum_naptime 15 s',
		'after, s', map { $seconds / 8 * $_ } 1 .. 8);
	for my $row ([ 'table, kB', 0, 1024 ], [ 'index, kB', 1, 1024 ], [ 'rows', 2, 1 ])
	{
		report_line($row->[0], map { commas($_->[ $row->[1] ] / $row->[2]) } @sizes);
	}
	my $growth = ($sizes[7][0] + $sizes[7][1]) / ($sizes[3][0] + $sizes[3][1]);
	printf "\nSecond half to first: %.2f.\n", $growth;
	verdict('size under steady state, end to half-time', $growth, 1.10);
	return;
}

sub expiry
{
	my $copy = fresh_copy('expiry');

	start_server($copy, "$expiry_options -c autovacuum=off -c full_page_writes=off");
	psql('-c', "ALTER DATABASE bench SET idempotency.expiry_interval = '1s'");
	switch_expiry(0);
	ways() if wanted('ways');
	life() if wanted('life');
	stop_server();

	start_server($copy, $expiry_options);
	purge() if wanted('purge');
	stop_server();

	start_server($copy, "$expiry_options -c autovacuum_naptime=15s");
	steady() if wanted('steady');
	stop_server();
	remove_tree($copy);
	return;
}

1;
