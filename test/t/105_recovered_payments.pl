
# What only somebody who repairs, or time, makes of an operation, is handled by the
# function that doc/stripe.md shows: nobody hears 500 for ever who has paid.
# And what of an object is kept as columns survives on every path.

use strict;
use warnings;

use FakeStripe;
use FindBin;
use IdempotencyTest;
use JSON::PP;
use PostgreSQL::Test::Utils;
use StripeTest;
use Test::More;

my $top = "$FindBin::RealBin/../..";
my $json = JSON::PP->new->utf8->canonical;
my $stripe = FakeStripe->start;
my $node = stripe_node('main', $stripe, preload => 1, conf => "idempotency.stripe_key_in_metadata = on\n");

# The page's own function, and those of doc/http.md that it needs
my $http = slurp_file("$top/doc/http.md");
my $page = slurp_file("$top/doc/stripe.md");
my ($helpers) = $http =~ /^```sql\n(CREATE SCHEMA api;.*?)^```$/ms or die 'doc/http.md has no schema api';
my ($pay) = $page =~ /^```sql\n(CREATE TABLE payments .*?^\$\$;\n)/ms or die 'doc/stripe.md has no api.pay';
sql($node, $helpers . $pay);

my %intents = (match => { method => 'POST', path => '/v1/payment_intents' });

sub pay
{
	my ($key, %body) = @_;
	my $body = $json->encode({ amount => 1990, payment_method => 'pm_card_visa', %body });

	return sql($node, q{SELECT concat_ws(' ', status, body ->> 'state', body ->> 'detail') FROM api.pay(}
		  . literal($key) . ", 'ada', " . literal($body) . ')');
}

sub payment
{
	my ($key) = @_;

	return sql($node, 'SELECT idempotency.operation_uuid(' . literal($key) . ", 'ada')");
}

sub stripe_key
{
	my ($key) = @_;

	return sql($node, q{SELECT idempotency.stripe_idempotency_key('payment', } . literal(payment($key)) . ')');
}

sub charges
{
	my ($key) = @_;

	return $stripe->charges(key => stripe_key($key));
}

sub settle
{
	my ($key, $arguments) = @_;

	sql($node, q{SELECT idempotency.stripe_settle('payment', } . literal(payment($key)) . ", $arguments)");
	return;
}

sub intent_of
{
	my ($key) = @_;

	return ($stripe->effects(key => stripe_key($key), type => 'payment_intent'))[0]{id};
}

sub forget_key
{
	my ($key) = @_;

	sql($node, q{UPDATE idempotency.idempotency_keys SET expires_at = clock_timestamp() - interval '1 microsecond' WHERE key = }
		  . literal($key));
	return;
}

sub lose
{
	my ($key, $what) = @_;

	$stripe->fault($what // 'close_after', %intents, times => 3);
	is(pay($key), '503 The payment is being checked.', "$key: no answer");
	$stripe->clear_faults;
	return;
}

# what is kept as columns
sub kept
{
	my ($key) = @_;

	return sql($node, q{SELECT concat_ws(' ', outcome, resource_type, resource_status, livemode, CASE WHEN response IS NULL THEN 'bare' END)
		FROM idempotency.stripe_lookup('payment', } . literal(payment($key)) . ')');
}

#
# Nobody knows yet: the key is given back, for this request and no other
#

lose('lost');
is(pay('lost', amount => 9900), '422 This Idempotency-Key was used with another request.', 'another amount is told so');
is(pay('lost', note => 'x'), '422 This Idempotency-Key was used with another request.', 'and whatever else differs, though Stripe would not see it');
is(pay('lost'), '201 succeeded', 'the same request goes on');
is(sql($node, q{SELECT attempt FROM idempotency.lookup('lost', 'ada')}), 2, 'as the second attempt');
is(charges('lost'), 1, 'charged once');
is(kept('lost'), 'completed payment_intent succeeded f', 'answered in the end: what is kept');

$stripe->fault('429', %intents, times => 0);
is(pay('busy'), '503 The payment is being checked.', 'Stripe does nothing');
$stripe->clear_faults;
is(pay('busy', amount => 9900), '422 This Idempotency-Key was used with another request.', 'the key stays that of its request');
is(pay('busy'), '201 succeeded', 'which goes on');

#
# Settled by a person
#

lose('by id');
settle('by id', q{'completed', } . literal(intent_of('by id')));
is(kept('by id'), 'completed f bare', 'settled by its id: what is kept');
$stripe->fault('close_before', match => { method => 'GET' }, times => 0);
is(pay('by id'), '503 The payment is being checked.', 'Stripe cannot be asked');
$stripe->clear_faults;
is(pay('by id'), '201 succeeded', 'and tells what the settlement did not');
is(pay('by id'), '201 succeeded', 'which is replayed');
forget_key('by id');
is(pay('by id'), '201 succeeded', 'also where the key is forgotten');
is(charges('by id'), 1, 'charged once');

lose('whole');
settle('whole', q{'completed', response => (SELECT response FROM idempotency.stripe_get('/v1/payment_intents/} . intent_of('whole') . q{'))});
is(kept('whole'), 'completed payment_intent succeeded f', 'settled with its object: what is kept');
my $before = $stripe->counts->{arrivals};
is(pay('whole'), '201 succeeded', 'is told as if it had been answered');
is($stripe->counts->{arrivals}, $before, 'and nobody is asked');

foreach my $id ('NULL', "'pi_nowhere'", "'ch_else'", "'not an id?'")
{
	lose("id $id");
	settle("id $id", "'completed', $id");
	is(pay("id $id"), '201 completed', "settled with id $id");
}

lose('failed', 'close_before');
settle('failed', q{'failed'});
is(pay('failed'), '402 The payment was refused.', 'settled as failed without an error');
lose('failed with', 'close_before');
settle('failed with', q{'failed', response => '{"error": {"type": "card_error", "code": "card_declined", "message": "No.",
	"payment_intent": {"id": "pi_1", "object": "payment_intent", "status": "requires_payment_method", "livemode": false}}}'});
is(kept('failed with'), 'failed payment_intent requires_payment_method f', 'settled as failed with an error: what is kept');
is(pay('failed with'), '402 No.', 'and with one');

lose('undone', 'close_before');
settle('undone', q{'not_executed'});
is(pay('undone'), '201 succeeded', 'settled as not executed');
is(charges('undone'), 1, 'charged once');

#
# Asked at Stripe: by the object, the list, the events
#

foreach my $step (qw(object metadata events))
{
	sql($node, 'ALTER DATABASE postgres SET idempotency.stripe_key_in_metadata = off') if $step eq 'events';
	lose($step);
	sql($node, 'UPDATE idempotency.stripe_idempotency_keys SET resource_id = ' . literal(intent_of($step)) . ' WHERE operation_id = '
		  . literal(payment($step))) if $step eq 'object';
	like(sql($node, q{SELECT outcome, evidence #>> '{asked,-1,by}' FROM idempotency.stripe_reconcile('payment', } . literal(payment($step)) . ')'),
		$step eq 'metadata' ? qr/^completed\|(search|list)$/ : qr/^completed\|$step$/, "found by $step");
	is(kept($step), 'completed payment_intent succeeded f', 'what is kept');
	is(pay($step), '201 succeeded', 'the client is told');
}
sql($node, 'ALTER DATABASE postgres RESET idempotency.stripe_key_in_metadata');

#
# Long ago, too large, an orphan, reopened
#

is(pay('old'), '201 succeeded', 'paid');
is(pay('declined', payment_method => 'pm_card_chargeDeclined'), '402 Your card was declined.', 'declined');
$node->poll_query_until('postgres', q{SELECT bool_and(callers IS NULL) FROM idempotency.stripe_idempotency_keys
	WHERE operation_id = } . literal(payment('old'))) or die 'nobody writes down how the caller has ended';
sql($node, 'SET idempotency.stripe_body_retention = 0; SELECT FROM idempotency.expire(100000)');
is(kept('old'), 'completed payment_intent succeeded f bare', 'long ago: what is kept');
is(kept('declined'), 'failed payment_intent requires_payment_method f bare', 'of a refusal, too');
forget_key($_) foreach qw(old declined);
is(pay('old'), '201 succeeded', 'the client is told');
is(pay('declined', payment_method => 'pm_card_chargeDeclined'), '402 The payment was refused.', 'of the refusal, too');
is(charges('old'), 1, 'charged once');

sql($node, q{SELECT idempotency.stripe_reopen('payment', } . literal(payment('declined')) . ')');
is(kept('declined'), 'not_executed bare', 'reopened: nothing is kept');
forget_key('declined');
is(pay('declined'), '201 succeeded', 'with another card');
is(sql($node, q{SELECT generation, history -> 0 ->> 'resource_status' FROM idempotency.stripe_lookup('payment', } . literal(payment('declined')) . ')'),
	'2|requires_payment_method', 'of the second generation');

my $call = sub { q{stripe_call('payment', } . literal(payment($_[0])) . q{, 'POST', '/v1/payment_intents',
	'{"amount": 1990, "currency": "eur", "confirm": true, "payment_method": "pm_card_visa"}')} };
sql($node, 'BEGIN; SELECT FROM idempotency.' . $call->('orphan') . '; ROLLBACK');
is(pay('orphan'), '201 succeeded', 'an orphan is adopted');
is(charges('orphan'), 1, 'charged once');
is(sql($node, 'SELECT count(*) FROM idempotency.stripe_orphans'), 0, 'and none any more');

is(sql($node, q{SELECT count(*) FROM idempotency.stripe_unknown}), 0, 'nothing is in doubt');
is(sql($node, q{SELECT count(*) FROM idempotency.open_claims}), 0, 'nothing is left open');

$node->stop;
$stripe->stop;

done_testing();
