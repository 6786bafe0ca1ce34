
# The README keeps its word: its SQL runs as it stands and answers as it says,
# and its reference has every function, parameter, column, setting and error.

use strict;
use warnings;

use FakeStripe;
use FindBin;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StripeTest;
use Test::More;

my $top = "$FindBin::RealBin/../..";
my $readme = slurp_file("$top/README.md");
my $errors_h = slurp_file("$top/src/errors.h");
my $wrappers = slurp_file("$top/sql/wrappers.sql");

# calls to Stripe are made to the fake
my $stripe = FakeStripe->start;
my $node = stripe_node('main', $stripe, preload => 1, extension => 0);

#
# Every block marked sql, in order, in one psql.  A line "--> a | b" is a row
# that comes back.  Blocks marked sql-error name the SQLSTATE that they raise.
#

my @blocks;
while ($readme =~ /^```(sql|sql-error)\n(.*?)^```$/gms)
{
	my ($kind, $text) = ($1, $2);
	my $line = 1 + (substr($readme, 0, $-[0]) =~ tr/\n//);
	my $sqlstate = '00000';

	if ($kind eq 'sql-error')
	{
		($sqlstate) = $text =~ /\A-- ERROR ([0-9A-Z]{5}):/
		  or die "README.md:$line: no \"-- ERROR nnnnn:\"";
	}
	push @blocks,
	  {
		line => $line,
		text => $text,
		sqlstate => $sqlstate,
		rows => [ $text =~ /^--> (.*)$/gm ]
	  };
}
cmp_ok(scalar(@blocks), '>', 10, 'the README has blocks of SQL');

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
  $node->psql('postgres', $script, extra_params => [ '-F', ' | ' ]);
is($rc, 0, 'psql runs all of them') or diag($stderr);

foreach my $block (@blocks)
{
	my $where = "README.md:$block->{line}";
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

#
# Functions to copy are those that sql/wrappers.sql tests.
#

foreach my $block (grep { $_->{text} =~ /CREATE FUNCTION/ } @blocks)
{
	foreach my $statement (split /\n\n(?=CREATE|-- a|-- the)/, $block->{text})
	{
		$statement =~ s/\s+\z//;
		ok(index($wrappers, $statement) >= 0,
			"README.md:$block->{line}: sql/wrappers.sql has "
			  . ($statement =~ /(CREATE .*)/)[0]);
	}
}

#
# The reference
#

my %section;
while ($readme =~ /^#### (\w+)\n(.*?)(?=^#|\z)/gms)
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

my $members = q{
	FROM pg_catalog.pg_depend d
	WHERE d.refclassid = 'pg_catalog.pg_extension'::regclass AND d.deptype = 'e'
		AND d.refobjid = (SELECT oid FROM pg_catalog.pg_extension WHERE extname = 'idempotency')};

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
		"README.md has $name()");

	foreach my $argument (split /, /, $arguments)
	{
		my ($parameter, $default) = $argument =~ /^(\w+) .*?(?: = (.*))?$/;

		$default = defined $default ? " `$default`" : '';
		like($text, qr/\| `$parameter` \|\Q$default\E \|/,
			"README.md has $name()'s parameter $parameter and its default");
	}

	next unless $typtype eq 'c';
	foreach my $column (
		rows_of(qq{SELECT attname FROM pg_catalog.pg_attribute a
			JOIN pg_catalog.pg_type t ON t.typrelid = a.attrelid
			WHERE t.oid = $type AND attnum > 0 AND NOT attisdropped}))
	{
		ok(documented($name, $column->[0]),
			"README.md has $name()'s column $column->[0]");
	}
}

foreach my $column (
	rows_of(qq{SELECT c.relname, a.attname
		FROM pg_catalog.pg_class c JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid
		WHERE c.relkind = 'v' AND a.attnum > 0
			AND c.oid IN (SELECT d.objid $members AND d.classid = 'pg_catalog.pg_class'::regclass)}))
{
	ok(documented(@$column), "README.md has column $column->[1] of view $column->[0]");
}

foreach my $label (
	rows_of(q{SELECT t.typname, e.enumlabel
		FROM pg_catalog.pg_enum e JOIN pg_catalog.pg_type t ON t.oid = e.enumtypid
		WHERE t.typnamespace = 'idempotency'::regnamespace}))
{
	like($readme, qr/^\| .*`$label->[1]`.* \|/m, "README.md has $label->[0] $label->[1]");
}

foreach my $setting (
	rows_of(q{LOAD 'idempotency';
		SELECT name, CASE source WHEN 'configuration file' THEN boot_val ELSE current_setting(name) END, context, vartype, min_val, max_val,
			array_to_string(enumvals, '`, `')
		FROM pg_catalog.pg_settings WHERE name LIKE 'idempotency.%'}))
{
	my ($name, $default, $context, $type, $min, $max, $values) = @$setting;
	my $who = $context eq 'user' ? 'anyone' : 'superuser';
	my $range =
		$type eq 'integer' ? "$min to $max"
	  : $type eq 'enum' ? "`$values`"
	  : '';

	like($readme, qr/^\| `\Q$name\E` \|[^|]*\Q$range\E \| `\Q$default\E` \| $who \|/m,
		"README.md has setting $name, its range, default and who may set it");
}

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
		SELECT p.proname FROM pg_catalog.pg_proc p
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
foreach my $test ($readme =~ /`((?:sql|test)\/\w[\w.\/]*\w)`/g)
{
	ok(-e "$top/$test", "README.md names $test, which exists");
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

# links within the page lead somewhere
my %anchor = map { (my $a = lc) =~ s/[^\w -]//g; $a =~ tr/ /-/; ($a => 1) }
  $readme =~ /^#+ (.*)$/gm;
foreach my $link ($readme =~ /\]\(#([^)]*)\)/g)
{
	ok($anchor{$link}, "README.md has a heading for #$link");
}
foreach my $file ($readme =~ /\]\(([^#)][^)]*)\)/g)
{
	ok(-e "$top/$file", "README.md links to $file, which exists");
}

$node->stop;

done_testing();
