
# Days pass, for the server and its workers alike: every row goes when its time
# has come, not before, and what is unresolved stays however old it is.  The
# clock is moved by test/perl/MovedClock.pm.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use MovedClock;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $tempdir = PostgreSQL::Test::Utils::tempdir();
my $day = 86400;

my $clock = MovedClock->new($tempdir);
my $node = PostgreSQL::Test::Cluster->new('main');

$node->init;
$node->append_conf('postgresql.conf', "shared_preload_libraries = 'idempotency'");
$clock->around(sub { $node->start });
sql($node, 'CREATE EXTENSION idempotency');
my $beginning = sql($node, 'SELECT clock_timestamp()');

# Move the clock to so many days after the beginning, and have a worker go
# through everything.  The launcher sleeps and doesn't see it: a reload wakes it.
sub pass_to
{
	my ($days) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$clock->set($days * $day);
	$node->reload;
	return wait_until($node, qq{SELECT last_run >= timestamptz '$beginning' + interval '$days days'
			AND status = 'idle' AND next_run > clock_timestamp()
			AND next_run <= clock_timestamp() + interval '1 minute'
		FROM idempotency.workers}, "$days days: a worker has the same clock");
}

sub keys_left
{
	return sql($node, q{SELECT string_agg(key, ' ' ORDER BY key) FROM idempotency.idempotency_keys});
}

# One row of each state.
my %token = map { $_ => claim($node, $_, lease => '1 hour')->{token} } qw(done longer abandoned pointed);
claim($node, 'held', lease => '40 days');
sql($node, qq{
	SELECT idempotency.record('done', 'test', $token{done});
	SELECT idempotency.record('longer', 'test', $token{longer}, ttl => '3 days');
	SELECT idempotency.checkpoint('pointed', 'test', $token{pointed}, 'charged', '{"charge": "ch_1"}');
	SET idempotency.open_claim_at_commit = allow;
	SELECT FROM idempotency.claim('left', 'test');
});
foreach my $id (qw(completed failed unknown held free))
{
	stripe_claim($node, 'payment', $id, request => '{"amount": 1}', lease => '1 hour');
}
my $body = '{"id": "pi_1", "object": "payment_intent"}';
sql($node, qq{
	SELECT idempotency.stripe_record('payment', operation_id, token, http_status => v.status, response => v.body)
	FROM idempotency.stripe_idempotency_keys
		JOIN (VALUES ('completed', 200, '$body'::jsonb), ('failed', 402, '{"error": {"type": "card_error"}}'),
			('unknown', 500, '{"error": {"type": "api_error"}}'),
			('free', 429, '{"error": {"type": "rate_limit_error"}}')) v (id, status, body)
		ON operation_id = id});

my $stripe = q{SELECT string_agg(operation_id || '=' || outcome || (request IS NOT NULL)::int
		|| (response IS NOT NULL)::int || (error IS NOT NULL)::int, ' ' ORDER BY operation_id)
	FROM idempotency.stripe_idempotency_keys};
my $all = 'completed=completed110 failed=failed111 free=not_executed111 held=in_progress100 unknown=unknown111';
is(sql($node, $stripe), $all, 'there is one of each');

pass_to(0.9);
is(keys_left(), 'abandoned done held left longer pointed', 'nothing goes before its time');

pass_to(1.1);
is(keys_left(), 'abandoned held left longer pointed', 'a recorded key goes after a day');
is(claim($node, 'longer')->{verdict}, 'replay', 'or when its time to live has passed');
pass_to(3.1);
is(keys_left(), 'abandoned held left pointed', 'and then goes, too');

pass_to(6.9);
is(keys_left(), 'abandoned held left pointed', 'an abandoned claim stays for a week');
pass_to(7.1);
is(keys_left(), 'held pointed', 'and then goes; a live lease and a recovery point do not');

pass_to(29.9);
is(sql($node, $stripe), $all, 'calls to Stripe are all there');
pass_to(30.1);
my $stripped = $all =~ s/completed110/completed000/r =~ s/failed111/failed000/r;
is(sql($node, $stripe), $stripped, 'after a month those that are settled have no bodies');
my $answer = stripe_claim($node, 'payment', 'completed', request => '{"amount": 1}');
is("$answer->{verdict} $answer->{outcome} $answer->{resource_id}",
	'replay completed pi_1', 'and still replay what came of them');
is(stripe_claim($node, 'payment', 'completed', request => '{"amount": 2}')->{verdict},
	'mismatch', 'and tell another request apart');

pass_to(46.9);
is(keys_left(), 'held pointed', 'a long lease was one');
pass_to(47.1);
is(keys_left(), 'pointed', 'and is abandoned a week after its end');

pass_to(1000);
is(keys_left(), 'pointed', 'a recovery point waits for its successor for years');
is(sql($node, $stripe), $stripped, 'so do all calls to Stripe');
$answer = claim($node, 'pointed', lease => '1 hour');
is("$answer->{verdict} $answer->{recovery_point}", 'claimed charged', 'who takes over where it stood');

sql($node, "ALTER DATABASE postgres SET idempotency.stripe_retention = '900d'");
pass_to(1001);
is(sql($node, $stripe), 'free=not_executed111 held=in_progress100 unknown=unknown111',
	'where settled calls may go, they go, and the others do not');

# A key is absent in time, also where no worker is.
sql($node, 'ALTER DATABASE postgres SET idempotency.expiry = off');
$node->append_conf('postgresql.conf', 'idempotency.max_workers = 0');
$node->reload;
my $late = claim($node, 'late', lease => '1 hour');
sql($node, "SELECT idempotency.record('late', 'test', $late->{token})");
$clock->set(1002.1 * $day);
is(claim($node, 'late', lease => '1 hour')->{verdict}, 'claimed', 'an expired key is absent without a worker');

# The clock goes back by weeks: the next run isn't as far away.  (By more than 24
# days, PostgreSQL's own checkpointer would fail an assertion.)
sql($node, 'ALTER DATABASE postgres RESET idempotency.expiry');
$node->append_conf('postgresql.conf', 'idempotency.max_workers = 2');
$clock->set(982 * $day);
sql($node, "ALTER DATABASE postgres SET idempotency.expiry_interval = '1s'");
expired_rows($node, 5);
$node->reload;
wait_until_expired($node, 'the clock was set back, and the workers go on');

# A recorder that has nothing to do any more doesn't wait until it is that late again.
sql($node, q{SELECT idempotency.stripe_claim('clock', 'back')});
$clock->set(982 * $day - 7200);
ok(wait_for_no_recorder($node), 'nor does a recorder stay');

$node->stop;

done_testing();
