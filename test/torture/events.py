"""Events received: the same ones reach every session of this kind, some twice.

What is done for an event is a row of "handled", written in the transaction that
records it: there must be one, and one only.

Some events are poison: whoever handles them fails, until the end, when the
handler is mended.  Now and then a worker dies with its claim, lease or not.
"""

import base64
import http.client
import json
import time
import zlib

from session import Refused, Session


def is_poison(event):
    return zlib.crc32(event.encode()) % 8 == 0


class EventsSession(Session):
    LEASE = 2  # seconds

    def __init__(self, *args, control, endpoint):
        super().__init__(*args)
        self.control = control
        self.endpoint = endpoint
        self.again = []

    def next_delivery(self):
        connection = http.client.HTTPConnection(self.control, timeout=60)
        try:
            connection.request("GET", f"/_control/webhooks/next?endpoint={self.endpoint}&timeout_ms=200")
            delivery = json.loads(connection.getresponse().read())["delivery"]
        finally:
            connection.close()
        if delivery is None:
            return None
        return {"payload": base64.b64decode(delivery["body_base64"]), "signature": delivery["headers"]["Stripe-Signature"]}

    def step(self):
        if self.prepared is not None:
            self.conclude()
            return
        if self.again and self.chance(0.3):
            delivery = self.random.choice(self.again)
        else:
            delivery = self.next_delivery()
            if delivery is None:
                return
            self.again = self.again[-5:] + [delivery]
        if self.chance(0.5):
            self.at_once(delivery)
        else:
            two_phases = self.chance(0.1)
            if two_phases:
                self.begin()
            self.execute("SELECT r.* FROM idempotency.stripe_webhook_receive(%(payload)s, %(signature)s) r", delivery,
                         op="receive")
            if two_phases:
                self.end_in_two_phases("commit", 0.2)
            self.later()

    def finish(self):
        while self.prepared is not None and time.time() < self.deadline + self.PATIENCE:
            self.conclude()
        while True:
            delivery = self.next_delivery()
            if delivery is None:
                break
            self.at_once(delivery, calm=True)
        while time.time() < self.deadline + self.PATIENCE:
            while self.later(calm=True):
                pass
            pending = self.execute("SELECT stripe_event_id, account, state, attempts"
                                   " FROM idempotency.stripe_webhook_pending", rows=True)
            if not pending:
                break
            for event in pending:
                self.by_hand(event)
            time.sleep(0.3)

    def by_hand(self, event):
        """What is dead is revived, and then comes by itself; for what has failed nobody waits an hour."""
        values = {"stripe_event_id": event["stripe_event_id"], "account": event["account"]}
        if event["state"] == "dead":
            self.note("dead", args=event)
            self.call("stripe_webhook_reclaim", values | {"again": True, "lease": "1 microsecond"}, op="event_again")
        elif event["state"] in ("failed", "lapsed"):
            self.begin()
            self.handle(self.call("stripe_webhook_reclaim", values, op="event_claim"), True)

    def at_once(self, delivery, calm=False):
        self.begin()
        self.handle(self.execute(
            "SELECT r.* FROM idempotency.stripe_webhook_claim(%(payload)s, %(signature)s) r", delivery,
            op="event_claim"), calm)

    def later(self, calm=False):
        leased = not calm and self.chance(0.4)
        if not leased:
            self.begin()
        got = self.execute("SELECT r.* FROM idempotency.stripe_webhook_next(%(lease)s) r",
                           {"lease": f"{self.LEASE} s" if leased else None}, op="event_next", lease=leased)
        if got is None:
            self.end("rollback")
            return False
        if not calm and self.chance(0.07):
            self.disconnect()
            return True
        if leased:
            self.begin()
        try:
            self.handle(got, calm, leased)
        except Refused as refused:
            # the lease has lapsed, and somebody else has the event
            if not leased or refused.sqlstate != "IK001":
                raise
            self.end("rollback")
        return True

    def handle(self, got, calm, leased=False):
        end = "rollback" if not calm and self.chance(0.15) else "commit"
        if got["verdict"] == "claimed":
            self.pause(0.01)
            event = got["stripe_event_id"]
            values = {"stripe_event_id": event, "token": got["token"], "account": got["account"]}
            if not calm and (is_poison(event) or self.chance(0.1)):
                values["error_message"] = "poison" if is_poison(event) else "a whim"
            else:
                self.execute("INSERT INTO handled VALUES (%s, %s)", (event, self.name))
            # without a lease what isn't recorded can't be committed
            if calm or leased or not self.chance(0.05):
                self.call("stripe_webhook_record", values, op="event_record", event=event,
                          token=got["token"], success="error_message" not in values)
        if not calm and self.chance(0.05):
            self.end_in_two_phases(end, 0.3)
        else:
            self.end(end)
