"""A session: a connection that may break at any moment, and its history.

Each call of the database is one line of JSON in the session's own file, written
once its end is known:

    op, args    what was called, and with what
    server      whom it was sent to, by port
    tx          number of the transaction, where there is one around it
    t0, t1      when it was sent, and when its end was known, in seconds
    res         the answer's columns (all rows of them where there may be many), times as seconds; or
    error       an SQLSTATE; or
    lost        the connection broke: it may have been done or not

The clock is the machine's, which is the database's as well.
"""

import datetime
import http.client
import json
import os
import random
import time

import psycopg
from psycopg.rows import dict_row


class Lost(Exception):
    """The connection has broken."""


class Refused(Exception):
    """The database has answered with an error."""

    def __init__(self, sqlstate):
        super().__init__(sqlstate)
        self.sqlstate = sqlstate


def plain(value):
    if isinstance(value, datetime.datetime):
        return value.timestamp()
    if isinstance(value, (bytes, memoryview)):
        return bytes(value).hex()
    return str(value)


class Session:
    # until its end everybody has that long for what is under way
    PATIENCE = 120

    def __init__(self, name, directory, seed, deadline):
        self.name = name
        self.directory = directory
        self.deadline = deadline
        self.random = random.Random(f"{seed} {name}")
        self.log = open(f"{directory}/{name}.jsonl", "a", encoding="utf-8", buffering=1)
        self.connection = None
        self.server = None
        self.transactions = 0
        self.tx = None
        # a transaction of which PREPARE was sent, and whose end isn't known
        self.prepared = None
        # how the last one has ended
        self.concluded = None

    # ---- what a kind of session says

    def step(self):
        raise NotImplementedError

    def finish(self):
        """After the deadline, undisturbed."""

    settings = ""
    # what may be refused besides what may happen to anybody
    refusals = ()

    # whatever the server's settings become: answers are durable, and psycopg can read them
    OWN = "SET synchronous_commit = on; SET default_transaction_read_only = off; SET DateStyle = ISO; SET IntervalStyle = postgres"

    # ---- life

    def run(self):
        parent = os.getppid()
        for work, end in ((self.step, self.deadline), (self.finish, None)):
            if end is None:
                self.disconnect()
            while (end is None or time.time() < end) and os.getppid() == parent:
                try:
                    work()
                    if end is None:
                        break
                except Lost:
                    self.connection = None
                except Refused as refused:
                    # serialization, deadlock, lock timeout, cancel: as announced
                    if refused.sqlstate not in ("40001", "40P01", "55P03", "57014", "IK008", "XX000") + self.refusals:
                        self.note("surprise", error=refused.sqlstate)
                    try:
                        self.end("rollback")
                    except Lost:
                        self.connection = None
                if time.time() > self.deadline + self.PATIENCE:
                    self.note("gave up")
                    return
        self.note("done")

    def is_over(self):
        return time.time() > self.deadline

    def pause(self, seconds):
        time.sleep(self.random.uniform(0, seconds))

    def chance(self, probability):
        return self.random.random() < probability

    def note(self, op, **members):
        self.log.write(json.dumps({"s": self.name, "op": op, "args": {}, "t0": time.time(), "t1": time.time(),
                                   **members}, default=plain) + "\n")

    # ---- statements

    def where(self):
        """The database, as it is now."""
        with open(f"{self.directory}/server", encoding="utf-8") as where:
            return where.read()

    def connect(self):
        while self.connection is None:
            try:
                self.connection = psycopg.connect(self.where(), autocommit=True, row_factory=dict_row,
                                                  connect_timeout=10)
                self.server = self.connection.info.port
                self.connection.execute(f"{self.OWN}; {self.settings}")
            except (psycopg.Error, OSError):
                self.connection = None
                if time.time() > self.deadline + self.PATIENCE:
                    raise Lost from None
                time.sleep(0.05)
        self.tx = None

    def disconnect(self):
        """The next connection begins with the settings that there are then."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def execute(self, statement, values=(), op=None, rows=False, **args):
        """The row, or all of them; raises Lost or Refused.  Written down where op is given."""
        if self.connection is None:
            self.connect()
        entry = {"s": self.name, "op": op, "args": args, "server": self.server, "tx": self.tx, "t0": time.time()}
        try:
            cursor = self.connection.execute(statement, values)
            row = {"status": cursor.statusmessage} if cursor.description is None else \
                cursor.fetchall() if rows else cursor.fetchone()
            entry["res"] = row
            return row
        except psycopg.Error as error:
            # XX000 is what a debug point raises
            if self.connection.broken or self.connection.closed or error.sqlstate is None:
                self.connection.close()
                self.connection = None
                entry["lost"] = True
                self.tx = None
                raise Lost from None
            entry["error"] = error.sqlstate
            raise Refused(error.sqlstate) from None
        finally:
            entry["t1"] = time.time()
            if op is not None:
                self.log.write(json.dumps(entry, default=plain) + "\n")

    def call(self, function, values, op=None, **args):
        """One row of a function of ours, its arguments by name."""
        names = ", ".join(f"{name} => %({name})s" for name in values)
        return self.execute(f"SELECT r.* FROM idempotency.{function}({names}) r", values,
                            op=op or function, **args)

    def begin(self, isolation="READ COMMITTED"):
        self.execute(f"BEGIN ISOLATION LEVEL {isolation}")
        self.transactions += 1
        self.tx = f"{self.name}-{self.transactions}"

    def savepoint(self):
        self.execute("SAVEPOINT s", op="savepoint")

    def undo(self):
        self.execute("ROLLBACK TO s", op="undo")

    def end(self, how):
        """COMMIT or ROLLBACK; whether it has committed."""
        if self.connection is None or self.tx is None:
            return False
        try:
            return self.execute(how, op=how)["status"] == "COMMIT"
        except Refused as refused:
            self.roll_back()
            if how == "commit" and refused.sqlstate != "IK005":
                raise
            return False
        finally:
            self.tx = None

    def roll_back(self):
        """However often it is cancelled."""
        while True:
            try:
                self.execute("ROLLBACK")
                return
            except Refused:
                time.sleep(0.01)

    def prepare(self, how):
        """PREPARE TRANSACTION; conclude() will COMMIT or ROLLBACK it."""
        life = self.server_life()
        self.concluded = None
        self.prepared = {"tx": self.tx, "how": how, "life": life, "seen": False, "tried": False, "since": None}
        try:
            self.execute(f"PREPARE TRANSACTION '{self.tx}'", op="prepare")
            self.prepared["seen"] = True
        except Refused as refused:
            self.prepared = None
            self.roll_back()
            if refused.sqlstate != "IK005":
                raise
        finally:
            self.tx = None

    def conclude(self):
        """The second phase, on whatever server there is, until it is known to be through."""
        what = self.prepared
        if not what["seen"]:
            if self.execute("SELECT gid FROM pg_prepared_xacts WHERE gid = %s", (what["tx"],)) is None:
                self.prepared = None
                return
            what["seen"] = True
        what["since"] = what["since"] or time.time()
        tried, what["tried"] = what["tried"], True
        try:
            self.execute(f"{what['how']} PREPARED '{what['tx']}'")
        except Refused as refused:
            # 55000: whose connection broke is still at it
            if refused.sqlstate == "55000":
                self.pause(0.1)
                return
            if refused.sqlstate != "42704":
                raise
            if not tried:
                self.note("vanished", tx=what["tx"])
                self.prepared = None
                return
        self.note(what["how"], tx=what["tx"], t0=what["since"], res={"status": what["how"].upper()})
        self.prepared = None
        self.concluded = what["how"]
        self.note("concluded", how=what["how"], crossed=self.server_life() != what["life"])

    def end_in_two_phases(self, how, seconds):
        """PREPARE, and the end by whatever connection there is a while later."""
        self.prepare(how)
        if self.prepared is None:
            return False
        time.sleep(self.random.uniform(0, seconds))
        while self.prepared is not None and time.time() < self.deadline + self.PATIENCE:
            try:
                self.conclude()
            except Lost:
                pass
            except Refused:
                self.pause(0.05)
        return self.concluded == "commit"

    def ask(self, control, method, what, body=""):
        """The fake Stripe's control API."""
        connection = http.client.HTTPConnection(control, timeout=60)
        try:
            connection.request(method, f"/_control/{what}", body)
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def server_life(self):
        """Something else after each start, promotion and recovery."""
        row = self.execute("SELECT extract(epoch FROM backend_start)::text AS start FROM pg_catalog.pg_stat_activity"
                           " WHERE backend_type = 'checkpointer'")
        return row and (self.server, row["start"])

    def reconcile(self, operation_type=None, operation_id=None, requests=20):
        """Ask Stripe about one operation, or all.  One that was never claimed is none."""
        try:
            self.execute("SELECT r.* FROM idempotency.stripe_reconcile(%s, %s, max_requests => %s) r",
                         (operation_type, operation_id, requests), op="reconcile", rows=True)
        except Refused as refused:
            if refused.sqlstate != "IK003" or operation_id is None:
                raise
            self.end("rollback")
