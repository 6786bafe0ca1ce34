
# examples/checkout-python: a payment is made once, however it goes.  Skips without psycopg;
# without Stripe's library for Python it goes the way that needs none.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use CheckoutTest;
use Test::More;

my ($command, $sdk) = example_in_python();
plan skip_all => $sdk unless $command;

test_checkouts($command, $sdk);

done_testing();
