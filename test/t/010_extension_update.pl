
# ALTER EXTENSION UPDATE to a version that grows: result types get attributes,
# tables columns, and there is a new function.  The update script is this
# test's own, in a private copy of what is installed; the library is the one
# there is.  Old and new sessions must go on as before, with what they have
# prepared, and the rows must be there.

use strict;
use warnings;

use Digest::SHA qw(hmac_sha256_hex);
use File::Copy qw(copy);
use File::Path qw(make_path);
use FindBin;
use lib "$FindBin::RealBin/../perl";

use FakeStripe;
use IdempotencyTest;
use JSON::PP;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StripeTest qw(TEST_KEY);
use Test::More;

my $dir = PostgreSQL::Test::Utils::tempdir();
my $stripe = FakeStripe->start;
my $node = PostgreSQL::Test::Cluster->new('main');
$node->init;

#
# A copy of what is installed, with an update script
#

# What a setting in TEMP_CONFIG is, up to its first colon
sub setting
{
	my ($name) = @_;

	return unless $ENV{TEMP_CONFIG} && slurp_file($ENV{TEMP_CONFIG}) =~ /^$name = '([^':]+)/m;
	return $1;
}
my $major = $node->pg_version->major;
my $share = $node->config_data('--sharedir');
my $lib = $node->config_data('--pkglibdir');
chomp($share, $lib);
my ($from) = grep { -e "$_/extension/idempotency.control" }
  grep { defined } setting('extension_control_path'), (setting('extension_destdir') // '') . $share, $share;
my ($library) = grep { -e "$_/idempotency.so" } grep { defined } setting('dynamic_library_path'), $lib;
plan skip_all => 'the extension is not where this test looks for it' unless $from && $library;
plan skip_all => 'a private directory for extensions needs PostgreSQL 18, or extension_destdir'
  unless $major >= 18 || defined setting('extension_destdir');

make_path("$dir/dest$share/extension", "$dir/dest$lib");
copy("$from/extension/$_", "$dir/dest$share/extension/$_") or die "could not copy $_: $!"
  foreach qw(idempotency.control idempotency--1.0.sql);
symlink("$library/$_", "$dir/dest$lib/$_") foreach qw(idempotency.so idempotency_stripe.so);

append_to_file("$dir/stripe_key", TEST_KEY . "\n");
chmod 0600, "$dir/stripe_key";
$node->append_conf('postgresql.conf',
	($major >= 18
		? "extension_control_path = '$dir/dest$share:\$system'\n"
		: "extension_destdir = '$dir/dest'\n")
	  . "dynamic_library_path = '$dir/dest$lib:\$libdir'\n"
	  . "shared_preload_libraries = 'idempotency'\nidempotency.expiry = off\n"
	  . 'idempotency.stripe_api_base = ' . literal($stripe->url) . "\n"
	  . 'idempotency.stripe_api_key_file = ' . literal("$dir/stripe_key") . "\n");
$node->start;
sql($node, 'CREATE EXTENSION idempotency');

my @types = split /\n/, sql($node, q{SELECT typname FROM pg_type
	WHERE typnamespace = 'idempotency'::regnamespace AND typrelid IN (SELECT oid FROM pg_class WHERE relkind = 'c')});
my @tables = split /\n/, sql($node, q{SELECT relname FROM pg_class
	WHERE relnamespace = 'idempotency'::regnamespace AND relkind = 'r'});
cmp_ok(scalar(@types), '>=', 7, 'result types');
is(scalar(@tables), 5, 'tables');
append_to_file("$dir/dest$share/extension/idempotency--1.0--1.1.sql",
	join('', map { "ALTER TYPE idempotency.$_ ADD ATTRIBUTE added text, ADD ATTRIBUTE added_too jsonb;\n" } @types)
	  . join('', map { my $t = $_; map { "ALTER TABLE idempotency.$t ADD COLUMN added_$_ text DEFAULT 'x';\n" } 1 .. 12 } @tables)
	  . "CREATE FUNCTION idempotency.added(token bigint) RETURNS text LANGUAGE sql AS 'SELECT ''new''';\n");

#
# Data, and what a session that is older than the update has prepared
#

my $body = '{"id": "evt_1", "object": "event", "type": "a.b", "data": {"object": {"id": "o_1"}}}';
my $signed = "'\\x" . unpack('H*', $body) . "', 't=1795300000,v1="
  . hmac_sha256_hex("1795300000.$body", 'whsec_test_update') . "', '{whsec_test_update}', '1000 years'";
my $payment = q{'{"amount": 7, "currency": "eur", "confirm": true, "payment_method": "pm_card_visa"}'};
my $call = "'POST', '/v1/payment_intents', $payment";

sql($node, qq{
	SELECT idempotency.record('done', 'test', c.token, '{"n": 1.50}', ttl => '1 year')
		FROM idempotency.claim('done', 'test') c;
	SELECT FROM idempotency.claim('held', 'test', lease => '1 year');
	SELECT FROM idempotency.stripe_call('call', 'paid', $call);
	SELECT idempotency.stripe_record('payment', 'done', c.token, 'pi_1')
		FROM idempotency.stripe_claim('payment', 'done') c;
	SELECT FROM idempotency.stripe_webhook_receive($signed);
	SELECT FROM idempotency.stripe_webhook_next() c, idempotency.stripe_webhook_record(c.stripe_event_id, c.token);
	CREATE TABLE kept (answer jsonb);
	CREATE FUNCTION by_variable(k text) RETURNS jsonb LANGUAGE plpgsql AS \$\$
	DECLARE
		c idempotency.claim_result;
	BEGIN
		c := idempotency.claim(k, 'test');
		RETURN to_jsonb(c);
	END\$\$;
	CREATE FUNCTION by_into(k text) RETURNS jsonb LANGUAGE plpgsql AS \$\$
	DECLARE
		c idempotency.claim_result;
	BEGIN
		SELECT * INTO c FROM idempotency.claim(k, 'test');
		RETURN to_jsonb(c);
	END\$\$;
	CREATE FUNCTION by_record(k text) RETURNS jsonb LANGUAGE plpgsql AS \$\$
	DECLARE
		c record;
	BEGIN
		SELECT * INTO c FROM idempotency.claim(k, 'test');
		RETURN to_jsonb(c);
	END\$\$;
	CREATE FUNCTION by_sql(k text) RETURNS jsonb LANGUAGE sql AS \$\$
		SELECT to_jsonb(c) FROM idempotency.claim(k, 'test') c\$\$;
	CREATE VIEW by_view AS SELECT * FROM idempotency.lookup('done', 'test');
});

# Every function that returns a composite: the answer must be the same twice.
my %reads = (
	claim => "idempotency.claim('done', 'test')",
	lookup => "idempotency.lookup('done', 'test')",
	stripe_claim => "idempotency.stripe_claim('payment', 'done')",
	stripe_call => "idempotency.stripe_call('call', 'paid', $call)",
	stripe_get => q{idempotency.stripe_get('/v1/balance')},
	stripe_retry => q{idempotency.stripe_retry('call', 'paid')},
	stripe_lookup => q{idempotency.stripe_lookup('call', 'paid')},
	stripe_webhook_claim => "idempotency.stripe_webhook_claim($signed)",
	stripe_webhook_receive => "idempotency.stripe_webhook_receive($signed)",
	stripe_webhook_reclaim => q{idempotency.stripe_webhook_reclaim('evt_1')},
	stripe_webhook_next => q{idempotency.stripe_webhook_next()});
is( sql($node, q{SELECT string_agg(DISTINCT proname, ' ' ORDER BY proname) FROM pg_proc
		WHERE pronamespace = 'idempotency'::regnamespace
			AND prorettype IN (SELECT t.oid FROM pg_type t JOIN pg_class c ON c.oid = t.typrelid WHERE relkind = 'c')}),
	join(' ', sort keys %reads), 'every function with a composite result has a case');

my $session = $node->background_psql('postgres', on_error_stop => 0);
my %prepared = (
	(map { ($_ => "SELECT to_jsonb(r) FROM $reads{$_} r") } keys %reads),
	(map { ("scalar $_" => "SELECT to_jsonb($reads{$_})") } keys %reads),
	(map { ("columns $_" => "SELECT * FROM $reads{$_}") } keys %reads),
	(map { ($_ => "SELECT $_('done')") } qw(by_variable by_into by_record by_sql)),
	by_view => 'SELECT * FROM by_view',
	open_claims => 'SELECT key FROM idempotency.open_claims');
my $json = JSON::PP->new->canonical;

# A statement's answer without what the update added
sub normal
{
	my ($answer) = @_;

	return $answer unless $answer =~ /^\{/;
	my $row = $json->decode($answer);
	foreach my $name (qw(added added_too))
	{
		die "$name isn't NULL in $answer" if defined delete $row->{$name};
	}
	delete $row->{request_id};
	return $json->encode($row);
}

my %before;
foreach my $name (sort keys %prepared)
{
	my $statement = $name =~ s/\W/_/gr;
	$session->query_safe("PREPARE $statement AS $prepared{$name}");
	# often enough for a generic plan
	$before{$name} = normal($session->query_safe("EXECUTE $statement")) foreach 1 .. 7;
}
my $rows = sql($node, join(";\n", map { "SELECT count(*) FROM idempotency.$_" } @tables));
my $next = sql($node, q{SELECT idempotency.stripe_idempotency_key('payment', 'next')});

#
# The update
#

sql($node, q{ALTER EXTENSION idempotency UPDATE TO '1.1'});
is(sql($node, q{SELECT extversion FROM pg_extension WHERE extname = 'idempotency'}), '1.1', 'updated');
is(sql($node, 'SELECT idempotency.added(1)'), 'new', 'a new function');
is(sql($node, join(";\n", map { "SELECT count(*) FROM idempotency.$_" } @tables)), $rows, 'every row is there');
is(sql($node, q{SELECT idempotency.stripe_idempotency_key('payment', 'next')}), $next, 'the same keys');

foreach my $name (sort keys %prepared)
{
	my $statement = $name =~ s/\W/_/gr;

	is(normal(sql($node, $prepared{$name})), $before{$name}, "$name: a new session")
	  unless $name =~ /^columns/;
	$session->{stderr} = '';
	my $answer = $session->query("EXECUTE $statement");
	like($session->{stderr}, qr/^(?!.*ERROR)/s, "$name: prepared before") or next;
	is(normal($answer), $before{$name}, "$name: prepared before, the same answer")
	  unless $name =~ /^columns/;
}
is(sql($node, q{SELECT key, lapsed FROM idempotency.lookup('held', 'test')}), 'held|f', 'a held claim is held');
is($stripe->arrivals(path => '/v1/payment_intents'), 1, 'nothing was sent');

done_testing();
