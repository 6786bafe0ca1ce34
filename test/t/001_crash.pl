
# The server dies between any two steps of a key's life.  What was committed is
# there afterwards, what wasn't has never been, and tokens don't come twice.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

# The WAL writer sleeps, so that what isn't flushed on purpose is lost.
my $node = new_node('main', conf => q{
restart_after_crash = on
wal_level = replica
wal_writer_delay = 10s
});
sql($node, 'CREATE TABLE orders (id text)');

my %tokens;

# Keep a token, which nobody may get a second time.
sub fresh
{
	my ($token) = @_;

	$tokens{$token}++;
	return $token;
}

sub claimed
{
	my ($key, %values) = @_;
	my $answer = claim($node, $key, %values);

	die "$key is $answer->{verdict}" unless $answer->{verdict} eq 'claimed';
	return fresh($answer->{token});
}

# A statement of the holder of a token.
sub step
{
	my ($function, $key, $token, %values) = @_;

	return call_text($function, %values, key => $key, scope => 'test', token => $token) . ';';
}

# The claim is a key's next one: which attempt is it?
sub attempt
{
	my ($key, %values) = @_;
	my $answer = claim($node, $key, lease => '1 hour', %values);

	fresh($answer->{token}) if defined $answer->{token};
	return join(' ', grep { defined } @$answer{qw(verdict attempt recovery_point)});
}

sub stop_immediately
{
	$node->stop('immediate');
	$node->start;
	return;
}

# A backend is killed, and with it go all others and the shared memory.
sub kill_backend
{
	my ($pid) = @_;
	my $offset = -s $node->logfile;

	kill('KILL', $pid) == 1 or die "could not kill backend $pid: $!";
	$node->wait_for_log(qr/all server processes terminated; reinitializing/, $offset);
	wait_until_up($node);
	return;
}

my %result = (
	response => '{"n": 1.50, "s": "a\\\\b", "u": "\\u00e9"}',
	response_status => 201,
	response_headers => '{"content-type": "application/octet-stream"}',
	response_body => '\\x00ff27225c0d0a00');

foreach my $way ('stop', 'kill')
{
	my %token;
	my %replay;
	my $answer;

	# What is committed.
	foreach my $step (qw(claimed pointed extended recorded failed released
		taken renewed record checkpoint extend release takeover
		prepared-record))
	{
		$token{$step} = claimed("$way $step", lease => '1 minute', ttl => '1 day',
			request => '{"amount": 1.0}');
	}
	sql($node, join("\n",
		step('checkpoint', "$way pointed", $token{pointed},
			recovery_point => 'charged', recovery_data => '{"charge": "ch_1"}'),
		step('extend', "$way extended", $token{extended}, lease => '1 hour'),
		step('record', "$way recorded", $token{recorded}, %result),
		step('record', "$way failed", $token{failed}, response_status => 422),
		step('release', "$way released", $token{released})));
	foreach my $step (qw(taken takeover))
	{
		lapse_lease($node, "$way $step");
	}
	$token{successor} = claimed("$way taken", lease => '1 hour');
	sql($node, step('record', "$way renewed", $token{renewed}, %result));
	sql($node, qq{UPDATE idempotency.idempotency_keys SET expires_at = clock_timestamp()
		WHERE key = '$way renewed'});
	$token{renewed} = claimed("$way renewed", lease => '1 hour');
	sql($node, qq{
		BEGIN;
		INSERT INTO orders VALUES ('$way committed');
		SELECT idempotency.record('$way committed', 'test', c.token, '{"order": 1}')
		FROM idempotency.claim('$way committed', 'test') c;
		COMMIT});
	foreach my $step (qw(recorded failed committed))
	{
		$replay{$step} = claim_text($node, "$way $step");
		like($replay{$step}, qr/^\(replay,,1,/, "$way: $step is replayed before the crash");
	}

	# What is prepared.
	sql($node, qq{
		BEGIN;
		SELECT FROM idempotency.claim('$way prepared-claim', 'test', lease => '1 hour');
		PREPARE TRANSACTION '$way claim';
		BEGIN;
		INSERT INTO orders VALUES ('$way prepared');
		SELECT idempotency.record('$way prepared-new', 'test', c.token, '{"order": 2}')
		FROM idempotency.claim('$way prepared-new', 'test') c;
		PREPARE TRANSACTION '$way new';
		BEGIN;
		} . step('record', "$way prepared-record", $token{'prepared-record'}, %result) . qq{
		PREPARE TRANSACTION '$way record'});

	# What is known of Stripe operations.
	$answer = stripe_claim($node, 'payment', "$way claimed", request => '{"amount": 1000}');
	is($answer->{verdict}, 'claimed', "$way: a Stripe operation is claimed");
	my $stripe_key = $answer->{idempotency_key};
	$token{stripe} = fresh($answer->{token});
	$answer = stripe_claim($node, 'payment', "$way recorded");
	sql($node, "SELECT idempotency.stripe_record('payment', '$way recorded', $answer->{token}, 'pi_1')");
	$answer = stripe_claim($node, 'payment', "$way failed");
	sql($node, qq{SELECT idempotency.stripe_record('payment', '$way failed', $answer->{token},
		response => '{"error": {"type": "card_error"}}', http_status => 402)});
	my $second_key = sql($node, "SELECT idempotency.stripe_reopen('payment', '$way failed')");
	my $derived = sql($node, qq{
		SELECT idempotency.operation_uuid('$way', 'test'),
			idempotency.stripe_idempotency_key('payment', '$way not there yet')});

	# What isn't committed, all in one transaction.
	my $session = $node->background_psql('postgres', on_error_stop => 0);
	my $pid = $session->query_safe('SELECT pg_backend_pid()');
	$session->query_safe(join("\n",
		'BEGIN;',
		"INSERT INTO orders VALUES ('$way uncommitted');",
		step('record', "$way record", $token{record}, %result),
		step('checkpoint', "$way checkpoint", $token{checkpoint}, recovery_point => 'lost'),
		step('extend', "$way extend", $token{extend}, lease => '1 year'),
		step('release', "$way release", $token{release}),
		"SELECT idempotency.stripe_record('payment', '$way claimed', $token{stripe}, 'pi_lost');",
		'SET LOCAL idempotency.stripe_ledger = transaction;'));
	$token{lost} = fresh($session->query_safe(
		"SELECT token FROM idempotency.claim('$way lost', 'test', lease => '1 hour')"));
	fresh($session->query_safe(
		"SELECT token FROM idempotency.claim('$way takeover', 'test', lease => '1 hour')"));
	fresh($session->query_safe("SELECT token FROM idempotency.claim('$way alone', 'test')"));
	my $lost_key = $session->query_safe(
		"SELECT idempotency_key FROM idempotency.stripe_claim('payment', '$way lost')");

	$way eq 'stop' ? stop_immediately() : kill_backend($pid);
	$session->quit;

	is(attempt("$way claimed"), 'in_progress', "$way: a committed claim is held");
	is(attempt("$way extended"), 'in_progress', "$way: an extended one too");
	lapse_lease($node, "$way claimed");
	is(attempt("$way claimed", request => '{"amount": 2}'),
		'mismatch', "$way: the request is still known");
	is(attempt("$way claimed"), 'claimed 2', "$way: it is taken over once it has lapsed");
	run_fails($node, step('record', "$way claimed", $token{claimed}),
		'IK001', "$way: then the one before is fenced off");
	lapse_lease($node, "$way pointed");
	is(attempt("$way pointed"), 'claimed 2 charged', "$way: the successor has the recovery point");
	is(sql($node, "SELECT recovery_data FROM idempotency.lookup('$way pointed', 'test')"),
		'{"charge": "ch_1"}', "$way: with its data");
	foreach my $step (qw(recorded failed committed))
	{
		is(claim_text($node, "$way $step"), $replay{$step}, "$way: $step is replayed, byte for byte");
	}
	is(attempt("$way released"), 'claimed 1', "$way: a released key is absent");
	is(attempt("$way taken"), 'in_progress', "$way: a key taken over is held");
	run_fails($node, step('record', "$way taken", $token{taken}),
		'IK001', "$way: by its successor alone");
	sql($node, step('record', "$way taken", $token{successor}));
	is(attempt("$way taken"), 'replay 2', "$way: which records");
	is(attempt("$way renewed"), 'in_progress', "$way: a key claimed anew after its result expired is held");

	# as if the transaction had never been
	is(attempt("$way alone"), 'claimed 1', "$way: an uncommitted claim is gone");
	is(attempt("$way lost"), 'claimed 1', "$way: an uncommitted claim with a lease too");
	run_fails($node, step('record', "$way lost", $token{lost}),
		'IK001', "$way: and its token is worth nothing");
	is(attempt("$way record"), 'in_progress', "$way: an uncommitted result leaves the key claimed");
	sql($node, step('record', "$way record", $token{record}, response => '{"second": true}'));
	like(claim_text($node, "$way record"), qr/^\(replay,,1,.*second/,
		"$way: and another can be recorded");
	lapse_lease($node, "$way checkpoint");
	is(attempt("$way checkpoint"), 'claimed 2', "$way: an uncommitted recovery point is gone");
	is(sql($node, qq{SELECT lease_expires_at < now() + interval '1 day'
		FROM idempotency.lookup('$way extend', 'test')}),
		't', "$way: an uncommitted extension too");
	is(attempt("$way release"), 'in_progress', "$way: an uncommitted release leaves the key claimed");
	sql($node, step('record', "$way takeover", $token{takeover}));
	is(attempt("$way takeover"), 'replay 1',
		"$way: after an uncommitted takeover the first claimant records");
	is(sql($node, "SELECT string_agg(id, ',' ORDER BY id) FROM orders WHERE id LIKE '$way%'"),
		"$way committed", "$way: business rows went the way of their keys");

	# prepared transactions
	foreach my $step (qw(prepared-claim prepared-new))
	{
		is(attempt("$way $step", wait => 'false'), 'in_progress', "$way: $step still holds its key");
		is( sql($node, qq{SET idempotency.wait_timeout = '10ms';
			SELECT verdict FROM idempotency.claim('$way $step', 'test')}),
			'in_progress', "$way: $step can be waited for");
	}
	is(attempt("$way prepared-record"), 'in_progress', "$way: a prepared result isn't told");
	$session = $node->background_psql('postgres');
	$pid = $session->query_safe('SELECT pg_backend_pid()');
	$session->query_until(qr/waiting/, qq{\\echo waiting
		SELECT 'told', verdict, response FROM idempotency.claim('$way prepared-new', 'test');\n});
	wait_for_lock($node, $pid);
	sql($node, qq{
		COMMIT PREPARED '$way new';
		COMMIT PREPARED '$way record';
		ROLLBACK PREPARED '$way claim'});
	like($session->query_until(qr/told.*\n/, ''), qr/told\|replay\|\{"order": 2\}/,
		"$way: who waits for a prepared transaction is told its result");
	$session->quit;
	is(attempt("$way prepared-record"), 'replay 1', "$way: a result is told once it is committed");
	is(attempt("$way prepared-claim"), 'claimed 1', "$way: a claim rolled back is gone");

	# what goes to Stripe
	is(sql($node, qq{SELECT outcome, attempt, request
		FROM idempotency.stripe_lookup('payment', '$way claimed')}),
		'in_progress|1|{"amount": 1000}', "$way: a claimed Stripe operation is known");
	is(sql($node, qq{SELECT generation, outcome
		FROM idempotency.stripe_lookup('payment', '$way failed')}),
		'2|not_executed', "$way: a reopened one too");
	is(sql($node, "SELECT idempotency.stripe_idempotency_key('payment', '$way failed')"),
		$second_key, "$way: with its key");
	is(sql($node, qq{
		SELECT idempotency.operation_uuid('$way', 'test'),
			idempotency.stripe_idempotency_key('payment', '$way not there yet')}),
		$derived, "$way: derived values are the same");
	$answer = stripe_claim($node, 'payment', "$way recorded");
	is("$answer->{verdict} $answer->{resource_id}", 'replay pi_1', "$way: a recorded call is replayed");
	is(stripe_claim($node, 'payment', "$way claimed")->{verdict},
		'in_progress', "$way: an unrecorded one is held");
	lapse_stripe_lease($node, 'payment', "$way claimed");
	$answer = stripe_claim($node, 'payment', "$way claimed");
	fresh($answer->{token});
	is("$answer->{verdict} $answer->{attempt} $answer->{generation}",
		'claimed 2 1', "$way: and taken over");
	is($answer->{idempotency_key}, $stripe_key, "$way: with the key that Stripe may know");
	is(sql($node, qq{
		SELECT idempotency.stripe_record('payment', '$way claimed', $token{stripe}, 'pi_2')}),
		'completed', "$way: a late answer under the same key counts");
	$answer = stripe_claim($node, 'payment', "$way lost");
	fresh($answer->{token});
	is("$answer->{verdict} $answer->{attempt}", 'claimed 1',
		"$way: an uncommitted claim of the transaction's ledger is gone");
	is($answer->{idempotency_key}, $lost_key, "$way: and made again with the same key");
}

# What an application acts on outside the database is on disk when it is told,
# whatever synchronous_commit says.
sql($node, 'ALTER DATABASE postgres SET synchronous_commit = off');

my $told = stripe_claim($node, 'payment', 'async', request => '{"amount": 1000}');
fresh($told->{token});
stop_immediately();
is(sql($node, q{
	SELECT outcome, idempotency_key, request
	FROM idempotency.stripe_lookup('payment', 'async')}),
	qq(in_progress|$told->{idempotency_key}|{"amount": 1000}),
	'an answered stripe_claim survives with synchronous_commit = off');

sql($node, qq{
	SET synchronous_commit = on;
	SELECT idempotency.stripe_record('payment', 'async', $told->{token},
		response => '{"error": {"type": "card_error"}}', http_status => 402)});
my $reopened = sql($node, "SELECT idempotency.stripe_reopen('payment', 'async')");
isnt($reopened, $told->{idempotency_key}, 'a reopened operation has another key');
stop_immediately();
is(sql($node, q{
	SELECT generation, idempotency_key FROM idempotency.stripe_lookup('payment', 'async')}),
	"2|$reopened", 'an answered stripe_reopen survives with synchronous_commit = off');

cmp_ok(scalar(keys %tokens), '>', 40, 'tokens were handed out');
is(scalar(grep { $_ > 1 } values %tokens), 0, 'none of them twice');

$node->stop;

done_testing();
