#!/usr/bin/env python3
"""
A shop that takes a payment once.

  POST /checkout          the database calls Stripe, inside the transaction
  POST /checkout-by-sdk   this program calls Stripe, with Stripe's library
  POST /stripe/webhook    events of Stripe's

Both checkouts take an Idempotency-Key and {"cart": ..., "payment_method": ...}.
Choose one of them for your own application; doc/stripe.md says how.
"""

import json
import os
import re
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

try:
    import requests
    import stripe
    try:
        from stripe import RequestsClient, StripeError
    except ImportError:  # before version 8
        from stripe.error import StripeError
        from stripe.http_client import RequestsClient
except ImportError:
    stripe = None  # then /checkout-by-sdk isn't there

if stripe:
    stripe.api_key = os.environ.get("STRIPE_API_KEY", "sk_test_none")
    stripe.api_base = os.environ.get("STRIPE_API_BASE", stripe.api_base)
    # The ledger repeats, at the client's next try.  A refusal after an attempt that
    # got no answer would be recorded as that of the payment.
    stripe.max_network_retries = 0
    session = requests.Session()
    session.max_redirects = 0  # what answers by one isn't Stripe
    stripe.default_http_client = RequestsClient(timeout=20, session=session)

# longer than the library's timeout: until then nobody else takes over
LEASE = "2 minutes"

# by this a payment is known as ours: others may use the same account of Stripe's
SHOP = "checkout-example"

# how many connections there are at most; who gets none in time is told to repeat
PLACES = threading.BoundedSemaphore(20)


@contextmanager
def connect(**options):
    """A connection; PGHOST, PGDATABASE and so on say where.  Leaving it commits, an error rolls back."""
    if not PLACES.acquire(timeout=5):
        raise psycopg.OperationalError("all connections are in use")
    try:
        with psycopg.connect(row_factory=dict_row, client_encoding="utf8", **options) as db:
            yield db
    finally:
        PLACES.release()


def problem(status, detail, retry_after=None):
    """A refusal, in the form of RFC 9457."""
    headers = {"Content-Type": "application/problem+json"}
    if retry_after is not None:
        headers["Retry-After"] = str(retry_after)
    return status, headers, {"status": status, "detail": detail}


def begin(db, ask, lease=None):
    """
    Claim the client's key, and see to it that there is an order.  Comes back
    with an answer for the client, or with token and order.

    It doesn't wait for another request with the key: each that waits keeps a
    connection, and impatient clicks of one customer would take them from all.
    """
    c = db.execute(
        "SELECT * FROM idempotency.claim(%s, %s, request => %s, lease => %s, wait => false)",
        (ask["key"], ask["user"], Jsonb({"method": "POST", "path": ask["path"], "body": ask["body"]}), lease)).fetchone()

    if c["verdict"] == "replay":
        return (c["http_status"], {"Idempotent-Replayed": "true"}, c["response"]), None, None
    if c["verdict"] == "in_progress":
        return problem(c["http_status"], "This request is being processed.", c["retry_after"]), None, None
    if c["verdict"] == "mismatch":
        return problem(c["http_status"], "This Idempotency-Key was used with another request."), None, None

    # a retry finds its order again: the id comes from what it repeats
    db.execute(
        """INSERT INTO orders (id, user_id, cart, amount, payment_method)
           SELECT idempotency.operation_uuid(%(key)s, %(user)s), user_id, id, amount, %(payment_method)s
             FROM carts WHERE id = %(cart)s AND user_id = %(user)s
           ON CONFLICT (id) DO NOTHING""",
        {**ask, **ask["body"]})
    order = db.execute(
        "SELECT * FROM orders WHERE id = idempotency.operation_uuid(%(key)s, %(user)s)", ask).fetchone()

    # a key that has expired has forgotten its request; the order hasn't
    refusal = None
    if order is None:
        refusal = problem(404, "There is no such cart.")
    elif any(order[name] != ask["body"][name] for name in ("cart", "payment_method")):
        refusal = problem(422, "This Idempotency-Key was used with another request.")
    if refusal:
        db.execute("SELECT idempotency.release(%s, %s, %s)", (ask["key"], ask["user"], c["token"]))
    return refusal, c["token"], order


def payment_of(order):
    """What is sent to Stripe for an order: always the same."""
    return {
        "amount": order["amount"], "currency": "eur", "confirm": True, "payment_method": order["payment_method"],
        "automatic_payment_methods": {"enabled": True, "allow_redirects": "never"},
        "metadata": {"shop": SHOP, "order_id": str(order["id"])},
    }


def with_status(result, ask_stripe):
    """
    A payment whose status isn't recorded was settled by hand: its id is all there
    is, and Stripe tells the rest, or, if not now, the client's retry asks again.
    """
    known = result["resource_status"] or not re.fullmatch(r"pi_\w+", result["resource_id"] or "")
    if result["outcome"] != "completed" or known:
        return result
    outcome, status = ask_stripe(result["resource_id"])
    return {**result, "outcome": outcome if outcome == "unknown" else "completed", "resource_status": status}


def conclude(db, ask, token, order, result):
    """
    What became of the payment goes to the order, and to the client: recorded if
    it is a result.  If the client's retry may learn more, the key is given back
    for it, and for no other request.
    """
    outcome, wait = result["outcome"], result.get("retry_after") or 5
    if outcome == "completed":
        status = result["resource_status"]
        state = "paid" if status == "succeeded" else status or "completed"
        answer = 201, {}, {"order": str(order["id"]), "state": state, "payment": result["resource_id"]}
    elif outcome == "failed":
        error = result["error"] or {}
        state = "declined"
        answer = 402, {}, {"order": str(order["id"]), "state": state, "reason": error.get("code") or error.get("type")}
    elif outcome == "not_executed":
        state = "new"
        answer = problem(503, "Not paid. Please repeat the request.", wait)
    elif outcome in ("unknown", "in_progress"):
        state = "checking"
        answer = problem(503 if outcome == "unknown" else 409,
                         "The payment is being checked. Please repeat the request.", wait)
    else:
        state = "checking"
        answer = problem(500, "Something is wrong on our side.")
        print(f"order {order['id']}: {outcome}", file=sys.stderr)

    # an event may have been faster
    db.execute("UPDATE orders SET state = %s, payment = %s WHERE id = %s AND state <> 'paid'",
               (state, result["resource_id"], order["id"]))
    if outcome in ("completed", "failed"):
        db.execute("SELECT idempotency.record(%s, %s, %s, response => %s, response_status => %s)",
                   (ask["key"], ask["user"], token, Jsonb(answer[2]), answer[0]))
    else:
        db.execute("SELECT idempotency.release(%s, %s, %s, keep => true)", (ask["key"], ask["user"], token))
    return answer


def checkout(ask):
    """One transaction, and the database calls Stripe in it."""
    with connect() as db:
        answer, token, order = begin(db, ask)
        if answer:
            return answer

        result = db.execute(
            "SELECT * FROM idempotency.stripe_call('payment', %s, 'POST', '/v1/payment_intents', %s)",
            (str(order["id"]), Jsonb(payment_of(order)))).fetchone()

        def ask_stripe(payment):
            try:
                with db.transaction():
                    found = db.execute(
                        "SELECT * FROM idempotency.stripe_get('/v1/payment_intents/' || %s)", (payment,)).fetchone()
            except psycopg.errors.InsufficientPrivilege:  # not a path that may be asked
                return "failed", None
            known = found["outcome"] in ("completed", "failed") or found["http_status"] in (401, 403)
            return "completed" if known else "unknown", found["resource_status"]

        return conclude(db, ask, token, order, with_status(result, ask_stripe))


def checkout_by_sdk(ask):
    """Stripe's library calls, between two short transactions; meanwhile no connection is held."""
    with connect(autocommit=True) as db:
        with db.transaction():
            answer, token, order = begin(db, ask, LEASE)
        if answer:
            return answer

        operation = str(order["id"])
        request = {"method": "POST", "path": "/v1/payment_intents", "params": payment_of(order)}
        claim = db.execute(
            "SELECT * FROM idempotency.stripe_claim('payment', %s, request => %s, lease => %s)",
            (operation, Jsonb(request), LEASE)).fetchone()

    sent = send(claim) if claim["verdict"] == "claimed" else None

    with connect() as db:
        if sent:
            db.execute(
                """SELECT idempotency.stripe_record('payment', %s, %s,
                              http_status => %s, request_id => %s, response => %s)""",
                (operation, claim["token"], *sent))
            # what is recorded now: this answer, or a better one that was there before
            result = db.execute(
                "SELECT * FROM idempotency.stripe_lookup('payment', %s)", (operation,)).fetchone()
        elif claim["verdict"] == "replay":
            result = claim
        else:
            result = {**claim, "outcome": claim["verdict"]}
        return conclude(db, ask, token, order, with_status(result, retrieve))


def retrieve(payment):
    """What a payment's status is."""
    try:
        return "completed", stripe.PaymentIntent.retrieve(payment)["status"]
    except Exception as error:
        # not there, or not for this key: it is paid all the same
        never = getattr(error, "code", None) == "resource_missing" or getattr(error, "http_status", None) in (401, 403)
        return "failed" if never else "unknown", None


def send(claim):
    """Send what the claim says, with the key that it says: status, Request-Id and body, or no status."""
    try:
        intent = stripe.PaymentIntent.create(
            idempotency_key=claim["idempotency_key"], **claim["request"]["params"])
        answer = intent.last_response
        return answer.code, answer.request_id, Jsonb(answer.data) if isinstance(answer.data, dict) else None
    except StripeError as error:
        # a 200 that isn't JSON tells nothing, as no answer does
        if not error.http_status or error.http_status < 300:
            return None, None, None
        # the whole body: by its error the database knows Stripe's refusals from a gateway's
        body = error.json_body
        return error.http_status, error.request_id, Jsonb(body) if isinstance(body, dict) else None
    except Exception as error:  # nor does an answer that the library can't read
        print(f"{claim['idempotency_key']}: {error!r}", file=sys.stderr)
        return None, None, None


def webhook(body, signature):
    """
    An event is processed in the transaction that claims it.  Claiming also
    settles a call whose answer was lost: the client's retry finds it settled.
    """
    with connect() as db:
        e = db.execute("SELECT * FROM idempotency.stripe_webhook_claim(%s, %s, wait => false)",
                       (body, signature)).fetchone()

        if e["verdict"] == "in_progress":
            return problem(409, "This event is being processed.", e["retry_after"])
        if e["verdict"] == "replay":
            return 200, {}, {}

        failure = handle_event(db, e)
        db.execute("SELECT idempotency.stripe_webhook_record(%s, %s, error_message => %s, account => %s)",
                   (e["stripe_event_id"], e["token"], failure, e["account"]))
        return problem(503, failure) if failure else (200, {}, {})


def handle_event(db, e):
    """What an event means for us: None, or why it has to come again."""
    if e["event_type"] != "payment_intent.succeeded":
        return None
    metadata = e["event"]["data"]["object"].get("metadata") or {}
    if metadata.get("shop") != SHOP:
        return None

    done = db.execute("UPDATE orders SET state = 'paid', payment = %s WHERE id::text = %s",
                      (e["object_id"], metadata.get("order_id")))
    # an event can be faster than the transaction that pays
    return None if done.rowcount else "There is no such order, or not yet."


CHECKOUTS = {"/checkout": checkout}
if stripe:
    CHECKOUTS["/checkout-by-sdk"] = checkout_by_sdk


def handle(path, headers, raw):
    if path == "/stripe/webhook":
        return webhook(raw, headers.get("Stripe-Signature"))
    if path not in CHECKOUTS:
        return problem(404, "There is nothing here.")

    # the scope of a key is who has logged in, never what the request says
    session = headers.get("Authorization", "").removeprefix("Bearer ")
    with connect() as db:
        user = db.execute("SELECT user_id FROM sessions WHERE token = %s", (session,)).fetchone()
    if user is None:
        return problem(401, "Please log in.")

    key = headers.get("Idempotency-Key", "").strip()
    if len(key) > 1 and key[0] == key[-1] == '"':
        key = key[1:-1]
    if not key:
        return problem(400, "The Idempotency-Key header is missing.")

    try:
        body = json.loads(raw)
    except ValueError:
        body = None
    if not isinstance(body, dict) or not all(isinstance(body.get(n), str) for n in ("cart", "payment_method")):
        return problem(400, "cart and payment_method are needed.")

    return CHECKOUTS[path]({"key": key, "user": user["user_id"], "path": path, "body": body})


# errors that say something about the request, or that a retry heals
REFUSALS = {
    "IK001": (409, "Somebody else has taken this request over.", 1),
    "IK003": (400, "The Idempotency-Key header is malformed."),
    "IK004": (400, "The event is refused."),
    "IK008": (503, "Nothing was done. Please repeat the request.", 1),
    "55P03": (409, "This request is being processed.", 1),
}


class Handler(BaseHTTPRequestHandler):
    timeout = 60  # a client that has left in the middle of its request may not say so

    def do_POST(self):
        try:
            raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, body = handle(self.path, self.headers, raw)
        except Exception as error:
            # the database is away, or has no place for us: what was done until then may be anything
            away = isinstance(error, psycopg.OperationalError)
            refusal = REFUSALS.get(getattr(error, "sqlstate", None))
            status, headers, body = problem(*refusal or (503 if away else 500, "Please repeat the request.", 5))
            if not refusal:
                print(error, file=sys.stderr)

        try:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if body is not None:
                self.wfile.write(json.dumps(body).encode())
        except ConnectionError:
            pass  # the client has left; its retry is told the same

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 100


if __name__ == "__main__":
    server = Server(("127.0.0.1", int(os.environ.get("PORT", "8080"))), Handler)
    print(f"listening on http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
