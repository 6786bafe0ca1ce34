
# The HTTP client inside a backend: connections, interrupts, TLS, and a server
# that isn't what it should be.

use strict;
use warnings;

use FakeStripe;
use IdempotencyTest;
use IO::Socket::INET;
use POSIX ();
use PostgreSQL::Test::Utils;
use StripeTest;
use Test::More;
use Time::HiRes qw(time);

my $stripe = FakeStripe->start(tls_dir => PostgreSQL::Test::Utils::tempdir('tls') . '/tls');
my $node = stripe_node('main', $stripe, conf => "idempotency.stripe_max_retries = 0\n");

# whatever the postmaster's environment says about proxies, it doesn't count
$node->stop;
{
	local @ENV{qw(http_proxy https_proxy HTTPS_PROXY ALL_PROXY)} = ('http://127.0.0.1:9') x 4;
	$node->start;
}

my $session = $node->background_psql('postgres', on_error_stop => 0);
$session->query_safe("LOAD 'idempotency'");

sub call
{
	my ($path) = @_;

	return $session->query_safe("SELECT outcome, attempts, http_status FROM idempotency.stripe_get('"
		  . ($path // '/v1/customers') . "')");
}

# the number of requests and connections that this code brings about
sub counted(&)
{
	my ($code) = @_;
	my $before = $stripe->counts;

	$code->();
	my $after = $stripe->counts;
	return join(' ', map { $after->{$_} - $before->{$_} } qw(arrivals connections));
}

my $ok = 'completed|1|200';
my $lost = 'unknown|1|';

#
# Connections are kept
#

is(counted {
	$session->query_safe(q{SELECT count(*) FROM generate_series(1, 100) n,
		LATERAL idempotency.stripe_get('/v1/customers', jsonb_build_object('limit', n)) r
		WHERE outcome <> 'completed'});
}, '100 1', '100 calls, 100 arrivals, one connection');
my $pid = $session->query_safe('SELECT pg_backend_pid()');

sub fds
{
	return join("\n", sort grep { !m{/base/} } map { readlink($_) // () } glob("/proc/$pid/fd/*"));
}

my $fds = fds();
call() for 1 .. 20;
is(fds(), $fds, 'no file descriptor is lost') if $fds;

# ended while idle, and noticed before anything is written
foreach my $how (qw(fin rst))
{
	call();
	$stripe->control('POST', 'connections/close', { how => $how });
	is(counted { is(call(), $ok, "$how of an idle connection is noticed") }, '1 1', 'one arrival, a new connection');
}

# Ended when the next request is under way: libcurl would send it again by
# itself.  It may have arrived, so it is for us to decide.
foreach my $what (qw(close_before reset_before close_after reset_after))
{
	call();
	$stripe->fault($what, match => { reused => JSON::PP::true });
	is(counted { is(call(), $lost, "$what on a kept connection") }, '1 0', 'arrives once');
	$stripe->clear_faults;

	call();
	$stripe->fault($what, match => { reused => JSON::PP::true });
	$session->query_safe('SET idempotency.stripe_max_retries = 1');
	my $started = time;
	is(counted { is(call(), 'completed|2|200', "$what, and again") }, '2 1', 'arrives twice, and twice is told');
	cmp_ok(time - $started, '<', 0.45, 'a connection that has grown old is replaced without a pause');
	$session->query_safe('SET idempotency.stripe_max_retries = 0');
	$stripe->clear_faults;
}

# many ends in a row stay one arrival a call
call();
$stripe->fault('close_before', times => 0);
is(counted { is(call(), $lost, 'a server that always hangs up') }, '1 0', 'arrives once');
$stripe->clear_faults;

# Connection: close is obeyed
$stripe->fault('close_idle', times => 0);
is(counted { call() for 1 .. 3 }, '3 3', 'no connection to keep, none is kept');
$stripe->clear_faults;

#
# Interrupts, in the middle of a request
#

sub wait_for_hang
{
	my ($what) = @_;
	return $stripe->fault($what // 'hang_before', times => 1);
}

sub quickly
{
	my ($started, $name) = @_;
	cmp_ok(time - $started, '<', 3, $name);
}

my $hang;

# cancel
$hang = wait_for_hang();
$session->query_until(qr/^begun$/m,
	"\\echo begun\nSELECT outcome FROM idempotency.stripe_get('/v1/customers');\n\\echo SQLSTATE :SQLSTATE\n");
$stripe->wait_fault($hang, holding => 1);
is(sql($node, "SELECT wait_event_type FROM pg_stat_activity WHERE pid = $pid"), 'Extension', 'the wait can be seen');
my $started = time;
sql($node, "SELECT pg_cancel_backend($pid)");
$session->query_until(qr/^SQLSTATE 57014$/m, '');
$session->{stderr} = '';
$stripe->wait_fault($hang, gone => 1);
quickly($started, 'a cancel ends the call at once, and the connection');
is(call(), $ok, 'the next call has another connection');

# DROP DATABASE of another one needs every backend's ear
$hang = wait_for_hang('hang_after');
sql($node, 'CREATE DATABASE other');
$session->query_until(qr/^begun$/m,
	"\\echo begun\nSELECT outcome FROM idempotency.stripe_get('/v1/customers');\n");
$stripe->wait_fault($hang, holding => 1);
$started = time;
sql($node, 'DROP DATABASE other');
quickly($started, 'another database is dropped meanwhile');
$stripe->release($hang);
$session->query_until(qr/^completed$/m, '');
pass('and the call goes on');

# statement_timeout: the call ends by itself, before it
$hang = wait_for_hang();
$started = time;
is($session->query_safe(
		"SET statement_timeout = '1500 ms'; SELECT outcome, attempts FROM idempotency.stripe_get('/v1/customers')"),
	'unknown|1', 'the call ends before statement_timeout');
quickly($started, 'in time');
$session->query_safe('SET statement_timeout = 0');
$stripe->clear_faults;

# the postmaster dies: covered by WL_EXIT_ON_PM_DEATH, which every wait here has

# terminate
$hang = wait_for_hang();
$session->query_until(qr/^begun$/m,
	"\\echo begun\nSELECT outcome FROM idempotency.stripe_get('/v1/customers');\n");
$stripe->wait_fault($hang, holding => 1);
$started = time;
sql($node, "SELECT pg_terminate_backend($pid, 10000)");
$stripe->wait_fault($hang, gone => 1);
quickly($started, 'terminated at once');
$session->{run}->kill_kill;
$stripe->clear_faults;

# a fast shutdown doesn't wait for an answer, either
$session = $node->background_psql('postgres', on_error_stop => 0);
$hang = wait_for_hang();
$session->query_until(qr/^begun$/m,
	"\\echo begun\nSELECT outcome FROM idempotency.stripe_get('/v1/customers');\n");
$stripe->wait_fault($hang, holding => 1);
$started = time;
$node->stop('fast');
quickly($started, 'fast shutdown');
$session->{run}->kill_kill;
$stripe->clear_faults;
$node->start;

#
# TLS
#

sub tls
{
	my ($certificate, $host, %more) = @_;

	return stripe_get($node, '/v1/customers', settings => {
		stripe_api_base => "https://$host:" . $stripe->tls_port($certificate),
		stripe_ca_file => $stripe->ca, %more });
}

foreach my $case (
	[ 'right', 'localhost', 1 ], [ 'right', '127.0.0.1', 1 ],
	[ 'wrong_host', 'localhost', 0 ], [ 'unknown_ca', 'localhost', 0 ], [ 'expired', 'localhost', 0 ])
{
	my ($certificate, $host, $good) = @$case;
	my $before = $stripe->counts->{arrivals};
	my $r = tls($certificate, $host);

	is($r->{outcome}, $good ? 'completed' : 'not_executed', "certificate $certificate at $host")
	  or diag(explain($r));
	is($stripe->counts->{arrivals} - $before, $good, $good ? 'arrives' : 'and nothing is sent');
	like($r->{error}{message}, qr/certificate|SSL/i, 'the message says why') unless $good;
}
is(tls('right', 'localhost', stripe_ca_file => '')->{outcome}, 'not_executed', "the system doesn't know the authority");
is(tls('right', 'localhost', stripe_ca_file => '/nowhere')->{outcome}, 'not_executed', 'no file of authorities');
is( stripe_get($node, '/v1/customers', timeout => '500 ms',
		settings => { stripe_api_base => 'https://localhost:' . $stripe->port })->{outcome},
	'not_executed', 'no TLS on the other side');
is( sql($node, settings(stripe_api_base => 'https://localhost:' . $stripe->tls_port, stripe_ca_file => $stripe->ca)
		  . q{SELECT count(*) FROM generate_series(1, 20) n, idempotency.stripe_get('/v1/customers', jsonb_build_object('limit', n)) WHERE outcome <> 'completed'}),
	0, 'many calls by TLS');

#
# A name server that doesn't answer.  libcurl resolves in a thread, which must
# hold up neither a cancel nor the end of the session.
#

SKIP:
{
	my $dir = PostgreSQL::Test::Utils::tempdir('resolver');

	append_to_file("$dir/slow.c", q{
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <string.h>
#include <unistd.h>
int
getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **res)
{
	int (*real) (const char *, const char *, const struct addrinfo *, struct addrinfo **) =
		(int (*) (const char *, const char *, const struct addrinfo *, struct addrinfo **)) dlsym(RTLD_NEXT, "getaddrinfo");

	if (node && strcmp(node, "slow.invalid") == 0)
		sleep(30);
	return real(node, service, hints, res);
}
});
	system('cc', '-shared', '-fPIC', '-o', "$dir/slow.so", "$dir/slow.c", '-ldl') == 0
	  or skip 'no compiler', 4;
	$node->stop;
	{
		local $ENV{LD_PRELOAD} = "$dir/slow.so";
		$node->start;
	}

	my $base = settings(stripe_api_base => 'https://slow.invalid');
	$started = time;
	is(sql($node, $base . q{SELECT outcome FROM idempotency.stripe_get('/v1/customers', timeout => '200 ms')}),
		'not_executed', 'a name that is not resolved in time');
	quickly($started, 'in time, and the session ends');

	$session = $node->background_psql('postgres', on_error_stop => 0);
	$pid = $session->query_safe('SELECT pg_backend_pid()');
	$session->query_until(qr/^begun$/m,
		"$base\\echo begun\nSELECT outcome FROM idempotency.stripe_get('/v1/customers');\n\\echo SQLSTATE :SQLSTATE\n");
	$node->poll_query_until('postgres', "SELECT wait_event_type = 'Extension' FROM pg_stat_activity WHERE pid = $pid");
	$started = time;
	sql($node, "SELECT pg_cancel_backend($pid)");
	$session->query_until(qr/^SQLSTATE 57014$/m, '');
	quickly($started, 'a cancel ends it at once');
	$session->{stderr} = '';
	is($session->query_safe(settings(stripe_api_base => $stripe->url)
			  . q{SELECT outcome FROM idempotency.stripe_get('/v1/customers')}), 'completed', 'and the next call works');
	$session->quit;
}

#
# Servers that Stripe isn't.  Each is a list of what to send on one connection,
# one element a request; a code reference may do as it likes.
#

sub server
{
	my (@answers) = @_;
	my $listener = IO::Socket::INET->new(LocalAddr => '127.0.0.1', Listen => 5) or die $!;
	my $parent = $$;
	my $child = fork() // die $!;

	if (!$child)
	{
		# ends without the test's own cleanup, which stops servers
		local $SIG{TERM} = 'DEFAULT';
		alarm 60;
		while (my $connection = $listener->accept)
		{
			foreach my $answer (@answers)
			{
				my $request = '';
				while ($request !~ /\r\n\r\n/)
				{
					sysread($connection, $request, 4096, length $request) or last;
				}
				last unless $request =~ /\r\n\r\n/;
				syswrite($connection, $answer);
			}
			close($connection);
		}
		POSIX::_exit(0);
	}
	return { url => 'http://127.0.0.1:' . $listener->sockport, pid => $child };
}

sub answered
{
	my ($answers, $expected, $name, $calls) = @_;
	my $server = server(@$answers);
	my $got = sql($node, settings(stripe_api_base => $server->{url}) . "SELECT string_agg(concat_ws(' ', outcome, http_status, resource_id, request_id), ', ')
		FROM generate_series(1, " . ($calls // 1) . ") n, LATERAL idempotency.stripe_get('/v1/customers', jsonb_build_object('n', n))");

	kill 'TERM', $server->{pid};
	waitpid($server->{pid}, 0);
	is($got, $expected, $name);
}

sub http
{
	my ($body, @headers) = @_;
	return join("\r\n", 'HTTP/1.1 200 OK', @headers, 'Content-Length: ' . length($body), '', $body);
}

answered([ http('{"id": "cus_1"}', 'Request-Id: req_1') ], 'completed 200 cus_1 req_1', 'an answer');
answered([ "HTTP/1.1 100 Continue\r\nRequest-Id: req_0\r\nIdempotent-Replayed: true\r\n\r\n"
		  . "HTTP/1.1 103 Early Hints\r\nStripe-Should-Retry: true\r\n\r\n"
		  . http('{"id": "cus_1"}', 'Request-Id: req_1') ],
	'completed 200 cus_1 req_1', 'interim answers before it');
answered([ "HTTP/1.1 100 Continue\r\n\r\n" ], 'unknown', 'an interim answer and no more');
answered([ "HTTP/1.0 200 OK\r\n\r\n{\"id\": \"cus_1\"}" ], 'completed 200 cus_1', 'an answer that ends with the connection');
answered([ "HTTP/1.0 200 OK\r\n\r\n{\"id\": \"cus_1\"" ], 'unknown 200', 'and one that is cut');
answered([ "{\"id\": \"cus_1\"}\r\n\r\n" ], 'unknown', 'no HTTP at all (HTTP/0.9)');
answered([ "HTTP/1.1 200 OK\r\nContent-Length: 15\r\nContent-Length: 3\r\n\r\n{\"id\": \"cus_1\"}" ], 'unknown 200',
	'two lengths');
answered([ http('{"id": "cus_1"}', 'Request-Id: ' . 'x' x 300) ], 'completed 200 cus_1', 'an absurd Request-Id is left out');
answered([ http('{"id": "cus_1"}', "Request-Id: req_\x{c3}\x{a9}") ], 'completed 200 cus_1', 'and one that is not ASCII');
answered([ http('{"id": "cus_1"}', map { "X-$_: " . 'x' x 1000 } 1 .. 100) ], 'unknown 200', '100 kB of headers');
answered([ http('{"id": "cus_1", "x": "a\u0000b"}') ], 'completed 200 cus_1', 'a character that jsonb has not');
answered([ http("{\"id\": \"cus_1\", \"x\": \"a\0b\"}") ], 'unknown 200', 'a zero byte');
answered([ http("{\"id\": \"cus_1\", \"x\": \"\xff\xfe\"}") ], 'unknown 200', 'bytes that are no UTF-8');
answered([ http('{"id": "cus_1", "x": ' . '[' x 100_000 . ']' x 100_000 . '}') ], 'completed 200 cus_1', 'a JSON too deep for jsonb');
answered([ http('{"id": "cus_1", "x": 1e999999999}') ], 'completed 200 cus_1', 'a number too large for jsonb');
answered([ http('[{"id": "cus_1"}]') ], 'unknown 200', 'an array');
answered([ http('') ], 'unknown 200', 'nothing');
answered([ "HTTP/1.1 204 No Content\r\n\r\n" ], 'unknown 204', 'no content');
answered([ http('{"id": "cus_1"}', 'Content-Encoding: gzip') ], 'completed 200 cus_1', 'nothing is decompressed');

# what lies in a kept connection isn't the answer to the next request
answered([ http('{"id": "cus_1"}') . http('{"id": "cus_evil"}'), http('{"id": "cus_2"}') ],
	'completed 200 cus_1, completed 200 cus_1', 'a second answer that nobody asked for', 2);

# and what comes later is not, either
{
	my $listener = IO::Socket::INET->new(LocalAddr => '127.0.0.1', Listen => 5) or die $!;
	my $late = $node->background_psql('postgres');
	$late->query_safe("LOAD 'idempotency'; " . settings(stripe_api_base => 'http://127.0.0.1:' . $listener->sockport));
	my $query = "SELECT resource_id FROM idempotency.stripe_get('/v1/customers');";
	my $read = sub {
		my ($connection) = @_;
		my $request = '';
		sysread($connection, $request, 4096, length $request) or die 'no request' while $request !~ /\r\n\r\n/;
	};

	$late->query_until(qr/begun/, "\\echo begun\n$query\n");
	my $first = $listener->accept;
	$read->($first);
	syswrite($first, http('{"id": "cus_1"}'));
	$late->query_until(qr/cus_1/, '');

	syswrite($first, "HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n");
	$late->query_until(qr/begun/, "\\echo begun\n$query\n");
	my $second = $listener->accept;
	$read->($second);
	syswrite($second, http('{"id": "cus_2"}'));
	$late->query_until(qr/cus_2/, '');
	pass('a connection on which something waits is not used again');
	$late->quit;
}

# file descriptors that others in the backend have used up
SKIP:
{
	my $small = stripe_node('small', $stripe, conf => "idempotency.stripe_max_retries = 0\nmax_files_per_process = 64\n");

	skip 'there is no dblink', 6 if ($small->psql('postgres', 'CREATE EXTENSION dblink'))[0] != 0;
	my $dblink = $small->background_psql('postgres', on_error_stop => 0);
	my $get = q{SELECT outcome, attempts, error ->> 'message' FROM idempotency.stripe_get('/v1/customers')};
	my $connstr = literal($small->connstr('postgres'));
	my $n = 0;

	for (1 .. 60)
	{
		$dblink->{stderr} = '';
		$dblink->query("SELECT dblink_connect('c$n', $connstr)");
		last if $dblink->{stderr} ne '';
		$n++;
	}
	$dblink->{stderr} = '';
	cmp_ok($n, '>', 0, "$n connections use the backend's file descriptors up");
	my $before = $stripe->counts->{arrivals};
	like($dblink->query($get), qr/^not_executed\|\d\|.*too many open files in this backend/m, 'no file descriptor: nothing was executed');
	$dblink->query("SELECT dblink_disconnect('c0')");
	$dblink->query("SELECT dblink_disconnect('c1')");
	like($dblink->query($get), qr/^not_executed\|\d\|.*too many open files in this backend/m, 'nor with less than it takes');
	is($stripe->counts->{arrivals}, $before, 'and nothing is sent');
	$dblink->query("SELECT dblink_disconnect('c$_')") foreach 2 .. $n - 1;
	like($dblink->query($get), qr/^completed\|1\|/m, 'then it goes on');
	is($dblink->{stderr}, '', 'without an error');
	$dblink->quit;
	$small->stop;
}

$node->stop;
is_deeply($stripe->counts->{internal_errors}, [], 'the fake had no error of its own');
$stripe->stop;

done_testing();
