
# Fuzz targets, for a while: test/fuzz/run says with what.  "make fuzz" goes on
# for longer.

use strict;
use warnings;

use FindBin;
use PostgreSQL::Test::Utils;
use Test::More;

my $run = "$FindBin::RealBin/../fuzz/run";
my $dir = PostgreSQL::Test::Utils::tempdir();

plan skip_all => 'no C compiler'
  unless grep { system("command -v $_ >/dev/null 2>&1") == 0 } ($ENV{CC} // 'cc', 'gcc', 'clang');

my $output = `$^X $run 20 $dir 2>&1`;
is($?, 0, 'nothing was found');
note($output);
my ($n) = $output =~ /^(?:stat::number_of_executed_units: +)?(\d+)(?: inputs.*)?$/m;
cmp_ok($n // 0, '>', 1000, 'and it was looked for');

done_testing();
