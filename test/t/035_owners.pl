
# Whoever owns a ledger can give it triggers. In background processes, which
# are a superuser's, they come by no more than their owner's rights: not at the
# end of a transaction, and not where it touches the tables of several owners.

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
			RETURN NEW;
		EXCEPTION WHEN insufficient_privilege THEN
			PERFORM public.note('refused');
			RETURN NEW;
		END $$;
	INSERT INTO idempotency.stripe_webhook_events
		(token, received_at, attempts, account, stripe_event_id, consumer, event_type)
	VALUES (1, now(), 0, '', 'evt_1', '', 'x')});

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

for my $case (
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

done_testing();
