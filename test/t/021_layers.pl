
# Each folder of src/ includes only itself and those before it, and no two
# headers include each other.  What is in src/ itself may include all.

use strict;
use warnings;

use FindBin;
use Test::More;

my @order = qw(base ledger stripe calls events process send);
my $src = "$FindBin::RealBin/../../src";
my %rank = map { $order[$_] => $_ } 0 .. $#order;
my (@upward, @unprefixed, %included);

for my $path (glob("$src/*.[ch]"), glob("$src/*/*.[ch]"))
{
	my $file = $path =~ s{^\Q$src/\E}{}r;
	my ($folder) = $file =~ m{^(.+)/};

	open(my $fh, '<', $path) or die "$path: $!";
	while (<$fh>)
	{
		next unless /^#\s*include\s+"(.+)"/;
		my $header = $1;

		push @upward, "$file:$.: $header, which is for .c files" if $header eq 'postgres.h' && $file =~ /\.h$/;

		# the server's own, such as "utils/rel.h", are not ours
		next if !-e "$src/$header" && !-e "$path/../$header";
		my ($other) = $header =~ m{^(.+)/};

		if (!defined $other || !exists $rank{$other}) { push @unprefixed, "$file:$.: $header" }
		elsif (defined $folder && $rank{$other} > ($rank{$folder} // -1)) { push @upward, "$file:$.: $header" }
		push @{ $included{$file} }, $header if $file =~ /\.h$/;
	}
}
is(join("\n", @upward), '', join(', ', @order) . ': no file includes one of a later folder');
is(join("\n", @unprefixed), '', 'and each names the folder of what it includes');

# depth first; %state is 1 on the way, 2 behind
my (%state, @cycles);

sub visit
{
	my ($header, @way) = @_;

	return if ($state{$header} // 0) == 2;
	if ($state{$header})
	{
		push @cycles, join(' > ', @way, $header);
		return;
	}
	$state{$header} = 1;
	visit($_, @way, $header) for @{ $included{$header} // [] };
	$state{$header} = 2;
}

visit($_) for sort keys %included;
is(join("\n", @cycles), '', 'no header includes itself by way of others');
cmp_ok(scalar(keys %included), '>', 20, 'the headers were read');

done_testing();
