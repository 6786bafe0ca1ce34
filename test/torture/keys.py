"""Requests received: few keys, fought for in both ways of use.

Two variants of each request, so that some are mismatches.  A response says whose
it is.  Old tokens are kept and tried again, long after somebody else has claimed.
"""

import datetime
import time

from psycopg.types.json import Jsonb

from session import Refused, Session

KEYS = 10
SCOPE = "torture"
LEASES = (0.3, 0.6, 1.5)
# idempotency.abandoned_retention, in seconds
ABANDONED_RETENTION = 5


def seconds(number):
    return datetime.timedelta(seconds=number)


class KeysSession(Session):
    # where a stall has outlasted the lease
    refusals = ("IK001",)

    def __init__(self, *args):
        super().__init__(*args)
        # the others wait as long as the server's setting says
        if int(self.name.rsplit("-", 1)[1]) % 2 == 0:
            self.settings = "SET idempotency.wait_timeout = '2s'"
        self.old = []
        self.abandoned = []
        self.made = 0

    def step(self):
        if self.prepared is not None:
            self.conclude()
            return
        if self.abandoned and self.abandoned[0][0] < time.time():
            self.come_back()
        self.random.choices((self.in_one_transaction, self.in_two_phases, self.with_a_lease, self.with_an_old_token,
                             self.abandon), weights=(10, 2, 10, 4, 1))[0]()
        self.pause(0.02)

    def finish(self):
        while self.prepared is not None and time.time() < self.deadline + self.PATIENCE:
            self.conclude()

    def claim(self, key, lease=None, variant=None):
        variant = variant or ("b" if self.chance(0.15) else "a")
        wait = self.chance(0.7)
        values = {"key": key, "scope": SCOPE, "request": Jsonb({"variant": variant}), "wait": wait}
        if lease is not None:
            values["lease"] = seconds(lease)
        row = self.call("claim", values, key=key, variant=variant, lease=lease, wait=wait)
        if row["verdict"] != "claimed":
            return None
        return {"key": key, "scope": SCOPE, "token": row["token"]}, variant

    def record(self, claimed, variant):
        self.made += 1
        ttl = self.random.choice((0.5, 1, 3))
        response = {"for": variant, "n": f"{self.name} {self.made}"}
        body = self.random.randbytes(self.random.randrange(40))
        self.call("record", {**claimed, "response": Jsonb(response), "response_body": body, "ttl": seconds(ttl)},
                  key=claimed["key"], token=claimed["token"], response=response, body=body.hex())

    def do(self, verb, claimed, **more):
        self.call(verb, {**claimed, **more}, key=claimed["key"], token=claimed["token"], **more)

    def in_one_transaction(self):
        key = f"k{self.random.randrange(KEYS)}"
        self.begin("REPEATABLE READ" if self.chance(0.2) else "READ COMMITTED")
        if self.chance(0.2):
            self.in_savepoint(key)
        got = self.claim(key)
        end = "rollback" if self.chance(0.2) else "commit"
        if got is not None:
            claimed, variant = got
            self.pause(0.1)
            whim = self.random.random()
            if self.chance(0.15):
                self.undone(claimed, variant)
            if whim < 0.65:
                self.record(claimed, variant)
            elif whim < 0.8:
                self.do("release", claimed)
            # otherwise it is forgotten, which a commit must refuse
            self.pause(0.02)
        self.end(end)

    def in_savepoint(self, key):
        """A claim as if it hadn't been."""
        self.savepoint()
        got = self.claim(key)
        if got is not None and self.chance(0.5):
            self.record(*got)
        self.pause(0.05)
        self.undo()

    def undone(self, claimed, variant):
        """An end as if it hadn't been: the claim goes on."""
        self.savepoint()
        if self.chance(0.7):
            self.record(claimed, variant)
        else:
            self.do("release", claimed)
        self.undo()

    def in_two_phases(self):
        """Prepared, and ended later, by another connection if this one breaks: a crash or a fail-over may come
        in between."""
        key = f"k{self.random.randrange(KEYS)}"
        self.begin()
        got = self.claim(key)
        if got is None:
            self.end("rollback")
            return
        whim = self.random.random()
        if whim < 0.6:
            self.record(*got)
        elif whim < 0.8:
            self.do("release", got[0])
        # otherwise it is forgotten, which PREPARE must refuse
        self.prepare("rollback" if self.chance(0.3) else "commit")
        if self.prepared is not None:
            time.sleep(self.random.uniform(0.1, 1.5))

    def with_a_lease(self):
        key = f"k{self.random.randrange(KEYS)}"
        lease = self.random.choice(LEASES)
        got = self.claim(key, lease)
        if got is None:
            return
        claimed, variant = got
        self.old = self.old[-20:] + [got]
        for _ in range(self.random.randrange(4)):
            self.pause(lease / 2)
            if self.chance(0.5):
                self.do("checkpoint", claimed, recovery_point=f"{self.name} {self.random.randrange(1000000)}")
            else:
                self.do("extend", claimed)
        if self.chance(0.15):
            self.begin()
            self.undone(claimed, variant)
            self.end("commit")
        whim = self.random.random()
        if whim < 0.5:
            self.record(claimed, variant)
        elif whim < 0.6:
            self.do("release", claimed)
        # otherwise it dies with its lease

    def abandon(self):
        """Die with a recovery point, with a key that nobody else comes for."""
        key = f"{self.name} {self.transactions} {len(self.old)} {time.time()}"
        got = self.claim(key, LEASES[0], variant="a")
        if got is not None:
            self.do("checkpoint", got[0], recovery_point=f"{self.name} abandoned")
            self.abandoned.append((time.time() + ABANDONED_RETENTION + 3, key))

    def come_back(self):
        got = self.claim(self.abandoned.pop(0)[1], LEASES[0], variant="a")
        if got is not None:
            self.record(*got)

    def with_an_old_token(self):
        if not self.old:
            return
        claimed, variant = self.random.choice(self.old)
        try:
            if self.chance(0.3):
                self.record(claimed, variant)
            elif self.chance(0.5):
                self.do("checkpoint", claimed, recovery_point=f"{self.name} old")
            else:
                self.do(self.random.choice(("extend", "release")), claimed)
        except Refused as refused:
            if refused.sqlstate not in ("IK001", "IK002"):
                raise
