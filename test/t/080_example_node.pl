
# examples/checkout-node: a payment is made once, however it goes.  Skips where Node isn't
# installed, or its libraries can't be fetched.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use CheckoutTest;

test_example(\&test_checkouts, example_in_node());
