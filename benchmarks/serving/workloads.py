"""What is asked: an ONNX graph, request bodies and the right answer to each. Knows no server.

Every peer gets the same bytes: a JSON body of the Open Inference Protocol v2, or its binary tensor extension.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.serving import graphs

NUM_BODIES = 16
"""Different requests of a workload, so that an answer given to the wrong caller is seen."""
KINDS = {"float32": "FP32", "int64": "INT64"}
"""Datatypes of the protocol."""


@dataclass(frozen=True)
class Workload:
    """One model and how it is asked."""

    name: str
    about: str
    graph: Callable[[], bytes]
    make_rows: Callable[[np.random.Generator], np.ndarray]
    """One request's rows."""
    clients: tuple[int, ...]
    """Closed-loop clients by default."""
    is_binary: bool = False
    seconds: int = 4
    """Of one turn by default; much longer than one answer takes, since what the end cuts off is not counted."""
    peers: tuple[str, ...] | None = ("triton",)
    """Whom it is compared with unless peers are chosen; None: all."""


@dataclass(frozen=True)
class Request:
    """One body and its answer."""

    body: bytes
    header_length: int | None
    """Bytes of the JSON header of a binary body; None where all of it is JSON."""
    rows: np.ndarray
    expected: np.ndarray


def _floats(*shape: int) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda random: np.round(random.standard_normal(shape), 4).astype(np.float32)


def _tokens(sequence: int) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda random: random.integers(0, 1000, (1, sequence), dtype=np.int64)


def _mixed_rows(random: np.random.Generator) -> np.ndarray:
    return _floats(int(random.integers(1, 17)), 64)(random)


def _pixels(random: np.random.Generator) -> np.ndarray:
    # 784 numbers of eight characters and a comma are the 7 KB that the figures of this workload speak of.
    return np.round(random.random((1, 784)), 6).astype(np.float32)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("tiny", "10-20-1 MLP, one JSON row", lambda: graphs.mlp(10, 20, 1), _floats(1, 10), (1, 32, 128), peers=None),
        Workload("mid", "784-1024-1024-10 MLP, 7 KB of JSON", lambda: graphs.mlp(784, 1024, 1024, 10), _pixels, (32, 128)),
        Workload("image", "1x3x224x224 FP32, 602 KB as a binary tensor, cheap model", graphs.image, _floats(1, 3, 224, 224), (8,), is_binary=True),
        Workload("mixed", "64-512-512-10 MLP, 1 to 16 JSON rows", lambda: graphs.mlp(64, 512, 512, 10), _mixed_rows, (32,)),
        Workload("encoder", "encoder of 6 layers, 256 wide, 128 tokens", lambda: graphs.encoder(6, 256, 128), _tokens(128), (32,), seconds=30),
        Workload("small-encoder", "encoder of 2 layers, 256 wide, 64 tokens", lambda: graphs.encoder(2, 256, 64), _tokens(64), (32,), peers=()),
    )
}  # fmt: skip


def make_model(workload: Workload, directory: Path) -> Path:
    """Writes the graph, once."""
    path = directory / f"{workload.name}.onnx"
    if not path.exists():
        path.write_bytes(workload.graph())
    return path


def wrap(requests: list[Request], before: bytes, after: bytes) -> list[Request]:
    """The same requests with something around each body."""
    return [replace(request, body=before + request.body + after) for request in requests]


def make_requests(workload: Workload, model: Path, count: int = NUM_BODIES) -> list[Request]:
    """The same requests in every run; the right answers come from onnxruntime itself, one request at a time."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(7)
    requests = []
    for _ in range(count):
        rows = workload.make_rows(random)
        (expected,) = session.run([graphs.OUTPUT], {graphs.INPUT: rows})
        body, header_length = _binary(rows) if workload.is_binary else (_json(rows), None)
        requests.append(Request(body, header_length, rows, expected))
    return requests


def is_right(request: Request, status: int, body: bytes, header_length: int | None) -> bool:
    """Whether an answer carries the numbers that this request asked for, in JSON or binary."""
    if status != 200:
        return False
    try:
        answer = json.loads(body[:header_length])
        answer = answer[0] if isinstance(answer, list) else answer
        (output,) = [entry for entry in answer["outputs"] if entry["name"] == graphs.OUTPUT]
        if "data" in output:
            values = np.array(output["data"], np.float32)
        else:
            values = np.frombuffer(body[header_length:], np.float32)
        values = values.reshape(output["shape"])
    except (ValueError, KeyError, TypeError, IndexError):
        return False
    return values.shape == request.expected.shape and np.allclose(values, request.expected, rtol=1e-3, atol=1e-3)


def _describe(rows: np.ndarray) -> dict[str, object]:
    return {"name": graphs.INPUT, "shape": list(rows.shape), "datatype": KINDS[str(rows.dtype)]}


def _json(rows: np.ndarray) -> bytes:
    data = [round(value, 6) for value in rows.ravel().tolist()]
    return json.dumps({"inputs": [_describe(rows) | {"data": data}]}, separators=(",", ":")).encode()


def _binary(rows: np.ndarray) -> tuple[bytes, int]:
    wanted = [{"name": graphs.OUTPUT, "parameters": {"binary_data": True}}]
    tensor = _describe(rows) | {"parameters": {"binary_data_size": rows.nbytes}}
    header = json.dumps({"inputs": [tensor], "outputs": wanted}, separators=(",", ":")).encode()
    return header + rows.tobytes(), len(header)
