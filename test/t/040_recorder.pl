
# What is known of a call to Stripe is committed by the recorder, whatever
# becomes of the caller's transaction, its session, or the server: the key never
# changes, and what Stripe did is known or known to be unknown.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

needs_debug_points();

# The WAL writer sleeps, so that what isn't flushed on purpose is lost.
my $node = new_node('main', debug => 1, conf => q{
restart_after_crash = on
synchronous_commit = off
wal_writer_delay = 10s
idempotency.stripe_record_timeout = 60s
});

sub op
{
	my ($type, $id) = @_;

	return sql($node, qq{
		SELECT outcome, attempt, generation, first_sent_at IS NOT NULL
		FROM idempotency.stripe_lookup('$type', '$id')});
}

#
# stripe_claim() and stripe_reopen() in a transaction that rolls back
#

foreach my $level ('READ COMMITTED', 'REPEATABLE READ', 'SERIALIZABLE')
{
	my $id = $level =~ s/ /_/r;
	my $key = sql($node, "SELECT idempotency.stripe_idempotency_key('payment', '$id')");
	my $session = $node->background_psql('postgres', on_error_stop => 0);

	$session->query_safe("BEGIN ISOLATION LEVEL $level; SELECT 1");
	is($session->query_safe(qq{
			SELECT verdict, idempotency_key, attempt, token > 0
			FROM idempotency.stripe_claim('payment', '$id', '{"amount": 1}')}),
		"claimed|$key|1|t", "$level: claimed inside a transaction");
	is(op('payment', $id), 'in_progress|1|1|t', "$level: everybody sees it");
	is($session->query_safe(qq{
			SELECT verdict, outcome, idempotency_key, request
			FROM idempotency.stripe_claim('payment', '$id', '{"amount": 1}')}),
		qq[in_progress|in_progress|$key|{"amount": 1}],
		"$level: the transaction itself decides on the latest row");
	$session->query_safe('ROLLBACK');
	is(op('payment', $id), 'in_progress|1|1|t', "$level: it survives the rollback");
	is(stripe_claim($node, 'payment', $id)->{verdict}, 'in_progress', "$level: and holds");

	lapse_stripe_lease($node, 'payment', $id);
	my $answer = stripe_claim($node, 'payment', $id, request => '{"amount": 1}');
	is("$answer->{verdict} $answer->{attempt} $answer->{idempotency_key} $answer->{request}{amount}",
		"claimed 2 $key 1", "$level: a retry has the same key and request");

	# recorded in the transaction that claimed
	$session->query_safe("BEGIN ISOLATION LEVEL $level; SELECT 1");
	$session->query_safe(qq{
		SELECT token AS t FROM idempotency.stripe_claim('payment', '$id 2') \\gset});
	is($session->query_safe("SELECT idempotency.stripe_record('payment', '$id 2', :t, 'pi_1')"),
		'completed', "$level: claimed and recorded in one transaction");
	is(op('payment', "$id 2"), 'in_progress|1|1|t', "$level: the record belongs to the transaction");
	$session->query("SAVEPOINT a; SELECT idempotency.stripe_claim('payment', '$id 2')");
	like($session->{stderr}, qr/this transaction has changed Stripe operation/,
		"$level: which can't ask again before it commits");
	$session->{stderr} = '';
	is($session->query('\echo :LAST_ERROR_SQLSTATE'), 'IK006', "$level: IK006");
	$session->query("ROLLBACK TO a; SELECT idempotency.stripe_reopen('payment', '$id 2', force => true)");
	is($session->query('\echo :LAST_ERROR_SQLSTATE'), 'IK006', "$level: nor reopen it: IK006");
	$session->query('ROLLBACK TO a; COMMIT');
	is(op('payment', "$id 2"), 'completed|1|1|t', "$level: recorded with the commit");

	# extended, released
	$session->{stderr} = '';
	$session->query_safe("BEGIN ISOLATION LEVEL $level; SELECT 1");
	$session->query_safe(qq{
		SELECT token AS t FROM idempotency.stripe_claim('payment', '$id 3') \\gset
		SELECT idempotency.stripe_extend('payment', '$id 3', :t, '1 hour');
		SELECT idempotency.stripe_release('payment', '$id 3', :t); COMMIT});
	is(op('payment', "$id 3"), 'not_executed|1|1|f', "$level: extended and released");

	# reopened
	sql($node, qq{SELECT idempotency.stripe_record('payment', '$id', $answer->{token}, http_status => 402, response => '{"error": {"type": "card_error"}}')});
	$session->query_safe("BEGIN ISOLATION LEVEL $level; SELECT 1");
	my $next = $session->query_safe("SELECT idempotency.stripe_reopen('payment', '$id')");
	$session->query_safe('ROLLBACK');
	isnt($next, $key, "$level: reopened");
	is(sql($node, "SELECT idempotency.stripe_idempotency_key('payment', '$id')"),
		$next, "$level: the new key survives the rollback");
	$session->query_safe("BEGIN; SAVEPOINT a");
	is($session->query_safe("SELECT verdict, generation FROM idempotency.stripe_claim('payment', '$id')"),
		'claimed|2', "$level: claimed in a savepoint");
	$session->query_safe('ROLLBACK TO a; COMMIT');
	is(op('payment', $id), 'in_progress|1|2|t', "$level: which is rolled back");
	$session->quit;
}

run_fails($node, q{BEGIN READ ONLY; SELECT idempotency.stripe_claim('payment', 'ro')},
	'25006', 'not in a transaction that only reads');
is(op('payment', 'ro'), '|||f', 'and nothing was noted');

# the errors are the caller's own
run_fails($node, q{BEGIN; SELECT idempotency.stripe_reopen('payment', 'absent')},
	'IK003', 'what the recorder finds wrong is the caller\'s error');
run_fails($node, q{BEGIN; SELECT idempotency.stripe_reopen('payment', 'READ_COMMITTED 2')},
	'IK002', 'with its own SQLSTATE');
my (undef, undef, $stderr) = $node->psql('postgres',
	q{SELECT idempotency.stripe_reopen('payment', 'READ_COMMITTED 2')});
like($stderr, qr/^psql:<stdin>:1: ERROR:  Stripe operation "payment:READ_COMMITTED 2" is completed
DETAIL:  A new key would execute it a second time.
HINT:  Use another operation id for another operation.
CONTEXT:  recorder of Stripe operations; nothing was sent$/m, 'and its whole text');

# the other ways to commit
is(sql($node, q{
		SET idempotency.stripe_ledger = 'transaction';
		BEGIN;
		SELECT verdict FROM idempotency.stripe_claim('payment', 'own');
		SELECT test_stripe_call('payment', 'own call', resource_id => 'pi_own');
		ROLLBACK;
		SELECT outcome FROM idempotency.stripe_lookup('payment', 'own');
		SELECT outcome FROM idempotency.stripe_lookup('payment', 'own call');
		BEGIN;
		SELECT test_stripe_call('payment', 'own call', resource_id => 'pi_own');
		COMMIT;
		SELECT outcome, callers IS NULL FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'own call'}),
	'claimed
claimed completed pi_own attempt 1 generation 1 POST /v1/payment_intents amount=1


claimed completed pi_own attempt 1 generation 1 POST /v1/payment_intents amount=1
completed|t', 'stripe_ledger = transaction: the row shares the fate of the transaction');

#
# A call that the backend sends itself
#

is(sql($node, q{SELECT test_stripe_call('call', '1')}),
	'claimed completed pi_1 attempt 1 generation 1 POST /v1/payment_intents amount=1',
	'a call is claimed and recorded');
is(sql($node, q{SELECT test_stripe_call('call', '1')}),
	'replay completed pi_1 attempt 1 generation 1 POST /v1/payment_intents amount=1', 'and replayed');
like(sql($node, q{SELECT test_stripe_call('call', '1', 'amount=2')}), qr/^mismatch completed pi_1/,
	'another request is told apart');
is(sql($node, q{
		SELECT test_stripe_call('call', '2', status => 0);
		SELECT test_stripe_call('call', '2', resend => true)}),
	'claimed unknown - attempt 1 generation 1 POST /v1/payment_intents amount=1
claimed completed pi_1 attempt 2 generation 1 POST /v1/payment_intents amount=1',
	'what is stored can be sent again');
run_fails($node, q{SELECT test_stripe_call('call', 'absent', resend => true)},
	'IK003', 'if it is');
is(sql($node, q{SELECT test_stripe_call('call', '3', status => -1)}),
	'claimed not_executed - attempt 1 generation 1 POST /v1/payment_intents amount=1', 'nothing was sent');
is(op('call', '3'), 'not_executed|1|1|f', 'so it never was');
is(sql($node, q{
		SELECT test_stripe_call('call', '4', status => 0);
		SELECT test_stripe_call('call', '4', status => -1)}),
	'claimed unknown - attempt 1 generation 1 POST /v1/payment_intents amount=1
claimed unknown - attempt 2 generation 1 POST /v1/payment_intents amount=1',
	'but what was in doubt stays in doubt');
is(sql($node, q{SELECT test_stripe_call('call', 'large', repeat('x', 200000), room => 500000)}),
	'claimed completed pi_1 attempt 1 generation 1 POST /v1/payment_intents ' . 'x' x 200000,
	'large bodies pass');
run_fails($node, q{
	UPDATE idempotency.stripe_idempotency_keys SET livemode = true WHERE operation_id = '3';
	SELECT test_stripe_call('call', '3')}, 'IK002', 'one mode\'s call isn\'t continued in the other');

# whoever reads, while it is in flight
arm($node, 'call-sent', 'wait');
my $caller = $node->background_psql('postgres', on_error_stop => 0);
$caller->query_until(qr/sent/, "\\echo sent\nBEGIN; SELECT test_stripe_call('call', 'slow');\n");
my $pid = wait_for_point($node, 'call-sent');
is(op('call', 'slow'), 'in_progress|1|1|t', 'a call in flight is in progress');
is(sql($node, q{SELECT verdict, retry_after FROM idempotency.stripe_claim('call', 'slow')}),
	'in_progress|1', 'for a claim, too');
is(sql($node, q{
		SELECT lapsed FROM idempotency.open_claims WHERE operation_id = 'slow';
		SELECT count(*) FROM idempotency.stripe_unknown WHERE operation_id = 'slow';
		SELECT count(*) FROM idempotency.stripe_orphans WHERE operation_id = 'slow'}), "f\n0\n0",
	'and in the views');
run_fails($node, q{SELECT idempotency.stripe_settle('call', 'slow', 'completed')},
	'IK002', 'so nobody can settle it');
disarm($node, 'call-sent');
like($caller->query('COMMIT'), qr/completed/, 'until it is done');
$caller->quit;

#
# Every step of a call times every fault.  Then the application tries again
# until it has an answer; at Stripe there has been one key, ever.
#

# what everybody sees after the fault, and how often a request has arrived
my @cases = (
	# point			action		state			arrivals
	[ 'call-begins', 'error', '', 0 ],
	[ 'call-begins', 'fatal', '', 0 ],
	[ 'call-begins', 'kill', '', 0 ],
	[ 'recorder-start', 'fatal', '', 0 ],
	[ 'recorder-taken', 'error', '', 0 ],
	[ 'recorder-taken', 'fatal', 'completed', 1 ],
	[ 'recorder-taken', 'kill', '', 0 ],
	[ 'recorder-before-commit', 'error', '', 0 ],
	[ 'recorder-before-commit', 'fatal', 'completed', 1 ],
	[ 'recorder-before-commit', 'kill', '', 0 ],
	[ 'recorder-after-commit', 'error', 'completed', 1 ],
	[ 'recorder-after-commit', 'fatal', 'completed', 1 ],
	[ 'recorder-after-commit', 'kill', 'unknown', 0 ],
	[ 'claim-answered', 'error', 'not_executed', 0 ],
	[ 'claim-answered', 'fatal', 'not_executed', 0 ],
	[ 'claim-answered', 'kill', 'unknown', 0 ],
	[ 'call-claimed', 'error', 'not_executed', 0 ],
	[ 'call-claimed', 'fatal', 'not_executed', 0 ],
	[ 'call-claimed', 'kill', 'unknown', 0 ],
	[ 'call-sending', 'error', 'unknown', 0 ],
	[ 'call-sending', 'fatal', 'unknown', 0 ],
	[ 'call-sending', 'kill', 'unknown', 0 ],
	[ 'call-sent', 'error', 'unknown', 1 ],
	[ 'call-sent', 'fatal', 'unknown', 1 ],
	[ 'call-sent', 'kill', 'unknown', 1 ],
	[ 'before-record', 'error', 'unknown', 1 ],
	[ 'before-record', 'fatal', 'unknown', 1 ],
	[ 'before-record', 'kill', 'unknown', 1 ],
	[ 'record: recorder-taken', 'error', 'completed', 1 ],
	[ 'record: recorder-taken', 'fatal', 'completed', 1 ],
	[ 'record: recorder-taken', 'kill', 'unknown', 1 ],
	[ 'record: recorder-before-commit', 'error', 'completed', 1 ],
	[ 'record: recorder-before-commit', 'fatal', 'completed', 1 ],
	[ 'record: recorder-before-commit', 'kill', 'unknown', 1 ],
	[ 'record: recorder-after-commit', 'error', 'completed', 1 ],
	[ 'record: recorder-after-commit', 'fatal', 'completed', 1 ],
	[ 'record: recorder-after-commit', 'kill', 'completed', 1 ],
	[ 'after-record', 'error', 'completed', 1 ],
	[ 'after-record', 'fatal', 'completed', 1 ],
	[ 'after-record', 'kill', 'completed', 1 ]);

sub arrivals
{
	my ($id) = @_;
	my $file = $node->data_dir . '/arrivals';

	return grep { /:\Q$id\E:/ } -e $file ? split(/\n/, slurp_file($file)) : ();
}

my $n = 0;
foreach my $case (@cases)
{
	my ($where, $action, $state, $arrivals) = @$case;
	my ($record, $point) = $where =~ /^(record: )?(.*)/;
	my $what = "$action at $where";
	my $id = 'case ' . ++$n;
	my $key = sql($node, "SELECT idempotency.stripe_idempotency_key('matrix', '$id')");
	my $offset = -s $node->logfile;
	my $call = "SELECT test_stripe_call('matrix', '$id')";

	wait_for_no_recorder($node) if $point eq 'recorder-start';
	arm($node, $record ? 'call-sent' : $point, $record ? 'wait' : $action);
	my $session = $node->background_psql('postgres', on_error_stop => 0);
	$session->query_until(qr/calling/, "\\echo calling\nBEGIN; $call; ROLLBACK;\n");
	if ($record)
	{
		wait_for_point($node, 'call-sent');
		arm($node, $point, $action);
		disarm($node, 'call-sent');
	}
	wait_for_point($node, $point);
	eval { $session->query('SELECT 1'); };
	eval { $session->{run}->pump_nb; $session->quit; };

	if ($action eq 'kill')
	{
		$node->wait_for_log(qr/all server processes terminated; reinitializing/, $offset);
		wait_until_up($node);
	}

	ok( $node->poll_query_until('postgres', qq{
			SELECT COALESCE((SELECT outcome::text FROM idempotency.stripe_lookup('matrix', '$id')), '') = '$state'}),
		"$what: it is " . ($state || 'absent'));
	is(scalar(arrivals($id)), $arrivals, "$what: $arrivals requests have arrived");
	is(op('matrix', $id) =~ /\|t$/ ? 'sent' : 'not sent',
		$state =~ /completed|unknown/ ? 'sent' : 'not sent', "$what: may it have been sent?");

	# in the end
	like(sql($node, $call), qr/ completed pi_1 /, "$what: a retry ends well");
	is(op('matrix', $id) =~ s/\|.*//r, 'completed', "$what: recorded");
	is(sql($node, "SELECT idempotency_key FROM idempotency.stripe_lookup('matrix', '$id')"),
		$key, "$what: the key is as ever");
	is(join(' ', grep { $_ ne $key } arrivals($id)), '', "$what: and no other was sent");
}

# The server stops in the middle of a call.
foreach my $point ('call-claimed', 'call-sent', 'recorder-taken')
{
	my $id = "stop $point";

	wait_for_no_recorder($node) if $point eq 'recorder-taken';
	arm($node, $point, 'wait');
	my $session = $node->background_psql('postgres', on_error_stop => 0);
	$session->query_until(qr/calling/, "\\echo calling\nSELECT test_stripe_call('matrix', '$id');\n");
	wait_for_point($node, $point);
	$node->stop('fast');
	eval { $session->quit; };
	disarm($node, $point);
	$node->start;
	like(op('matrix', $id), $point eq 'recorder-taken' ? qr/^\|/ : qr/^(unknown|not_executed)\|/,
		"fast shutdown at $point: not in progress");
	like(sql($node, "SELECT test_stripe_call('matrix', '$id')"), qr/ completed pi_1 /,
		"fast shutdown at $point: a retry ends well");
	is(join(' ', map { s/.*://r } arrivals($id)),
		join(' ', (sql($node, "SELECT right(idempotency_key, 36) FROM idempotency.stripe_lookup('matrix', '$id')"))
			x ($point eq 'call-sent' ? 2 : 1)),
		"fast shutdown at $point: with the same key");
}

is(sql($node, q{SELECT count(*) FROM idempotency.stripe_unknown WHERE operation_type = 'matrix'}),
	'0', 'nothing is left in doubt');

$node->stop;

done_testing();
