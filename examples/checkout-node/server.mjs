//
// A shop that takes a payment once.
//
//   POST /checkout          the database calls Stripe, inside the transaction
//   POST /checkout-by-sdk   this program calls Stripe, with Stripe's library
//   POST /stripe/webhook    events of Stripe's
//
// Both checkouts take an Idempotency-Key and {"cart": ..., "payment_method": ...}.
// Choose one of them for your own application; doc/stripe.md says how.
//
import http from 'node:http';
import pg from 'pg';
import Stripe from 'stripe';

// PGHOST, PGDATABASE and so on say where.  Who gets no connection in time is told to repeat.
const pool = new pg.Pool({ max: 20, connectionTimeoutMillis: 5_000 });
// A connection can end at any time, idle or in the middle of a request.  Without a
// listener of its own, each of the two would end this program.
pool.on('error', error => console.error(error.message));
pool.on('connect', db => db.on('error', error => console.error(error.message)));

const api = new URL(process.env.STRIPE_API_BASE ?? 'https://api.stripe.com');
const stripe = new Stripe(process.env.STRIPE_API_KEY ?? 'sk_test_none', {
    httpClient: Stripe.createFetchHttpClient(send),
    protocol: api.protocol.slice(0, -1),
    host: api.hostname,
    port: api.port || '443',
    // The ledger repeats, at the client's next try.  A refusal after an attempt that
    // got no answer would be recorded as that of the payment.
    maxNetworkRetries: 0,
    timeout: 20_000,
});

// Left alone, the library sends again where a connection closes, in spite of the 0, and
// ends this program on JSON that is no object.  Nor is a redirect to be followed.
async function send(url, options) {
    const response = await fetch(url, { ...options, redirect: 'error' });
    const body = await response.json();
    if (typeof body !== 'object' || !body || Array.isArray(body))
        throw new Error('This is no answer of Stripe\'s.');
    return Response.json(body, response);
}

// longer than the library's timeout: until then nobody else takes over
const lease = '2 minutes';

// by this a payment is known as ours: others may use the same account of Stripe's
const shop = 'checkout-example';

async function transaction(work) {
    const db = await pool.connect();
    let broken;
    try {
        await db.query('BEGIN');
        const result = await work(db);
        await db.query('COMMIT');
        return result;
    } catch (error) {
        await db.query('ROLLBACK').catch(e => { broken = e; });
        throw error;
    } finally {
        db.release(broken);     // a broken one isn't used again
    }
}

// a refusal, in the form of RFC 9457
function problem(status, detail, retryAfter) {
    return {
        status,
        headers: { 'Content-Type': 'application/problem+json', ...(retryAfter && { 'Retry-After': retryAfter }) },
        body: { status, detail },
    };
}

//
// Claim the client's key, and see to it that there is an order.  Comes back
// with an answer for the client, or with token and order.
//
// It doesn't wait for another request with the key: each that waits keeps a
// connection, and impatient clicks of one customer would take them from all.
//
async function begin(db, ask, lease) {
    const { rows: [c] } = await db.query(
        'SELECT * FROM idempotency.claim($1, $2, request => $3, lease => $4, wait => false)',
        [ask.key, ask.user, { method: 'POST', path: ask.path, body: ask.body }, lease]);

    switch (c.verdict) {
        case 'replay':
            return { answer: { status: c.http_status, headers: { 'Idempotent-Replayed': 'true' }, body: c.response ?? undefined } };
        case 'in_progress':
            return { answer: problem(c.http_status, 'This request is being processed.', c.retry_after) };
        case 'mismatch':
            return { answer: problem(c.http_status, 'This Idempotency-Key was used with another request.') };
    }

    // a retry finds its order again: the id comes from what it repeats
    await db.query(
        `INSERT INTO orders (id, user_id, cart, amount, payment_method)
         SELECT idempotency.operation_uuid($1, $2), $2, id, amount, $4 FROM carts WHERE id = $3 AND user_id = $2
         ON CONFLICT (id) DO NOTHING`,
        [ask.key, ask.user, ask.body.cart, ask.body.payment_method]);
    const { rows: [order] } = await db.query(
        'SELECT * FROM orders WHERE id = idempotency.operation_uuid($1, $2)', [ask.key, ask.user]);

    // a key that has expired has forgotten its request; the order hasn't
    const refusal = !order ? problem(404, 'There is no such cart.')
        : order.cart !== ask.body.cart || order.payment_method !== ask.body.payment_method
            ? problem(422, 'This Idempotency-Key was used with another request.')
            : undefined;
    if (refusal) {
        await db.query('SELECT idempotency.release($1, $2, $3)', [ask.key, ask.user, c.token]);
        return { answer: refusal };
    }
    return { token: c.token, order };
}

// What is sent to Stripe for an order: always the same.
function paymentOf(order) {
    return {
        amount: order.amount, currency: 'eur', confirm: true, payment_method: order.payment_method,
        automatic_payment_methods: { enabled: true, allow_redirects: 'never' },
        metadata: { shop, order_id: order.id },
    };
}

//
// A payment whose status isn't recorded was settled by hand: its id is all there
// is, and Stripe tells the rest, or, if not now, the client's retry asks again.
//
async function withStatus(result, ask) {
    if (result.outcome !== 'completed' || result.resource_status || !/^pi_\w+$/.test(result.resource_id))
        return result;
    const { outcome, status } = await ask(result.resource_id);
    return { ...result, outcome: outcome === 'unknown' ? outcome : result.outcome, resource_status: status };
}

//
// What became of the payment goes to the order, and to the client: recorded if
// it is a result.  If the client's retry may learn more, the key is given back
// for it, and for no other request.
//
async function conclude(db, ask, token, order, result) {
    let state, answer;
    switch (result.outcome) {
        case 'completed':
            state = result.resource_status === 'succeeded' ? 'paid' : result.resource_status ?? 'completed';
            answer = { status: 201, body: { order: order.id, state, payment: result.resource_id } };
            break;
        case 'failed':
            state = 'declined';
            answer = { status: 402, body: { order: order.id, state, reason: result.error?.code ?? result.error?.type } };
            break;
        case 'not_executed':
            state = 'new';
            answer = problem(503, 'Not paid. Please repeat the request.', result.retry_after ?? 5);
            break;
        case 'unknown':
        case 'in_progress':
            state = 'checking';
            answer = problem(result.outcome === 'unknown' ? 503 : 409,
                'The payment is being checked. Please repeat the request.', result.retry_after ?? 5);
            break;
        default:
            state = 'checking';
            answer = problem(500, 'Something is wrong on our side.');
            console.error(`order ${order.id}: ${result.outcome}`);
    }

    // an event may have been faster
    await db.query(
        `UPDATE orders SET state = $2, payment = $3 WHERE id = $1 AND state <> 'paid'`,
        [order.id, state, result.resource_id]);
    if (result.outcome === 'completed' || result.outcome === 'failed')
        await db.query('SELECT idempotency.record($1, $2, $3, response => $4, response_status => $5)',
            [ask.key, ask.user, token, answer.body, answer.status]);
    else
        await db.query('SELECT idempotency.release($1, $2, $3, keep => true)', [ask.key, ask.user, token]);
    return answer;
}

//
// One transaction, and the database calls Stripe in it.
//
async function checkout(ask) {
    return transaction(async db => {
        const { answer, token, order } = await begin(db, ask);
        if (answer)
            return answer;

        const { rows: [result] } = await db.query(
            `SELECT * FROM idempotency.stripe_call('payment', $1, 'POST', '/v1/payment_intents', $2)`,
            [order.id, paymentOf(order)]);
        return conclude(db, ask, token, order, await withStatus(result, async id => {
            await db.query('SAVEPOINT ask');
            try {
                const { rows: [{ outcome, http_status, resource_status }] } = await db.query(
                    `SELECT outcome, http_status, resource_status
                       FROM idempotency.stripe_get('/v1/payment_intents/' || $1)`, [id]);
                const known = outcome === 'completed' || outcome === 'failed' || [401, 403].includes(http_status);
                return { outcome: known ? 'completed' : 'unknown', status: resource_status };
            } catch (error) {
                if (error.code !== '42501')     // not a path that may be asked
                    throw error;
                await db.query('ROLLBACK TO SAVEPOINT ask');
                return { outcome: 'failed' };
            }
        }));
    });
}

//
// Stripe's library calls, between two short transactions.
//
async function checkoutBySdk(ask) {
    const { answer, token, order } = await transaction(db => begin(db, ask, lease));
    if (answer)
        return answer;

    const { rows: [claim] } = await pool.query(
        `SELECT * FROM idempotency.stripe_claim('payment', $1, request => $2, lease => $3)`,
        [order.id, { method: 'POST', path: '/v1/payment_intents', params: paymentOf(order) }, lease]);
    const sent = claim.verdict === 'claimed' ? await pay(claim) : undefined;

    return transaction(async db => {
        let result = { ...claim, outcome: claim.verdict === 'replay' ? claim.outcome : claim.verdict };
        if (sent) {
            await db.query(
                `SELECT idempotency.stripe_record('payment', $1, $2, http_status => $3, request_id => $4, response => $5)`,
                [order.id, claim.token, sent.status, sent.requestId, sent.body]);
            // what is recorded now: this answer, or a better one that was there before
            ({ rows: [result] } = await db.query(
                `SELECT * FROM idempotency.stripe_lookup('payment', $1)`, [order.id]));
        }
        return conclude(db, ask, token, order, await withStatus(result, retrieve));
    });
}

// What a payment's status is.
async function retrieve(id) {
    try {
        const { status } = await stripe.paymentIntents.retrieve(id);
        return { outcome: 'completed', status };
    } catch (error) {
        // not there, or not for this key: it is paid all the same
        const never = error.code === 'resource_missing' || [401, 403].includes(error.statusCode);
        return { outcome: never ? 'failed' : 'unknown' };
    }
}

// Send what the claim says, with the key that it says.  No answer: no status.
async function pay(claim) {
    try {
        const intent = await stripe.paymentIntents.create(claim.request.params, { idempotencyKey: claim.idempotency_key });
        return {
            status: intent.lastResponse.statusCode, requestId: intent.lastResponse.requestId,
            body: intent,
        };
    } catch (error) {
        if (!(error instanceof Stripe.errors.StripeError))
            console.error(error.message);
        // neither does an answer that the library can't read tell anything
        if (!error.statusCode)
            return { status: null, requestId: null, body: null };
        // the error, by whose type the database knows Stripe's refusals from a
        // gateway's, without the library's additions
        const { headers, statusCode, requestId, ...body } = error.raw;
        return {
            status: error.statusCode, requestId: error.requestId,
            body: { error: body },
        };
    }
}

//
// An event is processed in the transaction that claims it.  Claiming also
// settles a call whose answer was lost: the client's retry finds it settled.
//
async function webhook(body, signature) {
    return transaction(async db => {
        const { rows: [e] } = await db.query(
            'SELECT * FROM idempotency.stripe_webhook_claim($1::bytea, $2, wait => false)', [body, signature]);

        if (e.verdict === 'in_progress')
            return problem(409, 'This event is being processed.', e.retry_after);
        if (e.verdict === 'replay')
            return { status: 200, body: {} };

        const failure = await handleEvent(db, e);
        await db.query('SELECT idempotency.stripe_webhook_record($1, $2, error_message => $3, account => $4)',
            [e.stripe_event_id, e.token, failure, e.account]);
        return failure ? problem(503, failure) : { status: 200, body: {} };
    });
}

// What an event means for us: undefined, or why it has to come again.
async function handleEvent(db, e) {
    const { metadata } = e.event.data?.object ?? {};
    if (e.event_type !== 'payment_intent.succeeded' || metadata?.shop !== shop)
        return undefined;

    const { rowCount } = await db.query(
        `UPDATE orders SET state = 'paid', payment = $2 WHERE id::text = $1`, [metadata.order_id, e.object_id]);
    // an event can be faster than the transaction that pays
    return rowCount === 0 ? 'There is no such order, or not yet.' : undefined;
}

const checkouts = { '/checkout': checkout, '/checkout-by-sdk': checkoutBySdk };

async function handle(request) {
    const chunks = [];
    for await (const chunk of request)
        chunks.push(chunk);
    const raw = Buffer.concat(chunks);

    if (request.method !== 'POST')
        return problem(405, 'POST, please.');
    if (request.url === '/stripe/webhook')
        return webhook(raw, request.headers['stripe-signature']);
    if (!Object.hasOwn(checkouts, request.url))
        return problem(404, 'There is nothing here.');

    // the scope of a key is who has logged in, never what the request says
    const session = request.headers.authorization?.replace(/^Bearer /, '');
    const { rows: [user] } = await pool.query('SELECT user_id FROM sessions WHERE token = $1', [session]);
    if (!user)
        return problem(401, 'Please log in.');

    const key = request.headers['idempotency-key']?.trim().replace(/^"(.*)"$/, '$1');
    if (!key)
        return problem(400, 'The Idempotency-Key header is missing.');

    let body;
    try {
        body = JSON.parse(raw);
    } catch {
        // refused below
    }
    if (typeof body?.cart !== 'string' || typeof body?.payment_method !== 'string')
        return problem(400, 'cart and payment_method are needed.');

    return checkouts[request.url]({ key, user: user.user_id, path: request.url, body });
}

// errors that say something about the request, or that a retry heals
const refusals = {
    IK001: [409, 'Somebody else has taken this request over.', 1],
    IK003: [400, 'The Idempotency-Key header is malformed.'],
    IK004: [400, 'The event is refused.'],
    IK008: [503, 'Nothing was done. Please repeat the request.', 1],
    '55P03': [409, 'This request is being processed.', 1],
};

// The database is away, or has no place for us.  What was done until then may be anything.
const isAway = error => /^(08|53|57P|E[A-Z]+$)/.test(error.code)
    || /^(Connection terminated|timeout exceeded)/.test(error.message);

http.createServer(async (request, response) => {
    let answer;
    try {
        answer = await handle(request);
    } catch (error) {
        answer = problem(...(refusals[error.code] ?? [isAway(error) ? 503 : 500, 'Please repeat the request.', 5]));
        if (!refusals[error.code])
            console.error(error.message);
    }
    response.writeHead(answer.status, { 'Content-Type': 'application/json', ...answer.headers });
    response.end(JSON.stringify(answer.body));
}).listen(process.env.PORT ?? 8080, '127.0.0.1', function () {
    console.log(`listening on http://127.0.0.1:${this.address().port}`);
});
