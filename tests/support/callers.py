"""Closed-loop callers over HTTP, each with inputs of its own, that write down what they saw. Judges nothing."""

import asyncio
import json
import threading
import time
from collections import Counter
from itertools import count
from typing import Any

import orjson

from tests.support.ledger import NO_ANSWER, Call, digest

TIMEOUT_S = 40.0
"""After this a call counts as not answered; longer than a pool's longest answer."""


def row(number: int) -> list[float]:
    """The input of a call: exact in FP32, and no other call's."""
    return [float(number), float(number + 1), float(-number)]


def number_of(id: str) -> int:
    """The number that `row` was made from."""
    return int(id.rpartition("-")[2])


def linear_answer(id: str, version: int) -> str:
    """Digest of what version v of `linear` computes, where v is published as y = (1 + v) x."""
    return digest((1.0 + version) * value for value in row(number_of(id)))


class Callers:
    """Callers in a thread of their own, from entering to leaving.

    Args:
        port: of the front.
        path: of the infer route.
        num_callers: connections; each asks, waits for its answer, pauses and asks again.
        pause_s: between an answer and the next question.
        name: begins every id.
    """

    def __init__(self, port: int, path: str, num_callers: int = 16, pause_s: float = 0.02, name: str = "call") -> None:
        self.calls: list[Call] = []
        self.versions: Counter[int] = Counter()
        self._port = port
        self._path = path
        self._num_callers = num_callers
        self._pause_s = pause_s
        self._name = name
        self._numbers = count(1)
        self._is_over = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="callers")

    def __enter__(self) -> "Callers":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._is_over = True
        self._thread.join(TIMEOUT_S + 20)
        assert not self._thread.is_alive(), "a caller did not end"

    def wait(self, num_more: int = 50, version: int | None = None, timeout_s: float = 90.0) -> None:
        """Returns after so many more calls that were answered (by a version)."""
        deadline = time.monotonic() + timeout_s

        def have() -> int:
            return sum(self.versions.values()) if version is None else self.versions[version]

        target = have() + num_more
        while have() < target:
            assert time.monotonic() < deadline, f"{num_more} answers (version {version}) did not come: {self.versions}"
            time.sleep(0.02)

    async def _run(self) -> None:
        await asyncio.gather(*(self._call_on() for _ in range(self._num_callers)))

    async def _call_on(self) -> None:
        connection = None
        while not self._is_over:
            id = f"{self._name}-{next(self._numbers)}"
            sent_s = time.monotonic()
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    # A connection that the front has closed in the pause is not a failed call; one that it closes after
                    # the question is.
                    if connection is None or connection[0].at_eof():
                        _close(connection)
                        connection = await asyncio.open_connection("127.0.0.1", self._port)
                    call, keeps = await self._ask(*connection, id, sent_s)
            except (OSError, EOFError, ValueError, TimeoutError, KeyError) as error:
                call, keeps = Call(id, sent_s, time.monotonic(), NO_ANSWER, error=repr(error)), False
            if not keeps:
                _close(connection)
                connection = None
            self.calls.append(call)
            if call.status == 200:
                self.versions[call.version] += 1
            await asyncio.sleep(self._pause_s)
        _close(connection)

    async def _ask(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, id: str, sent_s: float
    ) -> tuple[Call, bool]:
        tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": row(number_of(id))}
        body = orjson.dumps({"id": id, "inputs": [tensor]})
        head = f"POST {self._path} HTTP/1.1\r\nhost: a\r\nx-request-id: {id}\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        status_line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        answer = await reader.readexactly(int(headers["content-length"]))
        status = int(status_line.split(" ")[1])
        keeps = headers.get("connection", "") != "close" and status_line.startswith("HTTP/1.1")
        ended_s = time.monotonic()
        if status != 200:
            return Call(
                id, sent_s, ended_s, status, headers.get("x-request-id", ""), error=answer[:300].decode()
            ), keeps
        read: dict[str, Any] = json.loads(answer)
        # Header and body both name the call; the body's id went through the batcher.
        given = headers.get("x-request-id", "")
        answered_id = given if given == read.get("id") else f"{given} and {read.get('id')}"
        version = int(headers.get("x-maas-version", "0"))
        return Call(id, sent_s, ended_s, 200, answered_id, version, digest(read["outputs"][0]["data"])), keeps


def _close(connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None) -> None:
    if connection is not None:
        connection[1].close()
