"""Statements of the script that strikes, a line of JSON each: conninfo, and what to execute; answered by a line of
JSON: what psql would print, or null.  To start psql for each takes too long on a busy machine."""

import json
import sys

import psycopg
from psycopg.pq import ConnStatus, ExecStatus


class Statements:
    def __init__(self):
        self.conninfo = None
        self.connection = None

    def connect(self, conninfo):
        if self.conninfo != conninfo:
            self.disconnect()
        if self.connection is None:
            self.connection = psycopg.connect(conninfo, autocommit=True, connect_timeout=20)
            self.conninfo = conninfo
        return self.connection.pgconn

    def disconnect(self):
        if self.connection is not None:
            self.connection.close()
        self.connection = None

    def execute(self, conninfo, text):
        # it may be gone since the last time
        for _ in range(2):
            try:
                server = self.connect(conninfo)
                done = server.exec_(text.encode())
                if server.status == ConnStatus.OK:
                    return self.shown(done)
            except (psycopg.Error, OSError, MemoryError):
                pass
            self.disconnect()
        return None

    @staticmethod
    def shown(done):
        if done.status == ExecStatus.TUPLES_OK:
            return "\n".join("|".join((done.get_value(row, column) or b"").decode() for column in range(done.nfields))
                             for row in range(done.ntuples))
        return "" if done.status == ExecStatus.COMMAND_OK else None


def main():
    statements = Statements()
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(statements.execute(asked["conninfo"], asked["text"])), flush=True)


main()
