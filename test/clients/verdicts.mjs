//
// test/clients/verdicts.mjs N SEED
//
// Makes N bodies and headers at random, signs them with Stripe's own library,
// damages some, and asks both that library and the database.  Prints the number
// of each verdict; exits 1 where the two differ, after printing the case.
//
import crypto from 'node:crypto';
import pg from 'pg';
import Stripe from 'stripe';

const n = Number(process.argv[2]);
let state = BigInt(process.argv[3]);
const stripe = new Stripe('sk_test_nothing_is_called');
const client = new pg.Client();
const counts = {};
let different = 0;

function random(below) {
    state = BigInt.asUintN(64, state * 6364136223846793005n + 1442695040888963407n);
    return Number((state >> 33n) % BigInt(below));
}

function pick(list) {
    return list[random(list.length)];
}

function randomText() {
    const alphabet = ['a', 'Z', '0', ' ', '"', '\\', '/', '\n', '\r\n', '\t', 'ü', 'é', '\u2028', '渋', '😀', '<', '&', "'", '%', ',', '='];
    return Array.from({ length: random(30) }, () => pick(alphabet)).join('');
}

function randomEvent(i) {
    const object = { id: 'pi_' + randomText(), object: 'payment_intent', description: randomText(), metadata: {} };
    for (let k = random(5); k > 0; k--)
        object.metadata['k' + k] = randomText();
    if (random(10) === 0)
        object.large = randomText().repeat(2000);
    return { id: 'evt_' + i, object: 'event', api_version: null, created: 1795300000 + random(1000), livemode: random(2) === 0,
        pending_webhooks: random(3), request: pick([null, { id: 'req_1', idempotency_key: randomText() }]), type: 'a.' + i, data: { object } };
}

function damage(c) {
    switch (pick(['body', 'body', 'secret', 'signature', 'cut', 'no v1', 'no t', 'empty', 'other time', 'nothing'])) {
        case 'body': {
            const body = Buffer.from(c.body);
            const at = random(body.length);
            // stay in ASCII: what isn't UTF-8 is read differently by the library
            if (body[at] < 0x80)
                body[at] = body[at] === 0x61 ? 0x62 : 0x61;
            c.body = body;
            break;
        }
        case 'secret': c.secret += 'x'; break;
        case 'signature': c.header = c.header.replace(/v1=(.)/, (m, x) => 'v1=' + (x === '0' ? '1' : '0')); break;
        case 'cut': c.header = c.header.slice(0, -1 - random(60)); break;
        case 'no v1': c.header = c.header.replace(/v1=/g, 'v0='); break;
        case 'no t': c.header = c.header.replace(/t=\d+,?/, ''); break;
        case 'empty': c.header = ''; break;
        case 'other time': c.header = c.header.replace(/t=(\d+)/, (m, t) => 't=' + (Number(t) - 1)); break;
    }
}

// still good, or still bad
function decorate(c) {
    const other = crypto.randomBytes(32).toString('hex');
    switch (pick(['before', 'after', 'schemes', 'turned', 'comma', 'nothing'])) {
        case 'before': c.header = c.header.replace(/,/, `,v1=${other},`); break;
        case 'after': c.header += `,v1=${other}`; break;
        case 'schemes': c.header += `,v0=${other},v2=abc`; break;
        case 'turned': c.header = c.header.split(',').reverse().join(','); break;
        case 'comma': c.header += ','; break;
    }
}

await client.connect();
for (let i = 0; i < n; i++) {
    const event = randomEvent(i);
    const text = pick([JSON.stringify(event), JSON.stringify(event, null, 2), JSON.stringify(event, null, '\t') + '\r\n']);
    const c = { body: Buffer.from(text), secret: 'whsec_test_' + crypto.randomBytes(12).toString('hex') };
    // not at the edge: the clock goes on
    const age = pick([0, 1, 100, 250, 350, 1000, 100000, -1, -1000]);
    const timestamp = Math.floor(Date.now() / 1000) - age;

    c.header = stripe.webhooks.generateTestHeaderString({ payload: text, secret: c.secret, timestamp });
    const damaged = random(2) === 0;
    if (damaged)
        damage(c);
    if (c.header !== '')
        decorate(c);

    let theirs = true;
    try {
        stripe.webhooks.signature.verifyHeader(c.body, c.header, c.secret, 300);
    } catch (error) {
        theirs = false;
    }
    const { rows: [ours] } = await client.query(
        'SELECT v.word, idempotency.stripe_webhook_is_valid($1::bytea, $2, $3) AS valid FROM idempotency.stripe_webhook_verify($1::bytea, $2, $3) v (word)',
        [c.body, c.header, [c.secret]]);

    counts[ours.word] = (counts[ours.word] ?? 0) + 1;
    if (ours.valid !== theirs || ours.valid !== (ours.word === 'valid')) {
        console.log(`different: ${ours.word}, theirs ${theirs}: ${c.header} ${c.secret} ${c.body.toString('base64')}`);
        different++;
    }
    // and the event is the same to both
    if (ours.valid && !damaged) {
        const { rows: [same] } = await client.query(
            'SELECT e.event = $4::jsonb AS same FROM idempotency.stripe_webhook_claim($1::bytea, $2, $3, lease => $5) e',
            [c.body, c.header, [c.secret],
                JSON.stringify(stripe.webhooks.constructEvent(c.body, c.header, c.secret)), '1 hour']);
        if (!same.same) {
            console.log(`another event: ${c.body.toString('base64')}`);
            different++;
        }
    }
}
await client.end();
console.log(JSON.stringify(counts));
process.exit(different === 0 ? 0 : 1);
