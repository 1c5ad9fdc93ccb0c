"""An S3 service behind a proxy that fails the n-th request that changes something."""

import http.client
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

WIRE_FAULTS = ("503", "cut before it arrives", "timeout after success")
_BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_HOP = {"connection", "transfer-encoding", "content-length"}


class FaultyWire(ThreadingHTTPServer):
    """Forwards requests.

    Args:
        endpoint: of the service.
        fault: one of `WIRE_FAULTS`.
        at: number of the changing request, from 1; None: none, they are only counted.
        is_lasting: whether all requests after it fail as well, reads too.
    """

    daemon_threads = True

    def __init__(self, endpoint: str, fault: str, at: int | None = None, is_lasting: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.num_changes = 0
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.behind = urlsplit(endpoint).netloc
        self._fault, self._at, self._is_lasting = fault, at, is_lasting
        self._count_lock = threading.Lock()

    def fault_of(self, method: str) -> str | None:
        """What becomes of the next request."""
        with self._count_lock:
            is_change = method not in ("GET", "HEAD")
            self.num_changes += is_change
            if self._at is None:
                return None
            is_now = is_change and self.num_changes == self._at
            is_later = self._is_lasting and self.num_changes >= self._at
            return self._fault if is_now or is_later else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyWire

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.fault_of(self.command)
        if fault == "503":
            self._answer(503, {"Content-Type": "application/xml"}, _BUSY)
            return
        if fault != "cut before it arrives":
            behind = http.client.HTTPConnection(self.server.behind, timeout=30)
            behind.request(self.command, self.path, body, dict(self.headers))
            answer = behind.getresponse()
            content = answer.read()
            behind.close()
        if fault is not None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self._answer(answer.status, dict(answer.getheaders()), content)

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response_only(status)
        length = headers.get("Content-Length", headers.get("content-length")) if self.command == "HEAD" else None
        for name, value in headers.items():
            if name.lower() not in _HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


@contextmanager
def faulty_wire(endpoint: str, fault: str, at: int | None = None, *, is_lasting: bool = False) -> Iterator[FaultyWire]:
    """A `FaultyWire` that serves within the block."""
    wire = FaultyWire(endpoint, fault, at, is_lasting)
    thread = threading.Thread(target=wire.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield wire
    finally:
        wire.shutdown()
        thread.join(timeout=30)
        wire.server_close()
