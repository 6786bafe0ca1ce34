
# Stripe knows a key for a day.  The clocks of the server and of the fake Stripe are
# moved over it: inside, the same key is sent again; past it nothing is, although
# Stripe has forgotten what it did and would do it again.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use FakeStripe;
use IdempotencyTest;
use MovedClock;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StripeTest;
use Test::More;

plan skip_all => 'python3 is not installed' if system('python3 -c 1 >/dev/null 2>&1') != 0;
needs_debug_points();

use constant { HOUR => 3600, MINUTE => 60 };

my $clock = MovedClock->new(PostgreSQL::Test::Utils::tempdir());
my $stripe = FakeStripe->start;
my $node = stripe_node('main', $stripe, debug => 1, conf => "idempotency.stripe_max_retries = 0\n");
$clock->around(sub { $node->restart });

# Both clocks, so many seconds after the beginning; a call takes a moment by both.
my $now = 0;
sub pass_to
{
	my ($seconds) = @_;

	$stripe->advance($seconds - $now);
	$clock->set($seconds);
	$now = $seconds;
	return;
}

sub pay
{
	my ($id) = @_;

	return stripe_call($node, 'payment', $id, 'POST', '/v1/payment_intents',
		params => { amount => 500, currency => 'eur', confirm => JSON::PP::true, payment_method => 'pm_card_visa',
			metadata => { id => $id } });
}

sub sent
{
	my ($id) = @_;

	return scalar $stripe->arrivals(key => stripe_row($node, "idempotency.stripe_lookup('payment', '$id')")->{idempotency_key});
}

# all are charged, and no answer comes
my @before = ('soon', 'next day', 'after a restart');
my @after = ('a minute late', 'forgotten', 'a month late');
my %key;
foreach my $id (@before, 'between attempts', 'before the send', @after)
{
	$stripe->fault('close_after');
	my $r = pay($id);
	is($r->{outcome}, 'unknown', "$id: the answer is lost");
	$key{$id} = $r->{idempotency_key};
}
is($stripe->charges, 8, 'all are charged');

sub is_sent_again
{
	my ($id) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $r = pay($id);

	is("$r->{outcome} $r->{idempotency_key}", "completed $key{$id}", "$id: completed, with the same key");
	is(sent($id), 2, "$id: sent again");
	is($stripe->charges(metadata => { id => $id }), 1, "$id: one charge");
	return;
}

sub is_not_sent
{
	my ($id) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $arrivals = $stripe->counts->{arrivals};

	foreach my $r (pay($id), stripe_retry($node, 'payment', $id))
	{
		is("$r->{outcome} $r->{attempts} $r->{idempotency_key}", "unknown 0 $key{$id}", "$id: unknown, and nothing is tried");
	}
	is(stripe_claim($node, 'payment', $id)->{verdict}, 'unknown', "$id: nor is an application told to");
	run_fails($node, "SELECT idempotency.stripe_reopen('payment', '$id')", 'IK002', "$id: it isn't reopened by accident");
	is($stripe->counts->{arrivals}, $arrivals, "$id: nothing arrives");
	is($stripe->charges(metadata => { id => $id }), 1, "$id: one charge");
	like(sql($node, "SELECT next_step FROM idempotency.stripe_unknown WHERE operation_id = '$id'"),
		qr/stripe_reconcile/, "$id: what to do");
	return;
}

pass_to(12 * HOUR);
is_sent_again('soon');
pass_to(23 * HOUR - 2 * MINUTE);
is_sent_again('next day');
$clock->around(sub { $node->restart });
is_sent_again('after a restart');

# one session is held up between two attempts, another before its first byte
pass_to(23 * HOUR - MINUTE);
my @held = (['between attempts', 'between-attempts', 1], ['before the send', 'before-send', 0]);
my %session;
foreach (@held)
{
	my ($id, $point, $attempts) = @$_;

	$stripe->fault('503', match => { key => $key{$id} });
	arm($node, $point, 'wait');
	$session{$id} = $node->background_psql('postgres');
	$session{$id}->query_until(qr/begun/, "SET idempotency.stripe_max_retries = 1;\n\\echo begun\n"
		  . "SELECT outcome, attempts FROM idempotency.stripe_retry('payment', '$id');\n");
	wait_for_point($node, $point);
	is(sent($id), 1 + $attempts, "$id: claimed in time");
}

# the margin of an hour has begun
pass_to(23 * HOUR + MINUTE);
is_not_sent('a minute late');
pass_to(24 * HOUR + MINUTE);
is_not_sent('forgotten');
# Stripe would indeed charge again: it has forgotten the key
is_deeply($stripe->control('GET', 'idempotency', { key => $key{forgotten} })->{keys}, [], 'Stripe has forgotten the key');
# what was claimed in time is too late now
foreach (@held)
{
	my ($id, $point, $attempts) = @$_;

	disarm($node, $point);
	is($session{$id}->query('SELECT 1') =~ s/\n?1\z//r, "unknown|$attempts", "$id: unknown");
	$session{$id}->quit;
	is(sent($id), 1 + $attempts, "$id: nothing more is sent");
	is($stripe->charges(metadata => { id => $id }), 1, "$id: one charge");
}
$stripe->clear_faults;

# which is found out by reading
is(sql($node, q{SELECT outcome || ' ' || (resource_id IS NOT NULL) FROM idempotency.stripe_reconcile('payment', 'forgotten')}),
	'completed true', 'forgotten: found at Stripe');
is(pay('forgotten')->{outcome}, 'completed', 'and replayed');

pass_to(31 * 24 * HOUR);
is_not_sent('a month late');
is($stripe->charges, 8, 'eight charges for eight payments');

# The recorder tries again in a moment what met a lock, also if the clock is set
# back by three weeks in that moment.  (By more, PostgreSQL's own checkpointer
# would fail an assertion.)
my $hang = $stripe->fault('hang_after');
my $caller = $node->background_psql('postgres');
my $holder = $node->background_psql('postgres');
$caller->query_until(qr/paying/, <<'END');
\echo paying
SET idempotency.stripe_record_timeout = '1min';
SELECT outcome FROM idempotency.stripe_call('payment', 'set back', 'POST', '/v1/payment_intents',
	'{"amount": 500, "currency": "eur", "confirm": true, "payment_method": "pm_card_visa"}');
END
$stripe->wait_fault($hang, holding => 1);
$holder->query_safe(q{BEGIN; SELECT FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'set back' FOR UPDATE});
$stripe->release($hang);
wait_until($node, q{SELECT count(*) = 1 FROM pg_locks l JOIN pg_stat_activity a USING (pid)
	WHERE NOT l.granted AND a.backend_type = 'idempotency recorder'}, 'the answer meets a lock');
wait_until($node, q{SELECT wait_event_type = 'Extension' FROM pg_stat_activity
	WHERE backend_type = 'idempotency recorder'}, 'and is to be recorded a moment later');
$clock->set($now - 21 * 24 * HOUR);
$holder->query_safe('ROLLBACK');
is($caller->query('SELECT 1') =~ s/\n?1\z//r, 'completed', 'the clock is set back: recorded all the same');
is(operation($node, 'payment', 'set back')->{outcome}, 'completed', 'by the recorder');
$_->quit foreach $caller, $holder;

$node->stop;
$stripe->stop;

done_testing();
