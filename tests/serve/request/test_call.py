"""The life cycle of a request, with a format and a responder of our own: nothing in it depends on a protocol."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from maas_ray.bundle.engine.stop import StopSignal
from maas_ray.errors import BadRequest, DeadlineExceeded, MaasError, NotFound
from maas_ray.serve.batching.item import Tensors
from maas_ray.serve.models.loaded import Loaded
from maas_ray.serve.models.manager import ModelManager
from maas_ray.serve.request.call import INLINE_READ_BYTES, Call
from maas_ray.serve.request.handler import Handler
from maas_ray.serve.request.request import Request
from maas_ray.serve.telemetry.request_record import RequestRecord
from maas_ray.serve.wire.checks import InferRequest, WantedOutput
from maas_ray.store.objects import ObstoreStore
from tests.serve.conftest import app_spec, publish
from tests.support.onnx_models import commit_bundle, linear


class Row:
    """A message: three numbers."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = numbers


class Rows:
    """A format whose messages and answers are plain numbers; notes in which thread it works."""

    def __init__(self, is_slow: bool = False) -> None:
        self.is_slow = is_slow
        self.threads: list[str] = []
        self.at_write: Callable[[], object] = lambda: None

    def may_have_priority(self, message: Row) -> bool:
        return False

    def is_slow_to_read(self, loaded: Loaded, message: Row) -> bool:
        return self.is_slow

    def read(self, loaded: Loaded, message: Row) -> InferRequest:
        self.threads.append(threading.current_thread().name)
        if len(message.numbers) != 3:
            raise BadRequest("send three numbers")
        return InferRequest(None, {"x": np.array([message.numbers], np.float32)}, (WantedOutput("y", False),), 1)

    def read_large(self, loaded: Loaded, message: Row, stop: StopSignal) -> InferRequest:
        return self.read(loaded, message)

    def write(self, loaded: Loaded, request: InferRequest, outputs: Tensors) -> list[float] | None:
        self.at_write()
        return None if self.is_slow else self.write_large(loaded, request, outputs, StopSignal())

    def write_large(self, loaded: Loaded, request: InferRequest, outputs: Tensors, stop: StopSignal) -> list[float]:
        self.threads.append(threading.current_thread().name)
        return [float(value) for value in outputs["y"].ravel()]

    def num_bytes(self, answer: list[float]) -> int:
        return 8 * len(answer)


class Outcome:
    """Notes what it receives."""

    def __init__(self) -> None:
        self.received: list[Any] = []
        self.has_ended = asyncio.Event()

    def send(self, answer: list[float]) -> None:
        self.received.append(answer)
        self.has_ended.set()

    def refuse(self, error: MaasError, headers: tuple[tuple[bytes, bytes], ...]) -> None:
        self.received += [error, dict(headers)]
        self.has_ended.set()


class Ledger:
    """Observer."""

    def __init__(self) -> None:
        self.records: list[RequestRecord] = []

    def note(self, record: RequestRecord) -> None:
        self.records.append(record)

    def close(self, timeout_s: float) -> None:
        """Nothing to write."""


class Replica:
    def __init__(self, store: ObstoreStore) -> None:
        publish(store, "linear", commit_bundle(store, linear(2.0), run="run-a"))
        self.ledger = Ledger()
        self._manager = ModelManager(store, app_spec(store, "linear"))

    def run(self, scene: Callable[["Replica"], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            self.handler = Handler(self._manager, observers=[self.ledger])
            await self._manager.start()
            try:
                await scene(self)
            finally:
                await self.handler.close(1.0)

        asyncio.run(main())

    def send(
        self, message: Row, wire: Rows, outcome: Outcome, model: str = "linear", num_bytes: int = 24, wait_s: float = 20
    ) -> Call[Row, list[float]]:
        deadline = asyncio.get_running_loop().time() + wait_s
        return self.handler.infer(Request(model, None, message, num_bytes, deadline, b"id-1", b"", wire), outcome)

    async def answer(self, message: Row, wire: Rows, **more: Any) -> list[Any]:
        outcome = Outcome()
        self.send(message, wire, outcome, **more)
        await asyncio.wait_for(outcome.has_ended.wait(), 20)
        return outcome.received


@pytest.fixture
def replica(file_store: ObstoreStore) -> Replica:
    return Replica(file_store)


def test_an_answer_is_sent_once_and_recorded(replica: Replica) -> None:
    async def scene(replica: Replica) -> None:
        assert await replica.answer(Row(1, 2, 3), Rows()) == [[2, 4, 6]]
        assert replica.handler.num_ongoing == 0
        (record,) = replica.ledger.records
        assert (record.outcome, record.request_id, record.run) == ("ok", "id-1", "run-a")
        assert (record.bytes_in, record.bytes_out, record.num_rows) == (24, 24, 1)

    replica.run(scene)


@pytest.mark.parametrize(
    ("message", "model", "kind", "version"),
    [(Row(1), "linear", BadRequest, b"1"), (Row(1, 2, 3), "nothing", NotFound, None)],
)
def test_a_refusal_names_the_version_if_there_is_one(
    replica: Replica, message: Row, model: str, kind: type[MaasError], version: bytes | None
) -> None:
    async def scene(replica: Replica) -> None:
        error, headers = await replica.answer(message, Rows(), model=model)
        assert isinstance(error, kind)
        assert headers.get(b"x-maas-version") == version
        assert replica.handler.num_ongoing == 0

    replica.run(scene)


@pytest.mark.parametrize("num_bytes", [24, INLINE_READ_BYTES + 1])
def test_slow_work_is_done_in_a_thread_and_only_large_messages_are_slow_to_read(
    replica: Replica, num_bytes: int
) -> None:
    async def scene(replica: Replica) -> None:
        here, wire = threading.current_thread().name, Rows(is_slow=True)
        assert await replica.answer(Row(1, 2, 3), wire, num_bytes=num_bytes) == [[2, 4, 6]]
        read, written = wire.threads
        assert (read == here) == (num_bytes <= INLINE_READ_BYTES)
        assert written != here

    replica.run(scene)


def test_a_request_past_its_deadline_is_refused(replica: Replica) -> None:
    async def scene(replica: Replica) -> None:
        error, _ = await replica.answer(Row(1, 2, 3), Rows(), wait_s=-1.0)
        assert isinstance(error, DeadlineExceeded)

    replica.run(scene)


def test_a_cancelled_request_gets_nothing(replica: Replica) -> None:
    async def scene(replica: Replica) -> None:
        outcome = Outcome()
        call = replica.send(Row(1, 2, 3), Rows(is_slow=True), outcome, num_bytes=INLINE_READ_BYTES + 1)
        call.cancel()
        assert await replica.answer(Row(1, 2, 3), Rows()) == [[2, 4, 6]], "the next one is not affected"
        assert outcome.received == []
        assert [record.outcome for record in replica.ledger.records] == ["cancelled", "ok"]
        assert replica.handler.num_ongoing == 0

    replica.run(scene)


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_message_is_released_once_it_was_parsed(replica: Replica, is_kept: bool) -> None:
    async def scene(replica: Replica) -> None:
        messages = [Row(1, 2, 3)]
        released = weakref.ref(messages[0])
        wire, seen = Rows(), []
        wire.at_write = lambda: seen.append(released() is None)
        outcome = Outcome()
        replica.send(messages[0] if is_kept else messages.pop(), wire, outcome)
        await asyncio.wait_for(outcome.has_ended.wait(), 20)
        assert seen == [not is_kept]

    replica.run(scene)


@pytest.mark.parametrize("is_planted", [False, True])
def test_requests_leave_no_cycles_for_the_garbage_collector(replica: Replica, is_planted: bool) -> None:
    async def scene(replica: Replica) -> None:
        outcomes = [Outcome() for _ in range(100)]
        gc.collect()
        gc.disable()
        try:
            for outcome in outcomes:
                call = replica.send(Row(1, 2, 3), Rows(), outcome)
                await asyncio.wait_for(outcome.has_ended.wait(), 20)
                if is_planted:
                    outcome.received.append(call)
            del outcomes, outcome, call
            num_kept = sum(type(each) is Call for each in gc.get_objects())
        finally:
            gc.enable()
        assert num_kept == (100 if is_planted else 0)

    replica.run(scene)
