"""A session: a connection that may break at any moment, and its history.

Each call of the database is one line of JSON in the session's own file, written
once its end is known:

    op, args    what was called, and with what
    tx          number of the transaction, where there is one around it
    t0, t1      when it was sent, and when its end was known, in seconds
    res         the answer's columns, times as seconds; or
    error       an SQLSTATE; or
    lost        the connection broke: it may have been done or not

The clock is the machine's, which is the database's as well.
"""

import datetime
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
        self.transactions = 0
        self.tx = None

    # ---- what a kind of session says

    def step(self):
        raise NotImplementedError

    def finish(self):
        """After the deadline, undisturbed."""

    settings = ""

    # ---- life

    def run(self):
        parent = os.getppid()
        for work, end in ((self.step, self.deadline), (self.finish, None)):
            while (end is None or time.time() < end) and os.getppid() == parent:
                try:
                    work()
                    if end is None:
                        break
                except Lost:
                    self.connection = None
                except Refused as refused:
                    # serialization, deadlock, lock timeout, cancel: as announced
                    if refused.sqlstate not in ("40001", "40P01", "55P03", "57014", "IK008", "XX000"):
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

    def connect(self):
        while self.connection is None:
            try:
                with open(f"{self.directory}/server", encoding="utf-8") as where:
                    self.connection = psycopg.connect(where.read(), autocommit=True, row_factory=dict_row,
                                                      connect_timeout=10)
                self.connection.execute(f"SET synchronous_commit = on; {self.settings}")
            except (psycopg.Error, OSError):
                self.connection = None
                if time.time() > self.deadline + self.PATIENCE:
                    raise Lost from None
                time.sleep(0.05)
        self.tx = None

    def execute(self, statement, values=(), op=None, **args):
        """The row; raises Lost or Refused.  Written down where op is given."""
        if self.connection is None:
            self.connect()
        entry = {"s": self.name, "op": op, "args": args, "tx": self.tx, "t0": time.time()}
        try:
            cursor = self.connection.execute(statement, values)
            row = cursor.fetchone() if cursor.description else {"status": cursor.statusmessage}
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

    def end(self, how):
        """COMMIT or ROLLBACK; whether it has committed."""
        if self.connection is None or self.tx is None:
            return False
        tx = self.tx
        try:
            return self.execute(how, op=how)["status"] == "COMMIT"
        except Refused as refused:
            self.execute("ROLLBACK")
            if refused.sqlstate != "IK005":
                raise
            return False
        finally:
            self.tx = None
