# A worker's pass always comes to its end, and looks at each row once: what can't
# be done now holds up neither what is behind it nor the other ledgers.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use WorkerTest;

my $node = worker_node();
my $here = here();

my $read_through = q{SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = 'stripe_idempotency_keys'};

#
# Callers that are open, or of another system
#
foreach my $case ('small', 'large')
{
	my @size = $case eq 'large' ? (large => 1) : ();
	# in the large one the table is read, piece by piece
	sql($node, 'ALTER INDEX idempotency.stripe_idempotency_keys_open_idx RENAME TO aside') if $case eq 'large';
	my $session = $node->background_psql('postgres');
	my $xid = $session->query_safe("BEGIN;\nSELECT pg_current_xact_id()");

	calls(400, 'open', "'{$xid}'", $here, @size);
	calls(5000, 'filler', 'NULL', 'NULL', @size);
	calls(1, 'behind', rolled_back(), $here, @size);
	workers(2);
	is_noted('behind1', "$case: behind 400 calls of an open transaction");
	wait_for_pass("$case: a pass comes to its end");
	expired_rows($node, 10);
	expires($node, "$case: and what expires goes");
	wait_for_pass("$case: once more");
	is(state_of('status, last_error IS NULL'), 'idle|t', "$case: all is well");
	$session->query_safe('ROLLBACK');
	$session->quit;
	holds($node, q{SELECT count(*) = 400 FROM idempotency.stripe_idempotency_keys
		WHERE operation_id LIKE 'open%' AND callers = '{}'}, "$case: once it is over that is written down");
	workers(0);
	sql($node, 'DELETE FROM idempotency.stripe_idempotency_keys; VACUUM idempotency.stripe_idempotency_keys');

	calls(400, 'elsewhere', "'{3}'", 1, @size);
	calls(5000, 'filler', 'NULL', 'NULL', @size);
	calls(1, 'behind', rolled_back(), $here, @size);
	workers(2);
	is_noted('behind1', "$case: behind 400 calls of another system");
	wait_for_pass("$case: a pass comes to its end");
	is(sql($node, q{SELECT count(*) FROM idempotency.stripe_idempotency_keys WHERE callers = '{3}'}), '400',
		"$case: nobody knows of them, and nobody says so");
	wait_for_pass("$case: a pass that has nothing to do");
	my $read = sql($node, $read_through);
	wait_for_pass("$case: once more");
	is(sql($node, $read_through), $read, "$case: it doesn't read through the table") if $case eq 'small';
	workers(0);
	sql($node, 'ALTER INDEX idempotency.aside RENAME TO stripe_idempotency_keys_open_idx') if $case eq 'large';
	sql($node, 'DELETE FROM idempotency.stripe_idempotency_keys; VACUUM idempotency.stripe_idempotency_keys');
}

#
# Calls that raise an error
#
sql($node, q{
	CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'not this one'; END$$;
	CREATE TRIGGER refuse BEFORE UPDATE ON idempotency.stripe_idempotency_keys
		FOR EACH ROW WHEN (OLD.operation_id LIKE 'refused%') EXECUTE FUNCTION refuse()});
my $xid = rolled_back();
calls(120, 'refused', $xid, $here);
calls(1, 'behind', $xid, $here);
my $offset = -s $node->logfile;
workers(2);
is_noted('behind1', 'behind 120 calls that raise an error');
holds($node, q{SELECT status = 'rows refused' AND refused = 120 FROM idempotency.workers
	WHERE database = current_database()}, 'each is counted once a pass');
is(state_of('last_error'), '(account, operation_type, operation_id)=(, call, refused1): not this one', 'one is named');
is(state_of('next_step'), 'SELECT * FROM idempotency.stripe_unknown;', 'and where to look');
wait_for_pass('another pass');
wait_for_pass('and another');
is(scalar(() = substr(slurp_file($node->logfile), $offset) =~ /DETAIL:  Row .*not this one/g), 1, 'logged once');
my $locker = $node->background_psql('postgres');
workers(0);
calls(110, 'locked', $xid, $here);
calls(1, 'behind locked', $xid, $here);
$locker->query_safe(q{BEGIN; SELECT FROM idempotency.stripe_idempotency_keys WHERE operation_id LIKE 'locked%' FOR UPDATE});
workers(2);
is_noted('behind locked1', 'behind 110 calls that somebody has locked');
$locker->query_safe('COMMIT');
$locker->quit;
is_noted('locked110', 'which come later');
sql($node, q{DROP TRIGGER refuse ON idempotency.stripe_idempotency_keys});
is_noted('refused120', 'and those that were refused, once they aren\'t');
workers(0);
sql($node, 'DELETE FROM idempotency.stripe_idempotency_keys; VACUUM idempotency.stripe_idempotency_keys');

#
# Rows that can't be removed, in a table that isn't read directly: more than one
# run gives up at
#
sql($node, q{
	ALTER TABLE idempotency.idempotency_keys ENABLE ROW LEVEL SECURITY;
	CREATE TRIGGER refuse BEFORE DELETE ON idempotency.idempotency_keys
		FOR EACH ROW WHEN (OLD.key LIKE 'a%') EXECUTE FUNCTION refuse()});
expired_rows($node, 150, prefix => 'a');
expired_rows($node, 20, prefix => 'b');
workers(2);
holds($node, q{SELECT count(*) = 150 FROM idempotency.idempotency_keys}, 'by key: behind 150 that refuse');
sql($node, q{DROP TRIGGER refuse ON idempotency.idempotency_keys;
	ALTER TABLE idempotency.idempotency_keys DISABLE ROW LEVEL SECURITY});
expires($node, 'by key: and those, too, once they don\'t');

# By key, calls, too
workers(0);
sql($node, 'ALTER TABLE idempotency.stripe_idempotency_keys ENABLE ROW LEVEL SECURITY');
calls(250, 'a', "'{3}'", 1);
$xid = rolled_back();
calls(150, 'b', $xid, $here);
workers(2);
is_noted('b150', 'by key: calls');
sql($node, 'ALTER TABLE idempotency.stripe_idempotency_keys DISABLE ROW LEVEL SECURITY');

# A row that ends the process: the other ledgers have their turn all the same.
workers(0);
sql($node, q{
	CREATE FUNCTION kill() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); PERFORM pg_sleep(60); END';
	CREATE TRIGGER kill BEFORE DELETE ON idempotency.idempotency_keys
		FOR EACH ROW WHEN (OLD.key LIKE 'a%') EXECUTE FUNCTION kill()});
expired_rows($node, 1, prefix => 'a');
calls(1, 'c', rolled_back(), $here);
workers(2);
is_noted('c1', 'behind a row that ends the worker');
sql($node, 'DROP TRIGGER kill ON idempotency.idempotency_keys');
expires($node, 'which goes, too, once it doesn\'t');

# A call that does, found by an index: what is behind its batch has its turn
workers(0);
sql($node, q{
	CREATE TRIGGER kill BEFORE UPDATE ON idempotency.stripe_idempotency_keys
		FOR EACH ROW WHEN (OLD.operation_id LIKE 'killer%') EXECUTE FUNCTION kill()});
$xid = rolled_back();
calls(1, 'killer', $xid, $here);
calls(100, 'same batch', $xid, $here);
calls(1, 'next batch', $xid, $here);
workers(2);
is_noted('next batch1', 'behind a call that ends the worker');
sql($node, 'DROP TRIGGER kill ON idempotency.stripe_idempotency_keys');
is_noted('killer1', 'which comes later');

# So it is where the table isn't read directly: the next pass goes on behind it.
workers(0);
sql($node, q{
	ALTER TABLE idempotency.idempotency_keys ENABLE ROW LEVEL SECURITY;
	CREATE TRIGGER kill BEFORE DELETE ON idempotency.idempotency_keys
		FOR EACH ROW WHEN (OLD.key LIKE 'a%') EXECUTE FUNCTION kill();
	ALTER SYSTEM SET idempotency.expiry_batch_size = 10});
expired_rows($node, 1, prefix => 'a');
expired_rows($node, 30, prefix => 'b');
workers(2);
holds($node, q{SELECT count(*) = 10 FROM idempotency.idempotency_keys},
	'by key: what is behind a row that ends the worker goes in the next pass');
sql($node, 'DROP TRIGGER kill ON idempotency.idempotency_keys; ALTER SYSTEM RESET idempotency.expiry_batch_size');
expires($node, 'by key: and in the end all of it');

$node->stop;
done_testing();
