"""ONNX's own node tests through plain onnxruntime and through import, wire and engine. One child process for many cases.

    python -m tests.support.node_tests OUT FIRST STEP    every STEP-th case from FIRST on, one JSON line each into OUT

A case that kills the child is written as such by `run_all`, which then continues after it.
"""

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from maas_ray.bundle.bfloat16 import to_float32
from maas_ray.bundle.engine.engine import Engine
from maas_ray.bundle.format import BundleInfo, load_bundle
from maas_ray.bundle.strings import encode
from maas_ray.errors import BundleError, GateError, MaasError
from maas_ray.registry.importing import import_onnx
from maas_ray.serve.wire.binary import num_binary_bytes, write_binary
from maas_ray.store.objects import open_store
from tests.support.infer_bodies import read_infer
from tests.support.root import ROOT

CHILD_TIMEOUT_S = 1500
CASE_TIMEOUT_S = 60


def run_all(out: Path, first: int = 0, step: int = 1) -> list[dict[str, Any]]:
    """Runs the cases in child processes and returns what became of each."""
    results: list[dict[str, Any]] = []
    while True:
        command = [sys.executable, "-m", "tests.support.node_tests", str(out), str(first), str(step)]
        ended = subprocess.run(command, cwd=ROOT, timeout=CHILD_TIMEOUT_S, capture_output=True, text=True)
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        results += [line for line in lines if "plain" in line]
        if ended.returncode == 0:
            return results
        if not lines or "plain" in lines[-1]:
            raise RuntimeError(f"the child ended with {ended.returncode}: {ended.stderr[-2000:]}")
        begun = lines[-1]
        where = "plain" if begun["stage"] == "plain" else "ours"
        crashed = f"crashed: {ended.returncode}"
        results.append({"name": begun["name"], "plain": crashed if where == "plain" else "passed", "ours": crashed})
        first = begun["index"] + step


def main(out: Path, first: int, step: int) -> None:
    warnings.simplefilter("ignore")
    from onnx.backend.test.loader import load_model_tests

    cases = sorted(load_model_tests(kind="node"), key=lambda case: case.name)
    with out.open("w") as file, tempfile.TemporaryDirectory() as folder:

        def note(**what: Any) -> None:
            file.write(json.dumps(what) + "\n")
            file.flush()

        for index in range(first, len(cases), step):
            case = cases[index]
            note(index=index, name=case.name, stage="plain")
            plain = _plain(case)
            ours = ""
            if plain == "passed":
                note(index=index, name=case.name, stage="ours")
                ours = _ours(case, Path(folder))
            note(name=case.name, plain=plain, ours=ours)


def _data(case: Any) -> list[tuple[Sequence[Any], Sequence[Any]]]:
    if case.data_sets is not None:
        return list(case.data_sets)
    raise ValueError("no data")


def _plain(case: Any) -> str:
    try:
        session = ort.InferenceSession(case.model.SerializeToString(), _options(), providers=["CPUExecutionProvider"])
        names = [node.name for node in session.get_inputs()]
        for given, expected in _data(case):
            found = session.run(None, dict(zip(names, given, strict=False)))
            if not all(_alike(a, b, case) for a, b in zip(found, expected, strict=True)):
                return "other values"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "passed"


def _ours(case: Any, folder: Path) -> str:
    path = folder / "model.onnx"
    onnx.save(case.model, path)
    store = open_store(f"file://{folder}/store-{case.name}")
    note = ""
    try:
        try:
            imported = import_onnx(store, path)
        except GateError:  # random numbers and infinite values are meant here
            imported = import_onnx(store, path, is_checked=False)
            note = " without the run"
        except BundleError as error:
            if "has no shape" not in str(error):
                raise
            imported = import_onnx(store, path, shapes=_shapes(case))
            note = " with shapes"
        engine = Engine(load_bundle(store, imported.bundle_id))
    except MaasError as error:
        return f"refused: {type(error).__name__}: {error}"
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"
    try:
        for given, expected in _data(case):
            request = read_infer(*_request(imported.info, given))
            found = engine.run(request.inputs)
            names = [tensor.name for tensor in imported.info.signature.outputs]
            kinds = {tensor.name: tensor.datatype for tensor in imported.info.signature.outputs}
            for name, value in zip(names, expected, strict=True):
                array: Any = to_float32(found[name]) if kinds[name] == "BF16" else found[name]  # type: ignore[arg-type]
                if not _alike(array, value, case):
                    return f"wrong: output {name!r}"
    except MaasError as error:
        return f"failed: {error} ({error.__cause__})"
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"
    finally:
        engine.close()
    return "passed" + note


def _request(info: BundleInfo, given: Sequence[Any]) -> tuple[bytes, Any, int]:
    """A binary request, as Triton's clients send it."""
    entries, tail = [], []
    for tensor, value in zip(info.signature.inputs, given, strict=False):
        array = np.asarray(value)
        if tensor.datatype == "BYTES":
            array = array.astype(object)
        elif tensor.datatype == "BF16":
            array = array.view(np.uint16)
        encoded = write_binary(array)
        data = encoded if isinstance(encoded, bytes) else encoded.tobytes()
        assert len(data) == num_binary_bytes(encoded)
        parameters = {"binary_data_size": len(data)}
        entries.append(
            {"name": tensor.name, "datatype": tensor.datatype, "shape": list(array.shape), "parameters": parameters}
        )
        tail.append(data)
    header = json.dumps({"inputs": entries, "parameters": {"binary_data_output": True}}).encode()
    return header + b"".join(tail), info.signature, len(header)


def _shapes(case: Any) -> dict[str, tuple[int, ...]]:
    given, expected = _data(case)[0]
    graph = case.model.graph
    pairs = [*zip(graph.input, given, strict=False), *zip(graph.output, expected, strict=False)]
    return {
        value.name: np.asarray(array).shape for value, array in pairs if not value.type.tensor_type.HasField("shape")
    }


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return options


def _alike(found: Any, expected: Any, case: Any) -> bool:
    if isinstance(expected, list):
        pairs = zip(found, expected, strict=False)
        return isinstance(found, list) and len(found) == len(expected) and all(_alike(a, b, case) for a, b in pairs)
    if expected is None or found is None:
        return expected is found
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape != expected.shape:
        return False
    if found.dtype == object or expected.dtype.kind in "OSU":
        pair = [[encode(x) for x in np.asarray(array, dtype=object).ravel().tolist()] for array in (found, expected)]
        return pair[0] == pair[1]
    if found.dtype.kind == "V" or expected.dtype.kind == "V":
        found, expected = (_numbers(array) for array in (found, expected))
    with np.errstate(all="ignore"):
        return bool(np.allclose(found, expected, rtol=case.rtol, atol=case.atol, equal_nan=True))


def _numbers(array: Any) -> Any:
    return array.astype(np.float32)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
