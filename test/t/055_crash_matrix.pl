
# The crash matrix of doc/crash-matrix.md: a payment comes to a step, something
# happens, the application tries again.  However it went, the card is charged
# once, by one key and the same bytes.
#
# For each thing that may happen there is one payment at every step, all at
# the same time.  Debug points hold those whose step is in the caller or the
# recorder, the fake Stripe those that have been sent.

use strict;
use warnings;

use FakeStripe;
use FindBin;
use IdempotencyTest;
use PayingApplication;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StripeTest;
use Test::More;
use Time::HiRes ();

needs_debug_points();

my $conf = q{
restart_after_crash = on
max_connections = 100
synchronous_commit = off
wal_writer_delay = 10s
idempotency.stripe_max_retries = 0
idempotency.stripe_timeout = '10 min'
idempotency.stripe_record_timeout = '10 min'
};

my $stripe = FakeStripe->start;
my $node = stripe_node('main', $stripe, debug => 1, conf => $conf);
sql($node, PAYING_APPLICATION);

#
# What the page says
#

my @columns = ('the ledger', 'orphan', 'the retry', 'requests', 'charges');
my (@steps, %page, $section);

foreach (split /\n/, slurp_file("$FindBin::RealBin/../../doc/crash-matrix.md"))
{
	$section = $1 if /^## (.*)/;
	next unless /^\| (.*) \|$/ && !/^\| step \|/;
	my ($step, @cells) = split / \| /, $1;
	push @steps, $step if $section eq 'The steps';
	next unless @cells == @columns;
	die "$section at $step is there twice" if $page{$section}{$step};
	$page{$section}{$step} = join(' | ', @cells);
}

#
# Payments on their way
#

my @caller_points = ('claim-answered', 'before-send', 'before-record', 'after-record');
my @points = (@caller_points, 'recorder-after-commit', 'recorder-before-commit');

# One payment for each step.
sub new_payments
{
	my ($fault) = @_;
	my %payments;

	foreach my $step (@steps)
	{
		my $client = "$fault->{name}, $step";
		my ($operation, $key) = split /\|/, sql($node, q{
			SELECT op, idempotency.stripe_idempotency_key('payment', op::text)
			FROM idempotency.operation_uuid('} . $client . q{', 'user 1') op});
		my $session = $node->background_psql('postgres', on_error_stop => 0);

		$payments{$step} = {
			step => $step, client => $client, operation => $operation, key => $key, session => $session,
			pid => $session->query_safe('SELECT pg_backend_pid()'),
			statement => "BEGIN; SELECT " . ($fault->{function} // 'pay') . "('$client');\n" };
	}
	return \%payments;
}

sub begin
{
	my ($payment) = @_;

	$payment->{session}->query_until(qr/begun/, "\\echo begun\n$payment->{statement}");
	return;
}

# ... and see it come to a debug point of its own
sub begin_and_hold
{
	my ($payment, $point) = @_;

	arm($node, $point, 'wait');
	begin($payment);
	wait_for_point($node, $point);
	return;
}

# ... or to the fake
sub begin_and_hold_at_stripe
{
	my ($payment, $what, %how) = @_;

	$payment->{fault} = $stripe->fault($what, match => { key => $payment->{key} }, %how);
	begin($payment);
	$stripe->wait_fault($payment->{fault}, holding => 1);
	return;
}

# It has posted its order and waits for the recorder.
sub wait_for_order
{
	my ($payment) = @_;
	my $held = $node->data_dir . '/debug_points/after-record.reached';
	my $state;

	wait_for(sub {
		$state = sql($node, qq{
			SELECT CASE WHEN state <> 'active' THEN 'has ended'
				WHEN wait_event_type IN ('Extension', 'Lock') THEN 'waits' ELSE '' END
			FROM pg_stat_activity WHERE pid = $payment->{pid}});
		$state = 'has gone on' if $state eq '' && slurp_file($held) == $payment->{pid};
		return $state ne '';
	}, "$payment->{client} does nothing");
	is($state, 'waits', "$payment->{client}: waits for the recorder") if $state ne 'waits';
	return;
}

sub recorder_pid
{
	return sql($node, q{SELECT pid FROM pg_stat_activity WHERE backend_type = 'idempotency recorder'});
}

# Change what a held process finds at its debug point, and see it go on.
sub fail_at
{
	my ($point) = @_;
	my $file = $node->data_dir . "/debug_points/$point";

	append_to_file("$file.new", "error\n");
	rename "$file.new", $file or die "could not change $point: $!";
	wait_for(sub { !-e $file }, "nobody fails at $point");
	return;
}

sub wait_for
{
	my ($condition, $otherwise) = @_;

	foreach (1 .. 1800)
	{
		return if $condition->();
		Time::HiRes::usleep(100_000);
	}
	die $otherwise;
}

# Bring each payment to its step, those first that go farthest.  The recorder
# is held twice: when it has committed a claim, and with the claim and the
# record of two others in one transaction.
sub hold
{
	my ($payments, $fault) = @_;

	$payments->{'before commit'}{session}->query_safe($payments->{'before commit'}{statement});
	begin_and_hold($payments->{'after record'}, 'after-record');
	begin_and_hold($payments->{'recording'}, 'before-record');
	begin_and_hold_at_stripe($payments->{'before record'}, 'hang_after');
	begin_and_hold_at_stripe($payments->{'after effect'}, 'hang_after');
	begin_and_hold_at_stripe($payments->{'in execution'}, 'hang_in_use', on_leave => 'hold');
	begin_and_hold_at_stripe($payments->{'after send'}, 'hang_before');
	begin_and_hold($payments->{'before send'}, 'before-send');

	arm($node, 'claim-answered', 'wait');
	begin_and_hold($payments->{'committed'}, 'recorder-after-commit');
	begin($payments->{'claimed'});
	wait_for_order($payments->{'claimed'});
	disarm($node, 'before-record');
	wait_for_order($payments->{'recording'});
	arm($node, 'recorder-before-commit', 'wait') unless $fault->{fills_disk};

	if ($fault->{at_recorder})
	{
		$fault->{at_recorder}->('recorder-after-commit');
	}
	disarm($node, 'recorder-after-commit');
	wait_for_point($node, 'claim-answered');
	wait_for_point($node, 'recorder-before-commit') unless $fault->{fills_disk};

	arm($node, 'before-record', 'wait');
	$stripe->release($payments->{'before record'}{fault});
	wait_for_point($node, 'before-record');
	return;
}

# Whoever is held and still there goes on.
sub let_go
{
	my ($payments) = @_;

	disarm($node, $_) foreach @points;
	foreach my $payment (values %$payments)
	{
		$stripe->release($payment->{fault}) if defined $payment->{fault};
	}
	return;
}

# The callers have left while Stripe had their requests.
sub callers_have_left
{
	my ($payments) = @_;

	disarm($node, $_) foreach @points;
	$stripe->wait_fault($payments->{$_}{fault}, gone => 1) foreach 'after send', 'in execution', 'after effect';
	return;
}

sub end_all
{
	my ($payments, $end) = @_;

	foreach my $payment (values %$payments)
	{
		$payment->{session}->query($end);
		$payment->{messages} = $payment->{session}{stderr};
		$payment->{session}->quit;
	}
	return;
}

sub sessions_have_ended
{
	my ($payments) = @_;

	foreach my $payment (values %$payments)
	{
		eval { $payment->{session}->query('SELECT 1'); };
		eval { $payment->{session}{run}->pump_nb; $payment->{session}->quit; };
	}
	return;
}

#
# What may happen
#

sub roll_back
{
	my ($payments, $end) = @_;

	fail_at($_) foreach @caller_points;
	let_go($payments);
	end_all($payments, $end);
	return;
}

sub terminate_recorder
{
	my ($point) = @_;

	sql($node, 'SELECT pg_terminate_backend(' . recorder_pid() . ', 60000)');
	disarm($node, $point);
	return;
}

my $disk_is_full;

sub fill_disk
{
	append_to_file($disk_is_full, 'full');
	return;
}

my @faults = (
	{
		name => 'The caller rolls back',
		strike => sub { roll_back($_[0], 'ROLLBACK') },
	},
	{
		name => 'A savepoint is rolled back',
		function => 'pay_in_savepoint',
		strike => sub { roll_back($_[0], 'COMMIT') },
	},
	{
		name => 'The statement is cancelled',
		strike => sub {
			my ($payments) = @_;

			sql($node, "SELECT pg_cancel_backend($_->{pid})") foreach values %$payments;
			# the recorder is still held
			end_all($payments, 'COMMIT');
			callers_have_left($payments);
		},
	},
	{
		name => 'The session is terminated',
		strike => sub {
			my ($payments) = @_;

			sql($node, "SELECT pg_terminate_backend($_->{pid}, 60000)") foreach values %$payments;
			callers_have_left($payments);
			sessions_have_ended($payments);
		},
	},
	{
		name => 'The backend is killed',
		strike => sub {
			my ($payments) = @_;
			my $offset = -s $node->logfile;

			kill 9, map { $_->{pid} } values %$payments;
			$node->wait_for_log(qr/all server processes terminated; reinitializing/, $offset);
			callers_have_left($payments);
			sessions_have_ended($payments);
			wait_until_up($node);
		},
	},
	{
		name => 'The recorder is terminated',
		at_recorder => \&terminate_recorder,
		strike => sub {
			terminate_recorder('recorder-before-commit');
			let_go($_[0]);
			end_all($_[0], 'COMMIT');
		},
	},
	{
		name => 'The recorder meets an error',
		at_recorder => \&fail_at,
		strike => sub {
			fail_at('recorder-before-commit');
			let_go($_[0]);
			end_all($_[0], 'COMMIT');
		},
	},
	{
		name => 'The disk is full',
		fills_disk => 1,
		at_recorder => \&fill_disk,
		strike => sub {
			my ($payments) = @_;
			my @waiting = grep { !/^(claimed|after record|before commit)$/ } @steps;

			let_go($payments);
			foreach my $step (@waiting)
			{
				$node->wait_for_log(
					qr/Stripe operation "payment:$payments->{$step}{operation}" cannot be recorded yet/);
			}
			unlink $disk_is_full;
			end_all($payments, 'COMMIT');
			like($payments->{'claimed'}{messages}, qr/ERROR:  the disk is full\nCONTEXT: .*nothing was sent/s,
				"The disk is full: who wants to claim hears of it");
		},
	},
	{
		name => 'The server is shut down',
		strike => sub {
			my ($payments) = @_;

			$node->stop('fast');
			callers_have_left($payments);
			sessions_have_ended($payments);
			$node->start;
		},
	},
	{
		name => 'A standby is promoted',
		strike => sub {
			my ($payments) = @_;
			my $standby = $node->{standby};

			$node->wait_for_catchup($standby, 'replay', $node->lsn('flush'));
			$node->stop('immediate');
			callers_have_left($payments);
			sessions_have_ended($payments);
			$standby->promote;
			$node = $standby;
		},
	});

#
# What came of it
#

# All operations at a glance: what is said of them, and whether that is written
# in the row or because its caller is gone; is it an orphan?
sub ledger
{
	my %ledger;

	foreach (split /\n/, sql($node, q{
			SELECT s.operation_id, l.outcome, s.outcome, s.resource_id,
				EXISTS (SELECT FROM idempotency.stripe_orphans o WHERE o.operation_id = s.operation_id)
			FROM idempotency.stripe_idempotency_keys s, idempotency.stripe_lookup('payment', s.operation_id) l
			WHERE s.operation_type = 'payment'}))
	{
		my ($operation, $outcome, $stored, $resource, $orphan) = split /\|/;

		$outcome .= ', nobody left' if $outcome eq 'unknown' && $stored eq 'in_progress';
		$ledger{$operation} = { outcome => $outcome, resource => $resource, orphan => $orphan eq 't' ? 'yes' : 'no' };
	}
	return \%ledger;
}

sub pay_again
{
	my ($payment) = @_;

	my ($status, $stdout, $stderr) = $node->psql('postgres', "BEGIN; SELECT pay('$payment->{client}'); COMMIT");
	return $status == 0 ? $stdout : "fails: $stderr";
}

sub run_fault
{
	my ($fault) = @_;
	my $since = $stripe->counts->{arrivals};
	my $payments = new_payments($fault);

	# the recorder has written what nobody waits for, too, which it doesn't flush
	my $dust = sql($node, q{
		SELECT split_part(idempotency_key, ':', 2) FROM idempotency.stripe_claim('dust', gen_random_uuid()::text)});
	$node->poll_query_until('postgres',
		"SELECT callers IS NULL FROM idempotency.stripe_idempotency_keys WHERE operation_id = '$dust'")
	  || die 'the recorder does not note that a caller has committed';

	hold($payments, $fault);
	$fault->{strike}->($payments);

	# the recorder does things in their order: what was left to it is done
	sql($node, q{SELECT idempotency.stripe_claim('dust', gen_random_uuid()::text)});
	my $ledger = ledger();

	foreach my $payment (values %$payments)
	{
		my $answer = pay_again($payment);

		$payment->{retry} = $answer =~ s/^201 //r;
		if ($answer eq '503 checking')
		{
			# Stripe comes to its end
			$payment->{retry} = 'is told to wait';
			my $charges = $stripe->control('GET', 'charges')->{count};
			$stripe->release($payment->{fault}) if defined $payment->{fault};
			$stripe->wait_for(charges => $charges + 1);
			$payment->{retry} .= ', then ' . (pay_again($payment) =~ s/^201 //r);
		}
	}
	$stripe->clear_faults;

	my $at_stripe = payments($stripe, $since);
	my $in_the_end = ledger();
	my %orders = map { /^(.*?)\|(.*)$/ } split /\n/,
	  sql($node, q{SELECT operation, string_agg(status || ' ' || payment, ', ') FROM orders GROUP BY operation});
	my %repeats = map { /^(.*?)\|(.*)$/ } split /\n/, sql($node, q{
		SELECT key, http_status || ' ' || (response->>'payment') FROM idempotency.idempotency_keys});

	foreach my $step (@steps)
	{
		my $payment = $payments->{$step};
		my $operation = $payment->{operation};
		my $sent = $at_stripe->{$operation} // { requests => 0, keys => {}, bodies => {}, charges => [] };
		my $was = $ledger->{$operation} // { outcome => 'absent', orphan => 'no' };
		my $is = $in_the_end->{$operation};
		my $id = $sent->{charges}[0] // 'none';

		is( join(' | ', $was->{outcome}, $was->{orphan}, $payment->{retry}, $sent->{requests},
				scalar(@{ $sent->{charges} })),
			$page{ $fault->{name} }{$step} // '(not on the page)', "$fault->{name} at \"$step\"");
		is_deeply(
			[ sort(keys %{ $sent->{keys} }), scalar(keys %{ $sent->{bodies} }), $is->{outcome}, $is->{resource},
				$is->{orphan}, $orders{$operation}, $repeats{ $payment->{client} } ],
			[ $payment->{key}, 1, 'completed', $id, 'no', "succeeded $id", "201 $id" ],
			"$fault->{name} at \"$step\": one key, the same bytes, and all agree")
		  || diag(explain($sent, $is, $orders{$operation}));
	}
	is(sql($node, q{SELECT count(*) FROM idempotency.stripe_unknown}), '0', "$fault->{name}: nothing is unknown");
	return;
}

my %run;
foreach my $fault (@faults)
{
	if ($fault->{fills_disk})
	{
		$disk_is_full = $node->data_dir . '/disk_is_full';
		sql($node, q{
			CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
				IF (pg_catalog.pg_stat_file('disk_is_full', true)).size IS NOT NULL THEN
					RAISE disk_full USING MESSAGE = 'the disk is full';
				END IF;
				RETURN NEW;
			END $$;
			CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON idempotency.stripe_idempotency_keys
			FOR EACH ROW EXECUTE FUNCTION refuse()});
	}
	if ($fault->{name} eq 'A standby is promoted')
	{
		$node->stop;
		$node = stripe_node('primary', $stripe, debug => 1, conf => $conf, init => { allows_streaming => 1 });
		sql($node, PAYING_APPLICATION);
		$node->backup('backup');
		$node->{standby} = PostgreSQL::Test::Cluster->new('standby');
		$node->{standby}->init_from_backup($node, 'backup', has_streaming => 1);
		$node->{standby}->start;
	}
	run_fault($fault);
	sql($node, 'DROP TRIGGER refuse ON idempotency.stripe_idempotency_keys') if $fault->{fills_disk};
	$run{ $fault->{name} }{$_} = 1 foreach @steps;
}

my $cells = sub { my ($of) = @_; [ map { my $name = $_; map { "$name at $_" } sort keys %{ $of->{$name} } } sort keys %$of ] };
is_deeply($cells->(\%run), $cells->(\%page), 'the page has what was tested, and all of that');
note(scalar(@{ $cells->(\%run) }) . ' cells');

$node->stop;
$stripe->stop;

done_testing();
