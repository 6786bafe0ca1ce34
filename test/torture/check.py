"""check.py DIRECTORY CONNINFO CONTROL SECRET...: the histories against the invariants.

Prints "I4: ..." for each violation, or how much was checked; exits with 1 where
there are any.  Only what is certain counts: where a connection broke, a call may
have been done or not, and the check takes the reading that excuses more.
"""

import collections
import contextlib
import glob
import http.client
import json
import math
import os
import re
import sys

import psycopg
from psycopg.rows import dict_row

import check_dumps
import check_events
import check_keys
import check_reconcile
import check_stripe
import crowd


class Violations:
    def __init__(self):
        self.found = collections.OrderedDict()
        self.cases = collections.Counter()
        self.told = []

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

    by_tx = collections.defaultdict(list)
    for call in calls:
        if call["tx"] is not None:
            by_tx[call["tx"]].append(call)
        else:
            # when it was certainly still under way, when its effect was certainly there
            call["committed"] = "lost" not in call and "error" not in call
            call["may_have_committed"] = "error" not in call
            call["open_until"], call["done"] = call["t0"], call["t1"]
    for tx, of_tx in by_tx.items():
        end_transaction(of_tx, ends.get(tx))
    return calls, list(ends.values())


def end_transaction(calls, end):
    """It was certainly under way until its end was sent; but where an error or a lost connection came first,
    it may have been over since the last good answer."""
    broken = end is None or "lost" in end
    last = 0
    for call in calls:
        # a lost PREPARE whose transaction was found has been no end
        if "error" in call or ("lost" in call and (call["op"] != "prepare" or end is None)):
            broken = True
            break
        last = call["t1"]
    committed = end is not None and (end.get("res") or {}).get("status") == "COMMIT"
    may_have_committed = end is not None and end["op"] == "commit" and ("lost" in end or committed)
    savepoint = None
    for i, call in enumerate(calls):
        good = "lost" not in call and "error" not in call
        call["committed"] = good and committed
        call["may_have_committed"] = good and may_have_committed
        call["open_until"] = last if broken else end["t0"]
        call["done"] = math.inf if end is None else end["t1"]
        if call["op"] == "savepoint":
            savepoint = i
        elif call["op"] == "undo" and good:
            for undone in calls[savepoint + 1:i]:
                undone.update(undone=True, committed=False, may_have_committed=False, done=call["t1"],
                              open_until=min(call["t0"], call["open_until"]))


def check_servers(calls, ends, directory, violations):
    """I1: nobody is answered by a primary that another has succeeded."""
    with open(f"{directory}/succeeded", encoding="utf-8") as lines:
        since = {int(port): float(time) for port, time in map(str.split, lines)}
    for call in calls + ends:
        if since.get(call.get("server"), math.inf) < call["t0"] and "lost" not in call:
            violations.add("I1", f"{call['s']}: {call['op']} was answered at {call['t1']:.3f} by the server on port"
                           f" {call['server']}, which had a successor at {since[call['server']]:.3f}")


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


def verdict_of(call):
    res = call.get("res")
    return res.get("verdict", "") if isinstance(res, dict) else ""


def main(directory, conninfo, control, *secrets):
    violations = Violations()
    calls, ends = histories(directory)
    arrivals = ask(control, "arrivals")["arrivals"]
    effects = ask(control, "effects?type=charge&action=create&status=succeeded")["effects"]
    declined = ask(control, "effects?type=charge&action=create&status=failed")["effects"]
    customers = ask(control, "effects?type=customer&action=create")["effects"]
    with open(f"{directory}/lulls", encoding="utf-8") as lines:
        lulls = [json.loads(line) for line in lines]
    with contextlib.ExitStack() as connections:
        connection, *others = [
            connections.enter_context(psycopg.connect(conninfo, autocommit=True, row_factory=dict_row, **where))
            for where in [{}] + [{"dbname": crowd.name_of(number)} for number in range(crowd.DATABASES)]]
        look_for_secrets(connection, violations, directory, secrets)
        check_keys.check(calls, connection, violations)
        check_stripe.check(calls, arrivals, effects + customers, lulls, connection, others,
                           glob.glob(f"{directory}/*.log"), violations)
        check_reconcile.check(calls, arrivals, effects + customers, declined, connection, violations)
        check_dumps.check(calls, arrivals, violations)
        check_events.check(calls, connection, violations)
    for call in calls:
        if call["op"] in ("surprise", "gave up"):
            violations.add("I0", f"{call['s']}: {call['op']} {call.get('error', '')}")
        elif call["op"] == "vanished":
            violations.add("I6", f"{call['s']}: prepared transaction {call['tx']} is gone")
    check_servers(calls, ends, directory, violations)
    counted = collections.Counter((call["op"], verdict_of(call)) for call in calls)
    print("# " + ", ".join(f"{op} {verdict + ' ' if verdict else ''}{n}" for (op, verdict), n in sorted(counted.items())))
    for line in violations.told:
        print(f"# {line}")
    prepared = collections.Counter(call["how"] for call in calls if call["op"] == "concluded")
    crossed = sum(call["crossed"] for call in calls if call["op"] == "concluded")
    print(f"# prepared: {prepared['commit']} committed, {prepared['rollback']} rolled back, {crossed} of them after a crash,"
          f" a restart or a fail-over; savepoints rolled back: {sum(call['op'] == 'undo' for call in calls)}")
    print(f"# by something on the way: {sum(bool((a['answer'] or {}).get('intermediary')) for a in arrivals)} answers,"
          f" {sum(bool((a['answer'] or {}).get('intermediary')) and a['answer'].get('by') != 'gate' for a in arrivals)}"
          f" of them to what Stripe has executed; lulls: {len(lulls)}")
    print(f"# {len(calls)} calls, {len(arrivals)} requests at Stripe, {len(effects)} charges")
    print("# cases: " + ", ".join(f"I{n} {violations.cases[f'I{n}']}" for n in range(1, 13)))
    sys.exit(1 if violations.report() else 0)


main(*sys.argv[1:])
