
# Which namespace is in force is decided when its row comes, and stays so: down
# chains of dumps and restores, whatever targets they go into and in whatever
# order, after pg_upgrade, by replication, and where triggers were disabled.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $seed = $ENV{NAMESPACE_SEED} // int(rand(1_000_000));
note("NAMESPACE_SEED=$seed");
srand($seed);

my $node = new_node('main', extension => 0, init => { allows_streaming => 'logical' });
my $dir = PostgreSQL::Test::Utils::tempdir();
my $databases = 0;
my $expected;

# A new database; its extension is as old as that, in days.
sub new_database
{
	my (%params) = @_;
	my $db = 'db' . ++$databases;

	sql($node, "CREATE DATABASE $db");
	return $db if $params{bare};
	sql($node, 'CREATE EXTENSION idempotency', db => $db);
	age($db, $params{days} // 0);
	return $db;
}

sub age
{
	my ($db, $days) = @_;

	sql($node, "UPDATE idempotency.namespace SET created_at = created_at - interval '$days days'", db => $db);
	return;
}

# What is derived there
sub keys_of
{
	my ($db) = @_;

	return sql($node, q{SELECT idempotency.stripe_idempotency_key('payment', 'order'),
		idempotency.operation_uuid('some key', 'test')}, db => $db);
}

sub restore
{
	my ($from, $to, @how) = @_;
	my $file = "$dir/$to.dump";

	command_ok([ 'pg_dump', '--format=custom', '--file', $file, $node->connstr($from) ], "$from: pg_dump");
	command_ok([ 'pg_restore', '--exit-on-error', @how, '-d', $node->connstr($to), $file ], "$to: pg_restore @how");
	return;
}

# pg_upgrade gives another system identifier, and keeps the database's OID, which
# may be the one that a row from elsewhere names.
sub upgrade
{
	my ($db, $row) = @_;

	sql($node, q{UPDATE idempotency.namespace SET system_identifier = system_identifier + 1}, db => $db);
	sql($node, "UPDATE idempotency.namespace SET database = (SELECT oid FROM pg_database WHERE datname = '$db')
		WHERE $row", db => $db);
	return;
}

# What a target has been through, and how it is filled
my %links = (
	plain => sub {
		my ($from) = @_;
		my $to = new_database(bare => 1);

		restore($from, $to);
		return $to;
	},
	data => sub {
		my ($from) = @_;
		my $to = new_database(days => int(rand(30)));
		my @how = ('--data-only');
		local $ENV{PGOPTIONS} = rand() < 0.3 ? '-c session_replication_role=replica' : '';

		if (rand() < 0.3)
		{
			sql($node, q{SELECT FROM idempotency.stripe_claim('payment', 'of its own')}, db => $to);
			push @how, '--table=namespace';
		}
		restore($from, $to, @how);
		return $to;
	});

# All chains of three, into targets that were made at any time in the last month,
# some of them upgraded on their way
sub chains
{
	my ($from, @path) = @_;

	return if @path == 3;
	foreach my $kind (sort keys %links)
	{
		my $to = $links{$kind}->($from);

		is(keys_of($to), $expected, "@path $kind: the keys of the original");
		if (rand() < 0.3)
		{
			upgrade($to, 'random() < 0.5');
			is(keys_of($to), $expected, "@path $kind, upgraded: still");
		}
		chains($to, @path, $kind);
	}
	return;
}

my $source = new_database(days => 15);
$expected = keys_of($source);
chains($source);

# the smallest that went wrong: the target was there first
my $early = new_database(days => 20);
restore($source, $early, '--data-only');
my $next = new_database(bare => 1);
restore($early, $next);
is(keys_of($next), $expected, 'a target that was there before the source, dumped once more');
upgrade($early, "created_at > now() - interval '16 days'");
is(keys_of($early), $expected, 'and upgraded, where the original has the OID of this database');

# twice, and two of them
my $own = keys_of($early);
restore($source, $early, '--data-only');
is(keys_of($early), $own, 'the same once more');
my $other = new_database(days => 25);
restore($other, $early, '--data-only');
is(keys_of($early), $own, 'another one: the first stays');
$next = new_database(bare => 1);
restore($early, $next);
is(keys_of($next), $own, 'and goes on');
is(sql($node, 'SELECT count(*), count(*) FILTER (WHERE in_force) FROM idempotency.namespace', db => $next) =~ s/^\d+//r,
	'|1', 'one of many is in force, and says so');

# a person's decision isn't taken back by an old dump of the same database
my $copy = new_database(bare => 1);
sql($node, "DROP DATABASE $copy");
sql($node, "CREATE DATABASE $copy TEMPLATE $source");
run_fails($node, q{SELECT idempotency.stripe_claim('payment', 'order')}, 'IK009', 'a copy is noticed', db => $copy);
sql($node, q{SELECT idempotency.stripe_namespace('new')}, db => $copy);
isnt($own = keys_of($copy), $expected, 'and has a namespace of its own');
$next = new_database(days => 40);
restore($copy, $next, '--data-only');
is(keys_of($next), $own, 'which its dump brings along');
sql($node, q{
	UPDATE idempotency.namespace SET retired_at = now() WHERE retired_at IS NULL;
	DELETE FROM idempotency.namespace WHERE retired_at < now() - interval '1 day'}, db => $copy);
run_fails($node, q{SELECT idempotency.stripe_idempotency_key('payment', 'order')}, 'IK009', 'retired by hand', db => $copy);
sql($node, q{SELECT idempotency.stripe_namespace('new')}, db => $copy);
isnt(keys_of($copy), $own, 'and renewed');
my $renewed = keys_of($copy);
$next = new_database(bare => 1);
restore($copy, $next);
is(keys_of($next), $renewed, 'and restored');
$copy = new_database(bare => 1);
sql($node, "DROP DATABASE $copy");
sql($node, "CREATE DATABASE $copy TEMPLATE $early");
run_fails($node, q{SELECT idempotency.stripe_claim('payment', 'order')}, 'IK009', 'a copy of a restored database is noticed',
	db => $copy);
sql($node, q{SELECT idempotency.stripe_namespace('keep')}, db => $copy);
$own = keys_of($early);
is(keys_of($copy), $own, 'and keeps its namespace');
$next = new_database(days => 50);
restore($copy, $next, '--data-only');
is(keys_of($next), $own, 'which its dump brings along');

#
# Triggers were disabled: what readers make of it is written down
#
sub in_force
{
	my ($db) = @_;

	return sql($node, 'SELECT count(*) FILTER (WHERE in_force) FROM idempotency.namespace', db => $db);
}

my $disabled = new_database(days => 60);
restore($source, $disabled, '--data-only', '--disable-triggers');
is(in_force($disabled), '2', 'two rows say that they are in force');
is(keys_of($disabled), $expected, 'readers choose the one that came');
is(in_force($disabled), '2', 'and write nothing');
sql($node, q{BEGIN READ ONLY; SELECT idempotency.stripe_lookup('payment', 'order'); COMMIT}, db => $disabled);
run_fails($node, q{SET idempotency.stripe_ledger = 'transaction';
	BEGIN READ ONLY; SELECT idempotency.stripe_claim('payment', 'order'); COMMIT}, '25006',
	'nor does who may not', db => $disabled);
my $reader = $node->background_psql($disabled, on_error_stop => 0);
$reader->query_safe(q{BEGIN; LOCK idempotency.namespace IN ROW EXCLUSIVE MODE});
sql($node, q{SET idempotency.stripe_ledger = 'transaction'; SELECT idempotency.stripe_claim('payment', 'first')}, db => $disabled);
is(in_force($disabled), '2', 'a claim waits for nobody');
$reader->query_safe('COMMIT');
$reader->quit;
sql($node, q{SET idempotency.stripe_ledger = 'transaction';
	BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT idempotency.stripe_claim('payment', 'second'); ROLLBACK}, db => $disabled);
is(in_force($disabled), '2', 'one that rolls back has decided nothing');
sql($node, q{SET idempotency.stripe_ledger = 'transaction';
	SELECT idempotency.stripe_claim('payment', 'second')}, db => $disabled);
is(in_force($disabled), '1', 'the next new operation writes it down');
is(keys_of($disabled), $expected, 'and the keys are the same');
sql($node, q{
	ALTER TABLE idempotency.namespace DISABLE TRIGGER namespace_comes;
	UPDATE idempotency.namespace SET in_force = true;
	CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'not this one'; END$$;
	CREATE TRIGGER refuse BEFORE UPDATE ON idempotency.namespace FOR EACH ROW EXECUTE FUNCTION refuse()}, db => $disabled);
is(sql($node, q{SET idempotency.stripe_ledger = 'transaction';
	SELECT verdict FROM idempotency.stripe_claim('payment', 'third')}, db => $disabled), 'claimed',
	'that it can\'t be written stops nobody');
sql($node, 'DROP FUNCTION refuse CASCADE', db => $disabled);

$node->append_conf('postgresql.conf', "shared_preload_libraries = 'idempotency'\nidempotency.expiry_interval = 1s\n");
$node->restart;
wait_until($node, 'SELECT count(*) = 1 FROM idempotency.namespace WHERE in_force', 'a worker writes it down', db => $disabled);
is(keys_of($disabled), $expected, 'and the keys are the same');

#
# A copy that has decided on a namespace of its own keeps it, whatever is loaded
# into it of the original afterwards.
#
my $decided = 'db' . ++$databases;
sql($node, "CREATE DATABASE $decided TEMPLATE $source");
sql($node, q{SELECT idempotency.stripe_namespace('new')}, db => $decided);
my $own = keys_of($decided);
isnt($own, $expected, 'a copy with a namespace of its own');
restore($source, $decided, '--data-only', '--table=namespace');
is(keys_of($decided), $own, 'which a restore of the original does not take back');
is(in_force($decided), '1', 'and it is the one in force');

#
# Replication, also out of and into a table that is published itself
#
my $subscriber = new_database(days => 70);
sql($node, 'CREATE PUBLICATION keys FOR TABLE idempotency.namespace', db => $_) foreach $source, $subscriber;
sql($node, "SELECT pg_create_logical_replication_slot('keys', 'pgoutput')", db => $source);
sql($node, "CREATE SUBSCRIPTION keys CONNECTION '" . $node->connstr($source) =~ s/'/''/gr
	  . "' PUBLICATION keys WITH (create_slot = false, slot_name = keys)", db => $subscriber);
wait_until($node, q{SELECT count(*) = 2 FROM idempotency.namespace}, 'the first copy', db => $subscriber);
is(keys_of($subscriber), $expected, 'a subscriber takes over the keys');
is(in_force($subscriber), '1', 'and says so');
$next = new_database(bare => 1);
restore($subscriber, $next);
is(keys_of($next), $expected, 'and so does what is restored from it');
sql($node, q{
	BEGIN;
	UPDATE idempotency.namespace SET retired_at = now() WHERE retired_at IS NULL;
	SELECT idempotency.stripe_namespace('new');
	COMMIT}, db => $source);
wait_until($node, q{SELECT count(*) = 3 FROM idempotency.namespace}, 'the publisher has another one', db => $subscriber);
is(keys_of($subscriber), $expected, 'but the subscriber stays with the one that it has taken over');
sql($node, q{ALTER SUBSCRIPTION keys DISABLE; ALTER SUBSCRIPTION keys SET (slot_name = NONE); DROP SUBSCRIPTION keys}, db => $subscriber);
my $published = new_database(days => 80);
sql($node, 'CREATE PUBLICATION keys FOR TABLE idempotency.namespace', db => $published);
restore($other, $published, '--data-only');
is(keys_of($published), keys_of($other), 'a restore into a published table');

# Two that come at the same time wait for each other in their order, though each of
# the transactions has written to the table before.
my @session = map { $node->background_psql($other, on_error_stop => 0) } 1 .. 2;
$_->query_safe('BEGIN; UPDATE idempotency.namespace SET created_at = created_at WHERE false') foreach @session;
my $pid = $session[1]->query_safe('SELECT pg_backend_pid()');
foreach my $i (0, 1)
{
	$session[$i]->query_until(qr/begun/, "\\echo begun\nINSERT INTO idempotency.namespace
		(value, system_identifier, database, created_at) VALUES (decode(repeat('0$i', 32), 'hex'), 1, 1, now());\n");
	$node->poll_query_until('postgres', q{SELECT count(*) = 1 FROM pg_locks WHERE classid = 'pg_class'::regclass AND locktype = 'object' AND granted}) if $i == 0;
}
wait_for_lock($node, $pid);
$_->query('COMMIT') foreach @session;
is(join('', map { $_->{stderr} =~ /ERROR/ ? $_->{stderr} : '' } @session), '', 'two rows that come at the same time');
is(sql($node, q{SELECT count(*) FROM idempotency.namespace WHERE value IN (decode(repeat('00', 32), 'hex'), decode(repeat('01', 32), 'hex'))},
	db => $other), '2', 'are both there');
$_->quit foreach @session;

# The trigger is one of this table only.
run_fails($node, 'CREATE TEMP TABLE t (a int);
	CREATE TRIGGER t BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION idempotency.namespace_comes();
	INSERT INTO t VALUES (1)', '39P01', 'another table\'s trigger is refused', db => $source);

$node->stop;

done_testing();
