"""Inspects, loads and runs an ONNX file in child processes with limits. Commits nothing.

The checker, the shape inference and the runtime are native code that reads untrusted bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from maas_ray import confined
from maas_ray.bundle.apart.process import BASE_MEMORY_BYTES, FILE_FACTOR, start_process
from maas_ray.bundle.axis.judge import judge
from maas_ray.bundle.datatypes import NUMPY, Array
from maas_ray.bundle.engine.engine import Engine, EngineSpec
from maas_ray.bundle.format import Bundle, BundleInfo, Signature, TensorSpec
from maas_ray.bundle.graph.checks import inspect_graph, signature_of
from maas_ray.bundle.graph.external import OnnxFile
from maas_ray.bundle.nature import Nature
from maas_ray.bundle.sample import read_sample
from maas_ray.confined import Limits
from maas_ray.display import get_logger
from maas_ray.errors import BundleError, ConfinedError, ConfinedKilled, GateError, MaasError, SpecError
from maas_ray.registry.adapting import Adapted, Sizes, adapt
from maas_ray.registry.padded import padded_axis

log = get_logger(__name__)

WALL_S = 120.0
BYTES_PER_S = 1 << 20
"""The time limit is a constant plus a second per this many bytes of the file."""
NUM_ROWS = 3
"""Rows of the test run, for a graph with a batch dimension."""


@dataclass(frozen=True)
class Examined:
    """A file whose graph can be served."""

    adapted: Adapted
    signature: Signature


def examine(
    file: OnnxFile,
    shapes: Mapping[str, Sizes] | None,
    name: str,
    batch_axis: str | None = None,
    pad: str | None = None,
    pad_values: Mapping[str, float | str] | None = None,
) -> Examined:
    """Adapts a graph for serving and inspects it; does not run it.

    Args:
        file: the file that was read.
        shapes: as for `adapt`.
        name: name of the file, for messages.
        batch_axis: as for `judge`.
        pad: as for `padded_axis`; None: no padding.
        pad_values: padding values of inputs.

    Raises:
        BundleError: the graph is not servable, or its inspection crashes or hangs.
        SpecError: a shape does not fit, or the inputs do not have the batch dimension.
    """
    payload = {
        "shapes": {key: list(sizes) for key, sizes in (shapes or {}).items()},
        "batch_axis": batch_axis,
        "pad": pad,
        "pad_values": dict(pad_values or {}),
    }
    found = _call("look", payload, [file.graph], len(file.graph), f"the graph of {name}")
    graph = bytes(found.blobs[0]) if found.blobs else file.graph
    labels = found.payload["labels"]
    adapted = Adapted(
        OnnxFile(graph, file.sha256, file.producer),
        None if labels is None else tuple(labels),
        tuple(found.payload["changes"]),
    )
    return Examined(adapted, Signature.model_validate(found.payload["signature"]))


def load(bundle: Bundle) -> Nature:
    """Loads a bundle once, as a replica does.

    Raises:
        BundleError: it cannot be loaded, or loading it crashes, hangs or takes too much memory.
    """
    process = start_process(bundle, EngineSpec(), wall_s_of(len(bundle.graph)))
    process.close()
    return process.nature


def prove(bundle: Bundle, nature: Nature) -> dict[str, Any]:
    """Runs two sessions of the same bytes, one of them twice; returns the entries for the parity report.

    Raises:
        GateError: the results differ or are not finite.
        BundleError: the runs hang or take too much memory.
    """
    payload = {
        "id": bundle.id,
        "info": bundle.info.model_dump(mode="json"),
        "skip": list(nature.killed_by),
        "has_sample": bundle.sample is not None,
    }
    blobs = [bundle.graph, *([bundle.sample] if bundle.sample is not None else [])]
    try:
        return _call("compare", payload, blobs, len(bundle.graph), f"the graph of {bundle.id}").payload
    except BundleError as error:
        if isinstance(error.__cause__, ConfinedKilled) and error.__cause__.signal:
            log.warning("%s: %s; it is served in a separate process", bundle.id, error.__cause__)
            return {
                "run": "random values end its process",
                **merging(nature.not_merged_because, nature.not_padded_because),
            }
        raise


def merging(reason: str, not_padded_because: str) -> dict[str, Any]:
    """The report's entries on whether requests share a run; each load determines it again."""
    unpadded = {"not_padded_because": not_padded_because} if not_padded_because else {}
    return {"can_merge": False, "not_merged_because": reason, **unpadded} if reason else {"can_merge": True, **unpadded}


def wall_s_of(num_bytes: int) -> float:
    """Time limit for a graph of this size."""
    return WALL_S + num_bytes / BYTES_PER_S


def _call(function: str, payload: dict[str, Any], blobs: Sequence[bytes], num_bytes: int, what: str) -> confined.Result:
    wall_s = wall_s_of(num_bytes)
    limits = Limits(wall_s=wall_s, cpu_s=wall_s, memory_bytes=BASE_MEMORY_BYTES + 2 * FILE_FACTOR * num_bytes)
    try:
        return confined.call(f"{__name__}:{function}", payload, blobs, limits, what=what)
    except ConfinedError as error:
        raise BundleError(f"{error}; the graph cannot be served; export the model again") from error


# In the children


def look(payload: dict[str, Any], blobs: list[bytearray]) -> tuple[dict[str, Any], list[bytes]]:
    """Adapts and inspects a graph."""
    graph = bytes(blobs[0])
    shapes = {key: tuple(sizes) for key, sizes in payload["shapes"].items()}
    adapted = adapt(OnnxFile(graph, "", ""), shapes)
    signature = signature_of(adapted.file.graph)
    model = inspect_graph(adapted.file.graph, signature)
    batch_axis = payload["batch_axis"]
    try:
        signature, _ = judge(signature, model, batch_axis)
    except ValueError as error:
        raise SpecError(f"--batch-axis {batch_axis}: {error}") from error
    if payload["pad"] is not None:
        padded = padded_axis(model, signature, payload["pad"], payload["pad_values"])
        signature = signature.model_copy(update={"padded": padded})
    found = {
        "labels": adapted.labels,
        "changes": adapted.changes,
        "signature": signature.model_dump(mode="json"),
    }
    return found, [] if adapted.file.graph is graph else [adapted.file.graph]


def compare(payload: dict[str, Any], blobs: list[bytearray]) -> tuple[dict[str, Any], list[bytes]]:
    """Runs a graph in two sessions."""
    sample = bytes(blobs[1]) if payload["has_sample"] else None
    bundle = Bundle(payload["id"], BundleInfo.model_validate(payload["info"]), bytes(blobs[0]), sample)
    return _compared(bundle, payload["skip"]), []


def _compared(bundle: Bundle, skip: Sequence[str]) -> dict[str, Any]:
    signature, name = bundle.info.signature, bundle.id
    num_rows = NUM_ROWS if signature.is_batched else 1
    random = np.random.default_rng(0)
    if bundle.sample is not None:
        inputs, what = read_sample(bundle.sample, signature), "the values of its sample"
        num_rows = len(next(iter(inputs.values()))) if signature.is_batched else 1
    else:
        inputs = {tensor.name: _random(tensor, num_rows, random) for tensor in signature.required}
        what = "random inputs between 0 and 1"
    results: list[Mapping[str, Array]] = []
    for num_runs in (2, 1):  # onnxruntime's random numbers start equally in each session
        engine = Engine(bundle, skip=skip)
        report = merging(engine.not_merged_because, engine.not_padded_because)
        try:
            results += [engine.run(inputs) for _ in range(num_runs)]
        except MaasError:  # not an error of the graph: the values are random
            return {"run": "random values are refused", **report}
        finally:
            engine.close()
    for output, array in results[0].items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise GateError(
                f"output {output!r} of {name} is not finite for {what}; if that is intended, import it without the "
                "test run (--no-check)"
            )
        if not all(np.array_equal(array, other[output]) for other in results[1:]):
            raise GateError(
                f"output {output!r} of {name} differs between two runs on the same values, so the graph draws random "
                "numbers; export it for inference, or, if that is intended, import it without the test run (--no-check)"
            )
    return {"run": "passed", "rows": num_rows, **report}


def _random(tensor: TensorSpec, num_rows: int, random: np.random.Generator) -> Array:
    shape = [(1 if axis else num_rows) if size == -1 else size for axis, size in enumerate(tensor.shape)]
    if tensor.datatype == "BYTES":
        return np.full(shape, "", dtype=object)
    dtype = NUMPY[tensor.datatype]
    # 0 and 1 are valid indices of every table with two entries, and both values of a mask.
    return random.random(shape).astype(dtype) if dtype.kind == "f" else random.integers(0, 2, shape).astype(dtype)
