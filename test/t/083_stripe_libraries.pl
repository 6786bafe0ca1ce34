
# Stripe's own libraries for Node and Python, used as doc/stripe.md shows: whatever
# they return or raise, stripe_record makes the outcome of it that stripe_call would.
# Skips what isn't installed, or can't be fetched.

use strict;
use warnings;

use FindBin;
use lib "$FindBin::RealBin/../perl";

use CheckoutTest;
use FakeStripe;
use IdempotencyTest;
use JSON::PP;
use PostgreSQL::Test::Utils;
use StripeTest;
use Test::More;

my $page = slurp_file("$FindBin::RealBin/../../doc/stripe.md");
my $json = JSON::PP->new->utf8->canonical;
my $dir = PostgreSQL::Test::Utils::tempdir();
my $stripe = FakeStripe->start;
my $node = stripe_node('main', $stripe, preload => 1, conf => "idempotency.stripe_max_retries = 0\n");

my $html = '<html><h1>Not Found</h1></html>';
my @cases = (
	[ plain => 'completed' ],
	[ declined => 'failed', undef, payment_method => 'pm_card_chargeDeclined' ],
	[ invalid => 'failed', undef, amount => -1 ],
	(map { [ $_ => 'not_executed', { what => $_ } ] } qw(401 403 409 429)),
	(map { [ $_ => 'unknown', { what => $_ } ] }
			qw(409_in_use 424 500 500_unsaved 502 503 504 close_before close_after reset_before reset_after cut garbled not_json)),
	[ '503 json' => 'unknown', { what => '503', json => JSON::PP::true } ],
	(map { [ "gateway $_" => 'unknown', { what => 'gateway', status => 0 + $_, effect => JSON::PP::true } ] } qw(400 401 402 403 404 409 429)),
	[ 'no error of Stripe\'s' => 'unknown', { what => 'not_json', status => 402, body => '{"error": {"message": "Payment required"}}' } ],
	[ 'an error that is text' => 'unknown', { what => 'not_json', status => 401, body => '{"error": "unauthorized"}' } ],
	[ 'an error in a success' => 'unknown', { what => 'not_json', body => '{"error": "upstream timed out"}' } ],
	(map { [ "body $_" => 'unknown', { what => 'not_json', body => $_ } ] } 'null', '7', '"ok"', 'true', '[]', ''));

foreach my $case (@cases)
{
	my ($name, $outcome, $fault, %params) = @$case;

	$case = {
		name => $name,
		outcome => $outcome,
		fault => defined $fault ? { times => 0, match => { path => '/v1/payment_intents' }, %$fault } : undef,
		params => {
			amount => 1990, currency => 'eur', confirm => JSON::PP::true, payment_method => 'pm_card_visa',
			automatic_payment_methods => { enabled => JSON::PP::true, allow_redirects => 'never' }, %params } };
}

sub block_of_page
{
	my ($language) = @_;
	my @blocks = $page =~ /^```$language\n(.*?)^```$/msg;

	die "doc/stripe.md has not one block of $language" unless @blocks == 1;
	return $blocks[0];
}

sub stripe_key
{
	my ($operation) = @_;

	return sql($node, q{SELECT idempotency.stripe_idempotency_key('payment', } . literal($operation) . ')');
}

# What a program has told of all cases, a line each: outcome, Stripe's code, whether it
# knows a Request-Id, the members of the error that aren't Stripe's
sub test_library
{
	my ($name, @command) = @_;

	append_to_file("$dir/$name.json", $json->encode([ map { { %$_, operation => "$name $_->{name}" } } @cases ]));
	my ($output, $ok) = run_program(@command, "$dir/$name.json");
	ok($ok, "$name: the program comes to its end") or diag($output);
	$stripe->clear_faults;

	foreach my $case (@cases)
	{
		my $operation = "$name $case->{name}";

		is(sql($node, q{SELECT outcome FROM idempotency.stripe_lookup('payment', } . literal($operation) . ')'),
			$case->{outcome}, "$operation is $case->{outcome}");
		is(scalar($stripe->arrivals(key => stripe_key($operation))), 1, 'by one request');
	}
	is(sql($node, q{SELECT resource_type, resource_status, livemode, request_id LIKE 'req\_%' FROM idempotency.stripe_lookup('payment', }
			. literal("$name plain") . ')'), 'payment_intent|succeeded|f|t', "$name: what is known of a payment");
	is(sql($node, q{SELECT http_status, error ->> 'type', error ->> 'code', resource_type, request_id LIKE 'req\_%', error ?| '{headers,statusCode,requestId}'
			FROM idempotency.stripe_lookup('payment', } . literal("$name declined") . ')'),
		'402|card_error|card_declined|payment_intent|t|f', "$name: and of a decline");
	return;
}

$ENV{PGHOST} = $node->host;
$ENV{PGPORT} = $node->port;
$ENV{PGDATABASE} = 'postgres';
$ENV{PGUSER} = sql($node, 'SELECT current_user');
$ENV{STRIPE} = $stripe->url;
$ENV{CONTROL} = $stripe->{control};
$ENV{KEY} = TEST_KEY;

SKIP:
{
	my $reason = node_lacks($dir);
	skip($reason, 1) if defined $reason;

	append_to_file("$dir/send.mjs", block_of_page('js'));
	append_to_file("$dir/drive.mjs", <<'JS');
import fs from 'node:fs';
import pg from 'pg';
import { client, send } from './send.mjs';

const api = new URL(process.env.STRIPE);
const stripe = client(process.env.KEY, { protocol: 'http', host: api.hostname, port: api.port, timeout: 20_000 });
const db = new pg.Client();
await db.connect();
const control = async (method, body) => {
    if (!(await fetch(`${process.env.CONTROL}/_control/faults`, { method, body })).ok)
        throw new Error(body);
};
for (const { operation, fault, params } of JSON.parse(fs.readFileSync(process.argv[2]))) {
    await control('DELETE');
    if (fault)
        await control('POST', JSON.stringify(fault));
    const { rows: [claim] } = await db.query(
        `SELECT * FROM idempotency.stripe_claim('payment', $1, request => $2)`,
        [operation, { method: 'POST', path: '/v1/payment_intents', params }]);
    await db.query(`SELECT idempotency.stripe_record('payment', $1, $2, http_status => $3, request_id => $4, response => $5)`,
        [operation, claim.token, ...await send(stripe, claim)]);
}
await db.end();
JS
	test_library('Node', 'node', "$dir/drive.mjs");
}

SKIP:
{
	my ($output, $ok) = run_program('python3', '-c', 'import psycopg, stripe');
	skip('python3 has no psycopg, or no stripe', 1) unless $ok;

	append_to_file("$dir/send.py", block_of_page('python'));
	append_to_file("$dir/drive.py", <<'PY');
import json, os, sys, urllib.request
import psycopg, stripe
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from send import send

stripe.api_key = os.environ["KEY"]
stripe.api_base = os.environ["STRIPE"]
def control(method, body=None):
    urllib.request.urlopen(urllib.request.Request(os.environ["CONTROL"] + "/_control/faults", method=method,
                                                  data=body and json.dumps(body).encode()))
with psycopg.connect(autocommit=True, row_factory=dict_row, client_encoding="utf8") as db:
    for case in json.load(open(sys.argv[1])):
        control("DELETE")
        if case["fault"]:
            control("POST", case["fault"])
        claim = db.execute("SELECT * FROM idempotency.stripe_claim('payment', %s, request => %s)",
            (case["operation"], Jsonb({"method": "POST", "path": "/v1/payment_intents", "params": case["params"]}))).fetchone()
        db.execute("SELECT idempotency.stripe_record('payment', %s, %s, http_status => %s, request_id => %s, response => %s)",
            (case["operation"], claim["token"], *send(claim)))
PY
	test_library('Python', 'python3', '-B', "$dir/drive.py");
}

# and the database itself
foreach my $case (@cases)
{
	$stripe->clear_faults;
	$stripe->control('POST', 'faults', $case->{fault}) if $case->{fault};
	is(sql($node, q{SELECT outcome FROM idempotency.stripe_call('payment', } . literal("database $case->{name}")
			. q{, 'POST', '/v1/payment_intents', } . literal($json->encode($case->{params})) . ')'),
		$case->{outcome}, "stripe_call: $case->{name} is $case->{outcome}");
}

$node->stop;
$stripe->stop;

done_testing();
