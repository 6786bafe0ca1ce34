
# What is known of a call to Stripe is committed by the recorder, whatever
# becomes of the caller's transaction.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

needs_debug_points();
my $node = new_node('main', debug => 1, conf => "log_min_messages = debug1\n");

diag(sql($node, q{
	BEGIN;
	SELECT * FROM idempotency.stripe_claim('payment', 'one', '{"amount": 1}');
	ROLLBACK;
	SELECT * FROM idempotency.stripe_claim('payment', 'one', '{"amount": 1}');
	SELECT test_stripe_call('call', 'one');
	SELECT test_stripe_call('call', 'one');
	SELECT * FROM idempotency.stripe_idempotency_keys;
}));
ok(1);
$node->stop;
done_testing();
