
# examples/checkout-python: a payment is made once, however it goes.  Skips without psycopg;
# without Stripe's library for Python it goes the way that needs none.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use CheckoutTest;

test_example(\&test_checkouts, example_in_python());
