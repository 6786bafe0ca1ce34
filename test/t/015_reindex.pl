
# While REINDEX CONCURRENTLY rebuilds a ledger's primary key, there are two of
# them.  Claims of the same keys at the same moment still fail for nobody, and
# each key is claimed once.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IPC::Run;

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_node('main', conf => "max_connections = 50\nlog_statement = none\n");

# A key is new about every five milliseconds, and all clients come at once.
my %ledger = (
	idempotency_keys => q{SELECT verdict FROM idempotency.claim(:k::text, 'test', lease => '1 hour');},
	stripe_idempotency_keys =>
	  q{SELECT verdict FROM idempotency.stripe_claim('test', :k::text, lease => '1 hour');});

foreach my $table (sort keys %ledger)
{
	my $script = $node->basedir . "/$table.sql";
	my ($out, $rebuilt) = ('', 0);

	append_to_file($script, "SELECT (extract(epoch FROM now()) * 200)::int8 AS k \\gset\n$ledger{$table}\n");
	my $bench = IPC::Run::start(
		[ 'pgbench', '--no-vacuum', '-c', 16, '-t', 500, '-f', $script, $node->connstr('postgres') ],
		'>', \$out, '2>&1', IPC::Run::timeout(600));
	while ($rebuilt < 200 && $bench->pumpable)
	{
		sql($node, "REINDEX TABLE CONCURRENTLY idempotency.$table");
		$rebuilt++;
		$bench->pump_nb;
	}
	my $succeeded = $bench->finish;
	cmp_ok($rebuilt, '>', 1, "$table is rebuilt while it is used");
	ok($succeeded, "$table: nobody fails") or diag($out);
	is(sql($node, "SELECT count(*) FROM (SELECT 1 FROM idempotency.$table GROUP BY "
			. ($table eq 'idempotency_keys' ? 'scope, key' : 'account, operation_type, operation_id')
			. ' HAVING count(*) > 1) twice'), 0, "$table: no row is there twice");
	sql($node, "REINDEX TABLE CONCURRENTLY idempotency.$table");
}

done_testing();
