"""The ledger finds what is planted, and the callers find a front that drops answers."""

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from maas_ray.store.objects import ObstoreStore
from tests.serve.conftest import app_spec, publish, serve_app
from tests.support.callers import Callers, linear_answer
from tests.support.ledger import NO_ANSWER, Attempt, Call, Record, Verdict, VoidRun, judge, read_records, save_history
from tests.support.onnx_models import commit_bundle, linear
from tests.support.patient import PatientCallers, longest_silence_s

CALLS = tuple(
    Call(f"call-{n}", n, n + 0.5, 200, f"call-{n}", 1 + n % 2, linear_answer(f"call-{n}", 1 + n % 2)) for n in range(20)
)
RECORDS = tuple(Record(call.id, 200, "a") for call in CALLS)


def verdict(calls: tuple[Call, ...] = CALLS, records: tuple[Record, ...] = RECORDS, **more: object) -> Verdict:
    return judge(calls, records, linear_answer, events={"kills": (2, 2)}, **more)  # type: ignore[arg-type]


def changed(index: int, **changes: object) -> tuple[Call, ...]:
    return (*CALLS[:index], replace(CALLS[index], **changes), *CALLS[index + 1 :])  # type: ignore[arg-type]


def test_a_history_without_a_fault_is_clean_and_bounded() -> None:
    found = verdict()
    assert found.faults == {}
    assert str(found) == "0 of 20 calls failed, lost or wrong; 95 % upper bound 1.5e-01"


@pytest.mark.parametrize(
    ("calls", "records", "faults"),
    [
        (changed(3, status=NO_ANSWER, answered_id="", digest=""), RECORDS, {"lost": ("call-3",)}),
        (changed(3, status=NO_ANSWER), RECORDS[:3] + RECORDS[4:], {"lost": ("call-3",)}),
        (changed(3, status=503), RECORDS, {"lost": ("call-3",)}),
        (changed(3, status=503), (*RECORDS[:3], Record("call-3", 503), *RECORDS[4:]), {"failed": ("call-3",)}),
        (changed(3, status=500), RECORDS[:3] + RECORDS[4:], {"failed": ("call-3",)}),
        (changed(3, digest=CALLS[4].digest), RECORDS, {"wrong": ("call-3",)}),
        (changed(3, version=1), RECORDS, {"wrong": ("call-3",)}),
        (changed(3, answered_id="call-4"), RECORDS, {"wrong": ("call-3",)}),
        (changed(3, answered_id="call-99"), RECORDS, {"phantoms": ("call-99",)}),
        (CALLS, (*RECORDS, Record("call-99", 200)), {"phantoms": ("call-99",)}),
        (CALLS, (*RECORDS, Record("call-3", 200, "b")), {"duplicated": ("call-3",)}),
        ((*CALLS, CALLS[3]), RECORDS, {"duplicated": ("call-3",)}),
        (CALLS, RECORDS[:3] + RECORDS[4:], {"unrecorded": ("call-3",)}),
    ],
)
def test_a_planted_fault_is_found_under_its_name(
    calls: tuple[Call, ...], records: tuple[Record, ...], faults: dict[str, tuple[str, ...]]
) -> None:
    found = verdict(calls, records)
    assert found.faults == faults
    assert next(iter(faults)) in str(found)


def test_every_answer_of_a_version_that_must_not_answer_is_wrong() -> None:
    found = judge(CALLS, RECORDS, lambda id, version: None if version == 2 else linear_answer(id, version), events={})
    assert found.wrong == tuple(call.id for call in CALLS if call.version == 2)


def test_a_replica_takes_its_last_lines_with_it_but_not_older_ones() -> None:
    missing = (*RECORDS[:3], *RECORDS[4:10], *RECORDS[11:])
    assert verdict(records=missing, kills_s=(10.0,), grace_s=1.0).unrecorded == ("call-3",)


@pytest.mark.parametrize(("took_s", "is_late"), [(0.4, False), (1.4, False), (1.6, True), (9.0, True)])
def test_an_attempt_beyond_its_deadline_and_a_second_is_late_whatever_it_got(took_s: float, is_late: bool) -> None:
    attempts = (Attempt(3.0, 3.0 + took_s, 0.5, 504), Attempt(13.0, 13.1, 0.5, 200))
    found = verdict(changed(3, attempts=attempts))
    assert found.faults == ({"late": ("call-3",)} if is_late else {})


def test_two_replicas_may_have_run_a_call_only_if_something_happened_to_it() -> None:
    twice = (*RECORDS, Record("call-3", 200, "b"), Record("call-4", 200, "b"))
    assert verdict(records=twice, may_repeat=lambda call: call.id == "call-3").duplicated == ("call-4",)
    assert verdict((*CALLS, CALLS[3]), may_repeat=lambda call: True).duplicated == ("call-3",), "an id of two callers"


@pytest.mark.parametrize(
    ("statuses", "silence_s"), [({}, 1.0), ({7: 503, 8: NO_ANSWER}, 3.0), (dict.fromkeys(range(20), 503), 12.0)]
)
def test_the_longest_silence_is_between_right_answers_within_the_window(
    statuses: dict[int, int], silence_s: float
) -> None:
    calls = [replace(call, status=statuses.get(int(call.ended_s), 200)) for call in CALLS]
    assert longest_silence_s(calls, 3.5, 15.5) == silence_s


def test_a_run_with_fewer_events_than_planned_proves_nothing() -> None:
    with pytest.raises(VoidRun, match="'kills': '1 of 2'"):
        judge(CALLS, RECORDS, linear_answer, events={"kills": (1, 2), "swaps": (4, 4)})
    with pytest.raises(VoidRun, match="nobody called"):
        judge((), RECORDS, linear_answer, events={})


def test_records_are_read_from_all_files_and_nothing_is_skipped(tmp_path: Path) -> None:
    lines = [json.dumps({"request_id": f"call-{n}", "status": 200, "replica": "a"}) + "\n" for n in range(4)]
    (tmp_path / "a.jsonl").write_text("".join(lines[:2]))
    (tmp_path / "b.jsonl").write_text("".join(lines[2:]) + lines[0][:20])
    assert read_records(f"{tmp_path}/*.jsonl") == list(RECORDS[:4])
    (tmp_path / "c.jsonl").write_text(lines[0][:20] + "\n" + lines[1])
    with pytest.raises(VoidRun, match="c.jsonl has a line that is not a record"):
        read_records(f"{tmp_path}/*.jsonl")
    with pytest.raises(VoidRun, match="no record of any replica"):
        read_records(f"{tmp_path}/none/*.jsonl")


def test_a_history_holds_all_that_the_verdict_was_made_from(tmp_path: Path) -> None:
    path = tmp_path / "kept" / "history.jsonl"
    save_history(path, CALLS, RECORDS, {"seed": 3})
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert kept[0] == {"notes": {"seed": 3}}
    calls = [entry["call"] for entry in kept if "call" in entry]
    assert tuple(Call(**call | {"attempts": tuple(call["attempts"])}) for call in calls) == CALLS
    assert tuple(Record(**entry["record"]) for entry in kept if "record" in entry) == RECORDS


class ScriptedFront:
    """Answers the first attempts of each call as scripted, and the next ones right; `y = 2 x`."""

    SILENCE_S = 2.0

    def __init__(self, *script: str) -> None:
        self._script = script
        self.num_attempts: Counter[str] = Counter()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                message = await _message(reader)
                body = json.loads(message.partition(b"\r\n\r\n")[2])
                turn = self.num_attempts[body["id"]]
                self.num_attempts[body["id"]] += 1
                act = self._script[turn] if turn < len(self._script) else "right"
                if act == "drop":
                    return
                if act == "silence":
                    await asyncio.sleep(self.SILENCE_S)
                writer.write(self._answer(act, body))
        except EOFError:
            pass
        finally:
            writer.close()

    def _answer(self, act: str, body: dict[str, Any]) -> bytes:
        if act in ("right", "silence"):
            data = [2.0 * value for value in body["inputs"][0]["data"]]
            text, status = json.dumps({"id": body["id"], "outputs": [{"data": data}]}), "200 OK\r\nx-maas-version: 1"
        else:
            text = "<html>" if act == "html" else json.dumps({"error": "busy"})
            status = {"refusal": "503 x\r\nretry-after: 0", "late": "504 x", "html": "503 x", "bad": "400 x"}[act]
        lines = [f"HTTP/1.1 {status}", f"x-request-id: {body['id']}", f"content-length: {len(text)}", "", text]
        return "\r\n".join(lines).encode()


@pytest.mark.parametrize(
    ("script", "repeats", "statuses", "faults"),
    [
        (("right",), True, [200], set()),
        (("refusal", "drop", "late"), True, [503, NO_ANSWER, 504, 200], set()),
        (("silence",), True, [200], {"late"}),
        (("bad",), True, [400], {"failed"}),
        (("html",), True, [503], {"failed"}),
        (("refusal",), False, [503], {"failed"}),
        (("drop",), False, [NO_ANSWER], {"lost"}),
    ],
)
def test_patient_callers_repeat_what_may_be_repeated_and_note_each_attempt(
    script: tuple[str, ...], repeats: bool, statuses: list[int], faults: set[str]
) -> None:
    front = ScriptedFront(*script)
    with (
        listening(front.serve) as port,
        PatientCallers(port, "/x", [0.5], repeats=repeats, num_callers=2, pause_s=0.01) as callers,
    ):
        time.sleep(0.5 + ScriptedFront.SILENCE_S * ("silence" in script))
    assert len(callers.calls) > 1
    records = [Record(call.id, 200) for call in callers.calls if call.status == 200]
    found = judge(callers.calls, records, linear_answer, events={})
    assert {name for name, ids in found.faults.items() if len(ids) == len(callers.calls)} == faults == set(found.faults)
    for call in callers.calls:
        assert [attempt.status for attempt in call.attempts] == statuses
        assert front.num_attempts[call.id] == len(statuses)


def test_callers_know_how_long_their_own_machine_held_them_up() -> None:
    front = ScriptedFront()
    with listening(front.serve) as port, PatientCallers(port, "/x", [0.5], num_callers=1) as callers:
        callers.wait(3)
        before_s = callers.longest_stall_s
        callers.loop.call_soon_threadsafe(time.sleep, before_s + 0.3)
        callers.wait(3)
    assert callers.longest_stall_s > before_s + 0.2


class DroppingProxy:
    """Passes bytes on in both directions, but closes the connection in the place of each n-th answer."""

    def __init__(self, to_port: int, every: int) -> None:
        self.num_dropped = 0
        self._to_port = to_port
        self._every = every
        self._num_answers = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind_reader, behind_writer = await asyncio.open_connection("127.0.0.1", self._to_port)
        try:
            while True:  # until one of the two ends
                behind_writer.write(await _message(reader))
                answer = await _message(behind_reader)
                self._num_answers += 1
                if self._num_answers % self._every == 0:
                    self.num_dropped += 1
                    return
                writer.write(answer)
        except EOFError:
            pass
        finally:
            writer.close()
            behind_writer.close()


async def _message(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    return head + await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))


@contextmanager
def listening(serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> Iterator[int]:
    """A server in a thread of its own; gives its port."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> asyncio.Server:
        return await asyncio.start_server(serve, "127.0.0.1", 0)

    async def stop(server: asyncio.Server) -> None:
        server.close()
        await asyncio.sleep(0.1)

    server = asyncio.run_coroutine_threadsafe(start(), loop).result(20)
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        asyncio.run_coroutine_threadsafe(stop(server), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()


def test_answers_that_a_proxy_drops_are_counted_one_by_one(file_store: ObstoreStore) -> None:
    publish(file_store, "linear", commit_bundle(file_store, linear(2.0)))
    for server in serve_app(file_store, app_spec(file_store, "linear")):
        proxy = DroppingProxy(server.port, every=200)
        with (
            listening(proxy.serve) as port,
            Callers(port, "/v2/models/linear/infer", num_callers=4, pause_s=0.0) as callers,
        ):
            callers.wait(1_000)
    records = [Record(call.id, 200) for call in callers.calls]
    found = judge(callers.calls, records, linear_answer, events={"drops": (proxy.num_dropped, 5)})
    assert set(found.faults) == {"lost"}
    assert len(found.lost) == proxy.num_dropped
