
# The table of what Stripe's answers mean, row by row: test/unit/stripe_outcome.c
# is compiled with it and says the rest.

use strict;
use warnings;

use FindBin;
use PostgreSQL::Test::Utils;
use Test::More;

my $top = "$FindBin::RealBin/../..";
my $pg_config = $ENV{PG_CONFIG} // 'pg_config';
my $program = PostgreSQL::Test::Utils::tempdir('unit') . '/stripe_outcome';
chomp(my $cc = `$pg_config --cc`);
chomp(my $includes = `$pg_config --includedir-server`);

plan skip_all => "no compiler ($cc)" if $cc eq '' || system("$cc --version >/dev/null 2>&1") != 0;

my @sources = ("$top/test/unit/stripe_outcome.c", "$top/test/unit/server.c", "$top/src/stripe/stripe_outcome.c");
system("$cc -Wall -Werror -I$top/src -I$includes -o $program @sources") == 0
  or die 'could not compile test/unit/stripe_outcome.c';

# its own TAP is ours
open(my $output, '-|', $program) or die "could not run $program: $!";
while (my $line = <$output>)
{
	my ($not, $name) = $line =~ /^(not )?ok \d+ - (.*)$/ or next;
	ok(!$not, $name);
}
ok(close($output), 'the program ends well');

done_testing();
