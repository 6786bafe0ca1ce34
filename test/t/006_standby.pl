
# On a hot standby everything can be looked at and nothing claimed.  After its
# promotion claims go on where the primary left them, with the same keys.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $primary = new_node('primary', init => { allows_streaming => 1 });
$primary->backup('backup');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($primary, 'backup', has_streaming => 1);
$standby->start;

my %token = map { $_ => claim($primary, $_, lease => '1 hour', request => '{"amount": 1}')->{token} }
  qw(done held lapsed);
sql($primary, qq{
	SELECT idempotency.record('done', 'test', $token{done}, '{"n": 1.50}',
		response_headers => '{"a": "b"}', response_body => '\\x00ff');
	SELECT idempotency.checkpoint('lapsed', 'test', $token{lapsed}, 'charged', '{"charge": "ch_1"}');
	SELECT idempotency.stripe_record('payment', 'done', c.token, 'pi_1', '{"id": "pi_1", "amount": 1.0}')
		FROM idempotency.stripe_claim('payment', 'done') c;
	SELECT idempotency.stripe_record('payment', 'failed', c.token, http_status => 402, response => '{"error": {"type": "card_error"}}')
		FROM idempotency.stripe_claim('payment', 'failed') c;
	SELECT idempotency.stripe_reopen('payment', 'failed');
	CREATE ROLE app;
	SELECT idempotency.grant_role('app', 'application');
});
lapse_lease($primary, 'lapsed');
my $stripe = stripe_claim($primary, 'payment', 'held', lease => '1 hour');
$primary->wait_for_catchup($standby, 'replay', $primary->lsn('flush'));

# What works on a standby, and says the same.
my $reading = q{
	SELECT v.key, l::text FROM (VALUES ('done'), ('held'), ('lapsed'), ('absent')) v (key),
		LATERAL idempotency.lookup(v.key, 'test') l;
	SELECT idempotency.operation_uuid('some key', 'test');
	SELECT id, idempotency.stripe_idempotency_key('payment', id), l::text
		FROM (VALUES ('done'), ('failed'), ('held'), ('absent')) v (id),
			LATERAL idempotency.stripe_lookup('payment', id) l;
	SELECT key, lapsed, recovery_point, next_step FROM idempotency.open_claims ORDER BY 1;
	SELECT idempotency.stripe_webhook_verify('{}', 't=1,v1=0', '{whsec_test}'),
		idempotency.stripe_webhook_is_valid('{}', 't=1,v1=0', '{whsec_test}');
	SELECT count(*) FROM idempotency.stripe_webhook_pending;
};
my $read = sql($primary, $reading);
like($read, qr{^done\|\(test,done,completed,.*^absent\|\(,+\)$}ms, 'there is something to read');
is(sql($standby, $reading), $read, 'a standby says what the primary says');
is(sql($standby, "SET ROLE app; SELECT l::text FROM idempotency.lookup('done', 'test') l"),
	sql($primary, "SELECT l::text FROM idempotency.lookup('done', 'test') l"),
	'also to a role without privileges on tables');

# What doesn't: every function that isn't STABLE.
my %call = (
	claim => q{('done', 'test')},
	record => qq{('held', 'test', $token{held})},
	checkpoint => qq{('held', 'test', $token{held}, 'point')},
	extend => qq{('held', 'test', $token{held})},
	release => qq{('held', 'test', $token{held})},
	stripe_claim => q{('payment', 'done')},
	stripe_record => qq{('payment', 'held', $stripe->{token}, 'pi_2')},
	stripe_release => qq{('payment', 'held', $stripe->{token})},
	stripe_extend => qq{('payment', 'held', $stripe->{token})},
	stripe_reopen => q{('payment', 'failed')},
	stripe_call => q{('payment', 'next', 'POST', '/v1/customers')},
	stripe_retry => q{('payment', 'next')},
	stripe_reconcile => q{()},
	stripe_settle => q{('payment', 'held', 'completed')},
	stripe_acknowledge => q{('payment', 'done', 'note')},
	stripe_namespace => q{('new')},
	stripe_webhook_claim => q{('{}', 't=1,v1=0')},
	stripe_webhook_record => q{('evt_1', 1)},
	stripe_webhook_receive => q{('{}', 't=1,v1=0')},
	stripe_webhook_next => q{()},
	stripe_webhook_reclaim => q{('evt_1')},
	expire => '()',
	grant_role => q{('app', 'operator')});
is(extension_functions($primary, q{provolatile = 'v' AND prorettype <> 'trigger'::regtype AND proname <> 'stripe_get'}),
	join("\n", sort keys %call), 'these are all functions that write');
foreach my $function (sort keys %call)
{
	run_fails($standby, "SELECT idempotency.$function$call{$function}",
		'25006', "$function is refused on a standby");
}
is(sql($standby, $reading), $read, 'and nothing has happened');

# The primary is lost.
my $replay = claim_text($primary, 'done');
my $next_key = sql($primary, "SELECT idempotency.stripe_idempotency_key('payment', 'next')");
$primary->stop('immediate');
$standby->promote;

is(claim_text($standby, 'done'), $replay, 'promoted: a result is replayed, byte for byte');
is(claim($standby, 'done', request => '{"amount": 2}')->{verdict},
	'mismatch', 'promoted: another request is told apart');
is(claim($standby, 'held')->{verdict}, 'in_progress', 'promoted: a lease holds');
sql($standby, "SELECT idempotency.record('held', 'test', $token{held})");
is(claim($standby, 'held')->{verdict}, 'replay', 'promoted: and its holder records');
my $answer = claim($standby, 'lapsed', lease => '1 hour');
is("$answer->{verdict} $answer->{attempt} $answer->{recovery_point}",
	'claimed 2 charged', 'promoted: a lapsed claim is taken over with its recovery point');
run_fails($standby, "SELECT idempotency.record('lapsed', 'test', $token{lapsed})",
	'IK001', 'promoted: its first holder is fenced off');
is(claim($standby, 'absent', lease => '1 hour')->{verdict}, 'claimed', 'promoted: a new key is claimed');

is(stripe_claim($standby, 'payment', 'done')->{resource_id}, 'pi_1', 'promoted: a call is replayed');
is(stripe_claim($standby, 'payment', 'held')->{verdict}, 'in_progress', 'promoted: one is in progress');
is(sql($standby, "SELECT idempotency.stripe_record('payment', 'held', $stripe->{token}, 'pi_2')"),
	'completed', 'promoted: and is recorded');
$answer = stripe_claim($standby, 'payment', 'failed');
is("$answer->{verdict} $answer->{generation}", 'claimed 2', 'promoted: a reopened one is claimed');
is(stripe_claim($standby, 'payment', 'next')->{idempotency_key},
	$next_key, 'promoted: a new one has the key that the primary would have given it');
run_fails($standby, "SELECT idempotency.stripe_namespace('new')",
	'IK009', 'promoted: there is nothing to decide');

$standby->stop;

done_testing();
