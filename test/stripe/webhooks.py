"""Signed events out: to a URL on loopback, or into a test's hands.

An endpoint has one or several secrets (as after a rotation: one v1 each) and
perhaps a URL.  Every delivery also waits, unsigned, in a queue of its endpoint,
from which a test fetches the next one without a network; it is signed when it
is fetched or sent, by the fake's clock.  What isn't answered by 2xx is sent
again after a while, with a new timestamp and signature, for three days of that
clock.
"""

import base64
import hashlib
import hmac
import ipaddress
import itertools
import json
import secrets
import socket
import threading
import time
from collections import deque
from urllib.parse import urlsplit

MAX_QUEUE = 20000
MAX_ATTEMPTS_KEPT = 10000
TIMEOUT = 10
RETRY_AFTER = [300, 1800, 7200, 18000, 36000, 36000, 43200, 43200, 43200, 43200]
GIVE_UP = 3 * 24 * 3600


def check_url(url):
    """Only http to loopback: ValueError says why not."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError("only http:// works here")
    if parts.hostname != "localhost" and not ipaddress.ip_address(parts.hostname).is_loopback:
        raise ValueError(f"{parts.hostname} is not loopback")
    query = "?" + parts.query if parts.query else ""
    return parts.hostname, parts.port or 80, (parts.path or "/") + query


def sign(body, signing_secrets, moment, fake_v0=False):
    """The Stripe-Signature header of a body: one v1 per secret."""
    def mac(secret):
        return hmac.new(secret.encode("utf-8"), str(moment).encode("ascii") + b"." + body,
                        hashlib.sha256).hexdigest()

    parts = [f"t={moment}"] + [f"v1={mac(secret)}" for secret in signing_secrets]
    if fake_v0:
        parts.append(f"v0={mac('v0')}")  # an extra on test events that nobody should believe
    return ",".join(parts)


class Webhooks:
    """Endpoints and deliveries.  Methods are called under the lock of the world."""

    def __init__(self, world):
        self.world = world
        self.endpoints = {}
        self.reset()

    def reset(self):
        self.numbers = itertools.count(1)
        self.endpoints = {}
        self.queue = deque(maxlen=MAX_QUEUE)        # to be fetched
        self.pending = []                           # to be sent: {"due", "delivery", "attempt"}
        self.attempts = deque(maxlen=MAX_ATTEMPTS_KEPT)
        self.sent_ok = set()                        # (endpoint, event id) answered by 2xx
        self.failed = set()

    # endpoints

    def add(self, world, given):
        number = next(self.numbers)
        if given.get("url"):
            check_url(given["url"])
        endpoint = {"endpoint": number, "url": given.get("url"),
                    "secrets": given.get("secrets") or ["whsec_test" + secrets.token_hex(16)],
                    "enabled_events": given.get("enabled_events") or ["*"],
                    "livemode": given.get("livemode", False),
                    "account": given.get("account", world.platform),
                    "connect": given.get("connect", False)}
        self.endpoints[number] = endpoint
        return endpoint

    def remove(self, number):
        self.pending = [p for p in self.pending if p["delivery"]["endpoint"] != number]
        self.queue = deque((d for d in self.queue if d["endpoint"] != number), maxlen=MAX_QUEUE)
        return self.endpoints.pop(number, None)

    def wants(self, endpoint, account, event):
        """Connect endpoints of the platform get the events of the connected accounts."""
        if endpoint["livemode"] != event["livemode"]:
            return False
        if endpoint["connect"] != (account != endpoint["account"]):
            return False
        return any(kind == "*" or kind == event["type"]
                   or kind.endswith(".*") and event["type"].startswith(kind[:-1])
                   for kind in endpoint["enabled_events"])

    # deliveries

    def enqueue(self, account, event):
        """Deliver an event to those who want it; how many are they?"""
        wanting = [e for e in self.endpoints.values() if self.wants(e, account, event)]
        if not wanting:
            return 0
        event["pending_webhooks"] = len(wanting)
        body = json.dumps(event, indent=2, ensure_ascii=False).encode("utf-8")
        for endpoint in wanting:
            self.deliver(endpoint, event, body)
        return len(wanting)

    def deliver(self, endpoint, event, body):
        delivery = {"endpoint": endpoint["endpoint"], "event": event["id"], "type": event["type"],
                    "body": body, "livemode": event["livemode"]}
        self.queue.append(delivery)
        if endpoint["url"]:
            self.failed.add((delivery["endpoint"], delivery["event"]))
            if len(self.pending) < MAX_QUEUE:
                now = self.world.clock.now()
                self.pending.append({"due": now, "first": now, "delivery": delivery, "attempt": 1})
        self.world.notify()

    def delivered(self, event_id):
        """Was it answered by 2xx everywhere?"""
        return not any(event == event_id for _, event in self.failed)

    def signed(self, delivery):
        """A delivery as its request: headers and body."""
        endpoint = self.endpoints[delivery["endpoint"]]
        moment = self.world.clock.seconds()
        signature = sign(delivery["body"], endpoint["secrets"], moment, not delivery["livemode"])
        return {"Content-Type": "application/json; charset=utf-8", "Stripe-Signature": signature,
                "User-Agent": "Stripe/1.0 (+https://stripe.com/docs/webhooks)"}

    def shown(self, delivery):
        return {"endpoint": delivery["endpoint"], "event": delivery["event"],
                "type": delivery["type"], "headers": self.signed(delivery),
                "body": delivery["body"].decode("utf-8"),
                "body_base64": base64.b64encode(delivery["body"]).decode("ascii")}

    def take(self, matches):
        """Fetch the oldest delivery in the queue that matches."""
        for delivery in self.queue:
            if delivery["endpoint"] in self.endpoints and matches(delivery):
                self.queue.remove(delivery)
                return self.shown(delivery)
        return None

    # sending, in a thread of its own

    def start(self):
        threading.Thread(target=self.run, daemon=True, name="webhooks").start()

    def run(self):
        world = self.world
        while True:
            with world.lock:
                now = world.clock.now()
                due = [p for p in self.pending if p["due"] <= now]
                if not due:
                    world.changed.wait(1.0)
                    continue
                sending = min(due, key=lambda p: p["due"])
                self.pending.remove(sending)
                delivery = sending["delivery"]
                endpoint = self.endpoints.get(delivery["endpoint"])
                if endpoint is None:
                    continue
                headers, url = self.signed(delivery), endpoint["url"]
            started = time.monotonic()
            status, problem = post(url, headers, delivery["body"])
            with world.lock:
                if self.endpoints.get(delivery["endpoint"]) is not endpoint:
                    continue
                self.attempts.append({
                    "endpoint": delivery["endpoint"], "event": delivery["event"],
                    "type": delivery["type"], "attempt": sending["attempt"], "status": status,
                    "error": problem, "at": int(now),
                    "ms": int((time.monotonic() - started) * 1000)})
                if status is not None and 200 <= status < 300:
                    self.failed.discard((delivery["endpoint"], delivery["event"]))
                elif world.settings["retry_webhooks"]:
                    wait = RETRY_AFTER[min(sending["attempt"], len(RETRY_AFTER)) - 1]
                    due = world.clock.now() + wait
                    if due - sending["first"] <= GIVE_UP:
                        self.pending.append({**sending, "due": due, "attempt": sending["attempt"] + 1})
                world.notify()


def post(url, headers, body):
    """POST to loopback: (status, None) or (None, what went wrong).  Redirects aren't followed."""
    host, port, path = check_url(url)
    try:
        with socket.create_connection((host, port), timeout=TIMEOUT) as sock:
            lines = [f"POST {path} HTTP/1.1", f"Host: {host}:{port}", "Connection: close",
                     f"Content-Length: {len(body)}"] + [f"{k}: {v}" for k, v in headers.items()]
            sock.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("utf-8") + body)
            answer = b""
            while b"\r\n" not in answer and len(answer) < 4096:
                data = sock.recv(4096)
                if not data:
                    break
                answer += data
            words = answer.split(b"\r\n")[0].split(b" ")
            return int(words[1]), None
    except (OSError, ValueError, IndexError) as error:
        return None, str(error) or type(error).__name__
