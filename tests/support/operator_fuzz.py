"""Runs ONNX's own node cases with extreme values and with other shapes, in a child that may die of it."""

import socket
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from maas_ray.bundle.hazards import hazards_of
from maas_ray.confined.frames import receive_frame, send_frame

FLOATS = (0, -0.0, np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, 1)
SMALL = (-3, -2, -1, 0, 1, 2, 3, 100)


def _extreme(array: np.ndarray, is_small: bool, rng: np.random.Generator) -> np.ndarray:
    if array.dtype == bool:
        return rng.random(array.shape) < 0.5
    if array.dtype.kind == "f":
        with np.errstate(all="ignore"):
            return rng.choice(np.array(FLOATS).astype(array.dtype), array.shape).astype(array.dtype)
    if array.dtype.kind in "iu":
        bounds = np.iinfo(array.dtype)
        values = SMALL if is_small else (bounds.min, bounds.max, 0, 1, 2, -1, -2)
        allowed = [value for value in values if bounds.min <= value <= bounds.max]
        picked = [allowed[rng.integers(len(allowed))] for _ in range(array.size)]
        return np.array(picked, dtype=array.dtype).reshape(array.shape)
    return array


def _values(given: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    for seed in range(12):
        rng = np.random.default_rng(seed)
        yield [_extreme(array, bool(seed % 2), rng) if not seed % 3 or rng.random() < 0.6 else array for array in given]


def _shapes(given: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    for seed in range(6):
        rng = np.random.default_rng(seed)
        arrays = []
        for array in given:
            shape = list(array.shape)
            if shape and rng.random() < 0.7:
                shape[rng.integers(len(shape))] = int(rng.choice([0, 0, 1, 2, 5]))
            other = np.resize(array, shape) if array.size and 0 not in shape else np.zeros(shape, array.dtype)
            arrays.append(_extreme(other, bool(seed % 4 == 1), rng) if seed % 2 else other)
        yield arrays


def _without_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    for value in model.graph.input:
        for size in value.type.tensor_type.shape.dim:
            size.Clear()
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    return model


def fuzz(sock: socket.socket, descriptors: list[int]) -> None:
    """A confined service: says which case comes next, so that it is known which one it died of."""
    warnings.simplefilter("ignore")
    from onnx.backend.test.case.node import collect_testcases

    (request, _), num_runs = receive_frame(sock), 0
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    cases: list[Any] = collect_testcases(None)
    for number, case in enumerate(cases[request["start"] :], request["start"]):
        if case.model is None or not case.data_sets:
            continue
        if not all(isinstance(value, np.ndarray | np.generic) for value in case.data_sets[0][0]):
            continue  # a sequence, or an optional value that is missing: no request holds one
        given = [np.asarray(value) for value in case.data_sets[0][0]]
        model = onnx.ModelProto.FromString(case.model.SerializeToString())
        if hazards_of(model).can_trap or any(array.dtype.kind not in "biuf" for array in given):
            continue
        for kind, make in (("values", _values), ("shapes", _shapes)):
            send_frame(sock, {"stage": f"{number} {case.name} {kind}"})
            try:
                session = ort.InferenceSession(
                    (model if kind == "values" else _without_shapes(model)).SerializeToString(),
                    options,
                    providers=["CPUExecutionProvider"],
                )
            except Exception:  # onnxruntime does not have it, or needs its shapes
                continue
            names = [value.name for value in session.get_inputs()]
            if len(names) != len(given):
                continue
            for arrays in make(given):
                num_runs += 1
                try:
                    session.run(None, dict(zip(names, arrays, strict=True)))
                except Exception:  # a refusal is as good as an answer
                    continue
    send_frame(sock, {"value": {"num_runs": num_runs}})
