
# examples/checkout-node survives what happens to programs: terminated connections, a server
# that restarts or is away, none of its connections free, clients that leave.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use CheckoutTest;
use Test::More;

my ($command, $sdk) = example_in_node();
plan skip_all => $sdk unless $command;

test_misfortunes($command, $sdk);

done_testing();
