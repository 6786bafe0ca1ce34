
# On a hot standby no worker runs; with its promotion they start.  A logical
# subscriber gets its deletions from the publisher, so its own are switched off.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $primary = new_node('primary', init => { allows_streaming => 'logical' }, conf => q{
shared_preload_libraries = 'idempotency'
idempotency.expiry_interval = 1s
});
$primary->backup('backup');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($primary, 'backup', has_streaming => 1);
$standby->start;

my $workers = q{SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'idempotency%'};
my $status = 'SELECT status, next_run IS NULL, next_step IS NULL FROM idempotency.workers';

expired_rows($primary, 100);
wait_until_expired($primary, 'the primary removes');
claim($primary, 'held', lease => '1 hour');
$primary->append_conf('postgresql.conf', 'idempotency.max_workers = 0');
$primary->reload;
wait_until($primary, q{SELECT status = 'stopped' FROM idempotency.workers}, 'the primary has stopped');
expired_rows($primary, 100);
$primary->wait_for_catchup($standby, 'replay', $primary->lsn('flush'));

is(sql($standby, 'SELECT count(*) FROM idempotency.idempotency_keys'), '101',
	'what is removed on the primary is removed on the standby, and nothing else');
is(sql($standby, $workers), '0', 'no process runs there');
is(sql($standby, $status), 'standby|t|t', 'and the view says why');
is(sql($standby, q{SELECT status, lapsed FROM idempotency.lookup('held', 'test')}),
	'in_progress|f', 'lookup() works');
run_fails($standby, 'SELECT idempotency.expire()', '25006', 'expire() does not');

$primary->stop('immediate');
$standby->promote;
wait_until_expired($standby, 'promoted: the workers start by themselves');
is(sql($standby, 'SELECT key FROM idempotency.idempotency_keys'), 'held', 'promoted: and leave the rest');

# Publisher and subscriber in one cluster.
sql($standby, 'CREATE DATABASE subscriber');
sql($standby, 'ALTER DATABASE subscriber SET idempotency.expiry = off');
sql($standby, 'CREATE EXTENSION idempotency', db => 'subscriber');
sql($standby, 'CREATE PUBLICATION keys FOR TABLE idempotency.idempotency_keys');
sql($standby, q{SELECT pg_create_logical_replication_slot('keys', 'pgoutput')});
sql($standby, 'CREATE SUBSCRIPTION keys CONNECTION ' . literal($standby->connstr('postgres'))
	  . q{ PUBLICATION keys WITH (create_slot = false, slot_name = 'keys')}, db => 'subscriber');
$standby->wait_for_subscription_sync($standby, 'keys', 'subscriber');

sql($standby, 'ALTER DATABASE postgres SET idempotency.expiry = off');
wait_until($standby, q{SELECT status = 'off' FROM idempotency.workers WHERE database = 'postgres'},
	'the publisher is switched off, too');
expired_rows($standby, 50);
$standby->wait_for_catchup('keys');
my $run = sql($standby, q{SELECT clock_timestamp()});
wait_until($standby, qq{SELECT status = 'off' AND last_run > timestamptz '$run'
	FROM idempotency.workers WHERE database = 'subscriber'}, 'the subscriber is switched off');
is(sql($standby, 'SELECT count(*) FROM idempotency.idempotency_keys', db => 'subscriber'),
	'51', 'so it keeps what it has received');
sql($standby, 'ALTER DATABASE postgres RESET idempotency.expiry');
wait_until_expired($standby, 'the publisher removes');
wait_until_expired($standby, 'and so the rows of the subscriber go', db => 'subscriber');
is(sql($standby, q{SELECT removed FROM idempotency.workers WHERE database = 'subscriber'}),
	'0', 'which its worker had no part in');
# 19 has more kinds of them
is(sql($standby, q{SELECT sum(value::int) FROM pg_stat_subscription_stats s, jsonb_each_text(to_jsonb(s))
		WHERE key LIKE '%error_count'}),
	'0', 'without a conflict');

$standby->stop;

done_testing();
