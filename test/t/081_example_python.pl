
# examples/checkout-python, as it stands there.  Skips without psycopg; without
# Stripe's library for Python it goes the way that needs none.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use CheckoutTest;
use Test::More;

my (undef, $psycopg) = run_program('python3', '-c', 'import psycopg');
plan skip_all => 'python3 has no psycopg' unless $psycopg;
my (undef, $sdk) = run_program('python3', '-c', 'import stripe');
note("python3 has no stripe: /checkout-by-sdk isn't tested") unless $sdk;

test_checkouts([ 'python3', '-B', "$FindBin::RealBin/../../examples/checkout-python/server.py" ], sdk => $sdk);

done_testing();
