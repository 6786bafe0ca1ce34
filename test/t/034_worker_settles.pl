# Workers settle calls to Stripe, too: what nobody else would come to do.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use Digest::SHA qw(hmac_sha256_hex);
use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_node('main', preload => 1, conf => q{
idempotency.expiry_interval = 1s
idempotency.stripe_ledger = transaction
idempotency.max_workers = 0
});

sub outcome
{
	my ($id) = @_;

	return sql($node, "SELECT concat_ws(' ', outcome, resource_id) FROM idempotency.stripe_lookup('refund', '$id')");
}

# An event that comes while the row of its call isn't committed yet.
my $key = sql($node, q{SELECT idempotency.stripe_idempotency_key('refund', 'early')});
my $caller = $node->background_psql('postgres');
$caller->query_safe(q{BEGIN;
	SELECT idempotency.stripe_record('refund', 'early', token) FROM idempotency.stripe_claim('refund', 'early',
		'{"method": "POST", "path": "/v1/refunds"}')});

my $body = qq({"id": "evt_early", "object": "event", "type": "refund.created", "created": 1795300000,)
  . qq( "livemode": false, "request": {"id": "req_1", "idempotency_key": "$key"},)
  . q( "data": {"object": {"id": "re_1", "object": "refund", "status": "succeeded"}}});
my $now = time();
my $signature = "t=$now,v1=" . hmac_sha256_hex("$now.$body", 'whsec_test');
is( sql($node, "SELECT stored FROM idempotency.stripe_webhook_receive(convert_to(\$\$$body\$\$, 'UTF8'),
		'$signature', '{whsec_test}')"), 't', 'an event comes before its call has committed');
is(sql($node, 'SELECT pending_key IS NOT NULL FROM idempotency.stripe_webhook_events'), 't',
	'and waits for it');
$caller->query_safe('COMMIT');
$caller->quit;
is(outcome('early'), 'unknown', 'the call is committed and unknown');

# A call whose transaction rolled back, and nobody has looked since.
my $xid = sql($node, "BEGIN;\nSELECT pg_current_xact_id();\nROLLBACK");
sql($node, qq{
	SELECT idempotency.stripe_record('refund', 'orphan', token, 're_2') FROM
		idempotency.stripe_claim('refund', 'orphan', '{"method": "POST", "path": "/v1/refunds"}');
	UPDATE idempotency.stripe_idempotency_keys SET callers = '{$xid}', callers_system = system_identifier
	FROM pg_control_system() WHERE operation_id = 'orphan';
	UPDATE idempotency.stripe_idempotency_keys SET recorded_at = recorded_at - interval '1 year'
	WHERE operation_id = 'orphan'});
is(outcome('orphan'), 'completed re_2', 'a call is recorded whose transaction has rolled back');

$node->append_conf('postgresql.conf', "idempotency.max_workers = 2\n");
$node->reload;

wait_until($node, q{SELECT outcome = 'completed' FROM idempotency.stripe_lookup('refund', 'early')},
	'a worker settles the call by the event');
is(outcome('early'), 'completed re_1', 'with the id that the event names');
is(sql($node, 'SELECT pending_key IS NULL FROM idempotency.stripe_webhook_events'), 't',
	'and the event waits no longer');
wait_until($node, q{SELECT callers = '{}' FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'orphan'},
	'a worker writes down that the transaction has rolled back');
is(sql($node, 'SELECT operation_id, resource_id FROM idempotency.stripe_orphans'), 'orphan|re_2',
	'the orphan is listed');
is(sql($node, q{SELECT request IS NOT NULL FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'orphan'}),
	't', 'and keeps what was sent, though it is old');

sql($node, q{SELECT idempotency.stripe_acknowledge('refund', 'orphan', note => 'order entered by hand')});
wait_until($node, q{SELECT request IS NULL FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'orphan'},
	'once acknowledged it loses that');
is(outcome('orphan'), 'completed re_2', 'and keeps what came of it');
is(sql($node, q{SELECT status, COALESCE(last_error, '') FROM idempotency.workers WHERE status IN ('idle', 'running')}) =~ s/^\w+//r,
	'|', 'without an error');

$node->stop;
done_testing();
