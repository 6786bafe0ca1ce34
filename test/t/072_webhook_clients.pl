
# Real clients: the programs in Node and Python of doc/webhooks.md as they stand
# there, and Stripe's own library for Node, whose headers must be good and whose
# verdicts must be ours.  Skips what isn't installed, or can't be fetched.

use strict;
use warnings;
use feature 'state';

use Digest::SHA qw(hmac_sha256_hex);
use FindBin;
use lib "$FindBin::RealBin/../perl";

use CheckoutTest;
use IdempotencyTest;
use IO::Select;
use IO::Socket::INET;
use IPC::Run;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $top = "$FindBin::RealBin/../..";
my $page = slurp_file("$top/doc/webhooks.md");
my $dir = PostgreSQL::Test::Utils::tempdir();
my $order = '018c2b5e-0000-7000-8000-00000000000';
my @servers;

my $node = new_node('main');
append_to_file("$dir/secrets", "whsec_test_clients\n");
chmod 0600, "$dir/secrets";
sql($node, qq{
	ALTER DATABASE postgres SET idempotency.webhook_secret_file = '$dir/secrets';
	CREATE TABLE orders (id uuid PRIMARY KEY, payment text, times int NOT NULL DEFAULT 0);
	CREATE FUNCTION count_times() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.times := OLD.times + 1; RETURN NEW; END';
	CREATE TRIGGER count_times BEFORE UPDATE ON orders FOR EACH ROW EXECUTE FUNCTION count_times();
	INSERT INTO orders (id) SELECT ('$order' || i)::uuid FROM generate_series(1, 9) i;
});
$ENV{PGHOST} = $node->host;
$ENV{PGPORT} = $node->port;
$ENV{PGDATABASE} = 'postgres';
$ENV{PGUSER} = sql($node, 'SELECT current_user');

END
{
	my $status = $?;
	$_->kill_kill foreach @servers;
	$? = $status;
}

sub payment
{
	my ($id, $order_id) = @_;

	return qq({"id": "$id", "object": "event", "type": "payment_intent.succeeded",)
	  . qq( "data": {"object": {"id": "pi_$id", "object": "payment_intent", "metadata": {"shop": "example", "order_id": "$order_id"}}}});
}

sub signature
{
	my ($body) = @_;
	my $t = time;

	return "t=$t,v1=" . hmac_sha256_hex("$t.$body", 'whsec_test_clients');
}

sub block_of_page
{
	my ($language) = @_;
	my @blocks = $page =~ /^```$language\n(.*?)^```$/msg or die "doc/webhooks.md has no block of $language";

	return join("\n", @blocks);
}

sub order
{
	my ($n) = @_;

	return sql($node, "SELECT payment, times FROM orders WHERE id = '$order$n'");
}

SKIP:
{
	my $reason = node_lacks($dir);
	skip($reason, 1) if defined $reason;

	# a port of its own, and a server that answers
	append_to_file("$dir/webhook.mjs", block_of_page('js'));
	my $port = PostgreSQL::Test::Cluster::get_free_port();
	my $log = '';
	{
		local $ENV{PORT} = $port;
		push @servers, IPC::Run::start([ 'node', "$dir/webhook.mjs" ], '<', \undef, '>&', \$log);
	}
	my $tries = 10 * $PostgreSQL::Test::Utils::timeout_default;
	until (IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => $port))
	{
		die "webhook.mjs doesn't listen: $log" unless $tries-- > 0 && $servers[0]->pumpable;
		select(undef, undef, undef, 0.1);
	}

	# the status of a delivery
	my $deliver = sub {
		my ($body, $signature) = @_;
		my $socket = IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => $port, Timeout => 60) or die "connect: $!";

		print $socket "POST / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: " . length($body) . "\r\n"
		  . (defined $signature ? "Stripe-Signature: $signature\r\n" : '') . "\r\n$body";
		my ($status) = (<$socket> // '') =~ m{^HTTP/1.1 (\d+)};
		return $status // 'none';
	};

	my $body = payment('evt_n1', "${order}1");
	is($deliver->($body, signature($body)), '200', 'Node: an event');
	is(order(1), 'pi_evt_n1|1', 'had its effect');
	is($deliver->($body, signature($body)), '200', 'again');
	is(order(1), 'pi_evt_n1|1', 'once');
	is($deliver->("$body ", signature($body)), '400', 'another body');
	is($deliver->($body), '400', 'no signature');
	is($deliver->('{"id": "pi_1"}', signature('{"id": "pi_1"}')), '400', 'not an event');
	my $broken = payment('evt_n2', '17');
	is($deliver->($broken, signature($broken)), '503', 'what fails has to come again');
	is(sql($node, q{SELECT success, attempts, error_message FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_n2'}),
		'f|1|invalid input syntax for type uuid: "17"', 'and is recorded');
	is($deliver->($broken, signature($broken)), '503', 'again');
	is(sql($node, q{SELECT attempts FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_n2'}), '2', 'and is counted');
	sql($node, q{INSERT INTO idempotency.stripe_webhook_events
		SELECT (jsonb_populate_record(e, '{"stripe_event_id": "evt_n3", "success": null, "lease_expires_at": "2999-01-01"}')).*
		FROM idempotency.stripe_webhook_events e WHERE stripe_event_id = 'evt_n1'});
	my $held = payment('evt_n3', "${order}3");
	is($deliver->($held, signature($held)), '409', 'what somebody else is at');

	# it overtakes the transaction that caused it
	my $early = payment('evt_n0', "${order}0");
	is($deliver->($early, signature($early)), '503', 'whose order is not there yet');
	is(sql($node, q{SELECT error_message FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_n0'}),
		"there is no order ${order}0, or not yet", 'is recorded');
	sql($node, "INSERT INTO orders (id) VALUES ('${order}0')");
	is($deliver->($early, signature($early)), '200', 'is delivered again');
	is(order(0), 'pi_evt_n0|1', 'and has its effect then');
	foreach my $others ('{}', 'null', '{"order_id": "17"}', '{"shop": "another", "order_id": "17"}', qq({"order_id": "${order}0"}))
	{
		my $body = payment('evt_o' . ++(state $n), 'x') =~ s/"metadata": \{[^}]*\}/"metadata": $others/r;

		is($deliver->($body, signature($body)), '200', "a payment that is no order of ours: $others");
	}
	is(order(0), 'pi_evt_n0|1', 'does nothing here');
	my $bare = '{"id": "evt_n7", "object": "event", "type": "payment_intent.succeeded"}';
	is($deliver->($bare, signature($bare)), '200', 'nor does one without an object');

	# ten deliveries at once
	my $many = payment('evt_n4', "${order}4");
	my @sockets = map { IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => $port, Timeout => 60) // die "connect: $!" } 1 .. 10;
	print $_ "POST / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nStripe-Signature: " . signature($many)
	  . "\r\nContent-Length: " . length($many) . "\r\n\r\n$many"
	  foreach @sockets;
	my @answers = map { (<$_> // '') =~ m{^HTTP/1.1 (\d+)} ? $1 : 'none' } @sockets;
	is(scalar(grep { !/^(200|409)$/ } @answers), 0, "ten at once are done or told to come again: @answers");
	is($deliver->($many, signature($many)), '200', 'who comes again');
	is(order(4), 'pi_evt_n4|1', 'finds it done, once');

	#
	# What happens to programs
	#

	my $send = sub {
		my ($body) = @_;
		my $socket = IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => $port, Timeout => 60) or die "connect: $!";

		print $socket "POST / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: " . length($body)
		  . "\r\nStripe-Signature: " . signature($body) . "\r\n\r\n$body";
		$socket->flush;
		return $socket;
	};
	my $told = sub {
		my ($socket) = @_;

		return 'waits' unless IO::Select->new($socket)->can_read(30);
		return (<$socket> // '') =~ m{^HTTP/1.1 (\d+)} ? $1 : 'none';
	};
	my $alive = sub {
		my ($name) = @_;

		select(undef, undef, undef, 0.2);
		is($servers[0]->pumpable ? eval { $deliver->($body, signature($body)) } // 'none' : 'ended', '200', $name) or die $log;
	};
	my $terminate = sub { sql($node, q{SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity 
		WHERE (query LIKE '%stripe_webhook%' OR query LIKE 'UPDATE%' OR query = 'COMMIT') AND pid <> pg_backend_pid()}) };
	my $holder = $node->background_psql('postgres');
	my $waits = sub { $node->poll_query_until('postgres', q{SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock')}) or die $log };

	# more deliveries at once than it has connections, of an event that takes its time
	$holder->query_safe("BEGIN; SELECT FROM orders WHERE id = '${order}7' FOR UPDATE");
	my $slow = payment('evt_n8', "${order}7");
	my @same = $send->($slow);
	$waits->();
	push @same, $send->($slow) foreach 1 .. 25;
	my $another = payment('evt_n9', "${order}8");
	is($told->($send->($another)), '200', 'while one event is slow, and delivered again and again, another one is taken');
	is(join(' ', map { $told->($_) } @same[ 1 .. 25 ]), join(' ', (409) x 25), 'and these are told to come again');
	$holder->query_safe('COMMIT');
	$holder->quit;
	is($told->($same[0]), '200', 'the first is done');
	is(order(7), 'pi_evt_n8|1', 'once');

	# its backend is terminated in the middle, or the server restarted, or killed, or away
	my %ends = (
		terminated => $terminate,
		restarted => sub { $node->restart },
		crashed => sub { $node->stop('immediate'); $node->start });
	foreach my $what (sort keys %ends)
	{
		my $this = payment("evt_$what", "${order}9");

		$holder = $node->background_psql('postgres');
		$holder->query_safe("BEGIN; SELECT FROM orders WHERE id = '${order}9' FOR UPDATE");
		my $socket = $send->($this);
		$waits->();
		$ends{$what}->();
		is($told->($socket), '500', "$what while an event is processed");
		eval { $holder->quit };
		$alive->('the program goes on');
		is($deliver->($this, signature($this)), '200', 'and takes it when it comes again');
		is(sql($node, "SELECT payment FROM orders WHERE id = '${order}9'"), "pi_evt_$what", 'with its effect');
	}
	is(order(9), 'pi_evt_terminated|3', 'each once');
	$node->stop;
	is($told->($send->($another)), '500', 'while the database is away');
	$node->start;
	$alive->('the program goes on');

	# more events at once than it has connections
	$holder = $node->background_psql('postgres');
	$holder->query_safe('BEGIN; LOCK TABLE orders IN ACCESS EXCLUSIVE MODE');
	my @many = map { $send->(payment("evt_m$_", "${order}2")) } 1 .. 15;
	$waits->();
	is($told->($send->(payment('evt_m16', "${order}2"))), '500', 'no connection is to be had');
	$holder->query_safe('COMMIT');
	$holder->quit;
	is(scalar(grep { $told->($_) !~ /^(200|500)$/ } @many), 0, 'the others are told something');
	$alive->('the program goes on');
	foreach my $event (map { payment("evt_m$_", "${order}2") } 1 .. 16)
	{
		$deliver->($event, signature($event)) eq '200' or fail('an event comes again');
	}
	is(order(2) =~ /\|(\d+)$/ ? $1 : '', '16', 'all of them once');

	# who delivers leaves in the middle
	foreach my $part ("POST / HTTP/1.1\r\nHost: localhost\r\n", "POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
	{
		my $socket = IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => $port, Timeout => 60) or die "connect: $!";
		print $socket $part;
		$socket->flush;
		select(undef, undef, undef, 0.1);
		close($socket);
	}
	$alive->('those who leave in the middle of a delivery');
	sql($node, q{UPDATE idempotency.stripe_webhook_events SET success = true WHERE stripe_event_id <> 'evt_n3'});
	$servers[0]->kill_kill;

	# a body as bytes and as a string, with and without a type
	append_to_file("$dir/payloads.mjs", <<'JS');
import crypto from 'node:crypto';
import pg from 'pg';

const client = new pg.Client();
await client.connect();
const bodies = {
    quote: '{"id": "evt_a", "object": "event", "type": "a", "d": "TV 40\\"", "s": "it\'s"}',
    backslashes: '{"id": "evt_b", "object": "event", "type": "a", "d": "\\\\ \\\\101 \\/ \\n \\u00e9"}',
    emoji: '{"id": "evt_c", "object": "event", "type": "a", "d": "Zo\u00eb \u{1F600} \u6ce8"}',
    pair: '{"id": "evt_d", "object": "event", "type": "a", "d": "\\ud83d"}',
};
for (const [name, body] of Object.entries(bodies)) {
    const t = Math.floor(Date.now() / 1000);
    const signature = `t=${t},v1=` + crypto.createHmac('sha256', 'whsec_test_clients').update(`${t}.${body}`).digest('hex');
    const bytes = Buffer.from(body);
    const ways = { string: ['$1', body], text: ['$1::text', body], buffer: ['$1::bytea', bytes], untyped: ['$1', bytes],
        hex: ['$1', '\\x' + bytes.toString('hex')], named: ['payload => $1', body] };
    const words = [];
    for (const [way, [parameter, value]] of Object.entries(ways)) {
        const named = parameter.startsWith('payload') ? 'signature => ' : '';
        const { rows: [r] } = await client.query(
            `SELECT idempotency.stripe_webhook_verify(${parameter}, ${named}$2) AS word,
                (SELECT c.stripe_event_id FROM idempotency.stripe_webhook_receive(${parameter}, ${named}$2, consumer => '${way}') c) AS id`,
            [value, signature]);
        words.push(`${way} ${r.word}`);
    }
    const { rows: [same] } = await client.query(
        'SELECT count(*)::int AS n, bool_and(payload = $1::bytea) AS same FROM idempotency.stripe_webhook_events WHERE stripe_event_id = $2',
        [bytes, JSON.parse(body).id]);
    console.log(name, words.join(', '), same.n, same.same);
}
await client.query("DELETE FROM idempotency.stripe_webhook_events WHERE stripe_event_id ~ 'evt_[abcd]$'");
await client.end();
JS
	my ($words, $good) = run_program('node', "$dir/payloads.mjs");
	ok($good, 'Node: bodies in every form') or diag($words);
	is($words, join('', map { "$_ string valid, text valid, buffer valid, untyped valid, hex valid, named valid 6 true\n" } qw(quote backslashes emoji pair)),
		'each is valid, and kept as it came');

	# Stripe's library: its headers are good, its verdicts are ours
	system('cp', "$top/test/clients/verdicts.mjs", $dir) == 0 or die "cp: $!";
	my $seed = $ENV{SEED} || 1 + int(rand(2**31));
	my ($output, $ok) = run_program('node', "$dir/verdicts.mjs", 600, $seed);
	ok($ok, "600 random bodies, SEED=$seed: its verdicts and ours are the same");
	note($output);
	diag($output) unless $ok;
	foreach my $word (qw(valid no_signature malformed_header no_matching_signature too_old))
	{
		like($output, qr/"$word":\d/, "$word was among them");
	}
}

SKIP:
{
	my ($output, $ok) = run_program('python3', '-c', 'import psycopg');
	skip('python3 has no psycopg', 1) unless $ok;

	append_to_file("$dir/stripe_events.py", block_of_page('python'));
	append_to_file("$dir/drive.py", <<'PY');
import hashlib, hmac, json, sys, threading, time
import psycopg
from stripe_events import paid, receive, work

order = sys.argv[1]

def event(id, order_id, mark={"shop": "example"}):
    body = json.dumps({"id": id, "object": "event", "type": "payment_intent.succeeded", "data": {"object": {
        "id": "pi_" + id, "object": "payment_intent", "metadata": mark | {"order_id": order_id}, "name": "Zoë 😀"}}},
        ensure_ascii=False, indent=1).encode()
    t = str(int(time.time()))
    return body, "t=" + t + ",v1=" + hmac.new(b"whsec_test_clients", t.encode() + b"." + body, hashlib.sha256).hexdigest()

handlers = {"payment_intent.succeeded": paid}
conn = psycopg.connect(autocommit=True)
body, signature = event("evt_p1", order + "5")
print("receive", receive(conn, body, signature), receive(conn, body, signature))
print("refused", receive(conn, body + b" ", signature), receive(conn, body, None))
print("work", work(conn, handlers), work(conn, handlers))
print("receive", receive(conn, *event("evt_p2", "17")))
print("failed", work(conn, handlers), work(conn, handlers))
# a handler that is mended
due = "UPDATE idempotency.stripe_webhook_events SET next_attempt_at = now() WHERE success IS NOT TRUE AND claimed_at IS NOT NULL"
conn.execute(due)
print("again", work(conn, {"payment_intent.succeeded": lambda conn, e: None}), work(conn, handlers))
# somebody else's
receive(conn, *event("evt_p4", "17", {}))
receive(conn, *event("evt_p5", order + "5", {"shop": "another"}))
print("others", work(conn, handlers), work(conn, handlers))
# what can't be written down as it is
for n, error in enumerate((Exception("a\0b"), Exception("\udce9"), Exception(), Exception("x" * 100000))):
    def broken(conn, e):
        raise error
    receive(conn, *event("evt_z%d" % n, order + "5"))
    print("error", work(conn, {"payment_intent.succeeded": broken}), conn.execute(
        "SELECT octet_length(error_message) FROM idempotency.stripe_webhook_events WHERE stripe_event_id = %s", ("evt_z%d" % n,)).fetchone()[0])
conn.execute("DELETE FROM idempotency.stripe_webhook_events WHERE stripe_event_id LIKE 'evt_z%'")
# it overtakes the transaction that caused it
receive(conn, *event("evt_p3", order + "a"))
print("early", work(conn, handlers))
conn.execute("INSERT INTO orders (id) VALUES (%s)", (order + "a",))
conn.execute(due)
print("in time", work(conn, handlers), work(conn, handlers))

# a body as bytes and as a string, with what either needs escapes for
for text in (r'TV 40\"', r"\\ \u00e9 \/ \\101", "it's Zo\u00eb \U0001F600"):
    body = ('{"id": "evt_x", "object": "event", "type": "a", "d": "' + text + '"}').encode()
    t = str(int(time.time()))
    signature = "t=" + t + ",v1=" + hmac.new(b"whsec_test_clients", t.encode() + b"." + body, hashlib.sha256).hexdigest()
    print("body", *[conn.execute("SELECT idempotency.stripe_webhook_verify(" + p + ", %s)", (v, signature)).fetchone()[0]
        for p, v in (("%s", body), ("%b", body), ("%s", body.decode()), ("%b", body.decode()))])

for i in range(20):
    receive(conn, *event("evt_w%d" % i, order + "6"))
done = []
def worker():
    with psycopg.connect(autocommit=True) as own:
        while work(own, handlers) is not None:
            done.append(1)
threads = [threading.Thread(target=worker) for _ in range(4)]
for t in threads: t.start()
for t in threads: t.join()
print("workers", len(done))
PY
	($output, $ok) = run_program('python3', "$dir/drive.py", $order);
	ok($ok, 'Python') or diag($output);
	is($output, <<'OUT', 'Python: events are kept, and processed once');
receive 200 200
refused 400 400
work True None
receive 200
failed False None
again True None
others True True
error False 19
error False 19
error False 11
error False 2000
early False
in time True None
body valid valid valid valid
body valid valid valid valid
body valid valid valid valid
workers 20
OUT
	is(order(5), 'pi_evt_p1|1', 'each with its effect');
	is(sql($node, "SELECT times FROM orders WHERE id = '${order}6'"), '20', 'also with workers side by side');
	is(sql($node, q{SELECT count(*), bool_and(success) FROM idempotency.stripe_webhook_events
			WHERE stripe_event_id LIKE 'evt\_w%' OR stripe_event_id LIKE 'evt\_p%'}),
		'25|t', 'and recorded');
}

$node->stop;

done_testing();
