
# What is known of the databases survives a restart in a file.  Whatever is wrong
# with that file, the server starts and stops, says so in its log, and the
# workers go on.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_node('main', preload => 1, conf => "idempotency.expiry_interval = 1s\n");
my $file = $node->data_dir . '/pg_stat/idempotency.databases';
my $whole;

sub works
{
	my ($test_name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;

	expired_rows($node, 3, prefix => $test_name);
	return wait_until_expired($node, "$test_name: the workers go on");
}

sub logged_since
{
	my ($offset) = @_;

	return substr(slurp_file($node->logfile), $offset);
}

sub write_file
{
	my ($content) = @_;

	unlink $file;
	append_to_file($file, $content);
	return;
}

works('first start');
$node->stop;
ok(-s $file, 'the file is written when the server stops');
$whole = slurp_file($file);

# magic, number of entries, checkpoint, checksum; then entries of two numbers
foreach my $case (
	[ 'empty', '' ],
	[ 'half a header', substr($whole, 0, 10) ],
	[ 'another magic number', "\x00" . substr($whole, 1) ],
	[ 'a negative number of entries', substr($whole, 0, 4) . pack('l', -1) . substr($whole, 8) ],
	[ 'too many entries', substr($whole, 0, 4) . pack('l', 1_000_000) . substr($whole, 8) ],
	[ 'an entry too few', substr($whole, 0, -8) ],
	[ 'another checksum', substr($whole, 0, -1) . chr(ord(substr($whole, -1)) ^ 1) ])
{
	my ($name, $content) = @$case;
	my $offset = -s $node->logfile;

	write_file($content);
	$node->start;
	like(logged_since($offset), qr/LOG:  ignoring invalid data in file "pg_stat\/idempotency.databases"/, "$name: the log says so");
	ok(!-e $file, "$name: it is gone");
	works($name);
	$node->stop;
	ok(-s $file, "$name: and is written anew");
}

# of another shutdown than the last
my $old = slurp_file($file);
$node->start;
works('whole');
$node->stop;
write_file($old);
my $offset = -s $node->logfile;
$node->start;
unlike(logged_since($offset), qr/idempotency.databases/, 'a file of an earlier shutdown is nothing to speak of');
works('an earlier shutdown');
$node->stop;

SKIP:
{
	skip 'root reads everything', 5 if $> == 0;
	chmod(0000, $file) or die "could not chmod $file: $!";
	$offset = -s $node->logfile;
	$node->start;
	like(logged_since($offset), qr/could not read file "pg_stat\/idempotency.databases": Permission denied/, 'unreadable: the log says so');
	ok(!-e $file, 'unreadable: it is gone');
	works('unreadable');
	$node->stop;
	is((stat $file)[2] & 0777, 0600, 'unreadable: and is written anew');
	$node->start;
	works('replaced');
	$node->stop;
}

# it can't be written
foreach my $case (
	[ 'a directory in its place', sub { mkdir "$file.tmp" }, qr/Is a directory/, sub { rmdir "$file.tmp" } ],
	[ 'no space', sub { symlink '/dev/full', "$file.tmp" }, qr/No space left on device/, sub { 1 } ])
{
	my ($name, $before, $problem, $after) = @$case;

	$node->start;
	works($name);
	$before->() or die "$name: $!";
	$offset = -s $node->logfile;
	$node->stop;
	like(logged_since($offset), qr/LOG:  could not write file "pg_stat\/idempotency.databases.tmp": $problem/, "$name: the log says so");
	ok(!-e $file, "$name: there is no file");
	$after->() or die "$name: $!";
	ok(!-l "$file.tmp" && !-e "$file.tmp", "$name: and no half of one");
}

# nor renamed
$node->start;
mkdir $file or die "$file: $!";
$offset = -s $node->logfile;
$node->stop;
like(logged_since($offset), qr/LOG:  could not \w+ file "pg_stat\/idempotency.databases/, 'a directory in its place: the log says so');
$offset = -s $node->logfile;
$node->start;
like(logged_since($offset), qr/ignoring invalid data in file "pg_stat\/idempotency.databases"/, 'and when it is read, too');
works('a directory');
$node->stop;
rmdir $file;
$node->start;
works('and without it');
$node->stop;

done_testing();
