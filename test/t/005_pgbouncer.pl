
# PgBouncer in transaction mode: every transaction may find itself in another
# session, among those of other clients.  Nothing here depends on the session.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use IPC::Run;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my ($pgbouncer) = grep { -x } map { "$_/pgbouncer" } split(/:/, $ENV{PATH}), '/usr/sbin';
plan skip_all => 'pgbouncer is not installed' unless defined $pgbouncer;

my $node = new_node('main', conf => 'log_statement = none');
sql($node, q{
	CREATE TABLE effects (key text, session int);
	CREATE TABLE told (key text, verdict idempotency.verdict, token bigint, response jsonb, session int);
});

my $dir = PostgreSQL::Test::Utils::tempdir_short();
my $port = PostgreSQL::Test::Cluster::get_free_port();
my $user = sql($node, 'SELECT current_user');
append_to_file("$dir/users", qq("$user" ""\n));
append_to_file("$dir/pgbouncer.ini", join("\n",
	'[databases]',
	sprintf('postgres = host=%s port=%d', $node->host, $node->port),
	'[pgbouncer]',
	'pool_mode = transaction',
	'default_pool_size = 2',
	'max_client_conn = 100',
	'listen_addr =',
	"listen_port = $port",
	"unix_socket_dir = $dir",
	'auth_type = trust',
	"auth_file = $dir/users",
	"logfile = $dir/log",
	'ignore_startup_parameters = extra_float_digits') . "\n");

my $output = '';
my $server = IPC::Run::start([ $pgbouncer, '-q', "$dir/pgbouncer.ini" ],
	'<', \undef, '>&', \$output);
my $connstr = "host=$dir port=$port user=$user dbname=postgres";

END
{
	my $status = $?;
	$server->kill_kill if defined $server;
	$? = $status;
}

# psql isn't given its statement on a pipe, which breaks if it ends at once
my $tries = 10 * $PostgreSQL::Test::Utils::timeout_default;
until (IPC::Run::run([ 'psql', '-X', '-d', $connstr, '-c', 'SELECT 1' ], '<', \undef, '>', \my $stdout, '2>', \my $stderr))
{
	die "pgbouncer doesn't answer: $output" unless $tries-- > 0 && $server->pumpable;
	select(undef, undef, undef, 0.1);
}

# One transaction from claim to commit; and claim, commit, record, where the
# second transaction may run in the other session.
my $claim = q{
INSERT INTO told SELECT 'KEY' || :n, verdict, token, response, pg_backend_pid() FROM idempotency.claim('KEY' || :n, 'test'ARGUMENTS) RETURNING (verdict = 'claimed')::int AS won, coalesce(token, 0) AS token \gset};
my $record = q{
INSERT INTO effects VALUES ('KEY' || :n, pg_backend_pid());
SELECT idempotency.record('KEY' || :n, 'test', :token, jsonb_build_object('client', :client_id::int));};
my %script = (
	one => qq{
\\set n random(1, 20)
BEGIN;} . $claim =~ s/ARGUMENTS//r . qq{
\\if :won} . $record . qq{
\\endif
COMMIT;
},
	two => qq{
\\set n random(1, 20)} . $claim =~ s/ARGUMENTS/, lease => '1 hour', wait => false/r . qq{
\\if :won
SELECT idempotency.extend('KEY' || :n, 'test', :token);
BEGIN;} . $record . qq{
COMMIT;
\\endif
});

foreach my $protocol ('simple', 'extended')
{
	my @files;

	foreach my $flow (sort keys %script)
	{
		my $file = "$dir/$protocol-$flow.sql";

		append_to_file($file, $script{$flow} =~ s/KEY/$protocol /gr);
		push @files, '-f', $file;
	}
	$node->command_checks_all(
		[
			'pgbench', '--no-vacuum', '--client=20', '--jobs=2', '--transactions=20',
			"--protocol=$protocol", @files, $connstr
		],
		0,
		[qr{number of transactions actually processed: 400/400}],
		[qr{^(?!.*ERROR)}s],
		"$protocol: 20 clients on 2 sessions");

	my $mine = "key LIKE '$protocol %'";
	is(sql($node, qq{
		SELECT count(*), count(DISTINCT key) FROM effects WHERE $mine}),
		'20|20', "$protocol: every key had its effect once");
	is(sql($node, qq{
		SELECT count(*) FROM told WHERE $mine AND verdict = 'claimed'}),
		'20', "$protocol: and was claimed once");
	is(sql($node, qq{
		SELECT count(*) FROM told t JOIN idempotency.idempotency_keys k USING (key)
		WHERE $mine AND t.verdict = 'replay' AND t.response IS DISTINCT FROM k.response}),
		'0', "$protocol: and was replayed with the one result");
	cmp_ok(sql($node, qq{SELECT count(*) FROM told WHERE $mine AND verdict = 'replay'}),
		'>', 0, "$protocol: there were replays");
	is(sql($node, qq{SELECT count(*) FROM told WHERE $mine AND verdict NOT IN
			('claimed', 'replay', 'in_progress')}),
		'0', "$protocol: and nothing unexpected");
	is(sql($node, qq{SELECT count(DISTINCT session) FROM told WHERE $mine}),
		'2', "$protocol: both sessions worked");
}

is(sql($node, 'SELECT count(*) FROM idempotency.open_claims'), '0', 'nothing is left open');

# A forgotten claim is stopped at COMMIT, and its session is as good as new.
my (undef, undef, $forgotten) = $node->psql('postgres', q{
	\set VERBOSITY sqlstate
	BEGIN;
	SELECT FROM idempotency.claim('forgotten 1', 'test');
	COMMIT}, connstr => $connstr);
like($forgotten, qr/ERROR:\s+IK005/, 'a claim left open is refused');
foreach my $i (1 .. 4)
{
	is($node->safe_psql('postgres', qq{
		SELECT count(idempotency.record('forgotten $i', 'test', c.token))
			FROM idempotency.claim('forgotten $i', 'test') c}, connstr => $connstr),
		'1', "it doesn't haunt the transactions after it: $i");
}

$server->kill_kill;
undef $server;
$node->stop;

done_testing();
