
# Where the library isn't preloaded, anybody may set a placeholder of a setting
# before it is loaded, which takes the place of the file's and the role's value
# and is refused afterwards.  Nothing that the setting guards is done then.

use strict;
use warnings;

use Digest::SHA qw(hmac_sha256_hex);
use FakeStripe;
use IdempotencyTest;
use PostgreSQL::Test::Utils;
use StripeTest;
use Test::More;

my $stripe = FakeStripe->start;
my $dir = PostgreSQL::Test::Utils::tempdir();
append_to_file("$dir/secrets", "whsec_test_guard\n");
chmod 0600, "$dir/secrets";

my $node = stripe_node('main', $stripe, conf => qq{
idempotency.stripe_ledger = transaction
idempotency.stripe_max_retries = 0
idempotency.webhook_livemode = test
idempotency.webhook_payload = none
idempotency.webhook_secret_file = '$dir/secrets'
idempotency.webhook_retention = '365 d'
idempotency.stripe_allowed_paths = 'GET /v1/customers, POST /v1/customers, POST /v1/refunds'
});
sql($node, q{
	CREATE ROLE web LOGIN;
	CREATE ROLE granted LOGIN;
	SELECT idempotency.grant_role(r::regrole, k) FROM unnest('{web, granted}'::text[]) r,
		unnest('{application, stripe_caller, webhook, operator}'::text[]) k;
	ALTER ROLE web SET idempotency.stripe_allowed_paths = 'GET /v1/customers, POST /v1/customers';
	GRANT SET ON PARAMETER idempotency.stripe_allowed_paths TO granted});

my $n = 0;
my $superuser = sql($node, 'SELECT current_user');
my $load = q{SELECT FROM idempotency.lookup('k', 's')};

sub refund
{
	return sprintf q{SELECT outcome FROM idempotency.stripe_call('refund', '%d', 'POST', '/v1/refunds', '{"charge": "ch_1"}')}, ++$n;
}

sub customer
{
	return sprintf q{SELECT outcome FROM idempotency.stripe_call('customer', '%d', 'POST', '/v1/customers', '{}')}, ++$n;
}

sub event
{
	my ($id, $livemode) = @_;
	my $body = qq({"id": "$id", "object": "event", "type": "a.b", "livemode": $livemode});
	my $t = time;

	return sprintf q{'\x%s', 't=%d,v1=%s'}, unpack('H*', $body), $t, hmac_sha256_hex("$t.$body", 'whsec_test_guard');
}

# What a session with these connection options is told: its output, the SQLSTATEs of its errors.
sub session
{
	my ($options, $sql, $user) = @_;
	local $ENV{PGOPTIONS} = $options;
	my ($rc, $stdout, $stderr) = $node->psql('postgres', "\\set VERBOSITY verbose\n$sql",
		extra_params => [ '-U', $user // 'web' ], on_error_stop => 0);

	return join(' ', grep { length } $stdout =~ s/\n/ /gr, $stderr =~ /(?:ERROR|FATAL):\s+(\w{5})/g);
}

sub arrivals
{
	return $stripe->counts->{arrivals};
}

sub refused
{
	my ($options, $sql, $name, $user) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $before = arrivals();

	is(session($options, $sql, $user), 'IK011', $name);
	is(arrivals(), $before, 'and nothing is sent');
	return;
}

sub option
{
	my ($name, $value) = @_;

	return "-c idempotency.$name=$value";
}

is(session('', refund()), '42501', "a role's own list of paths");
is(session('', customer()), 'completed', 'allows some');

# the connection's options, in all their spellings, also with the built-in value
refused(option('stripe_allowed_paths', 'x'), refund(), 'a path that the role may not call');
refused(option('stripe_allowed_paths', '*'), refund(), 'by the built-in value');
refused('-c Idempotency.STRIPE_allowed_paths=x', refund(), 'in other letters');
refused('--idempotency.stripe-allowed-paths=x', refund(), 'as a long option');
refused(option('stripe_allowed_paths', 'x'), customer(), 'nor one that it may');
refused(option('stripe_allowed_paths', 'x'), q{SELECT FROM idempotency.stripe_get('/v1/customers')}, 'no reading');
refused(option('stripe_allowed_paths', 'x'), "$load; RESET ALL; " . refund(), 'RESET brings nothing back');
refused(option('stripe_allowed_paths', 'x'), "$load; DISCARD ALL; " . refund(), 'nor does DISCARD');

my %values = (
	stripe_api_base => 'x', stripe_api_key_file => 'x', stripe_ca_file => 'x', stripe_resend_margin => 60,
	stripe_compare_ignore => 'amount', max_response_size => 1, stripe_log_level => 'off',
	stripe_body_retention => 1, stripe_retention => -1, abandoned_retention => 1, expiry => 'off',
	expiry_interval => 1, expiry_batch_size => 1, webhook_livemode => 'any', webhook_payload => 'all',
	webhook_max_attempts => -1, webhook_retention => 0, webhook_secret_file => '/x');
my $guarded = sql($node, q{LOAD 'idempotency'; SELECT string_agg(substr(name, 13), ' ' ORDER BY name) FROM pg_settings
	WHERE name LIKE 'idempotency.%' AND context = 'superuser' AND name <> 'idempotency.stripe_allowed_paths'});
is($guarded, join(' ', sort keys %values), 'every setting that needs a privilege');
foreach my $name (sort keys %values)
{
	refused(option($name, $values{$name}), customer(), $name);
}

# whoever may set it
is(session(option('stripe_allowed_paths', 'x'), refund(), $superuser),
	'22023', "a superuser's option counts, also where it is invalid");
is(session('-c idempotency.stripe_allowed_paths=POST\ /v1/refunds', refund(), $superuser), 'failed', 'and where it is valid, as Stripe knows no such charge');
is(session('-c idempotency.stripe_allowed_paths=POST\ /v1/payouts', refund(), 'granted'), '42501', 'so does that of a role with the privilege');
is(session(option('key_ttl', 60), customer()), 'completed', 'what everybody may set');

# what the others guard: events, and their removal
foreach my $what (
	'SELECT FROM idempotency.stripe_webhook_claim(' . event('evt_live', 'true') . ')',
	'SELECT FROM idempotency.stripe_webhook_receive(' . event('evt_live', 'true') . ')',
	'SELECT idempotency.stripe_webhook_is_valid(' . event('evt_live', 'true') . ')')
{
	is(session(option('webhook_livemode', 'any'), $what), 'IK011', 'an event of the other mode');
}
is(session(option('webhook_secret_file', '/x'), 'SELECT idempotency.stripe_webhook_verify(' . event('evt_live', 'true') . ')'), 'IK011', 'whose secret is another');
is(session('', 'SELECT FROM idempotency.stripe_webhook_receive(' . event('evt_test', 'false') . ')'), '', 'a test event');
sql($node, q{UPDATE idempotency.stripe_webhook_events SET success = true, processed_at = now(), received_at = now() - interval '100 days'});
is(session(option('webhook_retention', '1s'), 'SELECT FROM idempotency.expire()'), 'IK011', 'nothing is removed before its time');
is(session(option('max_response_size', '500MB'), q{SELECT FROM idempotency.claim('k', 's')}), 'IK011', 'no key is claimed');
is(sql($node, q{SELECT count(*), (SELECT count(*) FROM idempotency.idempotency_keys) FROM idempotency.stripe_webhook_events}), '1|0', 'none has left a trace');

# session_preload_libraries
sql($node, "ALTER DATABASE postgres SET session_preload_libraries = 'idempotency'");
refused('-c idempotency.stripe_allowed_paths=x', refund(), 'loaded by the connection');
is(session('', refund()), '42501', 'and without the option');
sql($node, 'ALTER DATABASE postgres RESET session_preload_libraries');

# set before it is loaded, in a session that has the file's and role's values
refused('', q{SET idempotency.stripe_allowed_paths = '*'; } . refund(), 'a SET of earlier');
refused('', q{SET idempotency.stripe_allowed_paths = '*'; } . "$load; RESET ALL; " . customer(), 'also after RESET, which does not tell what it had taken the place of');
refused('', q{BEGIN; SET idempotency.stripe_allowed_paths = '*'; } . "$load; COMMIT; " . customer(), 'one that commits with the load');
is(session('', q{BEGIN; SET idempotency.stripe_allowed_paths = '*'; } . "$load; ROLLBACK; " . customer()), 'completed', 'unless it is rolled back');
is(session('', q{SET idempotency.stripe_allowed_paths = '*'; RESET idempotency.stripe_allowed_paths; } . customer()), 'completed', 'or taken back');
sql($node, q{
	CREATE FUNCTION bind() RETURNS text LANGUAGE sql SECURITY DEFINER
	AS $$SELECT set_config('idempotency.stripe_allowed_paths', 'GET /v1/balance', false)$$});
is(session('', 'SELECT FROM bind(); ' . customer()), '42501', 'a function of a superuser\'s narrows the list for the session');
refused('', q{SELECT FROM bind(); SET idempotency.stripe_allowed_paths = '*'; } . customer(), 'what has taken its place is not nothing');
refused('', q{BEGIN; SELECT FROM bind(); SET idempotency.stripe_allowed_paths = '*'; } . "$load; COMMIT; " . customer(), 'nor in one transaction');
is(session('', q{SELECT FROM bind(); BEGIN; SET idempotency.stripe_allowed_paths = '*'; } . "$load; COMMIT; " . customer()), '42501', 'in the one that loads the library: what was bound before is in force');
foreach my $user ('web', $superuser)
{
	is(session('', "BEGIN; SET LOCAL idempotency.stripe_allowed_paths = '*'; RESET idempotency.stripe_allowed_paths; " . customer() . '; COMMIT', $user),
		'completed', "$user: SET LOCAL, taken back in the transaction that loads the library");
}
is(session('', q{BEGIN; SET LOCAL idempotency.stripe_allowed_paths = '*'; } . customer()), 'IK011', 'one of this transaction ends it, as it would have done');
is(session('', q{BEGIN; SAVEPOINT a; SET LOCAL idempotency.stripe_allowed_paths = '*'; } . $load . q{; ROLLBACK TO a; }
		. 'ROLLBACK; ' . customer()),
	'completed', 'and nothing after that');
sql($node, q{
	CREATE FUNCTION pay() RETURNS text LANGUAGE plpgsql SET idempotency.stripe_allowed_paths = 'POST /v1/customers'
	AS $$BEGIN RETURN (SELECT outcome FROM idempotency.stripe_call('refund', 'f', 'POST', '/v1/refunds', '{}')); END$$;
	ALTER FUNCTION pay() OWNER TO granted;
	CREATE FUNCTION pay_as_owner() RETURNS text LANGUAGE plpgsql SECURITY DEFINER SET idempotency.stripe_allowed_paths = 'POST /v1/customers'
	AS $$BEGIN RETURN (SELECT outcome FROM idempotency.stripe_call('refund', 'f', 'POST', '/v1/refunds', '{}')); END$$;
	ALTER FUNCTION pay_as_owner() OWNER TO granted});
refused('', 'SELECT pay()', "a function's own list, which its caller may not set");
is(session('', 'SELECT pay_as_owner()'), '42501', 'one whose owner may: it counts');
is(session(option('stripe_allowed_paths', '*'), 'SELECT pay_as_owner()'), '42501', "whatever the connection's options");
is(session(option('stripe_allowed_paths', '*'), 'SELECT pay_as_owner(); ' . refund()), '42501 IK011', 'until its end');

# a superuser's SET is known again; what a reload brings may be less than what the role had
{
	local $ENV{PGOPTIONS} = option('stripe_allowed_paths', '*');
	my $session = $node->background_psql('postgres', on_error_stop => 0, extra_params => [ '-U', 'web' ]);

	$session->query("\\set VERBOSITY verbose");
	$session->query(customer());
	like($session->{stderr}, qr/IK011/, 'a session that goes on');
	$session->{stderr} = '';
	$node->append_conf('postgresql.conf', q{idempotency.stripe_allowed_paths = 'POST /v1/refunds'});
	my $before = sql($node, 'SELECT clock_timestamp()');
	$node->reload;
	is($session->query(qq{
		DO \$\$BEGIN
			FOR i IN 1 .. 600 LOOP
				EXIT WHEN pg_conf_load_time() > '$before';
				PERFORM pg_sleep(0.1);
			END LOOP;
		END\$\$;
		SELECT 'reloaded'}), 'reloaded', 'a reload');
	$session->query(refund());
	like($session->{stderr}, qr/IK011/, 'is refused still');
	$session->quit;
}
is(session(option('stripe_allowed_paths', '*'),
		"$load; " . q{SELECT set_config('idempotency.stripe_allowed_paths', 'GET /v1/balance', false); } . refund(),
		'web'),
	'42501 IK011', 'who may not set it cannot mend it either');
sql($node, q{
	CREATE FUNCTION mend() RETURNS text LANGUAGE sql SECURITY DEFINER
	AS $$SELECT set_config('idempotency.stripe_allowed_paths', 'POST /v1/customers', false)$$});
is(session(option('stripe_allowed_paths', '*'), "$load; " . q{SELECT FROM mend(); } . customer() . '; ' . refund()),
	'completed 42501', 'who may can');
is(session(option('stripe_allowed_paths', '*'), "$load; " . q{BEGIN; SELECT FROM mend(); ROLLBACK; } . customer()),
	'IK011', 'unless that is rolled back');

# A parallel worker loads the library itself, and doesn't know what the leader lost
sql($node, q{
	CREATE FUNCTION parallel_get(path text) RETURNS text LANGUAGE plpgsql PARALLEL SAFE
	AS $$BEGIN RETURN (SELECT outcome FROM idempotency.stripe_get(path)); END$$});
foreach my $options ('', option('stripe_allowed_paths', 'x'))
{
	my $before = arrivals();

	is(session($options, "$load; SET force_parallel_mode = on; SELECT parallel_get('/v1/refunds')"), '25000', 'nothing is called in a parallel worker');
	is(arrivals(), $before, 'and nothing is sent');
}
is(session('', q{SET force_parallel_mode = on; SELECT status FROM idempotency.lookup('k', 's'); SELECT count(*) FROM pg_class WHERE oid = 0;
	SELECT count(*) FROM idempotency.open_claims; } . customer()),
	' 0 0 completed', 'what is parallel restricted stays with the leader');

# a value that isn't valid, in the file of a server that preloads the library
$node->append_conf('postgresql.conf', "idempotency.webhook_livemode = 'tset'\nshared_preload_libraries = 'idempotency'\n");
$node->restart;
is(session('', 'SELECT FROM idempotency.stripe_webhook_receive(' . event('evt_typo', 'true') . ')'), 'IK011', 'a mistyped value is not the built-in one');
my (undef, undef, $stderr) = $node->psql('postgres', "SELECT FROM idempotency.claim('k', 's')");
like($stderr, qr/value of parameter "idempotency.webhook_livemode" is not known.*source "configuration file"/s, 'the message says which');
$node->append_conf('postgresql.conf', "idempotency.webhook_livemode = 'test'\n");
$node->reload;
my $tries = 10 * $PostgreSQL::Test::Utils::timeout_default;
my $told = '';
until (($told = session('', 'SELECT FROM idempotency.stripe_webhook_receive(' . event('evt_typo', 'true') . ')')) eq 'IK004' || $tries-- <= 0)
{
	select(undef, undef, undef, 0.1);
}
is($told, 'IK004', 'a corrected one is in force after a reload');
is(session('', 'SELECT FROM idempotency.stripe_webhook_receive(' . event('evt_fine', 'false') . ')'), '', 'and events are taken in');
is(session(option('stripe_allowed_paths', '*'), refund()), 'permi', "permission denied: a connection with such an option isn't made where the library is preloaded");


# one that is refused only on use
$node->append_conf('postgresql.conf', "idempotency.stripe_allowed_paths = 'no such thing'\nidempotency.stripe_version = 'x'\n");
$node->restart;
is(session('', 'SET force_parallel_mode = on; SELECT count(*) FROM pg_class WHERE oid = 0', 'granted'), '0', 'a mistyped list of paths is no hindrance to parallel queries');
is(session('', customer(), 'granted'), '22023', 'it is refused when it is used');

$node->stop;
$stripe->stop;

done_testing();
