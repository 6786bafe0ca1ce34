"""run.py DIRECTORY KIND NUMBER SEED DEADLINE STRIPE_PORT CONTROL [ENDPOINT]: one session."""

import sys

from crowd import CrowdSession
from dumps import DumpingSession
from events import EventsSession
from keys import KeysSession
from payments import BulkSession, DetachedSession, LateSession, PayingSession, PersonSession, ReconcilingSession, \
    SendingSession


def main(directory, kind, number, seed, deadline, port, control, endpoint="0"):
    common = (f"{kind}-{number}", directory, seed, float(deadline))
    if kind == "keys":
        session = KeysSession(*common)
    elif kind == "paying":
        session = PayingSession(*common)
    elif kind == "sending":
        session = SendingSession(*common, port=int(port))
    elif kind == "late":
        session = LateSession(*common, control=control)
    elif kind == "reconciling":
        session = ReconcilingSession(*common)
    elif kind == "person":
        session = PersonSession(*common, control=control)
    elif kind == "bulk":
        session = BulkSession(*common)
    elif kind == "detached":
        session = DetachedSession(*common)
    elif kind == "crowd":
        session = CrowdSession(*common)
    elif kind == "dumping":
        session = DumpingSession(*common)
    elif kind == "events":
        session = EventsSession(*common, control=control, endpoint=int(endpoint))
    else:
        raise SystemExit(f"no kind of session: {kind}")
    session.run()


main(*sys.argv[1:])
