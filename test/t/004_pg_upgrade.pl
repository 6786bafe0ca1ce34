
# pg_upgrade gives a cluster a new system identifier, keeps the databases' OIDs
# and runs no script of an extension.  Every database must find itself where it
# was: the same rows in every ledger, the same keys, decided or not.  The same
# goes for what the new major's pg_dump takes out of the old one.
#
# Unless told otherwise the old cluster is of this major, too: that changes all
# of the above.  For another one, set OLD_PG_CONFIG to its pg_config and
# OLD_TEMP_CONFIG to what TEMP_CONFIG is for it; test/run does the latter, and
# test/majors both.

use strict;
use warnings;

use File::Basename qw(dirname);
use File::Find qw(find);
use FindBin;
use lib "$FindBin::RealBin/../perl";

use FakeStripe;
use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StripeTest qw(TEST_KEY stripe_call stripe_retry);
use Test::More;

my $stripe = FakeStripe->start;
my $dir = PostgreSQL::Test::Utils::tempdir();
append_to_file("$dir/stripe_key", TEST_KEY . "\n");
chmod 0600, "$dir/stripe_key";
# no worker removes or settles anything while states are compared
my $conf = "shared_preload_libraries = 'idempotency'\nidempotency.expiry = off\n"
  . 'idempotency.stripe_api_base = ' . literal($stripe->url) . "\n"
  . 'idempotency.stripe_api_key_file = ' . literal("$dir/stripe_key") . "\n"
  . "idempotency.stripe_max_retries = 0\nidempotency.stripe_record_timeout = 60s\n";

my $old;
{
	local $ENV{TEMP_CONFIG} = $ENV{OLD_TEMP_CONFIG} // $ENV{TEMP_CONFIG};
	$old = PostgreSQL::Test::Cluster->new('old',
		install_path => $ENV{OLD_PG_CONFIG} && dirname(dirname($ENV{OLD_PG_CONFIG})));
	$old->init;
	$old->append_conf('postgresql.conf', $conf);
}
my $new = PostgreSQL::Test::Cluster->new('new');
my @checksums =
  $old->pg_version->major < 18 && $new->pg_version->major >= 18 ? ('--no-data-checksums') : ();
$new->init(extra => \@checksums);
$new->append_conf('postgresql.conf', $conf);
note('from ' . $old->pg_version . ' to ' . $new->pg_version);

# Databases of every history: an ordinary one, one that was restored from a
# dump, and copies by TEMPLATE with and without a decision.
$old->start;

# There are minor releases that can't upgrade any table: 17.12 writes a column
# option that 18.6 doesn't know.  Then there is nothing to learn here.
sql($old, 'CREATE DATABASE probe');
sql($old, 'CREATE TABLE probe (a int)', db => 'probe');
$new->start;
my ($dumped) = run_command([ 'pg_dump', '--table=probe', $old->connstr('probe') ]);
my ($status, undef, $why) = $new->psql('postgres', "\\set ON_ERROR_STOP 1\nBEGIN;\n$dumped\nROLLBACK");
$new->stop;
if ($status != 0)
{
	$old->stop;
	plan skip_all => $old->pg_version . ' to ' . $new->pg_version . " can't upgrade any table: "
	  . ($why =~ /(ERROR: .*)/)[0];
}
sql($old, 'DROP DATABASE probe');
sql($old, 'CREATE DATABASE plain');
sql($old, q{
	CREATE EXTENSION idempotency;
	SELECT idempotency.record('done', 'test', c.token, '{"n": 1.50}',
			response_body => '\x00ff0a', ttl => '1 year')
		FROM idempotency.claim('done', 'test', '{"amount": 1.0}') c;
	SELECT FROM idempotency.claim('held', 'test', '{"amount": 2}', lease => '1 year');
	SELECT idempotency.checkpoint('pointed', 'test', c.token, 'charged', '{"charge": "ch_1"}')
		FROM idempotency.claim('pointed', 'test', lease => '1 hour') c;
	SELECT idempotency.stripe_record('payment', 'done', c.token, 'pi_1')
		FROM idempotency.stripe_claim('payment', 'done', '{"amount": 3}') c;
	SELECT FROM idempotency.stripe_claim('payment', 'held', '{"amount": 4}', lease => '1 year');
	SELECT idempotency.stripe_release('payment', 'released', c.token)
		FROM idempotency.stripe_claim('payment', 'released', '{"amount": 5}') c;
}, db => 'plain');

# Calls that Stripe has answered, or not, for transactions that committed, or not
my @payment = ('POST', '/v1/payment_intents');
my %declined = (amount => 7, currency => 'eur', confirm => 'true', payment_method => 'pm_card_chargeDeclined');
my %paid = (%declined, payment_method => 'pm_card_visa');
my $orphan_call = "SELECT FROM idempotency.stripe_call('call', 'orphan', 'POST', '/v1/payment_intents',"
  . q{'{"amount": 7, "currency": "eur", "confirm": "true", "payment_method": "pm_card_visa"}')};
my @call = (db => 'plain', params => \%paid);
is(stripe_call($old, 'call', 'paid', @payment, @call)->{outcome}, 'completed', 'a call');
is(stripe_call($old, 'call', 'declined', @payment, @call, params => \%declined)->{outcome}, 'failed',
	'one that is declined');
$stripe->fault('close_after', match => { path => '/v1/payment_intents' });
is(stripe_call($old, 'call', 'lost', @payment, @call)->{outcome}, 'unknown', 'one whose answer is lost');
$stripe->fault('close_after', match => { path => '/v1/payment_intents' });
is(stripe_call($old, 'call', 'settled', @payment, @call)->{outcome}, 'unknown', 'one that a person settles');
sql($old, "BEGIN; $orphan_call; ROLLBACK; BEGIN; " . $orphan_call =~ s/orphan/seen/r . '; ROLLBACK;', db => 'plain');
sql($old, q{SELECT idempotency.stripe_acknowledge('call', 'seen', 'refunded');
	SELECT idempotency.stripe_settle('call', 'settled', 'completed', 'pi_s', 'seen in the Dashboard')}, db => 'plain');
is(sql($old, 'SELECT operation_id, fate FROM idempotency.stripe_orphans', db => 'plain'),
	'orphan|rolled back', 'an orphan');

receive_events($old, db => 'plain');

# transaction ids mean nothing in another system: how callers ended is written
# down, which the recorder and workers do
wait_until($old, q{SELECT NOT EXISTS (SELECT FROM idempotency.stripe_idempotency_keys
	WHERE cardinality(callers) > 0)}, 'how callers ended is written down', db => 'plain');

my $dump = "$dir/plain.sql";
sql($old, 'CREATE DATABASE restored');
$old->command_ok([ 'pg_dump', '--file', $dump, $old->connstr('plain') ], 'pg_dump');
$old->command_ok(
	[ 'psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-d', $old->connstr('restored'), '-f', $dump ],
	'its restore');
foreach my $copy ('kept', 'renewed', 'undecided')
{
	sql($old, "CREATE DATABASE $copy TEMPLATE plain");
}
sql($old, "SELECT idempotency.stripe_namespace('keep')", db => 'kept');
sql($old, "SELECT idempotency.stripe_namespace('new')", db => 'renewed');

my @decided = qw(plain restored kept renewed);

# Every row, and everything that callers are told.
sub state_of
{
	my ($node, $db) = @_;
	my $state = sql($node, q{
		SET timezone = 'UTC';
		SELECT md5(string_agg(t::text, E'\n' ORDER BY t::text)) FROM idempotency.idempotency_keys t;
		SELECT md5(string_agg(t::text, E'\n' ORDER BY t::text)), count(body), count(response)
			FROM idempotency.stripe_idempotency_keys t;
		SELECT md5(string_agg(t::text, E'\n' ORDER BY t::text)), count(payload)
			FROM idempotency.stripe_webhook_events t;
		SELECT operation_id, outcome, fate FROM idempotency.stripe_orphans;
		SELECT operation_id FROM idempotency.stripe_unknown ORDER BY 1;
		SELECT p::text FROM idempotency.stripe_webhook_pending p;
		SELECT c.stripe_event_id, c.verdict, c.event FROM (VALUES ('evt_1'), ('evt_3')) v (id),
			LATERAL idempotency.stripe_webhook_reclaim(v.id) c;
		SELECT c::text FROM idempotency.claim('done', 'test', '{"amount": 1}') c;
		SELECT key, verdict FROM (VALUES ('done'), ('held')) v (key),
			LATERAL idempotency.claim(key, 'test', '{"amount": 9}');
		SELECT verdict FROM idempotency.claim('held', 'test', '{"amount": 2.0}');
		SELECT l::text FROM idempotency.lookup('pointed', 'test') l;
		SELECT idempotency.operation_uuid('some key', 'test');
	}, db => $db);

	$state .= "\n" . sql($node, q{
		SELECT idempotency.stripe_idempotency_key('payment', id)
			FROM unnest('{done,held,released,next}'::text[]) id;
		SELECT verdict, resource_id FROM idempotency.stripe_claim('payment', 'done', '{"amount": 3.0}');
		SELECT verdict FROM idempotency.stripe_claim('payment', 'done', '{"amount": 4}');
		SELECT verdict FROM idempotency.stripe_claim('payment', 'held');
		SELECT l::text, idempotency.stripe_idempotency_key(s.operation_type, s.operation_id)
			FROM idempotency.stripe_idempotency_keys s,
				LATERAL idempotency.stripe_lookup(s.operation_type, s.operation_id) l
			ORDER BY s.operation_id;
	}, db => $db) unless $db eq 'undecided';

	return $state;
}

# The namespaces, which a restore adds to
sub namespaces
{
	my ($node, $db) = @_;

	return sql($node, 'SELECT n::text FROM idempotency.namespace n ORDER BY 1', db => $db);
}

my %namespaces = map { $_ => namespaces($old, $_) } @decided, 'undecided';
my %before = map { $_ => state_of($old, $_) } @decided, 'undecided';
is($before{restored}, $before{plain}, 'a restored database is like its original');
is($before{kept}, $before{plain}, 'a copy that keeps its namespace, too');
isnt($before{renewed}, $before{plain}, 'a copy with a namespace of its own is not');
foreach my $db (@decided)
{
	$new->command_ok(
		[ 'pg_dump', '--format=custom', '--file', "$dir/$db.dump", $old->connstr($db) ],
		"$db: the new pg_dump");
}
my $system = sql($old, 'SELECT system_identifier FROM pg_control_system()');
$old->stop;

# pg_upgrade leaves files in the current directory
chdir($PostgreSQL::Test::Utils::tmp_check) or die "could not chdir: $!";
command_ok(
	[
		'pg_upgrade', '--no-sync',
		'-d', $old->data_dir, '-D', $new->data_dir,
		'-b', $old->config_data('--bindir'), '-B', $new->config_data('--bindir'),
		'-s', $new->host, '-p', $old->port, '-P', $new->port
	],
	'pg_upgrade');
if (-d $new->data_dir . '/pg_upgrade_output.d')
{
	# it says why in files, which it leaves where it fails
	find(
		sub {
			diag("$File::Find::name:\n" . join("\n", grep { defined } (split /\n/, slurp_file($_))[-20 .. -1]))
			  if /\.log$/ && -s $_;
		},
		$new->data_dir . '/pg_upgrade_output.d');
	BAIL_OUT('there is nothing to look at');
}
$new->append_conf('postgresql.conf', 'max_prepared_transactions = 10');
$new->start;
isnt(sql($new, 'SELECT system_identifier FROM pg_control_system()'),
	$system, 'the cluster has another system identifier');

foreach my $db (@decided, 'undecided')
{
	is(state_of($new, $db), $before{$db}, "$db: every row, the same answers and keys");
	is(namespaces($new, $db), $namespaces{$db}, "$db: the same namespace");
}
foreach my $db (@decided)
{
	sql($new, "CREATE DATABASE ${db}_dumped");
	$new->command_ok(
		[ 'pg_restore', '--exit-on-error', '-d', $new->connstr("${db}_dumped"), "$dir/$db.dump" ],
		"$db: pg_restore");
	is(state_of($new, "${db}_dumped"), $before{$db}, "$db, restored: every row, the same answers and keys");
}

# What was sent from the old cluster is not sent again, or with the same key
my $arrivals = $stripe->arrivals;
my $charges = $stripe->charges;
foreach my $db ('plain', 'plain_dumped')
{
	my @call = (db => $db, params => \%paid);

	foreach my $id ('paid', 'settled', 'orphan')
	{
		my $answer = stripe_call($new, 'call', $id, @payment, @call);
		is("$answer->{outcome} $answer->{replayed}", 'completed 1', "$db: $id is replayed");
	}
	is(stripe_call($new, 'call', 'declined', @payment, @call, params => \%declined)->{outcome},
		'failed', "$db: so is a refusal");
	is(sql($new, 'SELECT count(*) FROM idempotency.stripe_orphans', db => $db),
		'0', "$db: the retry has adopted the orphan");
}
is($stripe->arrivals, $arrivals, 'nothing was sent');
foreach my $db ('plain', 'plain_dumped')
{
	is(stripe_retry($new, 'call', 'lost', db => $db)->{outcome}, 'completed', "$db: what was lost is found");
}
is($stripe->arrivals, $arrivals + 2, 'by sending it again');
is($stripe->charges, $charges, 'and nobody is charged twice');
is(sql($new, q{SELECT stripe_event_id, attempt FROM idempotency.stripe_webhook_next('1 hour')}, db => 'plain'),
	'evt_4|1', 'the event that waits longest is next');
is(sql($new, q{SELECT verdict, attempt, last_error FROM idempotency.stripe_webhook_reclaim('evt_2', 'acct_1', '1 hour')},
		db => 'plain'),
	'claimed|2|no', 'a failed one is claimed again');

foreach my $db (@decided)
{
	my $key = sql($new, "SELECT idempotency.stripe_idempotency_key('payment', 'next')", db => $db);
	my $answer = stripe_claim($new, 'payment', 'next', db => $db);
	is("$answer->{verdict} $answer->{idempotency_key}", "claimed $key", "$db: a new operation is claimed");
	$answer = stripe_claim($new, 'payment', 'released', request => '{"amount": 5.0}', db => $db);
	is($answer->{verdict}, 'claimed', "$db: a released one, too");
	lapse_lease($new, 'pointed', db => $db);
	$answer = claim($new, 'pointed', lease => '1 hour', db => $db);
	is("$answer->{verdict} $answer->{attempt} $answer->{recovery_point}",
		'claimed 2 charged', "$db: a lapsed claim is taken over");
	run_fails($new, "SELECT idempotency.stripe_namespace('new')",
		'IK009', "$db: there is nothing to decide", db => $db);
}

run_fails($new, "SELECT idempotency.stripe_claim('payment', 'done')",
	'IK009', 'undecided: an undecided copy is still refused', db => 'undecided');

foreach my $db (@decided)
{
	sql($new, "CREATE DATABASE ${db}_copy TEMPLATE $db");
	run_fails($new, "SELECT idempotency.stripe_claim('payment', 'done')",
		'IK009', "$db: so is a copy made after the upgrade", db => "${db}_copy");
	sql($new, "SELECT idempotency.stripe_namespace('keep')", db => "${db}_copy");
	is( sql($new, "SELECT idempotency.stripe_idempotency_key('payment', 'later')", db => "${db}_copy"),
		sql($new, "SELECT idempotency.stripe_idempotency_key('payment', 'later')", db => $db),
		"$db: a copy that keeps its namespace has the same keys");
}

# The next upgrade finds rows of two systems.  That its identifier isn't known
# here can be had without another pg_upgrade.
sub later
{
	my ($db) = @_;

	return sql($new, "SELECT idempotency.stripe_idempotency_key('payment', 'later')", db => $db);
}
foreach my $db (@decided, map { "${_}_copy" } @decided)
{
	my $key = later($db);

	sql($new, q{
		UPDATE idempotency.namespace SET system_identifier = system_identifier + 1
		WHERE system_identifier = (SELECT system_identifier FROM pg_control_system())},
		db => $db);
	is(later($db), $key, "$db: the same keys after one more upgrade");
}

$new->stop;

done_testing();
