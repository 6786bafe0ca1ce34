
# The launcher and its workers: they come by themselves where the extension is
# preloaded, come back whatever happens to them, and one database's trouble
# isn't another's.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_node('main', conf => q{
idempotency.expiry_interval = 1s
log_min_messages = debug1
restart_after_crash = on
autovacuum_naptime = 1s
max_logical_replication_workers = 0
});

# What the view says of a database, read there.
sub state_of
{
	my ($column, $db) = @_;

	return sql($node, "SELECT $column FROM idempotency.workers WHERE database = current_database()",
		db => $db);
}

sub wait_for_status
{
	my ($status, $test_name, $db) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return wait_until($node, "SELECT status = '$status' FROM idempotency.workers
		WHERE database = current_database()", $test_name, db => $db);
}

sub left
{
	my ($db) = @_;

	return sql($node, 'SELECT count(*) FROM idempotency.idempotency_keys', db => $db);
}

# How often the log has said so since the offset.
sub logged
{
	my ($re, $offset) = @_;
	my @lines = substr(slurp_file($node->logfile), $offset) =~ /$re/g;

	return scalar @lines;
}

my $workers = q{SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'idempotency%'};

#
# Not preloaded
#
expired_rows($node, 3);
is(sql($node, $workers), '0', 'not preloaded: no process');
is(state_of('status'), 'not preloaded', 'not preloaded: the view says so');
like(state_of('next_step'), qr/^ALTER SYSTEM SET shared_preload_libraries = 'idempotency';/,
	'not preloaded: and how to get one');
is(claim($node, 'key', lease => '1 hour')->{verdict}, 'claimed', 'not preloaded: functions work');
is(sql($node, 'SELECT string_agg(removed::text, $$ $$) FROM idempotency.expire(2)'),
	'2 0 0 0', 'not preloaded: expire() works');
is(sql($node, 'SELECT sum(removed) FROM idempotency.expire()'), '1', 'not preloaded: until all are gone');
is(sql($node, 'SELECT sum(removed) FROM idempotency.expire()'), '0', 'not preloaded: which it says');

# What the view says is what helps.
expired_rows($node, 10);
sql($node, state_of('next_step'));
$node->restart;
wait_until($node, q{SELECT EXISTS (SELECT FROM pg_stat_activity
	WHERE backend_type = 'idempotency launcher' AND application_name = 'idempotency launcher')},
	'preloaded: the launcher runs');
wait_until_expired($node, 'preloaded: a database is found by itself');
is(left(), '1', 'preloaded: and what is not expired stays');
wait_for_status('idle', 'preloaded: the view says that all is well');
is(state_of('removed'), '10', 'preloaded: and how much that was');
is(state_of(q{last_run > now() - interval '1 hour', next_run > last_run, refused,
	oldest_expired IS NULL, lag IS NULL, last_error IS NULL, next_step IS NULL}),
	't|t|0|t|t|t|t', 'preloaded: and nothing else');
like(slurp_file($node->logfile), qr/idempotency worker: 10 expired rows removed, 0 refused, in \d+ ms/,
	'preloaded: the log says so, too');

#
# Two databases at once
#
sql($node, "CREATE DATABASE $_") for qw(one two);
my $offset = -s $node->logfile;
my $started = time;
foreach my $db (qw(one two))
{
	sql($node, 'BEGIN; CREATE EXTENSION idempotency; ROLLBACK', db => $db);
	sql($node, 'CREATE EXTENSION idempotency', db => $db);
	expired_rows($node, 200_000, db => $db);
}
wait_until($node, q{SELECT EXISTS (SELECT FROM pg_stat_activity
	WHERE backend_type = 'idempotency worker' AND application_name = 'idempotency worker'
		AND query = 'removing expired rows of idempotency.idempotency_keys (request)')},
	'pg_stat_activity says what a worker does');
foreach my $db (qw(one two))
{
	wait_until_expired($node, "database $db: 200,000 expired rows go without a call", db => $db);
	wait_until($node, q{SELECT removed = 200000 FROM idempotency.workers
		WHERE database = current_database()}, "database $db: each is counted", db => $db);
	wait_until($node, q{SELECT n_tup_del = 200000 AND n_dead_tup < 200000 AND autovacuum_count > 0
		FROM pg_stat_user_tables WHERE relname = 'idempotency_keys'},
		"database $db: and autovacuum sees it", db => $db);
}
note('400,000 rows in ' . (time - $started) . ' s');

#
# Somebody ends them
#
my $launcher = q{SELECT pid FROM pg_stat_activity WHERE backend_type = 'idempotency launcher'};
my $pid = sql($node, $launcher);
sql($node, "SELECT pg_terminate_backend($pid)");
wait_until($node, "SELECT EXISTS ($launcher AND pid <> $pid)", 'a terminated launcher comes back');
expired_rows($node, 1, db => 'one');
wait_until_expired($node, 'and works', db => 'one');

# A row that takes long holds the worker until it is terminated.
sql($node, q{
	CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
		'BEGIN PERFORM pg_sleep(600); RETURN OLD; END';
	CREATE TRIGGER slow BEFORE DELETE ON idempotency.idempotency_keys
		FOR EACH ROW EXECUTE FUNCTION slow()}, db => 'one');
expired_rows($node, 1, db => 'one');
my $worker = q{SELECT pid FROM pg_stat_activity
	WHERE backend_type = 'idempotency worker' AND datname = 'one' AND wait_event = 'PgSleep'};
wait_until($node, "SELECT EXISTS ($worker)", 'a worker is at it');
expired_rows($node, 1, db => 'two');
wait_until_expired($node, 'which is no matter to others', db => 'two');
$pid = sql($node, $worker);
is(state_of('pid', 'one'), $pid, 'the view knows its process');
sql($node, "SELECT pg_terminate_backend($pid)");
sql($node, q{DROP TRIGGER slow ON idempotency.idempotency_keys}, db => 'one');
wait_until_expired($node, 'a terminated worker comes back', db => 'one');

#
# A crash of the server
#
$offset = -s $node->logfile;
expired_rows($node, 5, db => 'two');
$pid = sql($node, $launcher);
kill('KILL', $pid) == 1 or die "could not kill the launcher: $!";
$node->wait_for_log(qr/all server processes terminated; reinitializing/, $offset);
wait_until_up($node);
expired_rows($node, 5, db => 'one');
wait_until_expired($node, 'after a crash they start by themselves', db => 'one');
wait_until_expired($node, 'everywhere', db => 'two');

#
# Trouble in one database
#
$offset = -s $node->logfile;
$started = time;
sql($node, 'ALTER TABLE idempotency.idempotency_keys RENAME TO elsewhere', db => 'one');
wait_until($node, q{SELECT status = 'failing' AND
		last_error = 'table "idempotency.idempotency_keys" does not exist'
	FROM idempotency.workers WHERE database = current_database()},
	'a broken table: the view says so, and why', db => 'one');
like(state_of('next_step', 'one'), qr/expire/, 'a broken table: and what to type');
is(state_of(q{next_run - last_error_at >= interval '4.9 seconds'}, 'one'),
	't', 'a broken table: it is tried again, but not at once');
expired_rows($node, 5, db => 'two');
wait_until_expired($node, 'a broken table: other databases go on', db => 'two');
cmp_ok(logged(qr/ERROR:  table "idempotency.idempotency_keys" does not exist/, $offset),
	'<=', 2 + (time - $started) / 5, 'a broken table: one line in the log each time');
sql($node, 'ALTER TABLE idempotency.elsewhere RENAME TO idempotency_keys', db => 'one');
expired_rows($node, 5, db => 'one');
wait_until_expired($node, 'a broken table: mended, it goes on', db => 'one');
wait_for_status('idle', 'a broken table: and says so', 'one');

# Rows that a foreign key refuses, at once or at commit, and a trigger of
# somebody who must not come by a superuser's rights.
sql($node, q{
	CREATE ROLE keeper;
	GRANT USAGE ON SCHEMA idempotency TO keeper;
	ALTER TABLE idempotency.idempotency_keys OWNER TO keeper;
	CREATE TABLE kept (scope text, key text,
		FOREIGN KEY (scope, key) REFERENCES idempotency.idempotency_keys);
	CREATE TABLE deferred (scope text, key text,
		FOREIGN KEY (scope, key) REFERENCES idempotency.idempotency_keys DEFERRABLE INITIALLY DEFERRED);
	CREATE TABLE fired (who text, deferred boolean);
	GRANT INSERT ON fired TO keeper;
	CREATE FUNCTION fire() RETURNS trigger LANGUAGE plpgsql AS
		'BEGIN INSERT INTO public.fired VALUES (current_user, TG_ARGV[0]::boolean); RETURN NULL; END';
	CREATE TRIGGER fire AFTER DELETE ON idempotency.idempotency_keys
		FOR EACH ROW EXECUTE FUNCTION fire('false');
	CREATE CONSTRAINT TRIGGER fire_late AFTER DELETE ON idempotency.idempotency_keys
		DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fire('true');
	BEGIN;
	INSERT INTO idempotency.idempotency_keys
		(token, claimed_at, recorded_at, expires_at, attempt, http_status, scope, key)
	SELECT n, t, t, t, 1, 200, 'test', 'refused' || n
	FROM generate_series(1, 3000) n, (SELECT clock_timestamp() - interval '1 day' AS t) t;
	INSERT INTO kept VALUES ('test', 'refused1'), ('test', 'refused1777');
	INSERT INTO deferred VALUES ('test', 'refused2000'), ('test', 'refused3000');
	COMMIT}, db => 'two');
# a slow machine takes more than one of a worker's visits for the pass
wait_until($node, q{SELECT status = 'rows refused' AND refused = 4
	FROM idempotency.workers WHERE database = current_database()},
	'rows that are refused: the view says so, and how many', db => 'two');
is(left('two'), '4', 'rows that are refused: all others are gone');
like(state_of('last_error', 'two'),
	qr/^\(scope, key\)=\(test, refused\d+\): update or delete on table "idempotency_keys" violates foreign key/,
	'rows that are refused: one is named');
is(state_of(q{lag > interval '23 hours', oldest_expired < now() - interval '23 hours'}, 'two'),
	't|t', 'rows that are refused: the lag shows');
like(slurp_file($node->logfile), qr/LOG:  idempotency worker: \d+ expired rows removed, [1-4] refused, in \d+ ms\n.*DETAIL:  Row /,
	'rows that are refused: so does the log');
is(sql($node, 'SELECT who, deferred, count(*) FROM fired GROUP BY 1, 2 ORDER BY 2', db => 'two'),
	"keeper|f|2996\nkeeper|t|2996", 'triggers run with the rights of the table owner');
my (undef, undef, $stderr) = $node->psql('two', state_of('next_step', 'two'));
like($stderr, qr/WARNING:  \d rows? of "idempotency.idempotency_keys" could not be removed/,
	'rows that are refused: by hand they are named, too');
sql($node, 'DROP TABLE kept, deferred; DROP TRIGGER fire ON idempotency.idempotency_keys;
	DROP TRIGGER fire_late ON idempotency.idempotency_keys', db => 'two');
wait_until_expired($node, 'rows that are refused: then they are not', db => 'two');

# The view cuts an error between characters, and shows it in any encoding.
foreach my $db (qw(utf8 latin1))
{
	sql($node, "CREATE DATABASE $db TEMPLATE template0 ENCODING '$db' LOCALE 'C'");
	sql($node, 'CREATE EXTENSION idempotency', db => $db);
}
sql($node, q{
	CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not this one'; END $$;
	CREATE TRIGGER refuse BEFORE DELETE ON idempotency.idempotency_keys
		FOR EACH ROW EXECUTE FUNCTION refuse();
	INSERT INTO idempotency.idempotency_keys
		(token, claimed_at, recorded_at, expires_at, attempt, http_status, scope, key)
	SELECT 1, t, t, t, 1, 200, 'x', repeat(U&'\20ac', 200)
	FROM (SELECT clock_timestamp() - interval '1 day' AS t) t}, db => 'utf8');
wait_for_status('rows refused', 'encodings: a long key is refused', 'utf8');
is(state_of(q{convert_from(convert_to(last_error, 'UTF8'), 'UTF8') ~ U&'^[(]scope, key[)]=[(]x, \20ac+$'}, 'utf8'),
	't', 'encodings: an error that was cut is text');
is(sql($node, q{SELECT last_error ~ '^[(]scope, key[)]=[(]x, [?]+$' FROM idempotency.workers WHERE database = 'utf8'},
		db => 'latin1'),
	't', 'encodings: in another database, too');
sql($node, "DROP DATABASE $_") for qw(utf8 latin1);

#
# Settings of a database
#
sql($node, 'ALTER DATABASE one SET idempotency.expiry = off');
wait_for_status('off', 'switched off: the view says so', 'one');
expired_rows($node, 5, db => 'one');
my $run = state_of('last_run', 'one');
wait_until($node, "SELECT last_run > '$run' FROM idempotency.workers WHERE database = current_database()",
	'switched off: a worker looks', db => 'one');
is(left('one'), '5', 'switched off: and leaves the rows alone');
sql($node, 'ALTER DATABASE two SET default_transaction_read_only = on');
wait_for_status('read only', 'read-only: the view says so', 'two');
sql($node, state_of('next_step', $_)) for qw(one two);
wait_until_expired($node, 'switched on again by what the view says', db => 'one');
wait_for_status('idle', 'read-only: so it goes on', 'two');

my $removed = state_of('removed', 'one');
sql($node, q{
	ALTER DATABASE one SET default_transaction_isolation = serializable;
	ALTER DATABASE one SET default_transaction_deferrable = on;
	ALTER DATABASE one SET session_replication_role = replica;
	ALTER DATABASE one SET row_security = off;
	ALTER DATABASE one SET exit_on_error = on;
	ALTER DATABASE one SET statement_timeout = '1ms';
	ALTER DATABASE one SET lock_timeout = '1ms';
	ALTER DATABASE one SET idle_in_transaction_session_timeout = '1ms';
	ALTER DATABASE one SET search_path = hostile, pg_catalog;
	ALTER DATABASE one SET idempotency.expiry_batch_size = 7});
# our own sessions are spared: these count for more than the database's
local $ENV{PGOPTIONS} = '-c statement_timeout=0 -c lock_timeout=0 -c session_replication_role=origin -c idle_in_transaction_session_timeout=0';
sql($node, q{
	CREATE SCHEMA hostile;
	CREATE FUNCTION hostile.equal(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT true';
	CREATE OPERATOR hostile.= (LEFTARG = text, RIGHTARG = text, FUNCTION = hostile.equal);
	CREATE TABLE public.fired (n integer);
	CREATE FUNCTION public.fire() RETURNS trigger LANGUAGE plpgsql AS
		'BEGIN INSERT INTO public.fired VALUES (1); RETURN NULL; END';
	CREATE TRIGGER fire AFTER DELETE ON idempotency.idempotency_keys
		FOR EACH ROW EXECUTE FUNCTION public.fire();
	CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not this one'; END $$;
	CREATE TRIGGER refuse BEFORE DELETE ON idempotency.idempotency_keys
		FOR EACH ROW WHEN (OLD.key OPERATOR(pg_catalog.=) 'k13') EXECUTE FUNCTION public.refuse();
	INSERT INTO idempotency.idempotency_keys
		(token, claimed_at, recorded_at, expires_at, attempt, http_status, scope, key)
	SELECT n, t, t, CASE WHEN n <= 51 THEN t ELSE t + interval '1 year' END, 1, 200, 'test', 'k' || n
	FROM generate_series(1, 60) n, (SELECT clock_timestamp() - interval '1 day' AS t) t},
	db => 'one');
wait_until($node, "SELECT removed = $removed + 50 FROM idempotency.workers WHERE database = 'one'",
	'settings of the database spoil nothing');
is(sql($node, q{SELECT count(*) FROM public.fired}, db => 'one'),
	'50', 'and keep no trigger from firing');
sql($node, 'ALTER DATABASE one RESET ALL');
sql($node, 'DROP TRIGGER fire ON idempotency.idempotency_keys;
	DROP TRIGGER refuse ON idempotency.idempotency_keys', db => 'one');
$ENV{PGOPTIONS} = '';

# max_workers
$node->append_conf('postgresql.conf', 'idempotency.max_workers = 0');
$node->reload;
wait_for_status('stopped', 'max_workers = 0: the view says so', 'one');
$node->append_conf('postgresql.conf', 'idempotency.max_workers = 1');
$node->reload;
expired_rows($node, 5000, db => $_) for qw(one two);
wait_until_expired($node, 'max_workers = 1: one after the other', db => $_) for qw(one two);

#
# No slot for a worker
#
$node->append_conf('postgresql.conf', "idempotency.max_workers = 2\nmax_worker_processes = 2");
$offset = -s $node->logfile;
$node->restart;
expired_rows($node, 20_000, db => $_) for qw(one two);
wait_until_expired($node, 'slots exhausted: it goes on when one is free', db => $_) for qw(one two);
is(logged(qr/LOG:  idempotency launcher: out of background worker slots/, $offset),
	1, 'slots exhausted: logged once');
$node->append_conf('postgresql.conf', 'max_worker_processes = 1');
$node->restart;
wait_for_status('no slot', 'no slot at all: the view says so', 'one');
like(state_of('next_step', 'one'), qr/^ALTER SYSTEM SET max_worker_processes = 4;/,
	'no slot at all: and what to type');
$node->append_conf('postgresql.conf', 'max_worker_processes = 8');

#
# Who sees what
#
$node->restart;
sql($node, q{
	CREATE ROLE watcher; SELECT idempotency.grant_role('watcher', 'observer');
	CREATE ROLE hand; SELECT idempotency.grant_role('hand', 'operator')});
wait_until($node, 'SELECT count(*) = 3 FROM idempotency.workers', 'the view has all databases');
is(sql($node, 'SET ROLE watcher; SELECT database FROM idempotency.workers'),
	'postgres', 'to an observer its own');
is(sql($node, 'GRANT pg_read_all_stats TO watcher; SET ROLE watcher;
	SELECT database FROM idempotency.workers'),
	"one\npostgres\ntwo", 'to a member of pg_read_all_stats all of them');
is(sql($node, 'SET ROLE hand; SELECT sum(removed) FROM idempotency.expire()'),
	'0', 'an operator may call expire()');
run_fails($node, 'SET ROLE watcher; SELECT idempotency.expire()', '42501', 'an observer may not');

#
# pg_upgrade's server
#
$node->stop;
command_ok([ 'pg_ctl', '-D', $node->data_dir, '-w', '-l', $node->logfile, '-o', '-b', 'start' ],
	'binary upgrade mode');
$node->_update_pid(1);
is(sql($node, $workers), '0', 'binary upgrade mode: no process');
is(state_of('status'), 'not preloaded', 'binary upgrade mode: no shared memory');
$node->stop;

done_testing();
