
# What the recorder has committed is on disk, and on the standby that commits wait
# for, whatever its settings become while it runs: by a reload, or by a trigger of
# the ledger's owner.

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
my $node = new_node('main', debug => 1, init => { allows_streaming => 1 }, conf => q{
wal_writer_delay = 10s
autovacuum = off
idempotency.max_workers = 0
idempotency.stripe_record_timeout = 60s
});

# Change the configuration while a recorder is at work, which stays a while.
sub reconfigure
{
	my ($statements) = @_;
	my $session = $node->background_psql('postgres', on_error_stop => 0);
	my $offset = -s $node->logfile;

	arm($node, 'recorder-taken', 'wait');
	$session->query_until(qr/begun/, "\\echo begun\nSELECT idempotency.stripe_claim('x', 'before ' || random());\n");
	wait_for_point($node, 'recorder-taken');
	sql($node, "$statements; SELECT pg_reload_conf()");
	$node->wait_for_log(qr/received SIGHUP/, $offset);
	select(undef, undef, undef, 0.5);
	disarm($node, 'recorder-taken');
	$session->quit;
	return;
}

# Claim a few, one after the other, and crash.
sub survive_crash
{
	my ($type, $test_name) = @_;
	my @verdicts;

	foreach my $i (1 .. 5)
	{
		push @verdicts, sql($node, "SELECT verdict FROM idempotency.stripe_claim('$type', '$i')");
		select(undef, undef, undef, 0.1);
	}
	$node->stop('immediate');
	$node->start;
	is("@verdicts", join(' ', ('claimed') x 5), "$test_name: claimed");
	is(sql($node, "SELECT string_agg(operation_id, ' ' ORDER BY operation_id) FROM idempotency.stripe_idempotency_keys
			WHERE operation_type = '$type'"), '1 2 3 4 5', "$test_name: and on disk");
	return;
}

reconfigure(q{ALTER SYSTEM SET synchronous_commit = off});
is(sql($node, 'SHOW synchronous_commit'), 'off', 'the setting is off now');
survive_crash('off', 'synchronous_commit switched off by a reload');

# Where commits wait for a standby, the recorder's do.
sql($node, 'ALTER SYSTEM RESET ALL; SELECT pg_reload_conf()');
reconfigure(q{ALTER SYSTEM SET synchronous_commit = local});
sql($node, q{ALTER SYSTEM SET synchronous_standby_names = 'nobody'; SELECT pg_reload_conf()});
ok($node->poll_query_until('postgres', q{SELECT current_setting('synchronous_standby_names') = 'nobody'}), 'commits wait for a standby');
my $session = $node->background_psql('postgres', on_error_stop => 0);
$session->query_until(qr/begun/, "\\echo begun\nSELECT verdict FROM idempotency.stripe_claim('standby', '1');\n");
ok($node->poll_query_until('postgres', q{SELECT count(*) = 1 FROM pg_stat_activity
	WHERE backend_type = 'idempotency recorder' AND wait_event = 'SyncRep'}),
	'synchronous_commit = local by a reload: the recorder waits for the standby');
sql($node, 'ALTER SYSTEM RESET ALL; SELECT pg_reload_conf()');
like($session->query('SELECT 1'), qr/^claimed/m, 'and then answers');
$session->quit;

# Whoever ends the recorder cuts its wait short, not the caller's: what was committed
# here and nowhere else isn't answered, however many recorders are ended.
sql($node, q{ALTER SYSTEM SET synchronous_standby_names = 'nobody'; SELECT pg_reload_conf()});
ok($node->poll_query_until('postgres', q{SELECT current_setting('synchronous_standby_names') = 'nobody'}), 'commits wait again');
$session = $node->background_psql('postgres', on_error_stop => 0);
$session->query_until(qr/begun/, "\\echo begun\nSELECT verdict FROM idempotency.stripe_claim('standby', '2');\n\\echo told\n");
my $ended = '0';
foreach my $how (qw(terminate cancel terminate))
{
	ok($node->poll_query_until('postgres', qq{SELECT count(*) = 1 FROM pg_stat_activity
		WHERE backend_type = 'idempotency recorder' AND wait_event = 'SyncRep' AND pid <> $ended}),
		"a recorder waits for the standby, and is to be ended: $how");
	my $pid = sql($node, q{SELECT pid FROM pg_stat_activity WHERE backend_type = 'idempotency recorder'});
	sql($node, "SELECT pg_${how}_backend($pid)");
	$ended = $pid if $how eq 'terminate';
}
ok($node->poll_query_until('postgres', qq{SELECT count(*) = 1 FROM pg_stat_activity
	WHERE backend_type = 'idempotency recorder' AND wait_event = 'SyncRep' AND pid <> $ended}), 'the next one waits, too');
is(sql($node, q{SELECT outcome FROM idempotency.stripe_idempotency_keys WHERE operation_type = 'standby' AND operation_id = '2'}),
	'in_progress', 'the claim is committed here');
is(sql($node, q{SELECT state FROM pg_stat_activity WHERE query LIKE '%stripe_claim(''standby'', ''2'')%' AND pid <> pg_backend_pid()}),
	'active', 'and its caller waits on');
sql($node, 'ALTER SYSTEM RESET ALL; SELECT pg_reload_conf()');
like($session->query('SELECT 1'), qr/claimed/, 'until it is told');
is(sql($node, q{SELECT attempt FROM idempotency.stripe_lookup('standby', '2')}), '1', 'by its first claim');
$session->quit;

# The same where it ends in the middle, after the commit and before the answer: by
# its exit, or by an error.  The next one comes at once.
sub wait_for_standby
{
	sql($node, q{ALTER SYSTEM SET synchronous_standby_names = 'nobody'; SELECT pg_reload_conf()});
	ok($node->poll_query_until('postgres', q{SELECT current_setting('synchronous_standby_names') = 'nobody'}), 'commits wait');
	return;
}

sub wait_for_recorder
{
	my ($test_name, $not) = @_;

	ok($node->poll_query_until('postgres', q{SELECT count(*) = 1 FROM pg_stat_activity
		WHERE backend_type = 'idempotency recorder' AND wait_event = 'SyncRep' AND pid <> } . ($not // 0)), $test_name);
	return sql($node, q{SELECT pid FROM pg_stat_activity WHERE backend_type = 'idempotency recorder'});
}

sub begin_claim
{
	my ($id, $more) = @_;
	my $claimer = $node->background_psql('postgres', on_error_stop => 0);

	$claimer->query_until(qr/begun/, "\\echo begun\nSELECT verdict FROM idempotency.stripe_claim('standby', '$id'$more);\n");
	return $claimer;
}

# End the recorder while it waits for the standby, and between the commit and its answer.
sub end_recorder
{
	my ($pid, $how) = @_;

	arm($node, 'recorder-after-commit', $how);
	sql($node, "SELECT pg_terminate_backend($pid, 60000)");
	disarm($node, 'recorder-after-commit');
	return;
}

foreach my $how (qw(wait error))
{
	my $by = $how eq 'wait' ? 'by its exit' : 'by an error';

	wait_for_standby();
	$session = begin_claim("in the middle $by", '');
	my $pid = wait_for_recorder("$by: the recorder waits for the standby");
	end_recorder($pid, $how);
	my $since = time;
	wait_for_recorder("$by: and so does the next one", $pid);
	cmp_ok(time - $since, '<', 15, "$by: which comes soon");
	sql($node, 'ALTER SYSTEM RESET ALL; SELECT pg_reload_conf()');
	like($session->query('SELECT 1'), qr/claimed/, "$by: the caller is told");
	is(sql($node, "SELECT attempt FROM idempotency.stripe_lookup('standby', 'in the middle $by')"), '1', "$by: of its first claim");
	$session->quit;
}

# Nobody waits for an answer of Stripe's that has been left behind: the launcher comes.
$session = $node->background_psql('postgres', on_error_stop => 0);
arm($node, 'call-sent', 'wait');
$session->query_until(qr/begun/, "\\echo begun\nSELECT test_stripe_call('standby', 'left behind');\n");
wait_for_point($node, 'call-sent');
wait_for_standby();
disarm($node, 'call-sent');
my $pid = wait_for_recorder('left behind: the recorder waits for the standby');
sql($node, q{SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE query LIKE '%''left behind''%' AND pid <> pg_backend_pid()});
eval { $session->quit };
end_recorder($pid, 'wait');
wait_for_recorder('left behind: though nobody has called, so does the next one', $pid);
sql($node, 'ALTER SYSTEM RESET ALL; SELECT pg_reload_conf()');
ok($node->poll_query_until('postgres', q{SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'idempotency recorder'}),
	'left behind: and has done it');

#
# A lease is the caller's from when it is told, however slow the commit was
#

wait_for_standby();
$session = begin_claim('slow', ", lease => '30 s'");
wait_for_recorder('a claim waits for the standby');
select(undef, undef, undef, 15);
sql($node, 'ALTER SYSTEM RESET ALL; SELECT pg_reload_conf()');
like($session->query('SELECT 1'), qr/claimed/, 'a slow commit');
cmp_ok(sql($node, q{SELECT extract(epoch FROM lease_expires_at - clock_timestamp())
		FROM idempotency.stripe_lookup('standby', 'slow')}), '>', 20, 'most of its lease is left');
is(sql($node, q{SELECT lease FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'slow'}), '00:00:30', 'the lease is as it was given');
$session->quit;

# It has run out when another recorder has confirmed it: still there is one claimant.
wait_for_standby();
$session = begin_claim('run out', ", lease => '10 s'");
$pid = wait_for_recorder('a claim waits for the standby');
sql($node, "SELECT pg_terminate_backend($pid, 60000)");
wait_for_recorder('and for another recorder', $pid);
select(undef, undef, undef, 11);
my $second = begin_claim('run out', '');
select(undef, undef, undef, 0.5);
sql($node, 'ALTER SYSTEM RESET ALL; SELECT pg_reload_conf()');
my @verdicts = map { (split /\n/, $_->query('SELECT 1'))[0] } $session, $second;
is("@verdicts", 'claimed in_progress', 'of two who claim while a lease runs out unseen, one is told that it has claimed');
$_->quit foreach $session, $second;

# One whose lease has been taken over isn't told that it has claimed.
wait_for_standby();
$session = begin_claim('taken', ", lease => '1 s'");
$pid = wait_for_recorder('a claim waits for the standby');
arm($node, 'recorder-begins', 'wait');
sql($node, "SELECT pg_terminate_backend($pid, 60000)");
wait_for_point($node, 'recorder-begins');
sql($node, q{SET synchronous_commit = local; SET idempotency.stripe_ledger = 'transaction'; SELECT pg_sleep(1.1)});
is(sql($node, q{SET idempotency.stripe_ledger = 'transaction'; BEGIN; SET LOCAL synchronous_commit = local;
	UPDATE idempotency.stripe_idempotency_keys SET token = 7, lease_expires_at = now() + interval '1 hour' WHERE operation_id = 'taken'
	RETURNING 'taken over'; COMMIT}), 'taken over', 'somebody has taken over meanwhile');
disarm($node, 'recorder-begins');
wait_for_recorder('the next recorder', $pid);
sql($node, 'ALTER SYSTEM RESET ALL; SELECT pg_reload_conf()');
like($session->query('SELECT 1'), qr/^in_progress/m, 'a claim that was taken over while it waited is told so');
$session->quit;

# The owner of the ledger needs no rights to set these, and they outlive the trigger.
sql($node, q{
	CREATE ROLE keeper;
	GRANT USAGE ON SCHEMA idempotency TO keeper;
	ALTER TABLE idempotency.stripe_idempotency_keys OWNER TO keeper;
	CREATE FUNCTION spoil() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
		SET synchronous_commit = off;
		SET default_transaction_read_only = on;
		SET default_transaction_isolation = 'serializable';
		SET search_path = public;
		RETURN NEW; END $$;
	CREATE TRIGGER spoil BEFORE INSERT ON idempotency.stripe_idempotency_keys FOR EACH ROW EXECUTE FUNCTION spoil()});
survive_crash('trigger', 'settings changed by a trigger');
sql($node, 'DROP FUNCTION spoil CASCADE');

# Without the recorder a call lives and dies with its transaction, and that doesn't
# die after its commit.
$session = $node->background_psql('postgres', on_error_stop => 0);
$session->query_safe(q{
	SET synchronous_commit = off;
	SET idempotency.stripe_ledger = 'transaction';
	BEGIN;
	SAVEPOINT a;
	SELECT test_stripe_call('own', '1');
	RELEASE a;
	COMMIT});
$node->stop('immediate');
$node->start;
eval { $session->quit };
is(sql($node, q{SELECT outcome FROM idempotency.stripe_lookup('own', '1')}), 'completed',
	'stripe_ledger = transaction: what was sent and committed is on disk');

# The postmaster's end ends the wait for a standby, and nothing else says so.
wait_for_standby();
$session = begin_claim('orphaned', '');
$pid = wait_for_recorder('a recorder waits for the standby');
$node->kill9;
my $tries = 0;
select(undef, undef, undef, 0.1) while -e "/proc/$pid" && ++$tries < 600;
ok(!-e "/proc/$pid", 'it ends with the postmaster');
eval { $session->quit };

done_testing();
