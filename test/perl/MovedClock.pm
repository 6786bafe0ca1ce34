
=pod

=head1 NAME

MovedClock - a clock that a test moves

=head1 DESCRIPTION

    my $clock = MovedClock->new($dir);
    $clock->around(sub { $node->start });
    $clock->set(86400);

Servers that are started in around() have a wall clock that is so many seconds
ahead (test/clock/clock.c), as have all their processes; what waits goes on as ever.

=cut

package MovedClock;

use strict;
use warnings;

use File::Basename qw(dirname);
use PostgreSQL::Test::Utils;

sub new
{
	my ($class, $dir) = @_;
	my $self = bless { library => "$dir/clock.so", file => "$dir/clock" }, $class;

	PostgreSQL::Test::Utils::system_or_bail('gcc', '-shared', '-fPIC', '-o', $self->{library},
		dirname(__FILE__) . '/../clock/clock.c', '-ldl');
	$self->set(0);
	return $self;
}

sub set
{
	my ($self, $seconds) = @_;

	open(my $fh, -e $self->{file} ? '+<' : '>', $self->{file}) or die "clock: $!";
	binmode $fh;
	print $fh pack('q', $seconds);
	close($fh) or die "clock: $!";
	return;
}

sub around
{
	my ($self, $code) = @_;
	local $ENV{LD_PRELOAD} = $self->{library};
	local $ENV{CLOCK_FILE} = $self->{file};

	return $code->();
}

1;
