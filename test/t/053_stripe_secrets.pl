
# The API key: where it comes from, which ones are accepted, and that it shows
# nowhere.

use strict;
use warnings;

use FakeStripe;
use File::Find ();
use IdempotencyTest;
use POSIX ();
use PostgreSQL::Test::Utils;
use StripeTest;
use Test::More;

my $stripe = FakeStripe->start(tls_dir => PostgreSQL::Test::Utils::tempdir('tls') . '/tls');
my $node = stripe_node('main', $stripe, preload => 1, conf => q{
idempotency.stripe_max_retries = 0
log_statement = all
log_min_messages = debug5
log_min_error_statement = debug5
log_error_verbosity = verbose
log_duration = on
debug_print_parse = on
});
my $file = $node->{stripe_key_file};
my $stderr = '';
my %secret;

# Every secret that a test uses begins so, after its kind.
my $mark = 'Zq7Secret';

sub secret
{
	my ($kind) = @_;
	my $secret = $kind . $mark . (1 + keys %secret) . 'abcdefghijkl';

	$secret{$secret} = 1;
	return $secret;
}

# the key that the last request came with
sub sent_key
{
	my @arrivals = $stripe->arrivals;
	my ($authorization) =
	  map { $_->[1] } grep { lc($_->[0]) eq 'authorization' } @{ $arrivals[-1]{headers} };
	return $authorization =~ s/^Bearer //r;
}

sub call
{
	my (%params) = @_;

	return stripe_get($node, '/v1/customers', %params);
}

sub refused
{
	my ($sqlstate, $name, %settings) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $before = $stripe->counts->{arrivals};
	my (undef, undef, $message) = $node->psql('postgres',
		"\\set VERBOSITY verbose\n" . settings(%settings) . q{SELECT FROM idempotency.stripe_get('/v1/customers')});
	my ($got) = $message =~ /ERROR:\s+(\w{5})\b/;

	$stderr .= $message;
	is($got // 'no error', $sqlstate, $name) or diag($message);
	is($stripe->counts->{arrivals}, $before, 'and nothing is sent');
}

#
# The file
#

foreach my $case (
	[ 'a secret key', secret('sk_test_') ],
	[ 'a restricted key', secret('rk_test_') ],
	[ 'a key and a newline', secret('sk_test_') . "\n" ],
	[ 'a key with white space around it', " \t" . secret('sk_test_') . " \r\n\r\n" ])
{
	my ($name, $content) = @$case;

	write_key($node, $content);
	my $r = call();
	is($r->{http_status}, 200, $name);
	is(sent_key(), $content =~ s/^\s+|\s+$//gr, 'is sent, and the one of before is forgotten');
	ok(!$r->{livemode}, 'test mode');
}

foreach my $case (
	[ 'a publishable key', secret('pk_test_') ],
	[ 'a publishable live key', secret('pk_live_') ],
	[ 'a webhook secret', secret('whsec_test_') ],
	[ 'a key of no mode', secret('sk_') ],
	[ 'two keys', secret('sk_test_') . "\n" . secret('sk_test_') . "\n" ],
	[ 'a key and a comment', '# ' . secret('sk_test_') ],
	[ 'a key with an assignment', 'STRIPE_KEY=' . secret('sk_test_') ],
	[ 'a key that is quoted', '"' . secret('sk_test_') . '"' ],
	[ 'a header in the key', secret('sk_test_') . "\r\nX-Evil: 1" ],
	[ 'a zero byte', secret('sk_test_') . "\0" ],
	[ 'a cut key', 'sk_test_' ],
	[ 'a long file', secret('sk_test_') . 'x' x 5000 ],
	[ 'white space', " \n" ],
	[ 'nothing', '' ])
{
	my ($name, $content) = @$case;

	write_key($node, $content);
	refused('F0000', "the file has $name");
}

my $key = secret('sk_test_');
foreach my $mode (0640, 0604, 0644, 0660, 0606, 0777)
{
	write_key($node, $key, $mode);
	refused('F0000', sprintf('mode %04o', $mode));
}
foreach my $mode (0600, 0400, 0700)
{
	write_key($node, $key, $mode);
	is(call()->{http_status}, 200, sprintf('mode %04o', $mode));
}
SKIP:
{
	skip 'root reads everything', 2 if $> == 0;
	write_key($node, $key, 0000);
	refused('42501', 'mode 0000');
}
write_key($node, $key);
symlink($file, "$file.link") or die $!;
is(call(settings => { stripe_api_key_file => "$file.link" })->{http_status}, 200, 'a symbolic link to it');
refused('58P01', 'no file', stripe_api_key_file => "$file.none");
mkdir "$file.dir", 0700 or die $!;
refused('F0000', 'a directory', stripe_api_key_file => "$file.dir");
POSIX::mkfifo("$file.fifo", 0600) or die $!;
refused('F0000', 'a fifo, which is not waited for', stripe_api_key_file => "$file.fifo");
refused('F0000', 'a device', stripe_api_key_file => '/dev/null');

# a file for each role and database
my $other = secret('sk_test_');
append_to_file("$file.other", $other);
chmod 0600, "$file.other";
sql($node, qq{
	CREATE ROLE other LOGIN;
	SELECT FROM idempotency.grant_role('other', 'stripe_caller');
	ALTER ROLE other SET idempotency.stripe_api_key_file = '$file.other'});
is( $node->safe_psql('postgres', q{SELECT http_status FROM idempotency.stripe_get('/v1/customers')},
		extra_params => [ '-U', 'other' ]),
	200, 'a role with a key of its own');
is(sent_key(), $other, 'uses it');
run_fails($node, q{LOAD 'idempotency'; SET ROLE other; SHOW idempotency.stripe_api_key_file}, '42501',
	'and need not know the name of the file');

# rotation in a session that goes on
{
	my $session = $node->background_psql('postgres');
	my $query = q{SELECT http_status FROM idempotency.stripe_get('/v1/customers')};

	is($session->query_safe($query), 200, 'a session');
	is(sent_key(), $key, 'uses the key');
	$key = secret('rk_test_');
	write_key($node, $key);
	is($session->query_safe($query), 200, 'and the key that has replaced it');
	is(sent_key(), $key, 'from the next call on');
	$session->quit;
}

#
# The environment
#

refused('F0000', 'neither file nor environment', stripe_api_key_file => '');
my $environment = secret('sk_test_');
$node->stop;
{
	local $ENV{IDEMPOTENCY_STRIPE_API_KEY} = $environment;
	$node->start;
}
is(call(settings => { stripe_api_key_file => '' })->{http_status}, 200, 'a key in the environment');
is(sent_key(), $environment, 'is used');
is(call()->{http_status}, 200, 'where there is a file');
is(sent_key(), $key, 'the file counts');
refused('58P01', 'and only the file', stripe_api_key_file => "$file.none");
$node->stop;
{
	local $ENV{IDEMPOTENCY_STRIPE_API_KEY} = secret('pk_test_');
	$node->start;
}
refused('F0000', 'a publishable key in the environment', stripe_api_key_file => '');
$node->stop;
{
	local $ENV{IDEMPOTENCY_STRIPE_API_KEY} = secret('sk_test_') . 'x' x 5000;
	$node->start;
}
refused('F0000', 'a long one', stripe_api_key_file => '');
$node->restart;

#
# Test and live
#

my %tls = (
	stripe_api_base => 'https://localhost:' . $stripe->tls_port,
	stripe_ca_file => $stripe->ca);
foreach my $kind ('sk_live_', 'rk_live_')
{
	write_key($node, secret($kind));
	refused('F0000', "$kind isn't sent without TLS");
	my $r = call(settings => \%tls);
	is($r->{http_status}, 200, "$kind is sent with it");
	ok($r->{livemode}, 'live mode');
}
write_key($node, secret('sk_org_test_'));
call(account => 'acct_1');
my @arrivals = $stripe->arrivals;
my %headers = map { lc($_->[0]) => $_->[1] } @{ $arrivals[-1]{headers} };
is($headers{'stripe-context'}, 'acct_1', "an organization's key has a context");
is($headers{'stripe-account'}, undef, 'not an account');

#
# What fails must not tell
#

write_key($node, secret('sk_test_'));
foreach my $what (qw(401 403 409 429 500 502 close_before reset_after cut garbled not_json redirect))
{
	$stripe->fault($what);
	$stderr .= join(' ', map { $_ // '' } $node->psql('postgres',
			"SET client_min_messages = debug5; SELECT * FROM idempotency.stripe_get('/v1/customers')"));
	$stripe->clear_faults;

	$stripe->fault($what);
	$stderr .= join(' ', map { $_ // '' } $node->psql('postgres',
			"SET client_min_messages = debug5; SELECT * FROM idempotency.stripe_call('customer', '$what', 'POST', '/v1/customers', '{}')"));
	$stripe->clear_faults;
	$stderr .= join(' ', map { $_ // '' } $node->psql('postgres',
			"SET client_min_messages = debug5; SELECT * FROM idempotency.stripe_retry('customer', '$what')"));
}
is(sql($node, 'SELECT count(*) > 10 FROM idempotency.stripe_idempotency_keys WHERE body IS NOT NULL'), 't', 'calls were recorded');
foreach my $certificate (qw(wrong_host unknown_ca expired))
{
	$stderr .= join(' ', map { $_ // '' } $node->psql('postgres', settings(%tls,
				stripe_api_base => 'https://localhost:' . $stripe->tls_port($certificate))
			  . "SET client_min_messages = debug5; SELECT * FROM idempotency.stripe_get('/v1/customers')"));
}
{
	my $session = $node->background_psql('postgres', on_error_stop => 0);
	my $hang = $stripe->fault('hang_before');

	$session->query_until(qr/begun/, "SET client_min_messages = debug5;\n\\echo begun\nSELECT outcome FROM idempotency.stripe_get('/v1/customers');\n\\echo SQLSTATE :SQLSTATE\n");
	$stripe->wait_fault($hang, holding => 1);
	my $activity = sql($node, 'SELECT string_agg(a::text, chr(10)) FROM pg_stat_activity a');
	like($activity, qr/stripe_get/, 'pg_stat_activity shows the call');
	unlike($activity, qr/$mark/, 'and not its key');
	sql($node, q{SELECT pg_cancel_backend(pid) FROM pg_stat_activity
		WHERE query ~ 'stripe_get' AND pid <> pg_backend_pid() AND state = 'active'});
	$stderr .= $session->query_until(qr/SQLSTATE 57014/, '');
	$stderr .= $session->{stderr};
	$session->{stderr} = '';
	$session->quit;
}

cmp_ok(scalar keys %secret, '>', 20, 'secrets were used');
unlike($stderr, qr/$mark/, 'no message has a secret');
cmp_ok(length $stderr, '>', 5000, 'of those that were raised');

# PostgreSQL itself, from debug3 on, logs the environment that it is started
# with; doc/stripe.md says so
my $log = slurp_file($node->logfile);
is(scalar($log =~ s/^.*\tIDEMPOTENCY_STRIPE_API_KEY=.*$//mg), 3, "the postmaster's own word about its environment apart");
unlike($log, qr/$mark/, 'no log line has a secret, at debug5');
like($log, qr/LOG:\s+00000: Stripe call: GET \/v1\/customers request_id=req_\w+ livemode=false attempts=1 status=200 outcome=completed ms=\d+ \(/,
	'a call is a line in the log');
unlike($log, qr/customers\?|"data": \[/, 'without parameters, and without what came back');
unlike(sql($node, "LOAD 'idempotency'; SELECT string_agg(s::text, ' ') FROM pg_settings s"), qr/$mark/, 'nor a setting');
my ($dump) = run_command([ 'pg_dumpall', '-h', $node->host, '-p', $node->port, '--inserts' ]);
like($dump, qr/stripe_api_key_file/, 'a dump has the name of the file');
unlike($dump, qr/$mark/, 'and not what is in it');
# how much is logged
my $offset = -s $node->logfile;
call(settings => { stripe_log_level => 'off' });
unlike(substr(slurp_file($node->logfile), $offset), qr/Stripe call:/, 'no line at off');
(undef, undef, my $notice) = $node->psql('postgres', settings(stripe_log_level => 'notice')
	  . q{SELECT FROM idempotency.stripe_get('/v1/customers')});
like($notice, qr/NOTICE:  Stripe call: GET/, 'at notice, a line for the client');

# no table, no catalog, no log of changes
$node->stop;
my @found;
File::Find::find(
	{
		no_chdir => 1,
		wanted => sub {
			push @found, $_ if -f $_ && slurp_file($_) =~ /$mark/;
		}
	},
	$node->data_dir);
is_deeply(\@found, [], 'no file of the server has a secret');
$stripe->stop;

done_testing();
