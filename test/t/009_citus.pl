
# Citus, on a single node: idempotency_keys is distributed by scope, and the
# main cases go through the coordinator.  Skips where Citus isn't installed;
# sql/requests.sql has the same way through the planner on other tables.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = PostgreSQL::Test::Cluster->new('main');
$node->init;
$node->start;
if (sql($node, q{SELECT count(*) FROM pg_available_extensions WHERE name = 'citus'}) eq '0')
{
	$node->stop;
	plan skip_all => q{Citus isn't installed};
}
# Citus wants to be the first
$node->append_conf('postgresql.conf', "shared_preload_libraries = 'citus,idempotency'\nidempotency.expiry = off\n");
$node->restart;
sql($node, q{
	CREATE EXTENSION citus;
	SELECT citus_set_coordinator_host('localhost', current_setting('port')::int);
	CREATE EXTENSION idempotency;
	SELECT FROM idempotency.claim('before', 'test', lease => '1 year')});
my $session = $node->background_psql('postgres', on_error_stop => 0);
is($session->query_safe(q{SELECT verdict FROM idempotency.claim('before', 'test')}), 'in_progress', 'a local table');
sql($node, q{SELECT create_distributed_table('idempotency.idempotency_keys', 'scope')});
is($session->query_safe(q{SELECT verdict FROM idempotency.claim('before', 'test')}),
	'in_progress', 'a session that has read it directly asks the planner now');
is(sql($node, 'SELECT count(*) FROM ONLY idempotency.idempotency_keys'), '1', 'distributed with its row');

foreach my $scope (map { "tenant $_" } 1 .. 8)
{
	my $answer = claim($node, 'k', scope => $scope, request => '{"a": 1}', lease => '1 hour');
	is("$answer->{verdict} $answer->{attempt}", 'claimed 1', "$scope: claimed");
	is(claim($node, 'k', scope => $scope, request => '{"a": 1.0}')->{verdict}, 'in_progress', 'in progress');
	is(claim($node, 'k', scope => $scope, request => '{"a": 2}')->{verdict}, 'mismatch', 'mismatch');
	my $token = $answer->{token};
	my $id = "'k', '$scope', $token";
	is(sql($node, "SELECT idempotency.extend($id) - now() > interval '59 minutes'"), 't', 'extended');
	is(sql($node, "SELECT idempotency.checkpoint($id, 'p', lease => '1 microsecond') IS NOT NULL"), 't', 'checkpoint');
	run_fails($node, "SELECT idempotency.record('k', '$scope', 1)", 'IK001', 'a stale token');
	$answer = claim($node, 'k', scope => $scope, request => '{"a": 1}', lease => '1 hour');
	is("$answer->{verdict} $answer->{attempt} $answer->{recovery_point}", 'claimed 2 p', 'taken over');
	run_fails($node, "SELECT idempotency.release($id)", 'IK001', 'the token before');
	is(sql($node, "SELECT idempotency.record('k', '$scope', $answer->{token}, '{\"r\": 1}', ttl => '1 hour') IS NOT NULL"),
		't', 'recorded');
	is_deeply(claim($node, 'k', scope => $scope, request => '{"a": 1}')->{response}, { r => 1 }, 'replayed');
	is(sql($node, qq{
			BEGIN;
			SELECT verdict FROM idempotency.claim('lost', '$scope');
			ROLLBACK;
			SELECT token AS t FROM idempotency.claim('lost', '$scope', lease => '1 hour') \\gset
			SELECT idempotency.release('lost', '$scope', :t);
			SELECT status IS NULL FROM idempotency.lookup('lost', '$scope')}),
		"claimed\n\nt", 'rolled back and released');
	sql($node, "UPDATE idempotency.idempotency_keys SET expires_at = now() - interval '1 day' WHERE scope = '$scope' AND key = 'k'");
	is(claim($node, 'k', scope => $scope, request => '{"b": 1}', lease => '1 hour')->{verdict}, 'claimed',
		'expired: free for another request');
	sql($node, qq{UPDATE idempotency.idempotency_keys SET expires_at = now() - interval '1 day'
		WHERE scope = '$scope' AND key = 'k'});
}

# a twin waits on the node that holds the row
$session->query_safe(q{BEGIN; SELECT verdict FROM idempotency.claim('twin', 'tenant 1')});
my $twin = $node->background_psql('postgres', on_error_stop => 0);
is($twin->query_safe(q{SET idempotency.wait_timeout = '20ms'; SELECT verdict FROM idempotency.claim('twin', 'tenant 2', lease => '1 hour')}),
	'claimed', 'another scope is another key');
$twin->query_until(qr/waiting/, "SET idempotency.wait_timeout = -1;\n\\echo waiting\nSELECT verdict FROM idempotency.claim('twin', 'tenant 1', lease => '1 hour');\n");
$session->query_safe('ROLLBACK');
is($twin->query_safe('SELECT 1'), "claimed\n1", 'a twin waits, and is told');
$session->quit;
$twin->quit;

is(sql($node, 'SELECT removed FROM idempotency.expire(1000) WHERE removed > 0'), '8', 'expired rows go');
$node->stop;
done_testing();
