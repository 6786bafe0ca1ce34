"""What a key means, to API v1 and to API v2.

v1: the first request whose endpoint begins to execute saves its status and
body under the key, whatever they are, also 500.  A later request with the key
gets them again ("Idempotent-Replayed: true"), or 400 where its parameters or
endpoint differ, or 409 while the first still runs.  What is refused before
execution (401, 403, 429, parameters that fail validation) saves nothing.

v2: a first request that succeeded is not executed again, and answered with
the object as it is now.  One that failed is executed again.

A key is known for as long as its window, from its first receipt, and not a
second longer: Stripe promises no more.  It belongs to an account and a mode.
"""

from collections import OrderedDict

import errors

MAX_KEY = 255
WINDOW = {"v1": 24 * 3600, "v2": 30 * 24 * 3600}


class Entry:
    def __init__(self, api, key, request_id, path, method, params, raw, now):
        self.api = api
        self.key = key
        self.request_id = request_id    # of the request that came first
        self.method = method
        self.path = path
        self.params = params
        self.raw = raw
        self.first_seen = now
        self.running = True
        self.saved = None               # v1: (status, body bytes, headers); v2: see succeeded
        self.succeeded = None           # v2: how to render the object as it is now

    def shown(self, scope):
        return {"api": self.api, "account": scope[0], "livemode": scope[1], "key": self.key,
                "state": "in_progress" if self.running else "saved",
                "status": self.saved and self.saved[0], "method": self.method, "path": self.path,
                "first_request": self.request_id, "first_seen": int(self.first_seen)}


class Keys:
    """The keys of all accounts.  Callers hold the lock of the world."""

    def __init__(self, limit):
        self.limit = limit
        self.entries = OrderedDict()    # (api, account, livemode, key) -> Entry, oldest first
        self.window = dict(WINDOW)
        self.compare = "params"
        self.evicted = 0

    def prune(self, now):
        for where in [where for where, entry in self.entries.items() if self.expired(entry, now)]:
            del self.entries[where]

    def expired(self, entry, now):
        return not entry.running and now - entry.first_seen >= self.window[entry.api]

    def begin(self, api, scope, key, request_id, request, params, now):
        """The entry of a request, to be executed, replayed, or refused by an exception."""
        if len(key) > MAX_KEY:
            raise errors.key_too_long(len(key), MAX_KEY)
        where = (api, *scope, key)
        entry = self.entries.get(where)
        if entry and self.expired(entry, now):
            del self.entries[where]
            entry = None
        if entry is None:
            entry = Entry(api, key, request_id, request.path, request.method, params,
                          request.body, now)
            self.entries[where] = entry
            self.evict()
            return entry
        if entry.running:
            raise with_original(errors.key_in_use(key), entry)
        if (entry.path, entry.method) != (request.path, request.method):
            raise with_original(errors.other_endpoint(key, request.path, entry.path), entry)
        if (entry.raw != request.body if self.compare == "bytes" else entry.params != params):
            raise with_original(errors.other_parameters(key), entry)
        if api == "v2" and not entry.succeeded:
            entry.running = True        # failed: executed again, by its first window
        return entry

    def evict(self):
        while len(self.entries) > self.limit:
            where = next((w for w, e in self.entries.items() if not e.running), None)
            if where is None:
                return
            del self.entries[where]
            self.evicted += 1

    def forget(self, api, scope, entry):
        """Nothing is saved: the key is as good as new."""
        where = (api, *scope, entry.key)
        entry.running = False
        if self.entries.get(where) is entry:
            del self.entries[where]


def with_original(error, entry):
    error.headers.append(("Original-Request", entry.request_id))
    return error
