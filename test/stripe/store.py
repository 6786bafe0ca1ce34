"""Objects of an account in one mode, and the call that works on them.

Members whose name begins with "_" are the fake's own and never shown.
Everything here is done under the lock of the world, so that a call's effects
happen together or, where its parameters are refused first, not at all.
"""

import copy
from collections import OrderedDict

import errors
import params
import search


class Store:
    def __init__(self, limit):
        self.limit = limit              # of objects of one type
        self.objects = {}               # id -> object
        self.by_type = {}               # type -> {id: object}, oldest first
        self.index = {}                 # id -> [(time, copy)]: what search has seen of it
        self.evicted = 0

    def add(self, obj):
        self.objects[obj["id"]] = obj
        self.by_type.setdefault(obj["object"], OrderedDict())[obj["id"]] = obj
        same = self.by_type[obj["object"]]
        while len(same) > self.limit:
            oldest, _ = same.popitem(last=False)
            self.objects.pop(oldest, None)
            self.index.pop(oldest, None)
            self.evicted += 1

    def remove(self, obj):
        self.objects.pop(obj["id"])
        self.by_type[obj["object"]].pop(obj["id"])

    def of_type(self, name):
        return self.by_type.get(name, {})


def visible(value):
    """A copy without the fake's own members."""
    if isinstance(value, dict):
        return {name: visible(v) for name, v in value.items() if not name.startswith("_")}
    if isinstance(value, list):
        return [visible(v) for v in value]
    return value


class Call:
    """One request that executes: who asks, with which key, for which account."""

    def __init__(self, world, account, livemode, version, request_id=None, key=None, arrival=None):
        self.world = world
        self.account = account
        self.livemode = livemode
        self.version = version
        self.request_id = request_id
        self.key = key
        self.arrival = arrival
        self.store = world.store(account, livemode)
        self.now = world.clock.seconds()

    # objects

    def new(self, name, prefix, fields, metadata=None, effect=True, created=None):
        obj = {"id": self.world.new_id(prefix), "object": name,
               "created": self.now if created is None else created, "livemode": self.livemode}
        if metadata is not None:
            obj["metadata"] = metadata
        obj.update(fields)
        self.store.add(obj)
        self.indexed(obj)
        if effect:
            self.effect("create", obj)
        return obj

    def find(self, name, identifier):
        return self.store.of_type(name).get(identifier)

    def get(self, name, identifier, param="id"):
        obj = self.find(name, identifier)
        if obj is None:
            raise errors.missing_object(name, identifier, param)
        return obj

    def indexed(self, obj):
        """Search sees this state of an object once its lag has passed."""
        if self.world.settings["search_lag"] and obj["object"] in search.FIELDS:
            seen = self.store.index.setdefault(obj["id"], [])
            seen.append((self.world.clock.now(), copy.deepcopy(obj)))
            del seen[:-8]

    # what happened

    def effect(self, action, obj, **more):
        self.indexed(obj)
        self.world.add_effect({
            "action": action, "type": obj["object"], "id": obj["id"], "status": obj.get("status"),
            "amount": obj.get("amount"), "metadata": dict(obj.get("metadata") or {}),
            "account": self.account, "livemode": self.livemode,
            "idempotency_key": self.key, "request_id": self.request_id, "arrival": self.arrival,
            "created": self.now, **more})

    def emit(self, kind, obj, previous=None):
        """An event about an object, as it is now."""
        data = {"object": visible(obj)}
        if previous is not None:
            data["previous_attributes"] = previous
        event = {"id": self.world.new_id("evt"), "object": "event",
                 "api_version": self.world.settings["api_version"], "created": self.now,
                 "data": data, "livemode": self.livemode, "pending_webhooks": 0,
                 "request": {"id": self.request_id, "idempotency_key": self.key}, "type": kind}
        if self.account != self.world.platform:
            event["account"] = self.account
        event["pending_webhooks"] = self.world.webhooks.enqueue(self.account, event)
        self.store.add(event)
        return event

    # answers

    def shown(self, obj, expand=()):
        """An object as an answer, with the fields named by expand."""
        result = visible(obj)
        for path in expand:
            parts = path.split(".")
            if len(parts) > 4:
                raise errors.invalid("You cannot expand more than 4 levels of a property.",
                                     param="expand")
            self.expanded(result, parts, path)
        return result

    def expanded(self, value, parts, path):
        if isinstance(value, list):
            for item in value:
                self.expanded(item, parts, path)
            return
        if not parts or value is None:
            return
        if not isinstance(value, dict) or parts[0] not in value:
            raise errors.invalid(f"This property cannot be expanded ({path}).", param="expand")
        inner = value[parts[0]]
        if isinstance(inner, str):
            found = self.store.objects.get(inner)
            if found is None:
                raise errors.invalid(f"This property cannot be expanded ({path}).", param="expand")
            value[parts[0]] = inner = visible(found)
        self.expanded(inner, parts[1:], path)

    def page(self, name, given, url, filters=(), objects=None):
        """A list: newest first, by cursor, with a filter on its time of creation."""
        limit = params.integer(given.get("limit", 10), "limit")
        if not 1 <= limit <= 100:
            raise errors.invalid("This value must be between 1 and 100.", param="limit",
                                 code="parameter_invalid_integer")
        matching = list((objects if objects is not None else self.store.of_type(name)).values())
        matching.reverse()
        for field in filters:
            if given.get(field):
                matching = [obj for obj in matching if obj.get(field) == given[field]]
        matching = [obj for obj in matching if created_matches(obj["created"], given.get("created"))]

        after, before = given.get("starting_after"), given.get("ending_before")
        if after and before:
            raise errors.invalid("You cannot parameterize both starting_after and ending_before.")
        if after or before:
            cursor = after or before
            known = objects if objects is not None else self.store.of_type(name)
            if cursor not in known:
                raise errors.missing_object(name, cursor,
                                            "starting_after" if after else "ending_before")
            order = list(known)
            at = {identifier: i for i, identifier in enumerate(order)}
            if after:
                matching = [obj for obj in matching if at[obj["id"]] < at[cursor]]
            else:
                matching = [obj for obj in matching if at[obj["id"]] > at[cursor]]
        more = len(matching) > limit
        matching = matching[-limit:] if before else matching[:limit]
        answer = {"object": "list", "data": [visible(obj) for obj in matching],
                  "has_more": more, "url": url}
        return self.shown(answer, given.get("expand", ()))


def created_matches(created, wanted):
    if wanted is None:
        return True
    if not isinstance(wanted, dict):
        return created == params.integer(wanted, "created")
    for name, value in wanted.items():
        number = params.integer(value, f"created[{name}]")
        if name == "gt":
            matches = created > number
        elif name == "gte":
            matches = created >= number
        elif name == "lt":
            matches = created < number
        elif name == "lte":
            matches = created <= number
        else:
            raise errors.invalid(f"Received unknown parameter: created[{name}]", param="created",
                                 code="parameter_unknown")
        if not matches:
            return False
    return True
