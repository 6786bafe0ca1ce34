
# The answer of a call gets lost, and the caller dies; Stripe's events tell what
# came of it.  They are delivered over HTTP to an endpoint as an application has
# one (test/stripe/receiver.py), in whatever order, and the application's retry
# is given what Stripe made without asking Stripe.
#
# The fake counts requests and charges.  No worker helps (034_worker_settles).

use strict;
use warnings;

use FakeStripe;
use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use JSON::PP;
use PayingApplication;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StripeTest;
use Test::More;
use WebhookReceiver;

use constant SECRET => 'whsec_test_settles';

my $stripe = FakeStripe->start;
my $node = stripe_node('main', $stripe, preload => 1, conf => q{
idempotency.max_workers = 0
idempotency.stripe_max_retries = 0
idempotency.stripe_timeout = '5 min'
});
my $secrets = PostgreSQL::Test::Utils::tempdir('secrets') . '/secrets';
append_to_file($secrets, SECRET . "\n");
chmod 0600, $secrets;
sql($node, "ALTER DATABASE postgres SET idempotency.webhook_secret_file = '$secrets'");
sql($node, PAYING_APPLICATION);

my $receiver = WebhookReceiver->start($node);
my $listener = listener();

sub listener
{
	my $session = $node->background_psql('postgres');

	$session->query_safe('LISTEN idempotency_settled');
	return $session;
}

# Stripe's endpoint is this one from now on; the events of the other aren't sent any more.
my $endpoint;

sub deliver_to
{
	my ($function, @secrets) = @_;

	$stripe->control('DELETE', "webhooks/$endpoint") if defined $endpoint;
	$endpoint = $stripe->webhook_endpoint(url => $receiver->url($function), secrets => [ @secrets ? @secrets : SECRET ]);
	return;
}

# A payment on its way, whose request the fake has executed and doesn't answer
my $n = 0;

sub begin_payment
{
	my ($what, %how) = @_;
	my $client = $how{client} // 'client ' . ++$n;
	my ($operation, $key) = split /\|/, sql($node, qq{
		SELECT op, idempotency.stripe_idempotency_key('payment', op::text)
		FROM idempotency.operation_uuid('$client', 'user 1') op});
	my $session = $node->background_psql('postgres', on_error_stop => 0);
	my $payment = {
		client => $client, operation => $operation, key => $key, session => $session, card => $how{card} // 'pm_card_visa',
		pid => $session->query_safe('SELECT pg_backend_pid()'), before => seen() };

	$session->query_safe($how{set}) if defined $how{set};
	$payment->{fault} = $stripe->fault($what, match => { key => $key });
	$session->query_until(qr/begun/, "\\echo begun\n" . pay($payment) . ";\n");
	$stripe->wait_fault($payment->{fault}, holding => 1);
	return $payment;
}

sub pay
{
	my ($payment) = @_;

	return "SELECT pay('$payment->{client}', '$payment->{card}')";
}

# The caller's session is terminated.
sub terminate
{
	my ($payment) = @_;

	is(sql($node, "SELECT pg_terminate_backend($payment->{pid}, 60000)"), 't', "$payment->{client}: terminated");
	eval { $payment->{session}->quit };
	$stripe->wait_fault($payment->{fault}, gone => 1);
	return;
}

# how many requests the fake has seen, and how many deliveries it has made
sub seen
{
	return { arrivals => $stripe->counts->{arrivals}, attempts => scalar(attempts(0)) };
}

sub attempts
{
	my ($from) = @_;
	my @attempts = @{ $stripe->control('GET', 'webhooks/attempts')->{attempts} };

	return wantarray ? @attempts[ $from .. $#attempts ] : scalar(@attempts);
}

# The next deliveries, "type status" each
sub delivered
{
	my ($payment, $expected, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $from = $payment->{before}{attempts};

	$stripe->wait_for(attempts => $from + @$expected);
	my @attempts = attempts($from);
	$payment->{before}{attempts} += @attempts;
	$payment->{event}{ $_->{type} } = $_->{event} foreach @attempts;
	return is_deeply([ map { "$_->{type} $_->{status}" } @attempts ], $expected, "$payment->{client}: $name");
}

sub deliver_again
{
	my ($payment, $type, $status, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	$stripe->control('POST', 'webhooks/resend', { event => $payment->{event}{$type} });
	return delivered($payment, ["$type $status"], $name);
}

# what the ledger says: outcome, resource, the event that has settled it
sub ledger
{
	my ($payment) = @_;

	return sql($node, qq{SELECT concat_ws(' ', outcome, resource_id, settled#>>'{evidence,event_type}')
		FROM idempotency.stripe_lookup('payment', '$payment->{operation}')});
}

sub kept_events
{
	return sql($node, q{SELECT count(pending_key) FROM idempotency.stripe_webhook_events});
}

sub orphan
{
	my ($payment) = @_;

	return sql($node, qq{SELECT outcome || ' ' || fate FROM idempotency.stripe_orphans
		WHERE operation_id = '$payment->{operation}'});
}

# the payment intent that the fake has made for it
sub made_by_stripe
{
	my ($payment) = @_;
	my ($made, @more) = $stripe->effects(key => $payment->{key}, type => 'payment_intent', action => 'create');

	die "$payment->{client}: not one payment intent" if @more || !defined $made;
	return $made->{id};
}

sub told
{
	my ($payment, $expected, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my @told = map { decode_json($_) } $listener->query('SELECT 1') =~ /payload "(\{.*\})" received/g;

	return is_deeply(\@told,
		[ map { { account => '', operation_type => 'payment', operation_id => $payment->{operation}, outcome => $_->[0],
				resource_id => $_->[1] } } @$expected ],
		"$payment->{client}: $name") || diag(explain(\@told));
}

# The application tries again and is told so without a request to Stripe; the
# row, the order and stripe_call() agree, and the fake has made this many
# charges under one key.
sub retried
{
	my ($payment, $answer, $charges) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $id = made_by_stripe($payment);
	my ($outcome, $status) = $answer =~ /^201/ ? ('completed', 'succeeded') : ('failed', 'declined');

	is(sql($node, ($payment->{set} // '') . pay($payment)), $answer, "$payment->{client}: the retry is told $answer");
	is(sql($node, "SELECT status, payment FROM orders WHERE operation = '$payment->{operation}'"), "$status|$id",
		"$payment->{client}: the order has Stripe's id");
	my $r = stripe_call($node, 'payment', $payment->{operation}, 'POST', '/v1/payment_intents',
		params => { amount => 2000, currency => 'usd', confirm => JSON::PP::true, payment_method => $payment->{card} });
	is_deeply([ @$r{qw(outcome replayed resource_id idempotency_key attempts generation)} ],
		[ $outcome, JSON::PP::true, $id, $payment->{key}, 0, 1 ], "$payment->{client}: replayed");
	is($stripe->counts->{arrivals}, $payment->{before}{arrivals} + $payment->{requests}, "$payment->{client}: nothing was sent");
	is(orphan($payment), '', "$payment->{client}: no orphan");
	is($stripe->charges(key => $payment->{key}), $charges, "$payment->{client}: charges");
	is(scalar(grep { /^payment:$payment->{operation}:/ } keys %{ payments($stripe)->{ $payment->{operation} }{keys} }), 1,
		"$payment->{client}: one key");
	return $r;
}

my @all = ('payment_intent.created', 'charge.succeeded', 'payment_intent.succeeded');

#
# The endpoint is down when it happens.  Stripe sends the events again, and so
# they come when the caller is long gone.
#
foreach my $function ('claim', 'receive')
{
	deliver_to($function);
	$receiver->down('*');
	my $payment = begin_payment('hang_after');
	$payment->{requests} = 1;
	delivered($payment, [ map { "$_ 503" } @all ], "down for $function");
	terminate($payment);
	is(ledger($payment), 'unknown', "$payment->{client}: nobody knows");
	is(orphan($payment), 'unknown rolled back', "$payment->{client}: and there is no order");

	$receiver->down();
	$stripe->advance(301);
	delivered($payment, [ map { "$_ 200" } @all ], 'sent again');
	my $id = made_by_stripe($payment);
	is(ledger($payment), "completed $id payment_intent.succeeded", "$payment->{client}: the event has settled it");
	told($payment, [ [ 'completed', $id ] ], 'who listens is told');
	is(orphan($payment), 'completed rolled back', "$payment->{client}: which leaves an orphan");
	is(kept_events(), 0, "$payment->{client}: no event has to wait");

	my $settled = sql($node, "SELECT settled FROM idempotency.stripe_lookup('payment', '$payment->{operation}')");
	deliver_again($payment, $_, 200, "$_ once more") foreach @all, 'payment_intent.succeeded';
	is(sql($node, "SELECT settled FROM idempotency.stripe_lookup('payment', '$payment->{operation}')"), $settled,
		"$payment->{client}: duplicates change nothing");
	retried($payment, '201 knows', 1);
	told($payment, [], 'and tell nobody');
}

# from here on the test says when an event is sent again
$stripe->settings(retry_webhooks => JSON::PP::false);

#
# The events come while the caller waits for its answer: they are kept.
#
deliver_to('claim');
my $payment = begin_payment('hang_after');
$payment->{requests} = 1;
delivered($payment, [ map { "$_ 200" } @all ], 'early');
is(ledger($payment), 'in_progress', "$payment->{client}: somebody is at it");
cmp_ok(kept_events(), '>=', 1, "$payment->{client}: so an event is kept");
told($payment, [], 'nobody is told');
terminate($payment);
is(ledger($payment), 'unknown', "$payment->{client}: left alone");
retried($payment, '201 knows', 1);
is(ledger($payment), 'completed ' . made_by_stripe($payment) . ' payment_intent.succeeded', "$payment->{client}: by the kept event");
told($payment, [ [ 'completed', made_by_stripe($payment) ] ], 'now they are');

# ... and nobody retries: a worker of the application's that finds no event to process settles it
deliver_to('receive');
$payment = begin_payment('hang_after');
delivered($payment, [ map { "$_ 200" } @all ], 'early');
terminate($payment);
foreach (1 .. 20)
{
	last if sql($node, q{SELECT count(idempotency.stripe_webhook_record(stripe_event_id, token))
		FROM idempotency.stripe_webhook_next()}) eq '0';
}
is(ledger($payment), 'completed ' . made_by_stripe($payment) . ' payment_intent.succeeded', "$payment->{client}: settled");
told($payment, [ [ 'completed', made_by_stripe($payment) ] ], 'who listens is told');
is(orphan($payment), 'completed rolled back', "$payment->{client}: an orphan");
sql($node, "SELECT idempotency.stripe_acknowledge('payment', '$payment->{operation}', 'refunded')");
is(orphan($payment), '', "$payment->{client}: until somebody has seen to it");
is(kept_events(), 0, "$payment->{client}: no event waits any more");

#
# The row was never committed: the ledger lives and dies with the caller.
#
deliver_to('claim');
my $set = "SET idempotency.stripe_ledger = 'transaction';";
$payment = begin_payment('hang_after', set => $set);
@$payment{qw(requests set)} = (1, $set);
delivered($payment, [ map { "$_ 200" } @all ], 'before its row can be seen');
is(ledger($payment), '', "$payment->{client}: no row");
terminate($payment);
is(ledger($payment), '', "$payment->{client}: nor ever");
cmp_ok(kept_events(), '>=', 1, "$payment->{client}: but an event");
retried($payment, '201 knows', 1);
told($payment, [ [ 'completed', made_by_stripe($payment) ] ], 'who listens is told');

#
# The events come in a bad order.
#
$receiver->down('payment_intent.succeeded');
$payment = begin_payment('hang_after');
$payment->{requests} = 1;
delivered($payment, [ 'payment_intent.created 200', 'charge.succeeded 200', 'payment_intent.succeeded 503' ], 'the last is missing');
terminate($payment);
deliver_again($payment, $_, 200, $_) foreach 'charge.succeeded', 'payment_intent.created';
is(ledger($payment), 'unknown', "$payment->{client}: that it was created, and a charge, leave it open");
told($payment, [], 'nobody is told');
$receiver->down();
deliver_again($payment, 'payment_intent.succeeded', 200, 'the last');
is(ledger($payment), 'completed ' . made_by_stripe($payment) . ' payment_intent.succeeded', "$payment->{client}: settles it");
told($payment, [ [ 'completed', made_by_stripe($payment) ] ], 'who listens is told');
retried($payment, '201 knows', 1);

$receiver->down('payment_intent.created', 'charge.succeeded');
$payment = begin_payment('hang_after');
$payment->{requests} = 1;
delivered($payment, [ 'payment_intent.created 503', 'charge.succeeded 503', 'payment_intent.succeeded 200' ], 'the last alone');
terminate($payment);
$receiver->down();
deliver_again($payment, $_, 200, $_) foreach 'payment_intent.created', 'charge.succeeded';
retried($payment, '201 knows', 1);
deliver_again($payment, $_, 200, "$_ after all") foreach reverse @all;
told($payment, [ [ 'completed', made_by_stripe($payment) ] ], 'who listens is told once');

# a declined card: its failure is told, and nothing of it is a success
$receiver->down('*');
my @declined = ('payment_intent.created', 'charge.failed', 'payment_intent.payment_failed');
$payment = begin_payment('hang_after', card => 'pm_card_chargeDeclined');
$payment->{requests} = 1;
delivered($payment, [ map { "$_ 503" } @declined ], 'declined');
terminate($payment);
$receiver->down();
deliver_again($payment, $_, 200, $_) foreach 'charge.failed', 'payment_intent.created';
is(ledger($payment), 'unknown', "$payment->{client}: the charge alone leaves it open");
deliver_again($payment, $declined[2], 200, 'the last');
told($payment, [ [ 'failed', made_by_stripe($payment) ] ], 'who listens is told');
my $r = retried($payment, '402 knows', 0);
is($r->{error}{code}, 'card_declined', "$payment->{client}: with the reason");

#
# The retry is in the middle: it has asked Stripe when the event comes.
#
$receiver->down('*');
$payment = begin_payment('hang_after');
delivered($payment, [ map { "$_ 503" } @all ], 'the endpoint is down');
terminate($payment);
$receiver->down();
my $retry = begin_payment('hang_after', client => $payment->{client});
deliver_again($payment, 'payment_intent.succeeded', 200, 'while the retry waits for its answer');
is(ledger($payment), 'in_progress', "$payment->{client}: the retry is at it");
$stripe->release($retry->{fault});
like($retry->{session}->query_safe('SELECT 1'), qr/^201 fetches$/m, "$payment->{client}: and is given the answer");
$retry->{session}->quit;
is(ledger($payment), 'completed ' . made_by_stripe($payment), "$payment->{client}: by which it is settled");
$payment->{requests} = 2;
deliver_again($payment, 'payment_intent.succeeded', 200, 'once more');
is(ledger($payment), 'completed ' . made_by_stripe($payment), "$payment->{client}: the event has nothing to add");
retried($payment, '201 repeats', 1);
told($payment, [ [ 'completed', made_by_stripe($payment) ] ], 'who listens is told once');

# ... and dies as well
$receiver->down('*');
$payment = begin_payment('hang_after');
delivered($payment, [ map { "$_ 503" } @all ], 'the endpoint is down');
terminate($payment);
$receiver->down();
$retry = begin_payment('hang_after', client => $payment->{client});
deliver_again($payment, 'payment_intent.succeeded', 200, 'while the retry waits for its answer');
terminate($retry);
$payment->{requests} = 2;
retried($payment, '201 knows', 1);
told($payment, [ [ 'completed', made_by_stripe($payment) ] ], 'who listens is told');

#
# The answer is lost, the caller lives on and has committed its doubt.
#
$receiver->down('*');
$payment = { client => 'client ' . ++$n, card => 'pm_card_visa', before => seen(), requests => 1 };
@$payment{qw(operation key)} = split /\|/, sql($node, qq{
	SELECT op, idempotency.stripe_idempotency_key('payment', op::text)
	FROM idempotency.operation_uuid('$payment->{client}', 'user 1') op});
$stripe->fault('close_after', match => { key => $payment->{key} });
is(sql($node, pay($payment)), '503 checking', "$payment->{client}: the answer is lost");
delivered($payment, [ map { "$_ 503" } @all ], 'the endpoint is down');
$receiver->down();
deliver_again($payment, 'payment_intent.succeeded', 200, 'up again');
told($payment, [ [ 'completed', made_by_stripe($payment) ] ], 'who listens is told');
is(orphan($payment), '', "$payment->{client}: no orphan, there is an order");
retried($payment, '201 knows', 1);

#
# The server crashes in mid-call: nobody is left to write down that it was given up.
#
$receiver->down('*');
$payment = begin_payment('hang_after');
$payment->{requests} = 1;
delivered($payment, [ map { "$_ 503" } @all ], 'the endpoint is down');
$node->stop('immediate');
$node->start;
eval { $_->quit } foreach $payment->{session}, $listener;
$stripe->wait_fault($payment->{fault}, gone => 1);
$listener = listener();
is(sql($node, "SELECT outcome FROM idempotency.stripe_idempotency_keys WHERE operation_id = '$payment->{operation}'"), 'in_progress',
	"$payment->{client}: the row says that it is being called");
$receiver->down();
deliver_again($payment, 'payment_intent.succeeded', 200, 'up again');
is(ledger($payment), 'completed ' . made_by_stripe($payment) . ' payment_intent.succeeded', "$payment->{client}: but nobody is left");
told($payment, [ [ 'completed', made_by_stripe($payment) ] ], 'who listens is told');
is(orphan($payment), 'completed rolled back', "$payment->{client}: an orphan");
retried($payment, '201 knows', 1);

#
# What isn't signed by Stripe settles nothing.
#
deliver_to('receive', 'whsec_test_of_somebody_else');
$payment = begin_payment('hang_after');
delivered($payment, [ map { "$_ 400" } @all ], 'forged');
terminate($payment);
is(ledger($payment), 'unknown', "$payment->{client}: nothing is settled");
is(sql($node, "SELECT count(*) FROM idempotency.stripe_webhook_events WHERE idempotency_key = '$payment->{key}'"), '0',
	"$payment->{client}: and nothing kept");
told($payment, [], 'nobody is told');
is(sql($node, pay($payment)), '201 fetches', "$payment->{client}: so Stripe is asked");
is($stripe->charges(key => $payment->{key}), 1, "$payment->{client}: charged once");

$listener->quit;
$receiver->stop;
$node->stop;

done_testing();
