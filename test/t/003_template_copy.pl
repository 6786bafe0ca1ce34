
# A database made by CREATE DATABASE ... TEMPLATE has its original's namespace.
# Until stripe_namespace() has said what it is, it may not speak to Stripe.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_node('main', extension => 0);

sub copy
{
	my ($from, $to) = @_;

	sql($node, "CREATE DATABASE $to TEMPLATE $from");
	return;
}

sub stripe_key
{
	my ($db, $id) = @_;

	return sql($node, "SELECT idempotency.stripe_idempotency_key('payment', " . literal($id) . ')',
		db => $db);
}

sub operation_uuid
{
	my ($db) = @_;

	return sql($node, q{SELECT idempotency.operation_uuid('some key', 'test')}, db => $db);
}

sql($node, 'CREATE DATABASE original');
sql($node, q{
	CREATE EXTENSION idempotency;
	SELECT idempotency.record('done', 'test', c.token, '{"order": 1}')
		FROM idempotency.claim('done', 'test', '{"amount": 1.0}') c;
	SELECT FROM idempotency.claim('held', 'test', '{"amount": 2}', lease => '1 hour');
	SELECT idempotency.stripe_record('payment', 'done', c.token, 'pi_1')
		FROM idempotency.stripe_claim('payment', 'done', '{"amount": 3}') c;
	SELECT idempotency.stripe_release('payment', 'released', c.token)
		FROM idempotency.stripe_claim('payment', 'released', '{"amount": 4}') c;
}, db => 'original');

my %key = map { $_ => stripe_key('original', $_) } qw(done released next);
my $uuid = operation_uuid('original');

# What was recorded in the original is replayed and compared here, too.
sub remembers
{
	my ($db) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	my $answer = claim($node, 'done', request => '{"amount": 1}', db => $db);
	is("$answer->{verdict} $answer->{response}{order}", 'replay 1', "$db: a result is replayed");
	is(claim($node, 'done', request => '{"amount": 2}', db => $db)->{verdict},
		'mismatch', "$db: another request is told apart");
	is(claim($node, 'held', request => '{"amount": 2.0}', db => $db)->{verdict},
		'in_progress', "$db: a lease holds");
	is(claim($node, 'held', request => '{"amount": 1}', db => $db)->{verdict},
		'mismatch', "$db: also against another request");
	return;
}

sub remembers_stripe
{
	my ($db) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	foreach my $id ('done', 'released')
	{
		is(stripe_key($db, $id), $key{$id}, "$db: the key of operation $id is read, not derived");
	}
	my $answer = stripe_claim($node, 'payment', 'done', request => '{"amount": 3.00}', db => $db);
	is("$answer->{verdict} $answer->{resource_id}", 'replay pi_1', "$db: a call is replayed");
	is(stripe_claim($node, 'payment', 'done', request => '{"amount": 4}', db => $db)->{verdict},
		'mismatch', "$db: another one is told apart");
	$answer = stripe_claim($node, 'payment', 'released', request => '{"amount": 4.0}', db => $db);
	is("$answer->{verdict} $answer->{idempotency_key}", "claimed $key{released}",
		"$db: a released operation is claimed with the key it had");
	sql($node, "SELECT idempotency.stripe_release('payment', 'released', $answer->{token})",
		db => $db);
	return;
}

remembers('original');
remembers_stripe('original');

# A copy that hasn't decided.
copy('original', 'undecided');
remembers('undecided');
is(operation_uuid('undecided'), $uuid, 'undecided: operation_uuid stays in the database');
my $token = claim($node, 'new', lease => '1 hour', db => 'undecided')->{token};
sql($node, "SELECT idempotency.record('new', 'test', $token)", db => 'undecided');
is(claim($node, 'new', db => 'undecided')->{verdict},
	'replay', 'undecided: requests are claimed and recorded');

my %call = (
	stripe_idempotency_key => q{('payment', 'done')},
	stripe_claim => q{('payment', 'done')},
	stripe_record => q{('payment', 'done', 1, 'pi_1')},
	stripe_release => q{('payment', 'released', 1)},
	stripe_extend => q{('payment', 'done', 1)},
	stripe_reopen => q{('payment', 'released')},
	stripe_reconcile => q{()},
	stripe_settle => q{('payment', 'released', 'completed')},
	stripe_acknowledge => q{('payment', 'done', 'note')},
	stripe_lookup => q{('payment', 'done')},
	stripe_call => q{('payment', 'done', 'POST', '/v1/customers')},
	stripe_retry => q{('payment', 'done')},
	stripe_get => q{('/v1/customers')});
foreach my $function (sort keys %call)
{
	run_fails($node, "SELECT idempotency.$function$call{$function}",
		'IK009', "undecided: $function is refused", db => 'undecided');
}
is(extension_functions($node,
		q{proname LIKE 'stripe\_%' AND proname NOT IN ('stripe_namespace', 'stripe_has_lapsed', 'stripe_resend_may_settle', 'stripe_callers_fate')
			AND proname NOT LIKE 'stripe\_webhook\_%'}, db => 'undecided'),
	join("\n", sort keys %call),
	'these are all functions that have to do with calls to Stripe');

run_fails($node, q{SELECT idempotency.stripe_namespace('both')},
	'IK003', 'a decision is one of two', db => 'undecided');
run_fails($node, q{SELECT idempotency.stripe_namespace(NULL)},
	'IK003', 'a decision is no NULL', db => 'undecided');

# A copy of it has to decide as well.
copy('undecided', 'second');
run_fails($node, "SELECT idempotency.stripe_claim('payment', 'done')",
	'IK009', 'a copy of an undecided copy is refused, too', db => 'second');

# One that goes on with the namespace of its original.
copy('original', 'kept');
sql($node, "SELECT idempotency.stripe_namespace('keep')", db => 'kept');
remembers('kept');
remembers_stripe('kept');
is(stripe_key('kept', 'next'), $key{next}, 'kept: new operations have the key of the original');
is(operation_uuid('kept'), $uuid, 'kept: and the same UUIDs');
is(stripe_claim($node, 'payment', 'next', db => 'kept')->{idempotency_key},
	$key{next}, 'kept: also where they are claimed');

# One that has its own.
copy('original', 'renewed');
sql($node, "SELECT idempotency.stripe_namespace('new')", db => 'renewed');
remembers('renewed');
remembers_stripe('renewed');
my $renewed_key = stripe_key('renewed', 'next');
isnt($renewed_key, $key{next}, 'renewed: new operations have a key of their own');
isnt(operation_uuid('renewed'), $uuid, 'renewed: and other UUIDs');
is(stripe_claim($node, 'payment', 'next', request => '{"amount": 5}', db => 'renewed')->{idempotency_key},
	$renewed_key, 'renewed: also where they are claimed');
is(stripe_claim($node, 'payment', 'next', request => '{"amount": 6}', db => 'renewed')->{verdict},
	'mismatch', 'renewed: they are compared');
is(claim($node, 'renewed', request => '{"amount": 7}', lease => '1 hour', db => 'renewed')->{verdict},
	'claimed', 'renewed: a new request is claimed');
is(claim($node, 'renewed', request => '{"amount": 7.0}', db => 'renewed')->{verdict},
	'in_progress', 'renewed: and is known again');
is(claim($node, 'renewed', request => '{"amount": 8}', db => 'renewed')->{verdict},
	'mismatch', 'renewed: and compared');

# Decided is decided.
foreach my $db ('original', 'kept', 'renewed')
{
	my $namespaces = sql($node, 'SELECT md5(string_agg(n::text, E\'\n\' ORDER BY n::text))
		FROM idempotency.namespace n', db => $db);

	foreach my $choice ('keep', 'new')
	{
		run_fails($node, "SELECT idempotency.stripe_namespace('$choice')",
			'IK009', "$db: '$choice' comes too late", db => $db);
	}
	is(sql($node, 'SELECT md5(string_agg(n::text, E\'\n\' ORDER BY n::text))
		FROM idempotency.namespace n', db => $db),
		$namespaces, "$db: and changes nothing");
}

# Copies of copies.
foreach my $case ([ 'kept', $key{next} ], [ 'renewed', $renewed_key ])
{
	my ($from, $expected) = @$case;

	foreach my $choice ('keep', 'new')
	{
		my $db = "${from}_$choice";

		copy($from, $db);
		run_fails($node, "SELECT idempotency.stripe_idempotency_key('payment', 'next')",
			'IK009', "$db: a copy of a copy is refused", db => $db);
		sql($node, "SELECT idempotency.stripe_namespace('$choice')", db => $db);
		remembers($db);
		remembers_stripe($db);
		is(stripe_key($db, 'next'), $expected, "$db: what it has is kept");
		my $fresh = stripe_key($db, 'later');
		($choice eq 'keep' ? \&is : \&isnt)->(
			$fresh, stripe_key($from, 'later'), "$db: what is to come is as decided");
	}
}

# A copy that was dumped and restored hasn't forgotten its decision.
my $dump = PostgreSQL::Test::Utils::tempdir() . '/renewed.sql';
$node->command_ok([ 'pg_dump', '--file', $dump, $node->connstr('renewed') ], 'pg_dump of a copy');
sql($node, 'CREATE DATABASE restored');
$node->command_ok(
	[ 'psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-d', $node->connstr('restored'), '-f', $dump ],
	'its restore');
remembers('restored');
remembers_stripe('restored');
is(stripe_key('restored', 'later'), stripe_key('renewed', 'later'),
	'restored: the namespace of the copy is in force');

# Two decisions at once: the second waits and finds it decided, at whatever
# isolation level; or decides itself where the first is rolled back.
foreach my $level ('READ COMMITTED', 'REPEATABLE READ', 'SERIALIZABLE')
{
	foreach my $end ('COMMIT', 'ROLLBACK')
	{
		my $db = lc("race $level $end") =~ s/ /_/gr;

		copy('original', $db);
		my $first = $node->background_psql($db);
		my $second = $node->background_psql($db, on_error_stop => 0);
		my $pid = $second->query_safe('SELECT pg_backend_pid()');

		$second->query_safe("BEGIN ISOLATION LEVEL $level; SELECT count(*) FROM pg_class");
		$first->query_safe("BEGIN; SELECT idempotency.stripe_namespace('keep')");
		$second->query_until(qr/waiting/, qq{\\echo waiting
			SELECT idempotency.stripe_namespace('new');
			\\echo state :SQLSTATE end
			COMMIT;\n});
		wait_for_lock($node, $pid);
		$first->query_safe($end);
		my ($state) = $second->query_until(qr/end/, '') =~ /state (\w+) end/;
		$second->query('SELECT 1');
		if ($end eq 'COMMIT')
		{
			is($state, 'IK009', "$db: the second one is refused");
			is(stripe_key($db, 'next'), $key{next}, "$db: the first one counts");
		}
		else
		{
			is($state, '00000', "$db: the second one decides");
			isnt(stripe_key($db, 'next'), $key{next}, "$db: for a namespace of its own");
		}
		is(sql($node, 'SELECT count(*) FROM idempotency.namespace', db => $db),
			'2', "$db: one decision");
		$first->quit;
		$second->quit;
	}
}

# The original was never touched by any of this.
remembers('original');
remembers_stripe('original');
is(stripe_key('original', 'next'), $key{next}, 'original: the same keys as ever');
is(operation_uuid('original'), $uuid, 'original: the same UUIDs');

$node->stop;

done_testing();
