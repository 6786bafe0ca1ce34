
=pod

=head1 NAME

IdempotencyTest - helpers for the extension's TAP tests

=head1 DESCRIPTION

Thin wrappers around PostgreSQL::Test::Cluster, which finds the server and
reads TEMP_CONFIG for where the extension is installed.  All of them work in
database postgres unless told otherwise by db => NAME.

=cut

package IdempotencyTest;

use strict;
use warnings;

use Digest::SHA qw(hmac_sha256_hex);
use Exporter 'import';
use JSON::PP;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes ();

our @EXPORT = qw(
  literal new_node sql run_fails claim claim_text call_text stripe_claim
  lapse_lease lapse_stripe_lease wait_for_lock extension_functions
  create_test_caller needs_debug_points arm disarm wait_for_point
  occupy_workers free_workers wait_for_no_recorder
  receive_events expired_rows wait_until wait_until_expired wait_until_up
);

my $json = JSON::PP->new->utf8->allow_nonref;

=pod

=over

=item literal($value)

A value as an SQL literal; undef is NULL.

=cut

sub literal
{
	my ($value) = @_;

	return 'NULL' unless defined $value;
	my $escaped = $value =~ /\\/;
	$value =~ s/(['\\])/$1$1/g;
	return ($escaped ? ' E' : '') . "'$value'";
}

=pod

=item new_node($name, conf => TEXT, init => {...}, extension => 0, preload => 1, debug => 1)

A running server with the extension in database postgres; with preload, in
shared_preload_libraries, too; with debug, the build that has debug points,
preloaded, and the function test_stripe_call().

=cut

sub new_node
{
	my ($name, %params) = @_;
	my $node = PostgreSQL::Test::Cluster->new($name);

	$node->init(%{ $params{init} // {} });
	$node->append_conf('postgresql.conf', "max_prepared_transactions = 10\n");
	$node->append_conf('postgresql.conf', slurp_file($ENV{IDEMPOTENCY_DEBUG_CONF}))
	  if $params{debug};
	$node->append_conf('postgresql.conf', "shared_preload_libraries = 'idempotency'\n")
	  if $params{preload} || $params{debug};
	$node->append_conf('postgresql.conf', $params{conf}) if defined $params{conf};
	mkdir $node->data_dir . '/debug_points' if $params{debug};
	$node->start;
	$node->safe_psql('postgres', 'CREATE EXTENSION idempotency')
	  if $params{extension} // 1;
	create_test_caller($node) if $params{debug};
	return $node;
}

sub create_test_caller
{
	my ($node, %params) = @_;

	$node->safe_psql($params{db} // 'postgres', q{
		CREATE FUNCTION test_stripe_call(type text, id text, body text DEFAULT 'amount=1',
			status int DEFAULT 200, resource_id text DEFAULT 'pi_1', room int DEFAULT 65536,
			resend boolean DEFAULT false, answer int DEFAULT 0)
		RETURNS text AS 'idempotency_test_caller' LANGUAGE C;
		CREATE FUNCTION test_note_fates(max_rows int) RETURNS int
		AS 'idempotency_test_caller' LANGUAGE C;
		CREATE FUNCTION test_occupy_workers() RETURNS int
		AS 'idempotency_test_caller' LANGUAGE C});
	return;
}

=pod

=item needs_debug_points()

Skip the whole test where that build isn't there.

=item arm($node, $point, $action), disarm($node, $point), wait_for_point($node, $point)

Arm a debug point (src/base/debug_point.c), let go whoever waits there, wait until
somebody has come there; the latter returns the process id.

=cut

sub needs_debug_points
{
	plan skip_all => 'test/run makes the build with debug points'
	  unless $ENV{IDEMPOTENCY_DEBUG_CONF};
	return;
}

sub arm
{
	my ($node, $point, $action) = @_;
	my $file = $node->data_dir . "/debug_points/$point";

	unlink "$file.reached";
	append_to_file("$file.new", "$action\n");
	rename "$file.new", $file or die "could not arm $point: $!";
	return;
}

sub disarm
{
	my ($node, $point) = @_;

	unlink $node->data_dir . "/debug_points/$point";
	return;
}

sub wait_for_point
{
	my ($node, $point) = @_;
	my $file = $node->data_dir . "/debug_points/$point.reached";

	foreach (1 .. 1800)
	{
		if (-s $file)
		{
			chomp(my $pid = slurp_file($file));
			return $pid;
		}
		Time::HiRes::usleep(100_000);
	}
	die "nobody has come to $point";
}

=pod

=item occupy_workers($node), free_workers($node)

Take all slots for background processes that are free, and keep them; give them
back.

=item wait_for_no_recorder($node)

Return once every recorder has gone.

=cut

sub occupy_workers
{
	my ($node) = @_;

	arm($node, 'occupied', 'all');
	return $node->safe_psql('postgres', 'SELECT test_occupy_workers()');
}

sub free_workers
{
	my ($node) = @_;

	disarm($node, 'occupied');
	return;
}

sub wait_for_no_recorder
{
	my ($node) = @_;

	return $node->poll_query_until('postgres',
		q{SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'idempotency recorder')})
	  || die 'the recorder stays';
}

=pod

=item sql($node, $statements, db => NAME)

The statements' output; the test dies where one of them fails.

=cut

sub sql
{
	my ($node, $statements, %params) = @_;

	return $node->safe_psql($params{db} // 'postgres', $statements);
}

=pod

=item run_fails($node, $statements, $sqlstate, $test_name, db => NAME)

Test that the statements fail with this SQLSTATE.

=cut

sub run_fails
{
	my ($node, $statements, $sqlstate, $test_name, %params) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	my (undef, undef, $stderr) = $node->psql($params{db} // 'postgres',
		"\\set VERBOSITY sqlstate\n$statements");
	my ($got) = $stderr =~ /ERROR:\s+(\w{5})\b/;

	return is($got // 'no error', $sqlstate, $test_name);
}

# Named arguments of an SQL function.
sub arguments
{
	my (%values) = @_;

	return join(', ', map { "$_ => " . literal($values{$_}) } sort keys %values);
}

=pod

=item call_text($function, %arguments)

A SELECT of the function's result as text, which is exact: every byte of a
response shows in it.

=cut

sub call_text
{
	my ($function, %values) = @_;

	return "SELECT r::text FROM idempotency.$function(" . arguments(%values) . ") r";
}

=pod

=item claim($node, $key, scope => ..., lease => ..., db => NAME)

Claim a key in a transaction of its own; the answer is a hash reference.

=item claim_text($node, $key, ...)

The same, with the answer as text.

=item stripe_claim($node, $operation_type, $operation_id, ...)

=cut

sub claim
{
	my ($node, $key, %values) = @_;
	my $db = delete $values{db} // 'postgres';

	return $json->decode(
		$node->safe_psql($db,
				'SELECT pg_catalog.row_to_json(r) FROM idempotency.claim('
			  . arguments(scope => 'test', %values, key => $key)
			  . ') r'));
}

sub claim_text
{
	my ($node, $key, %values) = @_;
	my $db = delete $values{db} // 'postgres';

	return $node->safe_psql($db,
		call_text('claim', scope => 'test', %values, key => $key));
}

sub stripe_claim
{
	my ($node, $type, $id, %values) = @_;
	my $db = delete $values{db} // 'postgres';

	return $json->decode(
		$node->safe_psql($db,
				'SELECT pg_catalog.row_to_json(r) FROM idempotency.stripe_claim('
			  . arguments(%values, operation_type => $type, operation_id => $id)
			  . ') r'));
}

=pod

=item lapse_lease($node, $key, scope => ..., db => NAME)

=item lapse_stripe_lease($node, $operation_type, $operation_id, db => NAME)

Let the time of a lease pass at once.

=cut

sub lapse_lease
{
	my ($node, $key, %values) = @_;

	return lapse($node, $values{db}, 'idempotency_keys',
		'scope = '
		  . literal($values{scope} // 'test')
		  . ' AND key = '
		  . literal($key));
}

sub lapse_stripe_lease
{
	my ($node, $type, $id, %values) = @_;

	return lapse($node, $values{db}, 'stripe_idempotency_keys',
		'operation_type = ' . literal($type) . ' AND operation_id = ' . literal($id));
}

sub lapse
{
	my ($node, $db, $table, $condition) = @_;

	my $changed = $node->safe_psql(
		$db // 'postgres', qq{
		WITH lapsed AS (
			UPDATE idempotency.$table
			SET lease_expires_at = clock_timestamp() - interval '1 microsecond'
			WHERE $condition AND lease_expires_at IS NOT NULL
			RETURNING 1)
		SELECT count(*) FROM lapsed});
	die "there is no lease where $condition" unless $changed eq '1';
	return;
}

=pod

=item wait_for_lock($node, $pid)

Return once a backend waits for a lock.

=cut

sub wait_for_lock
{
	my ($node, $pid) = @_;

	return $node->poll_query_until('postgres',
		"SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = $pid")
	  || die "backend $pid doesn't wait for a lock";
}

=pod

=item wait_until_up($node)

Return once the server accepts connections again.  (poll_query_until() dies
where psql has been refused before the query is written to it.)

=cut

sub wait_until_up
{
	my ($node) = @_;

	foreach (1 .. 1800)
	{
		my ($status) = eval { $node->psql('postgres', 'SELECT true') };

		return if defined $status && $status == 0;
		Time::HiRes::usleep(100_000);
	}
	die 'the server is still down';
}

=pod

=item receive_events($node, db => NAME)

Take in four events of Stripe's: one is processed, one has failed, one is held,
and one waits for its call.

=cut

sub receive_events
{
	my ($node, %params) = @_;
	my $receive = sub {
		my ($id, $more) = @_;
		my $body = qq({"id": "$id", "object": "event",  "type": "a.b", "data": {"object": {"id": "o_$id"}}$more});
		my $signature = 't=1795300000,v1=' . hmac_sha256_hex("1795300000.$body", 'whsec_test');

		return "SELECT FROM idempotency.stripe_webhook_receive('\\x" . unpack('H*', $body)
		  . "', '$signature', '{whsec_test}', '1000 years')";
	};

	sql($node, join(";\n",
			$receive->('evt_1', ''),
			$receive->('evt_2', ', "account": "acct_1", "livemode": true'),
			$receive->('evt_3', ', "created": 1795300000, "name": "\u00e9 \\""'),
			$receive->('evt_4', ', "request": {"id": "req_1", "idempotency_key": "t:1:018c2b5e-0000-8000-8000-000000000001"}'),
			q{SELECT FROM idempotency.stripe_webhook_next() c, idempotency.stripe_webhook_record(
				c.stripe_event_id, c.token, order_id => '018c2b5e-0000-7000-8000-000000000002')},
			q{SELECT FROM idempotency.stripe_webhook_next() c, idempotency.stripe_webhook_record(
				c.stripe_event_id, c.token, error_message => 'no', account => c.account)},
			q{SELECT FROM idempotency.stripe_webhook_reclaim('evt_3', lease => '1 year')}), %params);
	return;
}

=pod

=item expired_rows($node, $n, db => NAME, prefix => TEXT)

Write rows of $n recorded keys, prefix1 and so on, that expired a day ago.

=item wait_until($node, $query, $test_name, db => NAME)

Test that the query answers t, within three minutes.

=item wait_until_expired($node, $test_name, db => NAME)

Test that all expired rows go, by themselves.

=cut

sub expired_rows
{
	my ($node, $n, %params) = @_;
	my $prefix = literal($params{prefix} // 'expired');

	sql($node, qq{
		INSERT INTO idempotency.idempotency_keys
			(token, claimed_at, recorded_at, expires_at, attempt, http_status, scope, key)
		SELECT n, t - interval '1 day', t - interval '1 day', t, 1, 200, 'test', $prefix || n
		FROM generate_series(1, $n) n, (SELECT clock_timestamp() - interval '1 day' AS t) t},
		db => $params{db});
	return;
}

sub wait_until
{
	my ($node, $query, $test_name, %params) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return ok($node->poll_query_until($params{db} // 'postgres', $query), $test_name);
}

sub wait_until_expired
{
	my ($node, $test_name, %params) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	return wait_until($node, q{SELECT NOT EXISTS (SELECT FROM idempotency.idempotency_keys
		WHERE expires_at <= clock_timestamp())}, $test_name, %params);
}

=pod

=item extension_functions($node, $condition, db => NAME)

Names of the extension's functions that fulfil a condition on pg_proc, one a
line, so that a test can tell whether it has a case for each.

=back

=cut

sub extension_functions
{
	my ($node, $condition, %params) = @_;

	return $node->safe_psql(
		$params{db} // 'postgres', qq{
		SELECT DISTINCT proname FROM pg_proc
		WHERE pronamespace = 'idempotency'::regnamespace AND $condition
		ORDER BY 1});
}

1;
