
# In a database of another encoding than UTF-8 the same text is the same key,
# the same fingerprint, the same Stripe key and the same bytes on the wire; and
# a dump of it can be restored into one in UTF-8.  What an encoding can't hold
# is an error, or a question mark in what Stripe has answered.

use strict;
use warnings;

use Digest::SHA qw(hmac_sha256_hex);
use Encode ();
use FakeStripe;
use FindBin;
use IdempotencyTest;
use JSON::PP;
use PostgreSQL::Test::Utils;
use StripeTest;
use Test::More;

# all text in this file, and all that psql says, is bytes of UTF-8
$ENV{PGCLIENTENCODING} = 'UTF8';

my $stripe = FakeStripe->start;
my $node = stripe_node('main', $stripe, preload => 1,
	conf => "idempotency.stripe_max_retries = 0\nidempotency.expiry_interval = 1s\n");
my $json = JSON::PP->new->utf8->canonical->allow_nonref;
my $vectors = $json->decode(slurp_file("$FindBin::RealBin/../vectors/formats.json"));

# database => what Perl calls its encoding
my %encoding = (utf8 => 'UTF-8', latin1 => 'iso-8859-1', euc_jp => 'euc-jp', sql_ascii => 'UTF-8');
my @databases = sort keys %encoding;

foreach my $db (@databases, 'win1252')
{
	sql($node, "CREATE DATABASE $db ENCODING '$db' LOCALE 'C' TEMPLATE template0");
	sql($node, 'CREATE EXTENSION idempotency', db => $db);
}

# The texts go in as bytes of UTF-8, so that one that can't be converted is met
# where the exception is caught.
sql($node, q{
	INSERT INTO idempotency.namespace (value, system_identifier, database, created_at)
		VALUES (decode('} . $vectors->{namespace} . q{', 'hex'), 1, 1, '2020-01-01');
	CREATE FUNCTION t(utf8 text) RETURNS text LANGUAGE sql AS
		$$SELECT convert_from(decode(utf8, 'hex'), 'UTF8')$$;
	CREATE FUNCTION uuid_of(key text, scope text) RETURNS text LANGUAGE plpgsql AS $$
	BEGIN
		RETURN idempotency.operation_uuid(t(key), t(scope));
	EXCEPTION WHEN untranslatable_character THEN
		RETURN 'untranslatable';
	END $$;
	CREATE FUNCTION print_of(request text, ignore text) RETURNS text LANGUAGE plpgsql AS $$
	DECLARE
		f bytea;
	BEGIN
		PERFORM set_config('idempotency.stripe_compare_ignore', ignore, true),
			set_config('idempotency.stripe_ledger', 'transaction', true);
		IF jsonb_typeof(t(request)::jsonb) = 'object' THEN
			PERFORM FROM idempotency.stripe_claim('print', 'of', t(request)::jsonb);
			SELECT fingerprint INTO STRICT f FROM idempotency.stripe_idempotency_keys WHERE operation_type = 'print';
			DELETE FROM idempotency.stripe_idempotency_keys WHERE operation_type = 'print';
		ELSE
			PERFORM FROM idempotency.claim('print', 'of', t(request)::jsonb, lease => '1 hour');
			SELECT fingerprint INTO STRICT f FROM idempotency.idempotency_keys WHERE scope = 'of';
			DELETE FROM idempotency.idempotency_keys WHERE scope = 'of';
		END IF;
		RETURN encode(f, 'hex');
	EXCEPTION WHEN untranslatable_character OR feature_not_supported THEN
		RETURN 'untranslatable';
	END $$}, db => $_)
  foreach @databases;

sub hex_of { return "'" . unpack('H*', Encode::encode('UTF-8', $_[0])) . "'" }

# Can the database hold this text?
sub fits
{
	my ($db, $text) = @_;

	return eval { Encode::encode($encoding{$db}, $text, Encode::FB_CROAK | Encode::LEAVE_SRC); 1 };
}

#
# The formats: the test vectors of doc/formats.md
#

foreach my $db (@databases)
{
	my (%got, %expected);

	foreach my $v (@{ $vectors->{operation_uuid} })
	{
		my $name = Encode::encode('UTF-8', "$v->{scope}, $v->{key}");

		$expected{$name} = fits($db, $v->{scope} . $v->{key}) ? $v->{uuid} : 'untranslatable';
		$got{$name} = sql($node, 'SELECT uuid_of(' . hex_of($v->{key}) . ', ' . hex_of($v->{scope}) . ')', db => $db);
	}
	is_deeply(\%got, \%expected, "$db: operation_uuid()");

	my @prints = @{ $vectors->{fingerprint} };
	my @got = split /\n/, sql($node, join(";\n", map {
				'SELECT print_of(' . hex_of($_->{request}) . ', ' . literal(join(', ', @{ $_->{ignore} })) . ')' } @prints),
		db => $db);
	# whether an escape has a character in the encoding, its own decoder knows;
	# SQL_ASCII has no idea of any
	my @expected = map {
		my $whole = $json->decode(Encode::encode('UTF-8', $_->{request}));
		my $text = JSON::PP->new->allow_nonref->encode($whole);
		my $escaped = $_->{request} =~ /\\u(?!00[0-7])/;

		fits($db, $text) && !($escaped && $db eq 'sql_ascii') ? $_->{fingerprint} : 'untranslatable'
	} @prints;
	is_deeply([ map { "$prints[$_]{name}: $got[$_]" } 0 .. $#prints ],
		[ map { "$prints[$_]{name}: $expected[$_]" } 0 .. $#prints ], "$db: fingerprints");
	isnt(scalar(grep { $_ eq 'untranslatable' } @got) > 0, $db eq 'utf8', "$db: some of them are errors, but in UTF-8");
}

#
# A request's life, in characters that all of them have but for the one that
# is Japanese
#

my %text = map { $_ => [ 'Müller & Söhne', 'Bestellung-ß', 'größe', 'é' ] } @databases;
$text{euc_jp} = [ '株式会社', '注文-1', '大きさ', '円' ];

foreach my $db (@databases)
{
	my ($scope, $key, $name, $value) = @{ $text{$db} };
	# shorter names than the others in one encoding, longer ones in UTF-8
	my $request = qq({"$value": 1, "zz": {"$name": ["$value"]}, "aaa": 1.0, "z": "$value$value"});
	my $same = qq({"aaa": 1, "z": "$value$value", "zz": {"$name": ["$value"]}, "$value": 1.00});
	my $other = qq({"aaa": 1, "z": "$value", "zz": {"$name": ["$value"]}, "$value": 1.00});

	my $first = claim($node, $key, scope => $scope, request => $request, lease => '1 hour', db => $db);
	is($first->{verdict}, 'claimed', "$db: claimed");
	is(claim($node, $key, scope => $scope, request => $same, db => $db)->{verdict}, 'in_progress',
		"$db: the same request, spelled differently");
	is(claim($node, $key, scope => $scope, request => $other, db => $db)->{verdict}, 'mismatch', "$db: another one");
	sql($node, 'SELECT idempotency.record(' . join(', ', literal($key), literal($scope), $first->{token},
			literal(qq({"$name": "$value"})), '201', literal(qq({"x-$value": "$value"})),
			"convert_to('$value', 'UTF8')", "'1 year'") . ')', db => $db);
	my $replay = claim($node, $key, scope => $scope, request => $same, db => $db);
	is_deeply([ @$replay{qw(verdict response response_headers response_body)} ],
		[ 'replay', { Encode::decode('UTF-8', $name) => Encode::decode('UTF-8', $value) },
			{ 'x-' . Encode::decode('UTF-8', $value) => Encode::decode('UTF-8', $value) },
			'\\x' . unpack('H*', $value) ], "$db: the result is replayed");
	is(sql($node, 'SELECT r.key FROM idempotency.idempotency_keys r WHERE scope = ' . literal($scope), db => $db), $key,
		"$db: and its key is the text that came");
}

# 255 characters are characters, not bytes
foreach my $db (@databases)
{
	my $char = $text{$db}[3];
	my $most = $db eq 'sql_ascii' ? int(255 / length($char)) : 255;

	is(claim($node, $char x $most, scope => 'long', lease => '1 hour', db => $db)->{verdict}, 'claimed', "$db: 255 characters");
	run_fails($node, call_text('claim', key => $char x ($most + 1), scope => 'long', lease => '1 hour'), 'IK003',
		"$db: 256", db => $db);
}

#
# Characters that Unicode lacks
#

foreach my $case ([ 'operation_uuid', q{idempotency.operation_uuid(E'\x81', 'scope')} ],
	[ 'scope', q{idempotency.operation_uuid('key', E'\x81')} ],
	[ 'request', q{idempotency.claim('key', 'scope', jsonb_build_object('a', E'\x81'), lease => '1 hour')} ],
	[ 'member', q{idempotency.claim('key', 'scope', jsonb_build_object(E'\x81', 'a'), lease => '1 hour')} ],
	[ 'params', q{idempotency.stripe_call('payment', 'lacking', 'POST', '/v1/customers', jsonb_build_object('name', E'\x81'))} ])
{
	my ($name, $call) = @$case;
	my $before = $stripe->counts->{arrivals};

	run_fails($node, "SELECT $call", '22P05', "a character that Unicode lacks: $name", db => 'win1252');
	is($stripe->counts->{arrivals}, $before, 'and nothing is sent');
}
is(sql($node, 'SELECT count(*) FROM idempotency.idempotency_keys', db => 'win1252'), 0, 'nothing is claimed');
is(claim($node, 'Preis-€', lease => '1 hour', db => 'win1252')->{verdict}, 'claimed', 'the others work');

#
# Stripe: the same bytes and the same key, wherever the call is made
#

sub call
{
	my ($db, $id, $params, %more) = @_;

	return stripe_call($node, 'payment', $id, 'POST', '/v1/customers', params => $params, db => $db, %more);
}

my $params = '{"name": "Jürgen Groß", "metadata": {"größe": "é=ü&[", "zz": "ß"}, "address": {"city": "Århus"}}';
my (%sent, %stripe_key);
foreach my $db (qw(utf8 latin1 sql_ascii))
{
	my $r = call($db, 'customer_1', $params);
	my @arrivals = $stripe->arrivals(method => 'POST');

	is($r->{outcome}, 'completed', "$db: a customer is made");
	$sent{$db} = $arrivals[-1]{body};
	$stripe_key{$db} = $r->{idempotency_key};
	is($r->{response}{id}, $r->{resource_id}, "$db: the answer was understood");
	is($r->{response}{name}, Encode::decode('UTF-8', $db eq 'sql_ascii' ? 'J?rgen Gro?' : 'Jürgen Groß'), "$db: and its text")
	  if $db ne 'sql_ascii';
}
like($sent{utf8}, qr/name=J%C3%BCrgen%20Gro%C3%9F&metadata\[zz\]=%C3%9F&metadata\[gr%C3%B6%C3%9Fe\]=%C3%A9%3D%C3%BC%26%5B|name=J%C3%BCrgen/,
	'the form is in UTF-8');
is($stripe_key{$_}, $stripe_key{utf8}, "$_: the same Stripe key") foreach qw(latin1 sql_ascii);
is(join('&', sort split /&/, $sent{$_}), join('&', sort split /&/, $sent{utf8}), "$_: the same form") foreach qw(latin1 sql_ascii);

# Answers are JSON in UTF-8, as it stands or escaped; none is lost for what the
# encoding lacks, since it may be that to a charge.
my @answers = (
	[ 'as it stands', '{"id": "cus_1", "object": "customer", "name": "é 注文 ü 😀"}',
		{ utf8 => 'é 注文 ü 😀', latin1 => 'é ?? ü ?', euc_jp => 'é 注文 ü ?', sql_ascii => 'é 注文 ü 😀' } ],
	[ 'escaped', '{"id": "cus_1", "object": "customer", "name": "\u00e9 \u6ce8 \ud83d\ude00 \u0041 \\\\u00e9"}',
		{ utf8 => 'é 注 😀 A \\u00e9', latin1 => 'é ? ? A \\u00e9', euc_jp => 'é 注 ? A \\u00e9', sql_ascii => 'é 注 😀 A \\u00e9' } ],
	[ 'Latin', '{"id": "cus_1", "object": "customer", "name": "é \u00fc"}',
		{ utf8 => 'é ü', latin1 => 'é ü', euc_jp => 'é ü', sql_ascii => 'é ü' } ],
	[ 'a zero byte', '{"id": "cus_1", "object": "customer", "name": "\u0000 é \u00e9"}',
		{ utf8 => "\xef\xbf\xbd é é", latin1 => '? é é', euc_jp => '? é é', sql_ascii => "\xef\xbf\xbd é é" } ],
	[ 'half a pair', '{"id": "cus_1", "object": "customer", "name": "\ud83d é"}',
		{ utf8 => "\xef\xbf\xbd é", latin1 => '? é', euc_jp => '? é', sql_ascii => "\xef\xbf\xbd é" } ],
	[ 'a number beyond all', '{"id": "cus_1", "object": "customer", "name": 1e400000, "n": [-1e-20000]}',
		{ map { $_ => '1e400000' } @databases } ],
	[ 'deep', '{"id": "cus_1", "object": "customer", "deep": ' . '[' x 20000 . '1' . ']' x 20000 . ', "name": "é"}',
		{ map { $_ => 'é' } @databases } ]);
foreach my $db (@databases)
{
	foreach my $i (0 .. $#answers)
	{
		my ($name, $body, $expected) = @{ $answers[$i] };

		$stripe->fault('not_json', status => 200, body => Encode::decode('UTF-8', $body));
		my $r = call($db, "answer_$i", '{"email": "a@example.com"}');
		$stripe->clear_faults;
		is("$r->{outcome} $r->{resource_id} " . Encode::encode('UTF-8', $r->{response}{name} // 'none'),
			"completed cus_1 $expected->{$db}", "$db: an answer with text $name");
	}
}

#
# Events: the signature is over the bytes, whatever they become
#

sub receive
{
	my ($function, $event) = @_;
	my $signature = 't=1795300000,v1=' . hmac_sha256_hex("1795300000.$event", 'whsec_test');

	return "SELECT r.stripe_event_id, r.event_type FROM idempotency.$function('\\x" . unpack('H*', $event)
	  . "', '$signature', '{whsec_test}', '1000 years') r";
}

sub event
{
	my ($id, $name) = @_;

	return qq({"id": "$id", "object": "event", "type": "customer.created", "created": 1795300000,)
	  . qq( "data": {"object": {"id": "cus_$id", "object": "customer", "name": "$name"}}});
}

foreach my $db (@databases)
{
	my $name = $text{$db}[0];

	is(sql($node, receive('stripe_webhook_receive', event('evt_1', $name)), db => $db), 'evt_1|customer.created',
		"$db: an event with text");
	is(sql($node, q{SELECT c.event #>> '{data,object,name}' || '|' || (c.event #>> '{data,object,id}')
		FROM idempotency.stripe_webhook_next('1 microsecond') c}, db => $db), "$name|cus_evt_1", "$db: is handed out");
	is(sql($node, q{SELECT payload IS NULL OR convert_from(payload, 'UTF8') LIKE '%customer%'
		FROM idempotency.stripe_webhook_events}, db => $db), 't', "$db: and kept");
	is(sql($node, receive('stripe_webhook_receive', event('evt_2', '\u0000')), db => $db), 'evt_2|customer.created',
		"$db: an escaped zero byte");
}
# what an encoding lacks is a question mark in its jsonb; the bytes are kept
foreach my $case ([ 'latin1', 'é注文', 'é??' ], [ 'latin1', '\u00e9\u6ce8', 'é?' ], [ 'latin1', 'Zo\ud800', 'Zo?' ],
	[ 'euc_jp', '注😀文', '注?文' ], [ 'euc_jp', '\ud83d\ude00', '?' ], [ 'sql_ascii', '\u00e9', 'é' ], [ 'sql_ascii', 'é', 'é' ],
	[ 'latin1', '注' x 30000 . 'é' x 40000, '?' x 30000 . 'é' x 40000 ])
{
	my ($db, $name, $text) = @$case;
	my $body = event('evt_3', $name);
	my $what = substr($name, 0, 30);

	sql($node, q{DELETE FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_3'}, db => $db);
	is(sql($node, receive('stripe_webhook_receive', $body), db => $db), 'evt_3|customer.created', "$db: an event with $what");
	ok(sql($node, q{SELECT payload_snapshot #>> '{data,object,name}' FROM idempotency.stripe_webhook_events
			WHERE stripe_event_id = 'evt_3'}, db => $db) eq $text, 'which is kept');
	is(sql($node, q{SELECT payload = '\x} . unpack('H*', $body) . q{'
			FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_3'}, db => $db), 't', 'with its bytes');
	sql($node, q{DELETE FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_3'}, db => $db);
}

# also where nearly every other character is lacking, in time
{
	my $body = event('evt_long', '注' . 'é注x' x 300_000);
	my $file = PostgreSQL::Test::Utils::tempdir() . '/event.sql';

	append_to_file($file, "SET statement_timeout = '60s';\n" . receive('stripe_webhook_receive', $body));
	is($node->safe_psql('latin1', "\\i $file"), 'evt_long|customer.created', 'latin1: a long event of such');
	ok(sql($node, q{SELECT payload_snapshot #>> '{data,object,name}' = '?' || repeat('é?x', 300000)
		FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_long'}, db => 'latin1') eq 't', 'which is kept');
	sql($node, q{DELETE FROM idempotency.stripe_webhook_events WHERE stripe_event_id = 'evt_long'}, db => 'latin1');
}

# a body told as text is in the client's encoding, and signed in UTF-8
foreach my $case ([ 'latin1', 'é\\' ], [ 'euc_jp', '注文\"' ], [ 'sql_ascii', 'é\u00e9' ])
{
	my ($db, $name) = @$case;
	my $body = event('evt_4', $name);

	is(sql($node, "SELECT idempotency.stripe_webhook_verify(" . literal($body) . ", 't=1795300000,v1="
			. hmac_sha256_hex("1795300000.$body", 'whsec_test') . "', '{whsec_test}', '1000 years')", db => $db),
		'valid', "$db: a body as text");
}

#
# A dump of one encoding, restored into another
#

sub told
{
	my ($db) = @_;
	my ($scope, $key, $name, $value) = @{ $text{latin1} };
	my $request = qq({"$value": 1, "zz": {"$name": ["$value"]}, "aaa": 1.0, "z": "$value$value"});

	return sql($node, "SELECT c::text FROM idempotency.claim(" . literal($key) . ', ' . literal($scope) . ', '
		  . literal($request) . ') c;'
		  . "SELECT verdict FROM idempotency.claim(" . literal($key) . ', ' . literal($scope) . q{, '{"a": "é"}') c;}
		  . 'SELECT idempotency.operation_uuid(' . literal($key) . ', ' . literal($scope) . ');'
		  . q{SELECT l::text, idempotency.stripe_idempotency_key('payment', 'customer_1'),
				idempotency.stripe_idempotency_key('payment', 'next')
			FROM idempotency.stripe_lookup('payment', 'customer_1') l;
			SELECT convert_from(body, 'UTF8') FROM idempotency.stripe_idempotency_keys WHERE operation_id = 'customer_1';
			SELECT event FROM idempotency.stripe_webhook_reclaim('evt_1', lease => '1 microsecond')}, db => $db);
}

my $told = told('latin1');
foreach my $db ('restored', 'restored_from_latin1')
{
	my $dump = PostgreSQL::Test::Utils::tempdir() . "/$db.sql";

	sql($node, "CREATE DATABASE $db ENCODING 'UTF8' LOCALE 'C' TEMPLATE template0");
	$node->command_ok([ 'pg_dump', '-f', $dump, '-E', $db eq 'restored' ? 'UTF8' : 'LATIN1', 'latin1' ], 'a dump of LATIN1');
	$node->command_ok([ 'psql', '-qX', '-f', $dump, $db ], 'is restored into UTF-8');
	is(told($db), $told, 'where it says the same, byte for byte');
	my $before = $stripe->counts->{arrivals};
	my $again = call($db, 'customer_1', $params);
	is("$again->{outcome} $again->{replayed} $again->{idempotency_key}", "completed 1 $stripe_key{utf8}",
		'and a call is replayed');
	is($stripe->counts->{arrivals}, $before, 'and not sent');
	is(call($db, 'customer_1', '{"name": "Jurgen"}')->{outcome}, 'mismatch', 'another one is told apart');
}

#
# The view of workers: what one says in an encoding is read in another
#

foreach my $db ('utf8', 'latin1')
{
	sql($node, q{
		CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'ärgerlich'; END$$;
		CREATE TRIGGER refuse BEFORE DELETE ON idempotency.idempotency_keys
			FOR EACH ROW WHEN (OLD.key LIKE 'ß%') EXECUTE FUNCTION refuse()}, db => $db);
	expired_rows($node, 1, prefix => 'ß' . 'é' x 240, db => $db);
	wait_until($node, q{SELECT status = 'rows refused' AND last_error LIKE '%ßéé%' FROM idempotency.workers
		WHERE database = current_database()}, "$db: a row that refuses", db => $db);
}
# what the view shows, or the error where that is no text
sub last_error
{
	my ($of, $in) = @_;
	my (undef, $stdout, $stderr) = $node->psql($in, qq{
		SELECT convert_from(convert_to(last_error, 'UTF8'), 'UTF8') FROM idempotency.workers WHERE database = '$of'});

	return $stdout . $stderr;
}
like(last_error('utf8', 'utf8'), qr/ß(é)+$/, 'a long text is cut between characters');
like(last_error('latin1', 'latin1'), qr/ß(é)+$/, 'in the own encoding, too');
foreach my $case ([ 'latin1', 'utf8' ], [ 'utf8', 'latin1' ], [ 'utf8', 'euc_jp' ])
{
	my ($of, $in) = @$case;

	like(last_error($of, $in), qr/test.*\?{8}$/, "the text of $of is legible in $in");
}

$node->stop;
$stripe->stop;

done_testing();
