"""Listeners, one thread per connection, and the faults that strike there."""

import json
import os
import resource
import socket
import ssl
import sys
import threading
import time
import traceback

import api as api_module
import faults
import wire
from wire import BadRequest, ClientLeft

MAX_CONNECTIONS = 2000


class Closed(Exception):
    """The connection has been ended on purpose."""


class Listener:
    """A port and what is spoken there."""

    def __init__(self, world, name, handler, port=0, tls=None):
        self.world = world
        self.name = name
        self.handler = handler          # handler(connection): serves it to its end
        self.tls = tls
        self.socket = socket.create_server(("127.0.0.1", port), backlog=1024)
        self.port = self.socket.getsockname()[1]

    def start(self):
        threading.Thread(target=self.accept, daemon=True, name=self.name).start()

    def accept(self):
        while True:
            try:
                sock, _ = self.socket.accept()
            except OSError:
                time.sleep(0.05)        # out of descriptors: some will be closed
                continue
            try:
                threading.Thread(target=self.serve, args=(sock,), daemon=True).start()
            except RuntimeError:
                sock.close()            # out of threads

    def serve(self, sock):
        world = self.world
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with world.lock:
            if len(world.connections) >= MAX_CONNECTIONS:
                sock.close()
                return
            control = self.name == "control"
            number = -next(world.control_numbers) if control else next(world.connection_numbers)
            connection = wire.Connection(sock, number, control)
            world.connections[number] = connection
            fault = None
            if not control:
                world.counts["connections"] += 1
                fault = world.faults.choose("connection", {"listener": self.name})
        try:
            if fault:
                (connection.reset if fault.what == "reset_connection" else connection.close)()
                return
            if self.tls:
                sock.settimeout(30)
                try:
                    connection.sock = self.tls.wrap_socket(sock, server_side=True)
                except (OSError, ssl.SSLError):
                    with world.lock:
                        world.counts["tls_refused"] += 1
                        world.notify()
                    return
            self.handler(connection)
        except (ClientLeft, Closed):
            pass
        except Exception:
            with world.lock:
                world.internal_errors.append(traceback.format_exc())
            traceback.print_exc(file=sys.stderr)
        finally:
            with world.lock:
                world.connections.pop(number, None)
                connection.discard()
                world.notify()


def more_descriptors():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class StripeServer:
    """The API on a connection, with the faults that strike before and after it."""

    def __init__(self, world, log=None):
        self.world = world
        self.api = api_module.Api(world)
        self.log = log

    def handler(self, listener):
        return lambda connection: self.serve(connection, listener)

    def serve(self, connection, listener):
        while self.one_request(connection, listener):
            pass

    def one_request(self, connection, listener):
        """Read and answer a request; may another one follow?"""
        world = self.world
        arrival = {}

        def arriving(request):
            with world.lock:
                arrival.update(entry=world.add_arrival(request, listener))

        try:
            request = connection.read_request(arriving)
        except BadRequest as error:
            with world.lock:
                world.arrived(arrival["entry"])
            body = json.dumps({"error": {"message": str(error), "type": "invalid_request_error"}})
            self.send(connection, api_module.Answer(error.status, body.encode("utf-8")),
                      [("Connection", "close")])
            return False
        if request is None:
            if arrival:
                with world.lock:
                    world.arrived(arrival["entry"])
            return False

        entry = arrival["entry"]
        known = api_module.facts(request, listener)
        with world.lock:
            world.arrived(entry)
            request_id = world.new_id("req")
            fault = world.faults.choose(faults.GATE, known)
        keep = request.keeps_alive()
        try:
            answer, notes = self.find_answer(connection, request, entry, request_id, known, fault)
            if answer is None:
                raise Closed()
            after = None
            if notes.get("by") != "gate":
                with world.lock:
                    after = world.faults.choose(faults.ANSWER, known)
            self.give_answer(connection, answer, notes, keep, after, entry)
        except (Closed, ClientLeft):
            with world.lock:
                if entry["answer"] is None:
                    entry["answer"] = {"status": None, "request_id": request_id,
                                       "fault": fault and fault.number}
                world.notify()
            raise
        finally:
            if self.log:
                self.log(request, entry)
        return keep

    # before

    def find_answer(self, connection, request, entry, request_id, known, fault):
        if fault is not None:
            if fault.what.endswith("_before") and fault.what != "hang_before":
                self.end(connection, fault.what)
            if fault.what == "hang_before":
                if not self.hang(connection, fault):
                    raise Closed()
            else:
                return self.gate_answer(request, request_id, fault), {
                    "by": "gate", "fault": fault.number, "request_id": request_id,
                    "replayed": False, **self.intermediary(fault)}
        return self.api.answer(request, entry, request_id,
                               lambda held: self.hang(connection, held), known)

    @staticmethod
    def intermediary(fault):
        return {"intermediary": fault.what} if fault.what in faults.INTERMEDIARY else {}

    def gate_answer(self, request, request_id, fault):
        """The answer of a fault, where nothing has been done."""
        key = request.header("Idempotency-Key")
        error = faults.api_error(fault, key)
        headers = api_module.extra_headers(fault)
        if error is None:
            status, kind, text, more = faults.plain_answer(fault)
            return api_module.Answer(status, text.encode("utf-8"), more + headers, kind)
        headers.append(("Request-Id", request_id))
        if key:
            headers += [("Idempotency-Key", key), ("Original-Request", request_id)]
        return api_module.error_answer(error).with_headers(headers)

    def hang(self, connection, fault):
        """Hold a request; True where it goes on, False where it is dropped."""
        world = self.world
        reader, writer = os.pipe()
        on_leave = fault.get("on_leave", "drop" if fault.what == "hang_before" else "continue")
        deadline = time.monotonic() + fault.get("ms") / 1000 if fault.get("ms") else None

        def release():
            os.write(writer, b"x")

        with world.lock:
            epoch, left = world.epoch, False
            fault.held.add(release)
            if fault.cleared:
                release()
            world.notify()
        try:
            while True:
                if left:                # wait for the release alone
                    ready = wire.wait_for(reader, deadline)
                else:
                    ready = connection.wait_readable(deadline, reader)
                if not ready or reader in ready:
                    return world.epoch == epoch
                if connection.client_left():
                    left = True
                    with world.lock:
                        fault.gone += 1
                        world.notify()
                    if on_leave != "hold":
                        return on_leave == "continue"
        finally:
            with world.lock:
                fault.held.discard(release)
                os.close(reader)
                os.close(writer)
                world.notify()

    @staticmethod
    def end(connection, what):
        (connection.reset if what.startswith("reset") else connection.close)()
        raise Closed()

    # after

    def send(self, connection, answer, more=()):
        connection.send(self.head(answer, more) + answer.body)

    def head(self, answer, more=(), length=True):
        moment = time.gmtime(self.world.clock.now())
        headers = [("Server", "nginx"), ("Date", time.strftime("%a, %d %b %Y %H:%M:%S GMT", moment)),
                   ("Content-Type", answer.content_type)]
        if length:
            headers.append(("Content-Length", len(answer.body)))
        return wire.head(answer.status, headers + list(answer.headers) + list(more))

    def give_answer(self, connection, answer, notes, keep, fault, entry):
        """Send the answer, as a fault wants it."""
        world = self.world
        more = [] if keep else [("Connection", "close")]
        if fault is not None:
            notes["fault"] = fault.number
            more += api_module.extra_headers(fault)
        what = fault.what if fault is not None else None
        if what in faults.INTERMEDIARY:
            notes.update(self.intermediary(fault))
            status, kind, text, headers = faults.plain_answer(fault)
            answer = api_module.Answer(status, text.encode("utf-8"), headers, kind)
        with world.lock:
            entry["answer"] = {"status": answer.status, **notes, "sent": "none" if what in (
                "reset_after", "close_after", "hang_after") else what or "whole"}
            world.notify()

        if what in ("reset_after", "close_after"):
            self.end(connection, what)
        if what == "hang_after" and not self.hang(connection, fault):
            raise Closed()
        if what == "cut":
            self.cut(connection, answer, more, fault)
        elif what == "garbled":
            self.garbled(connection, answer, more, fault)
        elif what == "drip":
            self.drip(connection, answer, more, fault)
        elif what == "huge":
            self.huge(connection, answer, more, fault)
        else:
            connection.idle = keep      # once the client has the answer it is
            self.send(connection, answer, more)
        if what in ("close_idle", "reset_idle"):
            self.end_idle(connection, entry["listener"], fault)
        if not keep:
            connection.close()

    def end_idle(self, connection, listener, fault):
        """End a kept-alive connection after a while, or when the next request comes."""
        world = self.world
        if fault.get("ms") and connection.wait_readable(
                time.monotonic() + fault.get("ms") / 1000, connection.wake_reader):
            entries = []

            def arriving(request):
                with world.lock:
                    entries.append(world.add_arrival(request, listener))

            try:
                connection.read_request(arriving)
            except BadRequest:
                pass
            with world.lock:
                for entry in entries:
                    world.arrived(entry)
                    entry["answer"] = {"status": None, "fault": fault.number}
        self.end(connection, fault.what)

    def cut(self, connection, answer, more, fault):
        """A part of the answer, and the end of the connection."""
        if fault.get("where", "body") == "head":
            data = self.head(answer, more)
            data = data[:fault.get("keep", len(data) // 2)]
        elif fault.get("chunked"):
            part = answer.body[:fault.get("keep", len(answer.body) // 2)]
            data = (self.head(answer, [*more, ("Transfer-Encoding", "chunked")], length=False)
                    + b"%x\r\n%b\r\n" % (len(part), part))
        else:
            data = self.head(answer, more) + answer.body[:fault.get("keep", len(answer.body) // 2)]
        connection.send(data)
        if fault.get("how", "fin") == "rst":
            connection.flush()
        self.end(connection, "reset" if fault.get("how", "fin") == "rst" else "close")

    def garbled(self, connection, answer, more, fault):
        """All the bytes, and wrong ones among them."""
        if fault.get("where", "body") == "head":
            connection.send(b"\x15\x03\x01HTPP/x.y two hundred\r\n\x00\xff: \xfe\r\n\r\n" + answer.body)
            self.end(connection, "close")
        middle = len(answer.body) // 2
        wrong = bytes(byte ^ 0xA5 for byte in answer.body[middle:middle + 16])
        answer.body = answer.body[:middle] + wrong + answer.body[middle + 16:]
        self.send(connection, answer, more)

    def drip(self, connection, answer, more, fault):
        """A few bytes at a time, as long as the client bears it."""
        head = self.head(answer, more)
        step, pause = max(1, fault.get("bytes", 1)), fault.get("ms", 20) / 1000
        if fault.get("where", "body") == "head":
            rest = head + answer.body
        else:
            connection.send(head)
            rest = answer.body
        for at in range(0, len(rest), step):
            if at and connection.left_within(pause):
                raise ClientLeft()
            connection.send(rest[at:at + step])

    def huge(self, connection, answer, more, fault):
        """A JSON object of many bytes: the answer, and white space after it."""
        size = max(fault.get("bytes", 16 << 20), len(answer.body))
        chunked = fault.get("chunked", False)
        more = [*more, ("Transfer-Encoding", "chunked") if chunked else ("Content-Length", size)]
        connection.send(self.head(answer, more, length=False))
        padding = b" " * 65536
        parts = [answer.body]
        sent = 0
        while sent < size:
            part = parts.pop() if parts else padding[:size - sent]
            connection.send(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
            sent += len(part)
        if chunked:
            connection.send(b"0\r\n\r\n")
