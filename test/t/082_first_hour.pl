
# The README's first hour, as it stands there: every block but the first, which
# installs, is run by one shell, and answers as the lines "#>" say.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use CheckoutTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my ($output, $ok) = run_program('/usr/bin/python3', '-c', 'import psycopg');
plan skip_all => 'python3 has no psycopg' unless $ok;
plan skip_all => 'curl is not installed' if system('command -v curl >/dev/null') != 0;

my $readme = slurp_file("$FindBin::RealBin/../../README.md");
my ($hour) = $readme =~ /^## The first hour\n(.*?)^## /ms or die 'README.md has no first hour';
my ($install, @blocks) = $hour =~ /^```sh\n(.*?)^```$/gms;
like($install, qr/^ *sudo make .*install\b/m, 'the first block installs');
is(scalar(grep { !/^#>/ && !/(?:&&|\\)$/ } split /\n/, $install),
	1, 'it is one command: sudo would take lines that are pasted after it for its own');
cmp_ok(scalar(@blocks), '>', 5, 'there are more');

# What differs here: where the extension is installed, the ports, the directory;
# and the locale is that of a machine on which none is set.
my $home = PostgreSQL::Test::Utils::tempdir_short();
my %ports = map { $_ => PostgreSQL::Test::Cluster::get_free_port() } (8080, 12111, 12112);
my $script = "set -e\nexport HOME='$home' LANG= LC_ALL=\ntrap 'kill \$(jobs -p) 2>/dev/null; pg_ctl -D $home/first-hour/data -s -m immediate stop 2>/dev/null' EXIT\n";
my @expected;
foreach my $block (@blocks)
{
	$block =~ s/\b(8080|12111|12112)\b/$ports{$1}/g;
	$block =~ s/^(cat >>\S+postgresql\.conf) /cat '$ENV{TEMP_CONFIG}' >>\$HOUR\/data\/postgresql.conf\n$1 /m if $ENV{TEMP_CONFIG};
	push @expected, $block =~ /^#> ?(.*)$/gm;
	$script .= $block;
}
$script .= "trap - EXIT\n";

my $dir = PostgreSQL::Test::Utils::tempdir();
append_to_file("$dir/first_hour.sh", $script);
chdir "$FindBin::RealBin/../.." or die "chdir: $!";
delete $ENV{$_} foreach qw(PGHOST PGPORT PGDATABASE PGUSER TEMP_CONFIG);
($output, $ok) = run_program('bash', "$dir/first_hour.sh");
ok($ok, 'the shell runs all of it');

# a row with its white space as it may be; "..." is anything
my $rest = $output;
my $missing = 0;
foreach my $line (@expected)
{
	my $pattern = join '[ ]+', map { join '[^\n]*', map { quotemeta } split /\.\.\./, $_, -1 } split ' ', $line;

	if ($rest =~ s/\A.*?^[ ]*$pattern[ ]*$//ms)
	{
		pass($line);
		next;
	}
	fail("missing: $line");
	$missing++;
}
diag($output) if $missing || !$ok;
ok(!-e "$home/first-hour", 'nothing is left');

done_testing();
