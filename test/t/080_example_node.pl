
# examples/checkout-node, as it stands there, with the libraries that its lock
# file names.  Skips where Node isn't installed, or they can't be fetched.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use CheckoutTest;
use PostgreSQL::Test::Utils;
use Test::More;

foreach my $program ('node', 'npm')
{
	my (undef, $ok) = run_program($program, '--version');
	plan skip_all => "$program is not installed" unless $ok;
}
my ($version) = run_program('node', '--version');
plan skip_all => 'node is older than 20' if ($version =~ /^v(\d+)/)[0] < 20;

my $dir = PostgreSQL::Test::Utils::tempdir() . '/checkout-node';
my ($output, $ok) = run_program('cp', '-R', "$FindBin::RealBin/../../examples/checkout-node", $dir);
die $output unless $ok;
($output, $ok) = run_program('npm', 'ci', '--prefix', $dir, '--no-audit', '--no-fund', '--loglevel=error',
	'--ignore-scripts', '--fetch-retries=0', '--fetch-timeout=15000');
$output =~ s/\s+/ /g;
plan skip_all => 'npm cannot fetch stripe and pg: ' . substr($output, 0, 200) unless $ok;

test_checkouts([ 'node', "$dir/server.mjs" ]);

done_testing();
