"""Events received: the same ones reach every session of this kind, some twice.

What is done for an event is a row of "handled", written in the transaction that
records it: there must be one, and one only.
"""

import base64
import http.client
import json
import time

from session import Refused, Session


class EventsSession(Session):
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
        for _ in range(100000):
            if not self.later(calm=True):
                break

    def at_once(self, delivery, calm=False):
        self.begin()
        self.handle(self.execute(
            "SELECT r.* FROM idempotency.stripe_webhook_claim(%(payload)s, %(signature)s) r", delivery,
            op="event_claim"), calm)

    def later(self, calm=False):
        self.begin()
        got = self.execute("SELECT r.* FROM idempotency.stripe_webhook_next() r", op="event_next")
        if got is None:
            self.end("rollback")
            return False
        self.handle(got, calm)
        return True

    def handle(self, got, calm):
        end = "rollback" if not calm and self.chance(0.15) else "commit"
        if got["verdict"] == "claimed":
            self.pause(0.01)
            event = got["stripe_event_id"]
            values = {"stripe_event_id": event, "token": got["token"], "account": got["account"]}
            if not calm and self.chance(0.1):
                values["error_message"] = "a whim"
            else:
                self.execute("INSERT INTO handled VALUES (%s, %s)", (event, self.name))
            if calm or not self.chance(0.05):
                self.call("stripe_webhook_record", values, op="event_record", event=event,
                          success="error_message" not in values)
        if not calm and self.chance(0.05):
            self.end_in_two_phases(end, 0.3)
        else:
            self.end(end)
