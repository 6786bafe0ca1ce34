
# Memory doesn't grow: a short run of "make leak", in a process of its own.

use strict;
use warnings;

use FindBin;

$ENV{LEAK_CLAIMS} = 5000;
$ENV{LEAK_CALLS} = 520;
exec($^X, (map { ('-I', $_) } @INC), "$FindBin::RealBin/../leak.pl") or die "could not run leak.pl: $!";
