"""Starts confined children, waits for them, and kills them. Parent side; what happens in the child is in `server.py`."""

import os
import select
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any, NamedTuple, NoReturn, Self

from maas_ray.confined.frames import BadFrame, Buffer, receive_frame, send_frame
from maas_ray.confined.launch import SERVER
from maas_ray.confined.server import ENDED, STARTED
from maas_ray.errors import ConfinedError, ConfinedKilled, ConfinedOutOfMemory, ConfinedTimeout, MaasError

_START_TIMEOUT_S = 60.0
"""A fresh interpreter with the imports of the first function takes about 0.5 s on an idle machine."""
_END_TIMEOUT_S = 10.0
_OUT_OF_MEMORY = (b"bad_alloc", b"MemoryError", b"memory allocation of", b"Cannot allocate memory")
"""How C++, Python, Rust and the C library say on standard error that memory ran out."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a child may take."""

    wall_s: float = 60.0
    """Seconds from the call to the answer; the child is killed then."""
    cpu_s: float | None = None
    """Seconds of CPU of all its threads, rounded up; None: `wall_s` is the only limit."""
    memory_bytes: int | None = 2 << 30
    """Memory beyond the interpreter, what is imported, and what was sent to it; None: no limit."""
    file_bytes: int | None = 64 << 10
    """Largest file that it may write; nothing that is confined has a reason to write any."""
    answer_bytes: int = 1 << 30
    """Largest answer that is read from it."""


class Result(NamedTuple):
    """What the function returned."""

    payload: dict[str, Any]
    blobs: list[bytearray]


def call(
    function: str,
    payload: Mapping[str, Any],
    blobs: Sequence[Buffer] = (),
    limits: Limits | None = None,
    *,
    what: str = "a confined call",
) -> Result:
    """Calls a function in a child process and waits for what it returns.

    Args:
        function: `package.module:name`; takes a dictionary and a list of buffers and returns a pair of the same.
        payload: plain values (JSON).
        blobs: buffers, which are copied into the child.
        limits: of the child.
        what: what is worked on, for the messages of errors ("the tokenizer 'x.json'").

    Raises:
        ConfinedTimeout: it took longer than `wall_s` or `cpu_s`.
        ConfinedOutOfMemory: it needed more than `memory_bytes`.
        ConfinedKilled: it died of a signal, or of an exception that is none of ours.
        MaasError: what the function itself raised, as the same class.
    """
    with start(function, limits, what=what) as child:
        child.send(payload, blobs)
        return child.result()


def start(
    function: str,
    limits: Limits | None = None,
    *,
    what: str = "a confined call",
    is_service: bool = False,
    descriptors: Sequence[int] = (),
) -> "Child":
    """Starts a child that waits for what it is to work on; `Child.abort` ends it from any thread.

    Args:
        function: as for `call`; for a service it takes the socket and the descriptors instead, and speaks for itself.
        limits: of the child.
        what: as for `call`.
        is_service: whether the function serves a conversation on `Child.socket` instead of one question.
        descriptors: copies of these are given to a service.

    Raises:
        ConfinedError: no child can be started.
    """
    limits = limits or Limits()
    ours, theirs = socket.socketpair()
    status, report = socket.socketpair()
    log = _memory_file()
    job = {"function": function, "is_service": is_service, **asdict(limits)}
    try:
        with theirs, report:
            SERVER.ask(job, [theirs.fileno(), report.fileno(), log.fileno(), *descriptors])
        status.settimeout(_START_TIMEOUT_S)
        data, handles, _, _ = socket.recv_fds(status, STARTED.size, 1)
        if len(data) < STARTED.size:
            raise EOFError
    except (OSError, EOFError) as error:
        for end in (ours, status, log):
            end.close()
        raise ConfinedError(f"no process can be started for {what}; look at the machine's memory and limits") from error
    return Child(ours, status, log, STARTED.unpack(data)[0], handles[0] if handles else None, limits, what)


class Child:
    """One child process; a context manager, which kills what still runs at its end."""

    def __init__(
        self,
        data: socket.socket,
        status: socket.socket,
        log: IO[bytes],
        pid: int,
        handle: int | None,
        limits: Limits,
        what: str,
    ) -> None:
        self.socket = data
        self.pid = pid
        self._status = status
        self._log = log
        self._handle = handle
        self._limits = limits
        self._what = what
        self._deadline_s = time.monotonic() + limits.wall_s
        self._lock = threading.Lock()
        self._is_open = True

    def send(self, payload: Mapping[str, Any], blobs: Sequence[Buffer] = ()) -> None:
        """Sends what the function is called with; a child that is dead already is `result`'s news."""
        self.socket.settimeout(self._limits.wall_s)
        try:
            send_frame(self.socket, payload, blobs)
        except TimeoutError:
            self._give_up()
        except OSError:
            return

    def result(self, on_stage: Callable[[str], None] = lambda stage: None) -> Result:
        """Waits for the answer; a service may tell the stages of its start before. Raises what `call` raises."""
        try:
            answer, blobs = receive_frame(self.socket, self._limits.answer_bytes, self._deadline_s)
            while "stage" in answer:
                on_stage(str(answer["stage"]))
                answer, blobs = receive_frame(self.socket, self._limits.answer_bytes, self._deadline_s)
        except TimeoutError:
            self._give_up()
        except (EOFError, OSError) as error:
            raise self.why_it_died() from error
        except BadFrame as error:
            self.abort()
            raise ConfinedKilled(f"{self._what}: the process that worked on it answered {error}") from error
        if "error" in answer:
            raise error_of(answer["error"], answer.get("args", []))
        if "memory" in answer:
            raise self._out_of_memory()
        return Result(answer["value"], blobs)

    def abort(self) -> None:
        """Kills the child, from any thread; harmless if it has ended."""
        with self._lock:
            if not self._is_open:
                return
            try:
                if self._handle is not None:
                    signal.pidfd_send_signal(self._handle, signal.SIGKILL)
                else:
                    os.kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                return

    def has_ended(self) -> bool:
        """Whether the process is gone."""
        with self._lock:
            if not self._is_open:
                return True
            # Not `select`, which takes no number above 1,023: a replica has more open than that.
            watched = select.poll()
            watched.register(self._status, select.POLLIN)
            return bool(watched.poll(0))

    def why_it_died(self) -> MaasError:
        """The reason of the end of a child that has ended or is about to; kills it if it does not end."""
        try:
            self._status.settimeout(_END_TIMEOUT_S)
            data = self._status.recv(ENDED.size)
        except OSError:
            self.abort()
            data = b""
        if not self._is_open:
            return ConfinedKilled(f"the process that worked on {self._what} was ended")
        code = os.waitstatus_to_exitcode(ENDED.unpack(data)[0]) if len(data) == ENDED.size else -signal.SIGKILL
        if code == -signal.SIGXCPU:
            return ConfinedTimeout(f"{self._what} needed more than {self._limits.cpu_s:g} s of CPU and was ended")
        words = self._last_words()
        if any(word in words for word in _OUT_OF_MEMORY):
            return self._out_of_memory()
        if code < 0:
            name = signal.Signals(-code).name
            return ConfinedKilled(f"{self._what} made the process that worked on it die of {name}", -code)
        text = words.decode(errors="replace").strip().splitlines()[-1:]
        return ConfinedKilled(f"{self._what} made the process that worked on it end: {' '.join(text)[:500]}")

    def close(self) -> None:
        """Kills the child if it still runs, and gives everything back."""
        self.abort()
        with self._lock:
            self._is_open = False
            for end in (self.socket, self._status, self._log):
                end.close()
            if self._handle is not None:
                os.close(self._handle)
                self._handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _give_up(self) -> NoReturn:
        self.abort()
        raise ConfinedTimeout(f"{self._what} took longer than {self._limits.wall_s:g} s and was ended")

    def _out_of_memory(self) -> ConfinedOutOfMemory:
        limit = self._limits.memory_bytes
        allowed = "the machine has" if limit is None else f"the {limit} bytes that it may take"
        return ConfinedOutOfMemory(f"{self._what} needs more memory than {allowed}")

    def _last_words(self) -> bytes:
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), 4096, max(0, size - 4096))


def error_of(code: str, args: Sequence[Any]) -> MaasError:
    """The error of ours that a child raised, by its code; of the same class where its arguments fit."""
    kinds: list[type[MaasError]] = [MaasError]
    for kind in kinds:
        if kind.__dict__.get("code") == code:
            try:
                return kind(*args)
            except TypeError:
                break
        kinds.extend(kind.__subclasses__())
    return ConfinedError(" ".join(map(str, args)) or f"the child failed with {code}")


def _memory_file() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("confined"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)
