
# stripe_reconcile(): what came of a call is found out at Stripe, or stays
# unknown; and however it went, nothing is charged a second time.

use strict;
use warnings;

use FakeStripe;
use FindBin;
use HTTP::Tiny;
use IdempotencyTest;
use JSON::PP;
use PostgreSQL::Test::Utils;
use StripeTest;
use Test::More;

my $stripe = FakeStripe->start;
my $node = stripe_node('main', $stripe, preload => 1, conf => qq{
idempotency.stripe_max_retries = 0
idempotency.stripe_timeout = '10 s'
idempotency.stripe_key_in_metadata = on
idempotency.expiry = off
lock_timeout = '10 s'
log_statement = none
});
my $json = JSON::PP->new->utf8->canonical->allow_nonref;
my ($true, $false) = (JSON::PP::true, JSON::PP::false);
my %payment = (amount => 2000, currency => 'usd', confirm => $true, payment_method => 'pm_card_visa');
my $ago = 25 * 3600;

# what is called happens a day and more before it is asked about
$stripe->control('POST', 'clock', { set => time - $ago });

sub has
{
	my ($got, $expected, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return is_deeply({ map { $_ => $got->{$_} } keys %$expected }, $expected, $name) || diag(explain($got));
}

sub arrivals(&)
{
	my ($code) = @_;
	my $before = $stripe->counts->{arrivals};

	$code->();
	return $stripe->counts->{arrivals} - $before;
}

sub gets
{
	my ($since) = @_;

	return map { $_->{target} =~ s/\?.*//r } grep { $_->{arrival} > $since } $stripe->arrivals(method => 'GET');
}

sub last_arrival
{
	my @arrivals = $stripe->arrivals;

	return @arrivals ? $arrivals[-1]{arrival} : 0;
}

# call it, and let the answer get lost as it says; then time passes
sub lose
{
	my ($type, $id, %values) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my ($what, %fault) = @{ delete $values{fault} // ['close_after'] };
	my $method = delete $values{method} // 'POST';
	my $path = delete $values{path} // '/v1/payment_intents';

	$values{params} //= \%payment if $path eq '/v1/payment_intents';
	$stripe->fault($what, match => { method => $method }, %fault);
	my $got = stripe_call($node, $type, $id, $method, $path, %values);
	$stripe->clear_faults;
	is($got->{outcome}, 'unknown', "$id: unknown");
	age($type, $id);
	return $got->{idempotency_key};
}

sub age
{
	my ($type, $id) = @_;

	sql($node, qq{UPDATE idempotency.stripe_idempotency_keys SET created_at = created_at - interval '$ago s',
		claimed_at = claimed_at - interval '$ago s', first_sent_at = first_sent_at - interval '$ago s',
		recorded_at = recorded_at - interval '$ago s'
		WHERE operation_type = '$type' AND operation_id = '$id'});
	return;
}

# rows as hashes
sub reconcile
{
	my ($arguments, %values) = @_;

	return @{
		$json->decode(
			sql($node,
				settings(%{ $values{settings} // {} }) . ($values{before} // '')
				  . "SELECT COALESCE(json_agg(r), '[]') FROM idempotency.stripe_reconcile($arguments) r")) };
}

sub reconcile_one
{
	my ($type, $id, %values) = @_;
	my $more = join('', map { ", $_ => " . literal($values{$_}) } grep { $_ ne 'settings' } sort keys %values);
	my @rows = reconcile(literal($type) . ', ' . literal($id) . $more, settings => $values{settings});

	is(scalar(@rows), 1, "$id: a row");
	return $rows[0];
}

sub step
{
	my ($row, $by) = @_;
	my ($step) = grep { $_->{by} eq $by } @{ $row->{evidence}{asked} };

	return $step;
}

# the only question that matters
sub charged
{
	my ($type, $id, $expected, %values) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $row = operation($node, $type, $id, %values);

	if ($row->{outcome} eq 'completed' || $row->{outcome} eq 'failed')
	{
		is(arrivals {
			my $again = stripe_call($node, $type, $id, $row->{request}{method}, $row->{request}{path},
				params => $row->{request}{params}, %values);
			has($again, { outcome => $row->{outcome}, replayed => $true, resource_id => $row->{resource_id} }, "$id: replayed");
		}, 0, "$id: and not sent again");
	}
	else
	{
		is(arrivals {
			stripe_call($node, $type, $id, $row->{request}{method}, $row->{request}{path},
				params => $row->{request}{params}, %values);
		}, 0, "$id: not sent again");
	}
	return is($stripe->charges(key => $row->{idempotency_key}), $expected, "$id: charged $expected times");
}

sub next_step
{
	my ($id) = @_;

	return sql($node, "SELECT next_step FROM idempotency.stripe_unknown WHERE operation_id = '$id'");
}

#
# Found
#

is(scalar(reconcile('')), 0, 'nothing to be asked');

my $listener = $node->background_psql('postgres', on_error_stop => 0);
$listener->query_safe('LISTEN idempotency_settled');
my $key = lose('payment', 'searched');
is(stripe_retry($node, 'payment', 'searched')->{outcome}, 'unknown', 'sending again is over');
is(next_step('searched'), q{SELECT * FROM idempotency.stripe_reconcile('payment', 'searched', account => '');}, 'what to do is to ask');
my $since = last_arrival();
my ($row) = reconcile('');
has($row, { account => '', operation_type => 'payment', operation_id => 'searched', outcome => 'completed' }, 'found by search');
is_deeply([ gets($since) ], ['/v1/payment_intents/search'], 'with one request');
is(($stripe->effects(key => $key, type => 'payment_intent'))[0]{id}, $row->{resource_id}, 'it is what was made');
has($row->{evidence}, { found_by => 'metadata', requests => 1, livemode => $false, next => undef }, 'evidence');
has(step($row, 'search'), { path => '/v1/payment_intents/search', http_status => 200, seen => 1, requests => 1,
		found => { id => $row->{resource_id}, type => 'payment_intent', status => 'succeeded' } }, 'of what was asked');
my $operation = operation($node, 'payment', 'searched');
has($operation, { outcome => 'completed', resource_id => $row->{resource_id}, resource_type => 'payment_intent',
		livemode => $false, http_status => undef, error => undef }, 'recorded');
is($operation->{response}{status}, 'succeeded', 'with the object');
has($operation->{settled}, { by => 'stripe_reconcile', was => 'unknown', evidence => $row->{evidence} }, 'and the evidence');
unlike($json->encode($row->{evidence}), qr/\b2000\b|pm_card|client_secret|\Q${\TEST_KEY}\E/, 'which has nothing of a body, and no secret');
my ($told) = $listener->query('SELECT 1') =~ /payload "(\{.*\})" received/;
has($json->decode($told), { operation_id => 'searched', outcome => 'completed', resource_id => $row->{resource_id} }, 'who waits is told');
$listener->quit;
charged('payment', 'searched', 1);
is(scalar(reconcile('')), 0, 'it is not asked about any more');
has(reconcile_one('payment', 'searched'), { outcome => 'completed', evidence => $row->{evidence} }, 'unless by name: what is known is told');

# search lags, as it may
$stripe->settings(search_lag => 10 * 86400);
lose('payment', 'listed');
$since = last_arrival();
$row = reconcile_one('payment', 'listed');
has($row, { outcome => 'completed' }, 'found by the list');
is_deeply([ gets($since) ], [ '/v1/payment_intents/search', '/v1/payment_intents' ], 'which a search that finds nothing is followed by');
has($row->{evidence}, { found_by => 'metadata', requests => 2 }, 'evidence');
charged('payment', 'listed', 1);

# a subscription that is over is in no list that doesn't ask for it
sub made
{
	my ($id, $path, $params) = @_;

	return stripe_call($node, 'made', $id, 'POST', $path, params => $params)->{resource_id};
}
my $product = made('product', '/v1/products', { name => 'p' });
my $price = made('price', '/v1/prices', { currency => 'usd', unit_amount => 500, product => $product, recurring => { interval => 'month' } });
$key = lose('subscription', 's', path => '/v1/subscriptions', params => { customer => made('customer', '/v1/customers', {}),
		items => [ { price => $price } ], payment_behavior => 'default_incomplete' });
my $subscription = ($stripe->effects(key => $key, type => 'subscription'))[0]{id};
stripe_call($node, 'made', 'cancellation', 'DELETE', "/v1/subscriptions/$subscription");
$row = reconcile_one('subscription', 's');
has($row, { outcome => 'completed', resource_id => $subscription }, 'a subscription that is over');
has(step($row, 'list')->{found}, { status => 'canceled' }, 'found by the list');

# what belongs to something else
my $transfer = made('transfer', '/v1/transfers', { amount => 1000, currency => 'usd', destination => 'acct_9' });
lose('reversal', 'v', path => "/v1/transfers/$transfer/reversals", params => { amount => 300 });
$since = last_arrival();
$row = reconcile_one('reversal', 'v');
has($row, { outcome => 'completed' }, 'a reversal');
like($row->{resource_id}, qr/^trr_/, 'has its id');
is_deeply([ gets($since) ], ["/v1/transfers/$transfer/reversals"], 'found in the list of its transfer');
is($stripe->effects(type => 'transfer_reversal'), 1, 'reversed once');
lose('session', 'x', path => '/v1/checkout/sessions', params => { mode => 'setup', currency => 'usd', success_url => 'https://example.com' });
$row = reconcile_one('session', 'x');
has($row, { outcome => 'completed' }, 'a checkout session');
like($row->{resource_id}, qr/^cs_/, 'has its id');
$stripe->settings(search_lag => 0);

# the key isn't in the metadata
lose('payment', 'events', settings => { stripe_key_in_metadata => 'off' });
$since = last_arrival();
$row = reconcile_one('payment', 'events');
has($row, { outcome => 'completed' }, 'found by an event');
is_deeply([ gets($since) ], ['/v1/events'], 'the rest is not asked in vain');
has($row->{evidence}, { found_by => 'idempotency_key', event_type => 'payment_intent.succeeded', key_in_metadata => $false }, 'evidence');
like($row->{evidence}{stripe_event_id}, qr/^evt_/, 'names the event');
like(operation($node, 'payment', 'events')->{request_id}, qr/^req_/, 'whose request is the call');
charged('payment', 'events', 1);

# under a name of the application's own
sql($node, q{SELECT token FROM idempotency.stripe_claim('customer', 'own', '{"method": "POST", "path": "/v1/customers"}')});
$key = operation($node, 'customer', 'own')->{idempotency_key};
stripe_call($node, 'customer', 'by hand', 'POST', '/v1/customers', params => { metadata => { order => $key } },
	settings => { stripe_key_in_metadata => 'off' });
sql($node, q{SELECT idempotency.stripe_record('customer', 'own', token) FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'own'});
age('customer', 'own');
$row = reconcile_one('customer', 'own');
has($row, { outcome => 'completed' }, 'found by metadata of any name');
is($row->{resource_id}, operation($node, 'customer', 'by hand')->{resource_id}, 'it is that one');
has(step($row, 'search'), { seen => 0 }, 'which can be searched only by a name that is known');

# under a name that the request tells, in characters that a search escapes
sql($node, q{SELECT idempotency.stripe_claim('customer', o, jsonb_build_object('method', 'POST', 'path', '/v1/customers', 'params',
	jsonb_build_object('metadata', jsonb_build_object('a', 1, E'it\'s \\\\ ours', idempotency.stripe_idempotency_key('customer', o)))))
	FROM (VALUES (E'o\'Brien \\\\ 1')) v (o)});
$key = sql($node, q{SELECT idempotency_key FROM idempotency.stripe_idempotency_keys WHERE operation_id LIKE 'o_Brien%'});
my $named = stripe_call($node, 'customer', 'named', 'POST', '/v1/customers', params => { metadata => { "it's \\ ours" => $key } },
	settings => { stripe_key_in_metadata => 'off' });
sql($node, q{SELECT idempotency.stripe_record('customer', operation_id, token) FROM idempotency.stripe_idempotency_keys WHERE operation_id LIKE 'o_Brien%';
	UPDATE idempotency.stripe_idempotency_keys SET first_sent_at = NULL WHERE operation_id LIKE 'o_Brien%'});
$row = reconcile_one('customer', q{o'Brien \\ 1});
has($row, { outcome => 'completed', resource_id => $named->{resource_id} }, 'found under the name that the request tells');
has(step($row, 'search'), { seen => 1 }, 'by a search for it, with what it has to escape');

# another object than the one that was asked for
sql($node, q{SELECT token FROM idempotency.stripe_claim('customer', 'swapped', '{"method": "POST", "path": "/v1/customers/cus_1"}');
	SELECT idempotency.stripe_record('customer', 'swapped', token, http_status => 500) FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'swapped'});
$stripe->fault('not_json', status => 200, body => '{"id": "cus_2", "object": "customer"}', match => { method => 'GET', path => '/v1/customers/cus_1' });
$row = reconcile_one('customer', 'swapped');
$stripe->clear_faults;
has($row, { outcome => 'unknown' }, 'another object settles nothing');
has(step($row, 'object'), { problem => 'another object came back', http_status => 200 }, 'and the evidence says so');
sql($node, q{SELECT idempotency.stripe_settle('customer', 'swapped', 'not_executed')});

# paths of forms that nobody knows are asked about by events alone
foreach my $path ('/v1/accounts/acct_1/persons/person_1', '/v1/a/b/c/d/e')
{
	sql($node, qq{SELECT token FROM idempotency.stripe_claim('form', '$path', '{"method": "POST", "path": "$path"}');
		SELECT idempotency.stripe_record('form', '$path', token, http_status => 500) FROM idempotency.stripe_idempotency_keys WHERE operation_id = '$path'});
	$since = last_arrival();
	has(reconcile_one('form', $path), { outcome => 'unknown' }, "$path: nothing is found");
	is_deeply([ gets($since) ], ['/v1/events'], 'events alone are asked for');
	sql($node, qq{SELECT idempotency.stripe_settle('form', '$path', 'not_executed')});
}

# events are kept for thirty days
lose('payment', 'old', settings => { stripe_key_in_metadata => 'off' });
sql($node, q{UPDATE idempotency.stripe_idempotency_keys SET created_at = created_at - interval '31 days',
	claimed_at = claimed_at - interval '31 days', first_sent_at = first_sent_at - interval '31 days' WHERE operation_id = 'old'});
$since = last_arrival();
$row = reconcile_one('payment', 'old');
has($row, { outcome => 'unknown' }, 'a call of which no event is left');
is_deeply([ gets($since) ], [], 'is not asked about in vain');
has(step($row, 'events'), { problem => 'events reach back 30 days only', requests => 0 }, 'and the evidence says why');
sql($node, q{SELECT idempotency.stripe_settle('payment', 'old', 'completed')});

# what can't be searched
my $paid = stripe_call($node, 'payment', 'refunded', 'POST', '/v1/payment_intents', params => \%payment);
lose('refund', 'r', path => '/v1/refunds', params => { payment_intent => $paid->{resource_id} });
$since = last_arrival();
$row = reconcile_one('refund', 'r');
has($row, { outcome => 'completed' }, 'a refund');
like($row->{resource_id}, qr/^re_/, 'has its id');
is_deeply([ gets($since) ], ['/v1/refunds'], 'found by the list');
is($stripe->effects(type => 'refund'), 1, 'refunded once');

# a declined card
lose('payment', 'declined', params => { %payment, payment_method => 'pm_card_chargeDeclined' });
$since = last_arrival();
$row = reconcile_one('payment', 'declined');
is_deeply([ gets($since) ], [ '/v1/payment_intents/search', '/v1/events' ], 'what was found is not looked for again');
has($row, { outcome => 'failed' }, 'declined');
has($row->{evidence}, { found_by => 'idempotency_key', event_type => 'payment_intent.payment_failed' }, 'says the event');
has(step($row, 'search')->{found}, { status => 'requires_payment_method' }, 'not the object, which may wait for many reasons');
is(operation($node, 'payment', 'declined')->{error}{code}, 'card_declined', 'with the reason');
charged('payment', 'declined', 0);

# what was found is remembered where the requests end
lose('payment', 'declined later', params => { %payment, payment_method => 'pm_card_chargeDeclined' });
$row = reconcile_one('payment', 'declined later', max_requests => 1);
has($row->{evidence}, { next => 'events', stopped => 'no requests left' }, 'one request');
$row = reconcile_one('payment', 'declined later', max_requests => 1,
	settings => { stripe_allowed_paths => 'GET /v1/payment_intents**' });
has(step($row, 'search')->{found}, { status => 'requires_payment_method' }, 'what the first has found is in the evidence of the second');
sql($node, q{UPDATE idempotency.stripe_idempotency_keys SET reconciled = NULL WHERE operation_id = 'declined later'});
has(reconcile_one('payment', 'declined later'), { outcome => 'failed' }, 'declined');

# without the events
$key = lose('payment', 'no events', params => { %payment, payment_method => 'pm_card_chargeDeclined' });
$row = reconcile_one('payment', 'no events', settings => { stripe_allowed_paths => 'GET /v1/payment_intents**' });
has($row, { outcome => 'unknown' }, 'without events it stays unknown');
has(step($row, 'events'), { problem => 'not allowed by idempotency.stripe_allowed_paths', requests => 0 }, 'and says why');
has($row->{evidence}, { next => undef }, 'there is nothing left to ask');
charged('payment', 'no events', 0);

# Stripe failed in the middle
lose('payment', 'sticky', fault => [ '500', effect => $true, times => 0 ]);
has(reconcile_one('payment', 'sticky'), { outcome => 'completed' }, 'a 500 behind which it was done');
charged('payment', 'sticky', 1);

# the id is known
sql($node, q{SELECT token FROM idempotency.stripe_claim('payment', 'known', '{"method": "POST", "path": "/v1/payment_intents", "params": {"amount": 1}}')});
sql($node, qq{SELECT idempotency.stripe_record('payment', 'known', token, http_status => 500, resource_id => '$paid->{resource_id}')
	FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'known'});
$since = last_arrival();
$row = reconcile_one('payment', 'known');
has($row, { outcome => 'completed', resource_id => $paid->{resource_id} }, 'found by id');
has($row->{evidence}, { found_by => 'object' }, 'evidence');
is_deeply([ gets($since) ], ["/v1/payment_intents/$paid->{resource_id}"], 'with one request');

# changes: only events tell whose they are
my $intent = stripe_call($node, 'payment', 'intent', 'POST', '/v1/payment_intents', params => { amount => 700, currency => 'usd' })->{resource_id};
lose('confirmation', 'c', path => "/v1/payment_intents/$intent/confirm", params => { payment_method => 'pm_card_visa' });
$row = reconcile_one('confirmation', 'c', settings => { stripe_allowed_paths => 'GET /v1/payment_intents/*' });
has($row, { outcome => 'unknown' }, 'that it is paid doesn\'t say by whom');
has(step($row, 'object')->{found}, { id => $intent, status => 'succeeded' }, 'but it is evidence');
$row = reconcile_one('confirmation', 'c');
has($row, { outcome => 'completed', resource_id => $intent }, 'the event says it');
charged('confirmation', 'c', 1);
my $customer = stripe_call($node, 'customer', 'to be deleted', 'POST', '/v1/customers')->{resource_id};
lose('deletion', 'd', method => 'DELETE', path => "/v1/customers/$customer");
has(reconcile_one('deletion', 'd'), { outcome => 'completed', resource_id => $customer }, 'what is deleted is deleted');
lose('deletion', 'not', method => 'DELETE', path => '/v1/customers/cus_Never');
$row = reconcile_one('deletion', 'not');
has($row, { outcome => 'unknown' }, 'what isn\'t there may never have been');
has(step($row, 'object'), { http_status => 404, problem => 'resource_missing' }, 'says the evidence');

# the caller is gone
lose('payment', 'gone');
sql($node, q{UPDATE idempotency.stripe_idempotency_keys SET outcome = 'in_progress', recorded_at = NULL, caller_life = 1, caller_vxid = '3/1'
	WHERE operation_id = 'gone'});
has(reconcile_one('payment', 'gone'), { outcome => 'completed' }, 'found though its caller is gone');
charged('payment', 'gone', 1);

# who is at it isn't disturbed
sql($node, q{SELECT idempotency.stripe_settle(operation_type, operation_id, 'failed') FROM idempotency.stripe_unknown});
sql($node, q{SELECT token FROM idempotency.stripe_claim('payment', 'held', '{"method": "POST", "path": "/v1/payment_intents"}')});
is(arrivals {
	has(reconcile_one('payment', 'held'), { outcome => 'in_progress', evidence => undef }, 'in progress');
	is(scalar(grep { $_->{operation_id} eq 'held' } reconcile(q{'payment'})), 0, 'and left out');
}, 0, 'nothing is asked');
lapse_stripe_lease($node, 'payment', 'held');
sql($node, q{UPDATE idempotency.stripe_idempotency_keys SET request = NULL WHERE operation_id = 'held'});
$row = reconcile_one('payment', 'held');
has($row, { outcome => 'unknown' }, 'lapsed');
has($row->{evidence}, { skipped => 'it is not known which path was called' }, 'nothing to ask by');
like(next_step('held'), qr/stripe_settle/, 'that takes a person');
sql($node, q{SELECT idempotency.stripe_settle('payment', 'held', 'not_executed')});

# an event that came first needs no request
my $endpoint = $stripe->webhook_endpoint(secrets => ['whsec_test_1'], enabled_events => ['customer.created']);
sql($node, q{SELECT token FROM idempotency.stripe_claim('customer', 'kept', '{"method": "POST", "path": "/v1/customers"}')});
$key = operation($node, 'customer', 'kept')->{idempotency_key};
HTTP::Tiny->new->post_form($stripe->url . '/v1/customers', { 'metadata[order]' => $key },
	{ headers => { Authorization => 'Bearer ' . TEST_KEY, 'Idempotency-Key' => $key } })->{success} or die 'not made';
my $event = $stripe->next_webhook(endpoint => $endpoint);
my ($signature) = map { $event->{headers}{$_} } grep { lc eq 'stripe-signature' } keys %{ $event->{headers} };
sql($node, 'SELECT FROM idempotency.stripe_webhook_receive(convert_to(' . literal($event->{body}) . ", 'UTF8'), "
	  . literal($signature) . ", '{whsec_test_1}', tolerance => interval '10 days')");
is(operation($node, 'customer', 'kept')->{outcome}, 'in_progress', 'an event came while the call was held');
lapse_stripe_lease($node, 'customer', 'kept');
{
	# while another one is asked about
	age('customer', 'kept');
	lose('customer', 'asked', path => '/v1/customers', params => {});
	my $fault = $stripe->fault('hang_before', match => { method => 'GET' });
	my $session = $node->background_psql('postgres', on_error_stop => 0);
	$session->query_safe('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM pg_class LIMIT 1');
	sql($node, q{UPDATE idempotency.stripe_idempotency_keys SET attempt = attempt + 1 WHERE operation_id = 'kept'});
	$session->query_until(qr/asking/, "\\echo asking\nSELECT string_agg(operation_id || ' ' || outcome, ', ') FROM idempotency.stripe_reconcile('customer');\n");
	$stripe->wait_fault($fault, holding => 1);
	is(sql($node, q{SELECT count(*) FROM (SELECT FROM idempotency.stripe_idempotency_keys WHERE operation_type = 'customer' FOR UPDATE SKIP LOCKED) l}),
		sql($node, q{SELECT count(*) FROM idempotency.stripe_idempotency_keys WHERE operation_type = 'customer'}),
		'what is known without Stripe isn\'t locked while Stripe is asked about others');
	$stripe->release($fault);
	is($session->query('SELECT 1') =~ s/\n?1\z//r, 'kept completed, asked completed', 'and then settled, on the latest row');
	$session->query_safe('ROLLBACK');
	$session->quit;
	reconcile_one('customer', 'asked');
}
is(arrivals { has(reconcile_one('customer', 'kept'), { outcome => 'completed' }, 'then it is found') }, 0, 'without a request');

#
# Not found
#

sub open_rows
{
	return sql($node, q{SELECT string_agg(operation_id, ' ' ORDER BY operation_id) FROM idempotency.stripe_unknown}) // '';
}

sql($node, q{SELECT idempotency.stripe_settle(operation_type, operation_id, 'failed') FROM idempotency.stripe_unknown});
lose('payment', 'absent', fault => ['close_before']);
$row = reconcile_one('payment', 'absent');
has($row, { outcome => 'unknown', resource_id => undef }, 'absence settles nothing');
has(step($row, $_), { complete => $true, http_status => 200, found => undef }, "$_ was read to its end") foreach 'search', 'list', 'events';
like(step($row, 'list')->{from} . step($row, 'list')->{to}, qr/^(\d+-\d\d-\d\dT[\d:.+-]+){2}$/, 'of that time');
has($row->{evidence}, { next => undef, requests => 3 }, 'all was asked');
is_deeply(operation($node, 'payment', 'absent')->{reconciled}, $row->{evidence}, 'which the row keeps');
like(next_step('absent'), qr/^SELECT idempotency.stripe_settle\('payment', 'absent', outcome => '</, 'now a person has to say');
is(sql($node, q{SELECT reconciled_at > now() - interval '1 minute' FROM idempotency.stripe_unknown WHERE operation_id = 'absent'}), 't', 'when it was asked is shown');
charged('payment', 'absent', 0);
sql($node, q{SELECT idempotency.stripe_settle('payment', 'absent', 'not_executed')});
has(stripe_call($node, 'payment', 'absent', 'POST', '/v1/payment_intents', params => \%payment), { outcome => 'completed', generation => 1 },
	'then it is called again');
is($stripe->charges(key => operation($node, 'payment', 'absent')->{idempotency_key}), 1, 'and charged once');

# the rollback loses nothing but what can be read again
lose('payment', 'rolled back');
is(sql($node, q{BEGIN; SELECT outcome FROM idempotency.stripe_reconcile('payment', 'rolled back'); ROLLBACK}), 'completed', 'found');
is(operation($node, 'payment', 'rolled back')->{outcome}, 'unknown', 'rolled back');
# 40001 if the recorder has noted something on the row since the snapshot
my ($found, $problem);
foreach (1 .. 10)
{
	(undef, $found, $problem) = $node->psql('postgres', q{BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT oid FROM pg_class LIMIT 0;
		SELECT outcome FROM idempotency.stripe_reconcile('payment', 'rolled back'); COMMIT});
	last if $problem !~ /could not serialize access/;
}
is($found, 'completed', 'found again');
charged('payment', 'rolled back', 1);

# more than one has the key
$key = lose('customer', 'copied', path => '/v1/customers', params => { name => 'a' });
stripe_call($node, 'customer', 'copy', 'POST', '/v1/customers', params => { metadata => { idempotency_key => $key } });
$row = reconcile_one('customer', 'copied', settings => { stripe_allowed_paths => 'GET /v1/customers**' });
has($row, { outcome => 'unknown' }, 'of two objects neither settles it');
has($row->{evidence}, { several => $true }, 'which is told');
has(reconcile_one('customer', 'copied'), { outcome => 'completed' }, 'the event of its request does');
is(operation($node, 'customer', 'copied')->{response}{name}, 'a', 'and names the right one');

#
# The budget
#

$stripe->settings(search_lag => 10 * 86400);
lose('customer', 'deep', path => '/v1/customers', params => {});
sql($node, q{SELECT count(*) FROM generate_series(1, 230) n, LATERAL idempotency.stripe_call('filler', n::text, 'POST', '/v1/customers')});
lose('payment', 'hopeless', fault => ['close_before']);
is(open_rows(), 'deep hopeless', 'one deep down in a list, and one that isn\'t there');
my %asked;
my @turns;
my $calls = 0;
foreach (1 .. 20)
{
	my $n = arrivals { ($row) = reconcile('max_requests => 1') };

	is($n, 1, 'one request, as allowed') if $calls < 4;
	$calls++;
	push @turns, $row->{operation_id};
	push @{ $asked{ $row->{operation_id} } }, $row->{evidence}{next} // 'end';
	last if open_rows() eq 'hopeless' && $asked{hopeless}[-1] eq 'end';
}
is_deeply([ @turns[ 0 .. 5 ] ], [ ('deep', 'hopeless') x 3 ], 'each in its turn');
is_deeply($asked{deep}, [ 'list', 'list', 'list', 'end' ], 'a list that is cut is gone on with');
is_deeply($asked{hopeless}, [ 'list', 'events', 'end' ], 'and so is what comes next') or diag(explain(\%asked));
is(operation($node, 'customer', 'deep')->{outcome}, 'completed', 'found at last');
has(step({ evidence => operation($node, 'customer', 'deep')->{settled}{evidence} }, 'list'), { requests => 3, complete => $true, after => undef }, 'having seen all');
my $hopeless = operation($node, 'payment', 'hopeless')->{reconciled};
is_deeply([ map { $_->{by} } @{ $hopeless->{asked} } ], [ 'search', 'list', 'events' ], 'the evidence has all that was asked');
has((reconcile_one('payment', 'hopeless', max_requests => 2))->{evidence}, { next => 'events', stopped => 'no requests left' }, 'and starts anew after that');
charged('payment', 'hopeless', 0);

# pages that are too large come in pieces
lose('customer', 'large', path => '/v1/customers', params => {});
sql($node, q{SELECT count(*) FROM generate_series(231, 300) n, LATERAL idempotency.stripe_call('filler', n::text, 'POST', '/v1/customers')});
$row = reconcile_one('customer', 'large', settings => { max_response_size => '16kB' }, max_requests => 100);
has($row, { outcome => 'completed' }, 'found in small pages');
cmp_ok(step($row, 'list')->{requests}, '>', 7, 'more of them');

# a copy on the first page, and what it was copied from on a later one
$key = lose('customer', 'copied far', path => '/v1/customers', params => { name => 'a' });
sql($node, q{SELECT count(*) FROM generate_series(301, 410) n, LATERAL idempotency.stripe_call('filler', n::text, 'POST', '/v1/customers')});
stripe_call($node, 'customer', 'copy far', 'POST', '/v1/customers', params => { metadata => { idempotency_key => $key } });
my %customers_only = (stripe_allowed_paths => 'GET /v1/customers**');
$row = reconcile_one('customer', 'copied far', max_requests => 2, settings => \%customers_only);
has($row, { outcome => 'unknown' }, 'of a list that was cut nothing is believed');
has(step($row, 'list')->{found}, { type => 'customer' }, 'though something was found');
has($row->{evidence}, { next => 'list', several => undef }, 'which goes on');
$row = reconcile_one('customer', 'copied far', max_requests => 100, settings => \%customers_only);
has($row, { outcome => 'unknown' }, 'and finds two');
has($row->{evidence}, { next => undef, several => $true }, 'which is told');
has(reconcile_one('customer', 'copied far', max_requests => 100), { outcome => 'completed' }, 'the event of its request says which');
is(operation($node, 'customer', 'copied far')->{response}{name}, 'a', 'and that is the right one');

# one that was found before the list was cut is found again
lose('customer', 'cut', path => '/v1/customers', params => { name => 'b' });
$row = reconcile_one('customer', 'cut', max_requests => 2, settings => \%customers_only);
has($row, { outcome => 'unknown' }, 'of a list that was cut nothing is believed');
has(step($row, 'list'), { after => undef }, 'where it goes on is where something was found');
has(reconcile_one('customer', 'cut', max_requests => 100, settings => \%customers_only), { outcome => 'completed' }, 'until it was read to its end');
is(operation($node, 'customer', 'cut')->{response}{name}, 'b', 'it is the one');

# what was asked in one mode doesn't say where to go on in the other
lose('customer', 'modes', path => '/v1/customers', params => { name => 'c' });
reconcile_one('customer', 'modes', max_requests => 2, settings => \%customers_only);
sql($node, q{UPDATE idempotency.stripe_idempotency_keys SET livemode = NULL,
	reconciled = jsonb_set(jsonb_set(reconciled, '{livemode}', 'true'), '{asked,0,after}', '"cus_OfTheOther"') WHERE operation_id = 'modes'});
has(reconcile_one('customer', 'modes', max_requests => 100, settings => \%customers_only), { outcome => 'completed' }, 'the other mode starts anew');

$stripe->settings(search_lag => 0);
sql($node, q{SELECT idempotency.stripe_settle('payment', 'hopeless', 'failed')});
is(open_rows(), '', 'nothing is left');

#
# What Stripe and the network do is evidence
#

lose('payment', 'trouble');
lose('payment', 'trouble too');
foreach my $case (
	[ '401', 1, 'search', qr/invalid_request|api key|401/i ], [ '403', 1, 'list', qr/./ ], [ '429', 1, 'search', qr/rate_limit/ ],
	[ '503', 1, 'list', qr/./ ], [ 'close_before', 1, 'search', qr/no answer came/ ], [ 'hang_before', 1, 'search', qr/no answer came/ ])
{
	my ($what, $expected, $next, $why) = @$case;
	my @rows;

	sql($node, 'UPDATE idempotency.stripe_idempotency_keys SET reconciled = NULL');
	$stripe->fault($what, times => 0);
	is(arrivals { @rows = reconcile('', settings => { stripe_timeout => '500 ms' }) }, $expected, "$what: is not hammered");
	$stripe->clear_faults;
	is(scalar(@rows), 1, "$what: and ends it");
	has($rows[0], { outcome => 'unknown' }, "$what: no error");
	has($rows[0]{evidence}, { next => $next }, "$what: what comes next");
	like($rows[0]{evidence}{stopped}, $why, "$what: the reason is told");
	has(operation($node, 'payment', 'trouble'), { outcome => 'unknown', reconciled => $rows[0]{evidence} }, "$what: and kept");
}
like($json->encode(operation($node, 'payment', 'trouble')->{reconciled}), qr/^(?!.*sk_test)/, 'without the API key');
{
	$stripe->fault('hang_before', times => 0);
	my ($rc, $stdout, $stderr) = $node->psql('postgres', q{SET statement_timeout = '1500 ms';
		SELECT evidence ->> 'stopped' FROM idempotency.stripe_reconcile('payment')});
	is($rc, 0, 'it ends before statement_timeout') or diag($stderr);
	like($stdout, qr/no answer came/, 'and says why');
	$stripe->clear_faults;
}
$stripe->fault('503', times => 0);
is(arrivals { reconcile('max_requests => 2', settings => { stripe_max_retries => 5 }) }, 2, 'attempts count as requests');
$stripe->clear_faults;
is(scalar(grep { $_->{outcome} eq 'completed' } reconcile('')), 2, 'then all is well');
charged('payment', 'trouble', 1);
charged('payment', 'trouble too', 1);

# answers that nobody expects
sub answered
{
	my ($body, %match) = @_;

	$body = $json->encode($body) if ref $body;
	$stripe->fault('not_json', status => 200, body => $body, effect => $false, times => 0, match => { method => 'GET', %match });
	return;
}
$key = lose('customer', 'odd', path => '/v1/customers', params => {});
my %object = (id => 'cus_Odd', object => 'customer', livemode => $false, metadata => { idempotency_key => $key });
my %event = (id => 'evt_1', object => 'event', type => 'customer.created', livemode => $false, data => { object => { %object, id => 'cus_Copy' } });
foreach my $case (
	[ 'nothing', '' ],
	[ 'a scalar', '1' ],
	[ 'an array', '[]' ],
	[ 'no list', '{"data": {"a": 1}}' ],
	[ 'a list of anything', '{"data": [null, 1, "x", [], [[]], {}, {"metadata": [1]}, {"metadata": {"a": {}, "b": [1]}}], "has_more": true}' ],
	[ 'a list that never ends', '{"data": [{"id": "cus_1"}], "has_more": true}' ],
	[ 'a list whose last id is none', '{"data": [{"id": "' . 'x' x 100000 . '"}], "has_more": true}' ],
	[ 'deep', '[' x 100000 . ']' x 100000 ],
	[ 'deep in an object', '{"data": ' . '[' x 100000 . ']' x 100000 . '}' ],
	[ 'a zero byte', '{"data": [{"id": "cus\u0000", "object": "customer", "metadata": {"idempotency_key": 1}}]}' ],
	[ 'no id', { data => [ { %object, id => '' } ] } ],
	[ 'a long id', { data => [ { %object, id => 'x' x 256 } ] } ],
	[ 'deleted', { data => [ { %object, deleted => $true } ] } ],
	[ 'of another type', { data => [ { %object, object => 'charge' } ] } ],
	[ 'of the other mode', { data => [ { %object, livemode => $true } ] } ],
	[ 'two', { data => [ \%object, { %object, id => 'cus_Other' } ] } ],
	[ 'one of more', { data => [ \%object ], has_more => $true }, '/v1/customers/search' ],
	[ 'with two keys', { data => [ { %object, metadata => { a => $key, b => $key =~ s/odd/other/r } } ] } ],
	[ 'made with another key', { data => [ { %event, request => { id => 'req_1', idempotency_key => 'k-1' } } ] }, '/v1/events' ],
	[ 'of two objects', { data => [ map { { %event, id => "evt_$_", type => 'customer.updated', data => { object => { %object, id => "cus_$_" } } } } 1, 2 ] }, '/v1/events' ],
	[ 'of a connected account', { data => [ { %event, account => 'acct_1' } ] }, '/v1/events' ],
	[ 'an event of the other mode', { data => [ { %event, livemode => $true } ] }, '/v1/events' ],
	[ 'of a list of events that was cut', { data => [ \%event ], has_more => $true }, '/v1/events' ])
{
	my ($what, $body, $path) = @$case;

	sql($node, q{UPDATE idempotency.stripe_idempotency_keys SET reconciled = NULL WHERE operation_id = 'odd'});
	answered($body, $path ? (path => $path) : ());
	answered({ data => [] }) if $path;
	$row = reconcile_one('customer', 'odd', max_requests => 7);
	has($row, { outcome => 'unknown', resource_id => undef }, "$what: settles nothing");
	cmp_ok(length $json->encode($row), '<', 10000, "$what: what is kept is small");
	reconcile_one('customer', 'odd', max_requests => 7);
	$stripe->clear_faults;
}
has(reconcile_one('customer', 'odd'), { outcome => 'completed' }, 'what Stripe says settles it');

# a DELETE of what belongs to a customer isn't one of the customer
$customer = stripe_call($node, 'customer', 'with a discount', 'POST', '/v1/customers')->{resource_id};
lose('deletion', 'discount', method => 'DELETE', path => "/v1/customers/$customer/discount");
stripe_call($node, 'deletion', 'of its customer', 'DELETE', "/v1/customers/$customer");
$row = reconcile_one('deletion', 'discount');
has($row, { outcome => 'unknown', resource_id => undef }, 'a deleted customer doesn\'t say that its discount was deleted by the call');
sql($node, q{SELECT idempotency.stripe_settle('deletion', 'discount', 'failed')});

#
# Modes and accounts
#

lose('payment', 'live');
sql($node, q{UPDATE idempotency.stripe_idempotency_keys SET livemode = true WHERE operation_id = 'live'});
is(arrivals {
	is(scalar(reconcile('')), 0, 'an operation of the other mode is left out');
	$row = reconcile_one('payment', 'live');
}, 0, 'and not asked about');
has($row, { outcome => 'unknown' }, 'by name neither');
has($row->{evidence}, { skipped => 'it belongs to the other mode than the API key', kept => $false }, 'but told why');
is(operation($node, 'payment', 'live')->{reconciled}, undef, 'nothing is kept');
sql($node, q{UPDATE idempotency.stripe_idempotency_keys SET livemode = false WHERE operation_id = 'live'});
has(reconcile_one('payment', 'live'), { outcome => 'completed' }, 'with a key of its mode it is found');
charged('payment', 'live', 1);

lose('payment', 'connected', account => 'acct_1', settings => { stripe_key_in_metadata => 'off' });
is(arrivals { is(scalar(reconcile('')), 0, 'another account is left out') }, 0, 'and not asked about');
run_fails($node, q{SELECT FROM idempotency.stripe_reconcile('payment', 'connected')}, 'IK003', 'there is none by that name');
has(reconcile_one('payment', 'connected', account => 'acct_1'), { account => 'acct_1', outcome => 'completed' }, 'its own is');
my ($arrival) = ($stripe->arrivals(method => 'GET'))[-1];
is((grep { lc $_->[0] eq 'stripe-account' } @{ $arrival->{headers} })[0][1], 'acct_1', 'there Stripe was asked');
charged('payment', 'connected', 1, account => 'acct_1');

# where events of an account are asked for, they needn't name it
$key = lose('customer', 'unnamed', path => '/v1/customers', params => {}, account => 'acct_1', settings => { stripe_key_in_metadata => 'off' });
answered({ data => [ { %event, request => { id => 'req_1', idempotency_key => $key } } ] }, path => '/v1/events');
has(reconcile_one('customer', 'unnamed', account => 'acct_1'), { outcome => 'completed', resource_id => 'cus_Copy' }, 'an event that names no account');
$stripe->clear_faults;

#
# Others at the same row
#

# what they record while Stripe is asked stands
lose('payment', 'meanwhile');
my $fault = $stripe->fault('hang_before', match => { method => 'GET' });
my $session = $node->background_psql('postgres', on_error_stop => 0);
$session->query_until(qr/asking/, "\\echo asking\nSELECT outcome, resource_id, evidence ->> 'kept' FROM idempotency.stripe_reconcile('payment', 'meanwhile');\n");
$stripe->wait_fault($fault, holding => 1);
sql($node, q{SELECT idempotency.stripe_settle('payment', 'meanwhile', 'completed', resource_id => 'pi_other', note => 'a person')});
$stripe->release($fault);
is($session->query('SELECT 1') =~ s/\n?1\z//r, 'completed|pi_other|false', 'what a person has said meanwhile stands');
is(operation($node, 'payment', 'meanwhile')->{settled}{note}, 'a person', 'unchanged');
$stripe->clear_faults;

# a retry that is under way, or has been
lose('payment', 'retried');
sql($node, q{UPDATE idempotency.stripe_idempotency_keys SET first_sent_at = now(), claimed_at = now() WHERE operation_id = 'retried'});
$stripe->control('POST', 'clock', { set => time });
$fault = $stripe->fault('hang_before', match => { method => 'GET' });
$session->query_until(qr/asking/, "\\echo asking\nSELECT outcome, evidence ->> 'kept' FROM idempotency.stripe_reconcile('payment', 'retried');\n");
$stripe->wait_fault($fault, holding => 1);
my $hang = $stripe->fault('hang_before', match => { method => 'POST' });
my $other = $node->background_psql('postgres', on_error_stop => 0);
$other->query_until(qr/calling/, "\\echo calling\nSELECT outcome FROM idempotency.stripe_retry('payment', 'retried');\n");
$stripe->wait_fault($hang, holding => 1);
$stripe->release($fault);
is($session->query('SELECT 1') =~ s/\n?1\z//r, 'in_progress|false', 'a retry that is under way has the row');
$stripe->release($hang);
is($other->query('SELECT 1') =~ s/\n?1\z//r, 'completed', 'and ends as ever');
$stripe->clear_faults;
is(operation($node, 'payment', 'retried')->{outcome}, 'completed', 'which is recorded');
$stripe->control('POST', 'clock', { set => time - $ago });

# who has it locked is not waited for
lose('payment', 'locked');
$other->query_safe(q{BEGIN; SELECT FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'locked' FOR UPDATE});
has(reconcile_one('payment', 'locked')->{evidence}, { kept => $false, found_by => 'metadata' }, 'a locked row is left alone');
$other->query_safe('ROLLBACK');
has(reconcile_one('payment', 'locked'), { outcome => 'completed' }, 'and settled the next time');
charged('payment', 'locked', 1);

# no row is locked while Stripe is asked
lose('payment', 'free');
$fault = $stripe->fault('hang_before', match => { method => 'GET' });
$session->query_until(qr/asking/, "\\echo asking\nSELECT outcome FROM idempotency.stripe_reconcile('payment', 'free');\n");
$stripe->wait_fault($fault, holding => 1);
is(sql($node, q{SELECT count(*) FROM (SELECT FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'free' FOR UPDATE NOWAIT) l}),
	'1', 'no row is locked while Stripe is asked');
$stripe->release($fault);
is($session->query('SELECT 1') =~ s/\n?1\z//r, 'completed', 'and then it is settled');
charged('payment', 'free', 1);
$_->quit foreach $session, $other;

#
# Interrupts and rollbacks: nothing is settled, nothing stays locked, and the next
# one finds all that there is to find
#

sub untouched
{
	my ($id, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	is(sql($node, qq{SELECT outcome, reconciled IS NULL FROM idempotency.stripe_idempotency_keys
		WHERE operation_type = 'interrupted' AND operation_id = '$id' FOR UPDATE NOWAIT}), 'unknown|t', $name);
	return;
}

foreach my $how ('pg_cancel_backend', 'pg_terminate_backend')
{
	# the first is found by then, at the second it is struck
	lose('interrupted', "$how $_") foreach 1, 2;
	my $asked = last_arrival();
	my $victim = $node->background_psql('postgres', on_error_stop => 0);
	my $pid = $victim->query_safe('SELECT pg_backend_pid()');
	$fault = $stripe->fault('hang_before', match => { method => 'GET' }, nth => 2);
	$victim->query_until(qr/asking/, "\\echo asking\nBEGIN; SELECT outcome FROM idempotency.stripe_reconcile('interrupted');\n");
	$stripe->wait_fault($fault, holding => 1);
	sql($node, "SELECT $how($pid)");
	$stripe->wait_fault($fault, gone => 1);
	ok($node->poll_query_until('postgres',
			"SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $pid AND state = 'active')"), "$how: ends at once");
	cmp_ok(scalar gets($asked), '>=', 2, "$how: after it has asked about the first");
	$stripe->clear_faults;
	untouched("$how $_", "$how: $_ is as it was") foreach 1, 2;
	$victim->{run}->kill_kill;
	is(join(' ', map { $_->{outcome} } reconcile(q{'interrupted'})), 'completed completed', "$how: the next one finds both");
	charged('interrupted', "$how $_", 1) foreach 1, 2;
}

# it ends by itself before statement_timeout, and keeps how far it has got
lose('interrupted', 'statement_timeout');
$stripe->fault('hang_before', match => { method => 'GET' }, times => 0);
($row) = reconcile(q{'interrupted', 'statement_timeout'}, before => q{SET statement_timeout = '1500 ms';});
has($row, { outcome => 'unknown' }, 'statement_timeout: unknown');
has($row->{evidence}, { requests => 1, next => 'search' }, 'one question, to be asked again');
ok(defined $row->{evidence}{stopped}, 'and why it was the last');
$stripe->clear_faults;
is(sql($node, q{SELECT reconciled ->> 'next' FROM idempotency.stripe_lookup('interrupted', 'statement_timeout')}), 'search', 'which is kept');
is(arrivals { ($row) = reconcile(q{'interrupted', 'statement_timeout'}, before => q{SET statement_timeout = '900 ms';}) }, 0,
	'with less than a second nothing is asked');
has(reconcile_one('interrupted', 'statement_timeout'), { outcome => 'completed' }, 'and then it is found');
charged('interrupted', 'statement_timeout', 1);

# a savepoint, and an exception that is caught
foreach my $how (
	[ 'savepoint', q{BEGIN; SAVEPOINT s; SELECT outcome FROM idempotency.stripe_reconcile('interrupted', 'savepoint'); ROLLBACK TO s; COMMIT} ],
	[ 'exception', q{DO $$ BEGIN
		PERFORM FROM idempotency.stripe_reconcile('interrupted', 'exception') WHERE outcome = 'completed';
		RAISE EXCEPTION '%', FOUND;
	EXCEPTION WHEN raise_exception THEN RAISE NOTICE 'found: %', SQLERRM; END $$} ])
{
	my ($id, $statements) = @$how;

	lose('interrupted', $id);
	my (undef, $stdout, $stderr) = $node->psql('postgres', $statements);
	like($stdout . $stderr, qr/^completed$|found: t$/m, "$id: found");
	untouched($id, "$id: and not settled, since that was rolled back");
	has(reconcile_one('interrupted', $id), { outcome => 'completed' }, "$id: found again");
	charged('interrupted', $id, 1);
}

# one that was rolled back in a savepoint counts when it is asked again in the same transaction
lose('interrupted', 'again');
is(sql($node, q{BEGIN; SAVEPOINT s; SELECT FROM idempotency.stripe_reconcile('interrupted', 'again'); ROLLBACK TO s;
	SELECT outcome FROM idempotency.stripe_reconcile('interrupted', 'again'); COMMIT}) =~ s/^\n+//r, 'completed', 'again, in the same transaction');
charged('interrupted', 'again', 1);

#
# Privileges
#

sql($node, q{CREATE ROLE nobody; CREATE ROLE operator; SELECT idempotency.grant_role('operator', 'operator')});
run_fails($node, 'SET ROLE nobody; SELECT FROM idempotency.stripe_reconcile()', '42501', 'nothing for PUBLIC');
lose('payment', 'by an operator');
is(sql($node, q{SET ROLE operator; SELECT outcome FROM idempotency.stripe_reconcile()}), 'completed', 'an operator may');
charged('payment', 'by an operator', 1);
run_fails($node, 'BEGIN READ ONLY; SELECT FROM idempotency.stripe_reconcile()', '25006', 'not in a read-only transaction');

done_testing();
