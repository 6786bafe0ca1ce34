"""Calls sent: by an application that lets the database send (in pairs that click
on the same orders), by one that sends itself, by one that comes too late, by one
that makes many in one transaction, and by one that doesn't wait for the answer to
be recorded.  And one that asks Stripe about them, and a person who settles them."""

import http.client
import json
import os
import time
import urllib.parse

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
        if self.prepared is not None:
            self.conclude()
            return
        if self.answered:
            self.number += 1
            self.answered = False
        self.click()
        # the fake remembers a bounded number of requests
        self.pause(0.2)

    def finish(self):
        # one that isn't answered in the end is found by the checker
        while self.prepared is not None and time.time() < self.deadline + self.PATIENCE:
            self.conclude()
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
        if 0.25 < whim < 0.32:
            ended = self.end_in_two_phases("rollback" if whim < 0.27 else "commit", 0.7)
        else:
            ended = self.end(end)
        self.answered = ended and got["answer"][:3] in ("201", "402")
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
        if self.prepared is not None:
            self.conclude()
            return
        if self.settled:
            self.number += 1
            self.settled = False
            self.tokens = []
        self.attempt()

    def finish(self):
        while self.prepared is not None and time.time() < self.deadline + self.PATIENCE:
            self.conclude()
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
        # as a library for Stripe tells it: the status, and the body where it is JSON
        status, body = answer
        values["http_status"] = status
        if body is not None:
            values["response"] = body
        whim = 1 if calm else self.random.random()
        if whim >= 0.3:
            self.record(values, operation)
            return
        self.begin()
        self.record(values, operation, undone=whim < 0.2)
        if self.tx is None:
            return
        if whim < 0.2:
            self.end("rollback")
        else:
            self.end_in_two_phases("commit", 0.5)

    def record(self, values, operation, undone=False):
        try:
            self.call("stripe_record", values, operation=operation, token=values["token"],
                      status=values.get("http_status"), undone=undone)
        except Refused as refused:
            if refused.sqlstate not in ("IK001", "IK002"):
                raise
            self.end("rollback")

    def send(self, key, operation):
        """Status, and the body where it is a JSON object; None where there is no answer."""
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
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        try:
            return response.status, body if isinstance(json.loads(body), dict) else None
        except ValueError:
            return response.status, None


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
        try:
            while time.time() < start + self.WINDOW + 1.5:
                self.execute("SELECT r.* FROM idempotency.stripe_call('late', %s, 'POST', '/v1/payment_intents',"
                             " pg_catalog.jsonb_build_object('amount', 400, 'currency', 'usd', 'confirm', true,"
                             " 'payment_method', 'pm_card_visa', 'metadata', pg_catalog.jsonb_build_object('late', %s::text))) r",
                             (operation, operation), op="late", operation=operation)
                self.pause(1.2)
                if self.chance(0.3):
                    self.reconcile("late", operation)
        finally:
            self.ask(self.control, "DELETE", f"faults/{fault}")

    def fault(self, operation, times):
        what = self.random.choice(({"what": "close_after"}, {"what": "reset_after"}, {"what": "close_before"},
                                   {"what": "504"}, {"what": "gateway", "effect": True, "status": 404},
                                   {"what": "gateway", "effect": True, "status": 429}))
        return self.ask(self.control, "POST", "faults", json.dumps(
            {**what, "times": times, "match": {"body": f"={operation}&"}}))["fault"]


class ReconcilingSession(Session):
    """Asks Stripe about whatever nobody knows, and about what others are at.  But not about what only the
    recorder shall learn."""

    KINDS = ("payment", "transfer", "late", "bulk")

    def step(self):
        whim = self.random.random()
        if whim < 0.4:
            self.reconcile(self.random.choice(self.KINDS), requests=self.random.choice((1, 5, 20)))
        else:
            # one of those that were begun last: known, unknown, or under way
            row = self.execute("SELECT operation_type, operation_id FROM idempotency.stripe_idempotency_keys"
                               " WHERE operation_type <> 'detached' ORDER BY claimed_at DESC OFFSET %s LIMIT 1", (self.random.randrange(4),))
            if row is not None:
                self.in_transaction(row) if whim < 0.55 else self.reconcile(*row.values())
        self.pause(0.6)

    def in_transaction(self, row):
        self.begin()
        self.reconcile(*row.values())
        self.pause(0.1)
        self.end("rollback" if self.chance(0.5) else "commit")


class PersonSession(Session):
    """A person who looks at Stripe, and says what is there."""

    # somebody else was faster
    refusals = ("IK002",)

    def __init__(self, *args, control):
        super().__init__(*args)
        self.control = control
        self.brings_object = None

    def step(self):
        self.pause(1)
        whim = self.random.random()
        if whim < 0.3:
            row = self.execute("SELECT operation_type, operation_id FROM idempotency.stripe_orphans"
                               " WHERE operation_type <> 'detached' LIMIT 1 OFFSET %s", (self.random.randrange(3),))
            if row is not None:
                self.call("stripe_acknowledge", {**row, "note": "seen"}, op="acknowledge", **row)
            return
        row = self.execute("SELECT operation_type, operation_id, idempotency_key AS key FROM idempotency.stripe_unknown"
                           " WHERE operation_type IN ('payment', 'transfer', 'late') LIMIT 1 OFFSET %s",
                           (self.random.randrange(3),))
        if row is not None:
            self.settle(row["operation_type"], row["operation_id"], row["key"])

    def settle(self, operation_type, operation_id, key):
        """What has been charged stays so.  What hasn't may come yet."""
        made = self.ask(self.control, "GET", "effects?" + urllib.parse.urlencode(
            {"type": "charge", "action": "create", "status": "succeeded", "key": key}))["effects"]
        if not made:
            return
        resource = made[0].get("payment_intent") or made[0]["id"]
        values = {"operation_type": operation_type, "operation_id": operation_id, "outcome": "completed",
                  "resource_id": resource, "note": "seen at Stripe"}
        if self.brings_object is None:
            self.brings_object = self.execute(
                "SELECT 'response' = ANY (proargnames) AS b FROM pg_catalog.pg_proc WHERE proname = 'stripe_settle'")["b"]
        if self.brings_object and self.chance(0.5):
            values["response"] = Jsonb(self.ask(self.control, "GET", f"objects/{resource}"))
        names = ", ".join(f"{name} => %({name})s" + ("::idempotency.outcome" if name == "outcome" else "") for name in values)
        if self.chance(0.15):
            self.begin()
        self.execute(f"SELECT r.* FROM idempotency.stripe_settle({names}) r", values, op="settle",
                     operation=[operation_type, operation_id], resource=resource)
        if self.tx is not None:
            self.end_in_two_phases("commit", 0.5)

    def finish(self):
        while self.prepared is not None and time.time() < self.deadline + self.PATIENCE:
            self.conclude()


class BulkSession(Session):
    """Many calls in one transaction, which stays open for a while; after a rollback the same again."""

    def __init__(self, *args):
        super().__init__(*args)
        self.number = 0
        self.todo = None

    def step(self):
        if self.prepared is not None:
            self.conclude()
            return
        if self.todo is None:
            time.sleep(self.random.uniform(3, 15))
            self.number += 1
            self.todo = {"batch": f"{self.name}-{self.number}", "n": self.random.randrange(110, 220), "left": 4}
        self.attempt()

    def finish(self):
        while self.prepared is not None and time.time() < self.deadline + self.PATIENCE:
            self.conclude()
        if self.todo is not None:
            self.todo["left"] = 20
        while self.todo is not None and time.time() < self.deadline + self.PATIENCE:
            self.attempt()

    def attempt(self):
        todo = self.todo
        todo["left"] -= 1
        if todo["left"] < 0:
            self.todo = None
            return
        self.begin()
        self.execute("SELECT count(*) AS calls, count(*) FILTER (WHERE r.outcome = 'completed') AS completed"
                     " FROM pg_catalog.generate_series(1, %s) AS i,"
                     " LATERAL idempotency.stripe_call('bulk', %s || '-' || i, 'POST', '/v1/customers',"
                     " pg_catalog.jsonb_build_object('name', 'bulk ' || i)) AS r",
                     (todo["n"], todo["batch"]), op="bulk", batch=todo["batch"], n=todo["n"])
        whim = 1 if self.is_over() else self.random.random()
        if whim < 0.9:
            self.pause(4)
        if whim < 0.5:
            self.end("rollback")
        elif self.end_in_two_phases("commit", 2) if whim < 0.7 else self.end("commit"):
            self.todo = None


class DetachedSession(Session):
    """Is told what Stripe has answered, and doesn't wait until that is recorded: but it has to be.  Each call once."""

    settings = "SET synchronous_commit = off; SET idempotency.stripe_record_timeout = '1s';" \
        " SET idempotency.stripe_max_retries = 0; SET idempotency.stripe_timeout = '5s'"
    WATCH = 20

    def __init__(self, *args):
        super().__init__(*args)
        self.number = 0

    def step(self):
        if os.path.exists(f"{self.directory}/hold"):
            self.pause(0.2)
            return
        self.number += 1
        operation = f"{self.name}-{self.number}"
        life = self.server_life()
        got = self.execute(
            "SELECT r.* FROM idempotency.stripe_call('detached', %s, 'POST', '/v1/customers',"
            " pg_catalog.jsonb_build_object('name', 'detached ' || %s::text)) r", (operation, operation),
            op="detached", operation=operation, life=life)
        if got["outcome"] == "completed":
            self.watch(operation, life)
        self.pause(0.3)

    def watch(self, operation, life):
        until = time.time() + self.WATCH
        while time.time() < until:
            row = self.execute("SELECT outcome FROM idempotency.stripe_lookup('detached', %s)", (operation,))
            now = self.server_life()
            self.note("watched", args={"operation": operation, "life": life, "now": now, "outcome": row["outcome"]})
            if row["outcome"] == "completed" or now != life:
                return
            self.pause(0.6)

    def finish(self):
        pass
