"""Requests received: I1, I2, I4, I5, I6, I10, I11, I12.

A holding is a "claimed" and how long it certainly lasted: in a transaction until
that began to end, with a lease until the lease lapsed or somebody with its token
tried to end it.
"""

import collections
import math

from keys import ABANDONED_RETENTION

# a lease isn't renewed for less
SHORT_WAIT = 0.02

ENDS = ("record", "release")
FENCED = ("record", "release", "checkpoint", "extend")


def lease_of(call):
    return call["args"].get("lease")


class Holding:
    def __init__(self, claim, tried):
        """tried: calls with this token."""
        self.claim = claim
        self.variant = claim["args"]["variant"]
        self.token = claim["res"]["token"]
        self.start = claim["t1"]
        # attempts that may have ended it: in its own transaction, or for good
        self.endings = [call for call in tried if call["op"] in ENDS and (
            call["may_have_committed"] or
            (claim["tx"] is not None and "error" not in call and not call.get("undone")))]
        if claim["tx"] is not None:
            self.until = claim["open_until"]
            self.lapses = math.inf
        else:
            self.lapses = claim["res"]["lease_expires_at"]
            for call in tried:
                if call["op"] in ("checkpoint", "extend") and call.get("res") and call["committed"] \
                        and call["t1"] < self.lapses:
                    self.lapses = max(self.lapses, list(call["res"].values())[0])
            self.until = min([self.lapses] + [call["t0"] for call in self.endings])
        self.checkpoints = [call for call in tried if call["op"] == "checkpoint" and "error" not in call]

    def certain(self, call):
        """Did it last all the time that another call took?"""
        return self.start <= call["t0"] and call["t1"] < self.until


def check(calls, connection, violations):
    by_key = collections.defaultdict(list)
    for call in calls:
        if "key" in call["args"] and call["op"] in FENCED + ("claim",):
            by_key[call["args"]["key"]].append(call)
    for key, of_key in by_key.items():
        check_key(key, of_key, violations)
    # what has a recovery point and wasn't ended is there
    check_unfinished(by_key, connection, violations)


def check_key(key, calls, violations):
    claims = [call for call in calls if call["op"] == "claim" and call.get("res")]
    tried = collections.defaultdict(list)
    for call in calls:
        if call["op"] in FENCED:
            tried[call["args"]["token"]].append(call)
    holdings = [Holding(claim, tried[claim["res"]["token"]]) for claim in claims
                if claim["res"]["verdict"] == "claimed"]
    by_token = {holding.token: holding for holding in holdings}
    results = [call for call in calls if call["op"] == "record" and call["may_have_committed"]]

    check_holdings(key, holdings, violations)
    for claim in claims:
        check_replay(key, claim, results, holdings, violations)
        check_wait(key, claim, holdings, violations)
    check_recorded(key, claims, results, violations)
    check_fencing(key, calls, holdings, by_token, violations)
    check_succession(key, calls, claims, holdings, violations)
    check_commits(key, holdings, violations)


def check_holdings(key, holdings, violations):
    """No two of them at the same moment, whichever was asked for first."""
    last = None
    for holding in sorted(holdings, key=lambda holding: holding.start):
        violations.looked("I1")
        if last is not None and holding.start < min(last.until, holding.until):
            violations.add("I5" if last.variant != holding.variant else "I1",
                           f"{key}: {holding.claim['s']} claimed at {holding.start:.3f} what {last.claim['s']} held"
                           f" from {last.start:.3f} until {last.until:.3f}")
        if last is None or holding.until > last.until:
            last = holding


def check_replay(key, claim, results, holdings, violations):
    """What is replayed is what somebody recorded for this request, and hasn't expired; a mismatch tells nothing."""
    res = claim["res"]
    told = [name for name in ("response", "response_headers", "response_body", "recovery_point", "recovery_data", "token")
            if res[name] is not None]
    if res["verdict"] == "mismatch":
        violations.looked("I5")
        if told or res["http_status"] != 422:
            violations.add("I5", f"{key}: a mismatch tells {told}, {res['http_status']}")
    if res["verdict"] != "replay":
        return
    violations.looked("I11")
    if res["response"]["for"] != claim["args"]["variant"]:
        violations.add("I5", f"{key}: {claim['s']} is replayed the other request's response")
    if not any(result["args"]["response"] == res["response"] and result["args"]["body"] == res["response_body"]
               for result in results):
        violations.add("I2", f"{key}: nobody has recorded what {claim['s']} is replayed at {claim['t1']:.3f}")
    for holding in holdings:
        if holding.certain(claim):
            violations.add("I2", f"{key}: {claim['s']} is replayed at {claim['t1']:.3f} what {holding.claim['s']} holds")
    if res["expires_at"] <= claim["t0"]:
        violations.add("I11", f"{key}: replayed at {claim['t0']:.3f} what expired at {res['expires_at']:.3f}")


def check_recorded(key, claims, results, violations):
    """From when a result is known until it expires, everybody is given it."""
    known = []
    for result in results:
        if result.get("res") and result["committed"]:
            known.append((result["done"], list(result["res"].values())[0], result["args"]))
    for claim in claims:
        if claim["res"]["verdict"] == "replay":
            res = claim["res"]
            known.append((claim["t1"], res["expires_at"],
                          {"response": res["response"], "body": res["response_body"]}))
    for since, until, result in known:
        for claim in claims:
            if not since <= claim["t0"] or not claim["t1"] < until:
                continue
            res = claim["res"]
            violations.looked("I2")
            if claim["args"]["variant"] != result["response"]["for"]:
                if res["verdict"] != "mismatch":
                    violations.add("I5", f"{key}: {claim['s']} is answered {res['verdict']} at {claim['t1']:.3f},"
                                   f" not mismatch")
            elif res["verdict"] != "replay" or res["response"] != result["response"] \
                    or res["response_body"] != result["body"]:
                violations.add("I2", f"{key}: recorded at {since:.3f} until {until:.3f}, but {claim['s']} is answered"
                               f" {res['verdict']} at {claim['t1']:.3f}")


def check_wait(key, claim, holdings, violations):
    """A claim that waited for another's end reads the clock after it."""
    if claim["res"]["verdict"] != "claimed" or lease_of(claim) is None:
        return
    began = claim["res"]["lease_expires_at"] - lease_of(claim)
    for holding in holdings:
        other = holding.claim
        if other is claim or other["tx"] is None or not holding.start <= claim["t0"] < holding.until - SHORT_WAIT \
                or claim["t1"] <= holding.until:
            continue
        violations.looked("I10")
        if began < holding.until - SHORT_WAIT:
            violations.add("I10", f"{key}: {claim['s']} waited until {holding.until:.3f} at least, and its lease"
                           f" began at {began:.3f}")


def check_fencing(key, calls, holdings, by_token, violations):
    """Once somebody else has certainly claimed, an older token is of no use."""
    for call in calls:
        if call["op"] not in FENCED or "lost" in call:
            continue
        mine = by_token.get(call["args"]["token"])
        if mine is None:
            continue
        if call.get("error") == "IK001":
            violations.looked("I4")
            if mine.claim["tx"] is None and mine.certain(call):
                violations.add("I4", f"{key}: {call['s']} was refused at {call['t1']:.3f}, though it held the key from"
                               f" {mine.start:.3f} until {mine.until:.3f}")
        if "error" in call:
            continue
        for other in holdings:
            if other is mine or other.claim["t0"] < mine.claim["t1"] or not other.claim["committed"]:
                continue
            known = other.claim["t1"] if other.claim["tx"] is None else other.claim["done"]
            if known <= call["t0"]:
                violations.add("I4", f"{key}: {call['s']} could {call['op']} at {call['t1']:.3f}, though"
                               f" {other.claim['s']} had claimed by {known:.3f}")
                break


def check_succession(key, calls, claims, holdings, violations):
    """Who claims a key that was neither recorded nor released takes it over: the same request, the next attempt,
    the last recovery point."""
    for claim in claims:
        if claim["res"]["verdict"] != "claimed":
            continue
        earlier = [holding for holding in holdings
                   if holding.claim["tx"] is None and holding.start <= claim["t0"]]
        if not earlier:
            continue
        last = max(earlier, key=lambda holding: holding.start)
        # nothing else may have happened in between
        if last.endings or any(
                call is not claim and call is not last.claim and call["done"] >= last.claim["t0"]
                and call["t0"] <= claim["t1"] and call["may_have_committed"] and (
                    (call["op"] == "claim" and ("lost" in call or (call.get("res") or {}).get("verdict") == "claimed"))
                    or call["op"] in ENDS)
                for call in calls):
            continue
        sure = [call for call in last.checkpoints if call["committed"] and call["t1"] < claim["t0"]]
        pointed = bool(sure) or last.claim["res"]["recovery_point"] is not None
        if not pointed and claim["t1"] >= last.claim["res"]["lease_expires_at"] + ABANDONED_RETENTION:
            continue
        if pointed:
            violations.looked("I6")
        if claim["args"]["variant"] != last.variant:
            violations.add("I5", f"{key}: {claim['s']} took over another request at {claim['t1']:.3f}")
        elif claim["res"]["attempt"] != last.claim["res"]["attempt"] + 1:
            violations.add("I6", f"{key}: attempt {claim['res']['attempt']} at {claim['t1']:.3f} follows"
                           f" {last.claim['res']['attempt']}, which nobody ended")
        elif sure and len(sure) == len(last.checkpoints):
            point = max(sure, key=lambda call: call["t1"])["args"]["recovery_point"]
            if claim["res"]["recovery_point"] != point:
                violations.add("I6", f"{key}: recovery point {claim['res']['recovery_point']} instead of {point}")


def check_commits(key, holdings, violations):
    """No commit without an end to what was claimed without a lease."""
    for holding in holdings:
        claim = holding.claim
        if claim["tx"] is not None and not holding.endings:
            violations.looked("I12")
        if claim["tx"] is not None and claim["committed"] and not holding.endings:
            violations.add("I12", f"{key}: {claim['s']} committed at {claim['done']:.3f} what it left open")


def check_unfinished(by_key, connection, violations):
    there = {row["key"]: row for row in connection.execute(
        "SELECT key, token, recovery_point FROM idempotency.idempotency_keys WHERE scope = 'torture'")}
    for key, calls in by_key.items():
        certain = [call for call in calls if call["op"] == "checkpoint" and call["committed"]]
        if not certain:
            continue
        last = max(certain, key=lambda call: call["t1"])
        later = [call for call in calls if call["t1"] > last["t0"] and call is not last and "error" not in call
                 and (call["op"] in FENCED or "lost" in call or call["res"]["verdict"] == "claimed")]
        if not later and (key not in there or there[key]["recovery_point"] is None):
            violations.add("I6", f"{key}: is gone, with recovery point {last['args']['recovery_point']}")
