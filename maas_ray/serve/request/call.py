"""Inference call: the life cycle of one request from its last byte to its response, in any protocol.

    find the model (or wait for its load) → read → queue → run → write → count → send

Each step is a call on the loop; nothing is awaited, so a request costs no task and no future. Large bodies are read and
large responses are written in a thread (offload.py); the client gets an error if that exceeds its deadline.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter, time
from typing import Any, Generic, Protocol, TypeVar

from maas_ray.bundle.engine.stop import StopSignal
from maas_ray.display import get_logger
from maas_ray.errors import DeadlineExceeded, MaasError
from maas_ray.serve.batching.item import Item, Tensors
from maas_ray.serve.models.loaded import Loaded
from maas_ray.serve.models.manager import ModelManager
from maas_ray.serve.request.offload import Workers
from maas_ray.serve.request.request import AnswerT, MessageT, Request, Responder, WireFormat
from maas_ray.serve.request.response import internal_error
from maas_ray.serve.telemetry.request_record import Observer, RequestRecord
from maas_ray.serve.telemetry.stats import Outcome, outcome_of
from maas_ray.serve.wire.checks import InferRequest

log = get_logger(__name__)

T = TypeVar("T")
_NOTHING: Tensors = {}

INLINE_READ_BYTES = 32 << 10
"""A longer request is read in a thread if its format can be expensive; see `WireFormat.is_slow_to_read`. The most
expensive 32 KiB of JSON (lists of one number, the last of them invalid) were measured to take 6 ms."""


class CallOwner(Protocol):
    """State shared by all calls of a replica; implemented by the handler."""

    manager: ModelManager
    observers: tuple[Observer, ...]
    workers: Workers
    num_ongoing: int
    """Number of requests that were received and not answered."""


class Call(Item, Generic[MessageT, AnswerT]):
    """One inference request in progress, which is also the item in the queue.

    Args:
        owner: shared state of the replica.
        request: the request.
        responder: receives the result; not called after `cancel`.
    """

    __slots__ = ("_apart", "_format", "_id", "_infer", "_is_open", "_loaded", "_message", "_model", "_owner", "_read_at", "_responder", "_started", "_traceparent", "_version", "_waiting")  # fmt: skip

    def __init__(self, owner: CallOwner, request: Request[MessageT, AnswerT], responder: Responder[AnswerT]) -> None:
        # Takes the request apart, since its message must be released before the call ends, and sets the fields of an
        # `Item` here, not by its constructor: every request uses this path.
        (
            self._model, self._version, message, self.num_bytes, self.deadline, self._id, self._traceparent,
            self._format,
        ) = request  # fmt: skip
        self._message: Any = message
        self._owner = owner
        self._responder = responder
        self.inputs = _NOTHING
        self.num_rows = 0
        self.done = None
        self.is_waiting = False
        self.has_ended_process = False
        self.queue_s = self.run_s = 0.0
        self._is_open = True
        self._loaded: Loaded | None = None
        self._infer: InferRequest | None = None
        self._waiting: Any = None
        self._apart: tuple[StopSignal, asyncio.TimerHandle] | None = None
        self._started = self._read_at = self.arrived_s = perf_counter()

    def start(self) -> None:
        """Finds the model, or waits for its load."""
        owner = self._owner
        owner.num_ongoing += 1
        try:
            loaded = owner.manager.find(self._model, self._version)
            if loaded is not None:
                self._queue_at(loaded)
            else:
                self._waiting = owner.manager.load_soon(
                    self._model, self._version, self.deadline, self._ready, num_bytes=self.num_bytes
                )
        except Exception as error:
            self._fail(error)

    def cancel(self) -> None:
        """Cancels the request: nothing is sent, and its place in the queue is freed."""
        if not self._is_open:
            return
        if self._loaded is not None:
            self._loaded.batcher.cancel(self)
        if self._waiting is not None:
            self._waiting.cancel()
        self._close("cancelled", 499)

    def _ready(self, loaded: Loaded | None, error: MaasError | None) -> None:
        if not self._is_open:
            return
        self._read_at = perf_counter()
        try:
            if loaded is None:
                raise error or MaasError("the model was not loaded")
            self._queue_at(loaded)
        except Exception as refusal:
            self._fail(refusal)

    def _queue_at(self, loaded: Loaded, request: InferRequest | None = None) -> None:
        batcher = loaded.batcher
        if request is None:
            self._loaded = loaded
            wire, message = self._format, self._message
            if batcher.is_behind and not wire.may_have_priority(message):
                batcher.admit(self.deadline)
            if self.num_bytes > INLINE_READ_BYTES and wire.is_slow_to_read(loaded, message):
                self._read_apart(loaded, wire, message)
                return
            request = wire.read(loaded, message)
        if request.encoded:
            self._decode_apart(loaded, request)
            return
        self._infer = request
        self._message = None  # JSON has been parsed; binary tensors reference their own part of it
        self.inputs, self.num_rows, self.priority = request.inputs, request.num_rows, request.priority
        if request.timeout_us is not None:
            self._shorten(request.timeout_us / 1e6, loaded.name)
        self.arrived_s = perf_counter()
        self.done = self._finished
        batcher.put(self)

    def _shorten(self, timeout_s: float, name: str) -> None:
        """Shortens the deadline to the client's parameter 'timeout', which counts from the arrival.

        Uses the performance counter: the loop's clock may not advance while it is busy (uvloop's counts milliseconds).
        """
        left_s = timeout_s - (perf_counter() - self._started)
        if left_s <= 0:
            raise DeadlineExceeded(
                f"{name} did not start within the {timeout_s * 1e6:.0f} microseconds of the parameter 'timeout'; "
                "allow more time"
            )
        self.deadline = min(self.deadline, asyncio.get_running_loop().time() + left_s)

    def _finished(self, outputs: Tensors | None, error: MaasError | None) -> None:
        loaded, request = self._loaded, self._infer
        if loaded is None or request is None or outputs is None:
            self._fail(error or MaasError("the run returned no outputs"))
            return
        began = perf_counter()
        try:
            answer = self._format.write(loaded, request, outputs)
            if answer is None:
                self._write_apart(loaded, request, outputs, began)
                return
        except Exception as failure:
            self._cannot_write(loaded, failure)
            return
        self._send(loaded, answer, began)

    def _send(self, loaded: Loaded, answer: AnswerT, began: float) -> None:
        ended = perf_counter()
        self._is_open = False
        owner, total_s = self._owner, ended - self._started
        owner.num_ongoing -= 1
        loaded.stats.served(self.arrived_s - self._read_at, ended - began, total_s, self.num_rows, time())
        if owner.observers:
            self._tell("ok", 200, self._format.num_bytes(answer), total_s)
        self._responder.send(answer)

    def _cannot_write(self, loaded: Loaded, failure: Exception) -> None:
        """Reports the failure to the client now, not at the deadline."""
        if not isinstance(failure, MaasError):
            log.error("a response of %s cannot be written", loaded.name, exc_info=failure)
            failure = MaasError("the response cannot be written in the requested format; request other outputs")
        self._fail(failure)

    # Work in threads; its closures are apart from the code that every request runs, which they would slow down

    def _read_apart(self, loaded: Loaded, wire: WireFormat[MessageT, AnswerT], message: MessageT) -> None:
        self._do_apart(
            lambda stop: wire.read_large(loaded, message, stop),
            self.num_bytes,
            lambda request, error: self._was_read(loaded, request, error),
            "reading the request",
        )

    def _decode_apart(self, loaded: Loaded, request: InferRequest) -> None:
        """Decodes image files or texts; see decoding/decoder.py."""
        decoder, (name,) = loaded.decoder, request.encoded
        if decoder is None:
            raise MaasError(f"input {name!r} of {loaded.name} takes encoded values, but has no decoder")
        timeout_s = self.deadline - asyncio.get_running_loop().time()

        def decode(stop: StopSignal) -> InferRequest:
            rows = decoder.decode(request.inputs[name], timeout_s)
            return replace(request, inputs={**request.inputs, name: rows}, encoded=())

        self._do_apart(
            decode,
            decoder.check(request.num_rows),
            lambda decoded, error: self._was_read(loaded, decoded, error),
            "decoding the request",
        )

    def _write_apart(self, loaded: Loaded, request: InferRequest, outputs: Tensors, began: float) -> None:
        self._do_apart(
            lambda stop: self._format.write_large(loaded, request, outputs, stop),
            min(loaded.max_answer_bytes, sum(array.nbytes for array in outputs.values())),
            lambda answer, error: self._was_written(loaded, answer, error, began),
            "writing the response",
        )

    def _do_apart(
        self,
        work: Callable[[StopSignal], T],
        num_bytes: int,
        done: Callable[[T | None, Exception | None], None],
        what: str,
    ) -> None:
        stop = self._owner.workers.submit(work, num_bytes, done)
        self._apart = stop, asyncio.get_running_loop().call_at(self.deadline, self._is_late, what)

    def _is_late(self, what: str) -> None:
        self._fail(DeadlineExceeded(f"{what} exceeded the request's deadline; allow more time or send less data"))

    def _end_apart(self) -> None:
        if self._apart is not None:
            stop, timer = self._apart
            stop.set()
            timer.cancel()
            self._apart = None

    def _was_read(self, loaded: Loaded, request: InferRequest | None, error: Exception | None) -> None:
        if not self._is_open:
            return
        self._end_apart()
        if request is None:
            self._fail(error or MaasError("the request was not parsed"))
            return
        try:
            if loaded.batcher.is_closed:
                self._owner.num_ongoing -= 1
                self.start()  # another version has replaced it, and may have other inputs
                return
            self.num_bytes = max(self.num_bytes, sum(array.nbytes for array in request.inputs.values()))
            self._queue_at(loaded, request)
        except Exception as refusal:
            self._fail(refusal)

    def _was_written(self, loaded: Loaded, answer: AnswerT | None, error: Exception | None, began: float) -> None:
        if not self._is_open:
            return
        self._end_apart()
        if answer is None:
            self._cannot_write(loaded, error or MaasError("the response was not written"))
        else:
            self._send(loaded, answer, began)

    def _fail(self, error: Exception) -> None:
        if not self._is_open:
            return
        if not isinstance(error, MaasError):
            log.error("request %s failed unexpectedly", self._id.decode(), exc_info=error)
            error = internal_error(self._id)
        self._close(outcome_of(error), error.http_status)
        self._responder.refuse(error, self._loaded.headers if self._loaded is not None else ())

    def _close(self, outcome: Outcome, status: int) -> None:
        self._is_open = False
        owner, loaded = self._owner, self._loaded
        owner.num_ongoing -= 1
        if self._apart is not None:
            self._end_apart()
        self.done = None
        self.inputs, self._message = _NOTHING, None
        total_s = perf_counter() - self._started
        if loaded is not None:
            loaded.stats.finished(outcome, total_s, self.num_rows, time())
        else:
            owner.manager.stats.answered("infer", status)
        if owner.observers:
            self._tell(outcome, status, 0, total_s)

    def _tell(self, outcome: Outcome, status: int, bytes_out: int, total_s: float) -> None:
        version = self._loaded.version if self._loaded is not None else None
        record = RequestRecord(
            outcome=outcome,
            status=status,
            request_id=self._id.decode(),
            total_s=total_s,
            model=version.model if version is not None else "",
            version=version.version if version is not None else 0,
            run=version.run if version is not None else "",
            bytes_in=self.num_bytes,
            bytes_out=bytes_out,
            num_rows=self.num_rows,
            read_s=self.arrived_s - self._read_at,
            queue_s=self.queue_s,
            compute_s=self.run_s,
            traceparent=self._traceparent,
        )
        for observer in self._owner.observers:
            observer.note(record)
