
# The recorder and its callers under locks, cancellations, a lack of resources
# and hostile settings: an error at once or the true outcome, never a hang, and
# nothing is sent that isn't known.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

needs_debug_points();

my $node = new_node('main', debug => 1, conf => q{
restart_after_crash = on
wal_writer_delay = 10s
deadlock_timeout = 60s
idempotency.stripe_record_timeout = 30s
});
sql($node, 'CREATE TABLE t (); CREATE ROLE owner LOGIN CREATEDB');

sub op
{
	my ($id, %params) = @_;

	return sql($node, qq{
		SELECT outcome, attempt, first_sent_at IS NOT NULL
		FROM idempotency.stripe_lookup('call', '$id')}, %params);
}

sub becomes
{
	my ($id, $outcome, $test_name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return ok(
		$node->poll_query_until('postgres',
			"SELECT outcome = '$outcome' FROM idempotency.stripe_lookup('call', '$id')"),
		$test_name);
}

sub session
{
	my (%params) = @_;

	return $node->background_psql($params{db} // 'postgres', on_error_stop => 0);
}

# Begin a statement; end() gives what it returned and its SQLSTATE, and keeps
# what was said beside.
sub begin
{
	my ($session, $statement) = @_;

	$session->{stderr} = '';
	my $said = $session->query_until(qr/begun\n/, "\\echo begun\n$statement;\n");
	# it may have ended already
	($session->{early}) = $said =~ /begun\n(.*)\z/s;
	return;
}

sub end
{
	my ($session) = @_;
	my $output = (delete($session->{early}) // '') . $session->query('\echo :SQLSTATE');

	$session->{messages} = $session->{stderr};
	$session->{stderr} = '';
	return $output;
}

sub recorder_pid
{
	return sql($node, q{SELECT pid FROM pg_stat_activity WHERE backend_type = 'idempotency recorder'});
}

sub waits_for
{
	my ($pid, $type, $test_name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return ok(
		$node->poll_query_until('postgres',
			"SELECT wait_event_type || ' ' || wait_event = '$type' FROM pg_stat_activity WHERE pid = $pid"),
		$test_name);
}

#
# Deadlocks that PostgreSQL couldn't see.  Its own detector is late here, so that
# it isn't what resolves them.
#

my ($s1, $s2, $s3) = (session(), session(), session());
my $pid1 = $s1->query_safe('SELECT pg_backend_pid()');
my $pid2 = $s2->query_safe('SELECT pg_backend_pid()');
my $pid3 = $s3->query_safe('SELECT pg_backend_pid()');
my $begun;

# the caller holds the row itself
sql($node, q{SELECT idempotency.stripe_claim('call', 'own', lease => '1 hour')});
$s1->query_safe(q{BEGIN; UPDATE idempotency.stripe_idempotency_keys SET lease_expires_at = now() WHERE operation_id = 'own'});
$begun = time;
begin($s1, q{SELECT test_stripe_call('call', 'own')});
is(end($s1), 'IK006', 'the caller holds the row: IK006');
cmp_ok(time - $begun, '<', 10, 'at once');
$s1->query_safe('ROLLBACK');

# or holds a mere lock on it
lapse_stripe_lease($node, 'call', 'own');
$s1->query_safe(q{BEGIN; SELECT FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'own' FOR UPDATE});
$begun = time;
begin($s1, q{SELECT test_stripe_call('call', 'own')});
like(end($s1), qr/^in_progress .*\n00000$/, 'the caller has locked the row: in_progress');
cmp_ok(time - $begun, '<', 10, 'after a moment');
$s1->query_safe('ROLLBACK');

# the caller has read the ledger, and somebody waits to change the table
$s1->query_safe('BEGIN; SELECT count(*) FROM idempotency.stripe_idempotency_keys');
begin($s2, 'BEGIN; LOCK TABLE idempotency.stripe_idempotency_keys; COMMIT');
wait_for_lock($node, $pid2);
$begun = time;
begin($s1, q{SELECT test_stripe_call('call', 'ddl')});
is(end($s1), '55P03', 'DDL waits for the caller: 55P03');
cmp_ok(time - $begun, '<', 10, 'after a moment');
$s1->query('ROLLBACK');
is(end($s2), '00000', 'the DDL goes on');
is(op('ddl'), '||f', 'and nothing was noted');

# a third session holds the row and waits for the caller; before the send
sql($node, q{SELECT idempotency.stripe_claim('call', 'third', lease => '1 microsecond')});
$s3->query_safe(q{BEGIN; UPDATE idempotency.stripe_idempotency_keys SET lease = lease WHERE operation_id = 'third'});
$s1->query_safe('BEGIN; LOCK TABLE t');
begin($s3, 'LOCK TABLE t');
wait_for_lock($node, $pid3);
begin($s1, q{SELECT test_stripe_call('call', 'third')});
like(end($s1), qr/^in_progress in_progress .*\n00000$/, 'another transaction holds the row: in_progress');
$s1->query_safe('ROLLBACK');
end($s3);
$s3->query_safe('ROLLBACK');

# and after the send: the caller goes on with the truth, the recorder goes on trying
arm($node, 'call-sent', 'wait');
begin($s1, q{BEGIN; LOCK TABLE t; SET idempotency.stripe_record_timeout = '300ms'; SELECT test_stripe_call('call', 'late')});
wait_for_point($node, 'call-sent');
$s3->query_safe(q{BEGIN; UPDATE idempotency.stripe_idempotency_keys SET lease = lease WHERE operation_id = 'late'});
begin($s3, 'LOCK TABLE t');
wait_for_lock($node, $pid3);
disarm($node, 'call-sent');
like(end($s1), qr/^claimed completed pi_1 .*\n00000$/m, 'the row is held after the send: the true outcome');
like($s1->{messages}, qr/WARNING:  outcome "completed" of Stripe operation "call:late" is not recorded yet/,
	'with a warning');
$s1->query('COMMIT');
is(end($s3), '00000', 'nobody waits for ever');
is(op('late'), 'unknown|1|t', 'meanwhile it counts as unknown');
like(sql($node, q{SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'idempotency recorder'}),
	qr/^1$/, 'the recorder stays');
$s1->quit;
$s3->query_safe('COMMIT');
becomes('late', 'completed', 'and records as soon as the row is free, though the caller is gone');

# rows that somebody has locked, and that many ask for, don't keep the recorder from
# the others
sql($node, q{SELECT count(idempotency.stripe_claim('call', 'locked ' || g, lease => '1 microsecond')) FROM generate_series(0, 49) g});
$s3->query_safe(q{BEGIN; SELECT FROM idempotency.stripe_idempotency_keys WHERE operation_id LIKE 'locked %' FOR UPDATE});
$s1 = session();
arm($node, 'recorder-taken', 'wait');
begin($s1, q{SELECT test_stripe_call('call', 'before them')});
wait_for_point($node, 'recorder-taken');
my $script = PostgreSQL::Test::Utils::tempdir() . '/locked.sql';
append_to_file($script, "SELECT verdict FROM idempotency.stripe_claim('call', 'locked ' || :client_id);\n");
my $many = IPC::Run::start([ 'pgbench', '-n', '-c', 50, '-j', 2, '-t', 1, '-f', $script, $node->connstr('postgres') ],
	'>', \my $told, '2>', \my $said);
ok($node->poll_query_until('postgres', q{SELECT count(*) = 51 FROM pg_stat_activity WHERE wait_event = 'transactionid'}),
	'fifty callers want rows that are locked');
begin($s2, q{SET idempotency.stripe_record_timeout = '2s'; SELECT test_stripe_call('call', 'behind them')});
disarm($node, 'recorder-taken');
like(end($s2), qr/^claimed completed/, 'another caller isn\'t kept waiting by that');
$s2->query_safe('RESET idempotency.stripe_record_timeout');
end($s1);
$s1->quit;
ok($many->finish, 'the fifty are told that somebody has the rows') or diag($told . $said);
$s3->query_safe('ROLLBACK');

# the recorder is terminated while it has such an answer
$s1 = session();
arm($node, 'call-sent', 'wait');
begin($s1, q{SET idempotency.stripe_record_timeout = '100ms'; SELECT test_stripe_call('call', 'late 2')});
wait_for_point($node, 'call-sent');
$s3->query_safe(q{BEGIN; UPDATE idempotency.stripe_idempotency_keys SET lease = lease WHERE operation_id = 'late 2'});
disarm($node, 'call-sent');
end($s1);
my $recorder = recorder_pid();
sql($node, "SELECT pg_terminate_backend($recorder, 10000)");
ok($node->poll_query_until('postgres', qq{SELECT count(*) > 0 FROM pg_stat_activity
	WHERE backend_type = 'idempotency recorder' AND pid <> $recorder}), 'a terminated recorder has a successor');
$s3->query_safe('ROLLBACK');
becomes('late 2', 'completed', 'that records what it left');
$s1->query_safe('RESET idempotency.stripe_record_timeout');

#
# Waiting callers can be seen and cancelled
#

arm($node, 'recorder-taken', 'wait');
begin($s1, q{SELECT test_stripe_call('call', 'cancelled')});
$pid1 = sql($node, q{SELECT pid FROM pg_stat_activity WHERE query LIKE '%''cancelled''%' AND pid <> pg_backend_pid()});
wait_for_point($node, 'recorder-taken');
is(sql($node, 'SELECT query FROM pg_stat_activity WHERE pid = ' . recorder_pid()),
	'recording Stripe operations: 1', 'pg_stat_activity shows what the recorder does');
waits_for($pid1, 'Lock transactionid', 'a caller waits for the recorder\'s transaction');
begin($s2, q{SELECT test_stripe_call('call', 'queued')});
waits_for($pid2, 'Lock transactionid', 'and so does one whose order isn\'t taken yet');
is(sql($node, "SELECT pg_blocking_pids($pid2) = ARRAY[" . recorder_pid() . ']'), 't', 'pg_blocking_pids() names it');
sql($node, "SELECT pg_cancel_backend($pid1)");
is(end($s1), '57014', 'cancelled');
begin($s1, q{SET statement_timeout = '50ms'; SELECT test_stripe_call('call', 'timed out')});
is(end($s1), '57014', 'statement_timeout');
begin($s1, q{SET statement_timeout = 0; SET lock_timeout = '50ms'; SELECT test_stripe_call('call', 'lock')});
is(end($s1), '55P03', 'lock_timeout');
begin($s1, q{SET lock_timeout = 0; SET idempotency.stripe_record_timeout = '100ms'; SELECT test_stripe_call('call', 'patience')});
is(end($s1), 'IK008', 'stripe_record_timeout: IK008');
$s1->query_safe('RESET idempotency.stripe_record_timeout');
disarm($node, 'recorder-taken');
like(end($s2), qr/^claimed completed/, 'the other one isn\'t concerned');
becomes('cancelled', 'not_executed', 'what was claimed in vain is free again');
is(op('cancelled'), 'not_executed|1|f', 'never sent');
is(op($_), '||f', "$_: taken back before it was noted") foreach 'timed out', 'lock', 'patience';

# after the send a cancelled caller leaves the rest to the recorder
arm($node, 'call-sent', 'wait');
begin($s1, q{SELECT test_stripe_call('call', 'cancelled 2')});
wait_for_point($node, 'call-sent');
arm($node, 'recorder-taken', 'wait');
disarm($node, 'call-sent');
wait_for_point($node, 'recorder-taken');
sql($node, "SELECT pg_cancel_backend($pid1)");
is(end($s1), '57014', 'cancelled while its answer is recorded');
sql($node, 'SELECT pg_terminate_backend(' . recorder_pid() . ', 10000)');
disarm($node, 'recorder-taken');
becomes('cancelled 2', 'completed', 'recorded, by the successor of the recorder that had it');

# terminated in mid-batch: everybody gets an answer from its successor
arm($node, 'recorder-before-commit', 'wait');
begin($s1, q{SELECT test_stripe_call('call', 'batch 1')});
wait_for_point($node, 'recorder-before-commit');
begin($s2, q{SELECT test_stripe_call('call', 'batch 2')});
waits_for($pid2, 'Lock transactionid', 'another one queues');
$recorder = recorder_pid();
unlink $node->data_dir . '/debug_points/recorder-before-commit.reached';
sql($node, "SELECT pg_terminate_backend($recorder, 10000)");
wait_for_point($node, 'recorder-before-commit');
isnt(recorder_pid(), $recorder, 'another recorder is at it');
disarm($node, 'recorder-before-commit');
like(end($_), qr/^claimed completed/, 'a caller is answered') foreach $s1, $s2;

# one order whose commit fails doesn't take the others along
sql($node, q{
	CREATE FUNCTION poison() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION $$poisoned$$ USING ERRCODE = $$22000$$; END';
	CREATE CONSTRAINT TRIGGER poison AFTER INSERT ON idempotency.stripe_idempotency_keys DEFERRABLE INITIALLY DEFERRED
		FOR EACH ROW WHEN (NEW.operation_id = 'poison') EXECUTE FUNCTION poison()});
arm($node, 'recorder-taken', 'wait');
begin($s3, q{SELECT test_stripe_call('call', 'first')});
wait_for_point($node, 'recorder-taken');
begin($s1, q{SELECT test_stripe_call('call', 'poison')});
begin($s2, q{SELECT test_stripe_call('call', 'in company')});
waits_for($_, 'Lock transactionid', 'queued') foreach $pid1, $pid2;
disarm($node, 'recorder-taken');
is(end($s1), '22000', 'an error at commit goes to the caller whose it is');
like(end($_), qr/^claimed completed/, 'the others go on') foreach $s2, $s3;
sql($node, 'DROP FUNCTION poison CASCADE');

# a savepoint catches the error, the transaction goes on
arm($node, 'call-sent', 'error');
like($s1->query(q{
		DO $$ BEGIN
			PERFORM test_stripe_call('call', 'caught');
		EXCEPTION WHEN internal_error THEN RAISE NOTICE 'caught'; END $$;
		SELECT 'on'}), qr/^on$/, 'an error in mid-call is caught');
becomes('caught', 'unknown', 'and noted');

#
# What a database's owner can set doesn't spoil it
#

sql($node, q{
	CREATE DATABASE spoiled OWNER owner;
	ALTER DATABASE spoiled SET default_transaction_read_only = on;
	ALTER DATABASE spoiled SET default_transaction_isolation = 'serializable';
	ALTER DATABASE spoiled SET default_transaction_deferrable = on;
	ALTER DATABASE spoiled SET synchronous_commit = off;
	ALTER DATABASE spoiled SET session_replication_role = replica;
	ALTER DATABASE spoiled SET row_security = off;
	ALTER DATABASE spoiled SET statement_timeout = 1;
	ALTER DATABASE spoiled SET lock_timeout = 1;
	ALTER DATABASE spoiled SET idle_session_timeout = 1;
	ALTER DATABASE spoiled SET role = owner;
	ALTER DATABASE spoiled SET search_path = hostile, pg_catalog;
	ALTER DATABASE spoiled SET "DateStyle" = 'German'});
$ENV{PGOPTIONS} = '-c default_transaction_read_only=off -c statement_timeout=0 -c lock_timeout=0 '
  . '-c idle_session_timeout=0 -c search_path=pg_catalog,public -c role=none';
sql($node, "CREATE EXTENSION idempotency", db => 'spoiled');
sql($node, "CREATE SCHEMA hostile;
	CREATE FUNCTION hostile.equal(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT true';
	CREATE OPERATOR hostile.= (LEFTARG = text, RIGHTARG = text, FUNCTION = hostile.equal);
	CREATE FUNCTION hostile.now() RETURNS timestamptz LANGUAGE sql AS 'SELECT 1/0; SELECT clock_timestamp()';
	CREATE FUNCTION public.test_stripe_call(type text, id text, body text DEFAULT 'amount=1',
		status int DEFAULT 200, resource_id text DEFAULT 'pi_1', room int DEFAULT 65536, resend boolean DEFAULT false)
		RETURNS text AS 'idempotency_test_caller' LANGUAGE C", db => 'spoiled');
like(sql($node, "BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT test_stripe_call('call', 'spoiled'); ROLLBACK;",
		db => 'spoiled'), qr/claimed completed/, 'a call in a database with hostile settings');
my $offset = -s $node->logfile;
arm($node, 'after-record', 'kill');
$node->psql('spoiled', "SELECT test_stripe_call('call', 'durable')");
$node->wait_for_log(qr/all server processes terminated; reinitializing/, $offset);
wait_until_up($node);
is(op('durable', db => 'spoiled'), 'completed|1|t', 'what is recorded there is on disk');
delete $ENV{PGOPTIONS};
$_->{run}->kill_kill foreach $s1, $s2, $s3;

#
# Databases come and go
#

sql($node, 'CREATE DATABASE gone OWNER owner');
sql($node, 'CREATE EXTENSION idempotency', db => 'gone');
sql($node, "SELECT idempotency.stripe_claim('call', '1')", db => 'gone');
sql($node, 'DROP DATABASE gone');
pass('a database can be dropped right after a call');
sql($node, 'CREATE DATABASE gone OWNER owner');
sql($node, 'CREATE EXTENSION idempotency', db => 'gone');
$s1 = session(db => 'gone');
$s1->query_safe("SELECT idempotency.stripe_claim('call', '1')");
sql($node, 'DROP DATABASE gone WITH (FORCE)');
pass('also with a caller connected');
eval { $s1->quit };
sql($node, 'CREATE DATABASE gone OWNER owner');
sql($node, 'CREATE EXTENSION idempotency', db => 'gone');
sql($node, "SELECT idempotency.stripe_claim('call', '1')", db => 'gone');
sql($node, 'SET ROLE owner; DROP DATABASE gone WITH (FORCE)');
pass('also by an owner who may not terminate the recorder');
sql($node, 'CREATE DATABASE gone');
sql($node, 'CREATE EXTENSION idempotency', db => 'gone');
sql($node, "SELECT idempotency.stripe_claim('call', '1')", db => 'gone');
sql($node, 'ALTER DATABASE gone RENAME TO renamed');
pass('it can be renamed');
like(sql($node, "SELECT verdict FROM idempotency.stripe_claim('call', '2')", db => 'renamed'),
	qr/^claimed$/, 'and calls go on');
sql($node, 'DROP DATABASE renamed');

#
# No recorder to be had: nothing is sent
#

sub arrivals_size
{
	return -s $node->data_dir . '/arrivals';
}

wait_for_no_recorder($node);
my $arrived = arrivals_size();
arm($node, 'recorder-start', 'fatal');
run_fails($node, q{SELECT test_stripe_call('call', 'no recorder')}, 'IK008', 'the recorder can\'t start: IK008');
is(op('no recorder'), '||f', 'nothing was noted');

# the disk is full: files can't grow beyond a WAL segment and a bit
SKIP:
{
	my $postmaster = (split /\n/, slurp_file($node->data_dir . '/postmaster.pid'))[0];

	skip 'no prlimit', 4 if system('prlimit --version >/dev/null 2>&1') != 0;
	my $caller = session();
	$caller->query_safe("SET idempotency.max_response_size = '100MB'; SET idempotency.stripe_record_timeout = '60s'; SELECT 1");
	wait_for_no_recorder($node);
	system("prlimit --pid $postmaster --fsize=18000000:") == 0 or die 'could not set a limit';
	$caller->query(q{SELECT idempotency.stripe_claim('call', 'full', request =>
		jsonb_build_object('text', (SELECT string_agg(md5(i::text), '') FROM generate_series(1, 1000000) i)))});
	like($caller->{stderr}, qr/ERROR:  could not extend file .*CONTEXT:  recorder of Stripe operations; nothing was sent/s,
		'a full disk is the caller\'s error');
	$caller->{stderr} = '';
	is(op('full'), '||f', 'and nothing was noted');
	$caller->quit;

	# the same for shared memory, where the answer is to find room
	my (undef, undef, $stderr) = $node->psql('postgres',
		q{SELECT test_stripe_call('call', 'no room', room => 100000000)});
	like($stderr, qr/could not resize shared memory segment.*nothing was sent/s,
		'no shared memory for the answer: an error before the send');
	is(op('no room'), '||f', 'and nothing was noted');
	system("prlimit --pid $postmaster --fsize=unlimited:");
}

$node->stop;
$node->append_conf('postgresql.conf', 'max_worker_processes = 1');
$node->start;
my (undef, undef, $stderr) = $node->psql('postgres', q{SELECT test_stripe_call('call', 'no worker')});
like($stderr, qr/the recorder of Stripe operations is out of reach, and nothing was sent.*HINT:  Consider increasing "max_worker_processes"/s,
	'no slot for another process: IK008 with a hint');
is(op('no worker'), '||f', 'nothing was noted');

# Not even the launcher: nothing is wrong with the database then.
$node->stop;
$node->append_conf('postgresql.conf', 'max_worker_processes = 0');
$node->start;
is(sql($node, q{SELECT status, next_step FROM idempotency.workers WHERE database = 'postgres'}),
	'no launcher|ALTER SYSTEM SET max_worker_processes = 3; -- and restart the server',
	'no slot for the launcher: the view says so');
is(arrivals_size(), $arrived, 'and nothing was sent');

$node->stop;

done_testing();
