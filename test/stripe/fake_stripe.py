#!/usr/bin/env python3
"""A fake Stripe for tests: real idempotency, and faults on demand.

    fake_stripe.py [--port N] [--control-port N] [--tls-dir DIR] [--stdin] [--log] [--guide]

Listens on loopback only.  When it is ready it prints one line of JSON with its
ports, and goes on until SIGTERM or SIGINT; with --stdin also until its standard
input ends, so that it never outlives the test that started it.  What it does is
described in doc/fake-stripe.md.
"""

import argparse
import json
import os
import signal
import sys
import threading

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import tls                              # noqa: E402
from control import Control             # noqa: E402
from server import Listener, StripeServer, more_descriptors  # noqa: E402
from world import World                 # noqa: E402

GUIDE = """\
A fake Stripe is listening on {url}, its control API on {control}.

A payment, and the same again: one charge, and "idempotent-replayed: true"
    curl -i {url}/v1/payment_intents -u sk_test_123: -H 'Idempotency-Key: order-1' \\
        -d amount=2000 -d currency=usd -d confirm=true -d payment_method=pm_card_visa

The next payment is made, and its answer lost
    curl {control}/_control/faults -d '{{"what": "close_after", "match": {{"path": "/v1/payment_intents"}}}}'

What really happened
    curl {control}/_control/charges
    curl {control}/_control/arrivals

A day later its keys are gone
    curl {control}/_control/clock -d '{{"advance": 86400}}'

Everything else: {control}/_control/ and doc/fake-stripe.md.  Ctrl-C ends it.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="of the API (default: any free one)")
    parser.add_argument("--control-port", type=int, default=0, help="of the control API")
    parser.add_argument("--tls-dir", help="make certificates there, and listen with TLS too")
    parser.add_argument("--stdin", action="store_true", help="end when standard input does")
    parser.add_argument("--log", action="store_true", help="a line for each request on stderr")
    parser.add_argument("--guide", action="store_true", help="print how to use it with curl")
    options = parser.parse_args()

    end = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: end.set())
    more_descriptors()

    world = World()
    server = StripeServer(world, log_line if options.log else None)
    api = Listener(world, "http", server.handler("http"), port=options.port)
    listeners = [api]
    ready = {"pid": os.getpid(), "port": api.port, "url": f"http://127.0.0.1:{api.port}"}
    control = Listener(world, "control", None, port=options.control_port)
    listeners.append(control)
    ready.update(control_port=control.port, control=f"http://127.0.0.1:{control.port}")
    if options.tls_dir:
        ready["tls"] = {"ca": os.path.join(os.path.abspath(options.tls_dir), "ca.pem")}
        for name, context in tls.make(options.tls_dir).items():
            listener = Listener(world, f"tls_{name}", server.handler(f"tls_{name}"), tls=context)
            listeners.append(listener)
            ready["tls"][name] = listener.port
    control.handler = Control(world, ready).serve
    world.webhooks.start()
    for listener in listeners:
        listener.start()
    if options.stdin:
        threading.Thread(target=watch_stdin, args=(end,), daemon=True).start()

    print(json.dumps(ready), flush=True)
    if options.guide:
        print("\n" + GUIDE.format(**ready), flush=True)
    end.wait()
    sys.stderr.flush()
    os._exit(0)                         # no thread is worth waiting for


def watch_stdin(end):
    while os.read(0, 4096):
        pass
    end.set()


def log_line(request, entry):
    answer = entry["answer"] or {}
    print(f"{request.method} {request.path} connection {request.connection} request {request.number}"
          f" key {request.header('Idempotency-Key', '-')} -> {answer.get('status')}"
          + (" replayed" if answer.get("replayed") else "")
          + (f" fault {answer['fault']}" if answer.get("fault") else ""), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
