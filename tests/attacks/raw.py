"""Client that sends raw bytes and parses responses strictly. Uses no HTTP library, so that none repairs anything."""

import select
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

WAIT_S = 12.0
"""A response that arrives later than this was caused by a timeout, not by the bytes."""


@dataclass(frozen=True)
class Answer:
    """One response as received."""

    status: int
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes = field(repr=False)

    @property
    def id(self) -> str | None:
        """Request id in the response."""
        return self.headers.get("x-request-id")


class Broken(AssertionError):
    """The received bytes are not a response: a desynchronized stream, or bytes that no server should send."""


class Talk:
    """One connection.

    Args:
        port: of the server on this machine.
        receive_bytes: size of the receive buffer; None: as the system chooses.
    """

    def __init__(self, port: int, receive_bytes: int | None = None) -> None:
        self._sock = socket.socket()
        if receive_bytes is not None:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self._sock.settimeout(WAIT_S)
        self._sock.connect(("127.0.0.1", port))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray()
        self._has_ended = False
        self.num_continues = 0
        """Number of interim responses (100) so far."""

    def __enter__(self) -> "Talk":
        return self

    def __exit__(self, *exc: object) -> None:
        self._sock.close()

    def send(self, pieces: Iterable[bytes], *, even_if_answered: bool = False) -> bool:
        """Sends until everything is sent, the server closes, or (by default) it has already answered."""
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                readable, writable, _ = select.select([self._sock], [self._sock], [], WAIT_S)
                if self._has_ended or (readable and not self._receive()):
                    return False
                if readable and not even_if_answered and b"HTTP/1.1 100" not in self._buffer:
                    return False
                if writable:
                    try:
                        rest = rest[self._sock.send(rest[:65536]) :]
                    except OSError:
                        return False
        return True

    def end_sending(self) -> None:
        """Half-closes: sends nothing more, but still reads responses."""
        self._sock.shutdown(socket.SHUT_WR)

    def read(self, *, is_head: bool = False, wait_s: float = WAIT_S) -> Answer | None:
        """Returns the next final response; None once the server has closed between two responses.

        Raises:
            Broken: it closed in the middle of one, or sent something else.
            TimeoutError: neither an answer nor an end within `wait_s`.
        """
        deadline = time.monotonic() + wait_s
        while True:
            head = self._until(b"\r\n\r\n", deadline)
            if head is None:
                return None
            answer = self._answer(head, is_head, deadline)
            if answer.status != 100:
                return answer
            self.num_continues += 1

    def wait_for_continue(self) -> bool:
        """Whether the next response is an interim one."""
        return (self._until(b"\r\n\r\n", time.monotonic() + WAIT_S) or b"").startswith(b"HTTP/1.1 100")

    def is_closed(self, wait_s: float = WAIT_S) -> bool:
        """Whether the server closes without another byte."""
        deadline = time.monotonic() + wait_s
        try:
            while not self._has_ended:
                self._wait(deadline)
        except TimeoutError:
            return False
        return not self._buffer

    def _answer(self, head: bytes, is_head: bool, deadline: float) -> Answer:
        status_line, *lines = head.decode("latin-1").split("\r\n")
        version, _, rest = status_line.partition(" ")
        if version not in ("HTTP/1.1", "HTTP/1.0") or not rest[:3].isdigit():
            raise Broken(f"not a status line: {status_line[:200]!r}")
        headers: dict[str, str] = {}
        for line in lines:
            name, colon, value = line.partition(":")
            name = name.lower()
            if not colon or (name in headers and name in ("content-length", "x-request-id")):
                raise Broken(f"header {line[:200]!r} in {head[:400]!r}")
            headers[name] = value.strip()
        status = int(rest[:3])
        if is_head or status == 100:
            return Answer(status, headers, b"")
        if "content-length" in headers:
            body = self._exactly(int(headers["content-length"]), deadline)
        elif headers.get("transfer-encoding") == "chunked":
            body = self._chunks(deadline)
        else:
            body = self._rest(deadline)
        return Answer(status, headers, body)

    def _chunks(self, deadline: float) -> bytes:
        body = b""
        while True:
            line = self._until(b"\r\n", deadline)
            size = int(line or b"!", 16)
            body += self._exactly(size, deadline)
            self._exactly(2, deadline)
            if size == 0:
                return body

    def _until(self, mark: bytes, deadline: float) -> bytes | None:
        while mark not in self._buffer:
            if self._has_ended:
                if self._buffer:
                    raise Broken(f"closed in the middle: {bytes(self._buffer[:400])!r}")
                return None
            self._wait(deadline)
        found, _, rest = bytes(self._buffer).partition(mark)
        self._buffer = bytearray(rest)
        return found

    def _exactly(self, count: int, deadline: float) -> bytes:
        while len(self._buffer) < count:
            if self._has_ended:
                raise Broken(f"closed after {len(self._buffer)} of {count} bytes of a body")
            self._wait(deadline)
        taken, self._buffer = bytes(self._buffer[:count]), self._buffer[count:]
        return taken

    def _rest(self, deadline: float) -> bytes:
        while not self._has_ended:
            self._wait(deadline)
        taken, self._buffer = bytes(self._buffer), bytearray()
        return taken

    def _wait(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([self._sock], [], [], left)[0]:
            raise TimeoutError(f"no answer and no end; so far: {bytes(self._buffer[:400])!r}")
        self._receive()

    def _receive(self) -> bool:
        try:
            data = self._sock.recv(1 << 20)
        except OSError:  # a reset is an end too
            data = b""
        self._buffer += data
        self._has_ended = not data
        return bool(data)
