"""What stripe_reconcile said: I1, I2 and I7 of the calls sent.

It agrees with what the fake has done, and with what is recorded in the end; what it has settled stays so, and nothing
is sent any more.
"""

import collections
import datetime

from check_stripe import callers_of, is_probe, operation_of, sent_again
from payments import SendingSession

FINAL = ("completed", "failed")


class Said:
    """One row of an answer."""

    def __init__(self, call, row):
        self.call = call
        self.operation = (row["operation_type"], row["operation_id"])
        self.name = ":".join(self.operation)
        self.outcome = row["outcome"]
        self.resource = row["resource_id"]
        evidence = row["evidence"] or {}
        # rather than found settled, by an earlier one or by an event
        self.settled = "found_by" in evidence and "at" in evidence and evidence.get("kept", True) \
            and datetime.datetime.fromisoformat(evidence["at"]).timestamp() >= call["t0"]


def check(calls, arrivals, effects, declined, connection, violations):
    ledger = {(row["operation_type"], row["operation_id"]): row for row in connection.execute(
        "SELECT operation_type, operation_id, outcome::text, resource_id FROM idempotency.stripe_idempotency_keys")}
    sent = collections.defaultdict(list)
    when = {}
    for arrival in arrivals:
        when[arrival["arrival"]] = arrival["at"]
        if arrival.get("key") and not is_probe(arrival):
            sent[operation_of(arrival["key"])].append(arrival["at"])
    charges, refusals = collections.defaultdict(list), collections.defaultdict(list)
    for found, of in ((effects, charges), (declined, refusals)):
        for effect in found:
            of[operation_of(effect["idempotency_key"])].append(effect)
    callers = callers_of(calls)
    known = collections.defaultdict(list)
    count = collections.Counter()

    asked = [call for call in calls if call["op"] == "reconcile" and call.get("res")]
    all_said = [Said(call, row) for call in asked for row in call["res"]]
    for said in all_said:
        if said.outcome in FINAL and said.call["committed"]:
            known[said.operation].append(said)
    for operation, of_operation in callers.items():
        for call in of_operation:
            if call["op"] == "stripe_claim" and call.get("res") and call["res"]["verdict"] == "replay":
                known[operation].append(Said(call, {"operation_type": "transfer", "operation_id": operation[1], "evidence": None,
                                                    **{name: call["res"][name] for name in ("outcome", "resource_id")}}))

    for said in all_said:
        count[said.outcome] += 1
        count["settled"] += said.settled
        at_it = [call for call in callers[said.operation] if call["t0"] < said.call["t1"] and said.call["t0"] < call["t1"]]
        count["at it"] += bool(at_it)
        count["retried"] += any(call["t0"] >= said.call["t1"] for call in callers[said.operation])
        check_fake(said, charges[said.operation], refusals[said.operation], when, violations)
        check_known(said, known[said.operation], violations)
        if said.outcome in FINAL and said.call["committed"]:
            check_final(said, ledger.get(said.operation), sent[said.operation], callers[said.operation], violations)
        if said.settled:
            check_held(said, callers[said.operation], violations)
    violations.told.append(
        f"reconcile: {len(asked)} calls answered, of {len(all_said)} operations: "
        + ", ".join(f"{count[outcome]} {outcome}" for outcome in FINAL + ("not_executed", "unknown", "in_progress"))
        + f"; {count['settled']} settled by what Stripe told; {count['at it']} while a caller was at it,"
        f" {count['retried']} before a retry")


def check_fake(said, charges, refusals, when, violations):
    """Executed, declined or not executed: so it is."""
    made = {charge.get("payment_intent") or charge["id"] for charge in charges}
    if said.outcome == "completed":
        violations.looked("I2")
        if said.resource not in made:
            violations.add("I2", f"{said.name}: reconcile says completed with {said.resource}, Stripe has charged for"
                           f" {sorted(made)}")
    elif said.outcome == "failed":
        violations.looked("I2")
        if made or not refusals:
            violations.add("I2", f"{said.name}: reconcile says failed, Stripe has charged for {sorted(made)} and declined"
                           f" {len(refusals)}")
    elif said.outcome == "not_executed":
        violations.looked("I2")
        # of a request that came later nobody could know
        if any(when[charge["arrival"]] < said.call["t0"] for charge in charges):
            violations.add("I2", f"{said.name}: reconcile says not executed at {said.call['t1']:.3f}, Stripe has charged for"
                           f" {sorted(made)}")


def check_known(said, known, violations):
    """What was known before is said, whoever told it."""
    for other in known:
        if other.call["done"] <= said.call["t0"]:
            violations.looked("I2")
            if (said.outcome, said.resource) != (other.outcome, other.resource):
                violations.add("I2", f"{said.name}: reconcile says {said.outcome} {said.resource} at {said.call['t1']:.3f},"
                               f" {other.call['s']} knew {other.outcome} {other.resource}")
            break


def check_final(said, row, sent, callers, violations):
    """What is said to be known is recorded, and nothing follows."""
    violations.looked("I7")
    if row is None:
        violations.add("I6", f"{said.name}: reconcile says {said.outcome}, and it is gone")
    elif (row["outcome"], row["resource_id"]) != (said.outcome, said.resource):
        violations.add("I2", f"{said.name}: reconcile says {said.outcome} {said.resource}, recorded is"
                       f" {row['outcome']} {row['resource_id']}")
    if said.operation[0] == "transfer":
        # whose lease has lapsed may still send: what doesn't follow is a claim
        if any(call["op"] == "stripe_claim" and (call.get("res") or {}).get("verdict") == "claimed"
               and call["t0"] >= said.call["done"] for call in callers):
            violations.add("I2", f"{said.name}: claimed after reconcile has said {said.outcome}")
    elif sent_again(sent, said.call["done"], callers):
        violations.add("I7", f"{said.name}: sent again after reconcile has said {said.outcome}")


def check_held(said, callers, violations):
    """Nothing is settled while somebody is at it."""
    for claim in callers:
        if claim["op"] != "stripe_claim" or (claim.get("res") or {}).get("verdict") != "claimed" \
                or not claim["t1"] <= said.call["t0"] or not said.call["t1"] < claim["t0"] + SendingSession.LEASE:
            continue
        violations.looked("I1")
        if not any(call["op"] == "stripe_record" and claim["t1"] <= call["t0"] <= said.call["t1"] for call in callers):
            violations.add("I1", f"{said.name}: reconcile has settled at {said.call['t1']:.3f} what {claim['s']} held")
