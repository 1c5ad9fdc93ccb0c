"""Closed-loop callers over HTTP, each with inputs of its own, that write down what they saw. Judges nothing."""

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Mapping
from itertools import count
from types import MappingProxyType
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
        """Returns after that many further answered calls (by a version)."""
        deadline = time.monotonic() + timeout_s

        def have() -> int:
            return sum(self.versions.values()) if version is None else self.versions[version]

        target = have() + num_more
        while have() < target:
            assert time.monotonic() < deadline, f"{num_more} answers (version {version}) did not come: {self.versions}"
            time.sleep(0.02)

    async def _run(self) -> None:
        await self._ask_all()

    async def _ask_all(self) -> None:
        await asyncio.gather(*(self._call_on() for _ in range(self._num_callers)))

    async def _call_on(self) -> None:
        connection = Connection(self._port)
        while not self._is_over:
            self._add(await self._call(connection, f"{self._name}-{next(self._numbers)}"))
            await asyncio.sleep(self._pause_s)
        connection.close()

    def _add(self, call: Call) -> None:
        self.calls.append(call)
        if call.status == 200:
            self.versions[call.version] += 1

    async def _call(self, connection: "Connection", id: str) -> Call:
        """One question, asked once."""
        return await connection.ask(self._path, id, TIMEOUT_S)


class Connection:
    """One caller's connection to the front, opened when it is needed."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._port = port
        self._host = host
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, path: str, id: str, timeout_s: float, more: Mapping[str, str] = MappingProxyType({})) -> Call:
        """Sends one request, and says what came back.

        Args:
            path: of the infer route.
            id: its number is the input.
            timeout_s: after it the connection is given up.
            more: headers.
        """
        sent_s = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                # A connection that the front has closed in the pause is not a failed call; one that it closes after
                # the question is.
                if self._streams is None or self._streams[0].at_eof():
                    self.close()
                    self._streams = await asyncio.open_connection(self._host, self._port)
                call, keeps = await _ask(*self._streams, path, id, sent_s, more)
        except (OSError, EOFError, ValueError, TimeoutError, KeyError) as error:
            call, keeps = Call(id, sent_s, time.monotonic(), NO_ANSWER, error=repr(error)), False
        if not keeps:
            self.close()
        return call

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def _ask(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    path: str,
    id: str,
    sent_s: float,
    more: Mapping[str, str],
) -> tuple[Call, bool]:
    tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": row(number_of(id))}
    body = orjson.dumps({"id": id, "inputs": [tensor]})
    headers = {"host": "a", "x-request-id": id, "content-length": str(len(body)), **more}
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    writer.write("\r\n".join(lines).encode() + body)
    status_line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    answer = await reader.readexactly(int(headers["content-length"]))
    status = int(status_line.split(" ")[1])
    keeps = headers.get("connection", "") != "close" and status_line.startswith("HTTP/1.1")
    ended_s = time.monotonic()
    given = headers.get("x-request-id", "")
    if status != 200:
        wait_s = float(headers["retry-after"]) if "retry-after" in headers else None
        return Call(id, sent_s, ended_s, status, given, error=answer[:300].decode(), retry_after_s=wait_s), keeps
    read: dict[str, Any] = json.loads(answer)
    # Header and body both name the call; the body's id went through the batcher.
    answered_id = given if given == read.get("id") else f"{given} and {read.get('id')}"
    version = int(headers.get("x-maas-version", "0"))
    return Call(id, sent_s, ended_s, 200, answered_id, version, digest(read["outputs"][0]["data"])), keeps
