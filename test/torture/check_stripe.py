"""Calls sent: I1, I2, I3, I4, I6, I7, I8."""

import collections
import json
import re

from payments import LateSession, SendingSession


# how long a request may be under way that nobody waits for any more
HELD_UP = 5
# how long it may take, with nothing in the way, until an answer that was left behind is recorded
LEFT_BEHIND = 6
# from when on a recorder that is asked for has to come, where others have taken its place
PLACE = 2.5


def header(arrival, name):
    return next((value for key, value in arrival["headers"] if key.lower() == name.lower()), "")


def is_probe(arrival):
    """Made on purpose where a dump was restored."""
    return (arrival.get("key") or "").startswith("probe:")


def sent_again(sent, known, callers):
    """Was it certainly sent after that moment?  Who was cut off in a call before may have left one request, which
    arrives when the fake comes to it.  sent: when requests arrived."""
    after = [at for at in sent if at > known]
    cut_off = [call for call in callers if ("lost" in call or "error" in call) and call["t0"] < known
               and call["t1"] > known - HELD_UP]
    return len(after) > len(cut_off) or any(at > known + HELD_UP for at in after)


def callers_of(calls):
    """The calls of each operation, but for reconcile's."""
    of_payment = {call["args"]["key"]: call["res"]["operation"] for call in calls if call["op"] == "pay" and call.get("res")}
    found = collections.defaultdict(list)
    for call in calls:
        if call["op"] == "pay":
            found[("payment", of_payment.get(call["args"]["key"]))].append(call)
        elif call["op"] == "late":
            found[("late", call["args"]["operation"])].append(call)
        elif call["op"] in ("stripe_claim", "stripe_record"):
            found[("transfer", call["args"]["operation"])].append(call)
        elif call["op"] in ("detached", "crowd"):
            found[(call["op"], call["args"]["operation"])].append(call)
        elif call["op"] == "bulk":
            for i in range(1, call["args"]["n"] + 1):
                found[("bulk", f"{call['args']['batch']}-{i}")].append(call)
    return found


def operation_of(key):
    """Type and id: the key is type:id:UUID."""
    operation_type, rest = key.split(":", 1)
    return operation_type, rest.rsplit(":", 1)[0]


def ledger_of(connection):
    return {(row["operation_type"], row["operation_id"]): row for row in connection.execute(
        "SELECT * FROM idempotency.stripe_idempotency_keys")}


def check(calls, arrivals, effects, lulls, connection, crowd, logs, violations):
    """crowd: connections to the databases of those that go from one to the next; logs: the servers' files."""
    ledger = ledger_of(connection)
    for other in crowd:
        ledger.update(ledger_of(other))
    sent = collections.defaultdict(list)
    for arrival in arrivals:
        if arrival.get("key") and not is_probe(arrival):
            sent[operation_of(arrival["key"])].append(arrival)
    charges = collections.defaultdict(list)
    for effect in effects:
        charges[operation_of(effect["idempotency_key"])].append(effect)

    for operation, requests in sent.items():
        check_sent(operation, requests, ledger.get(operation), violations)
    check_late(calls, ledger, sent, violations)
    for operation, row in ledger.items():
        check_row(operation, row, charges[operation], connection, violations)
        check_word(operation, row, sent[operation], violations)
    check_places(calls, lulls, violations)
    check_detached(calls, ledger, lulls, violations)
    check_answers(calls, ledger, sent, violations)
    check_claims(calls, ledger, violations)
    check_payments(calls, ledger, charges, connection, not_noted(logs), violations)


def check_sent(operation, requests, row, violations):
    """What arrived was known before, is what is recorded, and one key and the same bytes."""
    name = ":".join(operation)
    violations.looked("I7")
    if len(requests) > 1:
        violations.looked("I3")
    if row is None:
        violations.add("I7", f"{name}: was sent, and the ledger doesn't know it")
        return
    keys = {arrival["key"] for arrival in requests}
    if keys != {row["idempotency_key"]}:
        violations.add("I3", f"{name}: sent with {sorted(keys)}, recorded is {row['idempotency_key']}")
    if len({arrival["body"] for arrival in requests}) != 1:
        violations.add("I3", f"{name}: sent with different bytes")
    if row["body"] is not None and bytes(row["body"]).decode() != requests[0]["body"]:
        violations.add("I7", f"{name}: sent is not what is recorded")
    if row["method"] is not None and {header(arrival, "Stripe-Version") for arrival in requests} != {row["api_version"]}:
        violations.add("I3", f"{name}: sent with versions {sorted({header(a, 'Stripe-Version') for a in requests})},"
                       f" recorded is {row['api_version']}")
    first = min(arrival["at"] for arrival in requests)
    if row["first_sent_at"] is None or row["first_sent_at"].timestamp() > first:
        violations.add("I7", f"{name}: first sent at {row['first_sent_at']}, arrived at {first:.3f}")


def check_late(calls, ledger, sent, violations):
    """What a call sent that was begun after the window's end; one that was begun before may have been held up."""
    for call in calls:
        if call["op"] != "late" or not call.get("res"):
            continue
        operation = ("late", call["args"]["operation"])
        row = ledger.get(operation)
        if row is None or row["first_sent_at"] is None:
            continue
        since = call["t0"] - row["first_sent_at"].timestamp()
        if since > LateSession.WINDOW and call["res"]["attempts"] > 0 and any(call["t0"] < arrival["at"] < call["t1"] for arrival in sent[operation]):
            violations.add("I8", f"{operation[0]}:{operation[1]}: sent again by a call of {since:.1f} s later")


def check_row(operation, row, charges, connection, violations):
    name = ":".join(operation)
    if row["generation"] != 1:
        violations.add("I3", f"{name}: generation {row['generation']}, which nobody reopened")
    if len(charges) > 1:
        violations.add("I3", f"{name}: charged {len(charges)} times")
    made = {charge.get("payment_intent") or charge["id"] for charge in charges}
    if row["outcome"] == "completed" and row["resource_id"] not in made:
        violations.add("I2", f"{name}: completed with {row['resource_id']}, and Stripe has charged for {sorted(made)}")
    if row["outcome"] in ("failed", "not_executed") and charges:
        violations.add("I2", f"{name}: {row['outcome']}, and Stripe has charged")


def check_word(operation, row, requests, violations):
    """What something on the way to Stripe has said counts for nothing: refused is what Stripe has refused."""
    if any((arrival["answer"] or {}).get("intermediary") for arrival in requests):
        violations.looked("I2")
    if row["outcome"] != "failed" or row["settled"] is not None:
        return
    said = [arrival["answer"] or {} for arrival in requests]
    if not any("intermediary" not in answer and 400 <= (answer.get("status") or 0) < 500 for answer in said):
        violations.add("I2", f"{':'.join(operation)}: failed, on the word of "
                       + ", ".join(f"{answer.get('intermediary')} {answer.get('status')}" for answer in said))


def check_places(calls, lulls, violations):
    """With nothing in the way every call finds a recorder, however many databases there are for how few places."""
    refused = collections.defaultdict(list)
    for call in calls:
        if call["op"] not in ("detached", "crowd"):
            continue
        for lull in lulls:
            if lull["start"] + PLACE <= call["t0"] and call["t1"] < lull["end"]:
                violations.looked("I7")
                if call.get("error") == "IK008":
                    refused[lull["start"]].append(call)
    for start, of_lull in refused.items():
        violations.add("I7", f"{len(of_lull)} calls are refused for want of a recorder, up to"
                       f" {of_lull[-1]['t0'] - start:.1f} s after nothing was in the way any more")


def check_detached(calls, ledger, lulls, violations):
    """Who was told what Stripe has answered needn't wait until it is recorded.  But then it is: as soon as nothing is
    in the way, unless the server has crashed."""
    told = {}
    for call in calls:
        if call["op"] == "detached" and (call.get("res") or {}).get("outcome") == "completed":
            told[call["args"]["operation"]] = call
    for call in calls:
        known = call["op"] == "watched" and told.get(call["args"]["operation"])
        if not known or call["args"]["life"] != call["args"]["now"]:
            continue
        quiet = max((call["t0"] - max(lull["start"], known["t1"]) for lull in lulls
                     if lull["start"] < call["t0"] < lull["end"]), default=0)
        if quiet >= LEFT_BEHIND:
            violations.looked("I7")
            if call["args"]["outcome"] != "completed" and not known.get("said"):
                known["said"] = True
                violations.add("I7", f"detached:{call['args']['operation']}: was told completed at {known['t1']:.3f}, and at"
                               f" {call['t0']:.3f}, after {quiet:.1f} s of quiet, it is {call['args']['outcome']}")
    for operation, call in told.items():
        row = ledger.get(("detached", operation))
        if row is None:
            violations.add("I7", f"detached:{operation}: was told completed, and is gone")
        elif lulls and call["args"]["life"] == lulls[-1]["life"] and row["outcome"] != "completed" and not call.get("said"):
            violations.add("I7", f"detached:{operation}: was told completed at {call['t1']:.3f}, and in the end it is"
                           f" {row['outcome']}")


def check_answers(calls, ledger, sent, violations):
    """What was answered once stays so, at the ledger and on the way to Stripe."""
    callers = callers_of(calls)
    sent = {operation: [arrival["at"] for arrival in requests] for operation, requests in sent.items()}
    for call in calls:
        if not call.get("res"):
            continue
        if call["op"] == "pay":
            # whatever became of the transaction
            operation = ("payment", call["res"]["operation"])
            if call["res"]["answer"][:3] in ("201", "402") and sent_again(sent.get(operation, ()), call["t1"], callers[operation]):
                violations.add("I7", f"payment:{call['res']['operation']}: sent again after its answer was known")
            continue
        if call["op"] in ("late", "crowd"):
            operation, res = (call["op"], call["args"]["operation"]), call["res"]
            if call["op"] == "late" and res["outcome"] == "unknown" and res["attempts"] == 0:
                violations.looked("I8")
        elif call["op"] == "stripe_claim" and call["res"]["verdict"] == "replay":
            operation, res = ("transfer", call["args"]["operation"]), call["res"]
        else:
            continue
        row = ledger.get(operation)
        name = ":".join(operation)
        if row is None:
            violations.add("I6", f"{name}: was answered {res['outcome']}, and is gone")
            continue
        if res["idempotency_key"] is not None and res["idempotency_key"] != row["idempotency_key"]:
            violations.add("I3", f"{name}: answered with key {res['idempotency_key']}, recorded {row['idempotency_key']}")
        if res["outcome"] in ("completed", "failed"):
            if row["outcome"] != res["outcome"] or row["resource_id"] != res["resource_id"]:
                violations.add("I2", f"{name}: {res['outcome']} {res['resource_id']} became"
                               f" {row['outcome']} {row['resource_id']}")
            if sent_again(sent.get(operation, ()), call["t1"], callers[operation]):
                violations.add("I7", f"{name}: sent again after its answer was known")


def check_claims(calls, ledger, violations):
    """stripe_claim with a lease: it is known from then on, has one claimant, and a late token of the same generation doesn't contradict."""
    by_operation = collections.defaultdict(list)
    for call in calls:
        if call["op"] in ("stripe_claim", "stripe_record"):
            by_operation[call["args"]["operation"]].append(call)
    for operation, of_operation in by_operation.items():
        recorded = None
        # who certainly holds it
        held = None
        for call in of_operation:
            claimed = call["op"] == "stripe_claim" and call.get("res") and call["res"]["verdict"] == "claimed"
            if call["op"] == "stripe_record":
                if call["may_have_committed"]:
                    held = None
            elif held is not None and call["t1"] < held["t0"] + SendingSession.LEASE:
                violations.looked("I1")
                if claimed:
                    violations.add("I1", f"transfer:{operation}: claimed at {call['t1']:.3f}, and before that at {held['t1']:.3f}")
            if claimed:
                held = call
                if ("transfer", operation) not in ledger:
                    violations.add("I6", f"transfer:{operation}: was claimed, and is gone")
            if call["op"] == "stripe_record" and call["committed"] and not call["args"]["undone"]:
                outcome = list(call["res"].values())[0]
                if recorded is not None and outcome in ("completed", "failed") and outcome != recorded:
                    violations.add("I4", f"transfer:{operation}: {outcome} after {recorded}")
                if outcome in ("completed", "failed"):
                    recorded = outcome
            elif call["op"] == "stripe_claim" and call.get("res") and call["res"]["verdict"] == "claimed" \
                    and recorded is not None:
                violations.add("I2", f"transfer:{operation}: claimed after it was {recorded}")


def not_noted(logs):
    """Operations whose result was given to a transaction that could not be noted, as it was told: each may stay an orphan."""
    text = re.compile('could not note that this transaction was given the result of Stripe operation "([^"]*)"')
    found = set()
    for log in logs:
        with open(log, encoding="utf-8", errors="replace") as lines:
            found.update(match.group(1) for match in map(text.search, lines) if match)
    return found


def check_payments(calls, ledger, charges, connection, warned, violations):
    """Client, application, ledger and Stripe agree on every payment, which has an answer."""
    clicked = {}
    for call in calls:
        if call["op"] == "pay":
            clicked[call["args"]["key"]] = call["args"]["declined"]
    rows = {row["key"]: row for row in connection.execute("""
        SELECT k.key, k.http_status, k.response, o.status, o.payment, idempotency.operation_uuid(k.key, 'user 1')::text AS operation
        FROM idempotency.idempotency_keys k
        LEFT JOIN orders o ON o.operation = idempotency.operation_uuid(k.key, 'user 1')
        WHERE k.scope = 'user 1'""")}
    for key, declined in clicked.items():
        row = rows.get(key)
        if row is None or row["http_status"] is None:
            violations.add("I2", f"payment {key}: the client has no answer")
            continue
        entry = ledger.get(("payment", row["operation"]))
        charged = charges[("payment", row["operation"])]
        if entry is None:
            violations.add("I6", f"payment {key}: the ledger doesn't know it")
            continue
        expected = (402, "declined", "failed", 0) if declined else (201, "succeeded", "completed", 1)
        got = (row["http_status"], row["status"], entry["outcome"], len(charged))
        if got != expected:
            violations.add("I2", f"payment {key}: {got} instead of {expected}")
        elif not declined and not row["payment"] == entry["resource_id"] == row["response"]["payment"] \
                == charged[0]["payment_intent"]:
            violations.add("I2", f"payment {key}: order {row['payment']}, ledger {entry['resource_id']},"
                           f" client {json.dumps(row['response'])}, Stripe {charged[0]['payment_intent']}")
    left = connection.execute("""
        SELECT 'orphan ' || operation_type || ':' || operation_id AS text FROM idempotency.stripe_orphans WHERE operation_type = 'payment'
        UNION ALL SELECT 'unknown ' || operation_type || ':' || operation_id FROM idempotency.stripe_unknown
            WHERE operation_type = 'payment'
        UNION ALL SELECT 'open claim ' || key FROM idempotency.open_claims WHERE scope = 'user 1'""").fetchall()
    for row in left:
        if row["text"].removeprefix("orphan ") not in warned:
            violations.add("I7", f"left over: {row['text']}")
    settled = {call["args"]["batch"] for call in calls if call["op"] == "bulk" and call["committed"]}
    for row in connection.execute("SELECT operation_id FROM idempotency.stripe_orphans WHERE operation_type = 'bulk'"):
        if row["operation_id"].rsplit("-", 1)[0] in settled:
            violations.add("I7", f"left over: orphan bulk:{row['operation_id']}, whose caller has committed")
    for row in connection.execute("SELECT scope, key, expires_at FROM idempotency.idempotency_keys"
                                  " WHERE expires_at < pg_catalog.clock_timestamp() - interval '30 s' LIMIT 10"):
        violations.add("I11", f"left over: {row['scope']} {row['key']}, expired at {row['expires_at']}")
