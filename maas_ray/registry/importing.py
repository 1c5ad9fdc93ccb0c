"""From any ONNX file to a published version: read, inspected, loaded and run twice on random values, committed. Trains nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from maas_ray.bundle.axis.judge import judge
from maas_ray.bundle.datatypes import NUMPY, Array
from maas_ray.bundle.engine import Engine
from maas_ray.bundle.external import read_onnx
from maas_ray.bundle.format import Bundle, BundleInfo, Imported, Lineage, Signature, TensorSpec, save_bundle
from maas_ray.bundle.inspect import inspect_graph, signature_of
from maas_ray.display import get_logger
from maas_ray.errors import GateError, MaasError, SpecError
from maas_ray.foreign import Unreadable, read_file
from maas_ray.registry.adapting import Sizes, adapt
from maas_ray.store.objects import ObjectStore

log = get_logger(__name__)

Task = Literal["classification", "binary", "regression", "other"]
MAX_LABELS_BYTES = 16 << 20
"""Largest file of class names."""
NUM_ROWS = 3
"""Rows of the run that proves a graph, where it has a batch dimension."""


@dataclass(frozen=True)
class ImportedModel:
    """A committed bundle."""

    bundle_id: str
    info: BundleInfo


def import_onnx(
    store: ObjectStore,
    path: str | Path,
    *,
    task: Task = "other",
    labels: tuple[str, ...] | None = None,
    shapes: Mapping[str, Sizes] | None = None,
    is_checked: bool = True,
    batch_axis: str | None = None,
) -> ImportedModel:
    """Makes a bundle of an ONNX file and commits it; `Registry.publish` makes it a version.

    The graph is loaded twice and run on the same random values; both must give the same finite ones. A graph that
    refuses such values (an index outside its table) is imported all the same, and its parity report says so.

    Args:
        store: where the bundle goes.
        path: the file; external data beside it is put inside.
        task: what the outputs mean.
        labels: class names in the order of the scores; by default those that the file has.
        shapes: of inputs and outputs whose shapes the file leaves open.
        is_checked: False leaves out the run, for a graph that gives infinite values where it should.
        batch_axis: the name of the dimension that counts the rows of a request, which is then the first one of every
            input; `first` for one without a name, `none` where there is none. By default what its name says.

    Raises:
        NotFound: there is no such file.
        BundleError: not a graph that can be served; the message names the node, tensor or file and the reason.
        SpecError: the labels do not fit any output, or the batch dimension is not that of the inputs.
        GateError: two loads of the graph differ, or give values that are not finite.
    """
    path = Path(path)
    adapted = adapt(read_onnx(path), shapes)
    file = adapted.file
    labels = adapted.labels if labels is None else labels
    signature = signature_of(file.graph)
    model = inspect_graph(file.graph, signature)
    try:
        signature, verdict = judge(signature, model, batch_axis)
    except ValueError as error:
        raise SpecError(f"--batch-axis {batch_axis}: {error}") from error
    del model
    _check_labels(signature, labels)
    origin = Imported(file=path.name, sha256=file.sha256, producer=file.producer)
    changes = {"changes": list(adapted.changes)} if adapted.changes else {}
    run = f"import-{file.sha256[:16]}"
    info = BundleInfo(
        signature=signature,
        task=task,
        labels=labels,
        parity={"status": "imported", "run": "left out", **changes, **_merging(verdict.reason)},
        metrics={},
        lineage=Lineage(run=run, step=0, checkpoint_digest="", data_digest="", spec_digest="", imported=origin),
    )
    if is_checked:
        report = _prove(Bundle(path.name, info, file.graph))
        info = info.model_copy(update={"parity": {"status": "imported", **report, **changes}})
    return ImportedModel(save_bundle(store, info, file.graph), info)


def read_labels(names: str | None, file: Path | None) -> tuple[str, ...] | None:
    """Class names as a command gives them: separated by commas, or one per line of a file; None if neither is given.

    Raises:
        SpecError: both are given, or the file cannot be read.
    """
    if names is not None and file is not None:
        raise SpecError("give the labels or a file of labels, not both")
    if file is not None:
        try:
            lines = read_file(file, MAX_LABELS_BYTES).decode("utf-8").splitlines()
        except FileNotFoundError as error:
            raise SpecError(f"the file of labels {file} cannot be read: it does not exist") from error
        except (Unreadable, UnicodeDecodeError) as error:
            raise SpecError(f"the file of labels {file} {_reason(error)}") from error
        return tuple(line.strip() for line in lines if line.strip())
    return None if names is None else tuple(name.strip() for name in names.split(","))


def _reason(error: Unreadable | UnicodeDecodeError) -> str:
    return str(error) if isinstance(error, Unreadable) else "is not text in UTF-8; convert it"


def _check_labels(signature: Signature, labels: tuple[str, ...] | None) -> None:
    if labels is None:
        return
    if not labels or len(set(labels)) != len(labels) or not all(labels):
        raise SpecError(f"the {len(labels)} labels are not distinct names; give each class one")
    sizes = {output.name: output.shape[-1] for output in signature.outputs if output.shape}
    if len(labels) not in sizes.values() and -1 not in sizes.values():
        raise SpecError(f"there are {len(labels)} labels, but the last sizes of the outputs are {sizes}")


def _prove(bundle: Bundle) -> dict[str, Any]:
    """Runs two sessions of the same bytes, one of them twice; returns what the parity report says of it."""
    signature, name = bundle.info.signature, bundle.id
    num_rows = NUM_ROWS if signature.is_batched else 1
    random = np.random.default_rng(0)
    inputs = {tensor.name: _random(tensor, num_rows, random) for tensor in signature.required}
    results: list[Mapping[str, Array]] = []
    for num_runs in (2, 1):  # onnxruntime's random numbers begin alike in each session
        engine = Engine(bundle)
        merging = _merging(engine.not_merged_because)
        try:
            results += [engine.run(inputs) for _ in range(num_runs)]
        except MaasError as error:  # a graph that refuses blanks of fixed sizes is refused by the engine itself
            log.warning("%s refuses random values: %s", name, error.__cause__ or error)
            return {"run": "random values are refused", **merging}
        finally:
            engine.close()
    for output, array in results[0].items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise GateError(
                f"output {output!r} of {name} is not finite for random inputs between 0 and 1; if that is meant, "
                "import it without the run (--no-check)"
            )
        if not all(np.array_equal(array, other[output]) for other in results[1:]):
            raise GateError(
                f"output {output!r} of {name} differs between two runs on the same values: the graph draws random "
                "numbers, export it for inference; if that is meant, import it without the run (--no-check)"
            )
    return {"run": "passed", "rows": num_rows, **merging}


def _merging(reason: str) -> dict[str, Any]:
    """Whether requests share a run, as the report has it; each load judges again."""
    return {"can_merge": False, "not_merged_because": reason} if reason else {"can_merge": True}


def _random(tensor: TensorSpec, num_rows: int, random: np.random.Generator) -> Array:
    shape = [(1 if axis else num_rows) if size == -1 else size for axis, size in enumerate(tensor.shape)]
    if tensor.datatype == "BYTES":
        return np.full(shape, "", dtype=object)
    dtype = NUMPY[tensor.datatype]
    # 0 and 1 are in every table that has two entries, and both values of a mask.
    return random.random(shape).astype(dtype) if dtype.kind == "f" else random.integers(0, 2, shape).astype(dtype)
