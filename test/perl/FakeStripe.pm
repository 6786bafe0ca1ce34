
=pod

=head1 NAME

FakeStripe - start the fake Stripe of test/stripe and ask it what happened

=head1 SYNOPSIS

  my $stripe = FakeStripe->start;
  $stripe->fault('close_after', match => { path => '/v1/payment_intents' });
  ...
  is($stripe->charges(key => $key), 1, 'charged once');
  $stripe->stop;

=head1 DESCRIPTION

Needs python3 and core Perl.  Every method dies where the fake refuses what it
is told.  doc/fake-stripe.md describes the faults and the control API.

=cut

package FakeStripe;

use strict;
use warnings;

use Cwd ();
use File::Basename ();
use HTTP::Tiny;
use IO::Handle;
use IPC::Open3 ();
use JSON::PP;

my $program = Cwd::abs_path(File::Basename::dirname(__FILE__) . '/../stripe/fake_stripe.py');
my $json = JSON::PP->new->utf8->canonical;

=pod

=over

=item FakeStripe->start(tls_dir => DIR, port => N, log => FILE)

A fake that runs; it ends with this process, however that ends.  With tls_dir
it makes certificates there and listens with TLS, too.

=cut

sub start
{
	my ($class, %params) = @_;
	my @command = ('python3', '-B', $program, '--stdin');

	push @command, '--tls-dir', $params{tls_dir} if defined $params{tls_dir};
	push @command, '--port', $params{port} if defined $params{port};
	push @command, '--log' if defined $params{log};

	my $log = \*STDERR;
	if (defined $params{log})
	{
		undef $log;
		open($log, '>>', $params{log}) or die "could not open $params{log}: $!";
	}
	my $pid =
	  IPC::Open3::open3(my $stdin, my $stdout, '>&' . fileno($log), @command);

	my $line = readline($stdout);
	die 'the fake Stripe did not start' unless defined $line;
	my $self = bless {
		%{ $json->decode($line) },
		started => $pid,
		owner => $$,
		stdin => $stdin,
		stdout => $stdout,
		http => HTTP::Tiny->new(timeout => 120, proxy => undef, http_proxy => undef, https_proxy => undef),
	}, $class;
	return $self;
}

=pod

=item $stripe->stop

=item $stripe->url, $stripe->port, $stripe->tls_port($name), $stripe->ca

Where the API is.  Names with TLS: right, wrong_host, unknown_ca, expired.

=cut

sub stop
{
	my ($self) = @_;

	return unless defined $self->{started} && $self->{owner} == $$;
	close(delete $self->{stdin});
	local ($?, $!);
	waitpid(delete $self->{started}, 0);
	return;
}

sub DESTROY
{
	my ($self) = @_;
	local $@;
	$self->stop;
	return;
}

sub url { return $_[0]->{url} }
sub port { return $_[0]->{port} }
sub ca { return $_[0]->{tls}{ca} }

sub tls_port
{
	my ($self, $name) = @_;

	return $self->{tls}{ $name // 'right' } // die "there is no TLS port $name";
}

=pod

=item $stripe->control($method, $path, \%body or \%query)

Ask the control API: $path without /_control/.  GET takes a query.

=cut

sub control
{
	my ($self, $method, $path, $given) = @_;
	my %options;
	my $url = "$self->{control}/_control/$path";

	if ($method eq 'GET')
	{
		$url .= '?' . query($given) if defined $given && %$given;
	}
	else
	{
		$options{content} = $json->encode($given // {});
		$options{headers} = { 'Content-Type' => 'application/json' };
	}
	my $answer = $self->{http}->request($method, $url, \%options);
	die "$method $path: $answer->{status} $answer->{content}" unless $answer->{success};
	return $json->decode($answer->{content});
}

# A hash as a query string; a hash in it becomes name[inner]=value.
sub query
{
	my ($given) = @_;
	my @pairs;

	foreach my $name (sort keys %$given)
	{
		my $value = $given->{$name};
		push @pairs, ref $value
		  ? map { [ "${name}[$_]", $value->{$_} ] } sort keys %$value
		  : [ $name, $value ];
	}
	return join('&', map { escape($_->[0]) . '=' . escape($_->[1]) } @pairs);
}

sub escape
{
	my ($text) = @_;

	utf8::encode($text) if utf8::is_utf8($text);
	$text =~ s/([^A-Za-z0-9_.~-])/sprintf('%%%02X', ord($1))/ge;
	return $text;
}

=pod

=item $stripe->fault($what, match => {...}, nth => N, times => N, ...)

Set a fault; its number.

=item $stripe->wait_fault($number, fired => N or holding => N or gone => N)

Return once the fault has struck, holds requests, or has seen clients leave so
many times.

=item $stripe->wait_for(charges => N)

Return once there are so many charges, effects, arrivals, arrivals_incomplete,
or attempts to deliver a webhook.

=item $stripe->release($number)

Let the requests go on that it holds, or those of all faults.

=item $stripe->clear_faults

=cut

sub fault
{
	my ($self, $what, %params) = @_;

	return $self->control('POST', 'faults', { what => $what, %params })->{fault};
}

sub wait_fault
{
	my ($self, $number, %wanted) = @_;

	%wanted = (fired => 1) unless %wanted;
	return $self->wait_for(fault => $number, %wanted);
}

sub wait_for
{
	my ($self, %wanted) = @_;
	my $answer = $self->control('GET', 'wait', { timeout_ms => 30000, %wanted });

	die 'the fake waited in vain: ' . $json->encode({ %wanted, got => $answer }) unless $answer->{reached};
	return $answer;
}

sub release
{
	my ($self, $number) = @_;

	return $self->control('POST', 'release', defined $number ? { fault => $number } : {})->{released};
}

sub clear_faults
{
	my ($self) = @_;

	return $self->control('DELETE', 'faults');
}

=pod

=item $stripe->arrivals(method => ..., path => ..., key => ..., since => N)

The requests whose bytes arrived, as a list of hashes; their number in scalar
context.

=item $stripe->effects(type => ..., action => ..., key => ..., metadata => {...})

What was done, in the same way.

=item $stripe->charges(key => ..., metadata => {...})

How many charges succeeded.

=item $stripe->counts

Totals, as a hash.

=cut

sub arrivals
{
	my ($self, %filter) = @_;
	my $found = $self->control('GET', 'arrivals', \%filter)->{arrivals};

	return wantarray ? @$found : scalar(@$found);
}

sub effects
{
	my ($self, %filter) = @_;
	my $found = $self->control('GET', 'effects', \%filter)->{effects};

	return wantarray ? @$found : scalar(@$found);
}

sub charges
{
	my ($self, %filter) = @_;

	return $self->control('GET', 'charges', \%filter)->{count};
}

sub counts
{
	my ($self) = @_;

	return $self->control('GET', 'counts');
}

=pod

=item $stripe->advance($seconds)

Move the fake's clock.

=item $stripe->settings(search_lag => 60, ...)

=item $stripe->reset

Forget everything.

=item $stripe->webhook_endpoint(secrets => [...], url => ..., ...)

Want events; its number.

=item $stripe->next_webhook(type => ..., endpoint => N, timeout_ms => N)

The next delivery, signed now: a hash of headers, body and so on, or undef.

=back

=cut

sub advance
{
	my ($self, $seconds) = @_;

	return $self->control('POST', 'clock', { advance => $seconds })->{now};
}

sub settings
{
	my ($self, %settings) = @_;

	return $self->control('POST', 'settings', \%settings);
}

sub reset
{
	my ($self) = @_;

	return $self->control('POST', 'reset');
}

sub webhook_endpoint
{
	my ($self, %params) = @_;

	return $self->control('POST', 'webhooks', \%params)->{endpoint};
}

sub next_webhook
{
	my ($self, %filter) = @_;

	return $self->control('GET', 'webhooks/next', \%filter)->{delivery};
}

1;
