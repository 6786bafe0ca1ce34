
# Databases come, go, are copied and renamed while workers are in them: none
# of that fails or hangs, and the launcher finds out by itself.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_node('main', conf => q{
shared_preload_libraries = 'idempotency'
idempotency.expiry_interval = 1s
idempotency.expiry_batch_size = 10
log_min_messages = debug1
max_logical_replication_workers = 0
});

my $working = q{FROM pg_stat_activity WHERE backend_type = 'idempotency worker' AND datname = };

# A database with the extension, a worker in it, and work for a long time.
sub busy_database
{
	my ($db) = @_;

	sql($node, "CREATE DATABASE $db");
	sql($node, 'CREATE EXTENSION idempotency', db => $db);
	expired_rows($node, 100_000, db => $db);
	$node->poll_query_until('postgres', "SELECT EXISTS (SELECT $working '$db')")
	  or die "no worker in database $db";
	return;
}

# Test that a statement works, in less than a number of seconds.
sub works
{
	my ($statement, $test_name, %params) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $started = time;
	my ($rc, undef, $stderr) = $node->psql('postgres', $statement, %params);

	is($rc, 0, $test_name) or diag($stderr);
	cmp_ok(time - $started, '<', 30, "$test_name: at once");
	return;
}

# The log has it that a worker was asked for in this database.
sub looked_at
{
	my ($oid, $offset) = @_;

	return substr(slurp_file($node->logfile), $offset) =~
	  /registering background worker "idempotency worker for database $oid"/;
}

sub oid_of
{
	my ($db) = @_;

	return sql($node, "SELECT oid FROM pg_database WHERE datname = '$db'");
}

sql($node, 'CREATE ROLE owner LOGIN CREATEDB');

busy_database('renamed');
works('ALTER DATABASE renamed RENAME TO original', 'ALTER DATABASE RENAME while a worker is there');
wait_until($node, "SELECT EXISTS (SELECT $working 'original')", 'the worker comes back');

works('CREATE DATABASE copy TEMPLATE original', 'CREATE DATABASE TEMPLATE while a worker is there');
wait_until_expired($node, 'the copy is found by itself', db => 'copy');
wait_until_expired($node, 'the original is not forgotten', db => 'original');

busy_database('dropped');
works('DROP DATABASE dropped', 'DROP DATABASE while a worker is there');

busy_database('forced');
sql($node, 'ALTER DATABASE forced OWNER TO owner');
works('SET ROLE owner; DROP DATABASE forced WITH (FORCE)',
	'DROP DATABASE WITH (FORCE) by an ordinary owner');

# One that isn't dropped after all goes on.
busy_database('stays');
my $session = $node->background_psql('stays');
$session->query_safe('SELECT 1');
my ($rc, undef, $stderr) = $node->psql('postgres', 'DROP DATABASE stays');
like($stderr, qr/database "stays" is being accessed by other users.*1 other session/s,
	'DROP DATABASE counts others, and no worker');
$session->quit;
wait_until_expired($node, 'and the worker comes back', db => 'stays');

busy_database('tablespaces');
my $location = PostgreSQL::Test::Utils::tempdir();
works("CREATE TABLESPACE there LOCATION '$location'", 'CREATE TABLESPACE');
works('ALTER DATABASE tablespaces SET TABLESPACE there',
	'ALTER DATABASE SET TABLESPACE while a worker is there');
wait_until_expired($node, 'and the worker goes on', db => 'tablespaces');

# The extension comes and goes.
busy_database('extension');
my $oid = oid_of('extension');
my $dropped = time;
sql($node, 'DROP EXTENSION idempotency', db => 'extension');
cmp_ok(time - $dropped, '<', 30, 'DROP EXTENSION while a worker is there');
wait_until($node, q{SELECT NOT EXISTS (SELECT FROM idempotency.workers WHERE database = 'extension')},
	'the database is no longer in the view');
my $offset = -s $node->logfile;
sql($node, 'BEGIN; CREATE EXTENSION idempotency; ROLLBACK', db => 'extension');
sql($node, 'CREATE TABLE ordinary ()', db => 'extension');
expired_rows($node, 5, db => 'original');
wait_until_expired($node, 'others go on', db => 'original');
ok(!looked_at($oid, $offset), 'CREATE EXTENSION that rolled back wakes nobody');
my $created = time;
sql($node, 'CREATE EXTENSION idempotency', db => 'extension');
expired_rows($node, 5, db => 'extension');
wait_until_expired($node, 'CREATE EXTENSION that committed does', db => 'extension');
cmp_ok(time - $created, '<', 10, 'CREATE EXTENSION that committed does: at once');

# A prepared CREATE EXTENSION is heard of when it is used.
sql($node, 'CREATE DATABASE prepared');
$node->reload;
wait_until($node, q{SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE datname = 'prepared')},
	'a database without the extension is left at once');
sql($node, "BEGIN; CREATE EXTENSION idempotency; PREPARE TRANSACTION 'extension'", db => 'prepared');
sql($node, "COMMIT PREPARED 'extension'", db => 'prepared');
claim($node, 'key', lease => '1 hour', db => 'prepared');
expired_rows($node, 5, db => 'prepared');
wait_until_expired($node, 'CREATE EXTENSION in a prepared transaction', db => 'prepared');

# A database that takes no connections.
sql($node, 'ALTER DATABASE prepared ALLOW_CONNECTIONS false');
$node->reload;
wait_until($node, q{SELECT status = 'no connections' FROM idempotency.workers WHERE database = 'prepared'},
	'a database that takes no connections: the view says so');
$offset = -s $node->logfile;
expired_rows($node, 5, db => 'original');
wait_until_expired($node, 'others go on', db => 'original');
ok(!looked_at(oid_of('prepared'), $offset), 'a database that takes no connections is let alone');
sql($node, sql($node, q{SELECT next_step FROM idempotency.workers WHERE database = 'prepared'}));
$node->reload;
expired_rows($node, 5, db => 'prepared');
wait_until_expired($node, 'one that takes some again is not', db => 'prepared');

# Across a restart everything is known, and nobody has to look.
sql($node, 'CREATE DATABASE without');
sql($node, 'CREATE TABLE ordinary ()', db => 'without');
my $without = oid_of('without');
$node->reload;
ok($node->poll_query_until('postgres', 'SELECT true'), 'there is a database without the extension');
for (1 .. 600)
{
	last if looked_at($without, 0);
	select(undef, undef, undef, 0.1);
}
ok(looked_at($without, 0), 'somebody has looked');
wait_until($node, q{SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE datname = 'without')},
	'and has gone');

sub works_after
{
	my ($test_name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	# keys of its own: a crash may take back the last that workers removed
	foreach my $db (qw(original copy prepared extension))
	{
		expired_rows($node, 5, db => $db, prefix => "$test_name ");
		wait_until_expired($node, "$test_name: database $db goes on", db => $db);
	}
	return;
}

$offset = -s $node->logfile;
$node->restart;
ok(!-e $node->data_dir . '/pg_stat/idempotency.databases', 'what is known was read once');
works_after('restart');
ok(!looked_at($without, $offset), 'restart: nobody had to look into the database without it');

# Somebody creates the extension while it isn't preloaded.
$node->append_conf('postgresql.conf', "shared_preload_libraries = ''");
$node->restart;
sql($node, 'CREATE EXTENSION idempotency', db => 'without');
expired_rows($node, 5, db => 'without');
$node->append_conf('postgresql.conf', "shared_preload_libraries = 'idempotency'");
$node->restart;
wait_until_expired($node, 'a start without preloading: the file is not believed', db => 'without');

# A file of nonsense is no more than a reason to look.
$node->stop;
my $file = $node->data_dir . '/pg_stat/idempotency.databases';
ok(-s $file, 'what is known is written at shutdown');
append_to_file($file, 'x');
open(my $fh, '+<', $file) or die "$file: $!";
seek($fh, 40, 0);
print $fh 'nonsense';
close($fh);
$offset = -s $node->logfile;
$node->start;
works_after('damaged file');
like(substr(slurp_file($node->logfile), $offset), qr/ignoring invalid data in file "pg_stat\/idempotency.databases"/,
	'damaged file: the log says so');

$node->stop('immediate');
$node->start;
works_after('crash');
$node->stop;

done_testing();
