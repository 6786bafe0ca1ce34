
=pod

=head1 NAME

TortureSettings - which values the settings take while make torture runs

=head1 DESCRIPTION

Every setting of ours is met by itself, from pg_settings: a boolean or an
enumeration with all its values, any other with its default and what the table
below has for it.  Those that the checker can't do without have a reason.

=cut

package TortureSettings;

use strict;
use warnings;

use Exporter 'import';

our @EXPORT = qw(torture_settings FIXED);

=pod

=over

=item FIXED

Settings of ours that stay as they are, with the reason.

=cut

use constant FIXED => {
	'idempotency.stripe_api_base' => 'where the fake Stripe is',
	'idempotency.stripe_api_key_file' => 'whose calls they are',
	'idempotency.stripe_ca_file' => 'calls go over plain HTTP',
	'idempotency.webhook_secret_file' => 'whose events they are',
	'idempotency.webhook_livemode' => 'live refuses all events there are',
	'idempotency.webhook_retention' => 'removes events that the checker looks for',
	'idempotency.stripe_retention' => 'removes calls that the checker looks for',
	'idempotency.stripe_ledger' => 'transaction gives I7 up',
	'idempotency.open_claim_at_commit' => 'allow and warning give I12 up',
	'idempotency.max_response_size' => 'what is too large is refused',
};

# Of ours: sane values, and why no others where that isn't plain
my %ours = (
	key_ttl => [ '1 h', '1 d', '30 d' ],    # payments must outlive the run
	stripe_lease => [ '1 s', '5 min' ],
	wait_timeout => [ '0', '50 ms', '2 s', '-1' ],
	stripe_resend_margin => [ '1 min', '1 h', '20 h' ],    # payments end within the window
	stripe_record_timeout => [ '10 ms', '100 ms', '2 s', '5 s' ],
	# what differs between two attempts of ours is in metadata
	stripe_compare_ignore => [ 'metadata', 'metadata, description, expand', 'expand, metadata' ],
	webhook_tolerance => [ '5 min', '1 h', '1 d' ],    # a delivery waits
	webhook_max_attempts => [ '3', '3', '4', '20', '-1' ],    # the checker knows the least
	abandoned_retention => [ '5 s', '20 s', '1 h' ],    # the checker knows the least
	stripe_body_retention => [ '0', '1 s', '30 d', '-1' ],
	expiry_interval => [ '1 s', '2 s', '10 s' ],
	expiry_batch_size => [ '1', '7', '1000' ],
	max_workers => [ '0', '1', '2', '8' ],
	stripe_timeout => [ '300 ms', '1 s', '5 s', '30 s' ],
	stripe_max_retries => [ '0', '1', '3' ],
	stripe_version => [ '2026-10-28.endive', '2025-01-27.acacia' ],
	stripe_allowed_paths => [
		'*',
		'/v1/payment_intents**, /v1/charges**, POST /v1/customers, GET /v1/**',
		'POST /v1/payment_intents, POST /v1/charges, POST /v1/customers, GET /v1/**' ],
);

# Of PostgreSQL: what a database's owner or an administrator may set, and what
# must not make a difference to what is promised.  (idle_session_timeout isn't
# here: those that are held by a hush keep DROP DATABASE away.)
my %theirs = (
	synchronous_commit => [qw(off off local remote_write on remote_apply)],
	lock_timeout => [qw(0 100ms 2s)],
	statement_timeout => [qw(0 500ms 5s)],
	transaction_timeout => [qw(0 5s)],
	default_transaction_isolation => [ 'read committed', 'repeatable read', 'serializable' ],
	default_transaction_read_only => [qw(off off on)],
	default_transaction_deferrable => [qw(off on)],
	deadlock_timeout => [qw(10ms 200ms 1s)],
	session_replication_role => [qw(origin local replica)],
	row_security => [qw(on off)],
	client_connection_check_interval => [qw(0 100ms)],
	DateStyle => [ 'ISO', 'German', 'SQL, DMY' ],
	IntervalStyle => [qw(postgres iso_8601)],
	TimeZone => [qw(UTC Asia/Kolkata America/St_Johns)],
	bytea_output => [qw(hex escape)],
	extra_float_digits => [qw(1 -15)],
	standard_conforming_strings => [qw(on off)],
	transform_null_equals => [qw(off on)],
	array_nulls => [qw(on off)],
	search_path => [ 'public', 'public, pg_temp, pg_catalog' ],
	plan_cache_mode => [qw(auto force_generic_plan force_custom_plan)],
	enable_indexscan => [qw(on off)],
	enable_seqscan => [qw(on off)],
	enable_bitmapscan => [qw(on off)],
	enable_tidscan => [qw(on off)],
	work_mem => [qw(4MB 64kB)],
	wal_compression => [qw(off on)],
	force_parallel_mode => [qw(off on regress)],
	debug_parallel_query => [qw(off on regress)],
	autovacuum_naptime => [qw(1s 1min)],
	log_lock_waits => [qw(off on)],
);

=pod

=item torture_settings($psql)

All settings that change: a reference to a list of [name, context, value, ...].
$psql->($statement) answers as psql does.

=back

=cut

sub torture_settings
{
	my ($psql) = @_;
	my $names = join(', ', map { "'" . lc($_) . "'" } keys %theirs);
	my %by_lower = map { lc($_) => $_ } keys %theirs;
	my @settings;

	foreach my $line (split /\n/,
		$psql->(qq{SELECT name, vartype, context, boot_val, pg_catalog.array_to_string(enumvals, ',') FROM pg_catalog.pg_settings
			WHERE name LIKE 'idempotency.%' OR lower(name) IN ($names) ORDER BY name}))
	{
		my ($name, $type, $context, $default, $labels) = split /\|/, $line, -1;
		my ($own) = $name =~ /^idempotency\.(.*)/;
		my $values;

		next if FIXED->{$name};
		if (defined $own)
		{
			$values = $ours{$own}
			  // ($type eq 'bool' ? [qw(on off)] : $type eq 'enum' ? [ split /,/, $labels ] : [$default]);
		}
		else
		{
			$values = $theirs{ $by_lower{ lc $name } };
		}
		push @settings, [ $name, $context, @$values ];
	}
	return \@settings;
}

1;
