
# examples/checkout-node: a payment is made once, however it goes.  Skips where Node isn't
# installed, or its libraries can't be fetched.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use CheckoutTest;
use Test::More;

my ($command, $sdk) = example_in_node();
plan skip_all => $sdk unless $command;

test_checkouts($command, $sdk);

done_testing();
