
# The README and the pages of doc/ keep their word: their SQL runs as it stands
# and answers as they say, the reference has every function, parameter and
# column, the README every setting, error and kind of role.

use strict;
use warnings;

use Digest::SHA qw(hmac_sha256_hex);
use FakeStripe;
use FindBin;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StripeTest;
use Test::More;

my $top = "$FindBin::RealBin/../..";
my %page = map { s{\Q$top/\E}{}r => slurp_file($_) } "$top/README.md", glob("$top/doc/*.md"), glob("$top/examples/*/README.md");
my $readme = $page{'README.md'};
my $reference = $page{'doc/reference.md'};
my $errors_h = slurp_file("$top/src/base/errors.h");
my $wrappers = slurp_file("$top/sql/wrappers.sql");

# calls to Stripe are made to the fake, which signs its events with this
$ENV{IDEMPOTENCY_WEBHOOK_SECRET} = 'whsec_test_1';
my $stripe = FakeStripe->start;
my $node = stripe_node('main', $stripe, preload => 1, extension => 0);

#
# Every block of a page that is marked sql, in order, in one psql.  A line
# "--> a | b" is a row that comes back.  Blocks marked sql-error name the
# SQLSTATE that they raise.  "<!--sql ... -->", which no reader sees, makes what
# the next block is about.  Blocks may use :signature, which is by whsec_test_1,
# and hidden ones :event.
#

my $event = '{"id": "evt_Example", "object": "event", "type": "refund.created", "created": 1795300000,'
  . ' "data": {"object": {"id": "re_Example", "object": "refund"}}}';
my $now = time;
my @variables = ('-v', "event=$event", '-v', "signature=t=$now,v1=" . hmac_sha256_hex("$now.$event", 'whsec_test_1'));

sub run_page
{
	my ($page, $text, $database) = @_;
	my @blocks;

	while ($text =~ /^(?:```(sql|sql-error)|<!--(sql))\n(.*?)^(?:```|-->)$/gms)
	{
		my ($kind, $statements) = ($1 // $2, $3);
		my $sqlstate = '00000';

		if ($kind eq 'sql-error')
		{
			($sqlstate) = $statements =~ /\A-- ERROR ([0-9A-Z]{5}):/
			  or die "$page: no \"-- ERROR nnnnn:\" in $statements";
		}
		push @blocks,
		  {
			line => 1 + (substr($text, 0, $-[0]) =~ tr/\n//),
			text => $statements,
			sqlstate => $sqlstate,
			rows => [ $statements =~ /^--> (.*)$/gm ]
		  };
	}

	my $script = '';
	foreach my $block (@blocks)
	{
		$script .= '\set ON_ERROR_STOP '
		  . ($block->{sqlstate} eq '00000' ? 'on' : 'off') . "\n"
		  . "\\set LAST_ERROR_SQLSTATE 00000\n"
		  . $block->{text}
		  . "\\echo @@ $block->{line} :LAST_ERROR_SQLSTATE\n";
	}

	my ($rc, $stdout, $stderr) =
	  $node->psql($database, $script, extra_params => [ '-F', ' | ', @variables ]);
	is($rc, 0, "psql runs all of $page") or diag($stderr);

	foreach my $block (@blocks)
	{
		my $where = "$page:$block->{line}";
		my @rows = @{ $block->{rows} };

		if ($stdout !~ s/\A(.*?)^@@ $block->{line} (\w+)(?:\n|\z)//ms)
		{
			fail("$where: not reached");
			last;
		}
		my ($output, $sqlstate) = ($1, $2);

		is($sqlstate, $block->{sqlstate}, "$where: SQLSTATE");
		foreach my $row (split /\n/, $output)
		{
			shift @rows if @rows && $row eq $rows[0];
		}
		is_deeply(\@rows, [], "$where: no row missing") or diag($output);
	}
	return @blocks;
}

# These go on from one another; any other page that has SQL has a database of its
# own.  The number is of the blocks that a page has at least.
my @chain = ([ 'README.md', 13 ], [ 'doc/http.md', 5 ], [ 'doc/stripe.md', 6 ], [ 'doc/webhooks.md', 3 ]);
my %alone = ('doc/operations.md' => 3, 'doc/policy.md' => 4, 'doc/runbook.md' => 4);
my @copied;

foreach (@chain)
{
	my ($page, $least) = @$_;
	my @blocks = run_page($page, $page{$page}, 'postgres');

	cmp_ok(scalar(@blocks), '>=', $least, "$page has blocks of SQL");
	push @copied, map { { %$_, page => $page } } @blocks;
}

foreach my $page (sort keys %page)
{
	next if grep { $_->[0] eq $page } @chain;
	next unless $alone{$page} || $page{$page} =~ /^(?:```|<!--)sql/m;
	my $database = $page =~ s/\.md$//r =~ s/\W/_/gr =~ s/^doc_//r;

	$node->safe_psql('postgres', "CREATE DATABASE $database");
	$node->safe_psql($database, 'CREATE EXTENSION idempotency');
	cmp_ok(scalar(run_page($page, $page{$page}, $database)), '>=', $alone{$page} // 1, "$page has blocks of SQL");
}

#
# Functions to copy are those that sql/wrappers.sql tests, but for those that
# need a Stripe: the page itself tests them.
#

my $functions = 0;
foreach my $block (grep { $_->{text} =~ /CREATE FUNCTION/ && $_->{text} !~ /stripe_call\(/ } @copied)
{
	foreach my $statement (split /\n\n(?=CREATE|-- a|-- the)/, $block->{text})
	{
		$statement =~ s/\s+\z//;
		ok(index($wrappers, $statement) >= 0,
			"$block->{page}:$block->{line}: sql/wrappers.sql has "
			  . ($statement =~ /(CREATE .*)/)[0]);
		$functions++;
	}
}
cmp_ok($functions, '>=', 8, 'there are functions to copy');

#
# The reference
#

my %section;
while ($reference =~ /^### (\w+)\n(.*?)(?=^#|\z)/gms)
{
	$section{$1} = $2;
}

sub rows_of
{
	my ($query) = @_;

	return map { [ split /\t/, $_, -1 ] }
	  split /\n/, $node->safe_psql('postgres', $query, extra_params => [ '-F', "\t" ]);
}

# what stands in the column "`name` [, `name`] ..." of a section's tables
sub documented
{
	my ($name, $thing) = @_;

	return ($section{$name} // '') =~ /^\| (?:`\w+`, )*`\Q$thing\E`[ ,]/m;
}

sub brief
{
	my ($text) = @_;

	$text =~ s/timestamp with time zone/timestamptz/g;
	$text =~ s/\bidempotency\.//g;
	$text =~ s/ DEFAULT NULL::\w+(?:\[\])?/ = NULL/g;
	$text =~ s/ DEFAULT ('[^']*')::\w+/ = $1/g;
	$text =~ s/ DEFAULT / = /g;
	return $text;
}

# the README's list of functions and views, each with a link to the reference
my ($list) = $readme =~ /^## Functions\n(.*?)^## /ms;
my %listed;
foreach my $row (($list // '') =~ /^\| (\[.*)$/gm)
{
	my ($name, $link) = $row =~ /^\[`(\w+)`\]\(doc\/reference\.md#(\w+)\) \| \S[^|]* \|$/ or fail("README.md lists a function: $row");

	is($link, $name, "README.md lists $name with a link to it");
	ok(!$listed{$name}++, "README.md lists $name once");
}

my $members = q{
	FROM pg_catalog.pg_depend d
	WHERE d.refclassid = 'pg_catalog.pg_extension'::regclass AND d.deptype = 'e'
		AND d.refobjid = (SELECT oid FROM pg_catalog.pg_extension WHERE extname = 'idempotency')};

my %functions;
foreach my $function (
	rows_of(qq{
		SELECT p.proname, pg_catalog.pg_get_function_arguments(p.oid),
			pg_catalog.pg_get_function_result(p.oid), t.oid, t.typtype
		FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_type t ON t.oid = p.prorettype
		WHERE p.oid IN (SELECT d.objid $members AND d.classid = 'pg_catalog.pg_proc'::regclass)
		ORDER BY p.proname}))
{
	my ($name, $arguments, $result, $type, $typtype) = @$function;
	my $text = $section{$name} // '';

	$text =~ s/\s+/ /g;
	$arguments = brief($arguments);
	like($text, qr/ \Qidempotency.$name($arguments) RETURNS ${\brief($result)}\E /,
		"the reference has $name()");
	ok(delete $listed{$name} || $functions{$name}, "README.md lists $name()");
	isnt($result, 'void', "$name() returns what any driver can read");
	$functions{$name}++;		# there may be another of the name

	foreach my $argument (split /, /, $arguments)
	{
		my ($parameter, $default) = $argument =~ /^(\w+) .*?(?: = (.*))?$/;

		$default = defined $default ? " `$default`" : '';
		like($text, qr/\| `$parameter` \|\Q$default\E \|/,
			"the reference has $name()'s parameter $parameter and its default");
	}

	next unless $typtype eq 'c';
	foreach my $column (
		rows_of(qq{SELECT attname FROM pg_catalog.pg_attribute a
			JOIN pg_catalog.pg_type t ON t.typrelid = a.attrelid
			WHERE t.oid = $type AND attnum > 0 AND NOT attisdropped}))
	{
		ok(documented($name, $column->[0]),
			"the reference has $name()'s column $column->[0]");
	}
}

my %views;
foreach my $column (
	rows_of(qq{SELECT c.relname, a.attname
		FROM pg_catalog.pg_class c JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid
		WHERE c.relkind = 'v' AND a.attnum > 0
			AND c.oid IN (SELECT d.objid $members AND d.classid = 'pg_catalog.pg_class'::regclass)}))
{
	ok(documented(@$column), "the reference has column $column->[1] of view $column->[0]");
	$views{ $column->[0] } = 1;
}
ok(delete $listed{$_}, "README.md lists view $_") foreach sort keys %views;
is(join(' ', sort keys %listed), '', 'README.md lists no function or view that is not there');

# some drivers can't read an interval: the page has its cast to seconds
foreach my $column (
	rows_of(q{SELECT CASE WHEN c.relkind = 'v' THEN c.relname ELSE p.proname END, a.attname
		FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
			LEFT JOIN pg_catalog.pg_proc p ON p.prorettype = c.reltype AND p.pronamespace = 'idempotency'::regnamespace
		WHERE c.relnamespace = 'idempotency'::regnamespace AND a.atttypid = 'interval'::regtype
			AND (c.relkind = 'v' OR p.oid IS NOT NULL)}))
{
	my ($name, $interval) = @$column;

	like($section{$name}, qr/^\| .*`\Q$interval\E`.*`extract\(epoch FROM \Q$interval\E\)::float8`/m,
		"the reference has the cast of $name.$interval");
}

foreach my $label (
	rows_of(q{SELECT t.typname, e.enumlabel
		FROM pg_catalog.pg_enum e JOIN pg_catalog.pg_type t ON t.oid = e.enumtypid
		WHERE t.typnamespace = 'idempotency'::regnamespace}))
{
	like($readme, qr/^\| .*`$label->[1]`.* \|/m, "README.md has $label->[0] $label->[1]");
	like($reference, qr/^\| .*`$label->[1]`.* \|/m, "the reference has $label->[0] $label->[1]");
}

# The table of settings: what pg_settings says, and nothing that isn't there.
my ($settings) = $readme =~ /^\| setting \| unit, range \|[^\n]*\n\|[-|]+\|\n((?:\|[^\n]*\n)+)/m;
my %documented;
my %unit = (s => 'seconds', ms => 'milliseconds', kB => 'kilobytes', '' => '(?:rows|workers|number)');

foreach my $row (split /\n/, $settings // '')
{
	my ($name) = $row =~ /^\| `([\w.]+)` \|/ or fail("README.md names a setting: $row");

	ok(!$documented{$name}, "README.md has setting $name once");
	$documented{$name} = $row;
}

foreach my $setting (
	rows_of(q{LOAD 'idempotency';
		SELECT name, CASE source WHEN 'configuration file' THEN boot_val ELSE current_setting(name) END, context, vartype, min_val, max_val,
			array_to_string(enumvals, '`, `'), COALESCE(unit, '')
		FROM pg_catalog.pg_settings WHERE name LIKE 'idempotency.%'}))
{
	my ($name, $default, $context, $type, $min, $max, $values, $unit) = @$setting;
	my $who = $context eq 'user' ? 'anyone' : 'superuser';
	my $range =
		$type eq 'integer' ? qr/$unit{$unit}, \Q$min to $max\E/
	  : $type eq 'enum' ? qr/\Q`$values`\E/
	  : $type eq 'bool' ? qr/`on`, `off`/
	  : qr/[^|]+/;

	like(delete $documented{$name} // '', qr/^\| `\Q$name\E` \| $range \| `\Q$default\E` \| $who \| [^|]+\.[^|]* \|$/,
		"README.md has setting $name, its unit, range, default and who may set it");
}
is(join(' ', sort keys %documented), '', 'README.md has no setting that is not there');

while ($errors_h =~ /MAKE_SQLSTATE\(([^)]*)\)/g)
{
	my $sqlstate = join '', $1 =~ /'(.)'/g;

	like($readme, qr/\b$sqlstate\b/, "README.md has SQLSTATE $sqlstate");
}

# what each kind of role may do, and no more
my ($kinds) = $readme =~ /^\| kind \| may call \|\n(.*?)^$/ms;
my %kinds = ($kinds // '') =~ /^\| `(\w+)` \| (.*) \|$/gm;
is(join(' ', sort keys %kinds), 'application observer operator stripe_caller webhook',
	'README.md has the kinds of roles');
foreach my $kind (sort keys %kinds)
{
	my $granted = $node->safe_psql('postgres', qq{
		CREATE ROLE role_$kind;
		SELECT FROM idempotency.grant_role('role_$kind', '$kind');
		SELECT DISTINCT p.proname FROM pg_catalog.pg_proc p
		WHERE p.pronamespace = 'idempotency'::regnamespace
			AND has_function_privilege('role_$kind', p.oid, 'EXECUTE')
		UNION ALL
		SELECT c.relname FROM pg_catalog.pg_class c
		WHERE c.relnamespace = 'idempotency'::regnamespace AND c.relkind IN ('r', 'v')
			AND has_any_column_privilege('role_$kind', c.oid, 'SELECT, INSERT, UPDATE')});

	is( join(' ', sort $kinds{$kind} =~ /`(\w+)`/g),
		join(' ', sort split /\n/, $granted),
		"README.md has what grant_role() grants to kind $kind");
}

# tests that are named are there
foreach my $page (sort keys %page)
{
	foreach my $test ($page{$page} =~ /`((?:sql|test)\/\w[\w.\/]*\w)`/g)
	{
		ok(-e "$top/$test" || -e "$top/$test.pl", "$page names $test, which exists");
	}
}

foreach my $promise ($readme =~ /^(\| I\d+ \| .*)$/gm)
{
	my ($number, $tests) = $promise =~ /^\| (I\d+) .*\| ([^|]*) \|$/;

	foreach my $test ($tests =~ /`(\w+)`/g)
	{
		ok( (grep { -e "$top/$_" } "sql/$test.sql", "test/specs/$test.spec", "test/t/$test.pl") == 1,
			"README.md names a test of $number, $test, which exists");
	}
}

# every page of doc/ is listed near the top
my ($pages) = $readme =~ /^## Documentation\n(.*?)^## /ms;
is(join(' ', sort(($pages // '') =~ /^\| \[[^]]+\]\((doc\/[^)#]*)\) \| \S.* \|$/gm)), join(' ', sort grep { /^doc\// } keys %page),
	'README.md lists the pages of doc/');

# links lead somewhere
my %anchors;
foreach my $page (keys %page)
{
	my $headings = $page{$page} =~ s/^```.*?^```$//gmsr;

	$anchors{$page} = { map { (my $a = lc) =~ s/[^\w -]//g; $a =~ tr/ /-/; ($a => 1) } $headings =~ /^#+ (.*)$/gm };
}
foreach my $page (sort keys %anchors)
{
	foreach my $link ($page{$page} =~ /\]\(([^)]*)\)/g)
	{
		next if $link =~ /^https:/;
		my ($file, $anchor) = $link =~ /^([^#]*)#?(.*)$/;
		my $target = $file eq '' ? $page : $page =~ s{[^/]*$}{}r . $file;

		1 while $target =~ s{[^/]+/\.\./}{};

		ok(-e "$top/$target", "$page links to $target, which exists");
		ok($anchors{$target}{$anchor}, "$page: $target has a heading for #$anchor") if $anchor ne '';
	}
}

$node->stop;

done_testing();
