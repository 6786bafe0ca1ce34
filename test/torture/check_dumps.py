"""What was restored from a dump: I2, I3 and I6."""

import collections

from check_stripe import header, is_probe

ELSEWHERE = "elsewhere"


def check(calls, arrivals, violations):
    count = collections.Counter(call["op"] for call in calls)
    restored = [call for call in calls if call["op"] == "restored"]
    for call in restored:
        said = call["res"]
        where = "elsewhere" if said["elsewhere"] else "beside the original"
        name = f"a dump restored {where} at {call['t0']:.3f}"
        violations.looked("I3")
        for text in said["wrong"]:
            violations.add("I3" if text.startswith("derives") else "I2", f"{name} {text}")
        if said.get("passes") is False:
            violations.add("I6", f"{name}, with {said['callers']} callers: its workers come to no end")
        if said.get("noted") is False:
            violations.add("I6", f"{name}, with {said['callers']} callers: what became of a later call's caller is never noted")
    for arrival in arrivals:
        if ELSEWHERE in header(arrival, "Authorization") and not is_probe(arrival):
            violations.add("I3", f"{arrival.get('key')}: was sent by a restored copy")
    violations.told.append(
        f"dumps: {len(restored)} restored, {sum(call['res']['elsewhere'] for call in restored)} of them elsewhere, with "
        + ", ".join(str(call["res"]["callers"]) for call in restored) + " callers; "
        f"{sum(call['res']['replays'] for call in restored)} replays there; {count['not restored']} given up")
