"""The state of one fake: everything that a reset makes new, under one lock."""

import itertools
import secrets
import string
import threading
from collections import Counter, deque

from clock import Clock
from faults import Faults
from idempotency import Keys
from store import Store
from webhooks import Webhooks

MAX_ARRIVALS = 50000
MAX_ARRIVAL_BYTES = 128 << 20
MAX_EFFECTS = 200000
MAX_OBJECTS = 10000                     # of one type, in one account and mode
MAX_KEYS = 50000

SETTINGS = {
    "search_lag": 0,                    # seconds until search sees a change
    "compare": "params",                # or "bytes": a key's parameters, parsed or as sent
    "api_version": "2026-10-28.endive",  # the account's default
    "key_window": 24 * 3600,            # how long keys are known, API v1
    "key_window_v2": 30 * 24 * 3600,
    "retry_webhooks": True,             # deliver again, as Stripe does, what wasn't answered by 2xx
}


class World:
    platform = "acct_1FakePlatform"

    def __init__(self):
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        alphabet = string.ascii_letters + string.digits
        self.seed = "".join(secrets.choice(alphabet) for _ in range(8))
        self.numbers = itertools.count(1)   # of ids; never reset, so that none comes twice
        self.connections = {}               # number -> open Connection
        self.connection_numbers = itertools.count(1)
        self.control_numbers = itertools.count(1)
        self.epoch = 0                      # of resets: what began before one ends without effect
        self.clock = Clock()
        self.webhooks = Webhooks(self)
        self.faults = Faults()
        with self.lock:
            self.reset()

    def reset(self):
        self.epoch += 1
        self.faults.clear()
        self.faults = Faults()
        self.clock.offset = 0.0
        self.settings = dict(SETTINGS)
        self.keys = Keys(MAX_KEYS)
        self.stores = {}                    # (account, livemode) -> Store
        self.api_keys = {}                  # registered ones
        self.accounts = {}                  # id -> may it be reached?
        self.arrivals = deque()
        self.arrival_bytes = 0
        self.arrival_numbers = itertools.count(1)
        self.arrivals_evicted = 0           # number of the last one that isn't kept any more
        self.effects = deque()
        self.effects_evicted = 0
        self.counts = Counter()
        self.internal_errors = deque(maxlen=100)
        self.webhooks.reset()
        self.notify()

    def new_id(self, prefix):
        return f"{prefix}_{self.seed}{next(self.numbers):010d}"

    def store(self, account, livemode):
        where = (account, livemode)
        if where not in self.stores:
            self.stores[where] = Store(MAX_OBJECTS)
        return self.stores[where]

    def notify(self):
        self.changed.notify_all()

    # what happened

    def add_effect(self, effect):
        self.counts["effects"] += 1
        self.counts[f"effect {effect['type']} {effect['action']} {effect['status'] or ''}".strip()] += 1
        self.effects.append({"effect": self.counts["effects"], **effect})
        if len(self.effects) > MAX_EFFECTS:
            self.effects_evicted = self.effects.popleft()["effect"]
        self.notify()

    def add_arrival(self, request, listener):
        """A request's first bytes are here.  The entry is filled in as more comes."""
        arrival = {"arrival": next(self.arrival_numbers), "connection": request.connection,
                   "request": request.number, "listener": listener, "at": self.clock.now(),
                   "complete": False, "_request": request, "_size": 0, "_epoch": self.epoch,
                   "answer": None}
        self.arrivals.append(arrival)
        self.counts["arrivals_begun"] += 1
        while len(self.arrivals) > MAX_ARRIVALS or self.arrival_bytes > MAX_ARRIVAL_BYTES:
            dropped = self.arrivals.popleft()
            self.arrival_bytes -= dropped["_size"]
            dropped["_size"] = None
            self.arrivals_evicted = dropped["arrival"]
        self.notify()
        return arrival

    def arrived(self, arrival):
        request = arrival["_request"]
        arrival["complete"] = request.complete
        if arrival["_size"] is not None:
            arrival["_size"] = len(request.body) + sum(len(n) + len(v) for n, v in request.headers)
            self.arrival_bytes += arrival["_size"]
        if request.complete:
            self.counts["arrivals"] += 1
        self.notify()
