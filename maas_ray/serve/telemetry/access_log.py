"""Access log: one JSON line per inference request, written by a thread. Disabled by default; contains no tensors, and
no header value except the request id.

    {"time": "2026-01-31T12:00:00.123Z", "request_id": …, "tenant": …, "model": …, "version": …, "outcome": …,
     "status": …, "bytes_in": …, "bytes_out": …, "rows": …, "queue_ms": …, "compute_ms": …, "total_ms": …, "replica": …}
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from random import random

import orjson
from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from maas_ray.display import get_logger
from maas_ray.errors import SpecError
from maas_ray.serve.telemetry.request_record import RequestRecord
from maas_ray.spec import Spec

log = get_logger(__name__)
access = logging.getLogger("maas_ray.access")

# Not blocking: a named pipe without a reader is an error, not a thread that hangs.
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK


class AccessLogSpec(Spec):
    """Access log of inference requests."""

    enabled: bool = False
    """Whether requests are logged."""
    sample: float = Field(default=1.0, ge=0, le=1)
    """Share of the requests that are logged; those that end with an error always are."""
    path: str | None = None
    """Absolute path of a file on the replica's node. Lines are appended; the file is created again if it was moved
    (logrotate). None: the logger `maas_ray.access`, at INFO."""
    max_buffered_lines: PositiveInt = 10_000
    """Maximum number of buffered lines; further ones are dropped and counted."""
    flush_every_s: PositiveFloat = 1.0
    """Maximum time until a line is written."""

    @field_validator("path")
    @classmethod
    def _is_absolute(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith("/"):
            raise ValueError("the path of the access log must be absolute, such as /var/log/maas-ray/access.jsonl")
        return value


def open_access_log(spec: AccessLogSpec, replica: str) -> "AccessLog | None":
    """Returns the access log of one replica; None if it is disabled.

    Raises:
        SpecError: its file cannot be written.
    """
    return AccessLog(spec, replica) if spec.enabled else None


class AccessLog:
    """A bounded buffer and the thread that empties it.

    Args:
        spec: what to log, and where.
        replica: id of this replica.

    Raises:
        SpecError: the file cannot be written.
    """

    def __init__(self, spec: AccessLogSpec, replica: str) -> None:
        self._sample = spec.sample
        self._limit = spec.max_buffered_lines
        self._every_s = spec.flush_every_s
        self._replica = replica
        self._lines: deque[tuple[float, RequestRecord]] = deque()
        self._num_dropped = 0
        self._num_lost = 0  # a separate counter: only the thread writes it
        self._is_failing = False
        self._is_closed = False
        self._wake = threading.Event()
        self._write: Callable[[list[bytes]], None] = _write_to_logger
        if spec.path is not None:
            path = Path(spec.path)
            self._write = lambda lines: _write_to_file(path, lines)
            try:
                self._write([])
            except OSError as error:
                raise SpecError(
                    f"the access log {spec.path} cannot be written: {error.strerror}; use a path that the replica may "
                    "write to, or omit it"
                ) from error
        else:
            _make_audible()
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._thread.start()

    @property
    def num_dropped(self) -> int:
        """Number of lines that were not written because the buffer was full or the file failed."""
        return self._num_dropped + self._num_lost

    def note(self, record: RequestRecord) -> None:
        """Buffers a request, if it is an error or in the sample."""
        if record.status < 400 and self._sample < 1.0 and random() >= self._sample:  # noqa: S311
            return
        if len(self._lines) >= self._limit or self._is_closed:
            self._num_dropped += 1
            return
        self._lines.append((time.time(), record))
        if len(self._lines) == self._limit // 2:
            self._wake.set()

    def close(self, timeout_s: float) -> None:
        """Writes the buffered lines, for at most `timeout_s`, and ends the thread; later requests are dropped."""
        self._is_closed = True
        self._wake.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.warning("writing the access log took longer than %g s; %d lines are lost", timeout_s, len(self._lines))

    def _run(self) -> None:
        while not self._is_closed:
            self._wake.wait(self._every_s)
            self._wake.clear()
            self._flush()
        self._flush()  # lines from before `close`

    def _flush(self) -> None:
        taken = [self._lines.popleft() for _ in range(len(self._lines))]  # only this thread takes any
        if not taken:
            return
        try:
            self._write([self._line(*line) for line in taken])
            self._is_failing = False
        except Exception as error:  # in any case the thread must continue, or the log ends permanently
            self._num_lost += len(taken)
            if not self._is_failing:
                log.warning("the access log cannot be written, dropping lines until it can: %s", error)
            self._is_failing = True

    def _line(self, time_s: float, record: RequestRecord) -> bytes:
        return orjson.dumps(
            {
                "time": datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
                "request_id": record.request_id,
                "tenant": record.tenant,
                "model": record.model,
                "version": record.version,
                "outcome": record.outcome,
                "status": record.status,
                "bytes_in": record.bytes_in,
                "bytes_out": record.bytes_out,
                "rows": record.num_rows,
                "queue_ms": round(record.queue_s * 1e3, 3),
                "compute_ms": round(record.compute_s * 1e3, 3),
                "total_ms": round(record.total_s * 1e3, 3),
                "replica": self._replica,
            }
        )


def _write_to_logger(lines: list[bytes]) -> None:
    for line in lines:
        access.info("%s", line.decode())


def _write_to_file(path: Path, lines: list[bytes]) -> None:
    # Opened each time, so that a file that was moved is created again. Whole lines in one append: several replicas
    # of a node may share the file.
    descriptor = os.open(path, _FLAGS, 0o640)
    try:
        rest = memoryview(b"".join(line + b"\n" for line in lines))
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    finally:
        os.close(descriptor)


def _make_audible() -> None:
    """Enables INFO, on stderr if no logging is configured: an operator who enables the log wants to see it."""
    if not access.isEnabledFor(logging.INFO):
        access.setLevel(logging.INFO)
    if not access.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        access.addHandler(handler)
