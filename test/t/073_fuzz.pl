
# Fuzz targets, for a while each: test/fuzz/run says with what.  "make fuzz"
# goes on for longer.

use strict;
use warnings;

use FindBin;
use PostgreSQL::Test::Utils;
use Test::More;

my $run = "$FindBin::RealBin/../fuzz/run";
my $dir = PostgreSQL::Test::Utils::tempdir();

plan skip_all => 'no C compiler'
  unless grep { system("command -v $_ >/dev/null 2>&1") == 0 } ($ENV{CC} // 'cc', 'gcc', 'clang');

my $output = `$^X $run 4 $dir 2>&1`;
is($?, 0, 'nothing was found');
note($output);
my %n = $output =~ /^(\w+): (\d+) inputs/mg;
my @targets = qw(path webhook_signature);
push @targets, qw(answer fingerprint form json_text) if system('curl-config --version >/dev/null 2>&1') == 0;
cmp_ok($n{$_} // 0, '>', 1000, "and it was looked for: $_") for @targets;

done_testing();
