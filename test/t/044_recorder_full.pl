
# Answers of Stripe that can't be recorded: they wait in shared memory until that
# is full, and then nothing more is sent; one that will never be recorded is
# given up and logged; so are those of a database that is dropped.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

needs_debug_points();

# few processes, so that there is room for few answers
my $node = new_node('main', debug => 1, conf => q{
max_connections = 10
autovacuum_max_workers = 1
max_wal_senders = 0
max_worker_processes = 4
max_logical_replication_workers = 0
max_prepared_transactions = 0
idempotency.stripe_record_timeout = 30s
idempotency.max_workers = 0
});

sub hold
{
	my ($sqlstate, %params) = @_;

	return sql($node, qq{
		CREATE OR REPLACE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS
			'BEGIN RAISE ''held'' USING ERRCODE = ''$sqlstate''; END';
		DROP TRIGGER IF EXISTS hold ON idempotency.stripe_idempotency_keys;
		CREATE TRIGGER hold BEFORE UPDATE ON idempotency.stripe_idempotency_keys
			FOR EACH ROW WHEN (NEW.outcome = 'completed') EXECUTE FUNCTION hold()}, %params);
}

sub arrivals
{
	my $file = $node->data_dir . '/arrivals';

	return -e $file ? scalar(() = slurp_file($file) =~ /\n/g) : 0;
}

# Begin a statement of the session; end() gives what was said.
my $session = $node->background_psql('postgres', on_error_stop => 0);

sub begin
{
	my ($statement) = @_;

	$session->{stderr} = '';
	$session->query_until(qr/begun/, "\\echo begun\n$statement;\n");
	return;
}

sub end
{
	$session->query('SELECT 1');
	my $said = $session->{stderr};
	$session->{stderr} = '';
	return $said;
}

# As if every row were locked: calls go on with the truth, and their answers wait.
$session->query_safe(q{SELECT test_stripe_call('call', '0')});
is(arrivals(), 1, 'a call was sent, and there is a recorder');
hold('55P03');
$session->query_safe(q{SET idempotency.stripe_record_timeout = '150ms'; SET client_min_messages = error});
$session->query(q{DO $$
	DECLARE
		answer text;
	BEGIN
		FOR i IN 1 .. 400 LOOP
			BEGIN
				PERFORM test_stripe_call('call', i::text);
			EXCEPTION WHEN SQLSTATE 'IK008' THEN
				GET STACKED DIAGNOSTICS answer = PG_EXCEPTION_DETAIL;
				IF answer LIKE 'Too many%' THEN RAISE; END IF;
			END;
		END LOOP;
	END $$});
my $refused = $session->{stderr};
$session->{stderr} = '';
my $calls = arrivals();
like($refused, qr/ERROR:  the recorder of Stripe operations is out of reach, and nothing was sent\n.*DETAIL:  Too many answers of Stripe wait to be recorded\.\n.*HINT:  Look for transactions that hold rows/s,
	'there is room for so many answers, and no more: an error') or diag("after $calls");
is(sql($node, q{SELECT count(*) FROM idempotency.stripe_idempotency_keys WHERE first_sent_at IS NOT NULL}), $calls, 'before the send');
is(sql($node, q{SELECT count(*) FROM idempotency.stripe_idempotency_keys WHERE outcome = 'completed'}), 1, 'nothing more is recorded yet');
sql($node, 'DROP TRIGGER hold ON idempotency.stripe_idempotency_keys');
ok($node->poll_query_until('postgres', qq{SELECT count(*) = $calls FROM idempotency.stripe_idempotency_keys WHERE outcome = 'completed'}),
	'as soon as the rows are free all are');
like($session->query_safe(q{SET idempotency.stripe_record_timeout = '30s'; SELECT test_stripe_call('call', 'again')}),
	qr/^claimed completed/m, 'and calls go on');
$session->quit;

# An answer for which its row has no place is tried again and again, and then given up.
hold('22000');
my $offset = -s $node->logfile;
$session = $node->background_psql('postgres', on_error_stop => 0);
$session->query_safe(q{SET idempotency.stripe_record_timeout = '3s'});
like($session->query(q{SELECT test_stripe_call('call', 'never')}), qr/^claimed completed/m, 'the caller has the truth');
like($session->{stderr}, qr/WARNING:  outcome "completed" of Stripe operation "call:never" is not recorded yet/, 'with a warning');
$session->quit;
like(substr(slurp_file($node->logfile), $offset), qr/what is known of Stripe operation "call:never" cannot be recorded yet/, 'the log says why');
sql($node, 'DROP TRIGGER hold ON idempotency.stripe_idempotency_keys');
ok($node->poll_query_until('postgres', q{SELECT outcome = 'completed' FROM idempotency.stripe_lookup('call', 'never')}),
	'once it can, it is recorded');

# A body larger than what was reserved goes without.
$session = $node->background_psql('postgres', on_error_stop => 0);
like($session->query(q{SELECT test_stripe_call('call', 'large', room => 0, answer => 100000)}), qr/^claimed completed pi_1/m, 'a body too large');
like($session->{stderr}, qr/WARNING:  the answer to Stripe operation "call:large" is recorded without its body/, 'a warning');
is(sql($node, q{SELECT outcome, resource_id, response IS NULL FROM idempotency.stripe_lookup('call', 'large')}), 'completed|pi_1|t',
	'the rest is recorded');
like($session->query(q{SELECT test_stripe_call('call', 'fits', answer => 50000)}), qr/^claimed completed pi_1/m, 'one that fits');
is(sql($node, q{SELECT length(response ->> 'text') FROM idempotency.stripe_lookup('call', 'fits')}), 50000, 'is recorded with it');
$session->quit;

# A recorder that doesn't answer in time, or is interrupted, before the send
$session = $node->background_psql('postgres', on_error_stop => 0);
$session->query_safe(q{SET idempotency.stripe_record_timeout = '30s'; SELECT test_stripe_call('call', 'given'); BEGIN; SELECT test_stripe_call('call', 'taken back'); ROLLBACK});
my $before = arrivals();
arm($node, 'recorder-taken', 'wait');
begin(q{SELECT test_stripe_call('call', 'interrupted')});
wait_for_point($node, 'recorder-taken');
my (undef, undef, $stderr) = $node->psql('postgres', q{SET idempotency.stripe_record_timeout = '100ms'; SELECT test_stripe_call('call', 'slow')});
like($stderr, qr/ERROR:  the recorder .* nothing was sent\nDETAIL:  It did not answer within idempotency.stripe_record_timeout\.\nHINT:  Try again/, 'no answer in time: an error');
(undef, undef, $stderr) = $node->psql('postgres', q{SET idempotency.stripe_record_timeout = '100ms'; SELECT test_stripe_call('call', 'taken back')});
like($stderr, qr/WARNING:  .*"call:taken back"/, 'a result is given all the same, with a warning that it can\'t be noted to whom');
sql($node, q{SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE backend_type = 'idempotency recorder'});
like(end(), qr/ERROR:  the recorder of Stripe operations was interrupted, and nothing was sent/, 'interrupted: an error');
disarm($node, 'recorder-taken');
is(arrivals(), $before, 'and nothing was sent');

# An answer that contradicts its row, which somebody has changed by hand
arm($node, 'call-sent', 'wait');
$offset = -s $node->logfile;
begin(q{SELECT test_stripe_call('call', 'changed')});
wait_for_point($node, 'call-sent');
sql($node, q{UPDATE idempotency.stripe_idempotency_keys SET token = 1 WHERE operation_id = 'changed'});
disarm($node, 'call-sent');
like(end(), qr/WARNING:  outcome "completed" of Stripe operation "call:changed" could not be recorded\nDETAIL:  Stripe operation "call:changed" is not held/,
	'an answer whose claim is gone: a warning');
like(substr(slurp_file($node->logfile), $offset), qr/LOG:  what is known of Stripe operation "call:changed" is not recorded/, 'and the log has it');
$session->quit;

# A database that is dropped takes along what was to be recorded in it.
sql($node, 'CREATE DATABASE gone');
sql($node, 'CREATE EXTENSION idempotency', db => 'gone');
create_test_caller($node, db => 'gone');
hold('55P03', db => 'gone');
$session = $node->background_psql('gone', on_error_stop => 0);
like($session->query(q{SET idempotency.stripe_record_timeout = '3s'; SELECT test_stripe_call('call', 'left')}), qr/^claimed completed/m,
	'an answer waits in a database');
$session->quit;
$offset = -s $node->logfile;
my $started = time;
sql($node, 'DROP DATABASE gone');
cmp_ok(time - $started, '<', 30, 'which can be dropped');
$node->wait_for_log(qr/what is known of Stripe operation "call:left" is not recorded\n.*Its database has been dropped/, $offset);
pass('the log says what is lost with it');

$node->stop;

done_testing();
