"""Imports any ONNX file as a bundle: reads, inspects and loads it, runs it twice on random values, and commits it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from maas_ray.bundle.format import Bundle, BundleInfo, Imported, Lineage, Signature, save_bundle
from maas_ray.bundle.graph.external import read_onnx
from maas_ray.bundle.loading import reasons_apart
from maas_ray.bundle.sample import write_sample
from maas_ray.display import get_logger
from maas_ray.errors import SpecError
from maas_ray.foreign.files import Unreadable, read_file
from maas_ray.registry.adapting import Sizes
from maas_ray.registry.examining import examine, load, merging, prove
from maas_ray.registry.samples import read_sample_file
from maas_ray.store.objects import ObjectStore

log = get_logger(__name__)

Task = Literal["classification", "binary", "regression", "other"]
MAX_LABELS_BYTES = 16 << 20
"""Maximum size of a file of class names."""
NUM_ROWS = 3
"""Rows of the test run, for a graph with a batch dimension."""


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
    sample: Path | None = None,
    is_checked: bool = True,
    batch_axis: str | None = None,
    pad: str | None = None,
    pad_values: Mapping[str, float | str] | None = None,
) -> ImportedModel:
    """Converts an ONNX file to a bundle and commits it; `Registry.publish` makes it a version.

    The graph is loaded and run in child processes with limits, so that a graph that crashes, hangs or exhausts the
    memory is rejected. It is run in two sessions on the same random values, which must give the same finite results. A
    graph that rejects such values (an index outside its table) is imported nevertheless, with a note in its parity
    report.

    Args:
        store: where to commit the bundle.
        path: the file; its external data in the same folder is included.
        task: meaning of the outputs.
        labels: class names in the order of the scores; by default those in the file.
        shapes: shapes of inputs and outputs whose shapes the file does not define.
        sample: a file with valid input values, .npz or a v2 request as .json; stored in the bundle and used for first
            runs, so it must not contain personal data.
        is_checked: False skips the comparison of runs, for a graph with intentionally infinite results. It is loaded
            nevertheless.
        batch_axis: name of the dimension that counts the rows of a request, which is then the first one of every
            input; `first` for a dimension without a name, `none` if there is none. By default inferred from its name.
        pad: `DIMENSION=MASK`: the dimension in which requests of different sizes share a run by padding, and the input
            that is the mask.
        pad_values: padding values of inputs, other than 0 and the empty string.

    Raises:
        NotFound: there is no such file.
        BundleError: the graph cannot be served; the message names the node, tensor or file and the reason.
        SpecError: the labels do not fit any output, the sample does not fit the inputs, or the inputs do not have the
            batch dimension.
        GateError: the results of two loads of the graph differ or are not finite.
    """
    path = Path(path)
    examined = examine(read_onnx(path), shapes, path.name, batch_axis, pad, pad_values)
    adapted, signature = examined.adapted, examined.signature
    file = adapted.file
    labels = adapted.labels if labels is None else labels
    _check_labels(signature, labels)
    values = None if sample is None else write_sample(read_sample_file(sample, signature), signature)
    origin = Imported(file=path.name, sha256=file.sha256, producer=file.producer)
    changes = {"changes": list(adapted.changes)} if adapted.changes else {}
    run = f"import-{file.sha256[:16]}"
    info = BundleInfo(
        signature=signature,
        task=task,
        labels=labels,
        parity={"status": "imported"},
        metrics={},
        lineage=Lineage(run=run, step=0, checkpoint_digest="", data_digest="", spec_digest="", imported=origin),
    )
    bundle = Bundle(path.name, info, file.graph, values)
    nature = load(bundle)
    report = {
        "run": "left out",
        **merging(nature.not_merged_because, nature.not_padded_because),
        "warm_up": nature.warmed_with or "all values that were made up are refused",
        "process": "of its own: " + "; ".join(apart)[:1000] if (apart := reasons_apart(nature)) else "the replica's",
    }
    if is_checked:
        report |= prove(bundle, nature)
    info = info.model_copy(update={"parity": {"status": "imported", **report, **changes}})
    return ImportedModel(save_bundle(store, info, file.graph, values), info)


def read_labels(names: str | None, file: Path | None) -> tuple[str, ...] | None:
    """Class names of the command line: separated by commas, or one per line of a file; None if neither is given.

    Raises:
        SpecError: both are given, or the file cannot be read.
    """
    if names is not None and file is not None:
        raise SpecError("labels and a label file exclude each other; give only one of them")
    if file is not None:
        try:
            lines = read_file(file, MAX_LABELS_BYTES).decode("utf-8").splitlines()
        except FileNotFoundError as error:
            raise SpecError(f"the label file {file} does not exist") from error
        except (Unreadable, UnicodeDecodeError) as error:
            raise SpecError(f"the label file {file} {_reason(error)}") from error
        return tuple(line.strip() for line in lines if line.strip())
    return None if names is None else tuple(name.strip() for name in names.split(","))


def _reason(error: Unreadable | UnicodeDecodeError) -> str:
    return str(error) if isinstance(error, Unreadable) else "is not text in UTF-8; convert it"


def _check_labels(signature: Signature, labels: tuple[str, ...] | None) -> None:
    if labels is None:
        return
    if not labels or len(set(labels)) != len(labels) or not all(labels):
        raise SpecError(f"the {len(labels)} labels contain empty or repeated names; give each class a distinct name")
    sizes = {output.name: output.shape[-1] for output in signature.outputs if output.shape}
    if len(labels) not in sizes.values() and -1 not in sizes.values():
        raise SpecError(
            f"there are {len(labels)} labels, but the last sizes of the outputs are {sizes}; give one label per class"
        )
