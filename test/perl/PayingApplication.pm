
=pod

=head1 NAME

PayingApplication - an application that takes an order and charges for it, once

=head1 DESCRIPTION

What test/t/055_crash_matrix.pl and test/torture let fail at every step.  One
transaction claims the client's key, inserts the order, calls Stripe, updates
the order and records the response.  The order's id comes from a sequence, so
each attempt has another one, and each attempt's request to Stripe says so in
its metadata; the operation's id comes from operation_uuid().

=cut

package PayingApplication;

use strict;
use warnings;

use Exporter 'import';

our @EXPORT = qw(PAYING_APPLICATION payments);

=pod

=over

=item PAYING_APPLICATION

SQL that installs it.  pay(key, card) and pay_in_savepoint(key) answer with an
HTTP status and, in a word, how they came to know.  The latter's savepoint is
rolled back after the call, and the transaction goes on.

=cut

use constant PAYING_APPLICATION => <<'SQL';
CREATE SEQUENCE order_ids;
CREATE TABLE orders (
	id bigint PRIMARY KEY,
	operation uuid NOT NULL UNIQUE,
	status text NOT NULL,
	payment text
);

CREATE FUNCTION charge(operation uuid, order_id bigint, card text)
RETURNS idempotency.stripe_call_result LANGUAGE sql AS $$
	SELECT r FROM idempotency.stripe_call('payment', operation::text, 'POST', '/v1/payment_intents',
		jsonb_build_object('amount', 2000, 'currency', 'usd', 'confirm', true, 'payment_method', card,
			'metadata', jsonb_build_object('order_id', order_id::text))) r
$$;

-- write down what came of it
CREATE FUNCTION conclude(key text, token bigint, op uuid, r idempotency.stripe_call_result)
RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	how text := CASE WHEN NOT r.replayed THEN 'executes' WHEN r.attempts = 0 THEN 'knows' ELSE 'fetches' END;
	state text := r.response->>'status';
BEGIN
	-- a person has settled it, or its body isn't kept
	IF r.outcome = 'completed' AND state IS NULL THEN
		SELECT response->>'status' INTO state FROM idempotency.stripe_get('/v1/payment_intents/' || r.resource_id);
		IF state IS NULL THEN
			PERFORM idempotency.release(key, 'user 1', token);
			RETURN '503 asking';
		END IF;
	END IF;

	CASE r.outcome
		WHEN 'completed' THEN
			UPDATE orders SET status = state, payment = r.resource_id WHERE operation = op;
			PERFORM idempotency.record(key, 'user 1', token, response_status => 201,
				response => jsonb_build_object('payment', r.resource_id));
			RETURN '201 ' || how;
		WHEN 'failed' THEN
			UPDATE orders SET status = 'declined', payment = r.resource_id WHERE operation = op;
			PERFORM idempotency.record(key, 'user 1', token, response_status => 402,
				response => jsonb_build_object('declined', r.error->>'code'));
			RETURN '402 ' || how;
		WHEN 'not_executed' THEN
			PERFORM idempotency.release(key, 'user 1', token);
			RETURN '503 try again';
		WHEN 'unknown', 'in_progress' THEN
			UPDATE orders SET status = 'checking' WHERE operation = op;
			PERFORM idempotency.release(key, 'user 1', token);
			RETURN '503 checking';
		WHEN 'mismatch' THEN
			RAISE EXCEPTION 'mismatch of %', op;
	END CASE;
END
$$;

CREATE FUNCTION begin_order(op uuid) RETURNS bigint LANGUAGE sql AS $$
	INSERT INTO orders VALUES (nextval('order_ids'), op, 'new') ON CONFLICT (operation) DO NOTHING;
	SELECT id FROM orders WHERE operation = op
$$;

CREATE FUNCTION pay(key text, card text DEFAULT 'pm_card_visa') RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	c idempotency.claim_result;
	op uuid := idempotency.operation_uuid(key, 'user 1');
BEGIN
	SELECT * INTO c FROM idempotency.claim(key, 'user 1', request => jsonb_build_object(
		'method', 'POST', 'path', '/orders', 'body', jsonb_build_object('card', card)));
	IF c.verdict <> 'claimed' THEN
		RETURN c.http_status || CASE c.verdict WHEN 'replay' THEN ' repeats' ELSE ' busy' END;
	END IF;
	RETURN conclude(key, c.token, op, charge(op, begin_order(op), card));
END
$$;

CREATE FUNCTION pay_in_savepoint(key text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	c idempotency.claim_result;
	op uuid := idempotency.operation_uuid(key, 'user 1');
	order_id bigint;
	r idempotency.stripe_call_result;
BEGIN
	SELECT * INTO c FROM idempotency.claim(key, 'user 1', request => jsonb_build_object(
		'method', 'POST', 'path', '/orders', 'body', jsonb_build_object('card', 'pm_card_visa')));
	IF c.verdict <> 'claimed' THEN
		RETURN c.http_status || CASE c.verdict WHEN 'replay' THEN ' repeats' ELSE ' busy' END;
	END IF;
	order_id := begin_order(op);
	BEGIN
		PERFORM charge(op, order_id, 'pm_card_visa');
		RAISE EXCEPTION 'rolled back';
	EXCEPTION WHEN OTHERS THEN
		r.outcome := 'unknown';
	END;
	RETURN conclude(key, c.token, op, r);
END
$$;
SQL

=pod

=item payments($stripe, $since)

What the fake knows of the application's payments: by operation id, the keys of
its requests and their bodies (each with how often it came), and the payment
intents that succeeded in charging; all in a hash.  $since is the number of an
arrival.

=back

=cut

sub payments
{
	my ($stripe, $since) = @_;
	my %payments;

	my $of = sub {
		my ($key) = @_;
		my ($operation) = $key =~ /^payment:([0-9a-f-]{36}):/ or die "not a key of ours: $key";

		return $payments{$operation} //= { requests => 0, keys => {}, bodies => {}, charges => [] };
	};
	foreach my $arrival ($stripe->arrivals(since => $since // 0))
	{
		my $payment = $of->($arrival->{key} // 'none');

		$payment->{requests}++;
		$payment->{keys}{ $arrival->{key} }++;
		$payment->{bodies}{ $arrival->{body} }++;
	}
	foreach my $charge ($stripe->effects(type => 'charge', action => 'create', status => 'succeeded'))
	{
		push @{ $of->($charge->{idempotency_key})->{charges} }, $charge->{payment_intent};
	}
	return \%payments;
}

1;
