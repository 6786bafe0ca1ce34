
=pod

=head1 NAME

StripeTest - a server that calls the fake Stripe

=cut

package StripeTest;

use strict;
use warnings;

use Exporter 'import';
use FakeStripe;
use IdempotencyTest;
use JSON::PP;
use PostgreSQL::Test::Utils;
use Test::More;

our @EXPORT = qw(
  TEST_KEY stripe_node write_key stripe_get stripe_call stripe_retry stripe_row
  operation settings
);

use constant TEST_KEY => 'sk_test_0123456789abcdefghijklmn';

my $json = JSON::PP->new->utf8->allow_nonref;

=pod

=over

=item stripe_node($name, $stripe, conf => TEXT, ...)

A running server with the extension, whose calls to Stripe reach the fake.

=item write_key($node, $key, $mode)

Write the file that its API key is read from.

=cut

sub write_key
{
	my ($node, $key, $mode) = @_;
	my $file = $node->{stripe_key_file};

	unlink $file;
	append_to_file($file, $key);
	chmod($mode // 0600, $file) or die "could not chmod $file: $!";
	return;
}

sub stripe_node
{
	my ($name, $stripe, %params) = @_;
	my $file = PostgreSQL::Test::Utils::tempdir($name) . '/stripe_key';
	my $conf = delete $params{conf} // '';

	append_to_file($file, TEST_KEY . "\n");
	chmod(0600, $file) or die "could not chmod $file: $!";
	my $node = new_node(
		$name, %params,
		conf => 'idempotency.stripe_api_base = ' . literal($stripe->url) . "\n"
		  . 'idempotency.stripe_api_key_file = ' . literal($file) . "\n$conf");
	$node->{stripe_key_file} = $file;
	return $node;
}

=pod

=item settings(name => value, ...)

Statements that set idempotency.* for a session.

=item stripe_get($node, $path, params => {...}, settings => {...}, before => SQL, ...)

A call of stripe_get(); the answer is a hash reference.

=item stripe_call($node, $type, $id, $method, $path, params => {...}, ...)

=item stripe_retry($node, $type, $id, ...)

Likewise.

=item operation($node, $type, $id, account => ...)

What stripe_lookup() says of an operation.

=item stripe_row($node, $query, settings => {...})

Any query's row as a hash reference.

=back

=cut

sub settings
{
	my (%settings) = @_;

	return join('',
		map { "SET idempotency.$_ = " . literal($settings{$_}) . ";\n" } sort keys %settings);
}

sub stripe_row
{
	my ($node, $query, %params) = @_;

	return $json->decode(
		$node->safe_psql($params{db} // 'postgres',
				settings(%{ $params{settings} // {} })
			  . (defined $params{before} ? "$params{before};\n" : '')
			  . "SELECT pg_catalog.row_to_json(r) FROM $query r"));
}

# A function called with arguments by position, then by name.
sub stripe_function
{
	my ($node, $function, $positional, %values) = @_;
	my $settings = delete $values{settings};
	my $db = delete $values{db};
	my $before = delete $values{before};

	$values{params} = $json->encode($values{params}) if ref $values{params};
	return stripe_row(
		$node,
		"idempotency.$function("
		  . join(', ', (map { literal($_) } @$positional), map { "$_ => " . literal($values{$_}) } sort keys %values)
		  . ')',
		settings => $settings,
		before => $before,
		db => $db);
}

sub stripe_get
{
	my ($node, $path, %values) = @_;
	return stripe_function($node, 'stripe_get', [$path], %values);
}

sub stripe_call
{
	my ($node, $type, $id, $method, $path, %values) = @_;
	return stripe_function($node, 'stripe_call', [ $type, $id, $method, $path ], %values);
}

sub stripe_retry
{
	my ($node, $type, $id, %values) = @_;
	return stripe_function($node, 'stripe_retry', [ $type, $id ], %values);
}

sub operation
{
	my ($node, $type, $id, %values) = @_;
	return stripe_function($node, 'stripe_lookup', [ $type, $id ], %values);
}

1;
