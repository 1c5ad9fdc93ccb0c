"""Bodies were parsed on the loop (13.6 MB of nested lists: 4.3 s), and incoming bodies had no common budget.

Required: large bodies are parsed in a thread, in pieces, kinds before numbers; incoming bodies count against
`batching.max_queued_bytes`.
"""

import gzip
import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import requests

from maas_ray.bundle.format import Signature, TensorSpec
from maas_ray.errors import BadRequest, BodyTooLarge, DeadlineExceeded, Overloaded, RunStopped
from maas_ray.serve.batching.spec import ByteBudget
from maas_ray.serve.grpc import inference_pb2 as pb
from maas_ray.serve.grpc.inference.message import MAX_TYPED_BYTES, ModelInfer, is_quickly_parsed
from maas_ray.serve.wire.request import RequestReader
from maas_ray.store.objects import open_store
from tests.attacks.cases import chunked, request
from tests.attacks.raw import Talk
from tests.serve.conftest import Server, app_spec, publish, serve_app
from tests.support.onnx_models import LINEAR, MIXED, commit_bundle, linear, mixed

MIB = 1 << 20
ROW = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}


def body(shape: list[int], data: bytes, datatype: str = "FP32", name: str = "x") -> bytes:
    entry = b'{"name": "%b", "shape": %b, "datatype": "%b", "data": %b}'
    return b'{"inputs": [' + entry % (name.encode(), json.dumps(shape).encode(), datatype.encode(), data) + b"]}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    store = open_store(f"file://{tmp_path_factory.mktemp('a8')}/store")
    publish(store, "linear", commit_bundle(store, linear(2.0)))
    publish(store, "mixed", commit_bundle(store, mixed(), MIXED))
    spec = app_spec(store, "linear", "mixed", batching={"max_queued_bytes": 64 * MIB})
    yield from serve_app(store, spec, "protocol")


def ask(server: Server, data: bytes, model: str = "linear", **headers: str) -> requests.Response:
    return requests.post(f"{server.url}/v2/models/{model}/infer", data=data, headers=headers, timeout=60)


def slowest_neighbor(server: Server, attack: Callable[[], requests.Response]) -> tuple[requests.Response, float]:
    """Returns the response of an attack, and the longest time of a small request during it."""
    slowest_s = 0.0
    with ThreadPoolExecutor(1) as pool:
        attacking = pool.submit(attack)
        while not attacking.done():
            began = time.monotonic()
            assert requests.get(f"{server.url}/v2/health/live", timeout=60).status_code == 200
            slowest_s = max(slowest_s, time.monotonic() - began)
    return attacking.result(), slowest_s


NESTED = 1_000_000


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (
            body([NESTED, 3], b"[" + b"[1,2,3]," * (NESTED - 1) + b"[1,2,true]]"),
            f"element {3 * NESTED - 1} is true, not a number",
        ),
        (body([NESTED], b"[" + b"1," * NESTED + b"1]"), "1 dimensions instead of 2"),
        (body([NESTED, 3], b"[" + b"1," * NESTED + b"1]"), f"data has {NESTED + 1} elements"),
        (body([2 * MIB, 1], b"[" + b'"",' * (2 * MIB - 1) + b'""]', "BYTES", "color"), "more than 1048576 strings"),
        (b'{"inputs": [' + b",".join([b"{}"] * NESTED) + b"]}", "besides the data"),
        (b"[" * NESTED, "not JSON"),
    ],
    ids=["a true at the end", "rank", "count", "strings", "inputs", "brackets"],
)
def test_a_large_body_is_refused_while_others_are_answered(server: Server, attack: bytes, message: str) -> None:
    model = "mixed" if b"color" in attack[:100] else "linear"
    answer, slowest_s = slowest_neighbor(server, lambda: ask(server, attack, model))
    assert answer.status_code == 400
    assert message in answer.json()["error"]
    assert slowest_s < 1.0, "the longest was 13.6 s"
    assert server.call_plain(lambda: server.manager.budget.used) == 0


def test_a_large_body_that_is_right_is_answered(server: Server) -> None:
    rows = 100_000
    answer = ask(server, body([rows, 3], b"[" + b"[1, 2.5, -3e0]," * (rows - 1) + b"[0,0,0]]"))
    assert answer.status_code == 200
    found = answer.json()["outputs"][0]["data"]
    assert (found[:3], found[-3:], len(found)) == ([2.0, 5.0, -6.0], [0.0, 0.0, 0.0], 3 * rows)


def test_a_small_body_that_decompresses_to_a_large_one_is_treated_as_large(server: Server) -> None:
    packed = gzip.compress(body([NESTED, 1], b"[" + b"[1]," * (NESTED - 1) + b"[true]]"), 9)
    assert len(packed) < 20_000
    answer, slowest_s = slowest_neighbor(server, lambda: ask(server, packed, **{"content-encoding": "gzip"}))
    assert answer.status_code == 400
    assert slowest_s < 1.0


def test_the_deadline_holds_for_reading(server: Server) -> None:
    large = body([3 * NESTED, 3], b"[" + b"[1,2,3]," * (NESTED - 1) + b"[1,2,3]]")
    began = time.monotonic()
    answer = ask(server, large, **{"x-request-timeout-ms": "60"})
    assert answer.status_code in (400, 504), "the body itself may take that long"
    assert time.monotonic() - began < 10.0


@pytest.mark.parametrize("path", ["repository/index", "repository/models/linear/load"])
def test_requests_other_than_inference_have_small_bodies(server: Server, path: str) -> None:
    answer = requests.post(f"{server.url}/v2/{path}", data=b"[" * 100_000, timeout=30)
    assert answer.status_code == 413


# Bodies on their way


def begin(server: Server, num_bytes: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    sock.sendall(request(lines=[b"Content-Length: %d" % num_bytes], length=False) + b" " * 1000)
    return sock


def test_bodies_on_their_way_share_a_budget_and_leave_room_for_small_requests(server: Server) -> None:
    budget = server.manager.budget
    socks = [begin(server, 16 * MIB - 1) for _ in range(12)]
    try:
        refused = []
        until = time.monotonic() + 20
        while len(refused) < 9 and time.monotonic() < until:
            for sock in socks:
                sock.setblocking(False)
                try:
                    if sock not in refused and sock.recv(10, socket.MSG_PEEK):
                        refused.append(sock)
                except BlockingIOError:
                    pass
            time.sleep(0.01)
        assert len(refused) == 9, "three of 16 MiB are three quarters of 64 MiB"
        answer = refused[0].recv(4096)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"retry-after: " in answer
        assert b"batching.max_queued_bytes" in answer
        assert server.call_plain(lambda: budget.used) == 3 * (16 * MIB - 1)
        assert requests.post(f"{server.url}/v2/models/linear/infer", json=ROW, timeout=30).status_code == 200
        with Talk(server.port) as talk:  # in chunks, by what has come
            talk.send([chunked(b""), *[b"100000\r\n" + b" " * MIB + b"\r\n"] * 2])
            until = time.monotonic() + 20
            while (answer := talk.read(wait_s=1)) is None:
                assert time.monotonic() < until
            assert answer.status == 503
    finally:
        for sock in socks:
            sock.close()
    until = time.monotonic() + 20
    while server.call_plain(lambda: (budget.used, budget.arriving)) != (0, 0):
        assert time.monotonic() < until, "a client that left still counts"
        time.sleep(0.01)


def test_a_body_that_arrives_alone_only_has_to_fit_and_a_small_one_finds_the_last_quarter() -> None:
    budget = ByteBudget(100 * MIB)
    budget.expect(100 * MIB, 100 * MIB)
    with pytest.raises(Overloaded):
        budget.expect(1, 1)
    budget.arrived(100 * MIB)
    budget.expect(70 * MIB, 70 * MIB)
    with pytest.raises(Overloaded, match="73400320 bytes of bodies are being received"):
        budget.expect(6 * MIB, 6 * MIB)
    with pytest.raises(Overloaded):
        budget.expect(6 * MIB, 6 * MIB + 1)
    budget.expect(5 * MIB, 5 * MIB)
    budget.expect(1000, 1000)
    budget.arrived(75 * MIB + 1000)
    assert (budget.used, budget.arriving) == (0, 0)


# Reading in pieces equals reading in one step

KINDS: list[tuple[str, bool]] = [
    ("FP32", False),
    ("FP32", True),
    ("INT32", False),
    ("BOOL", False),
    ("BYTES", False),
    ("BYTES", True),
]
VALUES: dict[str, list[Any]] = {
    "FP32": [0, 1, -2.5, 1e30, 7, None, 1e39, True, "x"],
    "INT32": [0, 1, -7, 2**31 - 1, 2**31, 1.0, 1.5, False, None],
    "BOOL": [True, False, 1, 0.0, 2, None, "true"],
    "BYTES": ["", "a", 'q"[', "\\", '\\"', "]]", ", ", "ü€", None, 3],
}


def reader_of(datatype: str, nullable: bool) -> RequestReader:
    inputs = (
        TensorSpec(name="data", datatype=datatype, shape=(-1, -1), nullable=nullable),  # type: ignore[arg-type]
        TensorSpec(name="z", datatype="INT64", shape=(-1, 1)),
    )
    return RequestReader(Signature(inputs=inputs, outputs=LINEAR.outputs))


def random_request(dice: random.Random, datatype: str) -> bytes:
    rows, width = dice.randint(1, 4), dice.randint(1, 3)
    odd = dice.random() < 0.4
    values = VALUES[datatype] if odd else VALUES[datatype][:4]
    table: Any = [[dice.choice(values) for _ in range(width)] for _ in range(rows)]
    if dice.random() < 0.5:
        table = [value for row in table for value in row]
    if dice.random() < 0.15:
        dice.choice([table, table[0] if isinstance(table[0], list) else table]).append(dice.choice([0, [1], [], {}]))
    shape = [rows, width] if dice.random() < 0.9 else [rows, width + 1]
    entry = {"name": "data", "shape": shape, "datatype": datatype, "data": table}
    other = {"name": "z", "data": [[n] for n in range(rows)], "shape": [rows, 1], "datatype": "INT64"}
    document = {"id": 'an "id": [1', "inputs": dice.sample([entry, other], 2), "extra": {"data": [1, "2"]}}
    separators = dice.choice([(",", ":"), (", ", ": "), (" ,\n", "\t: ")])
    text = json.dumps(document, ensure_ascii=dice.random() < 0.5, separators=separators).encode()
    if dice.random() < 0.15:
        place = dice.randrange(len(text))
        text = text[:place] + dice.choice([b"", b",", b"[", b"]", b'"', b" ", b"1"]) + text[place + 1 :]
    return text


@pytest.mark.parametrize("piece", [7, 40, 1 << 16])
@pytest.mark.parametrize(("datatype", "nullable"), KINDS)
def test_reading_in_pieces_equals_reading_in_one_step(
    datatype: str, nullable: bool, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maas_ray.serve.wire.large_json.PIECE_BYTES", piece)
    reader, dice = reader_of(datatype, nullable), random.Random(piece)
    outcomes = [0, 0]
    for _ in range(400):
        text = random_request(dice, datatype)
        results: list[Any] = []
        for read in (lambda text: reader.read(text), lambda text: reader.read_large(text, None, lambda: None)):
            try:
                results.append(read(text))
            except BadRequest as error:
                results.append(error)
        once, pieces = results
        outcomes[isinstance(once, BadRequest)] += 1
        assert isinstance(once, BadRequest) == isinstance(pieces, BadRequest), (text, once, pieces)
        if not isinstance(once, BadRequest):
            assert (once.id, once.num_rows, once.outputs) == (pieces.id, pieces.num_rows, pieces.outputs)
            for name, array in once.inputs.items():
                assert array.dtype == pieces.inputs[name].dtype
                np.testing.assert_array_equal(array, pieces.inputs[name], err_msg=repr(text))
    assert min(outcomes) > 20, "both right and wrong requests were tried"


def test_reading_ends_once_it_is_cancelled() -> None:
    def gone() -> None:
        raise RunStopped("gone")

    with pytest.raises(DeadlineExceeded):
        reader_of("FP32", False).read_large(body([1, 1], b"[1]", name="data"), None, gone)


# Messages of gRPC


def message(num_elements: int) -> bytes:
    built = pb.ModelInferRequest(model_name="m")
    tensor = built.inputs.add(name="x", datatype="BYTES", shape=[num_elements])
    tensor.contents.bytes_contents.extend([b""] * num_elements)
    return bytes(built.SerializeToString())


def test_large_messages_without_raw_contents_are_parsed_in_a_thread_or_refused() -> None:
    assert is_quickly_parsed(message(100))
    assert not is_quickly_parsed(message(20_000))
    with pytest.raises(BodyTooLarge, match="raw_input_contents"):
        ModelInfer(message(MAX_TYPED_BYTES))
    raw = pb.ModelInferRequest(model_name="m", raw_input_contents=[bytes(MIB), bytes(MIB)])
    assert is_quickly_parsed(raw.SerializeToString())


def test_a_message_of_a_million_fields_is_not_looked_at_one_by_one() -> None:
    fields = b"\x2a\x00" * 1_000_000  # an empty input each
    began = time.process_time()
    assert not is_quickly_parsed(fields)
    with pytest.raises(BodyTooLarge):
        ModelInfer(fields)
    assert time.process_time() - began < 0.5
