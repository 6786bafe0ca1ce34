"""Calls sent: by an application that lets the database send (in pairs that click
on the same orders), by one that sends itself, and by one that comes too late.
And one that asks Stripe about them."""

import http.client
import json
import time

from psycopg.types.json import Jsonb

from session import Refused, Session


def is_declined(number):
    return number % 7 == 0


class PayingSession(Session):
    """One order after the other, each until it has an answer."""

    def __init__(self, *args):
        super().__init__(*args)
        self.pair = int(self.name.rsplit("-", 1)[1]) // 2
        if self.pair == 1:
            self.settings = "SET idempotency.stripe_key_in_metadata = on"
        self.number = 0
        self.answered = True

    def step(self):
        if self.answered:
            self.number += 1
            self.answered = False
        self.click()
        # the fake remembers a bounded number of requests
        self.pause(0.2)

    def finish(self):
        # one that isn't answered in the end is found by the checker
        while not self.answered and time.time() < self.deadline + self.PATIENCE:
            self.click()
            self.pause(0.05)

    def click(self):
        key = f"{self.pair} {self.number}"
        card = "pm_card_chargeDeclined" if is_declined(self.number) else "pm_card_visa"
        whim = 1 if self.is_over() else self.random.random()
        if whim < 0.1 and not is_declined(self.number):
            pay, values = "pay_in_savepoint(%s)", (key,)
        else:
            pay, values = "pay(%s, %s)", (key, card)
        end = "rollback" if 0.1 < whim < 0.25 else "commit"
        self.begin()
        got = self.execute(f"SELECT {pay} AS answer, idempotency.operation_uuid(%s, 'user 1') AS operation",
                           values + (key,), op="pay", key=key, declined=is_declined(self.number))
        self.answered = self.end(end) and got["answer"][:3] in ("201", "402")
        if not self.answered:
            self.pause(0.05)
            # the other one of the pair may be at it
            if self.chance(0.5):
                self.reconcile("payment", str(got["operation"]))


class SendingSession(Session):
    """Sends by itself what it has claimed: dies, comes back late, records twice."""

    LEASE = 0.3

    def __init__(self, *args, port):
        super().__init__(*args)
        self.port = port
        self.number = 0
        self.settled = True
        self.tokens = []

    def step(self):
        if self.settled:
            self.number += 1
            self.settled = False
            self.tokens = []
        self.attempt()

    def finish(self):
        while not self.settled and time.time() < self.deadline + self.PATIENCE:
            self.attempt()
            self.pause(0.1)

    def attempt(self):
        operation = f"{self.name} {self.number}"
        got = self.call("stripe_claim", {"operation_type": "transfer", "operation_id": operation,
                                         "request": Jsonb({"method": "POST", "path": "/v1/charges", "body": {
                                             "amount": 300, "currency": "usd", "source": "tok_visa"}}),
                                         "lease": f"{self.LEASE} s"}, operation=operation)
        if got["verdict"] == "replay":
            self.settled = True
        if got["verdict"] != "claimed":
            self.pause(0.2)
            if self.chance(0.5):
                self.reconcile("transfer", operation)
            return
        self.tokens.append(got["token"])
        calm = self.is_over()
        if not calm and self.chance(0.15):
            return  # dead before it has sent
        answer = self.send(got["idempotency_key"], operation)
        if not calm and self.chance(0.15):
            return  # dead after it has sent
        self.pause(0.4)
        # an old token of this generation knows the same answer
        token = self.random.choice(self.tokens)
        values = {"operation_type": "transfer", "operation_id": operation, "token": token}
        if answer is None:
            self.record(values, operation)
            return
        status, body = answer
        rollback = not calm and self.chance(0.2)
        if rollback:
            self.begin()
        self.record({**values, "response": body, "http_status": status}, operation, undone=rollback)
        if rollback:
            self.end("rollback")

    def record(self, values, operation, undone=False):
        try:
            self.call("stripe_record", values, operation=operation, token=values["token"],
                      status=values.get("http_status"), undone=undone)
        except Refused as refused:
            if refused.sqlstate not in ("IK001", "IK002"):
                raise
            self.end("rollback")

    def send(self, key, operation):
        """Status and body; None where there is no answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=3)
        body = f"amount=300&currency=usd&source=tok_visa&metadata[operation]={operation.replace(' ', '+')}"
        if self.number % 2 == 0:
            body += f"&metadata[idempotency_key]={key.replace(' ', '+')}"
        try:
            connection.request("POST", "/v1/charges", body,
                               {"Idempotency-Key": key, "Authorization": "Bearer sk_test_application",
                                "Content-Type": "application/x-www-form-urlencoded"})
            response = connection.getresponse()
            body = response.read().decode("utf-8", "replace")
            # what isn't JSON is no answer
            json.loads(body)
            return response.status, body
        except (OSError, http.client.HTTPException, ValueError):
            return None
        finally:
            connection.close()


class LateSession(Session):
    """Stripe's window is two seconds here: answers are lost, and retries come
    before and after its end."""

    WINDOW = 2
    settings = f"SET idempotency.stripe_resend_margin = '{24 * 3600 - WINDOW}s'; SET idempotency.stripe_max_retries = 0"

    def __init__(self, *args, control):
        super().__init__(*args)
        self.control = control
        self.number = 0

    def step(self):
        self.number += 1
        operation = f"{self.name}-{self.number}"
        fault = self.fault(operation, times=self.random.choice((1, 3, 20)))
        start = time.time()
        while time.time() < start + self.WINDOW + 1.5:
            self.execute("SELECT r.* FROM idempotency.stripe_call('late', %s, 'POST', '/v1/payment_intents',"
                         " pg_catalog.jsonb_build_object('amount', 400, 'currency', 'usd', 'confirm', true,"
                         " 'payment_method', 'pm_card_visa', 'metadata', pg_catalog.jsonb_build_object('late', %s::text))) r",
                         (operation, operation), op="late", operation=operation)
            self.pause(1.2)
            if self.chance(0.3):
                self.reconcile("late", operation)
        self.ask("DELETE", f"faults/{fault}", "")

    def fault(self, operation, times):
        what = self.random.choice(("close_after", "reset_after", "close_before", "504"))
        return self.ask("POST", "faults", json.dumps(
            {"what": what, "times": times, "match": {"body": f"={operation}&"}}))["fault"]

    def ask(self, method, what, body):
        connection = http.client.HTTPConnection(self.control, timeout=60)
        try:
            connection.request(method, f"/_control/{what}", body)
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()


class ReconcilingSession(Session):
    """Asks Stripe about whatever nobody knows, and about what others are at."""

    def step(self):
        whim = self.random.random()
        if whim < 0.4:
            self.reconcile(requests=self.random.choice((1, 5, 20)))
        else:
            # one of those that were begun last: known, unknown, or under way
            row = self.execute("SELECT operation_type, operation_id FROM idempotency.stripe_idempotency_keys"
                               " ORDER BY claimed_at DESC OFFSET %s LIMIT 1", (self.random.randrange(4),))
            if row is not None:
                self.in_transaction(row) if whim < 0.55 else self.reconcile(*row.values())
        self.pause(0.6)

    def in_transaction(self, row):
        self.begin()
        self.reconcile(*row.values())
        self.pause(0.1)
        self.end("rollback" if self.chance(0.5) else "commit")
