
# Citus: a coordinator and two nodes.  idempotency_keys is distributed by
# scope, and claims go through the coordinator.  Skips where Citus isn't
# installed; sql/requests.sql has the same way through the planner on other
# tables.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

my @scopes = map { "tenant $_" } 1 .. 8;

# ---------- three servers ----------

my $node = PostgreSQL::Test::Cluster->new('coordinator');
my @workers = map { PostgreSQL::Test::Cluster->new("worker_$_") } 1, 2;
$node->init;
$node->start;
if (sql($node, q{SELECT count(*) FROM pg_available_extensions WHERE name = 'citus'}) eq '0')
{
	$node->stop;
	plan skip_all => q{Citus isn't installed};
}
$node->stop;
$_->init foreach @workers;

foreach my $each ($node, @workers)
{
	# Citus wants to be the first
	$each->append_conf('postgresql.conf', q{
listen_addresses = '127.0.0.1'
shared_preload_libraries = 'citus,idempotency'
citus.node_conninfo = 'sslmode=prefer'
citus.shard_count = 8
idempotency.expiry = off
idempotency.expiry_interval = '1s'
deadlock_timeout = 100ms
max_prepared_transactions = 100
});
	$each->start;
	sql($each, 'CREATE EXTENSION citus');
}
sql($node, join('; ', "SELECT citus_set_coordinator_host('127.0.0.1', " . $node->port . ')',
		map { "SELECT citus_add_node('127.0.0.1', " . $_->port . ')' } @workers));
sql($node, q{
	CREATE EXTENSION idempotency;
	SELECT FROM idempotency.claim('before', 'test', lease => '1 year');
	CREATE TABLE orders (tenant text, id text, PRIMARY KEY (tenant, id));
	SELECT create_distributed_table('orders', 'tenant')});
diag(sql($node, 'SELECT citus_version()'));
is(sql($_, q{SELECT extversion FROM pg_extension WHERE extname = 'idempotency'}), '1.0', 'a node has the extension, too')
	foreach @workers;

# ---------- distributed ----------

my $session = $node->background_psql('postgres', on_error_stop => 0);
is($session->query_safe(q{SELECT verdict FROM idempotency.claim('before', 'test')}), 'in_progress', 'a local table');
my $distribute = q{SELECT create_distributed_table('idempotency.idempotency_keys', 'scope'};
like(($node->psql('postgres', "$distribute)"))[2], qr/cannot colocate tables/, 'not with tenants of another collation');
sql($node, "$distribute, colocate_with => 'none')");
is($session->query_safe(q{SELECT verdict FROM idempotency.claim('before', 'test')}),
	'in_progress', 'a session that has read it directly asks the planner now');
is(sql($node, 'SELECT count(*) FROM idempotency.idempotency_keys'), '1', 'distributed with its row');
is(sql($node, q{SELECT count(DISTINCT p.groupid) FROM pg_dist_shard s JOIN pg_dist_placement p USING (shardid)
	WHERE s.logicalrelid = 'idempotency.idempotency_keys'::regclass AND p.groupid <> 0}), '2', 'on both nodes');

foreach my $scope (@scopes)
{
	my $answer = claim($node, 'k', scope => $scope, request => '{"a": 1}', lease => '1 hour');
	is("$answer->{verdict} $answer->{attempt}", 'claimed 1', "$scope: claimed");
	my $twin = claim($node, 'k', scope => $scope, request => '{"a": 1.0}');
	is($twin->{verdict}, 'in_progress', 'in progress');
	cmp_ok($twin->{retry_after}, '>', 3500, 'until its lease ends');
	is(claim($node, 'k', scope => $scope, request => '{"a": 2}')->{verdict}, 'mismatch', 'mismatch');
	my $token = $answer->{token};
	my $id = "'k', '$scope', $token";
	is(sql($node, "SELECT idempotency.extend($id) - now() > interval '59 minutes'"), 't', 'extended');
	is(sql($node, "SELECT idempotency.checkpoint($id, 'p', lease => '1 microsecond') IS NOT NULL"), 't', 'checkpoint');
	run_fails($node, "SELECT idempotency.record('k', '$scope', 1)", 'IK001', 'a stale token');
	$answer = claim($node, 'k', scope => $scope, request => '{"a": 1}', lease => '1 hour');
	is("$answer->{verdict} $answer->{attempt} $answer->{recovery_point}", 'claimed 2 p', 'taken over');
	run_fails($node, "SELECT idempotency.$_", 'IK001', "the token before: $_")
		foreach "release($id)", "extend($id)", "checkpoint($id, 'q')", "record($id)";
	is(sql($node, "SELECT idempotency.record('k', '$scope', $answer->{token}, '{\"r\": 1}', ttl => '1 hour') IS NOT NULL"),
		't', 'recorded');
	run_fails($node, "SELECT idempotency.record('k', '$scope', $answer->{token}, '{\"r\": 2}')", 'IK002', 'it is final');
	is_deeply(claim($node, 'k', scope => $scope, request => '{"a": 1}')->{response}, { r => 1 }, 'replayed');
	is(sql($node, "SELECT status, attempt, response FROM idempotency.lookup('k', '$scope')"),
		'completed|2|{"r": 1}', 'looked up');
	is(sql($node, qq{
			BEGIN;
			SELECT verdict FROM idempotency.claim('lost', '$scope');
			ROLLBACK;
			SELECT token AS t FROM idempotency.claim('lost', '$scope', lease => '1 hour') \\gset
			SELECT idempotency.release('lost', '$scope', :t);
			SELECT status IS NULL FROM idempotency.lookup('lost', '$scope')}),
		"claimed\n\nt", 'rolled back and released');
	run_fails($node, "BEGIN; SELECT FROM idempotency.claim('open', '$scope'); COMMIT", 'IK005', 'an open claim');
	is(sql($node, "SELECT status IS NULL FROM idempotency.lookup('open', '$scope')"), 't', 'it is gone from the node, too');
	sql($node, "UPDATE idempotency.idempotency_keys SET expires_at = now() - interval '1 day' WHERE scope = '$scope' AND key = 'k'");
	is(claim($node, 'k', scope => $scope, request => '{"b": 1}', lease => '1 hour')->{verdict}, 'claimed',
		'expired: free for another request');
	sql($node, qq{UPDATE idempotency.idempotency_keys SET expires_at = now() - interval '1 day'
		WHERE scope = '$scope' AND key = 'k'});
}

sql($node, q{SELECT FROM idempotency.claim('left', 'tenant 1', lease => '1 microsecond')});
my $step = sql($node, q{SELECT next_step FROM idempotency.open_claims WHERE ledger = 'request' AND lapsed});
like($step, qr/^SELECT idempotency.release\('left', 'tenant 1', \d+\);$/, 'an open claim in the view');
sql($node, $step);
is(sql($node, q{SELECT key, lapsed FROM idempotency.open_claims}), 'before|f', 'released');

# ---------- twins ----------

# seconds that a query took, and what it said
sub timed
{
	my ($who, $query) = @_;
	my $since = time;
	my $answer = $who->query_safe($query);

	return (time - $since, $answer);
}

my $twin = $node->background_psql('postgres', on_error_stop => 0);
$twin->query_safe(q{SET idempotency.wait_timeout = '20ms'});
foreach my $scope (@scopes)
{
	sql($node, "SELECT FROM idempotency.claim('lapsed', '$scope', lease => '1 microsecond')");
	foreach my $key ('twin', 'lapsed')
	{
		$session->query_safe("BEGIN; SELECT verdict FROM idempotency.claim('$key', '$scope')");
		# they would wait for ever
		is($twin->query_safe(qq{SELECT verdict, retry_after FROM idempotency.claim('$key', '$scope', wait => false);
			SELECT verdict, retry_after FROM idempotency.claim('$key', '$scope')}),
			"in_progress|1\nin_progress|1", "$key of $scope: no longer than that");
		run_fails($node, "SET lock_timeout = '20ms'; SELECT FROM idempotency.claim('$key', '$scope')", '55P03',
			q{the user's own lock_timeout});
		is($twin->query_safe(qq{BEGIN;
				SELECT verdict FROM idempotency.claim('$key', '$scope', wait => false);
				SELECT token AS t FROM idempotency.claim('another', '$scope') \\gset
				SELECT current_setting('lock_timeout') FROM idempotency.idempotency_keys WHERE scope = '$scope' AND key = 'another';
				SELECT idempotency.release('another', '$scope', :t);
				SHOW lock_timeout;
				COMMIT;
				SHOW lock_timeout}),
			"in_progress\n0\n\n0\n0", 'the transaction goes on, and has its lock_timeout');
		$session->query_safe('ROLLBACK');
	}
}
is($twin->query_safe(q{
		SET citus.propagate_set_commands = 'local';
		BEGIN;
		SET LOCAL lock_timeout = '7s';
		SELECT verdict FROM idempotency.claim('own', 'tenant 1');
		SELECT current_setting('lock_timeout') FROM idempotency.idempotency_keys WHERE scope = 'tenant 1' AND key = 'own';
		SHOW lock_timeout;
		ROLLBACK;
		RESET citus.propagate_set_commands}),
	"claimed\n7s\n7s", 'one that was handed on is put back');

$session->query_safe(q{BEGIN; SELECT verdict FROM idempotency.claim('twin', 'tenant 1')});
is($twin->query_safe(q{SELECT verdict FROM idempotency.claim('twin', 'tenant 2', lease => '1 hour')}),
	'claimed', 'another scope is another key');
$twin->query_until(qr/waiting/, "SET idempotency.wait_timeout = -1;\n\\echo waiting\nSELECT verdict FROM idempotency.claim('twin', 'tenant 1', lease => '1 hour');\n");
wait_until($node, q{SELECT count(*) = 1 FROM citus_stat_activity WHERE wait_event_type = 'Lock'}, 'it waits');
$session->query_safe('ROLLBACK');
is($twin->query_safe('SELECT 1'), "claimed\n1", 'a twin waits, and is told');

sql($node, 'CREATE TABLE told (scope text, key int, verdict text)');
$node->pgbench('--no-vacuum --client=16 --jobs=2 --transactions=25', 0, [qr/processed: 400\/400/], [qr{^(?!.*ERROR)}s],
	'many sessions', {
		'009_claims' => q{
			\set k random(1, 60)
			INSERT INTO told SELECT 'tenant ' || :k % 8, :k, c.verdict
			FROM idempotency.claim('many ' || :k, 'tenant ' || :k % 8, lease => '1 hour') c;
		}
	});
is(sql($node, q{SELECT count(*), count(*) FILTER (WHERE claimed <> 1) FROM (SELECT count(*) FILTER (WHERE verdict = 'claimed') AS claimed
	FROM told GROUP BY scope, key) k}), sql($node, 'SELECT count(DISTINCT key), 0 FROM told'), 'each key is claimed once');
is(sql($node, q{SELECT DISTINCT verdict FROM told ORDER BY 1}), "claimed\nin_progress", 'others are told');

# ---------- commits together ----------

# the roles that work don't own the ledger
sql($node, q{
	CREATE ROLE app LOGIN;
	SELECT idempotency.grant_role('app', 'application');
	GRANT SELECT, INSERT ON orders TO app;
	CREATE TABLE near (tenant text COLLATE "C", id text, PRIMARY KEY (tenant, id));
	SELECT create_distributed_table('near', 'tenant', colocate_with => 'idempotency.idempotency_keys');
	GRANT SELECT, INSERT ON near TO app;
	CREATE TABLE after (tenant text PRIMARY KEY);
	SELECT create_distributed_table('after', 'tenant')});
my $work = sub {
	my ($key, $scope, $table, $end) = @_;

	return qq{BEGIN;
		SELECT token AS t FROM idempotency.claim('$key', '$scope') \\gset
		INSERT INTO $table VALUES ('$scope', '$key');
		SELECT FROM idempotency.record('$key', '$scope', :t);
		$end};
};
foreach my $scope (@scopes)
{
	foreach my $role ('SET SESSION AUTHORIZATION app;', '')
	{
		sql($node, $role . $work->("done $role", $scope, 'orders', 'COMMIT'));
		sql($node, $role . $work->("undone $role", $scope, 'orders', 'ROLLBACK'));
	}
	sql($node, $work->('near', $scope, 'near', 'COMMIT'));
}
my $recorded = q{FROM idempotency.idempotency_keys WHERE key ~ 'done' ORDER BY scope, key};
is(sql($node, "SELECT scope, key $recorded"), sql($node, 'SELECT tenant COLLATE "C" t, id COLLATE "C" i FROM orders ORDER BY t, i'),
	'claims and work of both roles commit together, or not');
is(sql($node, "SELECT count(*) FROM (SELECT $recorded) k"), '16', 'they do');
is(sql($node, 'SELECT count(*) FROM near'), '8', q{the owner's, on the same shards});
like(($node->psql('postgres', 'SET SESSION AUTHORIZATION app;' . $work->('refused', 'tenant 1', 'near', 'COMMIT')))[2],
	qr/modified in this transaction by a different user/, 'Citus refuses those of two users');
run_fails($node, q{BEGIN; SELECT FROM idempotency.claim('p', 'tenant 1', lease => '1 hour'); PREPARE TRANSACTION 'p'},
	'0A000', 'PREPARE TRANSACTION');

# Citus commits on the node first.  What fails here afterwards takes the key
# along only where it commits in two phases: because it knows the table, or
# another one that the transaction changes.
sql($node, q{
	CREATE TABLE ordinary (n int PRIMARY KEY, v int);
	INSERT INTO ordinary VALUES (1, 0), (2, 0);
	CREATE TABLE known (LIKE ordinary INCLUDING ALL);
	INSERT INTO known TABLE ordinary;
	CREATE TABLE beside (LIKE ordinary INCLUDING ALL);
	INSERT INTO beside TABLE ordinary;
	CREATE TABLE two_phases ();
	SELECT citus_add_local_table_to_metadata('known');
	SELECT citus_add_local_table_to_metadata('two_phases')});
foreach my $case ([ 'ordinary', '', 'replay' ], [ 'known', '', 'claimed' ], [ 'beside', 'DELETE FROM two_phases;', 'claimed' ])
{
	my ($table, $more, $verdict) = @$case;

	$session->query_safe(qq{
		BEGIN ISOLATION LEVEL SERIALIZABLE;
		$more
		SELECT token AS t FROM idempotency.claim('skew', '$table') \\gset
		SELECT v FROM $table WHERE n = 1;
		UPDATE $table SET v = 1 WHERE n = 2;
		SELECT FROM idempotency.record('skew', '$table', :t)});
	sql($node, qq{
		BEGIN ISOLATION LEVEL SERIALIZABLE;
		SELECT v FROM $table WHERE n = 2;
		UPDATE $table SET v = 1 WHERE n = 1;
		COMMIT});
	$session->query('COMMIT');
	like($session->{stderr}, qr/could not serialize access/, "a transaction on $table fails");
	$session->{stderr} = '';
	is(sql($node, "SELECT v FROM $table ORDER BY n"), "1\n0", 'at its COMMIT');
	is(claim($node, 'skew', scope => $table, lease => '1 hour')->{verdict}, $verdict, "its key: $verdict");
}

# the nodes are at READ COMMITTED whatever the transaction is at
$session->query_safe('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM ordinary');
sql($node, q{SELECT token AS t FROM idempotency.claim('later', 'tenant 1', lease => '1 hour') \gset
	SELECT idempotency.record('later', 'tenant 1', :t)});
is($session->query_safe(q{SELECT verdict FROM idempotency.claim('later', 'tenant 1'); ROLLBACK}), 'replay',
	'what has committed after the snapshot is replayed');
like(($node->psql('postgres', 'SELECT idempotency.release(key, scope, token) FROM idempotency.idempotency_keys'))[2],
	qr/cannot execute a distributed query from a query on a shard/, 'not in a query of a distributed table');
like(($node->psql('postgres', q{SELECT undistribute_table('idempotency.idempotency_keys')}))[2],
	qr/an extension depends on it/, 'distributed for good');

# ---------- other nodes ----------

is(claim($node, 'node', scope => $_, lease => '1 hour')->{verdict}, 'claimed', 'at the coordinator') foreach @scopes;
foreach my $worker (@workers)
{
	my $there = $worker->background_psql('postgres', on_error_stop => 0);

	foreach my $scope (@scopes)
	{
		is(claim($worker, 'node', scope => $scope)->{verdict}, 'in_progress', 'from another node');
		$session->query_safe("BEGIN; SELECT verdict FROM idempotency.claim('node twin', '$scope')");
		is($there->query_safe("SELECT verdict FROM idempotency.claim('node twin', '$scope', wait => false)"),
			'in_progress', 'its twin');
		$session->query_safe('ROLLBACK');
		my $answer = claim($worker, 'of ' . $worker->name, scope => $scope, lease => '1 hour');
		is($answer->{verdict}, 'claimed', 'claimed there');
		sql($node, 'SELECT idempotency.record(' . literal('of ' . $worker->name) . ", '$scope', $answer->{token})");
		is(claim($worker, 'of ' . $worker->name, scope => $scope)->{verdict}, 'replay', 'and recorded here');
	}
	$there->quit;
}
isnt(sql($workers[0], q{SELECT idempotency.operation_uuid('k', 's')}), sql($node, q{SELECT idempotency.operation_uuid('k', 's')}),
	'each has a namespace of its own');

# a node that is down
$workers[0]->stop;
my ($told, $failed) = (0, 0);
foreach my $scope (@scopes)
{
	my (undef, $out, $err) = $node->psql('postgres', "SELECT verdict FROM idempotency.claim('down', '$scope', lease => '1 hour')");

	$told++ if $out eq 'claimed' && $err eq '';
	$failed++ if $out eq '' && $err =~ /ERROR/;
}
ok($told > 0 && $failed > 0 && $told + $failed == @scopes, "a node is down: $told claimed, $failed errors");
$workers[0]->start;
my %now;
$now{ claim($node, 'down', scope => $_, lease => '1 hour')->{verdict} }++ foreach @scopes;
is_deeply(\%now, { claimed => $failed, in_progress => $told }, 'and up again');

# ---------- expiry ----------

my $due = q{SELECT count(*) FROM idempotency.idempotency_keys WHERE expires_at < now()};
is(sql($node, $due), '8', 'rows are due');
$session->quit;
$session = $node->background_psql('postgres', on_error_stop => 0);
$session->query_safe(q{BEGIN; SELECT verdict FROM idempotency.claim('k', 'tenant 1', lease => '1 hour')});
is(sql($node, q{SET statement_timeout = '60s'; SELECT removed FROM idempotency.expire(1000) WHERE removed > 0}), '7', 'by hand, but for one in use');
$session->query_safe('ROLLBACK');
is(sql($node, q{SELECT removed FROM idempotency.expire(1000) WHERE removed > 0}), '1', 'and that one');
is(sql($node, q{BEGIN; SELECT FROM idempotency.expire();
	SELECT DISTINCT current_setting('lock_timeout') FROM idempotency.idempotency_keys; COMMIT}), "0", 'lock_timeout is as before');

expired_rows($node, 500);
sql($node, q{UPDATE idempotency.idempotency_keys SET recorded_at = claimed_at, expires_at = now() - interval '1 day', http_status = 200,
	lease = NULL, lease_expires_at = NULL WHERE key ~ '^many'});
$session->query_safe(q{BEGIN; SELECT verdict FROM idempotency.claim('expired250', 'test', lease => '1 hour')});
foreach my $each ($node, @workers)
{
	$each->append_conf('postgresql.conf', "idempotency.expiry = on\n");
	$each->reload;
}
wait_until($node, "SELECT ($due) = 1", 'by workers of all nodes, but for one in use');
$session->query_safe('ROLLBACK');
wait_until($node, "SELECT ($due) = 0", 'and that one');
is(sql($node, q{SELECT removed > 0, refused, last_error FROM idempotency.workers}), 't|0|', q{the coordinator's worker has no complaint});
ok(sql($node, q{SELECT count(*) FROM idempotency.idempotency_keys}) > 0, 'others stay');

$session->quit;
$twin->quit;
$_->stop foreach $node, @workers;
done_testing();
