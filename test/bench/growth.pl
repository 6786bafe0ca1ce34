#
# test/bench/growth.pl
#
# The part "growth" of test/bench/run: what is looked at again and again, while
# rows that are kept for ever pile up.  Two databases have the same to show and
# to do, and differ in how much is settled: a small ledger and a large one, of
# operations and of events.
#
# What counts are the pages that are looked at, which repeat; the times are
# medians and for the eye.
#
# Environment: BENCH_GROWTH_ROWS, operations of the large one (1,000,000; a
# tenth as many events).
#
use strict;
use warnings;

use JSON::PP ();

our ($dir);

my $growth_rows = $ENV{BENCH_GROWTH_ROWS} || 1_000_000;
my $small = 10_000;
my $open = 30;					# of each kind that somebody has to see to
my $growth_rounds = 9;

# no pass of a worker unless it is asked for
my $growth_options = '-c shared_preload_libraries=idempotency -c max_wal_size=16GB'
	. ' -c shared_buffers=256MB -c idempotency.expiry_interval=1d';

# Operations that were settled in the past year, a day and more ago, their bodies
# gone; every fiftieth failed.
sub settled_operations
{
	my ($n) = @_;
	return 'INSERT INTO idempotency.stripe_idempotency_keys (token, created_at, claimed_at, first_sent_at,'
		. ' recorded_at, attempt, generation, http_status, outcome, uncertain, livemode, account,'
		. ' operation_type, operation_id, idempotency_key, resource_id, resource_type, request_id, fingerprint)'
		. " SELECT n, t, t, t, t + interval '1 s', 1, 1, CASE WHEN n % 50 = 0 THEN 402 ELSE 200 END,"
		. " (CASE WHEN n % 50 = 0 THEN 'failed' ELSE 'completed' END)::idempotency.outcome, false, true, '',"
		. " 'payment', 'order ' || n, 'payment:order ' || n || ':018f3c9e-7b1a-7c3d-9e2f-0123456789ab',"
		. " CASE WHEN n % 50 <> 0 THEN 'pi_3' || md5(n::text) END, 'payment_intent', 'req_' || n,"
		. ' sha256(n::text::bytea)'
		. " FROM (SELECT n, now() - interval '1 day' - interval '1 year' * (1 - n::float8 / $n) AS t"
		. " FROM generate_series(1, $n) n) o";
}

# $open of each: unknown, in progress and lapsed, mismatch, orphans, declined
# calls whose caller has rolled back, bodies that are due
sub open_operations
{
	return 'INSERT INTO idempotency.stripe_idempotency_keys (token, created_at, claimed_at, first_sent_at,'
		. ' recorded_at, attempt, generation, outcome, uncertain, livemode, account, operation_type, operation_id,'
		. ' idempotency_key, request, callers, callers_system)'
		. " SELECT n, t, t, t, CASE WHEN kind <> 'in_progress' THEN t END, 1, 1, o::idempotency.outcome, false,"
		. " true, '', kind, n::text, kind || ':' || n || ':018f3c9e-7b1a-7c3d-9e2f-0123456789ab',"
		. " CASE WHEN kind IN ('unknown', 'due') THEN '{\"method\": \"POST\", \"path\": \"/v1/refunds\"}'::jsonb END,"
		. " CASE WHEN kind IN ('orphan', 'declined') THEN '{}'::xid8[] END, 1"
		. " FROM generate_series(1, $open) n, (VALUES ('unknown', 'unknown'), ('in_progress', 'in_progress'),"
		. " ('mismatch', 'mismatch'), ('orphan', 'completed'), ('declined', 'not_executed'),"
		. " ('due', 'completed')) k (kind, o), (SELECT now() - interval '60 days' AS t) u";
}

sub events
{
	my ($n) = @_;
	return 'INSERT INTO idempotency.stripe_webhook_events (token, received_at, claimed_at, processed_at, created,'
		. ' attempts, next_attempt_at, success, livemode, account, stripe_event_id, consumer, event_type, object_type, object_id)'
		. " SELECT n, t, t, CASE WHEN n > $open THEN t END, t, 1, t, CASE WHEN n > $open THEN true END, true, '',"
		. " 'evt_1' || md5(n::text), '', 'payment_intent.succeeded', 'payment_intent', 'pi_3' || md5(n::text)"
		. " FROM (SELECT n, now() - interval '1 day' * (1 - n::float8 / $n) AS t FROM generate_series(1, $n) n) e";
}

# Pages that a statement looks at, and milliseconds: the second time in a session,
# which has met all of them before.
sub pages_of
{
	my ($query) = @_;
	my $explain = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) $query";
	my ($first, $second) = split(/^(?=\[)/m, psql('-c', $explain, '-c', $explain));
	my $plan = JSON::PP::decode_json($second)->[0];
	return ($plan->{Plan}{'Shared Hit Blocks'} + $plan->{Plan}{'Shared Read Blocks'},
		$plan->{'Execution Time'});
}

# Pages of Stripe's ledger and its indexes that have been looked at.
my $ledger_pages = q{SELECT sum(heap_blks_hit + heap_blks_read + idx_blks_hit + idx_blks_read)
	FROM pg_statio_user_tables WHERE relname = 'stripe_idempotency_keys'};

# expire() reads the other ledgers, too, whose rows go in time.
sub pages_of_expiry
{
	my $before = ask($ledger_pages);
	psql('-c', 'BEGIN; SELECT * FROM idempotency.expire(); ROLLBACK');
	return (ask($ledger_pages) - $before, undef);
}

# What one pass of a worker looks at.
sub pages_of_pass
{
	my $done = q{SELECT status = 'idle' AND next_run > now() + interval '1 hour'
		FROM idempotency.workers WHERE database = 'bench'};

	# the first one does what there is to do
	wait_until($done, 600);
	stop_server();
	start_server("$dir/growth", $growth_options . ' -c idempotency.max_workers=0');
	my $before = ask($ledger_pages);
	psql('-c', 'ALTER SYSTEM SET idempotency.max_workers = 2');
	stop_server();
	start_server("$dir/growth", $growth_options);
	wait_until($done, 600);
	return ask($ledger_pages) - $before;
}

sub growth
{
	my @statements = (
		[ 'stripe_unknown', 'SELECT * FROM idempotency.stripe_unknown' ],
		[ 'stripe_orphans', 'SELECT * FROM idempotency.stripe_orphans' ],
		[ 'open_claims, those of Stripe',
			q{SELECT * FROM idempotency.open_claims WHERE ledger = 'stripe'} ],
		[ 'stripe_webhook_pending', 'SELECT * FROM idempotency.stripe_webhook_pending' ],
		[ "expire(), $open bodies due" ],
	);
	my %got;

	for my $n ($small, $growth_rows)
	{
		fresh_copy('growth');
		start_server("$dir/growth", "$growth_options -c idempotency.max_workers=0");
		psql('-c', 'TRUNCATE idempotency.idempotency_keys', '-c', settled_operations($n),
			'-c', open_operations(), '-c', events($n / 10), '-c', 'VACUUM (ANALYZE)', '-c', 'CHECKPOINT');
		for my $statement (@statements)
		{
			my ($what, $query) = @$statement;
			my ($pages, @times);

			for (1 .. $growth_rounds)
			{
				($pages, my $time) = defined $query ? pages_of($query) : pages_of_expiry();
				push @times, $time // 0;
			}
			push @{ $got{$what} }, $pages, defined $query ? sprintf('%.2f', median(@times)) : '';
		}
		stop_server();
		start_server("$dir/growth", $growth_options);
		push @{ $got{'a pass of the worker, nothing due'} }, pages_of_pass(), '';
		stop_server();
		remove_tree("$dir/growth");
	}

	report_head('What is kept for ever, and what it costs', 'statement', map { (
		commas($_) . ' settled operations, pages', 'ms') } $small, $growth_rows);
	report_line($_, @{ $got{$_} }) for (map { $_->[0] } @statements), 'a pass of the worker, nothing due';
	return;
}

1;
