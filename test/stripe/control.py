"""The control API: faults, the clock, and everything that can be seen.

It has a port of its own, so that what a test asks never counts as an arrival
and never meets a fault.  JSON in, JSON out; an unknown member is an error.
"""

import base64
import json
import time
from urllib.parse import unquote

import billing
import errors
import params
import webhooks
import wire
from faults import WHATS, FaultError
from store import Call, visible
from world import SETTINGS

HELP = {
    "GET /_control/": "this list",
    "POST /_control/reset": "forget everything: objects, keys, faults, arrivals, clock, settings",
    "GET|POST /_control/clock": "{advance: SECONDS} or {set: UNIX TIME}",
    "GET|POST /_control/settings": ", ".join(SETTINGS),
    "GET|POST|DELETE /_control/faults": "{what, match, nth, times, ...}; DELETE releases and clears",
    "GET|DELETE /_control/faults/N": "one fault: seen, fired, holding, gone",
    "POST /_control/release": "{fault: N} or {}: let requests that hang go on",
    "GET /_control/wait": "?fault=N&fired|holding|gone=M or ?arrivals|arrivals_incomplete|effects|"
                          "charges|attempts=M, &timeout_ms=MS",
    "GET /_control/arrivals": "?method=&path=&key=&since=N&connection=N&body=",
    "GET /_control/effects": "?type=&action=&key=&id=&status=&account=&livemode=&payment_intent="
                             "&request_id=&metadata[NAME]=&since=N",
    "GET /_control/charges": "the same filters: how many succeeded and failed, and their sum",
    "GET /_control/counts": "totals",
    "GET /_control/idempotency": "?key=: what is known of keys",
    "GET /_control/objects/ID": "an object of any account",
    "POST /_control/keys": "{key, account, permissions, invalid, expired}: how an API key is treated",
    "POST /_control/accounts": "{id, access}: may a connected account be reached?",
    "POST /_control/connections/close": "{how: fin|rst}: end the idle connections",
    "GET|POST /_control/webhooks": "{url, secrets, enabled_events, livemode, account, connect}",
    "POST|DELETE /_control/webhooks/N": "{secrets, url, enabled_events}: change it (rotate secrets)",
    "GET /_control/webhooks/next": "?endpoint=&type=&event=&timeout_ms=: the next signed delivery",
    "POST /_control/webhooks/resend": "{event, endpoint}: deliver again",
    "POST /_control/webhooks/sign": "{body | body_base64, secrets, t}: a signature for any bytes",
    "GET /_control/webhooks/attempts": "what was sent to URLs, and the answers",
    "POST /_control/checkout/ID/complete": "{payment_method}: the customer pays a session",
}
MAX_WAIT_MS = 60000


class ControlError(Exception):
    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class Control:
    def __init__(self, world, ready):
        self.world = world
        self.ready = ready              # what is printed at the start

    def serve(self, connection):
        while True:
            try:
                request = connection.read_request(lambda request: None)
            except wire.BadRequest as error:
                self.send(connection, error.status, {"error": str(error)}, False)
                return
            if request is None:
                return
            keep = request.keeps_alive()
            try:
                status, answer = 200, self.answer(request)
            except ControlError as error:
                status, answer = error.status, {"error": str(error)}
            except (FaultError, ValueError) as error:
                status, answer = 400, {"error": str(error)}
            except errors.ApiError as error:
                status, answer = error.status, error.body
            self.send(connection, status, answer, keep)
            if not keep:
                connection.close()
                return

    @staticmethod
    def send(connection, status, answer, keep):
        body = json.dumps(answer, ensure_ascii=False).encode("utf-8") + b"\n"
        headers = [("Content-Type", "application/json"), ("Content-Length", len(body))]
        connection.send(wire.head(status, headers + ([] if keep else [("Connection", "close")])) + body)

    def answer(self, request):
        given = {}
        if request.body:
            given = json.loads(request.body.decode("utf-8"))
            if not isinstance(given, dict):
                raise ControlError(400, "the body must be a JSON object")
        query = params.decode_form(request.query)
        path = request.path
        if path.rstrip("/") in ("", "/_control"):
            return {"fake_stripe": HELP, "faults": list(WHATS), **self.ready}
        if not path.startswith("/_control/"):
            raise ControlError(404, "this is the control port; GET /_control/ lists what it does")
        parts = [unquote(part) for part in path[len("/_control/"):].split("/")]
        name = f"{request.method.lower()}_{parts[0]}"
        function = getattr(self, name, None)
        if function is None:
            raise ControlError(404, f"{request.method} {path}: GET /_control/ lists what there is")
        with self.world.lock:
            return function(parts[1:], given, query)

    @staticmethod
    def only(given, *names):
        for name in given:
            if name not in names:
                raise ControlError(400, f"unknown member {name!r}; there is: {', '.join(names)}")

    @staticmethod
    def number(text):
        try:
            return int(text)
        except (TypeError, ValueError):
            raise ControlError(400, f"{text!r} is no number") from None

    # state

    def post_reset(self, parts, given, query):
        self.only(given)
        self.world.reset()
        return {"reset": True}

    def get_clock(self, parts, given, query):
        return {"now": self.world.clock.now(), "offset": self.world.clock.offset}

    def post_clock(self, parts, given, query):
        self.only(given, "advance", "set")
        clock = self.world.clock
        if "set" in given:
            clock.set(float(given["set"]))
        clock.advance(float(given.get("advance", 0)))
        self.world.keys.prune(clock.now())
        self.world.notify()
        return self.get_clock(parts, given, query)

    def get_settings(self, parts, given, query):
        return self.world.settings

    def post_settings(self, parts, given, query):
        self.only(given, *SETTINGS)
        for name, value in given.items():
            if not isinstance(value, type(SETTINGS[name])) and not (
                    isinstance(SETTINGS[name], int) and isinstance(value, float)):
                raise ControlError(400, f"{name} must be of type {type(SETTINGS[name]).__name__}")
        if given.get("compare", "bytes") not in ("params", "bytes"):
            raise ControlError(400, "compare is params or bytes")
        self.world.settings.update(given)
        keys = self.world.keys
        keys.compare = self.world.settings["compare"]
        keys.window = {"v1": self.world.settings["key_window"],
                       "v2": self.world.settings["key_window_v2"]}
        return self.world.settings

    # faults

    def fault(self, number):
        fault = self.world.faults.get(self.number(number))
        if fault is None:
            raise ControlError(404, f"there is no fault {number}")
        return fault

    def get_faults(self, parts, given, query):
        if parts and parts[0]:
            return self.fault(parts[0]).shown()
        return {"faults": [fault.shown() for fault in self.world.faults.all]}

    def post_faults(self, parts, given, query):
        return self.world.faults.add(given).shown()

    def delete_faults(self, parts, given, query):
        if parts and parts[0]:
            self.world.faults.remove(self.fault(parts[0]))
        else:
            self.world.faults.clear()
        return {"cleared": True}

    def post_release(self, parts, given, query):
        self.only(given, "fault")
        number = given.get("fault")
        return {"released": self.world.faults.release(number and self.number(number))}

    def get_wait(self, parts, given, query):
        """Wait until something has happened so many times, or say that it hasn't."""
        timeout = min(self.number(query.pop("timeout_ms", "10000")), MAX_WAIT_MS) / 1000
        fault = self.fault(query.pop("fault")) if "fault" in query else None

        def reached():
            if fault is not None:
                return {"fired": fault.fired, "gone": fault.gone, "holding": len(fault.held)}
            counts = self.world.counts
            return {"arrivals": counts["arrivals"], "effects": counts["effects"],
                    "arrivals_incomplete": counts["arrivals_begun"] - counts["arrivals"],
                    "charges": counts["effect charge create succeeded"],
                    "attempts": len(self.world.webhooks.attempts)}

        self.only(query, *reached())
        wanted = {name: self.number(value) for name, value in query.items()}
        if not wanted:
            raise ControlError(400, HELP["GET /_control/wait"])

        done = self.world.changed.wait_for(
            lambda: all(reached()[name] >= value for name, value in wanted.items()), timeout)
        return {"reached": done, **{name: reached()[name] for name in wanted}}

    # what happened

    def get_arrivals(self, parts, given, query):
        self.only(query, "method", "path", "key", "since", "connection", "body")
        since = self.number(query.get("since", "0"))
        self.complete("arrivals", since, self.world.arrivals_evicted)
        shown = []
        for arrival in self.world.arrivals:
            request = arrival["_request"]
            facts = {"method": request.method, "path": request.path,
                     "key": request.header("Idempotency-Key"),
                     "connection": str(request.connection)}
            if any(facts[name] != query[name] for name in facts if name in query):
                continue
            if arrival["arrival"] <= since:
                continue
            if query.get("body", "") not in request.body.decode("utf-8", "replace"):
                continue
            shown.append({**visible(arrival), "method": request.method, "target": request.target,
                          "path": request.path, "key": facts["key"], "headers": request.headers,
                          "body": request.body.decode("utf-8", "replace"),
                          "body_base64": base64.b64encode(request.body).decode("ascii")})
        return {"count": len(shown), "arrivals": shown}

    @staticmethod
    def complete(what, since, evicted):
        """A count of what isn't all there any more would be a wrong one."""
        if since < evicted:
            raise ControlError(410, f"the first {evicted} {what} aren't kept any more; ask earlier, "
                               "or POST /_control/reset between tests")

    FILTERS = ("type", "action", "key", "id", "status", "account", "livemode", "metadata",
               "request_id", "payment_intent", "since")

    def effects(self, query):
        self.only(query, *self.FILTERS)
        since = self.number(query.get("since", "0"))
        self.complete("effects", since, self.world.effects_evicted)
        wanted = {name: value for name, value in query.items() if name != "since"}
        metadata = wanted.pop("metadata", {})
        if not isinstance(metadata, dict):
            raise ControlError(400, "metadata[NAME]=VALUE")
        if "key" in wanted:
            wanted["idempotency_key"] = wanted.pop("key")
        if "livemode" in wanted:
            wanted["livemode"] = params.boolean(wanted["livemode"], "livemode")
        return [effect for effect in self.world.effects
                if effect["effect"] > since
                and all(effect.get(name) == value for name, value in wanted.items())
                and all(effect["metadata"].get(name) == value for name, value in metadata.items())]

    def get_effects(self, parts, given, query):
        found = self.effects(query)
        return {"count": len(found), "effects": found}

    def get_charges(self, parts, given, query):
        tried = [e for e in self.effects(query) if (e["type"], e["action"]) == ("charge", "create")]
        made = [effect for effect in tried if effect["status"] == "succeeded"]
        return {"count": len(made), "failed": len(tried) - len(made),
                "amount": sum(effect["amount"] for effect in made), "charges": made}

    def get_counts(self, parts, given, query):
        world = self.world
        objects, evicted = {}, world.keys.evicted
        for store in world.stores.values():
            evicted += store.evicted
            for kind, found in store.by_type.items():
                if found:
                    objects[kind] = objects.get(kind, 0) + len(found)
        counts = world.counts
        return {"arrivals": counts["arrivals"],
                "arrivals_incomplete": counts["arrivals_begun"] - counts["arrivals"],
                "connections": counts["connections"],
                "connections_open": sum(1 for c in world.connections.values() if not c.control),
                "tls_refused": counts["tls_refused"],
                "charges": counts["effect charge create succeeded"],
                "charges_failed": counts["effect charge create failed"],
                "effects": {name[len("effect "):]: count for name, count in sorted(counts.items())
                            if name.startswith("effect ")},
                "objects": dict(sorted(objects.items())), "keys": len(world.keys.entries),
                "evicted": evicted, "internal_errors": list(world.internal_errors)}

    def get_idempotency(self, parts, given, query):
        self.only(query, "key")
        keys = self.world.keys
        keys.prune(self.world.clock.now())
        shown = [entry.shown(where[1:3]) for where, entry in keys.entries.items()
                 if query.get("key", entry.key) == entry.key]
        return {"count": len(shown), "keys": shown}

    def get_objects(self, parts, given, query):
        for store in self.world.stores.values():
            if parts and parts[0] in store.objects:
                return visible(store.objects[parts[0]])
        raise ControlError(404, "there is no such object")

    # who may do what

    def post_keys(self, parts, given, query):
        self.only(given, "key", "account", "permissions", "invalid", "expired")
        if not isinstance(given.get("key"), str):
            raise ControlError(400, "key is missing")
        if not isinstance(given.get("permissions"), (list, type(None))):
            raise ControlError(400, 'permissions is a list such as ["rak_payment_intent_write"]')
        known = {name: value for name, value in given.items() if name != "key"}
        self.world.api_keys[given["key"]] = known
        return known

    def post_accounts(self, parts, given, query):
        self.only(given, "id", "access")
        self.world.accounts[given["id"]] = given.get("access", True)
        return self.world.accounts

    def post_connections(self, parts, given, query):
        self.only(given, "how")
        how = given.get("how", "fin")
        if parts != ["close"] or how not in ("fin", "rst"):
            raise ControlError(400, HELP["POST /_control/connections/close"])
        idle = [c for c in self.world.connections.values() if c.idle and not c.control]
        for connection in idle:
            connection.interrupt(how)
        ended = self.world.changed.wait_for(
            lambda: not any(c.number in self.world.connections for c in idle), 5)
        return {"closed": len(idle), "done": ended}

    # webhooks

    ENDPOINT = ("url", "secrets", "enabled_events", "livemode", "account", "connect")

    def get_webhooks(self, parts, given, query):
        hooks = self.world.webhooks
        if parts == ["next"]:
            return self.next_webhook(query)
        if parts == ["attempts"]:
            return {"count": len(hooks.attempts), "attempts": list(hooks.attempts),
                    "pending": [{"due": p["due"], "attempt": p["attempt"],
                                 "event": p["delivery"]["event"],
                                 "endpoint": p["delivery"]["endpoint"]} for p in hooks.pending]}
        return {"endpoints": list(hooks.endpoints.values()), "queued": len(hooks.queue)}

    def next_webhook(self, query):
        self.only(query, "endpoint", "type", "event", "timeout_ms")
        timeout = min(self.number(query.pop("timeout_ms", "0")), MAX_WAIT_MS) / 1000
        deadline = time.monotonic() + timeout
        while True:
            found = self.world.webhooks.take(
                lambda delivery: all(str(delivery[name]) == value for name, value in query.items()))
            left = deadline - time.monotonic()
            if found or left <= 0:
                return {"delivery": found}
            self.world.changed.wait(left)

    def post_webhooks(self, parts, given, query):
        hooks = self.world.webhooks
        if parts == ["sign"]:
            self.only(given, "body", "body_base64", "secrets", "t")
            body = (base64.b64decode(given["body_base64"]) if "body_base64" in given
                    else given.get("body", "").encode("utf-8"))
            moment = given.get("t", self.world.clock.seconds())
            signature = webhooks.sign(body, given.get("secrets", []), moment)
            return {"headers": {"Stripe-Signature": signature}}
        if parts == ["resend"]:
            return self.resend(given)
        self.only(given, *self.ENDPOINT)
        for name in ("secrets", "enabled_events"):
            if not isinstance(given.get(name, []), list):
                raise ControlError(400, f"{name} must be a list")
        if parts and parts[0]:
            endpoint = hooks.endpoints.get(self.number(parts[0]))
            if endpoint is None:
                raise ControlError(404, f"there is no endpoint {parts[0]}")
            if given.get("url"):
                webhooks.check_url(given["url"])
            endpoint.update(given)
            return endpoint
        return hooks.add(self.world, given)

    def delete_webhooks(self, parts, given, query):
        if not parts or self.world.webhooks.remove(self.number(parts[0])) is None:
            raise ControlError(404, "there is no such endpoint")
        return {"deleted": True}

    def resend(self, given):
        self.only(given, "event", "endpoint")
        hooks = self.world.webhooks
        for store in self.world.stores.values():
            event = store.of_type("event").get(given.get("event"))
            if event is not None:
                body = json.dumps(event, indent=2, ensure_ascii=False).encode("utf-8")
                wanted = [endpoint for endpoint in hooks.endpoints.values()
                          if given.get("endpoint") in (None, endpoint["endpoint"])]
                for endpoint in wanted:
                    hooks.deliver(endpoint, event, body)
                return {"deliveries": len(wanted)}
        raise ControlError(404, f"there is no event {given.get('event')!r}")

    # the customer

    def post_checkout(self, parts, given, query):
        self.only(given, "payment_method")
        if len(parts) != 2 or parts[1] != "complete":
            raise ControlError(404, HELP["POST /_control/checkout/ID/complete"])
        for (account, livemode), store in self.world.stores.items():
            session = store.of_type("checkout.session").get(parts[0])
            if session is not None:
                call = Call(self.world, account, livemode, self.world.settings["api_version"])
                return visible(billing.complete_session(call, session,
                                                        given.get("payment_method", "pm_card_visa")))
        raise ControlError(404, f"there is no checkout session {parts[0]!r}")
