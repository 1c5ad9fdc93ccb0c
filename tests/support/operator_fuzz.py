"""Runs ONNX's own node cases with extreme values, other shapes and other types, in a child that may die of it."""

import socket
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from maas_ray.bundle.graph import hazards
from maas_ray.confined.frames import receive_frame, send_frame

IR_VERSION, OPSET = 10, 24
FLOATS = (0, -0.0, np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, 1)
SMALL = (-3, -2, -1, 0, 1, 2, 3, 100)
LARGEST = ("min", "max", 0, 1, 2, -1, -2)
WITHOUT_ZERO = ("min", "max", 1, 2, -1, -2)
"""onnxruntime refuses to divide by zero before it divides anything."""
INTEGERS = (LARGEST, SMALL, WITHOUT_ZERO)


def _extreme(array: np.ndarray, integers: tuple[int | str, ...], rng: np.random.Generator) -> np.ndarray:
    if array.dtype == bool:
        return rng.random(array.shape) < 0.5
    if array.dtype.kind == "f":
        with np.errstate(all="ignore"):
            return rng.choice(np.array(FLOATS).astype(array.dtype), array.shape).astype(array.dtype)
    if array.dtype.kind in "iu":
        bounds = np.iinfo(array.dtype)
        values = [getattr(bounds, value) if isinstance(value, str) else value for value in integers]
        allowed = [value for value in values if bounds.min <= value <= bounds.max]
        picked = [allowed[rng.integers(len(allowed))] for _ in range(array.size)]
        return np.array(picked, dtype=array.dtype).reshape(array.shape)
    return array


def _values(given: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    for seed in range(12):
        rng = np.random.default_rng(seed)
        integers = INTEGERS[seed % 3]
        yield [_extreme(array, integers, rng) if seed < 6 or rng.random() < 0.6 else array for array in given]


def _shapes(given: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    for seed in range(6):
        rng = np.random.default_rng(seed)
        arrays = []
        for array in given:
            shape = list(array.shape)
            if shape and rng.random() < 0.7:
                shape[rng.integers(len(shape))] = int(rng.choice([0, 0, 1, 2, 5]))
            other = np.resize(array, shape) if array.size and 0 not in shape else np.zeros(shape, array.dtype)
            arrays.append(_extreme(other, INTEGERS[seed // 2], rng) if seed % 2 else other)
        yield arrays


def _without_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    for value in model.graph.input:
        for size in value.type.tensor_type.shape.dim:
            size.Clear()
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    return model


def _for_runtime(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph by definitions that onnxruntime has; ONNX's own cases are ahead of it."""
    other = onnx.ModelProto.FromString(model.SerializeToString())
    other.ir_version = min(other.ir_version, IR_VERSION)
    for opset in other.opset_import:
        if not opset.domain:
            opset.version = min(opset.version, OPSET)
    return other


def _retyped(model: onnx.ModelProto, kind: int) -> onnx.ModelProto:
    """The same graph for integers: whatever is FLOAT at its border becomes `kind`."""
    other = onnx.ModelProto.FromString(model.SerializeToString())
    for value in (*other.graph.input, *other.graph.output):
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = kind
    return other


def _variants(model: onnx.ModelProto, given: list[np.ndarray]) -> Iterator[tuple[str, onnx.ModelProto, Iterator[list[np.ndarray]]]]:  # fmt: skip
    yield "values", model, _values(given)
    yield "shapes", _without_shapes(onnx.ModelProto.FromString(model.SerializeToString())), _shapes(given)
    if any(array.dtype == np.float32 for array in given):  # ONNX has few cases for integers
        for kind, dtype in ((onnx.TensorProto.INT32, np.int32), (onnx.TensorProto.INT64, np.int64)):
            with np.errstate(all="ignore"):
                arrays = [array.astype(dtype) if array.dtype == np.float32 else array for array in given]
            yield np.dtype(dtype).name, _retyped(model, kind), _values(arrays)


def fuzz(sock: socket.socket, descriptors: list[int]) -> None:
    """A confined service: says which case comes next, so that it is known which one it died of.

    It is asked with `start`, the number of the first case; `only`, which a case's name must contain; and
    `trusts_divisions`, which plants a fault in the list of operators.
    """
    warnings.simplefilter("ignore")
    from onnx.backend.test.case.node import collect_testcases

    (request, _), num_runs = receive_frame(sock), 0
    if request["trusts_divisions"]:
        hazards.DIVISIONS = frozenset()
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
        if request["only"] not in case.name or any(array.dtype.kind not in "biuf" for array in given):
            continue
        for kind, model, inputs in _variants(_for_runtime(case.model), given):
            found = hazards.hazards_of(model)
            if found.can_trap or not found.is_value_bounded:  # it runs in a process of its own (bundle/loading.py)
                continue
            send_frame(sock, {"stage": f"{number} {case.name} {kind}"})
            try:
                session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            except Exception:  # onnxruntime does not have it for these types, or needs its shapes
                continue
            names = [value.name for value in session.get_inputs()]
            if len(names) != len(given):
                continue
            for arrays in inputs:
                num_runs += 1
                try:
                    session.run(None, dict(zip(names, arrays, strict=True)))
                except Exception:  # a refusal is as good as an answer
                    continue
    send_frame(sock, {"value": {"num_runs": num_runs}})
