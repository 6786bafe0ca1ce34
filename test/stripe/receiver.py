#!/usr/bin/env python3
"""receiver.py: a webhook endpoint as an application has one, for tests and the demo.

What is POSTed to it is handed to the database as it came, body and
Stripe-Signature: at /claim to stripe_webhook_claim(), in one transaction with
stripe_webhook_record(), at /receive to stripe_webhook_receive().  The answers
are those that doc/webhooks.md wants: 200, 409 where somebody else is at it, 400
for what is refused with IK004, 500 for any other error.

It listens on loopback, at a port of its own, which is told by the first line of
its output, and ends when its standard input does.  Its environment says which
database (PGHOST and so on).  Where a file is named on its command line, types
of events that stand in it, one a line ("*" for all), are answered by 503 without
a look at them: the endpoint is down for these.
"""

import http.server
import json
import os
import subprocess
import sys
import threading

LIMIT = 1024 * 1024
CLAIM = """\
BEGIN;
SELECT verdict, stripe_event_id, token, account, verdict = 'claimed' AS ours
  FROM idempotency.stripe_webhook_claim({body}, {signature}) \\gset
\\if :ours
SELECT idempotency.stripe_webhook_record(:'stripe_event_id', :token, account => :'account');
\\endif
COMMIT;
\\echo :verdict
"""
RECEIVE = """\
SELECT stored FROM idempotency.stripe_webhook_receive({body}, {signature});
"""
STATEMENTS = {"/claim": CLAIM, "/receive": RECEIVE}


def literal(value):
    return "NULL" if value is None else "'" + value.replace("'", "''") + "'"


def status_of(statements, body, signature):
    """Hand it to the database; the status to answer with."""
    script = statements.format(body=literal("\\x" + body.hex()), signature=literal(signature))
    done = subprocess.run(["psql", "-XqAt", "-v", "ON_ERROR_STOP=1", "-v", "VERBOSITY=sqlstate"],
                          input=script, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        return 400 if "IK004" in done.stderr else 500
    return 409 if "in_progress" in done.stdout.split() else 200


def is_down(body):
    try:
        with open(sys.argv[1], encoding="ascii") as file:
            types = file.read().split()
    except (IndexError, OSError):
        return False
    return "*" in types or json.loads(body)["type"] in types


class Endpoint(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(min(length, LIMIT))
        statements = STATEMENTS.get(self.path)
        if statements is None:
            status = 404
        elif is_down(body):
            status = 503
        else:
            status = status_of(statements, body, self.headers.get("Stripe-Signature"))
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def main():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    while os.read(0, 4096):
        pass


if __name__ == "__main__":
    main()
