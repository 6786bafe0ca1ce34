
# A claim that is left open at COMMIT fails before a foreign server is told to
# commit, wherever the extension's library was loaded first.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use IdempotencyTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_node('main', preload => 1);

plan skip_all => 'postgres_fdw is not installed'
  if $node->psql('postgres', 'CREATE EXTENSION postgres_fdw') != 0;

my ($host, $port) = ($node->host, $node->port);
sql($node, qq{
	CREATE TABLE there (n integer);
	CREATE SERVER itself FOREIGN DATA WRAPPER postgres_fdw
		OPTIONS (host '$host', port '$port', dbname 'postgres');
	CREATE USER MAPPING FOR CURRENT_USER SERVER itself;
	CREATE FOREIGN TABLE here (n integer) SERVER itself OPTIONS (table_name 'there')});

my $claim = q{SELECT token FROM idempotency.claim('k', 's') \gset};
my $connect = 'SELECT count(*) FROM here';

run_fails($node, "$connect; BEGIN; $claim\nINSERT INTO here VALUES (1); COMMIT",
	'IK005', 'left open');
is(sql($node, 'SELECT count(*) FROM there'), '0', 'left open: nothing is committed there');
sql($node, "$connect; BEGIN; $claim\nINSERT INTO here VALUES (2);
	SELECT idempotency.record('k', 's', :token); COMMIT");
is(sql($node, 'SELECT n FROM there'), '2', 'recorded: it is');

done_testing();
