"""HTTP/1.1 over sockets, with nothing hidden.

http.server would do for honest answers.  The faults need what it keeps to
itself: when the bytes of a request arrive, whether the client is still there,
and how a connection ends (FIN, RST, in the middle of a body).

A Connection belongs to one thread.  It numbers the requests that arrive on it.
"""

import fcntl
import os
import select
import socket
import struct
import termios
import time

MAX_HEAD = 64 * 1024
MAX_BODY = 8 * 1024 * 1024
IDLE_SECONDS = 600

REASONS = {
    100: "Continue", 200: "OK", 204: "No Content", 301: "Moved Permanently", 302: "Found",
    303: "See Other", 307: "Temporary Redirect", 308: "Permanent Redirect", 400: "Bad Request",
    401: "Unauthorized", 402: "Payment Required", 403: "Forbidden", 404: "Not Found",
    405: "Method Not Allowed", 407: "Proxy Authentication Required", 409: "Conflict", 410: "Gone",
    413: "Payload Too Large", 421: "Misdirected Request", 424: "Failed Dependency", 429: "Too Many Requests",
    431: "Request Header Fields Too Large", 451: "Unavailable For Legal Reasons",
    500: "Internal Server Error", 502: "Bad Gateway", 503: "Service Unavailable",
    504: "Gateway Timeout",
}


class BadRequest(Exception):
    """The bytes that arrived are no request that we can read."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class ClientLeft(Exception):
    """The client closed or reset the connection."""


def wait_for(descriptor, deadline):
    """Wait until a deadline for a descriptor: [it] or []."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    left = None if deadline is None else max(0, int((deadline - time.monotonic()) * 1000) + 1)
    return [fd for fd, _ in poll.poll(left)]


class Request:
    """A request as it arrived: bytes and what they say."""

    def __init__(self, connection, number):
        self.connection = connection    # number of the connection
        self.number = number            # of the request on it, from 1
        self.method = ""
        self.target = ""
        self.version = "HTTP/1.1"
        self.headers = []               # (name, value) as sent, in order
        self.body = b""
        self.complete = False           # did all of it arrive?

    @property
    def path(self):
        return self.target.partition("?")[0]

    @property
    def query(self):
        return self.target.partition("?")[2]

    def header(self, name, default=None):
        name = name.lower()
        for key, value in self.headers:
            if key.lower() == name:
                return value
        return default

    def keeps_alive(self):
        wanted = (self.header("Connection") or "").lower()
        return "close" not in wanted and (self.version != "HTTP/1.0" or "keep-alive" in wanted)


def head(status, headers, reason=None):
    """Status line and headers as bytes."""
    lines = [f"HTTP/1.1 {status} {reason or REASONS.get(status, 'Unknown')}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8")


class Connection:
    def __init__(self, sock, number, control=False):
        self.sock = sock
        self.control = control          # of the control API?
        self.number = number
        self.requests = 0
        self.idle = True                # between two requests
        self.buffer = b""
        self.interrupted = None         # "fin" or "rst", asked for by another thread
        self.wake_reader, self.wake_writer = os.pipe()

    def receive(self):
        """More bytes into the buffer; False where the client has finished."""
        try:
            # a client that writes head and body apart waits for our ACK between them
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            data = self.sock.recv(65536)
        except (OSError, ValueError):
            return False
        self.buffer += data
        return bool(data)

    def wait_readable(self, deadline, *others):
        """Wait until a deadline for the client, or for other descriptors: which are ready?"""
        pending = getattr(self.sock, "pending", None)   # TLS keeps bytes of its own
        ready = [self.sock] if pending and pending() else []
        poll = select.poll()
        try:
            poll.register(self.sock, select.POLLIN)
        except (OSError, ValueError):
            raise ClientLeft() from None
        for other in others:
            poll.register(other, select.POLLIN)
        left = None if deadline is None else max(0, int((deadline - time.monotonic()) * 1000) + 1)
        for fd, _ in poll.poll(0 if ready else left):
            ready.append(self.sock if fd == self.sock.fileno() else fd)
        return ready

    def read_request(self, arriving):
        """The next request, or None where there is none any more.

        arriving(request) is called with its first bytes, before it is complete.
        """
        self.idle = not self.buffer
        if self.idle:
            try:
                ready = self.wait_readable(time.monotonic() + IDLE_SECONDS, self.wake_reader)
            except ClientLeft:
                return None
            if self.interrupted == "rst":
                self.reset()
            if not ready or self.interrupted or not self.receive():
                return None
        self.idle = False
        self.sock.settimeout(IDLE_SECONDS)
        self.requests += 1
        request = Request(self.number, self.requests)
        arriving(request)

        while b"\r\n\r\n" not in self.buffer:
            if len(self.buffer) > MAX_HEAD:
                raise BadRequest(431, "the head of the request is too long")
            if not self.receive():
                return None
        text, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        lines = text.decode("latin-1").split("\r\n")
        words = lines[0].split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            raise BadRequest(400, "this is no HTTP/1.1 request line")
        request.method, request.target, request.version = words
        for line in lines[1:]:
            name, colon, value = line.partition(":")
            if not colon or not name or name != name.strip():
                raise BadRequest(400, "this is no header line")
            request.headers.append((name, value.strip()))

        if "100-continue" in (request.header("Expect") or "").lower():
            self.send(head(100, []))
        if "chunked" in (request.header("Transfer-Encoding") or "").lower():
            complete = self.read_chunks(request)
        else:
            length = request.header("Content-Length", "0")
            if not (length.isascii() and length.isdigit()):
                raise BadRequest(400, "Content-Length is no number")
            complete = self.read_bytes(request, int(length))
        request.complete = complete
        return request if complete else None

    def read_bytes(self, request, length):
        if len(request.body) + length > MAX_BODY:
            raise BadRequest(413, "the body of the request is too long")
        while len(self.buffer) < length:
            if not self.receive():
                request.body += self.buffer
                return False
        request.body += self.buffer[:length]
        self.buffer = self.buffer[length:]
        return True

    def read_line(self):
        while b"\r\n" not in self.buffer:
            if len(self.buffer) > MAX_HEAD or not self.receive():
                return None
        line, _, self.buffer = self.buffer.partition(b"\r\n")
        return line

    def read_chunks(self, request):
        while True:
            line = self.read_line()
            if line is None:
                return False
            try:
                size = int(line.split(b";")[0], 16)
            except ValueError:
                raise BadRequest(400, "this is no chunk") from None
            if size == 0:
                while line:
                    line = self.read_line()
                return line is not None
            if not self.read_bytes(request, size) or self.read_line() is None:
                return False

    def send(self, data):
        try:
            self.sock.sendall(data)
        except (OSError, ValueError):
            raise ClientLeft() from None

    def client_left(self):
        """Has the client gone?"""
        try:
            return self.left_within(0)
        except ClientLeft:
            return True

    def left_within(self, seconds):
        """Does the client leave within some time?  What it sends meanwhile is kept."""
        deadline = time.monotonic() + seconds
        while self.wait_readable(deadline):
            if len(self.buffer) > MAX_BODY or not self.receive():
                return True
        return False

    def flush(self):
        """Wait until the client's side has acknowledged all that was sent, or a second."""
        deadline = time.monotonic() + 1
        unsent = bytearray(4)
        while time.monotonic() < deadline:
            try:
                fcntl.ioctl(self.sock.fileno(), termios.TIOCOUTQ, unsent)
            except (OSError, ValueError):
                return
            if unsent == b"\0\0\0\0":
                return
            time.sleep(0.001)

    def close(self):
        """An orderly end: FIN."""
        for end in (lambda: self.sock.shutdown(socket.SHUT_RDWR), self.sock.close):
            try:
                end()
            except OSError:
                pass

    def reset(self):
        """A violent end: RST."""
        try:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            pass
        try:
            self.sock.close()
        except OSError:
            pass

    def interrupt(self, how):
        """Let the connection's own thread end it, if it is idle; from another thread."""
        self.interrupted = how
        os.write(self.wake_writer, b"x")

    def discard(self):
        """The end of the connection's thread."""
        self.close()
        os.close(self.wake_reader)
        os.close(self.wake_writer)
