"""Events received: I1, I2 and I6 of the third ledger, and its queue."""

import collections
import math

from events import EventsSession

FEWEST_ATTEMPTS = 3  # of what TortureSettings.pm sets
PASSED_OVER = 10


def check_objects(taken, recorded_at, object_of, violations):
    """I1: no two workers are at one object."""
    by_object = collections.defaultdict(list)
    for call in taken:
        event = call["res"]["stripe_event_id"]
        until = call["open_until"]
        if call["tx"] is None:
            until = min(call["t0"] + EventsSession.LEASE, recorded_at.get((event, call["res"]["token"]), math.inf))
        if call["committed"] and event in object_of:
            by_object[object_of[event]].append((call["t0"], call["t1"], until, event))
    for what, claims in by_object.items():
        for first, (_, t1, until, event) in enumerate(claims):
            violations.looked("I1")
            for t0, end, _, other in claims[first + 1:]:
                if t0 >= until:
                    break
                if event != other and t0 > t1 and end < until:
                    violations.add("I1", f"{other}: handed out while {event} of the same object, {what[1]}, was claimed")


def check_fresh(calls, taken, object_of, violations):
    """I6: what is fresh isn't kept waiting by what has failed."""
    first = {}
    for call in calls:
        if call["op"] in ("event_claim", "event_next") and call.get("res"):
            first.setdefault(call["res"]["stripe_event_id"], call["t0"])
    alone = collections.Counter(object_of.values())
    again = [call for call in taken if call["res"]["attempt"] > 1]
    for call in calls:
        event = call["res"]["stripe_event_id"] if call["op"] == "receive" and call.get("res") else None
        if event is None or not call["committed"] or not call["res"]["stored"] or alone[object_of.get(event)] != 1:
            continue
        violations.looked("I6")
        passed = sum(call["done"] < other["t0"] and other["t1"] < first.get(event, 0) for other in again)
        if passed >= PASSED_OVER:
            violations.add("I6", f"{event}: failed ones were handed out {passed} times while it was fresh")


def check_queue(calls, objects, violations):
    taken = [call for call in calls if call["op"] == "event_next" and call.get("res")]
    recorded_at = {(call["args"]["event"], call["args"]["token"]): call["t0"]
                   for call in calls if call["op"] == "event_record"}
    check_objects(taken, recorded_at, objects, violations)
    check_fresh(calls, taken, objects, violations)
    for call in calls:
        if call["op"] == "dead":
            violations.looked("I6")
            if call["args"]["attempts"] < FEWEST_ATTEMPTS:
                violations.add("I6", f"{call['args']['stripe_event_id']}: dead after {call['args']['attempts']} attempts")
    violations.told.append(
        f"events: {len(taken)} handed out, {sum(call['res']['attempt'] > 1 for call in taken)} of them again,"
        f" {sum(call['tx'] is None for call in taken)} with a lease;"
        f" {len({call['args']['stripe_event_id'] for call in calls if call['op'] == 'dead'})} died")


def check(calls, connection, violations):
    ledger = {row["stripe_event_id"]: row for row in connection.execute(
        "SELECT account, object_id, stripe_event_id, success, processed_at FROM idempotency.stripe_webhook_events")}
    handled = collections.Counter(row["event"] for row in connection.execute("SELECT event FROM handled"))

    recorded = {}
    for call in calls:
        if call["op"] in ("event_claim", "event_next") and call.get("res"):
            event = call["res"]["stripe_event_id"]
            if event in recorded:
                violations.looked("I2")
            if event in recorded and recorded[event] <= call["t0"] and call["res"]["verdict"] == "claimed":
                violations.add("I2", f"{event}: claimed again after it was recorded")
        elif call["op"] == "event_record" and call["committed"] and call["args"]["success"]:
            recorded.setdefault(call["args"]["event"], call["done"])
        elif call["op"] == "receive" and call.get("res") and call["committed"] \
                and call["res"]["stripe_event_id"] not in ledger:
            violations.add("I6", f"{call['res']['stripe_event_id']}: was received, and is gone")
    for event, count in handled.items():
        violations.looked("I1")
        if count != 1:
            violations.add("I1", f"{event}: handled {count} times")
    for event, row in ledger.items():
        violations.looked("I6")
        if not row["success"]:
            violations.add("I6", f"{event}: was never processed")
        elif event not in handled:
            violations.add("I2", f"{event}: counts as processed, and nothing was done")
    for event in recorded:
        if event not in ledger:
            violations.add("I6", f"{event}: was processed, and is gone")
    check_queue(calls, {event: (row["account"], row["object_id"]) for event, row in ledger.items()
                        if row["object_id"] is not None}, violations)
