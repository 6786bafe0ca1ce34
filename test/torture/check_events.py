"""Events received: I1, I2 and I6 of the third ledger."""

import collections


def check(calls, connection, violations):
    ledger = {row["stripe_event_id"]: row for row in connection.execute(
        "SELECT stripe_event_id, success, processed_at FROM idempotency.stripe_webhook_events")}
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
