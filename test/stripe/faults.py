"""Faults on demand: which request meets one, and where.

A fault waits at one of three points of a request's way:

    gate         it has arrived, and nothing has been done about it: no
                 authentication, no look at its key
    execution    its endpoint is about to execute, with the key in use; a
                 replay or a request that is refused doesn't come here
    answer       it has had its effect and its result is saved, and the answer
                 is about to leave

Each fault counts the requests that match it at its point, and strikes from
the nth on, as many times as it is told (0: always).
"""

import fnmatch
import itertools
import json

import errors
from wire import REASONS


class FaultError(Exception):
    """A fault that can't be set."""


GATE, EXECUTION, ANSWER = "gate", "execution", "answer"

# what -> (point, its parameters); "effect" moves some from the gate behind the effect
WHATS = {
    "reset_before": (GATE, {}),
    "reset_after": (ANSWER, {}),
    "close_before": (GATE, {}),
    "close_after": (ANSWER, {}),
    "hang_before": (GATE, {"ms": int, "on_leave": str}),
    "hang_in_use": (EXECUTION, {"ms": int, "on_leave": str}),
    "hang_after": (ANSWER, {"ms": int}),
    "cut": (ANSWER, {"keep": int, "where": str, "how": str, "chunked": bool}),
    "garbled": (ANSWER, {"where": str}),
    "drip": (ANSWER, {"bytes": int, "ms": int, "where": str}),
    "huge": (ANSWER, {"bytes": int, "chunked": bool}),
    "not_json": (ANSWER, {"status": int, "body": str, "effect": bool}),
    "close_idle": (ANSWER, {"ms": int}),
    "reset_idle": (ANSWER, {"ms": int}),
    "redirect": (GATE, {"status": int, "location": str, "effect": bool}),
    "gateway": (GATE, {"status": int, "type": str, "body": str, "effect": bool}),
    "401": (GATE, {}),
    "403": (GATE, {}),
    "409_in_use": (GATE, {}),
    "409": (EXECUTION, {"code": str}),
    "424": (EXECUTION, {"effect": bool, "saved": bool}),
    "429": (GATE, {"reason": str}),
    "429_lock_timeout": (EXECUTION, {}),
    "500": (EXECUTION, {"effect": bool}),
    "500_unsaved": (EXECUTION, {"effect": bool}),
    "502": (GATE, {"effect": bool, "json": bool}),
    "503": (GATE, {"effect": bool, "json": bool}),
    "504": (GATE, {"effect": bool, "json": bool}),
    "reset_connection": ("connection", {}),
    "close_connection": ("connection", {}),
}
COMMON = {"should_retry": bool, "headers": dict}
MATCH = {"method": str, "path": str, "key": str, "account": str, "livemode": bool,
         "reused": bool, "body": str, "listener": str}
MAX_FAULTS = 1000
MAX_HUGE = 1 << 30


def check(given, accepted, where):
    for name, value in given.items():
        if name not in accepted:
            raise FaultError(f"unknown member {name!r} of {where}; there is: "
                             + ", ".join(sorted(accepted)))
        kind = accepted[name]
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            raise FaultError(f"{name!r} of {where} must be of type {kind.__name__}")


class Fault:
    def __init__(self, number, given):
        what = given.get("what")
        if what not in WHATS:
            raise FaultError(f"unknown fault {what!r}; there is: " + ", ".join(WHATS))
        point, parameters = WHATS[what]
        check(given, {"what": str, "match": dict, "nth": int, "times": int,
                      **(COMMON if point != "connection" else {}), **parameters}, what)
        check(given.get("match", {}), MATCH if point != "connection" else {"listener": str}, "match")
        self.number = number
        self.what = what
        self.match = given.get("match", {})
        self.nth = given.get("nth", 1)
        self.times = given.get("times", 1)
        self.given = given
        if self.nth < 1 or self.times < 0 or given.get("ms", 0) < 0:
            raise FaultError("nth starts at 1; times and ms can't be negative")
        if what == "gateway" and not 200 <= given.get("status", 403) <= 599:
            raise FaultError("status of gateway is 200 to 599")
        if not 0 <= given.get("bytes", 1) <= MAX_HUGE:
            raise FaultError(f"bytes is at most {MAX_HUGE}")
        for name, allowed in (("on_leave", ("drop", "continue", "hold")), ("how", ("fin", "rst")),
                              ("where", ("head", "body"))):
            if given.get(name, allowed[0]) not in allowed:
                raise FaultError(f"{name} is one of " + ", ".join(allowed))
        if point == GATE and given.get("effect"):
            point = ANSWER              # done, but answered otherwise
        elif what == "not_json" and given.get("effect") is False:
            point = GATE
        self.point = point
        self.seen = 0                   # requests that matched
        self.fired = 0
        self.gone = 0                   # clients that left while it held them
        self.held = set()               # release functions of requests that hang
        self.cleared = False            # then none begins to hang any more

    def matches(self, facts):
        for name, wanted in self.match.items():
            value = facts.get(name)
            if name == "path":
                if not fnmatch.fnmatchcase(value, wanted):
                    return False
            elif name == "body":
                if wanted not in value:
                    return False
            elif value != wanted:
                return False
        return True

    def shown(self):
        return {"fault": self.number, **self.given, "seen": self.seen, "fired": self.fired,
                "holding": len(self.held), "gone": self.gone}

    def get(self, name, default=None):
        return self.given.get(name, default)


class Faults:
    """All that are set.  Callers hold the lock of the world."""

    def __init__(self):
        self.numbers = itertools.count(1)
        self.all = []

    def add(self, given):
        if len(self.all) >= MAX_FAULTS:
            raise FaultError(f"at most {MAX_FAULTS} faults can be set; DELETE /_control/faults")
        fault = Fault(next(self.numbers), given)
        self.all.append(fault)
        return fault

    def get(self, number):
        return next((fault for fault in self.all if fault.number == number), None)

    def choose(self, point, facts):
        """The fault that strikes this request at this point: the first of those that match."""
        chosen = None
        for fault in self.all:
            if fault.point != point or not fault.matches(facts):
                continue
            fault.seen += 1
            due = fault.seen >= fault.nth and (fault.times == 0 or fault.fired < fault.times)
            if due and chosen is None:
                fault.fired += 1
                chosen = fault
        return chosen

    def release(self, number=None):
        released = 0
        for fault in self.all:
            if number in (None, fault.number):
                for release in list(fault.held):
                    release()
                    released += 1
        return released

    def remove(self, fault):
        fault.cleared = True
        self.release(fault.number)
        self.all.remove(fault)

    def clear(self):
        for fault in list(self.all):
            self.remove(fault)


# Answers of something between the client and the API
INTERMEDIARY = ("502", "503", "504", "redirect", "not_json", "gateway")

# The answers that a fault gives in the API's stead: (status, type, body or text, headers)

HTML = ("<html>\r\n<head><title>{0}</title></head>\r\n<body>\r\n<center><h1>{0}</h1></center>\r\n"
        "<hr><center>nginx</center>\r\n</body>\r\n</html>\r\n")


def api_error(fault, key):
    """The ApiError of a fault that is one, or None."""
    what = fault.what
    if what == "401":
        return errors.invalid_api_key("sk_test_refused_on_demand")
    if what == "403":
        return errors.missing_permission("sk_test_refused_on_demand", "acct_fake", "rak_on_demand")
    if what == "409_in_use":
        return errors.key_in_use(key or "")
    if what == "409":
        return errors.ApiError(409, "invalid_request_error",
                               "The object can't be accessed right now because another API request "
                               "or Stripe process is currently accessing it.",
                               saved=False, code=fault.get("code"))
    if what == "424":
        return errors.ApiError(424, "api_error",
                               "The request couldn't be completed due to a failure in a dependency "
                               "external to Stripe.", saved=fault.get("saved", False))
    if what == "429":
        reason = fault.get("reason", "global-rate")
        return errors.ApiError(429, "invalid_request_error",
                               "Request rate limit exceeded. You can learn more about rate limits "
                               "here https://stripe.com/docs/rate-limits.",
                               saved=False, code="rate_limit",
                               headers=[("Stripe-Rate-Limited-Reason", reason)])
    if what == "429_lock_timeout":
        return errors.ApiError(429, "invalid_request_error",
                               "This object cannot be accessed right now because another API request "
                               "or Stripe process is currently accessing it. If you see this error "
                               "intermittently, retry the request. If you see this error frequently "
                               "and are making multiple concurrent requests to a single object, make "
                               "your requests serially or at a lower rate.",
                               saved=False, code="lock_timeout")
    if what in ("500", "500_unsaved"):
        return errors.ApiError(500, "api_error", "An unknown error occurred", saved=what == "500")
    return None


def plain_answer(fault):
    """(status, content type, text, headers) of a fault whose answer isn't the API's."""
    if fault.what == "redirect":
        location = fault.get("location", "http://127.0.0.1:9/elsewhere")
        return fault.get("status", 307), "text/html", "", [("Location", location)]
    if fault.what == "not_json":
        return (fault.get("status", 200), "text/html",
                fault.get("body", "<html><body>Welcome to the hotel's network</body></html>"), [])
    if fault.what == "gateway":
        status = fault.get("status", 403)
        title = f"{status} {REASONS.get(status, 'Unknown')}"
        body = "" if status in (204, 304) else fault.get("body", HTML.format(title))
        return status, fault.get("type", "text/html"), body, []
    if fault.get("json"):
        error = {"error": errors.error_body("api_error", "Something went wrong on Stripe's end.")}
        return int(fault.what), "application/json", json.dumps(error), []
    titles = {"502": "502 Bad Gateway", "503": "503 Service Temporarily Unavailable",
              "504": "504 Gateway Time-out"}
    return int(fault.what), "text/html", HTML.format(titles[fault.what]), []
