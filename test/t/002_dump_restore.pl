
# A dump carries every row of the ledgers and the namespace; what is restored
# from it replays the same results and derives the same keys.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_node('main', extension => 0);
my $dir = PostgreSQL::Test::Utils::tempdir();

# A database with something in every state that a row can have.
sql($node, q{
	CREATE DATABASE src;
	CREATE ROLE app;
	CREATE ROLE caller;
	CREATE ROLE watcher;
	CREATE ROLE stranger;
});
sql($node, <<'EOS', db => 'src');
	CREATE EXTENSION idempotency;
	SELECT idempotency.grant_role('app', 'application');
	SELECT idempotency.grant_role('caller', 'stripe_caller');
	SELECT idempotency.grant_role('watcher', 'observer');

	CREATE TABLE orders (id uuid PRIMARY KEY, scope text, key text);
	GRANT INSERT ON orders TO app;

	-- recorded results
	CREATE FUNCTION done(k text, status int, body jsonb, headers jsonb, bytes bytea) RETURNS void AS $$
		SELECT idempotency.record(k, 'test', c.token, body, status, headers, bytes, '1 year')
		FROM idempotency.claim(k, 'test', '{"path": "/orders", "amount": 19.90}') c;
		INSERT INTO orders VALUES (idempotency.operation_uuid(k, 'test'), 'test', k);
	$$ LANGUAGE sql;
	SELECT done('json', 201, '{"n": 1.50, "big": 12345678901234567890.000, "s": "\u00e9\\\t\u0001"}',
		NULL, NULL);
	SELECT done('json null', 204, 'null', '{}', NULL);
	SELECT done('nothing', 200, NULL, NULL, NULL);
	SELECT done('bytes', 200, NULL, '{"content-type": "image/png", "x": ["1", "2"]}',
		'\x00010a0d5c2e0aff27225c4e80');
	SELECT done('no bytes', 200, NULL, NULL, '');
	SELECT done('failed', 422, '{"error": "card"}', NULL, NULL);
	SELECT done(E'it''s "one" \\N \\. %s {a,b} \u6ce8\u6587', 200, '"strange key"', NULL, NULL);
	SELECT done('large', 200,
		(SELECT jsonb_agg(md5(i::text)) FROM generate_series(1, 3000) i), NULL,
		(SELECT string_agg(sha256(i::text::bytea), '') FROM generate_series(1, 3000) i));
	SELECT done('expired', 200, '1', NULL, NULL);
	UPDATE idempotency.idempotency_keys SET expires_at = now() - interval '1 day'
		WHERE key = 'expired';

	-- unfinished ones
	SELECT FROM idempotency.claim('held', 'test', '{"a": 1}', lease => '1 year');
	SELECT FROM idempotency.claim('held', '', '{"a": 2}', lease => '1 year', ttl => '2 hours');
	SELECT idempotency.checkpoint('pointed', 'test', c.token, 'charged', '{"charge": "ch_1"}')
		FROM idempotency.claim('pointed', 'test', lease => '1 hour') c;
	UPDATE idempotency.idempotency_keys SET lease_expires_at = now() - interval '1 day'
		WHERE key = 'pointed';
	SET idempotency.open_claim_at_commit = allow;
	SELECT FROM idempotency.claim('left open', 'test');

	-- calls to Stripe
	SELECT idempotency.stripe_record('payment', 'order_1', c.token, response =>
			'{"id": "pi_1", "object": "payment_intent", "livemode": false, "amount": 1000.0}',
			http_status => 200, request_id => 'req_1')
		FROM idempotency.stripe_claim('payment', 'order_1',
			'{"params": {"amount": 1000, "metadata": {"n": 1}}}') c;
	SELECT idempotency.stripe_record('payment', 'order_2', c.token, response =>
			'{"error": {"type": "card_error", "payment_intent": {"id": "pi_2"}}}',
			http_status => 402, account => 'acct_1')
		FROM idempotency.stripe_claim('payment', 'order_2', '{"params": {"amount": 2000}}',
			account => 'acct_1') c;
	SELECT idempotency.stripe_reopen('payment', 'order_2', 'acct_1');
	SELECT FROM idempotency.stripe_claim('payment', 'order_2', '{"params": {"amount": 2001}}',
		account => 'acct_1', lease => '1 year');
	SELECT idempotency.stripe_record('payment', 'order_3', c.token)
		FROM idempotency.stripe_claim('payment', 'order_3') c;
	SELECT idempotency.stripe_release('payment', 'order_4', c.token)
		FROM idempotency.stripe_claim('payment', 'order_4', '{"params": {"amount": 4000}}') c;
EOS

receive_events($node, db => 'src');

my @tables = qw(idempotency.idempotency_keys idempotency.stripe_idempotency_keys
  idempotency.stripe_webhook_events public.orders);

# Every row of a database, a digest a table.
sub rows
{
	my ($db) = @_;

	return join("\n",
		map { "$_ " . sql($node, "SELECT count(*), md5(string_agg(t::text, E'\\n' ORDER BY t::text))
				FROM $_ t", db => $db) } @tables);
}

# What callers are told, without changing anything: replays byte for byte,
# mismatches, leases, and derived values.
sub behaviour
{
	my ($db) = @_;

	return sql($node, q{
		SET timezone = 'UTC';
		SELECT key, c::text FROM idempotency.idempotency_keys k,
			LATERAL idempotency.claim(key, scope, '{"amount": 19.9, "path": "/orders"}') c
			WHERE k.expires_at > now() ORDER BY scope, key;
		SELECT key, (SELECT verdict FROM idempotency.claim(key, scope, '{"another": 1}'))
			FROM idempotency.idempotency_keys
			WHERE expires_at > now() OR lease > interval '1 day' ORDER BY scope, key;
		SELECT scope, verdict FROM (VALUES ('test', 1), ('', 2)) v (scope, a),
			LATERAL idempotency.claim('held', scope, jsonb_build_object('a', a));
		SELECT l::text FROM idempotency.lookup('pointed', 'test') l;
		SELECT key, idempotency.operation_uuid(key, scope)
			FROM idempotency.idempotency_keys ORDER BY scope, key;
		SELECT bool_and(id = idempotency.operation_uuid(key, scope)) FROM orders;
		SELECT l::text,
				idempotency.stripe_idempotency_key(s.operation_type, s.operation_id, s.account)
			FROM idempotency.stripe_idempotency_keys s,
				LATERAL idempotency.stripe_lookup(s.operation_type, s.operation_id, s.account) l
			ORDER BY s.operation_id;
		SELECT idempotency.stripe_idempotency_key('refund', 'order_' || i, 'acct_' || i)
			FROM generate_series(1, 3) i;
		SELECT c::text FROM idempotency.stripe_claim('payment', 'order_1',
			'{"params": {"amount": 1000.00, "metadata": {"n": 2}}}') c;
		SELECT verdict FROM idempotency.stripe_claim('payment', 'order_1',
			'{"params": {"amount": 1001}}');
		SELECT verdict, generation FROM idempotency.stripe_claim('payment', 'order_2',
			account => 'acct_1');
		SELECT c.stripe_event_id, c.verdict, c.event FROM (VALUES ('evt_1'), ('evt_3')) v (id),
			LATERAL idempotency.stripe_webhook_reclaim(v.id) c;
		SELECT p::text FROM idempotency.stripe_webhook_pending p;
	}, db => $db);
}

# Who may do what.
sub privileges
{
	my ($db) = @_;

	return sql($node, q{
		SELECT d.objid::regprocedure, acl.grantee::regrole, acl.privilege_type
		FROM pg_depend d JOIN pg_proc p ON p.oid = d.objid,
			LATERAL aclexplode(p.proacl) acl
		WHERE d.classid = 'pg_proc'::regclass AND d.deptype = 'e'
			AND d.refobjid = (SELECT oid FROM pg_extension WHERE extname = 'idempotency')
		ORDER BY d.objid::regprocedure::text, acl.grantee::regrole::text;
		SELECT oid::regclass, relacl FROM pg_class
			WHERE relnamespace = 'idempotency'::regnamespace AND relkind IN ('r', 'v')
			ORDER BY oid::regclass::text;
		SELECT typname, typacl FROM pg_type
			WHERE typnamespace = 'idempotency'::regnamespace AND typacl IS NOT NULL ORDER BY 1;
		SELECT nspacl FROM pg_namespace WHERE nspname = 'idempotency';
	}, db => $db);
}

sub new_database
{
	my ($db, $statements) = @_;

	sql($node, "CREATE DATABASE $db");
	sql($node, $statements, db => $db) if defined $statements;
	return $node->connstr($db);
}

sub dump_database
{
	my ($db, $name, @options) = @_;

	$node->command_ok([ 'pg_dump', '--file', "$dir/$name", @options, $node->connstr($db) ],
		"$name: pg_dump");
	return "$dir/$name";
}

sub psql_command
{
	my ($db, $file) = @_;

	return [ 'psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr($db), '-f', $file ];
}

my $rows = rows('src');
my $behaviour = behaviour('src');
my $privileges = privileges('src');
is(rows('src'), $rows, 'looking at the database changes nothing');
like($rows, qr/^idempotency\.idempotency_keys 13\|/, 'there are rows to be carried');

sub is_the_same
{
	my ($db, $how) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	is(rows($db), $rows, "$how: every row");
	is(behaviour($db), $behaviour, "$how: the same answers and keys");
	is(rows($db), $rows, "$how: and the answers changed no row");
	return;
}

# A restored database works on: what was unfinished goes on where it was.
sub works_on
{
	my ($db, $how) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	my $answer = claim($node, 'pointed', lease => '1 hour', db => $db);
	is("$answer->{verdict} $answer->{attempt} $answer->{recovery_point}",
		'claimed 2 charged', "$how: a lapsed claim is taken over with its recovery point");
	is(claim($node, 'expired', lease => '1 hour', db => $db)->{attempt},
		1, "$how: an expired result is none");
	my $key = sql($node, "SELECT idempotency.stripe_idempotency_key('payment', 'order_4')",
		db => 'src');
	$answer = stripe_claim($node, 'payment', 'order_4', db => $db);
	is("$answer->{verdict} $answer->{idempotency_key}", "claimed $key",
		"$how: a released Stripe operation is claimed with its key");
	$key = sql($node, "SELECT idempotency.stripe_idempotency_key('payment', 'order_9')", db => 'src');
	$answer = stripe_claim($node, 'payment', 'order_9', db => $db);
	is("$answer->{verdict} $answer->{idempotency_key}", "claimed $key",
		"$how: a new one gets the key it would have had");
	is(sql($node, q{SELECT stripe_event_id, attempt, last_error FROM idempotency.stripe_webhook_next('1 hour')}, db => $db),
		'evt_4|1|', "$how: the event that waits longest is next");
	is(sql($node, q{SELECT verdict, attempt, last_error FROM idempotency.stripe_webhook_reclaim('evt_2', 'acct_1', '1 hour')},
			db => $db),
		'claimed|2|no', "$how: a failed event is claimed again");
	return;
}

# plain, through psql, without any error
my $plain = dump_database('src', 'plain.sql');
new_database('plain');
$node->command_ok(psql_command('plain', $plain), 'plain: psql');
is_the_same('plain', 'plain');
is(privileges('plain'), $privileges, 'plain: the same privileges');
is(sql($node, q{
	SET ROLE app;
	SELECT verdict FROM idempotency.claim('json', 'test')}, db => 'plain'),
	'replay', 'plain: an application claims');
run_fails($node, q{SET ROLE app; SELECT idempotency.stripe_lookup('payment', 'order_1')},
	'42501', 'plain: and no more', db => 'plain');
is(sql($node, q{
	SET ROLE caller;
	SELECT outcome FROM idempotency.stripe_lookup('payment', 'order_1')}, db => 'plain'),
	'completed', 'plain: a caller of Stripe calls');
is(sql($node, q{SET ROLE watcher; SELECT count(*) FROM idempotency.open_claims}, db => 'plain'),
	'5', 'plain: an observer observes');
run_fails($node, q{SET ROLE stranger; SELECT idempotency.claim('json', 'test')},
	'42501', 'plain: a stranger may do nothing', db => 'plain');

# twice into the same database: the second one finds everything there
my ($stdout, $stderr) = run_command(
	[ 'psql', '-X', '-q', '-d', $node->connstr('plain'), '-f', $plain ]);
like($stderr, qr/duplicate key/, 'twice: rows that are there are refused');
is_the_same('plain', 'twice');

# a dump of what was restored
my $again = dump_database('plain', 'again.sql', '--inserts');
new_database('again');
$node->command_ok(psql_command('again', $again), 'again: psql');
is_the_same('again', 'a restored database, dumped and restored');
works_on('again', 'again');

# pg_restore, several connections at once
my $custom = dump_database('src', 'custom.dump', '--format=custom');
new_database('custom');
$node->command_ok(
	[ 'pg_restore', '--exit-on-error', '--jobs=4', '-d', $node->connstr('custom'), $custom ],
	'custom: pg_restore');
is_the_same('custom', 'custom');
is(privileges('custom'), $privileges, 'custom: the same privileges');
run_command([ 'pg_restore', '--jobs=4', '-d', $node->connstr('custom'), $custom ]);
is_the_same('custom', 'custom, twice');
works_on('custom', 'custom');

# the data alone, into a database that has had the extension for a while
my $data = dump_database('src', 'data.sql', '--data-only');
new_database('data', q{
	CREATE TABLE orders (id uuid PRIMARY KEY, scope text, key text);
	CREATE EXTENSION idempotency;
});
my $own_key = sql($node, q{
	SELECT idempotency.stripe_idempotency_key('payment', 'order_9');
	SELECT FROM idempotency.claim('own', 'test', '{"mine": 1}', lease => '1 hour')}, db => 'data');
$node->command_ok(psql_command('data', $data), 'data only: psql');
is(claim($node, 'own', request => '{"mine": 1.0}', db => 'data')->{verdict},
	'in_progress', 'data only: an earlier request is still compared with its own namespace');
is(claim($node, 'own', request => '{"mine": 2}', db => 'data')->{verdict},
	'mismatch', 'data only: and a different one is told apart');
sql($node, q{DELETE FROM idempotency.idempotency_keys WHERE key = 'own'}, db => 'data');
is_the_same('data', 'data only');
isnt(sql($node, q{SELECT idempotency.stripe_idempotency_key('payment', 'order_9')}, db => 'data'),
	$own_key, 'data only: the restored namespace is in force, not the one that was there');
works_on('data', 'data only');

# the schema alone is another database, with keys of its own
my $schema = dump_database('src', 'schema.sql', '--schema-only');
new_database('bare');
$node->command_ok(psql_command('bare', $schema), 'schema only: psql');
is(sql($node, q{
	SELECT (SELECT count(*) FROM idempotency.idempotency_keys),
		(SELECT count(*) FROM idempotency.stripe_idempotency_keys),
		(SELECT count(*) FROM idempotency.namespace)}, db => 'bare'),
	'0|0|1', 'schema only: no row but a namespace');
is(privileges('bare'), $privileges, 'schema only: the same privileges');
my $bare = stripe_claim($node, 'payment', 'order_1', db => 'bare');
is($bare->{verdict}, 'claimed', 'schema only: it works');
isnt($bare->{idempotency_key},
	sql($node, q{SELECT idempotency.stripe_idempotency_key('payment', 'order_1')}, db => 'src'),
	'schema only: with other keys');

is(rows('src'), $rows, 'the original is as it was');
is(behaviour('src'), $behaviour, 'and answers as it did');

$node->stop;

done_testing();
