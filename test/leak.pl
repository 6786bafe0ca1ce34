
# make leak: does memory stay what it is?  One backend makes LEAK_CLAIMS claims,
# with every verdict and error that claim() has, and LEAK_CALLS calls to the
# fake Stripe, with every outcome.  At intervals the backend's memory contexts are added up, and the
# anonymous memory of it and of the extension's own processes is looked at (what
# malloc has, libcurl's included; shared memory isn't in it).
#
# test/t/075_leak.pl is a short version.
#
# After a first part, in which caches fill, nothing may grow by more than the
# little that is given below.

use strict;
use warnings;

use FakeStripe;
use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StripeTest;
use Test::More;

my $claims = $ENV{LEAK_CLAIMS} || 100_000;
my $calls = $ENV{LEAK_CALLS} || 10_000;
my $samples = 10;
my $warm = 4;    # samples until caches are full
# kB; the recorder's heap grows once by a megabyte, for the first batch of its size
my %most = (contexts => 64, backend => 1024, process => 2048);

# AddressSanitizer keeps what is freed, so only contexts tell something there
my $pg_config = $ENV{PG_CONFIG} // 'pg_config';
my $freed_is_kept = `$pg_config --cflags` =~ /-fsanitize=\S*address/;

plan skip_all => 'no /proc/PID/smaps_rollup' unless -r '/proc/self/smaps_rollup';

my $stripe = FakeStripe->start;
my $node = stripe_node('main', $stripe, preload => 1, conf => q{
log_statement = none
log_min_messages = fatal
log_min_error_statement = panic
autovacuum = off
idempotency.expiry_interval = '1 s'
synchronous_commit = off
idempotency.stripe_max_retries = 0
idempotency.stripe_max_response = '64 kB'
});

# A request is struck where its description names the fault.
my %fault = (
	'401' => {}, '403' => {}, '409' => {}, '409_in_use' => {}, '424' => {}, '429' => {}, '429_lock_timeout' => {},
	'500' => {}, '502' => {}, close_before => {}, close_after => {}, reset_after => {},
	cut => { keep => 20 }, garbled => {}, not_json => {}, huge => { bytes => 100_000 },
	redirect => { location => 'http://127.0.0.1:1/' });
foreach my $what (sort keys %fault)
{
	(my $word = $what) =~ tr/_/-/;
	$stripe->fault($what, times => 0, match => { body => "description=$word." }, %{ $fault{$what} });
}

my $sample = q{
SELECT 'sample contexts ' || sum(total_bytes)::bigint / 1024 FROM pg_backend_memory_contexts;
SELECT 'sample ' || CASE pid WHEN pg_backend_pid() THEN 'backend' ELSE replace(backend_type, ' ', '-') END || ' ' ||
	substring(pg_read_file('/proc/' || pid || '/smaps_rollup') FROM 'Anonymous: +([0-9]+) kB')
FROM pg_stat_activity WHERE pid = pg_backend_pid() OR backend_type LIKE 'idempotency%' ORDER BY pid;
};

# ten claims
sub claims
{
	my ($n) = @_;
	my $large = 'x' x 10000;

	return qq{
SELECT r FROM idempotency.claim('a$n', 's', '{"amount": $n, "items": [1, 2.50, "x"]}') c, idempotency.record('a$n', 's', c.token, '{"ok": true}') r;
SELECT * FROM idempotency.claim('a$n', 's', '{"items": [1, 2.5, "x"], "amount": $n}');
SELECT * FROM idempotency.claim('a$n', 's', '{"amount": -1}');
SELECT idempotency.release('b$n', 's', c.token) FROM idempotency.claim('b$n', 's', '{}') c;
SELECT * FROM idempotency.claim('c$n', 's', '[$n]', lease => '1 hour');
SELECT * FROM idempotency.claim('c$n', 's', '[$n]', lease => '1 hour', wait => false);
SELECT * FROM idempotency.claim(E'd\\t$n', 's');
BEGIN; SAVEPOINT s; SELECT * FROM idempotency.claim('e$n', 's'); ROLLBACK TO s; COMMIT;
SELECT * FROM idempotency.claim('f$n', 's');
SELECT r FROM idempotency.claim('g$n', 's', '{"large": "$large"}') c, idempotency.record('g$n', 's', c.token,
	response_headers => '{"Content-Type": "text/plain"}', response_body => '$large') r;
};
}

sub call
{
	my ($id, $params, $function) = @_;
	$function //= "stripe_call('leak', '$id', 'POST', '/v1/payment_intents', '$params')";
	return "SELECT * FROM idempotency.$function;\n";
}

my @kinds = sort keys %fault;
my $payment = '"amount": 1000, "currency": "eur", "confirm": true, "payment_method"';

# calls, as many as make a round
sub calls
{
	my ($n) = @_;
	my $sql = '';

	foreach my $kind (@kinds)
	{
		(my $word = $kind) =~ tr/_/-/;
		$sql .= call("$n $kind", qq({$payment: "pm_card_visa", "description": "$word."}));
	}
	$sql .= call("$n good", qq({$payment: "pm_card_visa"}));
	$sql .= call("$n good", qq({$payment: "pm_card_visa"}));
	$sql .= call("$n good", qq({$payment: "pm_card_mastercard"}));
	$sql .= call("$n declined", qq({$payment: "pm_card_chargeDeclined"}));
	$sql .= call("$n refused", '{"currency": "eur"}');
	$sql .= call("$n bad", '{"a[b]": 1}');
	$sql .= 'BEGIN; SAVEPOINT s; ' . call("$n rolled back", qq({$payment: "pm_card_visa"})) . "ROLLBACK TO s; ROLLBACK;\n";
	$sql .= call("$n close_after", '', "stripe_retry('leak', '$n close_after')");
	$sql .= call('', '', qq{stripe_get('/v1/payment_intents', '{"limit": 1}')});
	return $sql;
}
my $a_round = @kinds + 9;

# Feed one psql, and collect what its samples say: name => [values].
sub run
{
	my ($rounds, $make) = @_;
	my $output = "$PostgreSQL::Test::Utils::tmp_check/leak.out";
	my $script = "$PostgreSQL::Test::Utils::tmp_check/leak.sql";
	my %values;
	my %count;

	open(my $fh, '>', $script) or die "$script: $!";
	for my $part (1 .. $samples)
	{
		print $fh $make->("$part.$_") foreach 1 .. $rounds / $samples;
		print $fh "SELECT count(*) FROM idempotency.open_claims;\nSELECT count(*) FROM idempotency.stripe_unknown;\nSELECT count(*) FROM idempotency.stripe_orphans;\n", $sample;
	}
	close $fh;
	system("psql -X -q -A -t -d '" . $node->connstr('postgres') . "' -f '$script' >'$output' 2>&1") == 0
	  or die 'psql failed';

	open($fh, '<', $output) or die "$output: $!";
	while (my $line = <$fh>)
	{
		push @{ $values{$1} }, $2 if $line =~ /^sample (\S+) (\d+)$/;
		$count{$1}++ if $line =~ /^\(?(claimed|replay|mismatch|in_progress|completed|failed|not_executed|unknown)\|/;
		$count{$1}++ if $line =~ /ERROR:  ((?:[a-zA-Z]+ ){3,})/;
	}
	close $fh;
	unlink $script, $output;
	return (\%values, \%count);
}

sub verdict
{
	my ($what, $values) = @_;

	foreach my $name (sort keys %$values)
	{
		my @kb = @{ $values->{$name} };
		my $most = $most{$name} // $most{process};

		# a worker comes and goes: it is looked at where it was there all the time
		next if @kb < $samples;
		diag(sprintf('%s, %-24s kB: %s', $what, $name, join(' ', @kb)));
		next if $freed_is_kept && $name ne 'contexts';
		cmp_ok($kb[-1] - $kb[$warm - 1], '<=', $most, "$what: $name has not grown");
	}
	ok($values->{$_} && @{ $values->{$_} } == $samples, "$what: $_ was looked at") foreach qw(contexts backend);
	return;
}

my ($values, $count) = run($claims / 10, \&claims);
diag("$claims claims: " . join(', ', map { "$_ $count->{$_}" } sort keys %$count));
verdict("$claims claims", $values);
foreach my $verdict (qw(claimed replay mismatch in_progress))
{
	cmp_ok($count->{$verdict} // 0, '>=', $claims / 10, "claims: $verdict");
}

($values, $count) = run($calls / $a_round, \&calls);
diag("$calls calls: " . join(', ', map { "$_ $count->{$_}" } sort keys %$count));
verdict("$calls calls", $values);
foreach my $outcome (qw(completed failed not_executed unknown mismatch))
{
	cmp_ok($count->{$outcome} // 0, '>', $samples, "calls: $outcome");
}

done_testing();
