
# Many clients on few keys, in every way that there is, and a checker.
#
# Each transaction writes down what it was told and what it did, in the same
# transaction, so that exactly what was committed is in the log; the server
# keeps the moment of each commit.  Afterwards queries look for a contradiction:
# two claims of a key that overlap, a replay that nobody recorded, an effect
# without a claim.  At the end the log is forged, once for each of them, to
# show that it would be found.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $clients = 64;
my $transactions = 300;

my $node = new_node('main', conf => q{
track_commit_timestamp = on
max_connections = 100
max_prepared_transactions = 80
deadlock_timeout = 20ms
log_statement = none
});

# Times: a call was made between "before" and "after", by the server's clock.
sql($node, q{
CREATE TABLE log (
	event text NOT NULL,	-- claim, record, release, extend, checkpoint, stale
	key int NOT NULL,
	token bigint,
	verdict idempotency.verdict,
	request int,
	attempt int,
	recovery_point text,
	http_status int,
	response jsonb,
	response_headers jsonb,
	response_body bytea,
	retry_after int,
	lease_expires_at timestamptz,
	expires_at timestamptz,
	before timestamptz NOT NULL,
	after timestamptz NOT NULL DEFAULT clock_timestamp(),
	xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
	snapshot pg_snapshot NOT NULL DEFAULT pg_current_snapshot());

-- what the operations do
CREATE TABLE effects (key int, token bigint);

-- what the holder of a token does next; span is a time to live or a lease
CREATE FUNCTION step(step text, k int, t bigint, span interval DEFAULT NULL) RETURNS void AS $$
DECLARE
	e log;
BEGIN
	e.before := clock_timestamp();
	IF step = 'record' THEN
		e.response := jsonb_build_object('nonce', gen_random_uuid());
		e.response_headers := jsonb_build_object('etag', random());
		e.response_body := sha256(random()::text::bytea);
		e.http_status := (ARRAY[200, 201, 422, 500])[1 + floor(random() * 4)];
		INSERT INTO effects VALUES (k, t);
		e.expires_at := idempotency.record('key ' || k, 'test', t, e.response,
			e.http_status, e.response_headers, e.response_body, span);
	ELSIF step = 'release' THEN
		PERFORM idempotency.release('key ' || k, 'test', t);
	ELSIF step = 'extend' THEN
		e.lease_expires_at := idempotency.extend('key ' || k, 'test', t, span);
	ELSE
		e.recovery_point := 'point ' || random();
		e.lease_expires_at := idempotency.checkpoint('key ' || k, 'test', t, e.recovery_point,
			to_jsonb(k), span);
	END IF;
	INSERT INTO log (event, key, token, recovery_point, http_status, response,
			response_headers, response_body, lease_expires_at, expires_at, before)
		VALUES (step, k, t, e.recovery_point, e.http_status, e.response,
			e.response_headers, e.response_body, e.lease_expires_at, e.expires_at, e.before);
END;
$$ LANGUAGE plpgsql;

-- the same where somebody else may have taken over
CREATE FUNCTION try_step(step text, k int, t bigint, span interval DEFAULT NULL) RETURNS void AS $$
DECLARE
	began timestamptz := clock_timestamp();
BEGIN
	PERFORM step(step, k, t, span);
EXCEPTION WHEN SQLSTATE 'IK001' THEN
	INSERT INTO log (event, key, token, before) VALUES ('stale', k, t, began);
END;
$$ LANGUAGE plpgsql;
});

# A claim, which sets :won and :token; lease is SQL, or nothing.
sub claim_sql
{
	my ($lease, $key) = @_;
	my $arguments = join(', ', q{'test'}, 'to_jsonb(:request::int)', 'wait => :wait = 1',
		$lease ? "lease => $lease" : ());

	$key //= ':key';
	return qq{
INSERT INTO log (event, key, token, verdict, request, attempt, recovery_point, http_status, response, response_headers, response_body, retry_after, lease_expires_at, expires_at, before, after) SELECT 'claim', $key, token, verdict, :request, attempt, recovery_point, http_status, response, response_headers, response_body, retry_after, lease_expires_at, expires_at, statement_timestamp(), clock_timestamp() FROM idempotency.claim('key ' || $key, $arguments) RETURNING coalesce(token, 0) AS token, (verdict = 'claimed')::int AS won \\gset};
}

my $ttl = q{:ttl * interval '1 ms'};
my $lease = q{:lease * interval '1 ms'};
my $set = q{
\set key case when random(1, 3) = 1 then random(1, 1000) else random_zipfian(1, 1000, 1.3) end
\set other random(1, 20)
\set other case when :other = :key then 21 else :other end
\set request case when random(1, 20) = 1 then 2 else 1 end
\set wait random(0, 1)
\set ttl case when random(1, 2) = 1 then random(1, 10) else random(100, 1000) end
\set lease random(1, 40)
\set end random(1, 10)
};

# Ways to use a key; BEGIN is that of one of the isolation levels.
my %flow = (

	# claim, work, record, commit: or roll back, or release
	transaction => [ 6, $set . q{
BEGIN;
SELECT 1;} . claim_sql() . qq{
\\if :won
\\if :end >= 9
\\sleep :lease ms
\\endif
\\if :end <= 2
SELECT step('release', :key, :token);
\\else
SELECT step('record', :key, :token, $ttl);
\\endif
\\endif
\\if :end = 10
ROLLBACK;
\\else
COMMIT;
\\endif
} ],

	# a claim rolled back to a savepoint, and another in its place
	savepoint => [ 1, $set . q{
BEGIN;
SAVEPOINT s;} . claim_sql() . q{
ROLLBACK TO s;
\set wait 1} . claim_sql() . qq{
\\if :won
SAVEPOINT s;
SELECT step('record', :key, :token, $ttl);
ROLLBACK TO s;
SELECT step('record', :key, :token, $ttl);
\\endif
COMMIT;
} ],

	# two keys, in any order: a deadlock now and then.  Never one key twice: a
	# transaction may claim again what it has recorded and let expire, which the
	# checker would take for an overlap.
	two_keys => [ 1, $set . q{
BEGIN;} . claim_sql() . qq{
\\if :won
SELECT step('record', :key, :token, $ttl);
\\endif} . claim_sql(undef, ':other') . qq{
\\if :won
SELECT step('record', :other, :token, $ttl);
\\endif
COMMIT;
} ],

	# a prepared transaction
	prepared => [ 1, $set . q{
BEGIN;} . claim_sql() . qq{
\\if :won
SELECT step('record', :key, :token, $ttl);
\\endif
PREPARE TRANSACTION 'client :client_id';
\\if :end <= 3
ROLLBACK PREPARED 'client :client_id';
\\else
COMMIT PREPARED 'client :client_id';
\\endif
} ],

	# claim with a lease that may or may not be long enough, then do the rest
	lease => [ 6, $set . q{
BEGIN;} . claim_sql($lease) . qq{
COMMIT;
\\if :won
\\if :end <= 2
SELECT try_step('extend', :key, :token, $lease);
\\elif :end <= 4
SELECT try_step('checkpoint', :key, :token);
\\elif :end <= 8
\\sleep :lease ms
\\endif
BEGIN;
\\if :end = 10
SELECT try_step('release', :key, :token);
\\else
SELECT try_step('record', :key, :token, $ttl);
\\endif
\\if :end = 9
ROLLBACK;
\\else
COMMIT;
\\endif
\\endif
} ],

	# die with the claim
	abandon => [ 2, $set . q{
BEGIN;} . claim_sql($lease) . qq{
\\if :won
\\if :end <= 5
SELECT step('checkpoint', :key, :token, $lease);
\\endif
\\endif
COMMIT;
} ]);

# What removes expired keys, in small batches and around locked rows.
my $expire = q{
DELETE FROM idempotency.idempotency_keys WHERE ctid = ANY (ARRAY(SELECT ctid FROM idempotency.idempotency_keys WHERE expires_at <= clock_timestamp() LIMIT 10 FOR UPDATE SKIP LOCKED));
};

my %file = ('expire.sql@1' => $expire);
my %level = (
	'read committed' => 3,
	'repeatable read' => 1,
	'serializable' => 1);
foreach my $level (sort keys %level)
{
	foreach my $name (sort keys %flow)
	{
		my ($weight, $script) = @{ $flow{$name} };

		$file{ ($level =~ s/ /_/r) . "_$name.sql\@" . $weight * $level{$level} } =
		  $script =~ s/^BEGIN;/BEGIN ISOLATION LEVEL $level;/gmr;
	}
}
my $all = $clients * $transactions;
$node->pgbench(
	"--no-vacuum --client=$clients --jobs=2 --transactions=$transactions --max-tries=100"
	  . ' --random-seed=5',
	0,
	[qr{number of transactions actually processed: $all/$all\b}],
	[qr{^(?!.*ERROR)}s],
	"$clients clients", \%file);

# The claims that were answered "claimed", with all that became of them.
my $claims = q{
CREATE TABLE claims AS
	SELECT c.key, c.token, c.request, c.attempt, c.recovery_point, c.before, c.after, c.xid,
		pg_xact_commit_timestamp(c.xid::xid) AS committed,
		l.lease_expires_at,	-- the last one
		l.recovery_point AS left_point,
		r.expires_at, e.xid AS finish_xid, e.event AS finish,
		CASE
			-- until then nobody else can have it
			WHEN r.token IS NOT NULL
				THEN greatest(r.expires_at, pg_xact_commit_timestamp(r.xid::xid))
			WHEN e.token IS NOT NULL THEN pg_xact_commit_timestamp(e.xid::xid)
			ELSE greatest(l.lease_expires_at, pg_xact_commit_timestamp(l.xid::xid))
		END AS held_until
	FROM log c
		LEFT JOIN log r ON r.token = c.token AND r.event = 'record'
		LEFT JOIN log e ON e.token = c.token AND e.event IN ('record', 'release')
		LEFT JOIN LATERAL (
			SELECT lease_expires_at, xid,
				(array_remove(array_agg(recovery_point) OVER (ORDER BY after), NULL))[
					cardinality(array_remove(array_agg(recovery_point) OVER (ORDER BY after), NULL))]
					AS recovery_point
			FROM log l
			WHERE l.token = c.token AND l.event IN ('claim', 'extend', 'checkpoint')
			ORDER BY after DESC LIMIT 1) l ON true
	WHERE c.event = 'claim' AND c.verdict = 'claimed';
CREATE INDEX ON claims (key);
CREATE INDEX ON claims (token);
CREATE TABLE lives AS
	SELECT *, row_number() OVER w AS n,
		lag(finish) OVER w AS previous_finish,
		lag(attempt) OVER w AS previous_attempt,
		lag(left_point) OVER w AS previous_point,
		lag(request) OVER w AS previous_request,
		max(held_until) OVER (w ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS not_before,
		lead(xid) OVER w AS next_xid,
		lead(token) OVER w IS NULL AS last
	FROM claims
	WINDOW w AS (PARTITION BY key ORDER BY after);
CREATE INDEX ON lives (key);
ANALYZE;
};

# Each query returns what must not be; the statement after it forges that.
my @checks = (
	[ 'no two claims of a key overlap',
		q{SELECT key FROM lives WHERE after < not_before},
		q{INSERT INTO log (event, key, token, verdict, request, attempt, before, after, xid)
			SELECT event, key, -token, verdict, request, 1, after, after + interval '1 us', xid
			FROM log WHERE verdict = 'claimed' AND token IN (SELECT token FROM log WHERE event = 'record')
			LIMIT 1} ],
	[ 'a token is given out once',
		q{SELECT token FROM claims GROUP BY token HAVING count(*) > 1},
		q{UPDATE log SET token = (SELECT min(token) FROM log) WHERE verdict = 'claimed'} ],
	[ 'attempts count from 1 in every life',
		q{SELECT key FROM lives WHERE attempt <>
			CASE WHEN n = 1 OR previous_finish IS NOT NULL THEN 1 ELSE previous_attempt + 1 END},
		q{UPDATE log SET attempt = attempt + 1 WHERE verdict = 'claimed'} ],
	[ 'a life has one request',
		q{SELECT key FROM lives WHERE attempt > 1 AND request <> previous_request},
		q{UPDATE log SET request = 3 - request WHERE verdict = 'claimed' AND attempt = 2} ],
	[ 'a successor has the last recovery point, a new life none',
		q{SELECT key FROM lives WHERE recovery_point IS DISTINCT FROM
			CASE WHEN attempt > 1 THEN previous_point END},
		q{UPDATE log SET recovery_point = 'point' WHERE verdict = 'claimed' AND attempt = 1} ],
	[ 'a claim is recorded or released once',
		q{SELECT token FROM log WHERE event IN ('record', 'release')
			GROUP BY token HAVING count(*) > 1},
		q{INSERT INTO log SELECT * FROM log WHERE event = 'record' LIMIT 1} ],
	[ 'only who claimed it does anything with a key',
		q{SELECT key FROM log l WHERE event IN ('record', 'release', 'extend', 'checkpoint')
			AND NOT EXISTS (SELECT FROM claims c WHERE c.token = l.token AND c.key = l.key)},
		q{UPDATE log SET token = 1 WHERE event = 'release'} ],
	[ 'and nobody after a successor has it',
		q{SELECT l.key FROM log l JOIN claims c USING (key, token)
			WHERE l.event IN ('record', 'release', 'extend', 'checkpoint')
			AND EXISTS (SELECT FROM claims s WHERE s.key = c.key AND s.after > c.after
				AND s.committed < l.before)},
		q{UPDATE log SET before = now(), after = now() WHERE event = 'record'} ],
	[ 'who is told so has a successor',
		q{SELECT l.key FROM log l JOIN claims c USING (key, token)
			WHERE l.event = 'stale'
			AND NOT EXISTS (SELECT FROM claims s WHERE s.key = c.key AND s.after > c.after
				AND s.committed <= l.after)},
		q{INSERT INTO log (event, key, token, before, after)
			SELECT 'stale', key, token, before, after FROM log WHERE verdict = 'claimed'} ],
	[ 'a replay is what was recorded, committed and not expired',
		q{SELECT l.key FROM log l WHERE verdict = 'replay' AND NOT EXISTS (
			SELECT FROM log r JOIN claims c USING (key, token)
			WHERE r.event = 'record' AND r.key = l.key
			AND r.response->>'nonce' = l.response->>'nonce' AND r.response = l.response AND r.response_headers = l.response_headers
			AND r.response_body = l.response_body AND r.http_status = l.http_status
			AND r.expires_at = l.expires_at AND c.attempt = l.attempt AND c.request = l.request
			AND l.before < r.expires_at
			AND (r.xid = l.xid OR pg_xact_commit_timestamp(r.xid::xid) <= l.after))},
		q{UPDATE log SET http_status = http_status + 1 WHERE ctid =
			(SELECT ctid FROM log WHERE verdict = 'replay' LIMIT 1)} ],
	# not by times of commit: a commit is seen only some time after that
	[ 'a mismatch is with a request that is there',
		q{SELECT l.key FROM log l WHERE verdict = 'mismatch' AND NOT EXISTS (
			SELECT FROM lives c
			WHERE c.key = l.key AND c.request <> l.request
			AND (c.xid = l.xid OR c.committed <= l.after)
			AND CASE
				WHEN c.finish IS NULL
					THEN c.next_xid IS NULL OR NOT pg_visible_in_snapshot(c.next_xid, l.snapshot)
				ELSE NOT pg_visible_in_snapshot(c.finish_xid, l.snapshot)
					OR c.finish = 'record' AND l.before <= c.expires_at
				END)},
		q{INSERT INTO log (event, key, verdict, request, before, after, xid)
			SELECT event, key, 'mismatch', request, after, after, xid
			FROM log WHERE verdict = 'claimed' ORDER BY after LIMIT 1} ],
	[ 'who may not run it learns nothing and gets no token',
		q{SELECT key FROM log WHERE event = 'claim' AND
			(verdict = 'claimed') IS DISTINCT FROM (token IS NOT NULL)
			OR verdict IN ('in_progress', 'mismatch')
			AND num_nonnulls(attempt, recovery_point, response, response_headers, response_body,
				lease_expires_at, expires_at) > 0
			OR verdict = 'in_progress' AND (http_status = 409 AND retry_after >= 1) IS NOT TRUE
			OR verdict = 'mismatch' AND (http_status = 422 AND retry_after IS NULL) IS NOT TRUE
			OR verdict = 'unknown'},
		q{UPDATE log SET response = 'null' WHERE verdict = 'mismatch'} ],
	[ 'every effect is of a recorded claim, and once',
		q{SELECT token FROM log FULL JOIN effects USING (key, token)
			WHERE event = 'record' OR event IS NULL
			GROUP BY key, token HAVING count(*) <> 1 OR count(event) <> 1
				OR count(effects.*) <> 1},
		q{INSERT INTO effects SELECT * FROM effects LIMIT 1} ],
	[ 'a claim without a lease was finished in its transaction',
		q{SELECT c.key FROM claims c WHERE lease_expires_at IS NULL
			AND NOT EXISTS (SELECT FROM log l WHERE l.token = c.token
				AND l.event IN ('record', 'release') AND l.xid = c.xid)},
		q{DELETE FROM log WHERE event = 'record'} ],
	[ 'the ledger is what the log says',
		q{SELECT key FROM
			(SELECT c.key, c.finish, c.token, c.attempt, c.expires_at, c.lease_expires_at,
				coalesce(c.left_point, c.recovery_point) AS point, r.response, r.response_body
			FROM lives c LEFT JOIN log r ON r.token = c.token AND r.event = 'record'
			WHERE c.last AND c.finish IS DISTINCT FROM 'release') c
			FULL JOIN (SELECT substr(key, 5)::int AS key, token, attempt, expires_at,
				lease_expires_at, recovery_point AS point, response, response_body
			FROM idempotency.idempotency_keys) k USING (key)
			WHERE CASE
				WHEN c.finish = 'record' AND c.expires_at <= clock_timestamp() AND k.token IS NULL
					THEN false
				WHEN c.finish = 'record'
					THEN (c.token, c.attempt, c.expires_at, c.response, c.response_body)
						IS DISTINCT FROM
						(k.token, k.attempt, k.expires_at, k.response, k.response_body)
				ELSE (c.token, c.attempt, c.expires_at, c.lease_expires_at, c.point)
						IS DISTINCT FROM
						(k.token, k.attempt, k.expires_at, k.lease_expires_at, k.point)
				END},
		q{UPDATE idempotency.idempotency_keys SET response = NULL WHERE recorded_at IS NOT NULL} ]);

sub count_sql
{
	my ($query) = @_;

	return "SELECT count(*) FROM ($query) q";
}

my $index = q{
CREATE INDEX ON log (token);
CREATE INDEX ON log ((response->>'nonce')) WHERE event = 'record';
CREATE INDEX ON effects (token);
ANALYZE;
};
sql($node, $index . $claims);
foreach my $check (@checks)
{
	my ($name, $query) = @$check;
	next if is(sql($node, count_sql($query)), '0', $name);

	# all that happened to the first key or token
	my $found = sql($node, "SELECT min(found) FROM ($query) q (found)");
	diag(sql($node, qq{
		SELECT event, token, verdict, attempt, lease_expires_at, expires_at, before, after, xid,
			pg_xact_commit_timestamp(xid::xid) AS committed
		FROM log
		WHERE key = $found OR key = (SELECT key FROM log WHERE token = $found LIMIT 1)
		ORDER BY after}));
}

# All of this has to have happened, or nothing was shown.
my %happened = (
	'claims' => q{FROM claims},
	'second lives' => q{FROM lives WHERE attempt = 1 AND n > 1},
	'takeovers' => q{FROM lives WHERE attempt > 1},
	'recovery points handed on' => q{FROM lives WHERE recovery_point IS NOT NULL},
	'replays' => q{FROM log WHERE verdict = 'replay'},
	'claims in progress' => q{FROM log WHERE verdict = 'in_progress'},
	'mismatches' => q{FROM log WHERE verdict = 'mismatch'},
	'stale tokens' => q{FROM log WHERE event = 'stale'},
	'releases' => q{FROM log WHERE event = 'release'},
	'records of lapsed claims' => q{FROM log l JOIN claims c USING (key, token)
		WHERE l.event = 'record' AND c.lease_expires_at < l.before},
	'claims that waited' => q{FROM log WHERE event = 'claim' AND after - before > '2 ms'});
foreach my $what (sort keys %happened)
{
	my $count = sql($node, "SELECT count(*) $happened{$what}");
	cmp_ok($count, '>', 0, "there were $what");
	note("$what: $count");
}

# Does the checker find what it is there for?  A few keys are enough.
my $few = q{key BETWEEN 2 AND 9};
foreach my $check (@checks)
{
	my ($name, $query, $forgery) = @$check;
	my $found = sql($node, qq{
		SET client_min_messages = error;
		BEGIN;
		DELETE FROM log WHERE NOT ($few);
		DELETE FROM effects WHERE NOT ($few);
		DELETE FROM idempotency.idempotency_keys WHERE NOT (substr(key, 5)::int BETWEEN 2 AND 9);
		$forgery;
		DROP TABLE claims, lives;
		$claims } . count_sql($query) . '; ROLLBACK');

	cmp_ok($found, '>', 0, "it would be found: $name");
}

$node->stop;

done_testing();
