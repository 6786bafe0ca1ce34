
# stripe_get(): what is sent, and what is made of each answer.

use strict;
use warnings;

use FakeStripe;
use FindBin;
use IdempotencyTest;
use JSON::PP;
use PostgreSQL::Test::Utils;
use StripeTest;
use Test::More;

my $stripe = FakeStripe->start;
my $node = stripe_node('main', $stripe, conf => qq{
idempotency.stripe_max_retries = 0
log_statement = none
});
my $json = JSON::PP->new->utf8;
my $vectors =
  $json->decode(slurp_file("$FindBin::RealBin/../vectors/form_encoding.json"))->{vectors};

# the last request that arrived
sub last_arrival
{
	my @arrivals = $stripe->arrivals;
	return $arrivals[-1];
}

sub header
{
	my ($arrival, $name) = @_;
	my @values = map { $_->[1] } grep { lc($_->[0]) eq lc($name) } @{ $arrival->{headers} };

	die "$name came " . scalar(@values) . ' times' if @values > 1;
	return $values[0];
}

#
# What is sent
#

my $answer = stripe_get($node, '/v1/customers', params => { limit => 3 });
is_deeply(
	{ map { $_ => $answer->{$_} } grep { $_ !~ /^(response|request_id)$/ } keys %$answer },
	{
		outcome => 'completed',
		replayed => JSON::PP::false,
		resource_id => undef,
		resource_type => 'list',
		http_status => 200,
		error => undef,
		idempotency_key => undef,
		attempts => 1,
		generation => undef,
		retry_after => undef,
		livemode => JSON::PP::false,
		resource_status => undef
	},
	'a list is read');
is_deeply($answer->{response}{data}, [], 'and its body comes back');
like($answer->{request_id}, qr/^req_/, 'with its Request-Id');

my $arrival = last_arrival();
is("$arrival->{method} $arrival->{target}", 'GET /v1/customers?limit=3', 'method and target');
is(header($arrival, 'Authorization'), 'Bearer ' . TEST_KEY, 'Authorization');
is(header($arrival, 'Accept'), 'application/json', 'Accept');
is(header($arrival, 'Stripe-Version'), '2026-10-28.endive', 'Stripe-Version is pinned');
like(header($arrival, 'User-Agent'), qr{^idempotency/1\.0 \(PostgreSQL/\d+}, 'User-Agent names the extension');
foreach my $absent (qw(Stripe-Account Stripe-Context Idempotency-Key Expect Accept-Encoding Cookie
	Content-Type Content-Length Transfer-Encoding))
{
	is(header($arrival, $absent), undef, "no $absent");
}
is($arrival->{body}, '', 'no body');

stripe_get($node, '/v1/customers', account => 'acct_test1');
is(header(last_arrival(), 'Stripe-Account'), 'acct_test1', 'an account is Stripe-Account');
is(last_arrival()->{target}, '/v1/customers', 'no params, no query');
stripe_get($node, '/v1/customers', account => 'acct_test1/acct_test2');
is(header(last_arrival(), 'Stripe-Context'), 'acct_test1/acct_test2', 'a path of accounts is Stripe-Context');
is(header(last_arrival(), 'Stripe-Account'), undef, 'and then there is no Stripe-Account');

stripe_get($node, '/v1/customers', settings => { stripe_version => '2027-01-01.fir' });
is(header(last_arrival(), 'Stripe-Version'), '2027-01-01.fir', 'idempotency.stripe_version');

#
# Parameters, as stripe-node encodes them.  jsonb sorts names, so pairs are
# compared as a set.  Where the libraries disagree, or a number would have an
# exponent, we differ from it:
#

my %differs = (
	float_values => 'a=0.1&b=1&c=1000000000000000000000&d=12.5',
	empty_array => 'items=&name=x',
	only_empty_array => 'items=',);
my $tested = 0;

foreach my $vector (grep { $_->{path} =~ m{^/v1} && ref $_->{params} } @$vectors)
{
	my ($name, $params) = @$vector{qw(name params)};
	my ($expected) = $vector->{method} eq 'POST' ? $vector->{body} : $vector->{path} =~ /\?(.*)/;
	my $path = $vector->{path} =~ s/\?.*//r;

	stripe_get($node, $path, params => $params);
	my ($sent) = last_arrival()->{target} =~ /\?(.*)/;
	is( join('&', sort split /&/, $sent // ''),
		join('&', sort split /&/, $differs{$name} // $expected),
		"vector $name");
	$tested++;
}
cmp_ok($tested, '>=', 26, 'vectors were tested');

foreach my $case (
	[ '{"a": {"b": {"c": [{"d": [[1, 2], []]}]}}}', 'a[b][c][0][d][0][0]=1&a[b][c][0][d][0][1]=2&a[b][c][0][d][1]=' ],
	[ '{"a": 1.10, "b": -0.5, "c": 1e-7, "d": 12345678901234567890}', 'a=1.10&b=-0.5&c=0.0000001&d=12345678901234567890' ],
	# a whole number has no fraction, however it is spelled; a fraction keeps its zeros
	[ '{"a": 1990.00, "b": 1.99e3, "c": 1990.0e0, "d": 199000e-2, "e": -250.0, "f": 0.00, "g": -0.0, "h": 100}',
		'a=1990&b=1990&c=1990&d=1990&e=-250&f=0&g=0&h=100' ],
	[ '{"a": {"b": [2.0, {"c": 3.00}], "d": 19.90, "e": 0.10}, "f": "1990.00"}',
		'a[b][0]=2&a[b][1][c]=3&a[d]=19.90&a[e]=0.10&f=1990.00' ],
	[ '{"a": ' . ('9' x 500) . '.0, "b": 1e-500}', 'a=' . ('9' x 500) . '&b=0.' . ('0' x 499) . '1' ],
	[ '{"a": [{}], "b": {"c": {}}}', '' ],
	[ '{"a b&=": "c=d&"}', 'a%20b%26%3D=c%3Dd%26' ],
	[ '{"a": "\n\t\u0001"}', 'a=%0A%09%01' ],
	[ '{"a": "x", "a": "y"}', 'a=y' ])
{
	my ($params, $expected) = @$case;

	stripe_get($node, '/v1/customers', params => $params);
	my ($sent) = last_arrival()->{target} =~ /\?(.*)/;
	is($sent // '', $expected, "params $params");
}

#
# What is refused before anything is sent
#

my $arrivals = $stripe->counts->{arrivals};

sub refused
{
	my ($arguments, $sqlstate, $name, %settings) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	run_fails($node, settings(%settings) . "SELECT * FROM idempotency.stripe_get($arguments)",
		$sqlstate, $name);
}

foreach my $path (
	'', 'v1/customers', '//v1/customers', '/v1', '/v1/', '/', '/v3/x', '/v1//customers',
	'/v1/customers/', '/v1/./customers', '/v1/../v2/x', '/v1/customers/..', '/v1/a/%2e%2E/b',
	'/v1/pi_1%2F..%2Fx', '/v1/a%5cb', '/v1/a%0d%0aX', '/v1/a%', '/v1/a%4', '/v1/a%zz', '/v1/a?b=c',
	'/v1/a#b', '/v1/a b', "/v1/a\nHost: b", "/v1/a\\b", '/v1/@evil.example', '@evil.example/v1/x',
	'/v1/a;b', "/v1/\x{c3}\x{a9}", 'https://evil.example/v1/x', '/v1/' . 'a' x 2000)
{
	refused(literal($path), 'IK003', "path $path");
}
foreach my $params ('NULL', q{'[]'}, q{'"a"'}, q{'null'}, q{'1'}, q{'{"a[b]": 1}'}, q{'{"a": {"b]": 1}}'},
	q{'{"a": [{"[": 1}]}'}, q{'{"": 1}'},
	q{(SELECT (repeat('{"a":', 21) || '1' || repeat('}', 21))::jsonb)})
{
	refused("'/v1/customers', $params", 'IK003', "params $params");
}
refused(q{'/v1/customers', jsonb_build_object('a', repeat('x', 17000))}, 'IK007', 'a query of 17 kB');
refused(q{'/v1/customers', '{"a": 1e100000}'}, 'IK007', 'a number of 100,000 digits');
refused(qq{'/v1/customers', '{"a": [$_]}'}, 'IK007', "a number of more than 500 digits, $_")
	foreach qw(1e500 -1e500 1.5e500 1e-501 -1.5e-500 1e131071);
refused(q{NULL}, 'IK003', 'path NULL');
refused(q{'/v1/customers', account => NULL}, 'IK003', 'account NULL');
refused(q{'/v1/customers', account => E'acct_1\r\nX-Evil: 1'}, 'IK003', 'account with a line break');
refused(q{'/v1/customers', account => 'acct 1'}, 'IK003', 'account with a space');
refused(q{'/v1/customers', account => repeat('a', 256)}, 'IK003', 'account of 256 characters');
refused(q{'/v1/customers', timeout => '0 s'}, 'IK003', 'timeout of nothing');
refused(q{'/v1/customers', timeout => '-1 s'}, 'IK003', 'negative timeout');

foreach my $case (
	[ 'GET /v1/customers', '/v1/customers', 1 ],
	[ 'GET /v1/customers', '/v1/customers/cus_1', 0 ],
	[ 'POST /v1/customers', '/v1/customers', 0 ],
	[ '/v1/customers/*', '/v1/customers/cus_1', 1 ],
	[ '/v1/customers/*', '/v1/customers/cus_1/tax_ids', 0 ],
	[ '/v1/customers/*', '/v1/customers', 0 ],
	[ '/v1/customers/**', '/v1/customers/cus_1/tax_ids', 1 ],
	[ 'POST /v1/refunds,GET   /v1/customers/*/tax_ids ', '/v1/customers/cus_1/tax_ids', 1 ],
	[ '/v1/cus*', '/v1/customers', 1 ],
	[ '/v1/customer', '/v1/customers', 0 ],
	[ '/v1/a, *', '/v1/customers', 1 ],
	[ '', '/v1/customers', 0 ])
{
	my ($list, $path, $allowed) = @$case;

	if ($allowed)
	{
		is( stripe_get($node, $path, settings => { stripe_allowed_paths => $list })->{attempts},
			1, "'$list' allows $path");
		$arrivals++;
	}
	else
	{
		refused(literal($path), '42501', "'$list' doesn't allow $path", stripe_allowed_paths => $list);
	}
}

foreach my $case (
	[ stripe_allowed_paths => 'v1/customers' ], [ stripe_allowed_paths => 'PUT /v1/customers' ],
	[ stripe_allowed_paths => 'GET /v1/a /v1/b' ],
	[ stripe_version => '' ], [ stripe_version => '2026-10-2' ], [ stripe_version => "2026-10-28\r\nX: y" ],
	[ stripe_version => "2026-10-28\x{c3}\x{a9}" ], [ stripe_version => '2026-10-28.' . 'a' x 300 ],
	(map { [ stripe_api_base => $_ ] } '', 'api.stripe.com', 'http://api.stripe.com', 'ftp://127.0.0.1',
		'https://api.stripe.com/', 'https://api.stripe.com/v1', 'https://user@api.stripe.com',
		'https://api.stripe.com:0', 'https://api.stripe.com:65536', 'https://api.stripe.com:',
		'https://', 'https://[::1', 'http://127.0.0.1.evil.example', 'http://localhost.evil.example',
		'http://0.0.0.0', 'https://api.stripe.com?x', 'https://api.stripe.com#x', "https://a\nb"))
{
	my $value = "idempotency.$case->[0] = " . literal($case->[1]);

	run_fails($node, "LOAD 'idempotency'; " . settings(@$case), '22023', "SET $value");
	refused(q{'/v1/customers'}, '22023', "SET $value before the library is loaded", @$case);
}
foreach my $base ('https://api.stripe.com', 'https://API.stripe.com:8443', 'http://localhost', 'http://[::1]:1',
	'http://127.1.2.3:4', 'https://[2001:db8::1]:443')
{
	is(sql($node, settings(stripe_api_base => $base) . 'SELECT 1'), 1, "idempotency.stripe_api_base can be $base");
}
sql($node, 'CREATE ROLE nobody; CREATE ROLE caller');
sql($node, q{SELECT FROM idempotency.grant_role('caller', 'stripe_caller')});
foreach my $case ([ stripe_api_base => 'https://evil.example' ], [ stripe_allowed_paths => '*' ],
	[ stripe_api_key_file => '/etc/hostname' ], [ stripe_ca_file => '/etc/hostname' ],
	[ stripe_log_level => 'off' ])
{
	run_fails($node, "LOAD 'idempotency'; SET ROLE caller; " . settings(@$case),
		'42501', "idempotency.$case->[0] is for superusers");
	run_fails($node, 'SET ROLE caller; ' . settings(@$case) . q{
			SELECT outcome FROM idempotency.stripe_get('/v1/customers')},
		'IK011', 'and set before the library is loaded it ends what it would guard');
}
run_fails($node, q{SET ROLE nobody; SELECT FROM idempotency.stripe_get('/v1/customers')}, '42501', 'nothing for PUBLIC');
is($stripe->counts->{arrivals}, $arrivals, 'none of the refused was sent');
is(sql($node, q{SET ROLE caller; SELECT outcome FROM idempotency.stripe_get('/v1/customers')}),
	'completed', 'a stripe_caller needs no more than EXECUTE');
is(sql($node, q{BEGIN TRANSACTION READ ONLY; SELECT outcome FROM idempotency.stripe_get('/v1/customers'); COMMIT}),
	'completed', 'a read-only transaction may read');

# Without the library there is an error that says so, and the rest works.  What
# of the extension is used here is looked up before its library can't be found.
my $without = q{
	DO $$ BEGIN PERFORM idempotency.stripe_get('x'); EXCEPTION WHEN OTHERS THEN NULL; END $$;
	DO $$ BEGIN PERFORM idempotency.claim('', ''); EXCEPTION WHEN OTHERS THEN NULL; END $$;
	SET dynamic_library_path = '/nonexistent';};
run_fails($node, "$without SELECT FROM idempotency.stripe_get('/v1/customers')", 'IK010', 'idempotency_stripe is not installed');
is(sql($node, "$without SELECT verdict FROM idempotency.claim('k', 'test', lease => '1 min')"), 'claimed', 'and the rest works');

#
# Answers
#

# One call under a fault.  Which answers are worth another attempt is tested by
# 050_stripe_outcome.pl, here it takes half a second each: so there is one only
# where a second arrival is expected.
sub outcome
{
	my ($name, $fault, $expected, %params) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $path = delete $params{path} // '/v1/customers';
	my ($what, %fault) = ref $fault ? @$fault : $fault;
	my $before = $stripe->counts->{arrivals};

	$stripe->fault($what, times => 0, %fault) if defined $what;
	my $retries = ($expected->{arrivals} // 0) > 1 ? 1 : 0;
	my $got = stripe_get($node, $path, settings => { stripe_max_retries => $retries }, %params);
	$stripe->clear_faults;

	$got->{arrivals} = $stripe->counts->{arrivals} - $before;
	$got->{error_type} = ($got->{error} // {})->{type};
	$got->{error_code} = ($got->{error} // {})->{code};
	is_deeply({ map { $_ => $got->{$_} } keys %$expected }, $expected, $name) or diag(explain($got));
	return $got;
}

my %unknown = (outcome => 'unknown', response => undef, retry_after => 5);
my %no_answer = (%unknown, http_status => undef, error_type => 'api_connection_error');

outcome('a 200', undef, { outcome => 'completed', http_status => 200, arrivals => 1, attempts => 1 });
outcome('a 404', undef, { outcome => 'failed', http_status => 404, error_type => 'invalid_request_error',
		error_code => 'resource_missing', retry_after => undef, arrivals => 1 }, path => '/v1/customers/cus_none');
outcome('a 400', undef, { outcome => 'failed', http_status => 400, error_type => 'invalid_request_error',
		arrivals => 1 }, params => { limit => 'many' });
outcome('a 401', '401', { outcome => 'not_executed', http_status => 401, retry_after => 5, arrivals => 1 });
outcome('a 403', '403', { outcome => 'not_executed', http_status => 403, arrivals => 1 });
outcome('409 in use', '409_in_use', { outcome => 'unknown', http_status => 409,
		error_code => 'idempotency_key_in_use', arrivals => 2, attempts => 2 });
outcome('a 409', '409', { outcome => 'not_executed', http_status => 409, arrivals => 2 });
outcome('a 424', '424', { outcome => 'unknown', http_status => 424, arrivals => 1 });
outcome('a 429', '429', { outcome => 'not_executed', http_status => 429, error_code => 'rate_limit', arrivals => 1 });
outcome('429 lock_timeout', '429_lock_timeout', { outcome => 'not_executed', http_status => 429,
		error_code => 'lock_timeout', arrivals => 2 });
outcome('a 500', '500', { outcome => 'unknown', http_status => 500, error_type => 'api_error', arrivals => 2 });
outcome('502 in HTML', '502', { %unknown, http_status => 502, error_type => 'api_error', arrivals => 1 });
outcome('a 503', '503', { %unknown, http_status => 503, arrivals => 1 });
outcome('a 504', '504', { %unknown, http_status => 504, arrivals => 1 });
outcome("$_ redirect", [ 'redirect', status => $_, location => $stripe->url . '/v1/events' ],
	{ %unknown, http_status => $_, arrivals => 1 }, settings => { stripe_max_retries => 1 })
  foreach 301, 302, 303, 307, 308;

# Stripe-Should-Retry overrules
outcome('500, should not be retried', [ '500', should_retry => JSON::PP::false ], { http_status => 500, arrivals => 1 },
	settings => { stripe_max_retries => 1 });
outcome('409, should not be retried', [ '409', should_retry => JSON::PP::false ], { http_status => 409, arrivals => 1 },
	settings => { stripe_max_retries => 1 });
outcome('429, should be retried', [ '429', should_retry => JSON::PP::true ], { http_status => 429, arrivals => 2 });
outcome('424, should be retried', [ '424', should_retry => JSON::PP::true ], { http_status => 424, arrivals => 2 });
outcome('401, should be retried', [ '401', should_retry => JSON::PP::true ], { http_status => 401, arrivals => 2 });

# and it is enough to be right in the end
foreach my $what (qw(409 429_lock_timeout 500 502 close_before reset_before close_after reset_after cut))
{
	outcome("$what, then 200", [ $what, times => 1 ],
		{ outcome => 'completed', http_status => 200, error => undef, arrivals => 2, attempts => 2 });
}

# no answer
outcome($_, $_, { %no_answer, arrivals => 1, attempts => 1 })
  foreach qw(close_before reset_before close_after reset_after);
outcome('hangs', 'hang_before', { %no_answer, arrivals => 1, attempts => 1 }, timeout => '300 ms');
outcome('drips', [ 'drip', where => 'head', ms => 50 ], { %no_answer, arrivals => 1 }, timeout => '300 ms');

# half an answer
outcome('cut', 'cut', { %unknown, http_status => 200, error_type => 'api_error', arrivals => 1 });
outcome('cut by RST', [ 'cut', how => 'rst' ], { %unknown, http_status => 200, arrivals => 1 });
outcome('cut in a chunk', [ 'cut', chunked => JSON::PP::true ], { %unknown, http_status => 200, arrivals => 1 });
outcome('cut in the headers', [ 'cut', where => 'head' ], { %unknown, arrivals => 1 });
outcome('garbled', 'garbled', { %unknown, http_status => 200, arrivals => 1 });
outcome('garbled headers', [ 'garbled', where => 'head' ], { %no_answer, arrivals => 1 });
outcome('200 from somebody else', 'not_json', { %unknown, http_status => 200, arrivals => 1 });
outcome('404 from somebody else', [ 'not_json', status => 404 ], { %unknown, http_status => 404, arrivals => 1 });
outcome('drips too long', [ 'drip', ms => 50 ], { %unknown, http_status => 200, arrivals => 1 }, timeout => '300 ms');
outcome('drips', [ 'drip', bytes => 10, ms => 1 ], { outcome => 'completed', http_status => 200, arrivals => 1 });

# too much of an answer: the same again would be as large
outcome('2 MB', [ 'huge', bytes => 2 << 20 ], { %unknown, http_status => 200, arrivals => 1 },
	settings => { stripe_max_retries => 1 });
outcome('2 MB in chunks', [ 'huge', bytes => 2 << 20, chunked => JSON::PP::true ],
	{ %unknown, http_status => 200, arrivals => 1 });
outcome('1 MB', [ 'huge', bytes => 1 << 20 ], { outcome => 'completed', http_status => 200, arrivals => 1 });
outcome('1 MB and a byte', [ 'huge', bytes => (1 << 20) + 1 ], { %unknown, arrivals => 1 });

# nothing left
my %never = (outcome => 'not_executed', http_status => undef, error_type => 'api_connection_error', retry_after => 5);
my $unused = sub { my $other = FakeStripe->start; my $url = $other->url; $other->stop; return $url }->();
outcome('connection refused', undef, { %never, arrivals => 0, attempts => 2 },
	settings => { stripe_api_base => $unused, stripe_max_retries => 1 });
outcome('no such host', undef, { %never, arrivals => 0, attempts => 1 },
	settings => { stripe_api_base => 'https://no-such-host.invalid', stripe_max_retries => 0 });
outcome('no time before statement_timeout', undef, { %never, arrivals => 0, attempts => 0 },
	settings => { stripe_max_retries => 1 }, before => q{SET statement_timeout = '900 ms'});

# loopback in IPv6: nobody listens there, or the system has none
outcome('http to [::1]', undef, { %never, arrivals => 0, attempts => 1 },
	settings => { stripe_api_base => 'http://[::1]:' . ($unused =~ /:(\d+)$/)[0], stripe_max_retries => 0 });
run_fails($node, settings(stripe_api_base => 'http://[::2]:1') . q{SELECT FROM idempotency.stripe_get('/v1/customers')}, '22023',
	'http to another address than loopback');

# what a path may encode goes as it is, but that newer versions of libcurl write
# its hexadecimal digits large
{
	stripe_get($node, '/v1/customers/cus%41%5B1%7e');
	my @arrivals = $stripe->arrivals;
	like($arrivals[-1]{target}, qr{^/v1/customers/cus%41%5B1%7e\z}i, 'an encoded path');
}

# time
my $started = time;
outcome('attempts end with the timeout', 'close_before', { %no_answer, attempts => 1, arrivals => 1 },
	settings => { stripe_max_retries => 10 }, timeout => '400 ms');
outcome('and before statement_timeout', 'hang_before', { %no_answer, attempts => 1, arrivals => 1 },
	settings => { stripe_max_retries => 10 }, before => q{SET statement_timeout = '1500 ms'});
outcome('no retries', 'close_before', { %no_answer, attempts => 1, arrivals => 1 },
	settings => { stripe_max_retries => 0 });

$node->stop;
is_deeply($stripe->counts->{internal_errors}, [], 'the fake had no error of its own');
$stripe->stop;

done_testing();
