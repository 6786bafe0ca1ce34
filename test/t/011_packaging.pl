
# The files that name a version agree, and META.json has what PGXN asks for.

use strict;
use warnings;

use FindBin;
use JSON::PP;
use PostgreSQL::Test::Utils;
use Test::More;

my $top = "$FindBin::RealBin/../..";
my ($version) = slurp_file("$top/idempotency.control") =~ /^default_version = '([\d.]+)'/m;
my ($library) = slurp_file("$top/src/base/compat.h") =~ /IDEMPOTENCY_VERSION "([\d.]+)"/;
my ($changes) = slurp_file("$top/CHANGELOG.md") =~ /^## ([\d.]+)/m;
my ($debian) = slurp_file("$top/debian/changelog") =~ /^postgresql-idempotency \(([\d.]+)-\d+\)/;
is($library, $version, 'src/base/compat.h');
is($changes, $version, 'CHANGELOG.md');
is($debian, $version, 'debian/changelog');
ok(-e "$top/idempotency--$version.sql", 'the script');

my $meta = decode_json(slurp_file("$top/META.json"));
my $semantic = $version =~ /^\d+\.\d+$/ ? "$version.0" : $version;
like($meta->{$_}, qr/\S/, "META.json: $_") foreach qw(name abstract maintainer license);
is($meta->{version}, $semantic, 'META.json: version');
is($meta->{license}, 'postgresql', 'META.json: a license that PGXN knows');
is($meta->{'meta-spec'}{version}, '1.0.0', 'META.json: of its specification');
my $provided = $meta->{provides}{idempotency};
is($provided->{version}, $semantic, 'META.json: what it provides');
ok(-e "$top/$provided->{$_}", "META.json: $_") foreach qw(file docfile);

# made from control.in
my $control = slurp_file("$top/debian/control.in");
my ($major) = slurp_file("$top/debian/control") =~ /^Package: postgresql-(\d+)-idempotency$/m;
is($control =~ s/PGVERSION/$major/gr, slurp_file("$top/debian/control"), 'debian/control is made from control.in');

done_testing();
