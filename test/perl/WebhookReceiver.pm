
=pod

=head1 NAME

WebhookReceiver - a webhook endpoint as an application has one

=head1 SYNOPSIS

  my $receiver = WebhookReceiver->start($node);
  $stripe->webhook_endpoint(url => $receiver->url('claim'), secrets => ['whsec_test_1']);
  $receiver->down('payment_intent.succeeded');

=head1 DESCRIPTION

Starts test/stripe/receiver.py, which says how it answers.  It ends with the
process that has started it, at the latest.

=over

=item WebhookReceiver->start($node)

=item $receiver->url('claim' or 'receive')

=item $receiver->down(TYPES)

Answer events of these types by 503, '*' all; no other ones any more.

=item $receiver->stop

=back

=cut

package WebhookReceiver;

use strict;
use warnings;

use Cwd ();
use File::Basename ();
use IPC::Open2 ();
use PostgreSQL::Test::Utils;

my $program = Cwd::abs_path(File::Basename::dirname(__FILE__) . '/../stripe/receiver.py');

sub start
{
	my ($class, $node) = @_;
	my $self = bless { owner => $$, down => PostgreSQL::Test::Utils::tempdir('receiver') . '/down' }, $class;

	local $ENV{PGHOST} = $node->host;
	local $ENV{PGPORT} = $node->port;
	local $ENV{PGDATABASE} = 'postgres';
	$self->{pid} = IPC::Open2::open2($self->{stdout}, $self->{stdin}, 'python3', '-B', $program, $self->{down});
	chomp($self->{url} = readline($self->{stdout}) // die 'the receiver did not start');
	return $self;
}

sub url
{
	my ($self, $function) = @_;

	return "$self->{url}/$function";
}

sub down
{
	my ($self, @types) = @_;

	unlink "$self->{down}.new";
	append_to_file("$self->{down}.new", join("\n", @types));
	rename "$self->{down}.new", $self->{down} or die "rename: $!";
	return;
}

sub stop
{
	my ($self) = @_;

	return unless defined $self->{pid} && $self->{owner} == $$;
	close(delete $self->{stdin});
	local ($?, $!);
	waitpid(delete $self->{pid}, 0);
	return;
}

sub DESTROY
{
	my ($self) = @_;
	local $@;
	$self->stop;
	return;
}

1;
