"""Starts confined children, waits for them, and kills them: the parent's side; the child's side is `server.py`."""

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
"""Time limit for starting a child. A new interpreter with the first function's imports takes 0.5 s when idle."""
_END_TIMEOUT_S = 10.0
_OUT_OF_MEMORY = (b"bad_alloc", b"MemoryError", b"memory allocation of", b"Cannot allocate memory")
"""Messages of C++, Python, Rust and the C library on standard error when memory is exhausted."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a child."""

    wall_s: float = 60.0
    """Seconds from the call to the result; then the child is killed."""
    cpu_s: float | None = None
    """CPU seconds of all its threads, rounded up; None: `wall_s` is the only limit."""
    memory_bytes: int | None = 2 << 30
    """Memory in addition to the interpreter, its imports and the data sent to it; None: no limit."""
    file_bytes: int | None = 64 << 10
    """Maximum size of a file that it writes; confined functions have no reason to write files."""
    answer_bytes: int = 1 << 30
    """Maximum size of its result."""


class Result(NamedTuple):
    """The function's result."""

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
    """Calls a function in a child process and waits for its result.

    Args:
        function: `package.module:name`; takes a dictionary and a list of buffers and returns a pair of the same.
        payload: plain values (JSON).
        blobs: buffers, which are copied into the child.
        limits: limits of the child.
        what: name of the processed object, for error messages ("the tokenizer 'x.json'").

    Raises:
        ConfinedTimeout: it took longer than `wall_s` or `cpu_s`.
        ConfinedOutOfMemory: it needed more than `memory_bytes`.
        ConfinedKilled: it died of a signal, or of an exception other than `MaasError`.
        MaasError: raised by the function itself, as the same class.
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
    """Starts a child that waits for its input; `Child.abort` ends it from any thread.

    Args:
        function: as for `call`; for a service it takes the socket and the descriptors instead.
        limits: limits of the child.
        what: as for `call`.
        is_service: whether the function serves several requests on `Child.socket` instead of one call.
        descriptors: descriptors that are duplicated for a service.

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
        raise ConfinedError(f"cannot start a process for {what}; check the machine's memory and limits") from error
    return Child(ours, status, log, STARTED.unpack(data)[0], handles[0] if handles else None, limits, what)


class Child:
    """One child process; a context manager that kills the process at its end if it still runs."""

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
        """Sends the function's arguments; `result` reports a child that is already dead."""
        self.socket.settimeout(self._limits.wall_s)
        try:
            send_frame(self.socket, payload, blobs)
        except TimeoutError:
            self._give_up()
        except OSError:
            return

    def result(self, on_stage: Callable[[str], None] = lambda stage: None) -> Result:
        """Waits for the result; a service may first report the stages of its start. Raises as `call`."""
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
            raise ConfinedKilled(f"the process for {self._what} returned an invalid message: {error}") from error
        if "error" in answer:
            raise error_of(answer["error"], answer.get("args", []))
        if "memory" in answer:
            raise self._out_of_memory()
        return Result(answer["value"], blobs)

    def abort(self) -> None:
        """Kills the child, from any thread; does nothing if it has ended."""
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
        """Whether the process has ended."""
        with self._lock:
            if not self._is_open:
                return True
            # Not `select`, which supports no descriptor above 1,023: a replica has more.
            watched = select.poll()
            watched.register(self._status, select.POLLIN)
            return bool(watched.poll(0))

    def why_it_died(self) -> MaasError:
        """The reason why a child has ended or is about to end; kills it if it does not end."""
        try:
            self._status.settimeout(_END_TIMEOUT_S)
            data = self._status.recv(ENDED.size)
        except OSError:
            self.abort()
            data = b""
        if not self._is_open:
            return ConfinedKilled(f"the process for {self._what} was stopped")
        code = os.waitstatus_to_exitcode(ENDED.unpack(data)[0]) if len(data) == ENDED.size else -signal.SIGKILL
        if code == -signal.SIGXCPU:
            return ConfinedTimeout(
                f"{self._what} exceeded the limit of {self._limits.cpu_s:g} s of CPU time and was stopped"
            )
        words = self._last_words()
        if any(word in words for word in _OUT_OF_MEMORY):
            return self._out_of_memory()
        if code < 0:
            name = signal.Signals(-code).name
            return ConfinedKilled(f"{self._what} crashed its process with {name}", -code)
        text = words.decode(errors="replace").strip().splitlines()[-1:]
        return ConfinedKilled(f"{self._what} ended its process: {' '.join(text)[:500]}")

    def close(self) -> None:
        """Kills the child if it still runs, and releases all resources."""
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
        raise ConfinedTimeout(f"{self._what} exceeded the limit of {self._limits.wall_s:g} s and was stopped")

    def _out_of_memory(self) -> ConfinedOutOfMemory:
        limit = self._limits.memory_bytes
        allowed = "the machine has" if limit is None else f"its limit of {limit} bytes"
        return ConfinedOutOfMemory(f"{self._what} needs more memory than {allowed}")

    def _last_words(self) -> bytes:
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), 4096, max(0, size - 4096))


def error_of(code: str, args: Sequence[Any]) -> MaasError:
    """The `MaasError` that a child raised, by its code; the same class if its arguments fit."""
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
