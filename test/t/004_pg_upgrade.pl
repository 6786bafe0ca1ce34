
# pg_upgrade gives a cluster a new system identifier, keeps the databases' OIDs
# and runs no script of an extension.  Every database must find itself where it
# was: the same rows, the same keys, decided or not.
#
# The old cluster is of this major, too: that changes all of the above.  For
# another one, set OLD_PG_CONFIG to its pg_config and OLD_TEMP_CONFIG to what
# TEMP_CONFIG is for it.

use strict;
use warnings;

use File::Basename qw(dirname);
use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $old;
{
	local $ENV{TEMP_CONFIG} = $ENV{OLD_TEMP_CONFIG} // $ENV{TEMP_CONFIG};
	$old = PostgreSQL::Test::Cluster->new('old',
		install_path => $ENV{OLD_PG_CONFIG} && dirname(dirname($ENV{OLD_PG_CONFIG})));
	$old->init;
}
my $new = PostgreSQL::Test::Cluster->new('new');
my @checksums =
  $old->pg_version->major < 18 && $new->pg_version->major >= 18 ? ('--no-data-checksums') : ();
$new->init(extra => \@checksums);
note('from ' . $old->pg_version . ' to ' . $new->pg_version);

# Databases of every history: an ordinary one, one that was restored from a
# dump, and copies by TEMPLATE with and without a decision.
$old->start;
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
my $dump = PostgreSQL::Test::Utils::tempdir() . '/plain.sql';
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
		SELECT md5(string_agg(t::text, E'\n' ORDER BY t::text))
			FROM idempotency.stripe_idempotency_keys t;
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
	}, db => $db) unless $db eq 'undecided';

	return $state;
}

my %before = map { $_ => state_of($old, $_) } @decided, 'undecided';
is($before{restored}, $before{plain}, 'a restored database is like its original');
is($before{kept}, $before{plain}, 'a copy that keeps its namespace, too');
isnt($before{renewed}, $before{plain}, 'a copy with a namespace of its own is not');
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
$new->append_conf('postgresql.conf', 'max_prepared_transactions = 10');
$new->start;
isnt(sql($new, 'SELECT system_identifier FROM pg_control_system()'),
	$system, 'the cluster has another system identifier');

foreach my $db (@decided, 'undecided')
{
	is(state_of($new, $db), $before{$db}, "$db: every row, the same answers and keys");
}

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
