"""Calls from many databases, of which there are more than places for their recorders."""

import os
import re
import time

from session import Session

DATABASES = int(os.environ["TORTURE_DATABASES"])


def name_of(number):
    return f"crowd{number}"


class CrowdSession(Session):
    """Goes from one database to the next; each call again until it has an answer, there."""

    settings = "SET idempotency.stripe_record_timeout = '5s'; SET idempotency.stripe_max_retries = 0;" \
        " SET idempotency.stripe_timeout = '5s'; SET lock_timeout = 0; SET statement_timeout = 0"

    def __init__(self, *args):
        super().__init__(*args)
        self.number = 0
        self.database = None
        # those without an answer, with their database
        self.open = []

    def where(self):
        return re.sub(r"dbname=\S+", f"dbname={self.database}", super().where())

    def go_to(self, database):
        if database != self.database:
            self.disconnect()
            self.database = database

    def step(self):
        if os.path.exists(f"{self.directory}/hold"):
            self.pause(0.2)
            return
        if self.open and self.chance(0.5):
            self.attempt(self.random.choice(self.open))
            return
        self.number += 1
        self.open.append((name_of(self.random.randrange(DATABASES)), f"{self.name}-{self.number}"))
        self.attempt(self.open[-1])
        self.pause(0.1)

    def attempt(self, call):
        database, operation = call
        self.go_to(database)
        got = self.execute(
            "SELECT r.* FROM idempotency.stripe_call('crowd', %s, 'POST', '/v1/customers',"
            " pg_catalog.jsonb_build_object('name', %s::text)) r", (operation, operation),
            op="crowd", operation=operation, database=database)
        if got["outcome"] in ("completed", "failed"):
            self.open.remove(call)

    def finish(self):
        while self.open and time.time() < self.deadline + self.PATIENCE:
            self.attempt(self.open[0])
            self.pause(0.1)
