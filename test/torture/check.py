"""check.py DIRECTORY CONNINFO CONTROL SECRET...: the histories against the invariants.

Prints "I4: ..." for each violation, or how much was checked; exits with 1 where
there are any.  Only what is certain counts: where a connection broke, a call may
have been done or not, and the check takes the reading that excuses more.
"""

import collections
import glob
import http.client
import json
import math
import os
import re
import sys

import psycopg
from psycopg.rows import dict_row

import check_events
import check_keys
import check_stripe


class Violations:
    def __init__(self):
        self.found = collections.OrderedDict()
        self.cases = collections.Counter()

    def looked(self, invariant):
        """One more case in which it could have been violated."""
        self.cases[invariant] += 1

    def add(self, invariant, text):
        self.found.setdefault(invariant, []).append(text)

    def report(self):
        for invariant, texts in sorted(self.found.items(), key=lambda item: int(item[0][1:])):
            for text in texts[:10]:
                print(f"{invariant}: {text}")
            if len(texts) > 10:
                print(f"{invariant}: and {len(texts) - 10} more")
        return bool(self.found)


def histories(directory):
    """All calls by when they were sent; ends of transactions by number."""
    calls, ends = [], {}
    for file in glob.glob(f"{directory}/*.jsonl"):
        with open(file, encoding="utf-8") as lines:
            for line in lines:
                call = json.loads(line)
                call.setdefault("tx", None)
                if call["op"] in ("commit", "rollback"):
                    ends[call["tx"]] = call
                else:
                    calls.append(call)
    calls.sort(key=lambda call: call["t0"])

    # a transaction without an end was lost after its last answer, at any time
    last = {}
    for call in calls:
        if call["tx"] is not None:
            last[call["tx"]] = max(last.get(call["tx"], 0), 0 if "lost" in call else call["t1"])
    for call in calls:
        tx = call["tx"]
        end = ends.get(tx)
        call["committed"] = "lost" not in call and "error" not in call and (
            tx is None or (end is not None and end.get("res", {}).get("status") == "COMMIT"))
        if tx is None:
            call["may_have_committed"] = "error" not in call
        else:
            call["may_have_committed"] = "error" not in call and end is not None and end["op"] == "commit" and (
                "lost" in end or call["committed"])
        # when it was certainly still under way, when its effect was certainly there
        call["open_until"] = call["t0"] if tx is None else \
            end["t0"] if end is not None and "lost" not in end else last[tx]
        call["done"] = call["t1"] if tx is None else end["t1"] if end is not None else math.inf
    return calls


def ask(control, what):
    connection = http.client.HTTPConnection(control, timeout=120)
    connection.request("GET", f"/_control/{what}")
    answer = connection.getresponse()
    text = answer.read()
    if answer.status != 200:
        raise SystemExit(f"{what}: {answer.status} {text[:200]}")
    return json.loads(text)


def look_for_secrets(connection, violations, directory, secrets):
    """I9: in what the servers logged, in every table and every catalog."""
    text = re.compile("|".join(re.escape(secret) for secret in secrets))
    for file in glob.glob(f"{directory}/*.log"):
        violations.looked("I9")
        with open(file, encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if text.search(line):
                    violations.add("I9", f"{os.path.basename(file)}, line {number}")
    for row in connection.execute(
            "SELECT c.oid::regclass::text AS name FROM pg_class c WHERE c.relkind IN ('r', 'v', 'm')"
            " AND c.relname NOT IN ('pg_statistic', 'pg_shadow', 'pg_authid', 'pg_hba_file_rules')").fetchall():
        found = connection.execute(f"SELECT count(*) AS n FROM {row['name']} t WHERE t::text ~ %s",
                                   (text.pattern,)).fetchone()
        # the query that asks names them itself
        if found["n"] > 0 and row["name"] not in ("pg_stat_activity", "pg_prepared_statements", "pg_cursors"):
            violations.add("I9", f"in {row['name']}")


def main(directory, conninfo, control, *secrets):
    violations = Violations()
    calls = histories(directory)
    arrivals = ask(control, "arrivals")["arrivals"]
    effects = ask(control, "effects?type=charge&action=create&status=succeeded")["effects"]
    with psycopg.connect(conninfo, autocommit=True, row_factory=dict_row) as connection:
        look_for_secrets(connection, violations, directory, secrets)
        check_keys.check(calls, connection, violations)
        check_stripe.check(calls, arrivals, effects, connection, violations)
        check_events.check(calls, connection, violations)
    for call in calls:
        if call["op"] in ("surprise", "gave up"):
            violations.add("I0", f"{call['s']}: {call['op']} {call.get('error', '')}")
    counted = collections.Counter((call["op"], (call.get("res") or {}).get("verdict", "")) for call in calls)
    print("# " + ", ".join(f"{op} {verdict + ' ' if verdict else ''}{n}" for (op, verdict), n in sorted(counted.items())))
    print(f"# {len(calls)} calls, {len(arrivals)} requests at Stripe, {len(effects)} charges")
    print("# cases: " + ", ".join(f"I{n} {violations.cases[f'I{n}']}" for n in range(1, 13)))
    sys.exit(1 if violations.report() else 0)


main(*sys.argv[1:])
