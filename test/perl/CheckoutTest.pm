
=pod

=head1 NAME

CheckoutTest - what both applications of examples/ have to stand

=head1 DESCRIPTION

Drives a checkout over HTTP, with a real server and the fake Stripe, through
what goes wrong with payments.  What is counted in the end is the fake's count.

=cut

package CheckoutTest;

use strict;
use warnings;
use feature 'state';

use Exporter 'import';
use FakeStripe;
use IdempotencyTest;
use IO::Select;
use IO::Socket::INET;
use IPC::Run;
use JSON::PP;
use MIME::Base64;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Socket qw(SOL_SOCKET SO_LINGER);
use StripeTest;
use Test::More;
use Time::HiRes ();

our @EXPORT = qw(test_checkouts test_misfortunes test_example example_in_node example_in_python run_program node_lacks);

my $json = JSON::PP->new->utf8->canonical;
my ($node, $stripe, $port, $application, $command, $log);

# An application that is left over ends with the test.
END
{
	my $status = $?;
	$application->kill_kill if $application;
	$? = $status;
}

=pod

=over

=item run_program(@command)

Run it for at most two minutes; its output, and whether it succeeded.

=cut

sub run_program
{
	my (@command) = @_;
	my ($stdout, $stderr) = ('', '');
	my $ok = eval {
		IPC::Run::run(\@command, '<', \undef, '>', \$stdout, '2>', \$stderr, IPC::Run::timeout(120));
	};

	return ($stdout . $stderr . ($@ // ''), $ok);
}

=pod

=item node_lacks($directory)

What keeps programs in it from running by Node, with pg and Stripe's library, which are
fetched: a reason, or undef.

=cut

sub node_lacks
{
	my ($dir) = @_;

	return npm_cannot(18, $dir, 'install', 'stripe@23', 'pg@8');
}

# Why a command of npm's can't be carried out in a directory, or undef.
sub npm_cannot
{
	my ($oldest, $dir, $command, @what) = @_;

	foreach my $program ('node', 'npm')
	{
		my (undef, $ok) = run_program($program, '--version');
		return "$program is not installed" unless $ok;
	}
	my ($version) = run_program('node', '--version');
	return "node is older than $oldest" if ($version =~ /^v(\d+)/)[0] < $oldest;

	my ($output, $ok) = run_program('npm', $command, '--prefix', $dir, '--no-audit', '--no-fund', '--loglevel=error',
		'--ignore-scripts', '--fetch-retries=0', '--fetch-timeout=15000', @what);
	$output =~ s/\s+/ /g;
	return $ok ? undef : 'npm cannot fetch stripe and pg: ' . substr($output, 0, 200);
}

=pod

=item example_in_node(), example_in_python()

The command that starts an example, and whether Stripe's library is there; or undef, and what it lacks.

=cut

my $examples = "$FindBin::RealBin/../../examples";

sub example_in_node
{
	# as it stands there, with the libraries that its lock file names
	my $dir = PostgreSQL::Test::Utils::tempdir() . '/checkout-node';
	my ($output, $ok) = run_program('cp', '-R', "$examples/checkout-node", $dir);
	die $output unless $ok;
	my $reason = npm_cannot(20, $dir, 'ci');
	return defined $reason ? (undef, $reason) : ([ 'node', "$dir/server.mjs" ], 1);
}

=pod

=item test_example(\&tests, example_in_...())

The whole of a test script: these tests with that example, or a skip.

=cut

sub test_example
{
	my ($tests, $command, $sdk) = @_;

	plan skip_all => $sdk unless $command;
	$tests->($command, $sdk);
	done_testing();
	return;
}

sub example_in_python
{
	my (undef, $psycopg) = run_program('python3', '-c', 'import psycopg');
	return (undef, 'python3 has no psycopg') unless $psycopg;

	my (undef, $sdk) = run_program('python3', '-c', 'import stripe');
	note("python3 has no stripe: /checkout-by-sdk isn't tested") unless $sdk;
	return ([ 'python3', '-B', "$examples/checkout-python/server.py" ], $sdk);
}

#
# The application
#

sub start_application
{
	local $ENV{PORT} = $port;
	local $ENV{PGUSER} = 'shop';

	$log = '';
	$application = IPC::Run::start($command, '<', \undef, '>&', \$log);
	my $tries = 10 * $PostgreSQL::Test::Utils::timeout_default;
	until (IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => $port))
	{
		die "it doesn't listen: $log" unless $tries-- > 0 && $application->pumpable;
		Time::HiRes::usleep(100_000);
	}
	return;
}

sub kill_application
{
	$application->kill_kill(grace => 0);
	undef $application;
	return;
}

# Send a request, and don't wait for its answer.
sub send_request
{
	my ($path, $headers, $body) = @_;
	my $socket = IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => $port, Timeout => 60) or die "connect: $!";

	$body = $json->encode($body) if ref $body;
	my %headers = (Host => 'localhost', Connection => 'close', 'Content-Length' => length($body), %$headers);
	print $socket "POST $path HTTP/1.1\r\n"
	  . join('', map { "$_: $headers{$_}\r\n" } grep { defined $headers{$_} } sort keys %headers)
	  . "\r\n$body";
	$socket->flush;
	return $socket;
}

# Its answer: a hash of status, headers and body.
sub answer_of
{
	my ($socket) = @_;

	local $SIG{ALRM} = sub { die "no answer; the application says: $log" };
	alarm $PostgreSQL::Test::Utils::timeout_default;
	my $text = do { local $/; <$socket> } // '';
	alarm 0;
	my ($head, $body) = split /\r\n\r\n/, $text, 2;
	my ($status) = ($head // '') =~ m{^HTTP/1\.[01] (\d+)} or return { status => 0, headers => {} };
	my %headers = map { lc($_->[0]) => $_->[1] } map { [ split /: /, $_, 2 ] } split /\r\n/, $head =~ s/^[^\r]*\r\n//r;

	$body = join '', $body =~ /\A(?:[0-9a-f]+\r\n(.*?)\r\n)+0\r\n/s if ($headers{'transfer-encoding'} // '') eq 'chunked';
	return { status => $status, headers => \%headers, body => ($body // '') eq '' ? undef : $json->allow_nonref->decode($body) };
}

# The statuses that they are told within half a minute; "none" where somebody has to wait.
sub prompt_statuses
{
	my @sockets = @_;
	my $until = Time::HiRes::time() + 30;
	my @statuses;

	foreach my $socket (@sockets)
	{
		my $left = $until - Time::HiRes::time();

		push @statuses, IO::Select->new($socket)->can_read($left > 0 ? $left : 0) ? answer_of($socket)->{status} : 'none';
	}
	return join(' ', @statuses);
}

sub is_alive
{
	my ($name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	# a process that ends needs a moment for it
	Time::HiRes::usleep(200_000);
	my $status = eval { checkout('/nothing', undef)->{status} } // 'none';
	my $alive = $application->pumpable && $status eq '404';
	ok($alive, $name) or diag("status $status\n$log");
	start_application() unless $alive;
	return;
}

sub send_checkout
{
	my ($path, $key, %params) = @_;

	return send_request(
		$path,
		{ Authorization => 'Bearer session-of-ada', 'Idempotency-Key' => $key, %{ $params{headers} // {} } },
		$params{body} // { cart => $params{cart} // 'ada-1', payment_method => $params{card} // 'pm_card_visa' });
}

sub checkout
{
	return answer_of(send_checkout(@_));
}

# The answer as a client would see it who repeats its request while it is told to.
sub persistent_checkout
{
	my (@request) = @_;
	my $tries = 600;
	my $answer;

	while (($answer = checkout(@request))->{status} =~ /^(409|503)$/)
	{
		die 'no end of ' . $json->encode($answer) . "\n$log" unless $tries-- > 0;
		Time::HiRes::usleep(100_000);
	}
	return $answer;
}

sub order_id
{
	my ($key) = @_;

	return sql($node, 'SELECT idempotency.operation_uuid(' . literal($key) . q{, 'ada')});
}

sub state_of
{
	my ($key) = @_;

	return sql($node, 'SELECT state FROM orders WHERE id = ' . literal(order_id($key)));
}

sub charges
{
	my ($key) = @_;

	return $stripe->charges(metadata => { order_id => order_id($key) });
}

# How many requests have reached Stripe for an order.
sub arrivals
{
	my ($key) = @_;
	my $stripe_key = sql($node, q{SELECT idempotency.stripe_idempotency_key('payment', } . literal(order_id($key)) . ')');

	return scalar($stripe->arrivals(key => $stripe_key));
}

# Let the lease of everything that a dead application holds go by.
sub lapse_leases
{
	sql($node, q{
		UPDATE idempotency.idempotency_keys SET lease_expires_at = clock_timestamp() - interval '1 microsecond'
			WHERE recorded_at IS NULL AND lease_expires_at IS NOT NULL;
		UPDATE idempotency.stripe_idempotency_keys SET lease_expires_at = clock_timestamp() - interval '1 microsecond'
			WHERE recorded_at IS NULL AND lease_expires_at IS NOT NULL});
	return;
}

sub is_paid_once
{
	my ($answer, $key, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return subtest $name => sub {
		is($answer->{status}, 201, 'status') or diag($json->encode($answer), "\n$log");
		is($answer->{body}{state}, 'paid', 'says that it is paid');
		is($answer->{body}{order}, order_id($key), 'the order that the key names');
		is(state_of($key), 'paid', 'the order is paid');
		is(charges($key), 1, 'charged once');
	};
}

#
# What goes wrong, for one of the two ways to pay
#

# How often Stripe is asked within a request of the client's: the database repeats, the
# library doesn't.
sub tries
{
	my ($path) = @_;

	return $path eq '/checkout' ? 3 : 1;
}

sub test_checkout
{
	my ($path, $name) = @_;
	my $key = sub { "$name-$_[0]" };
	my %intents = (match => { path => '/v1/payment_intents' });
	my %always = (%intents, times => tries($path));
	my ($answer, $again, $number);

	note($path);

	# as it should be
	$answer = checkout($path, $key->('plain'));
	is_paid_once($answer, $key->('plain'), "$name: a payment");
	$again = checkout($path, '"' . $key->('plain') . '"');
	is($again->{headers}{'idempotent-replayed'}, 'true', "$name: the same again, its key in quotes, is a replay");
	is_deeply($again->{body}, $answer->{body}, "$name: of the same answer");
	is(arrivals($key->('plain')), 1, "$name: and Stripe isn't asked");
	is(checkout($path, $key->('plain'), cart => 'ada-2')->{status}, 422, "$name: another cart with the key");
	is(charges($key->('plain')), 1, "$name: charges nothing");
	is( checkout($path, $key->('plain'), headers => { Authorization => 'Bearer session-of-ben' }, cart => 'ben-1')->{status},
		201, "$name: somebody else's key of the same text is another one");

	# twenty clicks at once
	my @clicks = map { answer_of($_) } map { send_checkout($path, $key->('clicks')) } 1 .. 20;
	is(scalar(grep { $_->{status} !~ /^(201|409)$/ } @clicks), 0, "$name: twenty clicks are told 201 or 409")
	  or diag($json->encode(\@clicks), "\n$log");
	is(scalar(grep { $_->{status} == 409 && !$_->{headers}{'retry-after'} } @clicks), 0, "$name: and when to come back");
	$answer = persistent_checkout($path, $key->('clicks'));
	is_paid_once($answer, $key->('clicks'), "$name: twenty clicks are one payment");
	is(scalar(grep { $_->{status} == 201 && $json->encode($_->{body}) ne $json->encode($answer->{body}) } @clicks),
		0, "$name: and one answer");
	is(arrivals($key->('clicks')), 1, "$name: by one request");

	# a card that is declined
	$answer = checkout($path, $key->('declined'), card => 'pm_card_chargeDeclined');
	is("$answer->{status} $answer->{body}{reason}", '402 card_declined', "$name: a declined card");
	$again = checkout($path, $key->('declined'), card => 'pm_card_chargeDeclined');
	is("$again->{status} " . ($again->{headers}{'idempotent-replayed'} // ''), '402 true', "$name: stays declined");
	is(checkout($path, $key->('declined'))->{status}, 422, "$name: another card with the key");
	is(state_of($key->('declined')), 'declined', "$name: the order says so");
	is(charges($key->('declined')), 0, "$name: nothing charged");
	is_paid_once(checkout($path, $key->('other-card')), $key->('other-card'), "$name: another card, another key");

	# a card that its holder has to confirm
	$answer = checkout($path, $key->('action'), card => 'pm_card_authenticationRequired');
	is("$answer->{status} $answer->{body}{state}", '201 requires_action', "$name: a payment to be confirmed");

	# all answers lost, as often as it is tried
	$stripe->fault('close_after', %always);
	$answer = checkout($path, $key->('lost'));
	is(arrivals($key->('lost')), tries($path), "$name: Stripe is asked as often as it should");
	is($answer->{status}, 503, "$name: a lost answer") or diag($log);
	cmp_ok($answer->{headers}{'retry-after'} // 0, '>=', 1, "$name: with Retry-After");
	is(state_of($key->('lost')), 'checking', "$name: the order is being checked");
	is(charges($key->('lost')), 1, "$name: although it is charged");
	is(checkout($path, $key->('lost'), cart => 'ada-2')->{status},
		422, "$name: another cart with the key, though the claim was released");
	is( checkout($path, $key->('lost'), body => { cart => 'ada-1', payment_method => 'pm_card_visa', gift => 'yes' })->{status},
		422, "$name: and whatever else differs, though it goes neither to the order nor to Stripe");
	is_paid_once(checkout($path, $key->('lost')), $key->('lost'), "$name: the retry after a lost answer");

	# one lost answer, which is asked for again, before the client hears of it or when it repeats
	$stripe->fault('reset_after', %intents);
	is_paid_once(persistent_checkout($path, $key->('lost-once')), $key->('lost-once'), "$name: one lost answer");
	is(arrivals($key->('lost-once')), 2, "$name: two requests");

	# a refusal after a lost answer is none of the payment
	$stripe->fault('close_after', %intents, nth => 1);
	$stripe->fault('429', %intents, nth => 2, times => 0);
	is(checkout($path, $key->('refused-later'))->{status}, 503, "$name: refused after a lost answer");
	is(sql($node, q{SELECT outcome FROM idempotency.stripe_lookup('payment', } . literal(order_id($key->('refused-later'))) . ')'),
		'unknown', "$name: nobody knows, whatever came later");
	$stripe->clear_faults;
	is_paid_once(checkout($path, $key->('refused-later')), $key->('refused-later'), "$name: the retry");

	# answers that aren't Stripe's
	foreach my $what (qw(not_json cut 502))
	{
		$stripe->fault($what, %always);
		checkout($path, $key->($what));
		$stripe->clear_faults;
		is_paid_once(persistent_checkout($path, $key->($what)), $key->($what), "$name: $what");
	}

	# a gateway on the way answers in Stripe's place, after the charge
	my %gateway = (
		html => [ 404, '<html><h1>Not Found</h1></html>' ],
		empty => [ 403, '' ],
		'no object' => [ 429, '[{"message": "too fast"}]' ],
		'likely object' => [ 402, '{"error": {"code": 402, "message": "payment required", "status": "PAYMENT_REQUIRED"}}' ],
		json => [ 404, '{"message": "no such route", "id": "route_1"}' ],
		string => [ 401, '{"error": "unauthorized"}' ],
		success => [ 200, '{"error": "upstream timed out"}' ],
		'no body' => [ 200, '' ],
		null => [ 200, 'null' ],
		number => [ 200, '7' ],
		list => [ 200, '[]' ]);
	foreach my $what (sort keys %gateway)
	{
		my ($status, $body) = @{ $gateway{$what} };

		$stripe->fault('not_json', %intents, times => 0, status => $status, body => $body);
		$answer = checkout($path, $key->("gateway-$what"));
		$stripe->clear_faults;
		is($answer->{status}, 503, "$name: a gateway's $status ($what) is no answer")
		  or diag($json->encode($answer), "\n$log");
		is(state_of($key->("gateway-$what")), 'checking', "$name: the order is being checked");
		is(charges($key->("gateway-$what")), 1, "$name: although it is charged");
		is(sql($node, q{SELECT outcome FROM idempotency.stripe_lookup('payment', }
			. literal(order_id($key->("gateway-$what"))) . ')'), 'unknown', "$name: and nobody knows");
		is_paid_once(checkout($path, $key->("gateway-$what")), $key->("gateway-$what"),
			"$name: the retry after a gateway's $status ($what)");
	}

	# something on the way sends it elsewhere, where there is an answer that looks like one
	$stripe->fault('redirect', %intents, times => 0, status => 303, location => $stripe->url . '/v1/customers', effect => JSON::PP::true);
	$answer = checkout($path, $key->('redirect'));
	$stripe->clear_faults;
	is($answer->{status}, 503, "$name: a redirect is no answer") or diag($json->encode($answer), "\n$log");
	is(charges($key->('redirect')), 1, "$name: although it is charged");
	is_paid_once(checkout($path, $key->('redirect')), $key->('redirect'), "$name: the retry after a redirect");

	# Stripe does nothing
	$stripe->fault('429', %intents, times => 0);
	$answer = checkout($path, $key->('busy'));
	is($answer->{status}, 503, "$name: Stripe is busy");
	$stripe->clear_faults;
	is(charges($key->('busy')), 0, "$name: nothing charged");
	is_paid_once(checkout($path, $key->('busy')), $key->('busy'), "$name: the retry when it isn't");

	# the client leaves in the middle, and comes back
	foreach my $what (qw(hang_before hang_after))
	{
		$number = $stripe->fault($what, %intents);
		my $socket = send_checkout($path, $key->($what));
		$stripe->wait_fault($number, holding => 1);
		close($socket);
		my $second = send_checkout($path, $key->($what));
		$stripe->release($number);
		is(answer_of($second)->{status} =~ /^(201|409)$/ ? 'ok' : 'not ok', 'ok', "$name: $what, the client comes back at once");
		is_paid_once(persistent_checkout($path, $key->($what)), $key->($what), "$name: $what, and is charged once");
		is(arrivals($key->($what)), 1, "$name: by one request");
	}

	# the application dies in the middle, before or after the charge
	foreach my $what (qw(hang_in_use hang_after))
	{
		my $this = $key->("killed-$what");

		$number = $stripe->fault($what, %intents);
		my $socket = send_checkout($path, $this);
		$stripe->wait_fault($number, holding => 1);
		kill_application();
		close($socket);
		start_application();
		if ($path ne '/checkout')
		{
			$answer = checkout($path, $this);
			is($answer->{status}, 409, "$name: killed in $what, its lease is alive");
			cmp_ok($answer->{headers}{'retry-after'} // 0, '>=', 1, "$name: with Retry-After");
		}
		$stripe->release($number);
		lapse_leases();
		is_paid_once(persistent_checkout($path, $this), $this, "$name: killed in $what, and repeated");
	}

	# answers that an event has to tell: lost ones, and a 500, which Stripe would only repeat
	foreach my $what (qw(close_after 500))
	{
		my $this = $key->("event-$what");

		$stripe->fault($what, %always, $what eq '500' ? (effect => JSON::PP::true) : ());
		is(checkout($path, $this)->{status}, 503, "$name: no answer but $what");
		$stripe->clear_faults;
		is(checkout($path, $this)->{status}, 503, "$name: the retry after a 500") if $what eq '500';
		my $before = arrivals($this);
		is(scalar(deliver_events()), 0, "$name: events are taken");
		is(state_of($this), 'paid', "$name: one of them settles it");
		is_paid_once(checkout($path, $this), $this, "$name: the client comes back after all");
		is(arrivals($this), $before, "$name: Stripe isn't asked again");
	}

	# an event while it is asked again: the doubt that follows doesn't overwrite it
	if ($path ne '/checkout')
	{
		$stripe->fault('close_after', %intents, times => 2);
		is(checkout($path, $key->('meanwhile'))->{status}, 503, "$name: a lost answer");
		$number = $stripe->fault('hang_before', %intents);
		my $socket = send_checkout($path, $key->('meanwhile'));
		$stripe->wait_fault($number, holding => 1);
		is(scalar(deliver_events()), 0, "$name: an event while Stripe is asked again");
		$stripe->release($number);
		is(answer_of($socket)->{status}, 503, "$name: and doesn't answer again");
		is(state_of($key->('meanwhile')), 'paid', "$name: stays paid");
		is_paid_once(checkout($path, $key->('meanwhile')), $key->('meanwhile'), "$name: and is paid once");
	}

	# an event that comes before the answer
	$number = $stripe->fault('hang_after', %intents);
	my $waiting = send_checkout($path, $key->('early'));
	$stripe->wait_fault($number, holding => 1);
	my @refused = deliver_events();
	if ($path eq '/checkout')
	{
		is(scalar(@refused), 1, "$name: an event that is faster than the transaction has to come again");
		is(sql($node, 'SELECT state, last_error FROM idempotency.stripe_webhook_pending'),
			'failed|There is no such order, or not yet.', "$name: and the ledger says why");
	}
	else
	{
		is(scalar(@refused), 0, "$name: an event that is faster than the answer");
		is(state_of($key->('early')), 'paid', "$name: is what the order says");
	}
	$stripe->release($number);
	is_paid_once(answer_of($waiting), $key->('early'), "$name: the answer after the event");
	$stripe->control('POST', 'webhooks/resend', { event => $_ }) foreach @refused;
	is(scalar(deliver_events()), 0, "$name: the event comes again");
	return;
}

#
# What only somebody who repairs, or time, makes of an operation: the client, who
# repeats its request, is told what is known, and isn't charged again
#

# The payment that Stripe has made for an order.
sub payment_of
{
	my ($key) = @_;

	return sql($node, q{SELECT o ->> 'id' FROM idempotency.stripe_get('/v1/payment_intents', '{"limit": 100}') g,
		jsonb_array_elements(g.response -> 'data') o WHERE o -> 'metadata' ->> 'order_id' = } . literal(order_id($key)));
}

sub settle
{
	my ($key, $arguments) = @_;

	sql($node, q{SELECT idempotency.stripe_settle('payment', } . literal(order_id($key)) . ", $arguments)");
	return;
}

# A key that has expired has forgotten its answer.
sub forget_key
{
	my ($key) = @_;

	sql($node, q{UPDATE idempotency.idempotency_keys SET expires_at = clock_timestamp() - interval '1 microsecond' WHERE key = }
		  . literal($key));
	return;
}

sub test_recovered
{
	my ($path, $name) = @_;
	my %intents = (match => { path => '/v1/payment_intents' });
	my $lose = sub {
		my ($key, $what) = @_;

		$stripe->fault($what // 'close_after', %intents, times => tries($path));
		is(checkout($path, $key)->{status}, 503, "$name: $key: no answer");
		$stripe->clear_faults;
	};
	my ($key, $answer, $before);

	# settled by hand with the id: the retry, and one when the key is forgotten
	$lose->($key = "$name-settled");
	settle($key, q{'completed', } . literal(payment_of($key)));
	$before = arrivals($key);
	$stripe->fault('503', match => { method => 'GET' }, times => 0);
	is(checkout($path, $key)->{status}, 503, "$name: settled by its id, while Stripe doesn't answer");
	$stripe->clear_faults;
	is_paid_once(checkout($path, $key), $key, "$name: settled by its id");
	forget_key($key);
	is_paid_once(checkout($path, $key), $key, "$name: settled by its id, and the key forgotten");
	is(arrivals($key), $before, "$name: nothing is sent again");

	# with the object
	$lose->($key = "$name-settled-whole");
	settle($key, q{'completed', response => (SELECT response FROM idempotency.stripe_get('/v1/payment_intents/} . payment_of($key) . q{'))});
	is_paid_once(checkout($path, $key), $key, "$name: settled with its object");

	# with neither, or with an id that isn't a payment's
	foreach my $what ('NULL', "'pi_nowhere'", "'ch_else'")
	{
		$lose->($key = "$name-settled-$what");
		settle($key, "'completed', $what");
		$answer = checkout($path, $key);
		is("$answer->{status} $answer->{body}{state}", '201 completed', "$name: settled with id $what") or diag($log);
		is(charges($key), 1, "$name: charged once");
	}
	deliver_events();

	# as failed, without an error
	$lose->($key = "$name-settled-failed", 'close_before');
	settle($key, "'failed'");
	is(checkout($path, $key)->{status}, 402, "$name: settled as failed");
	is(state_of($key), 'declined', "$name: the order says so");
	is(charges($key), 0, "$name: nothing charged");

	# long ago
	foreach my $card (qw(pm_card_visa pm_card_chargeDeclined))
	{
		my $paid = $card eq 'pm_card_visa';

		$key = "$name-old-$card";
		checkout($path, $key, card => $card);
		$before = arrivals($key);
		# bodies stay until it is written down how the caller has ended
		foreach (1 .. 300)
		{
			last if sql($node, q{SELECT callers IS NULL FROM idempotency.stripe_idempotency_keys WHERE operation_id = }
				  . literal(order_id($key))) eq 't';
			select(undef, undef, undef, 0.1);
		}
		sql($node, 'SET idempotency.stripe_body_retention = 0; SELECT FROM idempotency.expire(100000)');
		is(sql($node, q{SELECT response IS NULL AND request IS NULL AND error IS NULL FROM idempotency.stripe_lookup('payment', }
				  . literal(order_id($key)) . ')'), 't', "$name: its bodies are gone");
		forget_key($key);
		$answer = checkout($path, $key, card => $card);
		is($answer->{status}, $paid ? 201 : 402, "$name: $card, long ago") or diag($json->encode($answer), "\n$log");
		is(state_of($key), $paid ? 'paid' : 'declined', "$name: the order says so");
		is(arrivals($key), $before, "$name: nothing is sent again");
	}

	# reopened
	$key = "$name-old-pm_card_chargeDeclined";
	sql($node, q{SELECT idempotency.stripe_reopen('payment', } . literal(order_id($key)) . ')');
	forget_key($key);
	$answer = checkout($path, $key, card => 'pm_card_chargeDeclined');
	is("$answer->{status} $answer->{body}{reason}", '402 card_declined', "$name: reopened") or diag($json->encode($answer), "\n$log");
	is(arrivals($key), 1, "$name: it is sent with the new key");

	# an orphan: paid in a transaction that was rolled back
	$key = "$name-orphan";
	my $params = { amount => 1990, currency => 'eur', confirm => JSON::PP::true, payment_method => 'pm_card_visa',
		automatic_payment_methods => { enabled => JSON::PP::true, allow_redirects => 'never' }, metadata => { order_id => order_id($key) } };
	sql($node, q{BEGIN; SELECT FROM idempotency.stripe_call('payment', } . literal(order_id($key)) . q{, 'POST', '/v1/payment_intents', }
		  . literal($json->encode($params)) . '); ROLLBACK');
	is_paid_once(checkout($path, $key), $key, "$name: an orphan is adopted");
	return;
}

#
# What happens to programs: their connections end, the database restarts, is away, has
# no place for them; their clients leave
#

# End all sessions of the application's.
sub terminate_backends
{
	return sql($node, q{SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'shop'});
}

# Hold the table of orders, so that requests and events wait in the middle of their
# transactions; a function that lets it go.
sub hold_orders
{
	my $session = $node->background_psql('postgres');

	$session->query_safe('BEGIN; LOCK TABLE orders IN ACCESS EXCLUSIVE MODE');
	return sub { $session->quit };
}

sub wait_for_waiter
{
	$node->poll_query_until('postgres', q{SELECT EXISTS (SELECT FROM pg_stat_activity WHERE usename = 'shop' AND wait_event_type = 'Lock')})
	  or die "nobody waits: $log";
	return;
}

sub misfortunes_of
{
	my ($path, $name) = @_;
	my $key = sub { "$name-$_[0]" };
	my %intents = (match => { path => '/v1/payment_intents' });
	my ($number, $socket, $answer);

	# its backend is terminated, the server restarted or killed, while Stripe has the request
	my %ends = (
		terminated => \&terminate_backends,
		restarted => sub { $node->restart },
		crashed => sub { $node->stop('immediate'); $node->start });
	foreach my $what (sort keys %ends)
	{
		$number = $stripe->fault('hang_after', %intents);
		$socket = send_checkout($path, $key->($what));
		$stripe->wait_fault($number, holding => 1);
		$ends{$what}->();
		if ($path eq '/checkout')
		{
			is(answer_of($socket)->{status}, 503, "$name: $what while Stripe has the request");
			$stripe->release($number);
		}
		else
		{
			$stripe->release($number);
			is_paid_once(answer_of($socket), $key->($what), "$name: $what while Stripe has the request: no connection is held");
		}
		is_alive("$name: the program goes on");
		lapse_leases();
		is_paid_once(persistent_checkout($path, $key->($what)), $key->($what), "$name: $what, and repeated");
	}

	# its backend is terminated in the middle of its own transaction
	my $release = hold_orders();
	$socket = send_checkout($path, $key->('waits'));
	wait_for_waiter();
	terminate_backends();
	is(answer_of($socket)->{status}, 503, "$name: terminated in its own transaction");
	$release->();
	is_alive("$name: the program goes on");
	is_paid_once(persistent_checkout($path, $key->('waits')), $key->('waits'), "$name: and repeated");

	# idle connections end between two requests, more than once
	foreach (1 .. 3)
	{
		terminate_backends();
		is_alive("$name: its idle connections were terminated");
	}
	is_paid_once(persistent_checkout($path, $key->('idle')), $key->('idle'), "$name: the next request finds one");

	# the database is away
	$node->stop;
	is(checkout($path, $key->('away'))->{status}, 503, "$name: the database is away");
	$node->start;
	is_alive("$name: the program goes on");
	is_paid_once(persistent_checkout($path, $key->('away')), $key->('away'), "$name: the database is back");

	# a customer clicks, again and again, while Stripe has the first request: nobody else waits
	my $ben = sub {
		my ($of) = @_;

		return send_checkout($path, $of, headers => { Authorization => 'Bearer session-of-ben' }, cart => 'ben-1');
	};
	sql($node, q{ALTER ROLE shop SET idempotency.wait_timeout = '5min'; ALTER ROLE shop SET idempotency.stripe_timeout = '5min'});
	terminate_backends();
	is_alive("$name: with long timeouts");
	$number = $stripe->fault('hang_before', %intents);
	my @clicks = send_checkout($path, $key->('impatient'));
	$stripe->wait_fault($number, holding => 1);
	push @clicks, send_checkout($path, $key->('impatient')) foreach 1 .. 25;
	is(prompt_statuses($ben->($key->('patient'))), 201, "$name: another customer, while one clicks and clicks") or diag($log);
	is(prompt_statuses(@clicks[ 1 .. 25 ]), join(' ', (409) x 25), "$name: who clicks is told so");
	$stripe->release($number);
	is_paid_once(answer_of($clicks[0]), $key->('impatient'), "$name: the first click pays");
	is(arrivals($key->('impatient')), 1, "$name: by one request");

	# more payments at once than the program has connections
	$number = $stripe->fault('hang_before', %intents, times => 22);
	my @many = map { send_checkout($path, $key->("many-$_")) } 1 .. 22;
	$stripe->wait_fault($number, holding => $path eq '/checkout' ? 20 : 22);
	is(prompt_statuses($ben->($key->('one more'))), $path eq '/checkout' ? 503 : 201,
		"$name: one more, where " . ($path eq '/checkout' ? 'no connection is to be had' : 'no connection is held'));
	$stripe->clear_faults;
	is(scalar(grep { answer_of($_)->{status} !~ /^(201|503)$/ } @many), 0, "$name: all are told something") or diag($log);
	is(scalar(grep { persistent_checkout($path, $key->("many-$_"))->{status} != 201 } 1 .. 22), 0, "$name: and all pay");
	is(scalar(grep { charges($key->("many-$_")) != 1 } 1 .. 22), 0, "$name: once");
	sql($node, q{ALTER ROLE shop RESET idempotency.wait_timeout; ALTER ROLE shop RESET idempotency.stripe_timeout});
	terminate_backends();

	# the client leaves in the middle of its own request
	foreach my $part ("POST $path HTTP/1.1\r\nHost: localhost\r\n",
		"POST $path HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{\"cart\": ")
	{
		foreach my $how (0, 1)
		{
			$socket = IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => $port, Timeout => 60) or die "connect: $!";
			print $socket $part;
			$socket->flush;
			setsockopt($socket, SOL_SOCKET, SO_LINGER, pack('ii', 1, 0)) if $how;	# by RST
			close($socket);
		}
	}
	is_alive("$name: clients that leave in the middle of their requests");

	# a result that has a status and nothing else
	sql($node, q{SELECT idempotency.record(} . literal($key->("bare-$_")) . q{, 'ada', token, response_status => }
		. qq{$_) FROM idempotency.claim(} . literal($key->("bare-$_")) . q{, 'ada')}) foreach (201, 204);
	foreach my $status (201, 204)
	{
		$answer = checkout($path, $key->("bare-$status"));
		is("$answer->{status} " . (defined $answer->{body} ? 'body' : 'nothing'), "$status nothing", "$name: a recorded $status without a body");
	}

	# Stripe's key is refused, or lacks a permission
	foreach my $what (qw(401 403))
	{
		$stripe->fault($what, %intents);
		is(checkout($path, $key->($what))->{status}, 503, "$name: Stripe says $what");
		is_paid_once(persistent_checkout($path, $key->($what)), $key->($what), "$name: and pays when that is mended");
	}
	return;
}

# Events meet the same
sub misfortunes_of_events
{
	my $deliver = sub {
		my ($event) = @_;

		return send_request('/stripe/webhook', { 'Stripe-Signature' => $event->{signature} }, $event->{body});
	};
	my $signed = sub {
		my ($id, $metadata) = @_;
		my $body = $json->encode({
			id => $id, object => 'event', type => 'payment_intent.succeeded',
			data => { object => { id => "pi_$id", object => 'payment_intent', status => 'succeeded', metadata => $metadata } } });

		return { body => $body, signature => $stripe->control('POST', 'webhooks/sign', { body => $body, secrets => ['whsec_test_checkout'] })->{headers}{'Stripe-Signature'} };
	};
	my $recorded = sub {
		return sql($node, 'SELECT success, error_message FROM idempotency.stripe_webhook_events WHERE stripe_event_id = ' . literal($_[0]));
	};

	# of somebody else, who uses the same account
	foreach my $metadata (undef, {}, { order_id => '17' }, { shop => 'another', order_id => '17' }, { order_id => order_id('nobody') })
	{
		my $id = 'evt_others_' . ++(state $n);

		is(answer_of($deliver->($signed->($id, $metadata)))->{status}, 200, 'an event of somebody else: ' . $json->allow_nonref->encode($metadata));
		is($recorded->($id), 't|', 'is done with');
	}

	# ours, whose order isn't there, or never can be
	foreach my $order (order_id('not-yet'), 'no uuid', undef)
	{
		my $id = 'evt_ours_' . ++(state $m);

		is(answer_of($deliver->($signed->($id, { shop => 'checkout-example', order_id => $order })))->{status}, 503,
			'one of ours, for ' . ($order // 'no order'));
		like($recorded->($id), qr/^f\|.*no such order/, 'is recorded, and why it failed');
	}
	sql($node, q{UPDATE idempotency.stripe_webhook_events SET success = true WHERE NOT success});

	# the backend is terminated in the middle
	my $event = $signed->('evt_terminated', { shop => 'checkout-example', order_id => order_id('database-idle') });
	my $release = hold_orders();
	my $socket = $deliver->($event);
	wait_for_waiter();
	is(answer_of($deliver->($event))->{status}, 409, 'the same event meanwhile is told so at once');
	terminate_backends();
	is(answer_of($socket)->{status}, 503, 'terminated while an event is processed');
	$release->();
	is_alive('the program goes on');
	is(answer_of($deliver->($event))->{status}, 200, 'and takes it when it comes again');
	is($recorded->('evt_terminated'), 't|', 'once');
	return;
}

# Take all events that Stripe has for the application there, each of them twice;
# those that weren't accepted.
sub deliver_events
{
	my %refused;

	while (my $event = $stripe->next_webhook(timeout_ms => 0))
	{
		my $body = decode_base64($event->{body_base64});
		my %headers = map { lc($_) => $event->{headers}{$_} } keys %{ $event->{headers} };

		foreach (1 .. 2)
		{
			my $answer = answer_of(
				send_request('/stripe/webhook', { 'Stripe-Signature' => $headers{'stripe-signature'} }, $body));
			$refused{ $json->decode($body)->{id} } = 1 if $answer->{status} != 200;
		}
	}
	my @refused = sort keys %refused;
	return @refused;
}

# What belongs to no way of paying
sub test_refusals
{
	my $status = sub { checkout('/checkout', @_)->{status} };
	my $arrivals = $stripe->counts->{arrivals};

	is($status->(undef), 400, 'no key');
	is($status->('""'), 400, 'an empty key');
	is($status->('x' x 256), 400, 'too long a key');
	is($status->('refused', headers => { Authorization => undef }), 401, 'nobody');
	is($status->('refused', headers => { Authorization => 'Bearer else' }), 401, 'somebody else');
	is($status->('refused', body => '{"cart": '), 400, 'not JSON');
	is($status->('refused', body => '[]'), 400, 'not an object');
	is($status->('refused', body => '{"cart": 1}'), 400, 'not what is needed');
	is($status->('refused', cart => 'ben-1'), 404, "somebody else's cart");
	is(checkout('/nothing', 'refused')->{status}, 404, 'another path');
	is($stripe->counts->{arrivals}, $arrivals, 'none of them asks Stripe');
	is($status->('refused'), 201, 'and the key is still free');

	my $event = '{"id": "evt_forged", "object": "event", "type": "payment_intent.succeeded"}';
	is(answer_of(send_request('/stripe/webhook', {}, $event))->{status}, 400, 'an event without a signature');
	is( answer_of(send_request('/stripe/webhook', { 'Stripe-Signature' => 't=' . time . ',v1=' . '0' x 64 }, $event))->{status},
		400, 'and one with a forged one');
	return;
}

=pod

=item test_checkouts(\@command, $sdk)

How payments end, with the application that this command starts; its port is in PORT.
Without Stripe's library, only for the way that needs none.

=item test_misfortunes(\@command, $sdk)

What happens to programs meanwhile.

=back

=cut

sub in_a_shop
{
	my ($given, $work, %endpoint) = @_;
	my $dir = PostgreSQL::Test::Utils::tempdir();

	$command = $given;
	$stripe = FakeStripe->start;
	$stripe->webhook_endpoint(secrets => ['whsec_test_checkout'], %endpoint);
	append_to_file("$dir/webhook_secrets", "whsec_test_checkout\n");
	chmod 0600, "$dir/webhook_secrets";
	$node = stripe_node('shop', $stripe, preload => 1,
		conf => "max_connections = 60\nidempotency.webhook_secret_file = '$dir/webhook_secrets'\n");
	sql($node, slurp_file("$examples/checkout-node/schema.sql"));

	$port = PostgreSQL::Test::Cluster::get_free_port();
	local $ENV{PGHOST} = $node->host;
	local $ENV{PGPORT} = $node->port;
	local $ENV{PGDATABASE} = 'postgres';
	local $ENV{STRIPE_API_BASE} = $stripe->url;
	local $ENV{STRIPE_API_KEY} = TEST_KEY;
	start_application();
	$work->();

	# all together
	is(scalar(deliver_events()), 0, 'all events are taken');
	is($stripe->charges, sql($node, q{SELECT count(*) FROM orders WHERE state = 'paid'}), 'as many charges as paid orders');
	is(sql($node, q{SELECT count(*) FROM orders WHERE state NOT IN ('paid', 'declined', 'requires_action')}), '0', 'no order is in doubt');
	foreach my $view (qw(open_claims stripe_unknown stripe_orphans stripe_webhook_pending))
	{
		is(sql($node, "SELECT count(*) FROM idempotency.$view"), '0', "nothing in $view");
	}

	kill_application();
	$node->stop;
	$stripe->stop;
	return;
}

sub ways
{
	my ($sdk) = @_;

	return ([ '/checkout', 'database' ], $sdk ? [ '/checkout-by-sdk', 'sdk' ] : ());
}

sub test_checkouts
{
	my ($given, $sdk) = @_;

	is( slurp_file("$examples/checkout-node/schema.sql"),
		slurp_file("$examples/checkout-python/schema.sql"),
		'the examples have one schema');
	in_a_shop($given, sub {
		test_refusals();
		foreach my $way (ways($sdk))
		{
			test_checkout(@$way);
			test_recovered(@$way);
		}

		# the server restarts under it
		$node->restart;
		is_paid_once(persistent_checkout('/checkout', 'restarted'), 'restarted', 'the server was restarted');
	});
	return;
}

sub test_misfortunes
{
	my ($given, $sdk) = @_;

	in_a_shop($given, sub {
		misfortunes_of(@$_) foreach ways($sdk);
		misfortunes_of_events();
	}, enabled_events => ['payment_intent.succeeded']);
	return;
}

1;
