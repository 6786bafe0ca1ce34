
# Workers that take events: however they fail, fresh events come first, and
# nobody's failure keeps another's event waiting.

use strict;
use warnings;

use Digest::SHA qw(hmac_sha256_hex);
use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use IPC::Run;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $page = slurp_file("$FindBin::RealBin/../../doc/webhooks.md");
my $dir = PostgreSQL::Test::Utils::tempdir();
my $process;
my $node = new_node('main');

END
{
	my $status = $?;
	$process->kill_kill if defined $process;
	$? = $status;
}

sql($node, q{
	CREATE TABLE done (event text, how text);
	CREATE FUNCTION next(consumer text = '', lease interval = '1 h') RETURNS text LANGUAGE sql
		RETURN (SELECT stripe_event_id || ' ' || attempt FROM idempotency.stripe_webhook_next(lease, consumer));
	-- rows that a call looks up in the ledger of events, by its indexes
	CREATE FUNCTION rows_read() RETURNS bigint LANGUAGE sql VOLATILE
		RETURN (SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'stripe_webhook_events');
});

sub receive
{
	my ($id, %params) = @_;
	my $object = $params{object} // "o_$id";
	my $account = defined $params{account} ? qq(, "account": "$params{account}") : '';
	my $body = qq({"id": "$id", "object": "event", "type": "a.b", "data": {"object": {"id": "$object"}}$account});
	my $signature = 't=1795300000,v1=' . hmac_sha256_hex("1795300000.$body", 'whsec_test');

	return "SELECT FROM idempotency.stripe_webhook_receive('\\x" . unpack('H*', $body)
	  . "', '$signature', '{whsec_test}', '1000 years', " . literal($params{consumer} // '') . ')';
}

sub attempts
{
	my ($id) = @_;

	return sql($node, "SELECT attempts FROM idempotency.stripe_webhook_events WHERE stripe_event_id = '$id'");
}

#
# Many that have failed, few that are fresh, and what is processed: only what is
# handed out is looked at, whatever the planner knows of the table.
#
sql($node, q{
	INSERT INTO idempotency.stripe_webhook_events (token, received_at, claimed_at, processed_at, attempts, success,
		account, stripe_event_id, consumer, event_type, object_id, next_attempt_at)
	SELECT i, now() - interval '1 day', now(), now(), 1, true, '', 'evt_p' || i, 'many', 'a.b', 'o_p' || i % 100, now() - interval '1 day'
	FROM generate_series(1, 20000) i});
sql($node, 'VACUUM ANALYZE idempotency.stripe_webhook_events');
my $session = $node->background_psql('postgres');
$session->query_safe("SELECT next('many')");
sql($node, q{
	INSERT INTO idempotency.stripe_webhook_events (token, received_at, claimed_at, processed_at, attempts, success,
		account, stripe_event_id, consumer, event_type, object_id, next_attempt_at)
	SELECT i, now() - interval '1 day', now(), now(), 20, false, '', 'evt_f' || i, 'many', 'a.b', 'o_f' || i,
		CASE i % 3 WHEN 0 THEN now() - interval '1 hour' WHEN 1 THEN now() + interval '1 hour' ELSE 'infinity' END
	FROM generate_series(1, 30000) i});
sql($node, join(';', map { receive("evt_n$_", consumer => 'many') } 0 .. 9));
foreach my $known ('a session that has known none', 'a session that knows no better', 'a session that knows')
{
	foreach my $n (0 .. 2)
	{
		like($session->query("BEGIN; SELECT next('many'), 'read ' || rows_read(); COMMIT"), qr/^evt_n\d 1\|read \d\d?$/,
			"$known takes a fresh one, and looks at few others");
	}
	$session->quit;
	sql($node, 'VACUUM ANALYZE idempotency.stripe_webhook_events') if $known =~ /no better/;
	$session = $node->background_psql('postgres');
}
like($session->query("SELECT next('many')"), qr/^evt_n\d 1$/, 'the tenth, too');
like($session->query("BEGIN; SELECT next('many'), 'read ' || rows_read(); COMMIT"), qr/^evt_f\d+ 21\|read \d\d?$/, 'then one that is due again');
$session->quit;
like(sql($node, q{BEGIN; SELECT state, count(*) FROM idempotency.stripe_webhook_pending WHERE consumer = '' GROUP BY 1;
		SELECT 'read ' || rows_read(); COMMIT}), qr/^read \d{1,5}$/, 'the view does not read what is processed');
sql($node, q{DELETE FROM idempotency.stripe_webhook_events WHERE success IS NOT TRUE});
sql($node, q{VACUUM ANALYZE idempotency.stripe_webhook_events});
like(sql($node, q{BEGIN; SELECT count(*) FROM idempotency.stripe_webhook_pending; SELECT 'read ' || rows_read(); COMMIT}),
	qr/^0\nread \d$/, 'where nothing is pending it reads next to nothing');

#
# Two workers, one object: whatever comes in meanwhile
#
my @workers = map { $node->background_psql('postgres', on_error_stop => 0) } 1 .. 2;
$workers[0]->query_safe('BEGIN ISOLATION LEVEL ' . 'READ COMMITTED');
sql($node, receive('evt_b', object => 'sub_1'));
is($workers[0]->query('SELECT next(lease => NULL)'), 'evt_b 1', 'one of an object is claimed in an open transaction');
sql($node, receive('evt_a', object => 'sub_1'));
sql($node, q{UPDATE idempotency.stripe_webhook_events SET created = now() - interval '1 year', next_attempt_at = now() - interval '1 day'
	WHERE stripe_event_id = 'evt_a'});
is($workers[1]->query('SELECT next()'), '', 'another one that comes in, and is older, is nobody\'s');
# any number of its kind hold up no other
sql($node, join(';', (map { receive("evt_c$_", object => 'sub_1') } 1 .. 150), receive('evt_other')));
is($workers[1]->query('SELECT next()'), 'evt_other 1', 'what is behind 150 of them is taken');
# an object of the same name, of another account, is another one
sql($node, receive('evt_account', object => 'sub_1', account => 'acct_1'));
is($workers[1]->query('SELECT next()'), 'evt_account 1', 'so is another account\'s of the same id');
$workers[0]->query_safe('ROLLBACK');
is($workers[1]->query('SELECT next()'), 'evt_a 1', 'then the oldest');
is($workers[0]->query('SELECT next()'), '', 'and it alone, while its lease lasts');
# as many transactions as you like
sql($node, q{DELETE FROM idempotency.stripe_webhook_events WHERE success IS NOT TRUE});
sql($node, join(';', map { receive("evt_d$_") } 1 .. 300));
my $claimed = $workers[0]->query(q{SET idempotency.open_claim_at_commit = 'allow';
	BEGIN; SELECT count(*), count(DISTINCT n) FROM (SELECT next(lease => NULL) AS n FROM generate_series(1, 200)) n});
is($claimed, '200|200', 'a transaction claims 200 events');
is($workers[1]->query('SELECT count(*) FROM (SELECT next() AS n FROM generate_series(1, 150)) n WHERE n IS NOT NULL') >= 60 ? 'most' : 'few',
	'most', 'others take others meanwhile');
$workers[0]->query_safe('COMMIT');
like($workers[1]->query(q{UPDATE idempotency.stripe_webhook_events SET next_attempt_at = now() WHERE lease_expires_at IS NULL;
	SELECT count(*) FROM (SELECT next() AS n FROM generate_series(1, 300)) n WHERE n LIKE '% 2'}), qr/^200$/,
	'what was committed without a record is taken again');
$_->quit foreach @workers;
sql($node, 'DELETE FROM idempotency.stripe_webhook_events WHERE success IS NOT TRUE');

#
# NOTIFY: with the commit, and in nobody's way
#
sub heard
{
	my ($statements) = @_;

	return join(' ', map { defined $_ ? "<$_>" : '<>' } sql($node, "LISTEN idempotency_event; $statements")
		  =~ /notification "idempotency_event"(?: with payload "([^"]*)")? received/g);
}

is(heard(receive('evt_h1')), '<>', 'who listens is told of an event');
is(heard(receive('evt_h1')), '', 'once');
is(heard(receive('evt_h1', consumer => 'mails')), '<mails>', 'and whose it is');
is(heard('BEGIN; ' . receive('evt_h2') . '; ROLLBACK'), '', 'not after a rollback');
is(heard(join('; ', 'BEGIN', (map { receive("evt_i$_") } 1 .. 20), 'SAVEPOINT a', receive('evt_h3', consumer => 'mails'), 'ROLLBACK TO a', 'COMMIT')),
	'<>', 'many in a transaction are told at once');
is(heard('SET idempotency.webhook_notify = off; ' . receive('evt_h4')), '', 'nor where that is off');
is(heard('BEGIN; ' . receive('evt_h5') . "; PREPARE TRANSACTION 'p'; COMMIT PREPARED 'p'; SELECT 1"), '',
	'without workers a transaction can be prepared, and tells nothing');
is(sql($node, q{SELECT count(*) FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_h5'}), '1', 'of what it keeps');
sql($node, 'DELETE FROM idempotency.stripe_webhook_events WHERE success IS NOT TRUE');

#
# A handler that ends its process, in the middle of its own transaction: who
# knows nothing of its attempts passes it on while it runs; the page says more.
#
sql($node, receive('evt_kill') . ';' . receive('evt_next'));
my $worker = $node->background_psql('postgres', on_error_stop => 0);
is($worker->query('BEGIN; SELECT next(lease => NULL)'), 'evt_kill 1', 'claimed without a lease');
is(sql($node, 'SELECT next()'), 'evt_next 1', 'the next is another\'s, at once');
eval { $worker->query('SELECT pg_terminate_backend(pg_backend_pid())') };
eval { $worker->quit };
is(attempts('evt_kill'), '0', 'nothing is known of the attempt');

SKIP:
{
	my ($stdout, $stderr) = ('', '');
	IPC::Run::run([ 'python3', '-c', 'import psycopg' ], '>', \$stdout, '2>', \$stderr) or skip('python3 has no psycopg', 1);

	my ($program) = $page =~ /^```python\n(.*?def run.*?)^```$/ms or die 'the page has no worker';
	# what it waits for is nothing that has failed
	$program =~ s/\[\], 10\)/[], 600)/ or die 'the page waits otherwise';
	$program =~ s/'5 minutes'/'1 second'/ or die 'the page has another lease';
	append_to_file("$dir/events.py", $program);
	append_to_file("$dir/worker.py", <<'PY');
import os
import sys
from events import run

def handle(conn, e):
    event = e["stripe_event_id"]
    conn.execute("INSERT INTO done VALUES (%s, %s)", (event, sys.argv[1]))
    if event == "evt_kill":
        conn.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    if event == "evt_exit":
        os._exit(1)
    if event == "evt_zero":
        raise Exception("a\0b")

run({"a.b": handle})
PY
	$ENV{PGHOST} = $node->host;
	$ENV{PGPORT} = $node->port;
	$ENV{PGDATABASE} = 'postgres';
	$ENV{PGUSER} = sql($node, 'SELECT current_user');

	my ($log, $number) = ('', 0);
	my $begin = sub {
		return IPC::Run::start([ 'python3', "$dir/worker.py", ++$number ], '<', \undef, '>', \$log, '2>', \$log);
	};
	my $is_done = sub {
		my ($event) = @_;

		return "SELECT EXISTS (SELECT FROM idempotency.stripe_webhook_events WHERE stripe_event_id = '$event' AND success)";
	};

	sql($node, 'SET idempotency.webhook_max_attempts = -1; ' . join(';', map { receive("evt_$_") } qw(zero w1 exit w2)));
	sql($node, 'ALTER DATABASE postgres SET idempotency.webhook_max_attempts = 2');
	$process = $begin->();
	wait_until($node, $is_done->('evt_w1'), 'a good one is processed, whatever comes before it');
	foreach my $n (1 .. 20)
	{
		last if sql($node, q{SELECT count(*) = 3 FROM idempotency.stripe_webhook_pending WHERE state = 'dead'}) eq 't';
		# one that ends its process needs somebody to begin it again; and pauses are cut short
		$process->pump_nb;
		if (!$process->pumpable)
		{
			$process->finish;
			$process = $begin->();
		}
		sql($node, q{UPDATE idempotency.stripe_webhook_events SET next_attempt_at = least(next_attempt_at, now())
			WHERE next_attempt_at < 'infinity' AND lease_expires_at IS NULL;
			NOTIFY idempotency_event});
		select(undef, undef, undef, 1);
	}
	is(sql($node, q{SELECT string_agg(concat_ws(' ', stripe_event_id, state, attempts), ', ' ORDER BY stripe_event_id)
			FROM idempotency.stripe_webhook_pending WHERE stripe_event_id IN ('evt_kill', 'evt_exit', 'evt_zero')}),
		'evt_exit dead 2, evt_kill dead 2, evt_zero dead 2', 'those that fail die') or diag($log);
	wait_until($node, $is_done->('evt_w2'), 'and the last was processed');
	is(sql($node, q{SELECT count(*) FROM done WHERE event IN ('evt_kill', 'evt_exit', 'evt_zero')}), '0', 'what they did is undone');

	# a worker that sleeps, and wakes
	$process->kill_kill;
	$process = $begin->();
	wait_until($node, q{SELECT EXISTS (SELECT FROM pg_stat_activity
		WHERE query LIKE '%stripe_webhook_next%' AND state = 'idle' AND state_change < now() - interval '2 s')}, 'the worker sleeps');
	sql($node, receive('evt_wake'));
	wait_until($node, $is_done->('evt_wake'), 'and wakes when an event is received');
	$process->kill_kill;

	# revived by what the view says
	sql($node, 'ALTER DATABASE postgres RESET idempotency.webhook_max_attempts');
	my $next_step = sql($node, q{SELECT next_step FROM idempotency.stripe_webhook_pending WHERE stripe_event_id = 'evt_zero'});
	like(sql($node, $next_step), qr/^claimed\|evt_zero\|/, 'the statement claims it');
	wait_until($node, q{SELECT state = 'lapsed' AND next_attempt_at <= clock_timestamp() FROM idempotency.stripe_webhook_pending
		WHERE stripe_event_id = 'evt_zero'}, 'its lease lapses');
	is(sql($node, 'SELECT next()'), 'evt_zero 2', 'and a worker has it again');
}

#
# Preloaded, a prepared transaction tells at last.
#
$node->append_conf('postgresql.conf', "shared_preload_libraries = 'idempotency'\n");
$node->restart;
my $listener = $node->background_psql('postgres', on_error_stop => 0);
$listener->query_safe('LISTEN idempotency_event');
sql($node, 'BEGIN; ' . receive('evt_prepared', consumer => 'mails') . "; PREPARE TRANSACTION 'p'");
is(sql($node, 'SELECT count(*) FROM idempotency.pending_notices'), '0', 'prepared: nothing to see');
sql($node, "COMMIT PREPARED 'p'");
my $heard = '';
foreach (1 .. 600)
{
	$heard .= $listener->query('SELECT 1');
	last if $heard =~ /idempotency_event/;
	select(undef, undef, undef, 0.1);
}
like($heard, qr/"idempotency_event" with payload "mails"/, 'committed: a worker tells of it');
$listener->quit;

$node->stop;

done_testing();
