
# stripe_call(): one effect at Stripe, whatever happens on the way.  The fake
# is asked in the end how many charges there really were.

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

my $stripe = FakeStripe->start(tls_dir => PostgreSQL::Test::Utils::tempdir('tls') . '/tls');
my $node = stripe_node('main', $stripe, preload => 1, conf => qq{
idempotency.stripe_max_retries = 0
idempotency.stripe_timeout = '10 s'
log_statement = none
});
my $json = JSON::PP->new->utf8->canonical;
my ($true, $false) = (JSON::PP::true, JSON::PP::false);
my %payment = (amount => 2000, currency => 'usd', confirm => $true, payment_method => 'pm_card_visa');

sub pay
{
	my ($id, %values) = @_;

	$values{params} //= \%payment;
	return stripe_call($node, 'payment', $id, 'POST', '/v1/payment_intents', %values);
}

sub header
{
	my ($arrival, $name) = @_;
	my @values = map { $_->[1] } grep { lc($_->[0]) eq lc($name) } @{ $arrival->{headers} };

	die "$name came " . scalar(@values) . ' times' if @values > 1;
	return $values[0];
}

sub has
{
	my ($got, $expected, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return is_deeply({ map { $_ => $got->{$_} } keys %$expected }, $expected, $name) || diag(explain($got));
}

# the number of requests that arrive while this code runs
sub arrivals(&)
{
	my ($code) = @_;
	my $before = $stripe->counts->{arrivals};

	$code->();
	return $stripe->counts->{arrivals} - $before;
}

sub charges
{
	my ($id, $expected, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $key = operation($node, 'payment', $id)->{idempotency_key};

	is($stripe->charges(key => $key), $expected, $name // "$id: charged once");
}

#
# A call, and the same again
#

my $r = pay('first');
has($r, { outcome => 'completed', replayed => $false, resource_type => 'payment_intent', http_status => 200,
		error => undef, attempts => 1, generation => 1, retry_after => undef, livemode => $false }, 'a payment');
like($r->{resource_id}, qr/^pi_/, 'has an id');
like($r->{idempotency_key}, qr/^payment:first:[0-9a-f-]{36}$/, 'and a key');
is($r->{response}{status}, 'succeeded', 'money has moved, says the response');

my ($arrival) = $stripe->arrivals;
is("$arrival->{method} $arrival->{target}", 'POST /v1/payment_intents', 'method and path');
is($arrival->{body}, 'amount=2000&confirm=true&currency=usd&payment_method=pm_card_visa', 'body');
is(header($arrival, 'Idempotency-Key'), $r->{idempotency_key}, 'Idempotency-Key');
is(header($arrival, 'Content-Type'), 'application/x-www-form-urlencoded', 'Content-Type');
is(header($arrival, 'Content-Length'), length $arrival->{body}, 'Content-Length');
is(header($arrival, 'Stripe-Version'), '2026-10-28.endive', 'Stripe-Version');
is(header($arrival, 'Authorization'), 'Bearer ' . TEST_KEY, 'Authorization');
is(header($arrival, $_), undef, "no $_") foreach qw(Expect Transfer-Encoding Stripe-Account Stripe-Context);

my $row = operation($node, 'payment', 'first');
has($row, { outcome => 'completed', idempotency_key => $r->{idempotency_key}, generation => 1, attempt => 1,
		resource_id => $r->{resource_id}, resource_type => 'payment_intent', http_status => 200,
		request_id => $r->{request_id}, response => $r->{response}, error => undef, livemode => $false,
		method => 'POST', path => '/v1/payment_intents', api_version => '2026-10-28.endive',
		request => { method => 'POST', path => '/v1/payment_intents', params => \%payment } }, 'is recorded');

is(arrivals {
	has(pay('first'), { %$r, replayed => $true, attempts => 0 }, 'the same again is replayed');
	has(pay('first', params => { %payment, metadata => { a => 1 }, description => 'x', expand => ['customer'] }),
		{ %$r, replayed => $true, attempts => 0 }, 'metadata, description and expand may differ');
	my $other = pay('first', params => { %payment, amount => 2001 });
	has($other, { outcome => 'mismatch', resource_id => $r->{resource_id}, http_status => 200, attempts => 0,
			replayed => $false, idempotency_key => $r->{idempotency_key} }, 'another amount is a mismatch');
	is_deeply($other->{error}{recorded_request}{params}, \%payment, 'which shows what was recorded');
	is(stripe_call($node, 'payment', 'first', 'POST', '/v1/charges', params => \%payment)->{outcome}, 'mismatch',
		'another path, too');
	has(stripe_retry($node, 'payment', 'first'), { %$r, replayed => $true, attempts => 0 }, 'nothing to be retried');
}, 0, 'and nothing is sent');
is(arrivals {
	has(pay('first', settings => { stripe_api_key_file => '/nowhere' }), { %$r, replayed => $true, attempts => 0 },
		'a replay needs no API key');
}, 0, 'since nothing is sent');
charges('first', 1);
is(pay('First')->{replayed}, $false, 'another id is another operation');
is(pay('first', account => 'acct_1')->{replayed}, $false, 'and so is another account');
($arrival) = ($stripe->arrivals)[-1];
is(header($arrival, 'Stripe-Account'), 'acct_1', 'which is named');
like(slurp_file($node->logfile),
	qr/LOG:  Stripe call: POST \/v1\/payment_intents operation=payment:first generation=1 key=\Q$r->{idempotency_key}\E request_id=\Q$r->{request_id}\E livemode=false attempts=1 status=200 outcome=completed ms=\d+ /,
	'a line in the log');
unlike(slurp_file($node->logfile), qr/amount=2000|pm_card_visa/, 'without the request');

#
# The caller's transaction
#

foreach my $end ('ROLLBACK', 'SAVEPOINT s; ROLLBACK TO s; ROLLBACK')
{
	my $id = 'rolled back ' . length $end;
	my $first = $end =~ /SAVEPOINT/ ? 'SAVEPOINT s;' : '';

	my $outcome = sql($node, qq{BEGIN; $first
		SELECT resource_id FROM idempotency.stripe_call('payment', '$id', 'POST', '/v1/payment_intents',
			'{"amount": 2000, "currency": "usd", "confirm": true, "payment_method": "pm_card_visa"}');
		} . ($first ? 'ROLLBACK TO s; COMMIT' : 'ROLLBACK'));
	is(arrivals { has(pay($id), { outcome => 'completed', replayed => $true, resource_id => $outcome },
				"a call is known after $end") }, 0, 'and not sent again');
	charges($id, 1);
}
is(sql($node, q{BEGIN ISOLATION LEVEL SERIALIZABLE;
		SELECT count(*) FROM pg_class LIMIT 0;
		SELECT outcome, replayed FROM idempotency.stripe_call('payment', 'serializable', 'POST', '/v1/customers');
		SELECT outcome, replayed FROM idempotency.stripe_call('payment', 'serializable', 'POST', '/v1/customers');
		COMMIT}), "completed|f\ncompleted|t", 'at any level a transaction sees what it has done');
run_fails($node, q{BEGIN READ ONLY; SELECT FROM idempotency.stripe_call('payment', 'read only', 'POST', '/v1/customers')},
	'25006', 'not in a read-only transaction');

#
# What the call says and what the row becomes, for everything that may come
# back; then the same once more, with Stripe well again.  However it went, in the
# end there is one charge, by one key, and all bytes that were sent are the same.
#

my $faults = 0;

sub survives
{
	my ($name, $fault, $expected, %more) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my ($what, %fault) = ref $fault ? @$fault : $fault;
	my $id = 'fault ' . ++$faults;
	my $sent = delete $expected->{arrivals} // 1;
	my $after = delete $more{after} // 'completed';
	my $row = delete $more{row} // {};
	my $charged = delete $more{charged} // 1;
	my $again = delete $more{again};
	my $got;

	$stripe->fault($what, times => 0, %fault);
	is(arrivals { $got = pay($id, %more) }, $sent, "$name: arrives $sent times");
	has($got, $expected, "$name: $expected->{outcome}");
	has(operation($node, 'payment', $id), { outcome => $expected->{outcome}, http_status => $expected->{http_status},
			%$row }, "$name: recorded");
	$stripe->clear_faults;

	my $resent = arrivals { $got = pay($id) };
	is($got->{outcome}, $after, "$name: then $after") or diag(explain($got));
	is($resent, $again, "$name: sent again $again times") if defined $again;
	is($got->{idempotency_key}, operation($node, 'payment', $id)->{idempotency_key}, "$name: by the same key");
	is($stripe->charges(key => $got->{idempotency_key}), $charged, "$name: charged $charged times");

	my @sent = $stripe->arrivals(key => $got->{idempotency_key});
	my %bytes = map { $_->{body_base64} => 1 } @sent;
	is(scalar(keys %bytes), @sent ? 1 : 0, "$name: the same bytes");
	return $got;
}

my %unknown = (outcome => 'unknown', http_status => undef, retry_after => 5);

# no answer
survives($_, $_, {%unknown}, again => 1) foreach qw(close_before reset_before close_after reset_after);
survives('hangs, and nothing happens', 'hang_before', {%unknown}, again => 1, timeout => '300 ms');
survives('hangs after the effect', 'hang_after', {%unknown}, again => 1, timeout => '300 ms');
survives('still running', 'hang_in_use', {%unknown}, timeout => '300 ms', again => 1);
survives('garbled headers', [ 'garbled', where => 'head' ], {%unknown}, again => 1);

# half an answer: it is done, the same key fetches it
foreach my $case (
	[ 'cut', 'cut' ], [ 'cut by RST', [ 'cut', how => 'rst' ] ], [ 'cut in a chunk', [ 'cut', chunked => $true ] ],
	[ 'garbled', 'garbled' ], [ 'not JSON', 'not_json' ], [ 'too large', [ 'huge', bytes => 2 << 20 ] ])
{
	my $got = survives(@$case, { %unknown, http_status => 200, response => undef }, again => 1);
	is($got->{replayed}, $true, "$case->[0]: Stripe replays") ;
	like($got->{resource_id}, qr/^pi_/, "$case->[0]: the id is known");
}
survives('drips', [ 'drip', ms => 50 ], { %unknown, http_status => 200 }, again => 1, timeout => '300 ms');
survives('from somebody else', [ 'not_json', status => 404, effect => $false ], { %unknown, http_status => 404 }, again => 1);
survives("$_ in JSON, from somebody else", [ 'not_json', status => $_, body => '{"id": "no_1", "message": "no"}', effect => $false ],
	{ %unknown, http_status => $_, resource_id => undef }, again => 1,
	row => { response => undef, resource_id => undef }) foreach 400, 402, 404, 413;

# after the charge, and in words that resemble Stripe's: the key fetches the answer
foreach my $status (200, 401, 403, 404, 429, 500)
{
	foreach my $body ('<html>', '{"error": "no"}', '{"error": {"message": "no", "code": 7}}')
	{
		next if $status == 200 && $body eq '<html>';
		my $got = survives("$status after the charge: $body", [ 'not_json', status => $status, body => $body ],
			{ %unknown, http_status => $status }, again => 1, row => { response => undef });
		is($got->{replayed}, $true, "$status after the charge: $body: Stripe replays");
	}
}
survives('204 for a payment', [ 'not_json', status => 204, body => '' ], { %unknown, http_status => 204 }, again => 1);

# redirects are not followed
survives("$_ redirect", [ 'redirect', status => $_, location => $stripe->url . '/v1/payment_intents' ],
	{ %unknown, http_status => $_ }, again => 1)
  foreach 302, 307, 308;

# refusals before anything was done
my %free = (outcome => 'not_executed', retry_after => 5);
survives('401', '401', { %free, http_status => 401 }, again => 1);
survives('403', '403', { %free, http_status => 403 }, again => 1);
survives('409', '409', { %free, http_status => 409 }, again => 1);
survives('429', '429', { %free, http_status => 429 }, again => 1);
survives('429 lock_timeout', '429_lock_timeout', { %free, http_status => 429 }, again => 1);
survives('409 in use', '409_in_use', { %unknown, http_status => 409 }, again => 1);

# failures of Stripe's
survives('424, nothing done', '424', { %unknown, http_status => 424 }, again => 1);
foreach my $status (qw(502 503 504))
{
	survives("$status, nothing done", $status, { %unknown, http_status => $status }, again => 1);
	survives("$status, done", [ $status, effect => $true ], { %unknown, http_status => $status }, again => 1);
}

# a saved 500 is not hammered: what the key brings is known
survives('500, nothing done', '500', { %unknown, http_status => 500 }, after => 'unknown', again => 0, charged => 0);
survives('500, done', [ '500', effect => $true ], { %unknown, http_status => 500 }, after => 'unknown', again => 0, charged => 1);
survives('500, retried inside the call', '500', { %unknown, http_status => 500, arrivals => 2, attempts => 2, replayed => $true },
	after => 'unknown', again => 0, charged => 0, settings => { stripe_max_retries => 2 });
survives('500, not saved', '500_unsaved', { %unknown, http_status => 500 }, after => 'unknown', again => 0, charged => 0);

# inside the call
foreach my $what (qw(close_before reset_after cut 409_in_use 409 429_lock_timeout 500_unsaved 503))
{
	survives("$what, then well", [ $what, times => 1 ],
		{ outcome => 'completed', http_status => 200, attempts => 2, arrivals => 2, error => undef },
		again => 0, settings => { stripe_max_retries => 1 });
}
{
	# first unknown, then refused: unknown all the same
	$stripe->fault('close_after', times => 1);
	$stripe->fault('401', nth => 2, times => 0);
	has(pay('uncertain', settings => { stripe_max_retries => 1 }), { %unknown, http_status => 401, attempts => 2 },
		'what an attempt may have done is not undone by a refusal of the next');
	$stripe->clear_faults;
	has(pay('uncertain'), { outcome => 'completed', replayed => $true, attempts => 1 }, 'and is found');
	charges('uncertain', 1);

	# nor by a refusal that isn't Stripe's
	$stripe->fault('close_after');
	$stripe->fault('not_json', nth => 2, status => 400, body => '{"message": "no"}', effect => $false);
	has(pay('uncertain at a gateway', settings => { stripe_max_retries => 1 }), { %unknown, http_status => 400, attempts => 2 },
		'nor is it undone by something on the way to Stripe');
	$stripe->clear_faults;
	has(pay('uncertain at a gateway'), { outcome => 'completed', replayed => $true }, 'and it is found');
	charges('uncertain at a gateway', 1);

	# over two calls
	$stripe->fault('close_after');
	pay('uncertain too');
	$stripe->fault('401');
	has(pay('uncertain too'), { outcome => 'unknown', http_status => 401, attempts => 1 }, 'nor of the next call');
	has(pay('uncertain too'), { outcome => 'completed' }, 'it is found, too');
	charges('uncertain too', 1);
}

# nothing left
my $unused = sub { my $other = FakeStripe->start; my $url = $other->url; $other->stop; return $url }->();
foreach my $case (
	[ 'refused', settings => { stripe_api_base => $unused } ],
	[ 'no such host', settings => { stripe_api_base => 'https://no-such-host.invalid' } ],
	[ 'no TLS', settings => { stripe_api_base => $stripe->url =~ s/http/https/r }, timeout => '500 ms' ],
	[ 'no time', timeout => '1 us', settings => { stripe_max_retries => 3 } ],
	[ 'no time before statement_timeout', before => q{SET statement_timeout = '900 ms'} ])
{
	my ($name, %how) = @$case;

	is(arrivals { has(pay($name, %how), { %free, http_status => undef }, "$name: not executed") }, 0, "$name: nothing arrives");
	has(operation($node, 'payment', $name), { outcome => 'not_executed', first_sent_at => undef, resend_until => undef },
		"$name: and was never sent");
	is(pay($name)->{outcome}, 'completed', "$name: free to be called again");
	charges($name, 1);
}

#
# Refused for good
#

my %declined = (%payment, payment_method => 'pm_card_chargeDeclined');
$r = pay('declined', params => \%declined);
has($r, { outcome => 'failed', http_status => 402, resource_type => 'payment_intent', retry_after => undef }, 'a declined card');
is($r->{error}{code}, 'card_declined', 'says Stripe');
is($r->{resource_id}, $r->{error}{payment_intent}{id}, 'the id of what it left behind is kept');
is(arrivals { has(pay('declined', params => \%declined), { %$r, replayed => $true, attempts => 0 }, 'is replayed') }, 0,
	'and not sent again');
my $key = sql($node, q{SELECT idempotency.stripe_reopen('payment', 'declined')});
isnt($key, $r->{idempotency_key}, 'reopened, it has another key');
has(pay('declined'), { outcome => 'completed', generation => 2, idempotency_key => $key, replayed => $false }, 'and succeeds');
charges('declined', 1);

$stripe->fault('cut', match => { path => '/v1/payment_intents' });
has(pay('declined and cut', params => \%declined), { %unknown, http_status => 402 }, 'a declined card whose answer was cut');
$r = pay('declined and cut', params => \%declined);
has($r, { outcome => 'failed', http_status => 402, replayed => $true }, 'the same key fetches it');
like($r->{resource_id}, qr/^pi_/, 'with the id');

has(pay('invalid', params => { %payment, currency => 'none' }), { outcome => 'failed', http_status => 400 }, 'an invalid request');
is(arrivals { pay('invalid', params => { %payment, currency => 'none' }) }, 0, 'is final');

# Stripe knows the key from something else
$key = sql($node, q{SELECT idempotency.stripe_idempotency_key('payment', 'stolen')});
my $http = HTTP::Tiny->new;
$http->request('POST', $stripe->url . '/v1/payment_intents', { content => 'amount=1&currency=usd', headers => {
	'Authorization' => 'Bearer ' . TEST_KEY, 'Idempotency-Key' => $key, 'Content-Type' => 'application/x-www-form-urlencoded' } });
has(pay('stolen'), { outcome => 'mismatch', http_status => 400, retry_after => undef }, 'a key that Stripe knows from something else');
is(arrivals { is(pay('stolen')->{outcome}, 'mismatch', 'stays so') }, 0, 'and is not sent again');

#
# Interrupts
#

foreach my $what (qw(hang_before hang_after))
{
	foreach my $how ('pg_cancel_backend', 'pg_terminate_backend')
	{
		my $id = "$what $how";
		my $session = $node->background_psql('postgres', on_error_stop => 0);
		my $pid = $session->query_safe('SELECT pg_backend_pid()');
		my $hang = $stripe->fault($what);

		$session->query_until(qr/begun/, "\\echo begun\nBEGIN; SELECT outcome FROM idempotency.stripe_call('payment', '$id', 'POST', "
			  . literal('/v1/payment_intents') . ', ' . literal($json->encode(\%payment)) . ");\n\\echo ended\n");
		$stripe->wait_fault($hang, holding => 1);
		has(pay($id), { outcome => 'in_progress', attempts => 0 }, "$id: meanwhile it is in progress");
		cmp_ok(pay($id)->{retry_after}, '>=', 1, "$id: and says when to come back");
		sql($node, "SELECT $how($pid)");
		$stripe->wait_fault($hang, gone => 1);
		$session->{run}->pump_nb;
		$node->poll_query_until('postgres', "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $pid AND state = 'active')");
		$stripe->clear_faults;
		$session->{run}->kill_kill;

		ok($node->poll_query_until('postgres', "SELECT (idempotency.stripe_lookup('payment', '$id')).outcome = 'unknown'"),
			"$id: then nobody knows");
		has(pay($id), { outcome => 'completed', attempts => 1 }, "$id: the next call knows");
		charges($id, 1);
	}
}
{
	$stripe->fault('hang_after');
	has(pay('statement_timeout', before => q{SET statement_timeout = '1500 ms'}), \%unknown, 'a call ends before statement_timeout');
	$stripe->clear_faults;
	has(pay('statement_timeout'), { outcome => 'completed', replayed => $true }, 'and the next one knows');
	charges('statement_timeout', 1);
}

#
# The answer of an attempt before, told while this one is on its way
#

{
	my $request = $json->encode({ method => 'POST', path => '/v1/payment_intents', params => \%payment });
	my $token = sql($node, "SELECT token FROM idempotency.stripe_claim('payment', 'told late', " . literal($request)
		  . ", lease => '1 microsecond')");
	my $session = $node->background_psql('postgres', on_error_stop => 0);
	my $hang = $stripe->fault('hang_before');

	$session->query_until(qr/begun/, "\\echo begun\nSELECT concat_ws('|', outcome, resource_id, resource_type, resource_status, http_status, "
		  . "response ->> 'id', error ->> 'type', attempts, replayed) FROM idempotency.stripe_call('payment', 'told late', 'POST', "
		  . literal('/v1/payment_intents') . ', ' . literal($json->encode(\%payment)) . ", timeout => '5 s');\n");
	$stripe->wait_fault($hang, holding => 1);
	sql($node, qq{SELECT idempotency.stripe_record('payment', 'told late', $token, http_status => 200,
		response => '{"id": "pi_late", "object": "payment_intent", "status": "succeeded"}')});
	like($session->query_until(qr/ended/, "\\echo ended\n"),
		qr/^completed\|pi_late\|payment_intent\|succeeded\|200\|pi_late\|1\|t$/m, 'a late answer that stands is the result');
	$session->quit;
	$stripe->clear_faults;
}

#
# Many at once
#

{
	my @sessions = map { $node->background_psql('postgres') } 1 .. 6;
	my $hang = $stripe->fault('hang_after');
	my $query = "SELECT outcome FROM idempotency.stripe_call('payment', 'at once', 'POST', "
	  . literal('/v1/payment_intents') . ', ' . literal($json->encode(\%payment)) . ");\n";

	is(arrivals {
		$_->query_until(qr/begun/, "\\echo begun\n$query") foreach @sessions;
		$stripe->wait_fault($hang, holding => 1);
		ok($node->poll_query_until('postgres', q{SELECT count(*) = 1 FROM pg_stat_activity WHERE query ~ 'at once' AND state = 'active' AND pid <> pg_backend_pid()}),
			'of six that call at once one is left that sends');
		$stripe->release($hang);
		ok($node->poll_query_until('postgres', q{SELECT (idempotency.stripe_lookup('payment', 'at once')).outcome = 'completed'}), 'and does');
		$_->quit foreach @sessions;
	}, 1, 'once');
	charges('at once', 1);
	$stripe->clear_faults;
}

#
# Time
#

$stripe->fault('close_before', times => 2);
pay($_) foreach 'a day', 'almost a day';
sql($node, q{UPDATE idempotency.stripe_idempotency_keys SET first_sent_at = first_sent_at - interval '23 h 1 min' WHERE operation_id = 'a day';
	UPDATE idempotency.stripe_idempotency_keys SET first_sent_at = first_sent_at - interval '22 h 59 min' WHERE operation_id = 'almost a day'});
is(arrivals {
	has(pay('a day'), { outcome => 'unknown', attempts => 0 }, "after Stripe's day nothing is sent");
	has(stripe_retry($node, 'payment', 'a day'), { outcome => 'unknown', attempts => 0 }, 'not by stripe_retry(), either');
}, 0, 'nothing at all');
is(arrivals { is(pay('almost a day')->{outcome}, 'completed', 'before it is') }, 1, 'sent');
charges('almost a day', 1);

# an outcome that no repetition will tell says so
sub said
{
	my ($function, $arguments) = @_;
	my (undef, undef, $stderr) = $node->psql('postgres', "SELECT FROM idempotency.$function($arguments)");

	return $stderr;
}
my $useless = qr/NOTICE:  outcome of Stripe operation "payment:[^"]*" is not known, and cannot be found out by calling again\nHINT:  The view "idempotency.stripe_unknown"/;
my $call = q{'POST', '/v1/payment_intents', '{"amount": 2000, "currency": "usd"}'};
like(said('stripe_retry', q{'payment', 'a day'}), $useless, 'too late');
$stripe->fault('500');
like(said('stripe_call', "'payment', 'useless', $call"), $useless, 'a saved failure, at once');
like(said('stripe_call', "'payment', 'useless', $call"), $useless, 'and later');
$stripe->fault('close_after');
is(said('stripe_call', "'payment', 'useful', $call"), '', 'nothing is said where it may help');
is(said('stripe_call', "'payment', 'useful', $call"), '', 'and where it did');

# API v2
my %payout = (amount => { value => 100, currency => 'usd' }, from => { financial_account => 'fa_1' },
	to => { recipient => 'acct_1' }, description => undef);

sub payout
{
	my ($id, %values) = @_;
	return stripe_call($node, 'payout', $id, 'POST', '/v2/money_management/outbound_payments', params => \%payout, %values);
}
$r = payout('one');
($arrival) = ($stripe->arrivals)[-1];
is_deeply($json->decode($arrival->{body}), \%payout, 'API v2 takes JSON');
is(header($arrival, 'Content-Type'), 'application/json', 'and is told so');
is(header($arrival, 'Idempotency-Key'), $r->{idempotency_key}, 'with a key');
is($r->{outcome}, 'completed', 'completed') or diag(explain($r));
sql($node, q{CREATE DATABASE latin1 TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'});
sql($node, 'CREATE EXTENSION idempotency', db => 'latin1');
foreach my $path ('/v2/core/accounts', '/v1/customers')
{
	stripe_call($node, 'latin1', $path, 'POST', $path, params => '{"name": "\u00e9"}', db => 'latin1',
		before => q{SET client_encoding = 'UTF8'});
	like(($stripe->arrivals)[-1]->{body}, qr/\x{e9}|%C3%A9/, "$path: UTF-8 from a database that has another encoding");
}
$stripe->fault('close_before');
payout('old');
sql($node, q{UPDATE idempotency.stripe_idempotency_keys SET first_sent_at = first_sent_at - interval '29 d' WHERE operation_type = 'payout'});
is(payout('old')->{attempts}, 1, 'its keys are good for 30 days');
$stripe->fault('close_before');
payout('older');
sql($node, q{UPDATE idempotency.stripe_idempotency_keys SET first_sent_at = first_sent_at - interval '30 d' WHERE operation_id = 'older'});
is(payout('older')->{attempts}, 0, 'and no longer');
$stripe->fault('500_unsaved');
has(payout('500'), { outcome => 'unknown', http_status => 500 }, 'a 500 of API v2');
has(payout('500'), { outcome => 'completed', attempts => 1 }, 'is executed again');

#
# DELETE
#

my $customer = stripe_call($node, 'customer', '1', 'POST', '/v1/customers')->{resource_id};
($arrival) = ($stripe->arrivals)[-1];
is(header($arrival, 'Content-Length'), 0, 'a POST without parameters has no body');
$stripe->fault('close_after');
is(stripe_call($node, 'delete', '1', 'DELETE', "/v1/customers/$customer")->{outcome}, 'unknown', 'a DELETE whose answer is lost');
($arrival) = ($stripe->arrivals)[-1];
is(header($arrival, 'Idempotency-Key'), undef, 'it has no key in API v1');
is($arrival->{body}, '', 'and no body');
has(stripe_call($node, 'delete', '1', 'DELETE', "/v1/customers/$customer"), { outcome => 'completed', http_status => 404 },
	'gone is what it should be');
$customer = stripe_call($node, 'customer', '2', 'POST', '/v1/customers')->{resource_id};
$stripe->fault('close_after');
$stripe->fault('401', match => { method => 'DELETE' }, nth => 2);
has(stripe_call($node, 'delete', 'then refused', 'DELETE', "/v1/customers/$customer", settings => { stripe_max_retries => 1 }),
	{ outcome => 'unknown', attempts => 2, http_status => 401 }, 'a DELETE whose answer is lost, and whose second attempt is refused');
$stripe->clear_faults;
has(stripe_call($node, 'delete', 'then refused', 'DELETE', "/v1/customers/$customer"), { outcome => 'completed', http_status => 404 },
	'may have been executed, and was');
# API v1 executes a DELETE each time: that it is refused now may follow from what was
# done before
$customer = stripe_call($node, 'customer', '3', 'POST', '/v1/customers')->{resource_id};
$stripe->fault('close_after');
my $refusal = '{"error": {"type": "invalid_request_error", "message": "not any more"}}';
$stripe->fault('gateway', status => 400, body => $refusal, type => 'application/json', match => { method => 'DELETE' }, nth => 2);
has(stripe_call($node, 'delete', 'in doubt', 'DELETE', "/v1/customers/$customer", settings => { stripe_max_retries => 1 }),
	{ outcome => 'unknown', attempts => 2, http_status => 400 }, 'a DELETE whose answer is lost, and that Stripe refuses then');
$stripe->clear_faults;
is(stripe_call($node, 'delete', 'in doubt', 'DELETE', "/v1/customers/$customer")->{attempts}, 0, 'is not sent again');
is(sql($node, q{SELECT next_step LIKE '%stripe_retry%' FROM idempotency.stripe_unknown WHERE operation_id = 'in doubt'}), 'f', 'nor is that what the view says');
# a POST has its key: what Stripe has executed it answers by its own answer
$stripe->fault('close_before');
$stripe->fault('gateway', status => 400, body => $refusal, type => 'application/json', match => { method => 'POST' }, nth => 2);
has(stripe_call($node, 'delete', 'post', 'POST', '/v1/customers', settings => { stripe_max_retries => 1 }),
	{ outcome => 'failed', attempts => 2, http_status => 400 }, 'a POST that was lost, and is refused then, has failed');
$stripe->clear_faults;
stripe_call($node, 'delete', 'params', 'DELETE', "/v1/subscriptions/sub_1", params => { prorate => $true, a => [ 1 ] });
is(($stripe->arrivals)[-1]->{target}, '/v1/subscriptions/sub_1?a[0]=1&prorate=true', 'its parameters are a query');
$stripe->fault('429');
is(stripe_call($node, 'delete', '2', 'DELETE', '/v1/customers/cus_none')->{outcome}, 'not_executed', 'a DELETE that Stripe refuses');
has(stripe_call($node, 'delete', '2', 'DELETE', '/v1/customers/cus_none'), { outcome => 'failed', http_status => 404 },
	'has not deleted anything');

#
# stripe_retry()
#

run_fails($node, q{SELECT FROM idempotency.stripe_retry('payment', 'never')}, 'IK003', 'nothing to retry');
$stripe->fault('close_after');
pay('to retry');
run_fails($node, settings(stripe_allowed_paths => 'GET /v1/**') . q{SELECT FROM idempotency.stripe_retry('payment', 'to retry')}, '42501',
	'a stored path must be allowed, too');
has(stripe_retry($node, 'payment', 'to retry'), { outcome => 'completed', replayed => $true, attempts => 1 }, 'what is stored is sent again');
charges('to retry', 1);
sql($node, q{SELECT FROM idempotency.stripe_release('payment', 'of an application', (SELECT token FROM idempotency.stripe_claim('payment', 'of an application', '{}')))});
run_fails($node, q{SELECT FROM idempotency.stripe_retry('payment', 'of an application')}, 'IK003', 'what an application sends is not known');

#
# Modes
#

$stripe->fault('close_before');
pay('test mode');
write_key($node, 'sk_live_' . 'x' x 24);
run_fails($node, q{SELECT FROM idempotency.stripe_call('payment', 'live', 'POST', '/v1/customers')}, 'F0000', 'a live key needs TLS');
my %tls = (stripe_api_base => 'https://localhost:' . $stripe->tls_port, stripe_ca_file => $stripe->ca);
is(arrivals {
	run_fails($node, settings(%tls) . q{SELECT FROM idempotency.stripe_call('payment', 'test mode', 'POST', '/v1/payment_intents',
		'{"amount": 2000, "currency": "usd", "confirm": true, "payment_method": "pm_card_visa"}')}, 'IK002',
		'what was begun in test mode is not continued in live mode');
}, 0, 'nothing is sent');
has(pay('live mode', settings => \%tls), { outcome => 'completed', livemode => $true }, 'a live call');
is(operation($node, 'payment', 'live mode')->{livemode}, $true, 'is recorded as such');
write_key($node, TEST_KEY);
is(pay('test mode')->{outcome}, 'completed', 'test mode goes on with a test key');

#
# The key in metadata
#

sub metadata
{
	my ($id, $path, $params, %settings) = @_;
	my $made = stripe_call($node, 'meta', $id, 'POST', $path, params => $params,
		settings => { stripe_key_in_metadata => 'on', %settings });
	my ($seen) = ($stripe->arrivals)[-1];

	my ($value) = $seen->{body} =~ /metadata\[idempotency_key\]=([^&]*)/;
	$value =~ s/%([0-9A-F]{2})/chr hex $1/ge if defined $value;
	return defined $value ? ($value eq $made->{idempotency_key} ? 'key' : $value) : 'none';
}
is(metadata('1', '/v1/customers', {}), 'key', 'what is created carries its key');
is(metadata('2', '/v1/customers', { metadata => { a => 'b' } }), 'key', 'beside other metadata');
is(metadata('3', '/v1/customers', { metadata => { idempotency_key => 'mine' } }), 'mine', 'unless there is one of that name');
is(metadata('4', '/v1/customers', { metadata => '' }), 'none', 'or it is cleared');
is(metadata('5', '/v1/customers', { metadata => { map { $_ => 1 } 1 .. 50 } }), 'none', 'or full');
is(metadata('6', '/v1/payment_intents/pi_1/confirm', {}), 'none', 'only what is created');
is(metadata('7', '/v1/customers', {}, stripe_key_in_metadata => 'off'), 'none', 'only where wanted');

#
# Vectors
#

my %differs = (float_values => 'a=0.1&b=1&c=1000000000000000000000&d=12.5', empty_array => 'items=&name=x', only_empty_array => 'items=');
my $vectors = $json->decode(slurp_file("$FindBin::RealBin/../vectors/form_encoding.json"))->{vectors};
my $tested = 0;
foreach my $vector (grep { $_->{method} eq 'POST' } @$vectors)
{
	my $name = $vector->{name};

	stripe_call($node, 'vector', $name, 'POST', $vector->{path}, params => $vector->{params});
	my ($seen) = ($stripe->arrivals)[-1];
	if ($vector->{path} =~ m{^/v2})
	{
		is_deeply($json->decode($seen->{body}), $json->decode($vector->{body}), "vector $name");
	}
	else
	{
		is(join('&', sort split /&/, $seen->{body}), join('&', sort split /&/, $differs{$name} // $vector->{body}), "vector $name");
	}
	is(sql($node, "SELECT convert_from(body, 'UTF8') FROM idempotency.stripe_idempotency_keys WHERE operation_id = "
			  . literal($name)) . "\n", $seen->{body} . "\n", "vector $name: the bytes are stored");
	$tested++;
}
cmp_ok($tested, '>=', 25, 'vectors were tested');

# What is compared as equal is the same to Stripe: a whole number has no fraction, in JSON, too.
my $spelled = '{"a": 1990.00, "b": [1.99e3, {"c": -250.0, "d": 19.90}], "e": "1990.00\"\u00e9", "f": null, "g": [], "h": {}, "i": true}';
foreach my $case (
	[ '/v1/customers', 'a=1990&b[0]=1990&b[1][c]=-250&b[1][d]=19.90&e=1990.00%22%C3%A9&f=&g=&i=true' ],
	[ '/v2/billing/meter_events',
		qq({"a": 1990, "b": [1990, {"c": -250, "d": 19.90}], "e": "1990.00\\"\x{e9}", "f": null, "g": [], "h": {}, "i": true}) ])
{
	my ($path, $expected) = @$case;

	stripe_call($node, 'spelled', $path, 'POST', $path, params => $spelled, settings => { stripe_key_in_metadata => 'off' });
	is(($stripe->arrivals)[-1]{body}, $expected, "$path: numbers");
}
run_fails($node, q{SELECT FROM idempotency.stripe_call('spelled', 'long', 'POST', '/v2/billing/meter_events', '{"a": 1e500}')}, 'IK007',
	'a number of more digits than anything takes');

# A refusal stands until somebody says otherwise, and the caller is told how.
{
	my $call = sub {
		my ($amount) = @_;
		my ($rc, $stdout, $stderr) = $node->psql('postgres', qq{SELECT outcome, replayed, http_status, generation, CASE WHEN error ->> 'type' = 'idempotency_error' THEN error ->> 'message' END
			FROM idempotency.stripe_call('payment', 'corrected', 'POST', '/v1/payment_intents', '{"amount": $amount, "currency": "eur"}')});
		return ($stdout, $stderr);
	};
	my ($told, $notice) = $call->('19.90');
	is($told, 'failed|f|400|1|', 'an amount with a fraction is refused');
	is($notice, '', 'as Stripe says');
	($told, $notice) = $call->('19.9');
	is($told, 'failed|t|400|1|', 'and stays refused');
	like($notice, qr/NOTICE:  Stripe has refused operation "payment:corrected" as invalid, and that stands\nHINT:  .*stripe_reopen\('payment', 'corrected', account => '', from_generation => 1\)/,
		'which a notice says');
	($told, $notice) = $call->('1990');
	is($told, q{mismatch|f|400|1|the operation has failed with another request; stripe_reopen() gives it a new key for this one},
		'a corrected one is another request');
	like($notice, qr/NOTICE:  Stripe operation "payment:corrected" has failed with another request/, 'which a notice says, too');
	sql($node, q{SELECT idempotency.stripe_reopen('payment', 'corrected', from_generation => 1)});
	is(($call->('1990.00'))[0], 'completed|f|200|2|', 'reopened, it is sent');
}

#
# Errors leave nothing behind
#

my $rows = sql($node, 'SELECT count(*) FROM idempotency.stripe_idempotency_keys');
my $refused = arrivals
{
	foreach my $case (
		[ q{'t', 'i', 'GET', '/v1/customers'}, 'IK003' ], [ q{'t', 'i', 'PUT', '/v1/customers'}, 'IK003' ],
		[ q{'t', 'i', 'post', '/v1/customers'}, 'IK003' ], [ q{'t', 'i', NULL, '/v1/customers'}, 'IK003' ],
		[ q{NULL, 'i', 'POST', '/v1/customers'}, 'IK003' ], [ q{'t', NULL, 'POST', '/v1/customers'}, 'IK003' ],
		[ q{'', 'i', 'POST', '/v1/customers'}, 'IK003' ], [ q{'t', '', 'POST', '/v1/customers'}, 'IK003' ],
		[ q{'t', repeat('i', 217), 'POST', '/v1/customers'}, 'IK003' ],
		[ q{'t', 'i', 'POST', NULL}, 'IK003' ], [ q{'t', 'i', 'POST', '/customers'}, 'IK003' ],
		[ q{'t', 'i', 'POST', '/v1/customers', NULL}, 'IK003' ], [ q{'t', 'i', 'POST', '/v1/customers', '[]'}, 'IK003' ],
		[ q{'t', 'i', 'POST', '/v1/customers', '{"a[b]": 1}'}, 'IK003' ],
		[ q{'t', 'i', 'POST', '/v1/customers', account => NULL}, 'IK003' ],
		[ q{'t', 'i', 'POST', '/v1/customers', account => 'a b'}, 'IK003' ],
		[ q{'t', 'i', 'POST', '/v1/customers', timeout => '0'}, 'IK003' ],
		[ q{'t', 'i', 'POST', '/v1/customers', jsonb_build_object('a', repeat('x', 1100000))}, 'IK007' ],
		[ q{'t', 'i', 'POST', '/v2/customers', jsonb_build_object('a', repeat('x', 1100000))}, 'IK007' ])
	{
		run_fails($node, "SELECT FROM idempotency.stripe_call($case->[0])", $case->[1], "stripe_call($case->[0])");
	}
	my $call = q{SELECT FROM idempotency.stripe_call('t', 'i', 'POST', '/v1/customers')};
	run_fails($node, settings(stripe_allowed_paths => 'GET /v1/**') . $call, '42501', 'a path that is not allowed');
	run_fails($node, settings(stripe_api_base => 'x') . $call, '22023', 'a bad base');
	run_fails($node, settings(stripe_api_key_file => '/nowhere') . $call, '58P01', 'no API key');
	run_fails($node, q{DO $$ BEGIN PERFORM idempotency.stripe_call('', '', '', ''); EXCEPTION WHEN OTHERS THEN NULL; END $$;
		SET dynamic_library_path = '/nonexistent';} . $call, 'IK010', 'no library');
	sql($node, 'CREATE ROLE nobody') ;
	run_fails($node, "SET ROLE nobody; $call", '42501', 'no privilege');
};
is($refused, 0, 'nothing is sent');
is(sql($node, 'SELECT count(*) FROM idempotency.stripe_idempotency_keys'), $rows, 'no row is left');

# an id that is longer than any of Stripe's is none
{
	my %body = (object => 'customer', id => 'cus_' . 'x' x 252);

	$stripe->fault('not_json', status => 200, body => $json->encode(\%body));
	has(stripe_call($node, 'long id', '1', 'POST', '/v1/customers'), { outcome => 'completed', resource_id => undef }, 'an id of 256 characters');
	$stripe->clear_faults;
	$body{id} = 'cus_' . 'x' x 251;
	$stripe->fault('not_json', status => 200, body => $json->encode(\%body));
	has(stripe_call($node, 'long id', '2', 'POST', '/v1/customers'), { outcome => 'completed', resource_id => $body{id} }, 'one of 255');
	$stripe->clear_faults;
}

# the row is this transaction's own
run_fails($node, q{BEGIN; UPDATE idempotency.stripe_idempotency_keys SET attempt = attempt WHERE operation_id = 'to retry';
	SELECT FROM idempotency.stripe_retry('payment', 'to retry')}, 'IK006', 'a row of this transaction');

#
# Without a recorder
#

my $alone = stripe_node('alone', $stripe, conf => "idempotency.stripe_max_retries = 0\n");
is(arrivals {
	run_fails($alone, q{SELECT FROM idempotency.stripe_call('payment', 'alone', 'POST', '/v1/customers')}, 'IK006',
		'without a recorder nothing is sent');
}, 0, 'nothing at all');
is(sql($alone, q{SET idempotency.stripe_ledger = 'transaction';
	BEGIN; SELECT outcome FROM idempotency.stripe_call('payment', 'alone', 'POST', '/v1/customers'); ROLLBACK;
	SELECT outcome, replayed, attempts FROM idempotency.stripe_call('payment', 'alone', 'POST', '/v1/customers')}),
	"completed\ncompleted|t|1", 'in transaction mode the derived key protects');
is($stripe->effects(type => 'customer', key => sql($alone, q{SELECT idempotency.stripe_idempotency_key('payment', 'alone')})), 1,
	'one effect');
$alone->stop;

$node->stop;
is_deeply($stripe->counts->{internal_errors}, [], 'the fake had no error of its own');
$stripe->stop;

done_testing();
