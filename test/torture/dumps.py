"""A dump of the busy database, taken while a transaction with many calls is open,
and restored: at another server, or beside the original.  There the same keys are
derived and the same results replayed, the workers come to their end though of the
callers nothing is known, and nothing is sent.
"""

import os
import subprocess
import time

import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from payments import is_declined
from session import Session


class Failed(Exception):
    """It couldn't be dumped or restored, which says nothing."""


class DumpingSession(Session):
    # how many callers of the dump shall be unknown where it is restored, and how long they are waited for
    CALLERS = 105
    MANY = 15
    # until a pass of the workers has come to its end
    PASS = 20

    def __init__(self, *args):
        super().__init__(*args)
        self.number = 0
        self.left = 1 + int((self.deadline - time.time()) / 40)

    def finish(self):
        pass

    def step(self):
        if self.left == 0 or time.time() + 30 > self.deadline:
            time.sleep(0.5)
            return
        time.sleep(self.random.uniform(3, 8))
        until = time.time() + self.MANY
        while time.time() < until:
            if self.execute("SELECT count(*) AS n FROM idempotency.stripe_idempotency_keys"
                            " WHERE pg_catalog.cardinality(callers) > 0")["n"] >= self.CALLERS:
                break
            time.sleep(0.3)
        self.left -= 1
        self.number += 1
        elsewhere = self.chance(0.7)
        began = time.time()
        try:
            said = self.restore(f"restored_{self.number}", elsewhere)
        except (Failed, psycopg.Error, OSError, subprocess.TimeoutExpired) as error:
            self.note("not restored", args={"why": str(error)[:300], "elsewhere": elsewhere})
            return
        self.note("restored", t0=began, res={**said, "elsewhere": elsewhere})

    def run_tool(self, *command):
        done = subprocess.run(command, timeout=120, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Failed(f"{command[0]}: {done.stderr}")

    def derived(self, connection):
        return connection.execute("SELECT idempotency.stripe_idempotency_key('dump', %s) AS key,"
                                  " idempotency.operation_uuid(%s, 'dump')::text AS uuid",
                                  (self.name, self.name)).fetchone()

    def restore(self, name, elsewhere):
        with open(f"{self.directory}/server", encoding="utf-8") as where:
            source = where.read()
        target = source
        if elsewhere:
            with open(f"{self.directory}/elsewhere", encoding="utf-8") as where:
                target = where.read()
        file = f"{self.directory}/{name}.dump"
        with psycopg.connect(source, autocommit=True, row_factory=dict_row) as connection:
            derived = self.derived(connection)
        self.run_tool("pg_dump", "-Fc", "--no-subscriptions", "--lock-wait-timeout=3000", "-f", file, "-d", source)
        with psycopg.connect(target, autocommit=True, dbname="template1") as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        try:
            self.run_tool("pg_restore", "-d", psycopg.conninfo.make_conninfo(target, dbname=name), file)
            with psycopg.connect(target, autocommit=True, row_factory=dict_row, dbname=name) as connection:
                return self.look(connection, derived, elsewhere)
        finally:
            os.unlink(file)
            try:
                with psycopg.connect(target, autocommit=True, dbname="template1") as connection:
                    connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
            except psycopg.Error:
                pass

    def look(self, connection, derived, elsewhere):
        connection.execute("SET lock_timeout = 0; SET statement_timeout = 0; SET default_transaction_isolation = 'read committed'")
        said = {"wrong": [], "replays": 0, "callers": connection.execute(
            "SELECT count(*) AS n FROM idempotency.stripe_idempotency_keys"
            " WHERE pg_catalog.cardinality(callers) > 0").fetchone()["n"]}
        if self.derived(connection) != derived:
            said["wrong"].append(f"derives {self.derived(connection)}, not {derived}")
        self.replay_requests(connection, said)
        self.replay_calls(connection, said)
        if elsewhere:
            said["passes"] = self.wait_for(connection, self.passes(connection))
            said["noted"] = self.probe(connection)
        return said

    def replay_requests(self, connection, said):
        """As the clients would repeat them."""
        for row in connection.execute("SELECT scope, key, response FROM idempotency.idempotency_keys"
                                      " WHERE expires_at > pg_catalog.clock_timestamp() + interval '1 s'"
                                      " AND scope IN ('user 1', 'torture') ORDER BY recorded_at DESC LIMIT 40").fetchall():
            if row["scope"] == "torture":
                request = {"variant": row["response"]["for"]}
            else:
                card = "pm_card_chargeDeclined" if is_declined(int(row["key"].split()[1])) else "pm_card_visa"
                request = {"method": "POST", "path": "/orders", "body": {"card": card}}
            got = connection.execute("SELECT r.* FROM idempotency.claim(%s, %s, request => %s) r",
                                     (row["key"], row["scope"], Jsonb(request))).fetchone()
            said["replays"] += 1
            if got["verdict"] != "replay" or got["response"] != row["response"]:
                said["wrong"].append(f"answers request {row['key']} with {got['verdict']} {got['response']}")

    def replay_calls(self, connection, said):
        for row in connection.execute("SELECT operation_type, operation_id, idempotency_key, resource_id"
                                      " FROM idempotency.stripe_idempotency_keys WHERE outcome = 'completed'"
                                      " ORDER BY recorded_at DESC LIMIT 40").fetchall():
            got = connection.execute("SELECT r.*, idempotency.stripe_idempotency_key(%s, %s) AS key"
                                     " FROM idempotency.stripe_claim(%s, %s) r",
                                     (row["operation_type"], row["operation_id"]) * 2).fetchone()
            said["replays"] += 1
            if got["verdict"] != "replay" or got["resource_id"] != row["resource_id"] \
                    or not got["key"] == got["idempotency_key"] == row["idempotency_key"]:
                said["wrong"].append(f"answers {row['operation_type']}:{row['operation_id']} with {got['verdict']}"
                                     f" {got['resource_id']} {got['key']}")

    def wait_for(self, connection, condition):
        """Counts looks, not seconds: a machine that stands still meanwhile is nobody's fault."""
        for _ in range(int(self.PASS / 0.3)):
            if condition():
                return True
            time.sleep(0.3)
        return False

    def passes(self, connection):
        """Has a pass ended that began after now?  It takes two ends."""
        seen = set()

        def condition():
            row = connection.execute("SELECT last_run FROM idempotency.workers"
                                     " WHERE database = pg_catalog.current_database()").fetchone()
            if row is not None and row["last_run"] is not None:
                seen.add(row["last_run"])
            return len(seen) >= 3
        return condition

    def probe(self, connection):
        """A new call behind all those callers, whose transaction ends when the recorder has gone: is that noted?"""
        operation = f"{self.name}-{self.number}"
        with connection.transaction():
            got = connection.execute("SELECT r.* FROM idempotency.stripe_call('probe', %s, 'POST', '/v1/customers',"
                                     " '{\"name\": \"probe\"}') r", (operation,)).fetchone()
            time.sleep(3)
        if got["outcome"] != "completed":
            return None
        return self.wait_for(connection, lambda: connection.execute(
            "SELECT COALESCE(pg_catalog.cardinality(callers), 0) = 0 AS noted FROM idempotency.stripe_idempotency_keys"
            " WHERE operation_type = 'probe' AND operation_id = %s", (operation,)).fetchone()["noted"])
