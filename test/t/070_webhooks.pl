
# What needs a server of one's own about events: where secrets come from, that
# they are seen nowhere, a thousand duplicates at once, workers side by side,
# who is told of a settled call, a restart.

use strict;
use warnings;

use Digest::SHA qw(hmac_sha256_hex);
use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

# statements are logged, but for those that pass a secret
my $node = new_node('main', conf => 'log_statement = all');

sub signature
{
	my ($body, $secret, $t) = @_;

	$t //= time;
	return "t=$t,v1=" . hmac_sha256_hex("$t.$body", $secret);
}

sub event
{
	my ($id, $more) = @_;

	return sprintf '{"id": "%s", "object": "event", "type": "refund.created", "created": 1795300000, '
	  . '"data": {"object": {"id": "re_%s", "object": "refund"}}%s}', $id, $id, $more // '';
}

sub bytes
{
	return "'\\x" . unpack('H*', $_[0]) . "'";
}

sub verify
{
	my ($secret, $role) = @_;

	return $node->safe_psql('postgres', 'SELECT idempotency.stripe_webhook_verify('
		  . bytes('{}') . ", '" . signature('{}', $secret) . "')",
		extra_params => defined $role ? [ '-U', $role ] : []);
}

#
# Secrets: the file of a role or database, then the environment
#
my $dir = PostgreSQL::Test::Utils::tempdir();
my $file = "$dir/secrets";

sub write_secrets
{
	my ($text, $mode) = @_;

	unlink $file;
	append_to_file($file, $text);
	chmod $mode // 0600, $file or die "$file: $!";
	return;
}

is(verify('whsec_test_a'), 'no_secret', 'nothing is configured');

write_secrets("whsec_test_a\n");
sql($node, "ALTER DATABASE postgres SET idempotency.webhook_secret_file = '$file'");
is(verify('whsec_test_a'), 'valid', "a database's file");
is(verify('whsec_test_b'), 'no_matching_signature', 'and not any other');

# a running session sees a changed file at once
my $session = $node->background_psql('postgres');
my $query = 'SELECT idempotency.stripe_webhook_is_valid('
  . bytes('{}') . ", '" . signature('{}', 'whsec_test_b') . "');";
is($session->query($query), 'f', 'before the secret is rolled');
write_secrets("\n  whsec_test_a \r\n\nwhsec_test_b");
is($session->query($query), 't', 'one that is added counts at once');
is(verify('whsec_test_a'), 'valid', 'beside the one before');
write_secrets("whsec_test_b\n");
is(verify('whsec_test_a'), 'no_matching_signature', 'until that is gone');

sql($node, qq{
	CREATE ROLE hook LOGIN;
	SELECT FROM idempotency.grant_role('hook', 'webhook')});
append_to_file("$dir/of_hook", "whsec_test_hook\n");
chmod 0400, "$dir/of_hook";
sql($node, "ALTER ROLE hook SET idempotency.webhook_secret_file = '$dir/of_hook'");
is(verify('whsec_test_hook', 'hook'), 'valid', "a role's file");
is(verify('whsec_test_b', 'hook'), 'no_matching_signature', 'goes before that of the database');
is(verify('whsec_test_hook'), 'no_matching_signature', 'and is of no use to others');
my (undef, undef, $stderr) = $node->psql('postgres',
	"SELECT idempotency.stripe_webhook_is_valid('', ''); SET idempotency.webhook_secret_file = '$file'", extra_params => [ '-U', 'hook' ]);
like($stderr, qr/permission denied to set parameter/, 'a role cannot choose its file');

# files that are refused
sub refused
{
	my ($pattern, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	my ($rc, $stdout, $stderr) = $node->psql('postgres', "SELECT idempotency.stripe_webhook_is_valid('{}', 't=1,v1=0')");
	isnt($rc, 0, "$name is refused");
	like($stderr, $pattern, "$name: why");
	unlike($stderr, qr/whsec/, "$name: and not what is in it");
	return;
}

foreach my $mode (0640, 0604, 0610, 0602)
{
	write_secrets("whsec_test_a\n", $mode);
	refused(qr/can be accessed by others/, sprintf('mode %04o', $mode));
}
write_secrets('');
refused(qr/is empty/, 'an empty file');
write_secrets(" \n\n");
refused(qr/is empty/, 'a file of empty lines');
write_secrets("whsec_test_a\nwhsec test b\n");
refused(qr/has a line that cannot be a secret/, 'white space in a secret');
write_secrets("whsec_test_a\0\n");
refused(qr/zero byte/, 'a zero byte');
write_secrets("whsec_test_a\n" x 2000);
refused(qr/is larger than/, 'a large file');
write_secrets(join("\n", map { "whsec_test_$_" } 1 .. 17));
refused(qr/more than 16/, 'too many secrets');
unlink $file;
refused(qr/could not open file/, 'a file that is not there');
mkdir $file;
refused(qr/is not a regular file/, 'a directory');
rmdir $file;
system('mkfifo', '-m', '600', $file) == 0 or die "mkfifo: $!";
refused(qr/is not a regular file/, 'a pipe, without waiting for it');
unlink $file;

# a link to a file, as orchestrators make them
append_to_file("$dir/target", "whsec_test_link\n");
chmod 0600, "$dir/target";
symlink "$dir/target", $file or die "symlink: $!";
is(verify('whsec_test_link'), 'valid', 'a symbolic link to a file');
unlink $file;

# the argument goes first, and means those alone
is(sql($node, 'SELECT idempotency.stripe_webhook_verify('
		. bytes('{}') . ", '" . signature('{}', 'whsec_test_arg') . "', '{whsec_test_arg}')"),
	'valid', 'the argument goes before a file that is missing');

# the environment of the postmaster, where no file is set
$session->quit;
{
	local $ENV{IDEMPOTENCY_WEBHOOK_SECRET} = "whsec_test_env1\nwhsec_test_env2\n";
	$node->restart;
}
refused(qr/could not open file/, 'a missing file, whatever the environment says');
sql($node, 'ALTER DATABASE postgres RESET idempotency.webhook_secret_file');
is(verify('whsec_test_env1'), 'valid', 'the environment');
is(verify('whsec_test_env2'), 'valid', 'may have several');
is(verify('whsec_test_a'), 'no_matching_signature', 'and others do not count');
{
	local $ENV{IDEMPOTENCY_WEBHOOK_SECRET} = '';
	$node->restart;
}
is(verify('whsec_test_env1'), 'no_secret', 'an empty one is none');

write_secrets("whsec_test_main\n");
sql($node, "ALTER DATABASE postgres SET idempotency.webhook_secret_file = '$file'");

#
# A thousand duplicates at once: one is claimed, the others are told so
#
sql($node, q{
	CREATE TABLE told (verdict text);
	CREATE TABLE effects (stripe_event_id text, attempt int, worker int)});

my $body = event('evt_dup');
my $script = "$dir/duplicates.sql";
append_to_file($script, sprintf q{
BEGIN;
INSERT INTO told SELECT verdict FROM idempotency.stripe_webhook_claim(%s, '%s') RETURNING (verdict = 'claimed')::int AS won \gset
\if :won
INSERT INTO effects SELECT stripe_event_id, attempts, pg_backend_pid() FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_dup';
SELECT idempotency.stripe_webhook_record('evt_dup', token) FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_dup';
\endif
COMMIT;
}, bytes($body), signature($body, 'whsec_test_main'));
$node->command_checks_all(
	[
		'pgbench', '--no-vacuum', '--client=25', '--jobs=2', '--transactions=40',
		'--file', $script, '--host', $node->host, '--port', $node->port, 'postgres'
	],
	0, [qr{actually processed: 1000/1000}], [qr{^(?!.*ERROR)}s],
	'1,000 duplicate deliveries in parallel');
is(sql($node, 'SELECT string_agg(verdict || n, q ORDER BY verdict) FROM
		(SELECT verdict, count(*) AS n FROM told GROUP BY verdict) v, (VALUES (chr(32))) s (q)'),
	'claimed1 replay999', 'one is claimed, the others replay');
is(sql($node, q{SELECT count(*), min(attempt) FROM effects WHERE stripe_event_id = 'evt_dup'}), '1|1', 'it had its effect once');

#
# Events are kept, and workers take them, each once
#
my $kept = join(";\n", map {
	my $b = event("evt_$_");
	sprintf "SELECT idempotency.stripe_webhook_receive(%s, '%s', consumer => 'w')", bytes($b), signature($b, 'whsec_test_main')
} 1 .. 300);
sql($node, $kept);
$script = "$dir/workers.sql";
append_to_file($script, q{
BEGIN;
WITH e AS (SELECT * FROM idempotency.stripe_webhook_next(consumer => 'w')),
	i AS (INSERT INTO effects SELECT stripe_event_id, attempt, pg_backend_pid() FROM e)
SELECT count(*) AS n, coalesce(min(stripe_event_id), '') AS id, coalesce(min(token), 0) AS token FROM e \gset
\if :n
SELECT idempotency.stripe_webhook_record(':id', :token, consumer => 'w');
\endif
COMMIT;
});
$node->command_checks_all(
	[
		'pgbench', '--no-vacuum', '--client=8', '--jobs=2', '--transactions=50', '--protocol=simple',
		'--file', $script, '--host', $node->host, '--port', $node->port, 'postgres'
	],
	0, [qr{actually processed: 400/400}], [qr{^(?!.*ERROR)}s],
	'8 workers take 300 events');
is(sql($node, q{SELECT count(*), count(DISTINCT stripe_event_id), max(attempt) FROM effects WHERE stripe_event_id <> 'evt_dup'}),
	'300|300|1', 'each once');
is(sql($node, q{SELECT count(*) FROM idempotency.stripe_webhook_events WHERE consumer = 'w' AND success}), '300', 'and all of them');
cmp_ok(sql($node, q{SELECT count(DISTINCT worker) FROM effects WHERE stripe_event_id <> 'evt_dup'}), '>', 1, 'side by side');

#
# Who listens is told of a settled call, at commit
#
my $key = sql($node, q{
	SET idempotency.stripe_ledger = 'transaction';
	SELECT idempotency_key FROM idempotency.stripe_claim('refund', 'o"1', '{"method": "POST", "path": "/v1/refunds"}') c,
		idempotency.stripe_record('refund', 'o"1', c.token)});
my $settling = event('evt_settling', ', "request": {"id": "req_1", "idempotency_key": "' . $key =~ s/"/\\"/gr . '"}');
my $receive = sprintf "SELECT FROM idempotency.stripe_webhook_receive(%s, '%s')",
  bytes($settling), signature($settling, 'whsec_test_main');
my $told = sql($node, "LISTEN idempotency_settled; BEGIN; $receive; ROLLBACK; SELECT 'nothing yet'; $receive");
like($told, qr/^nothing yet\n.*Asynchronous notification "idempotency_settled" with payload "(.*)" received/s, 'NOTIFY comes with the commit');
my ($payload) = $told =~ /with payload "(.*)" received/;
is(sql($node, 'SELECT ' . literal($payload) . "::jsonb = jsonb_build_object('account', '', 'operation_type', 'refund',
		'operation_id', 'o\"1', 'outcome', 'completed', 'resource_id', 're_evt_settling')"),
	't', 'and names the operation and its outcome');
unlike(sql($node, "LISTEN idempotency_settled; SELECT FROM idempotency.stripe_webhook_receive("
		. bytes($settling) . ", '" . signature($settling, 'whsec_test_main') . "', consumer => 'other')"),
	qr/notification/, 'once');

#
# A crash: what was claimed in an open transaction is to be claimed again, what
# was recorded stays
#
my $crashing = event('evt_crash');
my $claim = sprintf "SELECT verdict, attempt FROM idempotency.stripe_webhook_claim(%s, '%s', tolerance => '1 h', lease => %%s)",
  bytes($crashing), signature($crashing, 'whsec_test_main');
$session = $node->background_psql('postgres');
is($session->query('BEGIN; ' . sprintf($claim, 'NULL') . ';'), 'claimed|1', 'claimed in an open transaction');
$node->stop('immediate');
$node->start;
is(sql($node, sprintf $claim, "'1 h'"), 'claimed|1', 'the server crashes: it is claimed anew');
$node->stop('immediate');
$node->start;
is(sql($node, sprintf $claim, "'1 h'"), 'in_progress|1', 'a claim with a lease outlives a crash');
is(sql($node, sprintf("SELECT verdict FROM idempotency.stripe_webhook_claim(%s, '%s', tolerance => '1 h')",
			bytes($body), signature($body, 'whsec_test_main'))),
	'replay', 'and so does what was recorded');
eval { $session->quit };

#
# No secret anywhere
#
my $log = slurp_file($node->logfile);
my @secrets = $log =~ /(whsec_test_(?!arg)\w+)/g;
is("@secrets", '', 'no configured secret is in the log');
is(sql($node, q{SELECT count(*) FROM pg_settings WHERE setting LIKE '%whsec%'}), '0', 'nor in a setting');
is(sql($node, q{SELECT count(*) FROM pg_db_role_setting WHERE setconfig::text LIKE '%whsec%'}), '0', 'nor in the catalog');
is(sql($node, q{SELECT count(*) FROM idempotency.stripe_webhook_events e WHERE e::text LIKE '%whsec%'}), '0', 'nor in the ledger');

$node->stop;

done_testing();
