"""The bundle's format: an ONNX graph and the description that makes it servable. Runs nothing.

    bundles/<id>/manifest.json                 the description, and the digest of the graph
    bundles/<id>/parts-<attempt>/model.onnx    weights inline, preprocessing inside
    bundles/<id>/parts-<attempt>/sample.json   values that the graph takes, for its first runs; where there are some

`id` is taken of the content, so that committing the same bundle twice is harmless.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

from pydantic import Field, ValidationError

from maas_ray.errors import Conflict, MaasError, NotFound, ObjectCorrupt
from maas_ray.spec import Spec, canonical_json
from maas_ray.store.manifest import Committed, CommitWriter, open_committed
from maas_ray.store.objects import ObjectStore
from maas_ray.store.sealed import malformed

PREFIX = "bundles"
KIND = "bundle"
GRAPH = "model.onnx"
MAX_GRAPH_BYTES = (1 << 31) - 1
"""The largest message of protocol buffers, which a graph with its weights inside is."""
SAMPLE = "sample.json"

Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "BF16", "FP32", "FP64", "BYTES",
]  # fmt: skip
"""Tensor datatypes of the Open Inference Protocol v2."""


class TensorSpec(Spec):
    """One input or output of the graph."""

    name: str
    """Name in the graph and on the wire."""
    datatype: Datatype
    """Datatype of the Open Inference Protocol v2."""
    shape: tuple[int, ...]
    """Sizes; -1 is variable, and the batch dimension where it comes first."""
    nullable: bool = False
    """A JSON null is a missing value, which the preprocessing inside the graph fills in (NaN or an empty string)."""
    optional: bool = Field(default=False, exclude_if=lambda value: not value)
    """An input with a default value in the graph: a request may leave it out."""


class BatchAxis(Spec):
    """Which dimension counts the rows of a request: the first one of every input and output, or none."""

    name: str | None
    """Its name in the graph, `first` where it has none; None: there is no batch dimension, a request is one whole."""
    origin: Literal["exporter", "graph", "user"]
    """Who says so: our exporter, the names and operators of an imported graph, or the user at import."""


class PaddedAxis(Spec):
    """A variable dimension beyond the rows in which requests of different sizes may share a run: shorter ones are padded,
    a mask says so to the model, and their answers are cut back.
    """

    name: str
    """Its name in the graph."""
    mask: str
    """The input that is the mask: 1 where there is something, padded with 0."""
    inputs: dict[str, int]
    """The place of the dimension in each input that has it."""
    outputs: dict[str, int]
    """Its place in each output that has it."""
    values: dict[str, float | str] = Field(default_factory=dict)
    """What an input is padded with, where that is not 0 or the empty string."""


class Signature(Spec):
    """What the graph takes and gives, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch: BatchAxis | None = Field(default=None, exclude_if=lambda value: value is None)
    """The batch dimension; None where nothing was stated, as in bundles of older versions: whoever loads the graph then
    judges by its names and operators."""
    padded: PaddedAxis | None = Field(default=None, exclude_if=lambda value: value is None)
    """None: requests share a run only if their sizes beyond the rows are equal."""

    @property
    def required(self) -> tuple[TensorSpec, ...]:
        """Inputs that every request must have."""
        return tuple(tensor for tensor in self.inputs if not tensor.optional)

    @property
    def is_batched(self) -> bool:
        """Whether the first dimension of every tensor counts rows; says nothing on whether rows may be merged."""
        if self.batch is not None:
            return self.batch.name is not None
        tensors = (*self.required, *self.outputs)
        return bool(self.required) and all(tensor.shape and tensor.shape[0] == -1 for tensor in tensors)


class Imported(Spec):
    """The file that a bundle was imported from."""

    file: str
    """Its name, without the directory."""
    sha256: str
    """Hex digest of the file; of the file and all files of its external data, where it has some."""
    producer: str
    """The program that wrote it, as the file says; empty if it does not."""


class Lineage(Spec):
    """Where a bundle comes from; enough to find and repeat every step."""

    run: str
    """Id of the training run, also sent in the response header `x-maas-run`."""
    step: int
    """Optimizer step of the exported checkpoint."""
    checkpoint_digest: str
    """Digest of the checkpoint's manifest."""
    data_digest: str
    """Digest of the prepared data set that the run was trained on."""
    spec_digest: str
    """Digest of the TrainSpec."""
    git_commit: str | None = None
    """Commit of the code, where the run was started inside a git repository."""
    weights: Literal["ema"] | None = Field(default=None, exclude_if=lambda value: value is None)
    """`ema` where the moving average of the weights was exported, not the weights themselves."""
    imported: Imported | None = Field(default=None, exclude_if=lambda value: value is None)
    """The file, where the bundle does not come from a run. Then `run` is `import-` and the begin of the file's digest,
    `step` is 0, and the digests of checkpoint, data and spec are empty."""


class BundleInfo(Spec):
    """Everything about a bundle except the graph's bytes."""

    signature: Signature
    task: Literal["classification", "binary", "regression", "other"]
    labels: tuple[str, ...] | None = None
    """Class names in the order of the scores; None where the model does not classify."""
    parity: dict[str, Any]
    """The report of the gate that compared this graph with the trained model."""
    metrics: dict[str, float]
    """Metrics of this very checkpoint on held-out data; empty if nothing was held out."""
    lineage: Lineage


@dataclass(frozen=True)
class Bundle:
    """A bundle in memory; `graph` is the serialized ONNX model."""

    id: str
    info: BundleInfo
    graph: bytes
    sample: bytes | None = None
    """Values that the graph takes, as sample.py writes them; None where none were recorded."""


def save_bundle(store: ObjectStore, info: BundleInfo, graph: bytes, sample: bytes | None = None) -> str:
    """Commits a bundle and returns its id; saving the same content again returns the same id."""
    meta = {"info": info.model_dump(mode="json")}
    bundle_id = _identify(meta, sha256(graph).digest(), sha256(sample).digest() if sample is not None else b"")
    writer = CommitWriter(store, f"{PREFIX}/{bundle_id}", KIND)
    writer.put(GRAPH, graph)
    if sample is not None:
        writer.put(SAMPLE, sample)
    try:
        writer.commit(meta)
    except Conflict:
        load_bundle(store, bundle_id)  # the same content is there already: make sure that it is whole
    return bundle_id


def load_bundle(store: ObjectStore, bundle_id: str) -> Bundle:
    """Loads a bundle; every byte is verified.

    Raises:
        NotFound: there is no such bundle.
        ObjectCorrupt: a part is missing, truncated or altered; the description is not one that this version understands,
            or the content is not the one that the id was taken of.
    """
    committed = _open(store, bundle_id)
    sample = committed.read(SAMPLE) if SAMPLE in committed.parts else None
    return Bundle(bundle_id, _info(committed), committed.read(GRAPH), sample)


def load_info(store: ObjectStore, bundle_id: str) -> BundleInfo:
    """The description alone, without reading the graph."""
    return _info(_open(store, bundle_id))


def graph_size(store: ObjectStore, bundle_id: str) -> int:
    """Bytes of the graph, without reading it. Raises `NotFound`."""
    return _open(store, bundle_id).parts[GRAPH].size


def check_bundle(committed: Committed) -> Iterator[MaasError]:
    """What is wrong with a bundle whose parts are whole; for `fsck`."""
    try:
        _check_id(committed)
        _info(committed)
    except MaasError as error:
        yield error


def _open(store: ObjectStore, bundle_id: str) -> Committed:
    try:
        committed = open_committed(store, f"{PREFIX}/{bundle_id}", KIND)
    except NotFound as error:
        raise NotFound(f"no bundle {bundle_id!r} in {store.uri}") from error
    _check_id(committed)
    return committed


def _identify(meta: Mapping[str, Any], graph_sha256: bytes, sample_sha256: bytes = b"") -> str:
    """The id of a bundle; a digest is empty where there is no such part."""
    return sha256(canonical_json(meta) + graph_sha256 + sample_sha256).hexdigest()[:32]


def _check_id(committed: Committed) -> None:
    """Whoever can write to the store can seal another graph or description; under this id it is refused.

    The digests of the parts are the manifest's, which every reader of a part compares with its bytes.
    """
    graph, sample = committed.parts.get(GRAPH), committed.parts.get(SAMPLE)
    if graph is None or graph.pieces or (sample is not None and sample.pieces):
        raise ObjectCorrupt(f"the manifest of {committed.prefix} names no {GRAPH} with one digest; not used")
    try:
        digests = [bytes.fromhex(part.sha256) if part is not None else b"" for part in (graph, sample)]
        found = _identify(committed.meta, *digests)
    except ValueError:
        found = "none"
    if found != committed.prefix.rpartition("/")[2]:
        raise ObjectCorrupt(
            f"{committed.prefix} holds a bundle whose content has the id {found}: it was changed after it was committed; "
            "not used"
        )


def _info(committed: Committed) -> BundleInfo:
    what = f"the description of {committed.prefix}"
    if "info" not in committed.meta:
        raise ObjectCorrupt(f"{what} is missing; not used")
    try:
        return BundleInfo.model_validate(committed.meta["info"])
    except ValidationError as error:
        raise malformed(what, error) from error
