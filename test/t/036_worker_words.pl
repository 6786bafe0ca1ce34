
# What the view of workers says where a test of its own is needed for it: how to
# preload beside other libraries, a database that nobody could look at yet, and a
# worker that gives up.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_node('main', conf => "idempotency.expiry_interval = 1s\n");

sub state_of
{
	my ($columns, %params) = @_;

	return sql($node, "SELECT $columns FROM idempotency.workers WHERE database = current_database()", %params);
}

# beside other libraries; who may not see them isn't shown them
SKIP:
{
	skip 'there is no auto_explain', 6 unless -e $node->config_data('--pkglibdir') . '/auto_explain.so';
	$node->append_conf('postgresql.conf', q{shared_preload_libraries = 'auto_explain, "auto_explain"'});
	$node->restart;
	my $next_step = state_of('next_step');
	like($next_step, qr/^ALTER SYSTEM SET shared_preload_libraries = 'auto_explain', 'auto_explain', 'idempotency'; -- and restart/,
		'the other libraries stay');
	sql($node, q{CREATE ROLE observer; SELECT idempotency.grant_role('observer', 'observer')});
	like(sql($node, 'SET ROLE observer; SELECT next_step FROM idempotency.workers'),
		qr/^-- as superuser, add idempotency to shared_preload_libraries/, 'who may not see them is told no more');
	sql($node, 'GRANT pg_read_all_settings TO observer');
	is(sql($node, 'SET ROLE observer; SELECT next_step FROM idempotency.workers'), $next_step, 'who may is');

	sql($node, $next_step);
	$node->restart;
	is(sql($node, 'SHOW shared_preload_libraries'), 'auto_explain, auto_explain, idempotency', 'the statement does what it says');
	wait_until($node, q{SELECT status = 'idle' FROM idempotency.workers WHERE database = current_database()}, 'and helps');
	is(state_of('next_step IS NULL'), 't', 'then there is no next step');
	sql($node, 'ALTER SYSTEM RESET shared_preload_libraries');
}

# Nobody could look yet: what is known was lost with a crash, and there is no slot
# for a worker.
$node->append_conf('postgresql.conf', "shared_preload_libraries = 'idempotency'\nmax_worker_processes = 1\nmax_logical_replication_workers = 0\n");
expired_rows($node, 150);
$node->stop('immediate');
$node->start;
is(state_of('status, next_step IS NULL'), 'unknown|t', 'a database that nobody could look at');

# A hundred rows in a row that can't be removed: the next run goes on behind them.
sql($node, q{
	CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'not %', OLD.key; END$$;
	CREATE TRIGGER refuse BEFORE DELETE ON idempotency.idempotency_keys
		FOR EACH ROW WHEN (OLD.key LIKE 'expired%') EXECUTE FUNCTION refuse()});
expired_rows($node, 20, prefix => 'behind');
$node->append_conf('postgresql.conf', "max_worker_processes = 8\n");
my $offset = -s $node->logfile;
$node->restart;
wait_until($node, q{SELECT status = 'failing' AND refused >= 100 FROM idempotency.workers WHERE database = current_database()},
	'a worker gives up after a hundred refusals');
like(state_of('last_error'), qr/expired\d+\): not expired/, 'and names a row');
wait_until($node, q{SELECT count(*) = 150 FROM idempotency.idempotency_keys}, 'what is behind them goes all the same');
like(substr(slurp_file($node->logfile), $offset), qr/idempotency worker: \d+ expired rows removed, 100 refused/, 'the log has it');
sql($node, 'DROP FUNCTION refuse CASCADE');
wait_until_expired($node, 'and without the trigger all go');

# One worker may run, and it is busy elsewhere.
$node->append_conf('postgresql.conf', "idempotency.max_workers = 1\n");
$node->reload;
sql($node, q{
	CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(600); RETURN OLD; END';
	CREATE TRIGGER slow BEFORE DELETE ON idempotency.idempotency_keys FOR EACH ROW EXECUTE FUNCTION slow()});
expired_rows($node, 1);
my $busy = q{SELECT pid FROM pg_stat_activity WHERE backend_type = 'idempotency worker' AND wait_event = 'PgSleep'};
wait_until($node, "SELECT EXISTS ($busy)", 'a worker is busy');
is(state_of('status'), 'running', 'which the view says');
sql($node, 'CREATE DATABASE other');
sql($node, 'CREATE EXTENSION idempotency', db => 'other');
is(state_of('status, next_step IS NULL', db => 'other'), 'waiting|t', 'another database waits for its turn');
sql($node, "SELECT pg_terminate_backend(pid) FROM ($busy) b");
sql($node, 'DROP FUNCTION slow CASCADE');
wait_until($node, q{SELECT status = 'idle' FROM idempotency.workers WHERE database = current_database()}, 'and has it', db => 'other');

# A database that is dropped is in the view no longer, and its place is free.
sql($node, 'DROP DATABASE other');
is(sql($node, q{SELECT string_agg(database, ' ') FROM idempotency.workers}), 'postgres', 'a database that is gone isn\'t shown');
$node->reload;
sql($node, 'CREATE DATABASE again');
sql($node, 'CREATE EXTENSION idempotency', db => 'again');
wait_until($node, q{SELECT status = 'idle' FROM idempotency.workers WHERE database = current_database()}, 'another one has its place', db => 'again');

$node->stop;

done_testing();
