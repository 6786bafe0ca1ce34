
# examples/checkout-python survives what happens to programs: terminated connections, a server
# that restarts or is away, none of its connections free, clients that leave.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use CheckoutTest;

test_example(\&test_misfortunes, example_in_python());
