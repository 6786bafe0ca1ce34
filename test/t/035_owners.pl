
# Whoever owns a ledger can give it triggers. In background processes, which
# are a superuser's, they come by no more than their owner's rights: not at the
# end of a transaction, and not where it touches the tables of several owners.
# Nor do they where a superuser commits a prepared transaction.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_node('main', preload => 1, conf => "idempotency.expiry_interval = 1s\n");

sql($node, q{
	CREATE ROLE keeper;
	GRANT USAGE ON SCHEMA idempotency TO keeper;
	CREATE TABLE fired (who text, what text);
	GRANT INSERT, SELECT ON fired TO keeper;
	CREATE FUNCTION note(what text) RETURNS text LANGUAGE sql AS
		'INSERT INTO public.fired VALUES (current_user, what) RETURNING what';
	CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS
		$$ BEGIN PERFORM public.note('late'); RETURN NULL; END $$;
	CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			EXECUTE format('DECLARE %I CURSOR WITH HOLD FOR SELECT public.note(%L)', clock_timestamp(), 'held');
			RETURN COALESCE(NEW, OLD);
		EXCEPTION WHEN insufficient_privilege THEN
			PERFORM public.note('refused');
			RETURN COALESCE(NEW, OLD);
		END $$;
	INSERT INTO idempotency.stripe_webhook_events
		(token, received_at, next_attempt_at, attempts, account, stripe_event_id, consumer, event_type)
	VALUES (1, now(), now(), 0, '', 'evt_1', '', 'x')});

# Something for a worker to do in the transaction of another owner: an event
# that waits for a call, and can't be read any more.
my $wait = q{UPDATE idempotency.stripe_webhook_events
	SET pending_key = 'payment:1:00000000-0000-8000-8000-000000000000'};
my $is_done = 'SELECT NOT EXISTS (SELECT FROM idempotency.stripe_webhook_events WHERE pending_key IS NOT NULL)';

# The same for the recorder: it claims a call.
my $calls = 0;
sub call
{
	return 'SELECT verdict FROM idempotency.stripe_claim(\'payment\', \'' . ++$calls . '\')';
}

# For COMMIT PREPARED: what settles a call leaves a notice, which a worker sends.
sub settle_prepared
{
	my $id = ++$calls;

	sql($node, qq{
		SET idempotency.stripe_ledger = 'transaction';
		SELECT token AS t FROM idempotency.stripe_claim('pay', '$id', '{"method": "POST", "path": "/v1/refunds"}') \\gset
		SELECT idempotency.stripe_record('pay', '$id', :t);
		BEGIN;
		SELECT idempotency.stripe_settle('pay', '$id', 'completed', 're_1');
		PREPARE TRANSACTION 'settles'});
	sql($node, "COMMIT PREPARED 'settles'");
	return;
}

for my $case (
	[ 'COMMIT PREPARED', 'pending_notices', 'DELETE' ],
	[ 'a worker', 'stripe_webhook_events', 'UPDATE' ],
	[ 'the recorder', 'stripe_idempotency_keys', 'INSERT OR UPDATE' ])
{
	my ($who, $table, $events) = @$case;

	sql($node, "ALTER TABLE idempotency.$table OWNER TO keeper");
	my $act = sub {
		my ($trigger) = @_;
		sql($node, "$trigger; TRUNCATE fired");
		if ($table eq 'stripe_webhook_events')
		{
			sql($node, "SET session_replication_role = replica; $wait");
			wait_until($node, $is_done, "$who has been at it");
		}
		elsif ($table eq 'pending_notices')
		{
			settle_prepared();
			wait_until($node, 'SELECT NOT EXISTS (SELECT FROM idempotency.pending_notices)', "$who: a worker has sent what it left");
		}
		else
		{
			sql($node, call());
		}
		my $fired = sql($node, q{SELECT string_agg(DISTINCT who || ' ' || what, ', ') FROM fired});
		sql($node, "DROP TRIGGER IF EXISTS hold ON idempotency.$table");
		return $fired;
	};

	is($act->("CREATE CONSTRAINT TRIGGER late AFTER $events ON idempotency.$table
		DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION late()"),
		'keeper late', "$who: a deferred trigger fires with its owner's rights");
	sql($node, "DROP TRIGGER late ON idempotency.$table");
	is($act->("CREATE TRIGGER hold BEFORE $events ON idempotency.$table
		FOR EACH ROW EXECUTE FUNCTION hold()"),
		'keeper refused', "$who: no cursor outlives it");
}

# An owner's trigger keeps a worker from sending notices, and from nothing else.
my $offset = -s $node->logfile;
sql($node, q{
	CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not today'; END $$;
	CREATE TRIGGER refuse BEFORE DELETE ON idempotency.pending_notices FOR EACH ROW EXECUTE FUNCTION refuse();
	INSERT INTO idempotency.pending_notices VALUES (now(), 0, 'c', 'p')});
foreach (1 .. 2)
{
	sql($node, "SET session_replication_role = replica; $wait");
	wait_until($node, $is_done, 'a notice cannot be sent: a worker settles all the same');
}
is(sql($node, 'SELECT count(*) FROM idempotency.pending_notices'), '1', 'it is kept');
wait_until($node, q{SELECT last_error LIKE 'could not send the notices%: not today' FROM idempotency.workers WHERE database = 'postgres'}, 'and the view says why');
is(() = slurp_file($node->logfile, $offset) =~ /LOG:  could not send the notices/g, 1, 'the log does once');

# nor does what NOTIFY wouldn't take, which it says only while the transaction commits
sql($node, q{
	DROP TRIGGER refuse ON idempotency.pending_notices;
	INSERT INTO idempotency.pending_notices VALUES (now(), 0, repeat('c', 64), 'p'), (now(), 1, '', 'p'), (now(), 2, 'c', repeat('p', 8000))});
wait_until($node, 'SELECT NOT EXISTS (SELECT FROM idempotency.pending_notices)', 'what cannot be sent ever is not kept');
sql($node, "SET session_replication_role = replica; $wait");
wait_until($node, $is_done, 'and a worker settles');

# A column of another type is the owner's own doing, and no harm to others.
sql($node, q{ALTER TABLE idempotency.pending_notices ALTER channel TYPE int USING 1;
	INSERT INTO idempotency.pending_notices VALUES (now(), 0, 1, 'p')});
wait_until($node, 'SELECT NOT EXISTS (SELECT FROM idempotency.pending_notices)', 'a channel that is a number');

# A database without the extension, whose owner has made a table of that name
sql($node, 'CREATE ROLE mallory LOGIN');
sql($node, 'CREATE DATABASE hers OWNER mallory');
$node->safe_psql('hers', q{
	CREATE SCHEMA idempotency;
	CREATE TABLE idempotency.pending_notices (prepared_at timestamptz, number int, channel text, payload text);
	INSERT INTO idempotency.pending_notices VALUES (now(), 0, 'c', 'p');
	CREATE FUNCTION idempotency.t() RETURNS trigger LANGUAGE plpgsql AS
		$$ BEGIN ALTER ROLE mallory SUPERUSER; RETURN NULL; END $$;
	CREATE CONSTRAINT TRIGGER t AFTER DELETE ON idempotency.pending_notices
		DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION idempotency.t();
	CREATE TABLE x (a int);
	BEGIN;
	INSERT INTO x VALUES (1);
	PREPARE TRANSACTION 'stuck'}, extra_params => [ '-U', 'mallory' ]);
sql($node, q{COMMIT PREPARED 'stuck'}, db => 'hers');
is(sql($node, q{SELECT rolsuper FROM pg_roles WHERE rolname = 'mallory'}), 'f', 'a superuser commits it: its owner is none');
is(sql($node, 'SELECT count(*) FROM idempotency.pending_notices', db => 'hers'), '1', 'the table is hers, and nobody has touched it');

done_testing();
