
# A claim in a prepared transaction: whoever waits for it goes on when it is
# committed or rolled back, even after a crash, and by another session.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_node('main', conf => "restart_after_crash = on\n");
sql($node, 'CREATE TABLE told (key text, verdict idempotency.verdict, attempt int, response jsonb)');

my $claim = q{FROM idempotency.claim('KEY', 'test', lease => '1 hour')};

# Start a claim that waits for the prepared transaction, end that one by
# $ending, and return what the claim is told.
sub told_after
{
	my ($key, $ending) = @_;
	my $session = $node->background_psql('postgres', on_error_stop => 0);
	my $pid = $session->query('SELECT pg_backend_pid()');
	my $text = $claim =~ s/KEY/$key/r;

	$session->query("SET idempotency.wait_timeout = '5min'");
	$session->query_until(qr/started/, qq{\\echo started
		INSERT INTO told SELECT '$key', verdict, attempt, response $text;\n\\echo ended\n});
	wait_for_lock($node, $pid);
	sql($node, "$ending PREPARED '$key'");
	$session->query_until(qr/ended/, '');
	$session->quit;
	return sql($node, "SELECT verdict, attempt, response FROM told WHERE key = '$key'");
}

# $first is done in the prepared transaction, after an optional lapsed claim.
sub prepare
{
	my ($key, $first, $before) = @_;

	sql($node, $before) if defined $before;
	sql($node, "BEGIN; $first; PREPARE TRANSACTION '$key'");
	return;
}

my $record = q{SELECT idempotency.record('KEY', 'test', token, '"first"') FROM idempotency.claim('KEY', 'test')};
my $lapsed = q{SELECT verdict FROM idempotency.claim('KEY', 'test', lease => '1 microsecond')};

for my $crash (0, 1)
{
	my $when = $crash ? ', and the server has crashed meanwhile' : '';

	my %cases = (
		"claimed$crash" => [ "SELECT verdict $claim", undef, 'in_progress||', 'claimed|1|' ],
		"recorded$crash" => [ $record, undef, 'replay|1|"first"', 'claimed|1|' ],
		"brief$crash" => [ $lapsed, undef, 'claimed|2|', 'claimed|1|' ],
		"taken$crash" => [ "SELECT verdict $claim", $lapsed, 'in_progress||', 'claimed|2|' ]);

	for my $ending ('COMMIT', 'ROLLBACK')
	{
		for my $case (sort keys %cases)
		{
			my ($first, $before) = map { defined ? s/KEY/$case-$ending/gr : undef }
			  @{ $cases{$case} }[0, 1];

			prepare("$case-$ending", $first, $before);
		}
	}
	if ($crash)
	{
		$node->stop('immediate');
		$node->start;
	}
	for my $ending ('COMMIT', 'ROLLBACK')
	{
		for my $case (sort keys %cases)
		{
			is(told_after("$case-$ending", $ending),
				$cases{$case}[ $ending eq 'COMMIT' ? 2 : 3 ],
				"a claim that waits for $case, which ends with $ending$when");
		}
	}
}

# The prepared transaction may be ended by anybody, and the token is good there.
sql($node, q{CREATE TABLE lent AS SELECT 1::bigint AS token LIMIT 0;
	BEGIN;
	INSERT INTO lent SELECT token FROM idempotency.claim('lent', 'test', lease => '1 hour');
	PREPARE TRANSACTION 'lent'});
is(claim($node, 'lent', wait => 'false')->{verdict}, 'in_progress', 'a prepared claim holds its key');
sql($node, q{COMMIT PREPARED 'lent'});
is(sql($node, q{SELECT idempotency.record('lent', 'test', token) IS NOT NULL FROM lent}), 't',
	'its token records once it is committed');

run_fails($node, q{BEGIN; SELECT verdict FROM idempotency.claim('open', 'test'); PREPARE TRANSACTION 'open'},
	'IK005', 'a claim left open refuses PREPARE TRANSACTION');
is(sql($node, q{SELECT count(*) FROM pg_prepared_xacts}), '0', 'and nothing is prepared');

done_testing();
