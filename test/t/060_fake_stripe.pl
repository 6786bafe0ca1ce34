
# The fake Stripe does what Stripe does, fails as it is told to, and counts
# right.  Everything goes over plain sockets, so that nothing is sent twice
# behind our back.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use Digest::SHA qw(hmac_sha256_hex);
use FakeStripe;
use File::Temp;
use IO::Select;
use IO::Socket::INET;
use JSON::PP;
use MIME::Base64 qw(decode_base64);
use Test::More;
use Time::HiRes qw(time);

$SIG{PIPE} = 'IGNORE';

my $dir = File::Temp->newdir;
my $stripe = FakeStripe->start(tls_dir => "$dir/tls", log => "$dir/log");
my $json = JSON::PP->new->utf8;
my ($true, $false) = (JSON::PP::true, JSON::PP::false);
my $pi = '/v1/payment_intents';
my @payment = (amount => 2000, currency => 'usd', confirm => 'true',
	payment_method => 'pm_card_visa');
my $day = 86400;

#
# A client that shows what happens on its connection
#

sub connection
{
	return IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => $stripe->port)
	  // die "could not connect: $!";
}

# The bytes of a request: method, path, body (text, or a list of parameters).
sub request_text
{
	my ($method, $path, $body, %params) = @_;
	my %headers = (
		Host => 'localhost',
		Authorization => 'Bearer ' . ($params{api_key} // 'sk_test_123'),
		%{ $params{headers} // {} });

	$body = join('&', form(@$body)) if ref $body;
	if (defined $body && $method eq 'GET')
	{
		$path .= "?$body";
		$body = undef;
	}
	if (defined $body)
	{
		$headers{'Content-Length'} = length($body);
		$headers{'Content-Type'} //= 'application/x-www-form-urlencoded';
	}
	$headers{'Idempotency-Key'} = $params{key} if defined $params{key};
	return join("\r\n", "$method $path HTTP/1.1",
		map { "$_: $headers{$_}" } grep { defined $headers{$_} } sort keys %headers)
	  . "\r\n\r\n"
	  . ($body // '');
}

sub form
{
	my @params = @_;
	my @pairs;

	while (my ($name, $value) = splice(@params, 0, 2))
	{
		$value =~ s/([^A-Za-z0-9_.~-])/sprintf('%%%02X', ord($1))/ge;
		push @pairs, "$name=$value";
	}
	return @pairs;
}

# Read an answer: status, headers, body, json, and how it ended (whole, cut,
# eof or reset).
sub answer
{
	my ($socket, %params) = @_;
	my ($data, $end) = ('', '');
	my $select = IO::Select->new($socket);
	my $more = sub {
		die 'no answer in time' unless $select->can_read($params{timeout} // 20);
		my $got = sysread($socket, $data, 65536, length($data));
		$end = defined $got ? 'eof' : 'reset' unless $got;
		return $got;
	};

	1 while $data !~ /\r\n\r\n/ && $more->();
	return { end => $end || 'garbled' } unless $data =~ /^HTTP\/1\.1 (\d+)[^\r]*\r\n(.*?)\r\n\r\n/s;
	my ($status, $head) = ($1, $2);
	my $body = substr($data, $+[0]);
	my %headers = map { /^([^:]+): (.*)/ ? (lc $1, $2) : () } split(/\r\n/, $head);
	my $length = $headers{'content-length'};

	$data = $body;
	if (defined $length)
	{
		1 while length($data) < $length && $more->();
	}
	else
	{
		1 while $data !~ /(?:^|\r\n)0\r\n\r\n\z/ && $more->();
	}
	my %result = (
		status => $status,
		headers => \%headers,
		body => $data,
		end => $end || 'whole');
	$result{json} = eval { $json->decode($data =~ s/\s+\z//r) };
	return \%result;
}

# A request on a connection of its own, or on $params{on}.
sub ask
{
	my ($method, $path, $body, %params) = @_;
	my $socket = $params{on} // connection();

	syswrite($socket, request_text($method, $path, $body, %params))
	  // return { end => 'reset' };
	return answer($socket, %params);
}

sub post { return ask('POST', @_) }
sub get { return ask('GET', @_) }

# An answer in a word: its status, and the code or type of its error.
sub word
{
	my ($answer) = @_;

	return $answer->{end} unless defined $answer->{status};
	my $error = $answer->{json} && $answer->{json}{error};
	return join(' ', $answer->{status}, $error ? $error->{code} // $error->{type} : (),
		$answer->{headers}{'idempotent-replayed'} ? 'replayed' : (),
		$answer->{end} eq 'whole' ? () : $answer->{end});
}

#
# Idempotency of API v1
#

my $first = post($pi, [ @payment, 'metadata[order]' => '42' ], key => 'k1');
is(word($first), '200', 'a payment');
like($first->{json}{id}, qr/^pi_/, 'and its id');
is($first->{headers}{'original-request'}, $first->{headers}{'request-id'},
	'the first answer names itself as the original');
like($first->{headers}{'request-id'}, qr/^req_/, 'by a request id');
is($first->{headers}{'idempotency-key'}, 'k1', 'the key comes back');
is($first->{headers}{'stripe-should-retry'}, 'false', 'there is nothing to retry');
ok(!$first->{headers}{'idempotent-replayed'}, 'and it is no replay');

my $again = post($pi, [ @payment, 'metadata[order]' => '42' ], key => 'k1');
is(word($again), '200 replayed', 'the same again is a replay');
is($again->{body}, $first->{body}, 'byte for byte');
is($again->{headers}{'original-request'}, $first->{headers}{'request-id'}, 'of that request');
isnt($again->{headers}{'request-id'}, $first->{headers}{'request-id'}, 'by another one');
is($stripe->charges(key => 'k1'), 1, 'one charge');

my $other = post($pi, [ @payment, 'metadata[order]' => '43' ], key => 'k1');
is(word($other), '400 idempotency_error', 'other parameters');
is($other->{json}{error}{message},
	'Keys for idempotent requests can only be used with the same parameters they were first used '
	  . q{with. Try using a key other than 'k1' if you meant to execute a different request.},
	'in the words of Stripe');
$other = post('/v1/customers', [], key => 'k1');
is(word($other), '400 idempotency_error', 'another endpoint');
is($other->{json}{error}{message},
	'Keys for idempotent requests can only be used for the same endpoint they were first used for '
	  . q{('/v1/customers' vs '/v1/payment_intents'). Try using a key other than 'k1' if you meant }
	  . 'to execute a different request.',
	'in the words of Stripe');
is(word(post($pi, [ 'metadata[order]' => '42', @payment ], key => 'k1')),
	'200 replayed', 'the order of parameters makes no difference');
$stripe->settings(compare => 'bytes');
is(word(post($pi, [ 'metadata[order]' => '42', @payment ], key => 'k1')),
	'400 idempotency_error', 'unless bytes are compared');
$stripe->settings(compare => 'params');

is(word(post($pi, \@payment, key => 'x' x 255)), '200', 'a key of 255 characters');
like(word(post($pi, \@payment, key => 'x' x 256)), qr/^400/, 'and none of 256');
is($stripe->charges, 2, 'two charges so far');

# scope: account and mode
is(word(post($pi, \@payment, key => 'k1', headers => { 'Stripe-Account' => 'acct_2' })),
	'200', 'another account has keys of its own');
is(word(post($pi, \@payment, key => 'k1', api_key => 'sk_live_123')), '200', 'as has live mode');
is(word(get("$pi/$first->{json}{id}", undef, headers => { 'Stripe-Account' => 'acct_2' })),
	'404 resource_missing', 'and objects');

# what is saved
foreach my $case (
	[ 'a decline', '402 card_declined', [ @payment[ 0 .. 5 ], payment_method => 'pm_card_chargeDeclined' ] ],
	[ 'an unknown customer', '400 resource_missing', [ @payment, customer => 'cus_no' ] ],
	[ 'a missing object', '404 resource_missing', [], '/v1/payment_intents/pi_no/confirm' ])
{
	my ($name, $word, $body, $path) = @$case;
	my $answer = post($path // $pi, $body, key => $name);
	is(word($answer), $word, $name);
	my $replay = post($path // $pi, $body, key => $name);
	is(word($replay), "$word replayed", "$name is saved");
	is($replay->{body}, $answer->{body}, "$name is saved with its body");
	is($replay->{headers}{'original-request'}, $answer->{headers}{'request-id'},
		"$name is saved with its request");
}

# what isn't
foreach my $case (
	[ 'a missing parameter', '400 parameter_missing', [ currency => 'usd' ] ],
	[ 'an unknown parameter', '400 parameter_unknown', [ @payment, foo => 1 ] ],
	[ 'a bad integer', '400 parameter_invalid_integer', [ amount => 'x', currency => 'usd' ] ],
	[ 'no API key', '401 invalid_request_error', \@payment, headers => { Authorization => undef } ],
	[ 'a malformed API key', '401 invalid_request_error', \@payment, api_key => 'nonsense' ],
	[ 'a publishable key', '403 secret_key_required', \@payment, api_key => 'pk_test_123' ])
{
	my ($name, $word, $body, %params) = @$case;
	is(word(post($pi, $body, key => $name, %params)), $word, $name);
	is(word(post($pi, [ @payment, 'metadata[case]' => $name ], key => $name)),
		'200', "$name isn't saved");
	is($stripe->charges(metadata => { case => $name }), 1, "$name: one charge");
}

# while the first is under way
my $fault = $stripe->fault('hang_in_use', match => { key => 'slow' });
my $slow = connection();
syswrite($slow, request_text('POST', $pi, \@payment, key => 'slow'));
$stripe->wait_fault($fault, holding => 1);
my $busy = post($pi, \@payment, key => 'slow');
is(word($busy), '409 idempotency_key_in_use', 'a key in use');
is($busy->{json}{error}{type}, 'invalid_request_error', 'has an error type that is often misquoted');
is($busy->{json}{error}{message},
	'There is currently another in-progress request using this Idempotent Key (that probably means '
	  . 'you submitted twice, and the other request is still going through): slow. Please try again '
	  . 'later.',
	'in the words of Stripe');
is($stripe->charges(key => 'slow'), 0, 'nothing is charged yet');
is($stripe->control('GET', 'idempotency', { key => 'slow' })->{keys}[0]{state},
	'in_progress', 'the control API knows of it');
is($stripe->release($fault), 1, 'released');
is(word(answer($slow)), '200', 'it goes on');
is(word(post($pi, \@payment, key => 'slow')), '200 replayed', 'and is replayed');
is($stripe->charges(key => 'slow'), 1, 'charged once');

# a client that has left doesn't stop what it began
$fault = $stripe->fault('hang_in_use', match => { key => 'left' }, on_leave => 'hold');
$slow = connection();
syswrite($slow, request_text('POST', $pi, \@payment, key => 'left'));
$stripe->wait_fault($fault, holding => 1);
close($slow);
$stripe->wait_fault($fault, gone => 1);
is(word(post($pi, \@payment, key => 'left')), '409 idempotency_key_in_use', 'its client left');
$stripe->release($fault);
released('left');
is(word(post($pi, \@payment, key => 'left')),
	'200 replayed', 'which has no influence on the effect');
is($stripe->charges(key => 'left'), 1, 'charged once');

# Wait until a key isn't in use any more.
sub released
{
	my ($key) = @_;

	foreach (1 .. 1000)
	{
		my ($known) = @{ $stripe->control('GET', 'idempotency', { key => $key })->{keys} };
		return 1 if !$known || $known->{state} eq 'saved';
		select(undef, undef, undef, 0.005);
	}
	die "$key is still in use";
}

# the window
my $start = $stripe->advance(0);
is(word(post($pi, \@payment, key => 'old')), '200', 'a key at its first use');
$stripe->advance($day - 60);
is(word(post($pi, \@payment, key => 'old')), '200 replayed', 'a minute before a day has passed');
$stripe->advance(120);
is(word(post($pi, \@payment, key => 'old')), '200', 'and a minute after it: a new request');
is($stripe->charges(key => 'old'), 2, 'which is a second charge');

# no meaning elsewhere
my $customer = post('/v1/customers', [ email => 'a@example.org' ])->{json}{id};
is(word(ask('DELETE', "/v1/customers/$customer", undef, key => 'd')), '200', 'DELETE');
is(word(ask('DELETE', "/v1/customers/$customer", undef, key => 'd')),
	'404 resource_missing', 'takes no key');
is(word(get($pi, undef, key => 'k1')), '200', 'nor does GET');

#
# API v2: a success gives the object as it is now, a failure is tried again
#

my $outbound = '/v2/money_management/outbound_payments';
my %v2 = (headers => { 'Content-Type' => 'application/json', 'Stripe-Version' => '2026-10-28.endive' });
my $sent = $json->encode({
	from => { financial_account => 'fa_1', currency => 'usd' },
	to => { recipient => 'acct_3' },
	amount => { value => 100, currency => 'usd' } });
$first = post($outbound, $sent, key => 'v2', %v2);
is(word($first), '200', 'API v2');
like($first->{json}{id}, qr/^obp_/, 'makes an object');
is(word(post("$outbound/$first->{json}{id}/cancel", '{}', %v2)), '200', 'which changes');
$again = post($outbound, $sent, key => 'v2', %v2);
is($again->{json}{id}, $first->{json}{id}, 'the same key gives the same object');
is($again->{json}{status}, 'canceled', 'as it is now');
$stripe->advance(29 * $day);
is(post($outbound, $sent, key => 'v2', %v2)->{json}{id}, $first->{json}{id}, 'for 29 days');
$stripe->advance(2 * $day);
isnt(post($outbound, $sent, key => 'v2', %v2)->{json}{id}, $first->{json}{id}, 'not for 31');
$stripe->fault('500', match => { key => 'v2 failed' });
is(word(post($outbound, $sent, key => 'v2 failed', %v2)), '500 api_error', 'a failure');
is(word(post($outbound, $sent, key => 'v2 failed', %v2)), '200', 'is executed again');
is($stripe->effects(key => 'v2 failed'), 1, 'one effect');
$stripe->fault('500', match => { key => 'v2 twice' });
is(word(post($outbound, $sent, key => 'v2 twice', %v2)), '500 api_error', 'another failure');
$fault = $stripe->fault('hang_in_use', match => { key => 'v2 twice' });
$slow = connection();
syswrite($slow, request_text('POST', $outbound, $sent, key => 'v2 twice', %v2));
$stripe->wait_fault($fault, holding => 1);
is(word(post($outbound, $sent, key => 'v2 twice', %v2)),
	'409 idempotency_key_in_use', 'is executed again by one at a time');
$stripe->release($fault);
is(word(answer($slow)), '200', 'which succeeds');
is($stripe->effects(key => 'v2 twice'), 1, 'with one effect');
is(word(post($outbound, $sent, key => 'x', headers => { 'Content-Type' => 'application/json' })),
	'400 invalid_request_error', 'a version is demanded');
my $destination = post('/v2/core/event_destinations',
	$json->encode({ name => 'd', type => 'webhook_endpoint', event_payload => 'thin',
			enabled_events => ['*'] }), %v2)->{json}{id};
foreach my $times ('first', 'second')
{
	is(word(ask('DELETE', "/v2/core/event_destinations/$destination", undef, key => 'v2 d', %v2)),
		'200', "DELETE has a key, the $times time");
}
is(word(ask('DELETE', "/v2/core/event_destinations/$destination", undef, %v2)),
	'404 resource_missing', 'and without it tells of the first');

#
# Who asks, and for whom
#

$stripe->reset;
is(scalar($stripe->arrivals), 0, 'a reset forgets what arrived');
is($stripe->charges, 0, 'and what was charged');
cmp_ok($stripe->advance(0), '<', $start + $day, 'and brings the clock back');

is(post('/v1/customers', [])->{json}{livemode}, $false, 'test mode');
is(post('/v1/customers', [], api_key => 'sk_live_123')->{json}{livemode}, $true, 'live mode');
is(word(ask('POST', '/v1/customers', [], headers => { Authorization => 'Basic c2tfdGVzdF8xMjM6' })),
	'200', 'Basic works as well');
$stripe->control('POST', 'keys', { key => 'rk_test_1', permissions => ['rak_charge_write'] });
is(word(get('/v1/charges', undef, api_key => 'rk_test_1')), '200', 'who may write may read');
my $refused = post('/v1/customers', [], api_key => 'rk_test_1');
is(word($refused), '403 invalid_request_error', 'a restricted key');
like($refused->{json}{error}{message}, qr/'rak_customer_write' permission/, 'lacks a permission');
$stripe->control('POST', 'keys', { key => 'sk_test_rolled', expired => $true });
is(word(get('/v1/charges', undef, api_key => 'sk_test_rolled')), '401 api_key_expired', 'expired');
unlike(get('/v1/charges', undef, api_key => 'nonsense_that_is_secret')->{body}, qr/that_is_secret/,
	'no key comes back');
$stripe->control('POST', 'accounts', { id => 'acct_closed', access => $false });
foreach my $case (
	[ 200, 'Stripe-Account' => 'acct_2' ], [ 200, 'Stripe-Context' => 'acct_2/acct_3' ],
	[ 403, 'Stripe-Account' => 'acct_closed' ], [ 403, 'Stripe-Account' => '../x' ],
	[ 400, 'Stripe-Account' => 'acct_2', 'Stripe-Context' => 'acct_2' ],
	[ 200, 'Stripe-Version' => '2026-10-28.endive' ], [ 400, 'Stripe-Version' => 'tomorrow' ])
{
	my ($status, %headers) = @$case;
	is(get('/v1/charges', undef, headers => \%headers)->{status},
		$status, join(' ', map { "$_: $headers{$_}" } sort keys %headers));
}
is(get('/v1/charges', undef, headers => { 'Stripe-Version' => '2025-01-27.acacia' })
	  ->{headers}{'stripe-version'},
	'2025-01-27.acacia', 'the version is echoed');
is(word(get('/v1/nothing')), '404 invalid_request_error', 'an unknown URL');

#
# Objects
#

$stripe->reset;
my $intent = post($pi, [ amount => 2000, currency => 'USD', 'metadata[order]' => 'A1' ])->{json};
is($intent->{status}, 'requires_payment_method', 'an intent without a payment method');
is(word(post("$pi/$intent->{id}/confirm", [])), '400 payment_intent_unexpected_state', 'confirmed');
my $declined = post("$pi/$intent->{id}/confirm",
	[ payment_method => 'pm_card_chargeDeclinedInsufficientFunds' ])->{json}{error};
is($declined->{decline_code}, 'insufficient_funds', 'declined');
is($declined->{type}, 'card_error', 'by the card');
is($declined->{payment_intent}{id}, $intent->{id}, 'the error has the intent');
like($declined->{charge}, qr/^ch_/, 'and the charge');
is($declined->{payment_intent}{status}, 'requires_payment_method', 'which waits for another card');
is($stripe->charges, 0, 'no charge');
is($stripe->effects(type => 'charge', status => 'failed'), 1, 'but a failed one');
my $paid = post("$pi/$intent->{id}/confirm", [ payment_method => 'pm_card_visa' ])->{json};
is($paid->{status}, 'succeeded', 'paid by another card');
is($stripe->charges(metadata => { order => 'A1' }), 1, 'one charge by its metadata');
is(get("$pi/$intent->{id}", [ 'expand[0]' => 'latest_charge' ])->{json}{latest_charge}{amount},
	2000, 'retrieved, with its charge');
my $refund = post('/v1/refunds', [ payment_intent => $intent->{id}, amount => 500 ])->{json};
like($refund->{id}, qr/^re_/, 'a refund');
is(word(post('/v1/refunds', [ charge => $paid->{latest_charge}, amount => 1501 ])),
	'400 invalid_request_error', 'not more than there is');
is(word(post('/v1/refunds', [ charge => $paid->{latest_charge} ])), '200', 'the rest of it');
is(word(post('/v1/refunds', [ charge => $paid->{latest_charge} ])),
	'400 charge_already_refunded', 'and no more');
is(scalar @{ get('/v1/refunds', [ charge => $paid->{latest_charge} ])->{json}{data} },
	2, 'a list of refunds');

my $manual = post($pi, [ @payment, capture_method => 'manual' ])->{json};
is($manual->{status}, 'requires_capture', 'to be captured');
is(post("$pi/$manual->{id}/capture", [ amount_to_capture => 1500 ])->{json}{amount_received},
	1500, 'captured');
is(word(post("$pi/$manual->{id}/capture", [])), '400 payment_intent_unexpected_state', 'once');
is(word(post("$pi/$manual->{id}/cancel", [])), '400 payment_intent_unexpected_state', 'no way back');
$manual = post($pi, [ amount => 10, currency => 'eur' ])->{json};
is(post("$pi/$manual->{id}/cancel", [ cancellation_reason => 'abandoned' ])->{json}{status},
	'canceled', 'canceled');
is(post($pi, [ @payment[ 0 .. 5 ], payment_method => 'pm_card_authenticationRequired' ])->{json}{status},
	'requires_action', 'a card that wants its owner');

my $charge = post('/v1/charges', [ amount => 5, currency => 'usd', source => 'tok_visa' ])->{json};
ok($charge->{paid}, 'a charge');
is(word(post('/v1/charges', [ amount => 5, currency => 'usd', source => 'tok_chargeDeclined' ])),
	'402 card_declined', 'a charge that is declined');
is(get("/v1/charges/$charge->{id}")->{json}{id}, $charge->{id}, 'retrieved');

$customer = post('/v1/customers',
	[ email => 'a@example.org', payment_method => 'pm_card_visa',
		'invoice_settings[default_payment_method]' => 'pm_card_visa' ])->{json};
is(post("/v1/customers/$customer->{id}",
		[ 'metadata[a]' => '1', 'metadata[b]' => '2', name => 'A' ])->{json}{name},
	'A', 'a customer, changed');
is_deeply(post("/v1/customers/$customer->{id}", [ 'metadata[a]' => '' ])->{json}{metadata},
	{ b => '2' }, 'an empty value removes its key');
is_deeply(post("/v1/customers/$customer->{id}", [ metadata => '' ])->{json}{metadata},
	{}, 'an empty metadata removes all');
is(word(post("/v1/customers/$customer->{id}", [ name => '' ])), '200', 'an empty value unsets');
my $empty = post($pi, [ @payment, customer => '' ]);
is(word($empty) . " $empty->{json}{error}{param}", '400 parameter_invalid_empty customer', 'but not where something is created');
is(word(post($pi, [ @payment, metadata => '' ])), '200', 'other than metadata');

my $price = post('/v1/prices',
	[ currency => 'usd', unit_amount => 900, 'recurring[interval]' => 'month',
		'product_data[name]' => 'Gold' ])->{json}{id};
my $before = $stripe->charges;
my $subscription = post('/v1/subscriptions',
	[ customer => $customer->{id}, 'items[0][price]' => $price, 'items[0][quantity]' => 2 ])->{json};
is($subscription->{status}, 'active', 'a subscription');
is($stripe->charges - $before, 1, 'which charges');
is(ask('DELETE', "/v1/subscriptions/$subscription->{id}")->{json}{status}, 'canceled', 'canceled');
is(word(ask('DELETE', "/v1/subscriptions/$subscription->{id}")), '404 resource_missing', 'once');

my @session = (mode => 'payment', success_url => 'https://example.org/',
	'line_items[0][price_data][currency]' => 'usd', 'line_items[0][price_data][unit_amount]' => 700,
	'line_items[0][price_data][product_data][name]' => 'Book', 'line_items[0][quantity]' => 1);
my $session =
  post('/v1/checkout/sessions', [ @session, 'payment_intent_data[metadata][order]' => 'C1' ])->{json};
like($session->{id}, qr/^cs_test_/, 'a checkout session');
$stripe->control('POST', "checkout/$session->{id}/complete", {});
my $complete = get("/v1/checkout/sessions/$session->{id}")->{json};
is($complete->{payment_status}, 'paid', 'paid by the customer');
is($stripe->charges(metadata => { order => 'C1' }), 1, 'one charge');
is(get('/v1/checkout/sessions', [ payment_intent => $complete->{payment_intent} ])
	  ->{json}{data}[0]{id},
	$session->{id}, 'found by its intent');
$session = post('/v1/checkout/sessions', \@session)->{json};
is(post("/v1/checkout/sessions/$session->{id}/expire", [])->{json}{status}, 'expired', 'expired');

my $transfer = post('/v1/transfers',
	[ amount => 100, currency => 'usd', destination => 'acct_2', transfer_group => 'g' ])->{json};
like($transfer->{id}, qr/^tr_/, 'a transfer');
is(word(post("/v1/transfers/$transfer->{id}/reversals", [ amount => 40 ])), '200', 'reversed');
is(get('/v1/transfers', [ transfer_group => 'g' ])->{json}{data}[0]{amount_reversed},
	40, 'in the list');

#
# Lists and search
#

$stripe->reset;
foreach my $i (1 .. 5)
{
	post($pi, [ amount => 100 * $i, currency => 'usd', 'metadata[order]' => "Order $i" ]);
	$stripe->advance(10);
}
my $page = get($pi, [ limit => 2 ])->{json};
is_deeply([ map { $_->{amount} } @{ $page->{data} } ], [ 500, 400 ], 'a list begins with the newest');
ok($page->{has_more}, 'there is more');
$page = get($pi, [ limit => 2, starting_after => $page->{data}[1]{id} ])->{json};
is_deeply([ map { $_->{amount} } @{ $page->{data} } ], [ 300, 200 ], 'the next page');
is_deeply([ map { $_->{amount} }
		  @{ get($pi, [ limit => 1, ending_before => $page->{data}[0]{id} ])->{json}{data} } ],
	[400], 'and backwards');
my $created = $page->{data}[0]{created};
is(scalar @{ get($pi, [ 'created[gte]' => $created, 'created[lt]' => $created + 10 ])->{json}{data} },
	1, 'by time');
is(word(get($pi, [ limit => 101 ])), '400 parameter_invalid_integer', 'at most 100');

sub found
{
	my ($query, %more) = @_;
	my $answer = get("$pi/search", [ query => $query, %more ]);

	return $answer->{status} unless $answer->{json}{data};
	return join(' ', sort { $a <=> $b } map { $_->{amount} } @{ $answer->{json}{data} });
}

is(found(q{metadata['order']:'order 3'}), '300', 'search by metadata, whatever the case');
is(found(q{amount>200 AND amount<=400}), '300 400', 'by two clauses');
is(found(q{amount=100 OR metadata["order"]:"Order 5"}), '100 500', 'by either of two');
is(found(q{-metadata['order']:'Order 1' AND currency:'usd'}), '200 300 400 500', 'by what it is not');
is(found(q{metadata['order']:'it\'s'}), '', 'a quote in it');
is(found(q{amount=1 OR amount=2 AND amount=3}), '400', 'not by both kinds');
is(found(q{nothing:'x'}), '400', 'not by an unknown field');
$stripe->settings(search_lag => 60);
post($pi, [ amount => 600, currency => 'usd' ]);
is(found('amount=600'), '', 'search lags behind');
is(get($pi, [ limit => 1 ])->{json}{data}[0]{amount}, 600, 'a list does not');
$stripe->advance(61);
is(found('amount=600'), '600', 'search catches up');

#
# Events and webhooks
#

$stripe->reset;
my @secrets = ('whsec_test_old', 'whsec_test_new');
my $endpoint = $stripe->webhook_endpoint(secrets => \@secrets, enabled_events => ['payment_intent.*']);
$intent = post($pi, \@payment, key => 'evented')->{json};
my $delivery = $stripe->next_webhook(type => 'payment_intent.succeeded');
my $event = $json->decode(decode_base64($delivery->{body_base64}));
is($event->{request}{idempotency_key}, 'evented', 'an event has the key');
is($event->{data}{object}{id}, $intent->{id}, 'and the object');
my ($t, $v1) = $delivery->{headers}{'Stripe-Signature'} =~ /^t=(\d+),(.*)$/;
is($v1 =~ s/,v0=[0-9a-f]{64}$//r,
	join(',', map { 'v1=' . hmac_sha256_hex("$t." . decode_base64($delivery->{body_base64}), $_) } @secrets),
	'one signature for each secret');
is($stripe->next_webhook->{type}, 'payment_intent.created', 'the next delivery');
is($stripe->next_webhook, undef, 'and no more');
post($pi, \@payment, api_key => 'sk_live_123');
is($stripe->next_webhook, undef, 'nor of live mode');
post($pi, \@payment, headers => { 'Stripe-Account' => 'acct_2' });
is($stripe->next_webhook, undef, 'nor of another account');
my $connect = $stripe->webhook_endpoint(connect => $true);
post('/v1/customers', [], headers => { 'Stripe-Account' => 'acct_2' });
$delivery = $stripe->next_webhook(endpoint => $connect);
is($json->decode(decode_base64($delivery->{body_base64}))->{account},
	'acct_2', 'unless the endpoint is for connected ones');
$stripe->control('DELETE', "webhooks/$connect");
is(get("/v1/events/$event->{id}")->{json}{type}, $event->{type}, 'events can be retrieved');
is(scalar @{ get('/v1/events', [ 'types[0]' => 'charge.succeeded' ])->{json}{data} },
	1, 'and listed by type');
$stripe->control('POST', 'webhooks/resend', { event => $event->{id} });
is($stripe->next_webhook->{event}, $event->{id}, 'an event can be sent again');
is($stripe->control('POST', 'webhooks/sign', { body => 'x', secrets => ['whsec_test'], t => 1 })
	  ->{headers}{'Stripe-Signature'},
	't=1,v1=' . hmac_sha256_hex('1.x', 'whsec_test'), 'anything can be signed');

# to a URL, which fails at first
my $receiver = IO::Socket::INET->new(Listen => 5, LocalAddr => '127.0.0.1');
$stripe->control('DELETE', "webhooks/$endpoint");
$stripe->webhook_endpoint(
	url => 'http://127.0.0.1:' . $receiver->sockport . '/hook',
	secrets => ['whsec_test_url'],
	enabled_events => ['customer.created']);
post('/v1/customers', [], key => 'hooked');
my @received;
foreach my $status (500, 302, 200)
{
	IO::Select->new($receiver)->can_read(10) or die 'no webhook came';
	my $socket = $receiver->accept;
	my ($head, $body) = ('', '');
	while (defined(my $line = readline($socket)))
	{
		last if $line eq "\r\n";
		$head .= $line;
	}
	my ($length) = $head =~ /Content-Length: (\d+)/;
	read($socket, $body, $length);
	print $socket "HTTP/1.1 $status X\r\nContent-Length: 0\r\n\r\n";
	close($socket);
	push @received, $head =~ /^(POST \/hook) .*Stripe-Signature: t=(\d+),v1=(\w+)/s
	  ? [ $1, $2, $3, hmac_sha256_hex("$2.$body", 'whsec_test_url') ]
	  : [$head];
	$stripe->wait_for(attempts => scalar @received);
	$stripe->advance(3600);
}
is(scalar @received, 3, 'a webhook is sent until it is answered by 2xx');
foreach my $received (@received)
{
	is($received->[2], $received->[3], "signed, at $received->[1]");
}
cmp_ok($received[0][1], '<', $received[1][1], 'anew each time');
is(join(' ', map { $_->{status} } @{ $stripe->control('GET', 'webhooks/attempts')->{attempts} }),
	'500 302 200', 'the attempts are known');
ok(!eval { $stripe->webhook_endpoint(url => 'http://192.0.2.1/'); 1 }, 'only to loopback');

#
# Faults: what the client sees, and what happened
#

# [name, what, parameters, what the client sees, charges then, the same key
# again, charges after that]
my @faults = (
	[ 'reset_before', {}, 'reset', 0, '200', 1 ],
	[ 'reset_after', {}, 'reset', 1, '200 replayed', 1 ],
	[ 'close_before', {}, 'eof', 0, '200', 1 ],
	[ 'close_after', {}, 'eof', 1, '200 replayed', 1 ],
	[ 'hang_before', { ms => 30 }, '200', 1, '200 replayed', 1 ],
	[ 'hang_after', { ms => 30 }, '200', 1, '200 replayed', 1 ],
	[ 'cut', {}, '200 eof', 1, '200 replayed', 1 ],
	[ 'cut', { how => 'rst', keep => 10 }, '200 reset', 1, '200 replayed', 1 ],
	[ 'cut', { chunked => $true }, '200 eof', 1, '200 replayed', 1 ],
	[ 'cut', { where => 'head' }, 'eof', 1, '200 replayed', 1 ],
	[ 'garbled', { where => 'head' }, 'garbled', 1, '200 replayed', 1 ],
	[ '401', {}, '401 invalid_request_error', 0, '200', 1 ],
	[ '403', {}, '403 invalid_request_error', 0, '200', 1 ],
	[ '409_in_use', {}, '409 idempotency_key_in_use', 0, '200', 1 ],
	[ '409', {}, '409 invalid_request_error', 0, '200', 1 ],
	[ '424', {}, '424 api_error', 0, '200', 1 ],
	[ '424', { saved => $true, effect => $true }, '424 api_error', 1, '424 api_error replayed', 1 ],
	[ '424', { effect => $true }, '424 api_error', 1, '200', 2 ],
	[ '429', {}, '429 rate_limit', 0, '200', 1 ],
	[ '429_lock_timeout', {}, '429 lock_timeout', 0, '200', 1 ],
	[ '500', {}, '500 api_error', 0, '500 api_error replayed', 0 ],
	[ '500', { effect => $true }, '500 api_error', 1, '500 api_error replayed', 1 ],
	[ '500_unsaved', {}, '500 api_error', 0, '200', 1 ],
	[ '502', {}, '502', 0, '200', 1 ],
	[ '503', {}, '503', 0, '200', 1 ],
	[ '503', { effect => $true }, '503', 1, '200 replayed', 1 ],
	[ '503', { json => $true }, '503 api_error', 0, '200', 1 ],
	[ '504', { effect => $true }, '504', 1, '200 replayed', 1 ],
	[ 'redirect', {}, '307', 0, '200', 1 ],
	[ 'redirect', { effect => $true, status => 302 }, '302', 1, '200 replayed', 1 ],
	[ 'gateway', {}, '403', 0, '200', 1 ],
	[ 'gateway', { effect => $true, status => 404 }, '404', 1, '200 replayed', 1 ],
	[ 'gateway', { effect => $true, status => 451, type => 'application/json', body => '{"message": "no"}' },
		'451', 1, '200 replayed', 1 ],
	[ 'gateway', { status => 204 }, '204', 0, '200', 1 ],
	[ 'gateway', { effect => $true, status => 201, body => '' }, '201', 1, '200 replayed', 1 ],
	[ 'not_json', {}, '200', 1, '200 replayed', 1 ],
	[ 'not_json', { effect => $false }, '200', 0, '200', 1 ],
	[ 'not_json', { body => '', status => 204 }, '204', 1, '200 replayed', 1 ],
	[ 'garbled', {}, '200', 1, '200 replayed', 1 ],
	[ 'drip', { bytes => 200, ms => 1 }, '200', 1, '200 replayed', 1 ],
	[ 'drip', { bytes => 400, ms => 1, where => 'head' }, '200', 1, '200 replayed', 1 ],
	[ 'huge', { bytes => 1 << 20 }, '200', 1, '200 replayed', 1 ],
	[ 'huge', { bytes => 1 << 19, chunked => $true }, '200', 1, '200 replayed', 1 ],
	[ 'close_idle', {}, '200', 1, '200 replayed', 1 ],
	[ 'reset_idle', {}, '200', 1, '200 replayed', 1 ],
	[ 'reset_connection', {}, 'reset', 0, '200', 1 ],
	[ 'close_connection', {}, qr/^(eof|reset)$/, 0, '200', 1 ]);

my %struck;
foreach my $case (@faults)
{
	my ($what, $given, $seen, $charged, $retried, $charged_finally) = @$case;
	my $name = $what . ' ' . JSON::PP->new->canonical->encode($given);

	$struck{$what} = 1;
	$stripe->reset;
	$stripe->fault($what, %$given);
	my $answer = post($pi, \@payment, key => $name);
	ref $seen ? like(word($answer), $seen, "$name is seen") : is(word($answer), $seen, "$name is seen");
	is($stripe->charges(key => $name), $charged, "$name: charges then");
	is(word(post($pi, \@payment, key => $name)), $retried, "$name: the same key again");
	is($stripe->charges(key => $name), $charged_finally, "$name: charges in the end");
	is(scalar($stripe->arrivals(key => $name)), $what =~ /connection/ ? 1 : 2, "$name: arrivals");

	my $whole = $answer->{json} && !$answer->{json}{error};
	is(!!$whole, !!1, "$name is JSON") if $what =~ /^(hang|drip|huge$)/ && !$given->{chunked};
	ok(!$whole, "$name is no JSON") if $what =~ /^(not_json|garbled|cut)/;
	is(length($answer->{body}), $given->{bytes}, "$name: its size")
	  if $what eq 'huge' && !$given->{chunked};
	cmp_ok(length($answer->{body}), '>', $given->{bytes}, "$name: its size")
	  if $what eq 'huge' && $given->{chunked};
	is($answer->{headers}{location}, 'http://127.0.0.1:9/elsewhere', "$name: where to") if $what eq 'redirect';
	is(($stripe->arrivals(key => $name))[0]{answer}{intermediary}, $what =~ /^(gateway|redirect|not_json|50[234])$/ ? $what : undef,
		"$name: whose answer it was")
	  if $what !~ /connection/;
	is($answer->{headers}{'stripe-rate-limited-reason'}, $what eq '429' ? 'global-rate' : undef,
		"$name: the reason") if $what =~ /^429/;
}

# Stripe-Should-Retry and other headers
foreach my $what ('409', '424', '429_lock_timeout', '500', '503')
{
	foreach my $value ($true, $false)
	{
		$stripe->fault($what, should_retry => $value, headers => { 'Retry-After' => '7' });
		my $headers = post($pi, \@payment, key => "$what $value")->{headers};
		is($headers->{'stripe-should-retry'}, $value ? 'true' : 'false', "$what: whether to retry");
		is($headers->{'retry-after'}, '7', "$what: any other header");
	}
	$stripe->fault($what);
	ok(!exists post($pi, \@payment, key => "$what -")->{headers}{'stripe-should-retry'},
		"$what doesn't say by itself");
}

# which request meets a fault
$stripe->reset;
$fault = $stripe->fault('503', nth => 2, times => 2, match => { path => '/v1/pay*', method => 'POST' });
is(join(' ', map { word(post($pi, [ amount => 1, currency => 'usd' ])) } 1 .. 4),
	'200 503 503 200', 'nth and times');
is(word(post('/v1/customers', [])), '200', 'only where the path matches');
is_deeply([ @{ $stripe->control('GET', "faults/$fault") }{qw(seen fired)} ], [ 4, 2 ], 'it counts');
foreach my $case (
	[ { key => 'k' }, [ key => 'k' ], [ key => 'l' ] ],
	[ { account => 'acct_2' }, [ headers => { 'Stripe-Account' => 'acct_2' } ], [] ],
	[ { livemode => $true }, [ api_key => 'sk_live_123' ], [] ])
{
	my ($match, $hit, $miss) = @$case;
	$stripe->reset;
	$stripe->fault('502', times => 0, match => $match);
	is(word(post('/v1/customers', [], @$_)), $_ == $hit ? '502' : '200',
		'match by ' . join(' ', keys %$match)) foreach $hit, $miss;
}
ok(!eval { $stripe->fault(@$_); 1 }, 'a fault is refused that makes no sense')
  foreach [ 'rest_before' ], [ '503', tims => 1 ], [ '503', match => { pth => 'x' } ],
  [ 'hang_after', ms => 'x' ], [ '503', nth => 0 ], [ 'reset_connection', match => { path => 'x' } ];

# several at once
$stripe->reset;
$stripe->fault('close_after');
$stripe->fault('503');
is(word(post($pi, \@payment, key => 'both')), '503', 'a fault at the gate comes first');
is(word(post($pi, \@payment, key => 'both')), 'eof', 'one for the answer waits for an answer');
$stripe->fault('500');
$stripe->fault('close_after');
is(word(post($pi, \@payment, key => 'lost 500')), 'eof', 'two can strike one request');
is(word(post($pi, \@payment, key => 'lost 500')), '500 api_error replayed', 'a lost and saved 500');
my @effects = $stripe->effects;
is($stripe->effects(since => $effects[-2]{effect}), 1, 'effects since the last but one');

# hangs
$stripe->reset;
$fault = $stripe->fault('hang_before');
$slow = connection();
syswrite($slow, request_text('POST', $pi, \@payment, key => 'before'));
$stripe->wait_fault($fault, holding => 1);
close($slow);
$stripe->wait_fault($fault, gone => 1);
is($stripe->charges, 0, 'hang_before: a client that leaves prevents the effect');
is($stripe->arrivals, 1, 'its request is an arrival all the same');
$fault = $stripe->fault('hang_before', on_leave => 'continue', match => { key => 'go on' });
$slow = connection();
syswrite($slow, request_text('POST', $pi, \@payment, key => 'go on'));
$stripe->wait_fault($fault, holding => 1);
close($slow);
$stripe->wait_fault($fault, gone => 1);
$stripe->wait_for(charges => 1);
is($stripe->charges(key => 'go on'), 1, 'unless the fault says that it goes on');
$fault = $stripe->fault('hang_after', match => { key => 'after' });
$slow = connection();
syswrite($slow, request_text('POST', $pi, \@payment, key => 'after'));
$stripe->wait_fault($fault, holding => 1);
is($stripe->charges(key => 'after'), 1, 'hang_after: the effect is there before the answer');
is(word(post($pi, \@payment, key => 'after')), '200 replayed', 'for others, too');
$stripe->release;
is(word(answer($slow)), '200', 'the answer comes once it is released');
$fault = $stripe->fault('hang_in_use', match => { key => 'reset' });
$slow = connection();
syswrite($slow, request_text('POST', $pi, \@payment, key => 'reset'));
$stripe->wait_fault($fault, holding => 1);
$stripe->reset;
is(word(answer($slow)), 'eof', 'a reset ends what hangs');
is($stripe->charges, 0, 'without effect');

# connections
$stripe->reset;
my $kept = connection();
is(word(post($pi, \@payment, key => 'c1', on => $kept)), '200', 'a connection');
is(word(post($pi, \@payment, key => 'c2', on => $kept)), '200', 'is kept alive');
my @arrivals = $stripe->arrivals(path => $pi);
is($arrivals[0]{connection}, $arrivals[1]{connection}, 'both on one connection');
is_deeply([ map { $_->{request} } @arrivals ], [ 1, 2 ], 'and numbered on it');
is(decode_base64($arrivals[0]{body_base64}), join('&', form(@payment)), 'with their bodies');
is_deeply([ grep { $_->[0] eq 'Idempotency-Key' } @{ $arrivals[1]{headers} } ],
	[ [ 'Idempotency-Key', 'c2' ] ], 'and headers');
foreach my $how ('fin', 'rst')
{
	my $idle = connection();
	post($pi, \@payment, on => $idle);
	$stripe->control('POST', 'connections/close', { how => $how });
	is(answer($idle)->{end}, $how eq 'fin' ? 'eof' : 'reset', "an idle connection ends by $how");
}
foreach my $what ('close_before', 'reset_before', 'close_idle', 'reset_idle')
{
	my $idle = connection();
	$stripe->reset;
	$stripe->fault($what, $what =~ /idle/ ? (ms => 10000) : (match => { reused => $true }));
	is(word(post($pi, \@payment, key => "$what 1", on => $idle)), '200', "$what: a first request");
	is(word(post($pi, \@payment, key => "$what 2", on => $idle)), $what =~ /^close/ ? 'eof' : 'reset',
		"$what: the next one meets the end");
	is($stripe->arrivals(key => "$what 2"), 1, "$what: it has arrived");
	is($stripe->charges(key => "$what 2"), 0, "$what: without effect");
}
my $half = connection();
syswrite($half, substr(request_text('POST', $pi, \@payment, key => 'half'), 0, -10));
close($half);
$stripe->wait_for(arrivals_incomplete => 1);
is($stripe->counts->{arrivals_incomplete}, 1, 'half a request is no arrival, but is seen');
is($stripe->charges(key => 'half'), 0, 'and has no effect');

my $pipelined = connection();
syswrite($pipelined, request_text('POST', $pi, \@payment) . request_text('GET', $pi));
is(word(answer($pipelined)), '200', 'requests may be sent at once');
my $chunked = connection();
syswrite($chunked, "POST /v1/customers HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk_test_1\r\n"
	  . "Content-Type: application/x-www-form-urlencoded\r\nExpect: 100-continue\r\n"
	  . "Transfer-Encoding: chunked\r\n\r\n");
is(answer_line($chunked), 'HTTP/1.1 100 Continue', '100 Continue');
syswrite($chunked, "5\r\nname=\r\n3\r\nAnn\r\n0\r\n\r\n");
is(answer($chunked)->{json}{name}, 'Ann', 'a body in chunks');

sub answer_line
{
	my ($socket) = @_;
	my $line = '';

	sysread($socket, $line, 1, length($line)) while $line !~ /\r\n\r\n\z/ && length($line) < 1000;
	return $line =~ s/\r\n.*//sr;
}

# many at once: no request is lost or counted twice
$stripe->reset;
my @many = map { connection() } 1 .. 50;
syswrite($many[$_], request_text('POST', $pi, \@payment, key => 'many ' . int($_ / 2))) foreach 0 .. 49;
my %words;
$words{ word(answer($_)) }++ foreach @many;
is($words{'200'}, 25, 'of fifty requests with twenty-five keys half are executed');
is(($words{'200 replayed'} // 0) + ($words{'409 idempotency_key_in_use'} // 0), 25, 'and half are not');
is($stripe->charges, 25, 'one charge a key');
is($stripe->counts->{arrivals}, 50, 'fifty arrivals');

#
# TLS
#

foreach my $name (qw(right wrong_host unknown_ca expired))
{
	my $request = request_text('GET', '/v1/charges', undef, headers => { Connection => 'close' });
	my $port = $stripe->tls_port($name);
	open(my $file, '>', "$dir/request") or die "could not write a request: $!";
	print $file $request;
	close($file);
	my $client = "openssl s_client -quiet -verify_return_error -connect 127.0.0.1:$port"
	  . ' -verify_hostname localhost -CAfile ' . $stripe->ca;
	my $got = `$client <$dir/request 2>/dev/null`;
	like($got, $name eq 'right' ? qr/^HTTP\/1\.1 200 OK\r\n.*"object": "list"/s : qr/^$/,
		"TLS with a certificate that is $name");
}
is(scalar($stripe->arrivals(path => '/v1/charges')), 1, 'only the right one brings a request through');
ok($stripe->arrivals == 51, 'arrivals with TLS count as well');

#
# The documentation, and that no fault was left out above
#

my $help = $stripe->control('GET', '');
my $doc = do { local (@ARGV, $/) = "$FindBin::RealBin/../../doc/fake-stripe.md"; <> };
foreach my $what (@{ $help->{faults} })
{
	ok($struck{$what} || $what eq 'hang_in_use', "fault $what is tested");
	like($doc, qr/^\| [^|]*`\Q$what\E`/m, "and documented");
}
foreach my $line (sort keys %{ $help->{fake_stripe} })
{
	my ($path) = $line =~ m{(/_control/\S*)};
	like($doc, qr/\Q$path\E(?![\w\/])/, "$path is documented");
}
like($doc, qr/`$_`/, "setting $_ is documented") foreach sort keys %{ $stripe->control('GET', 'settings') };
foreach my $name (map { s/.*\///r } glob("$FindBin::RealBin/../stripe/*.py"))
{
	like($doc, qr/`$name`/, "$name is placed");
}

#
# The end
#

is_deeply($stripe->counts->{internal_errors}, [], 'no error of the fake itself');
my $pid = $stripe->{pid};
$stripe->stop;
is(kill(0, $pid), 0, 'it ends when its standard input does');
open(my $log, '<', "$dir/log") or die "could not open the log: $!";
my $lines = do { local $/; <$log> };
like($lines, qr{^POST /v1/payment_intents connection \d+ request 1 key k1 -> 200 replayed$}m, 'it logs');
unlike($lines, qr/sk_(test|live)|whsec/, 'and no secret');

done_testing();
