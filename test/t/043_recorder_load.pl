
# A hundred callers at once share the recorder's commits, and none is lost.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my ($clients, $calls) = (100, 20);
my $node = new_node('main', preload => 1, conf => q{
max_connections = 120
fsync = on
autovacuum = off
log_statement = none
idempotency.stripe_record_timeout = 60s
});
my $script = "$PostgreSQL::Test::Utils::tmp_check/claim.sql";

append_to_file($script, q{
\set id :client_id * 1000000 + random(1, 1000000)
BEGIN;
SELECT verdict FROM idempotency.stripe_claim('load', (:id)::text, '{"amount": 1}');
ROLLBACK;
});

my $commits = q{SELECT xact_commit FROM pg_stat_database WHERE datname = 'postgres'};
my $before = sql($node, $commits);
my ($out) = run_command([ 'pgbench', '-n', '-c', $clients, '-j', 2, '-t', $calls, '-f', $script,
		'-h', $node->host, '-p', $node->port, 'postgres' ]);
like($out, qr{number of transactions actually processed: \Q${\($clients * $calls)}/${\($clients * $calls)}\E},
	'everybody is answered');
my $claimed = sql($node, q{SELECT count(*) FROM idempotency.stripe_idempotency_keys});
cmp_ok($claimed, '>', $clients * $calls * 0.95, 'what was claimed is there, though all have rolled back');

# the callers rolled back, so these are the recorder's and a few of ours
$node->poll_query_until('postgres', q{SELECT NOT EXISTS (SELECT FROM pg_stat_activity
	WHERE backend_type = 'idempotency recorder')}) or die 'the recorder stays';
my $commits_made = sql($node, $commits) - $before;
note "$commits_made commits for $claimed calls; ", $out =~ /(latency average = .*)/;
cmp_ok($commits_made, '<', $claimed / 4, 'many calls a commit');
is(sql($node, q{SELECT count(*) FROM idempotency.stripe_idempotency_keys WHERE callers <> '{}'}) < $claimed / 2,
	'1', 'meanwhile the fate of most callers is written down');

$node->stop;

done_testing();
