"""The bundle's format: an ONNX graph and the description that makes it servable. Runs nothing.

    bundles/<id>/manifest.json                 the description, and the digest of the graph
    bundles/<id>/parts-<attempt>/model.onnx    weights inline, preprocessing inside
    bundles/<id>/parts-<attempt>/sample.json   valid input values, for its first runs; optional
    bundles/<id>/parts-<attempt>/tokenizer.json  the tokenizer of an input that takes texts; optional

`id` is derived from the content, so committing the same bundle twice is harmless.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

from pydantic import Field, ValidationError

from maas_ray.decoding.spec import ImageEncoding, TextEncoding
from maas_ray.errors import Conflict, MaasError, NotFound, ObjectCorrupt
from maas_ray.spec import Spec, canonical_json
from maas_ray.store.manifest import Committed, CommitWriter, open_committed
from maas_ray.store.objects import ObjectStore
from maas_ray.store.sealed import malformed

PREFIX = "bundles"
KIND = "bundle"
GRAPH = "model.onnx"
MAX_GRAPH_BYTES = (1 << 31) - 1
"""Maximum size of a protocol buffers message, which contains the graph with its weights."""
SAMPLE = "sample.json"
TOKENIZER = "tokenizer.json"

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
    """Sizes; -1 is a variable size, and as the first size the batch dimension."""
    nullable: bool = False
    """Whether a JSON null is valid: a missing value (NaN or an empty string), which the graph's preprocessing fills."""
    optional: bool = Field(default=False, exclude_if=lambda value: not value)
    """Whether the input has a default value in the graph, so that a request may omit it."""
    boolean: bool = Field(default=False, exclude_if=lambda value: not value)
    """Whether it is a column of booleans: FP32 in the graph (NaN is missing), BOOL or FP32 on the wire."""
    null_value: int | None = Field(default=None, exclude_if=lambda value: value is None)
    """INT64: the value that a null represents; None: a null is invalid."""
    encoding: ImageEncoding | TextEncoding | None = Field(
        default=None, discriminator="kind", exclude_if=lambda value: value is None
    )
    """How elements of BYTES become rows of this input; None: only its own datatype is accepted."""

    @property
    def wire_datatype(self) -> Datatype:
        """The datatype in the model's metadata."""
        return "BOOL" if self.boolean else self.datatype

    @property
    def accepts(self) -> tuple[Datatype, ...]:
        """Datatypes in which a request may send it, in addition to that in the metadata."""
        if self.boolean:
            return (self.datatype,)
        return () if self.encoding is None else ("BYTES",)


class BatchAxis(Spec):
    """The dimension that counts the rows of a request: the first one of every input and output, or none."""

    name: str | None
    """Its name in the graph, `first` if it has none; None: there is no batch dimension; requests cannot be split."""
    origin: Literal["exporter", "graph", "user"]
    """Source of the statement: our exporter, the names and operators of an imported graph, or the user at import."""


class PaddedAxis(Spec):
    """A variable dimension other than the rows, in which requests of different sizes may share a run: shorter ones are
    padded, a mask marks the padding, and their results are cut.
    """

    name: str
    """Its name in the graph."""
    mask: str
    """The input that is the mask: 1 for elements, 0 for padding."""
    inputs: dict[str, int]
    """The axis of the dimension in each input that has it."""
    outputs: dict[str, int]
    """The axis of the dimension in each output that has it."""
    values: dict[str, float | str] = Field(default_factory=dict)
    """Padding values of inputs, other than 0 and the empty string."""


class Signature(Spec):
    """The graph's inputs and outputs, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch: BatchAxis | None = Field(default=None, exclude_if=lambda value: value is None)
    """The batch dimension; None if it is not stated, as in bundles of older versions: each load then determines it from
    the graph's names and operators."""
    padded: PaddedAxis | None = Field(default=None, exclude_if=lambda value: value is None)
    """None: requests share a run only if their sizes other than rows are equal."""

    @property
    def required(self) -> tuple[TensorSpec, ...]:
        """Inputs that every request must contain."""
        return tuple(tensor for tensor in self.inputs if not tensor.optional)

    @property
    def is_batched(self) -> bool:
        """Whether the first dimension of every tensor counts rows; independent of whether rows may be merged."""
        if self.batch is not None:
            return self.batch.name is not None
        tensors = (*self.required, *self.outputs)
        return bool(self.required) and all(tensor.shape and tensor.shape[0] == -1 for tensor in tensors)


class Imported(Spec):
    """The file that a bundle was imported from."""

    file: str
    """Its name, without the directory."""
    sha256: str
    """Hex digest of the file, including all files of its external data."""
    producer: str
    """The program that wrote it, according to the file; empty if unknown."""


class Lineage(Spec):
    """The origin of a bundle, sufficient to find and repeat every step."""

    run: str
    """Id of the training run, also sent in the response header `x-maas-run`."""
    step: int
    """Optimizer step of the exported checkpoint."""
    checkpoint_digest: str
    """Digest of the checkpoint's manifest."""
    data_digest: str
    """Digest of the prepared data set of the run."""
    spec_digest: str
    """Digest of the TrainSpec."""
    git_commit: str | None = None
    """Commit of the code, if the run was started inside a git repository."""
    weights: Literal["ema"] | None = Field(default=None, exclude_if=lambda value: value is None)
    """`ema` if the moving average of the weights was exported instead of the weights."""
    imported: Imported | None = Field(default=None, exclude_if=lambda value: value is None)
    """The imported file, if the bundle is not from a run. Then `run` is `import-` and a prefix of the file's digest,
    `step` is 0, and the digests of checkpoint, data and spec are empty."""


class DecisionThreshold(Spec):
    """The probability of the positive class from which on the graph decides for it."""

    value: float = Field(ge=0, le=1)
    positive_class: str
    """The last of the labels."""
    rule: str
    """`objective.threshold` of the run."""
    split: str | None = None
    """The split on which the value was chosen; None: it is the number in the spec."""


class OutputUnits(Spec):
    """How the graph converts the trained network's outputs to the units of the data: `output * scale + shift`."""

    shift: tuple[float, ...]
    """One entry per output; the mean of the target over the training split."""
    scale: tuple[float, ...]
    """As `shift`; the standard deviation of the target over the training split."""


class BundleInfo(Spec):
    """Everything about a bundle except the graph's bytes."""

    signature: Signature
    task: Literal["classification", "binary", "regression", "other"]
    labels: tuple[str, ...] | None = None
    """Class names in the order of the scores; None if the model is not a classifier."""
    threshold: DecisionThreshold | None = Field(default=None, exclude_if=lambda value: value is None)
    """Binary: the decision threshold; None: 0.5, or not a binary classifier."""
    units: OutputUnits | None = Field(default=None, exclude_if=lambda value: value is None)
    """Regression: the conversion of predictions inside the graph; None: there is none."""
    parity: dict[str, Any]
    """The report of the parity gate, which compared this graph with the trained model."""
    metrics: dict[str, float]
    """Metrics of the exported checkpoint on held-out data; empty if no data was held out."""
    reader: dict[str, Any] | None = Field(default=None, exclude_if=lambda value: value is None)
    """How the training data's text was read, for clients that read files of raw rows; None: not known."""
    lineage: Lineage


@dataclass(frozen=True)
class Bundle:
    """A bundle in memory; `graph` is the serialized ONNX model."""

    id: str
    info: BundleInfo
    graph: bytes
    sample: bytes | None = None
    """Valid input values in the format of sample.py; None if none were recorded."""
    tokenizer: bytes | None = None
    """The tokenizer's JSON file, if an input takes texts."""


def save_bundle(
    store: ObjectStore, info: BundleInfo, graph: bytes, sample: bytes | None = None, tokenizer: bytes | None = None
) -> str:
    """Commits a bundle and returns its id; saving the same content again returns the same id."""
    meta = {"info": info.model_dump(mode="json")}
    contents = {GRAPH: graph, SAMPLE: sample, TOKENIZER: tokenizer}
    digests = [b"" if content is None else sha256(content).digest() for content in contents.values()]
    bundle_id = _identify(meta, *digests)
    writer = CommitWriter(store, f"{PREFIX}/{bundle_id}", KIND)
    for name, content in contents.items():
        if content is not None:
            writer.put(name, content)
    try:
        writer.commit(meta)
    except Conflict:
        load_bundle(store, bundle_id)  # the same content is already committed: verifies it
    return bundle_id


def load_bundle(store: ObjectStore, bundle_id: str) -> Bundle:
    """Loads a bundle; every byte is verified.

    Raises:
        NotFound: there is no such bundle.
        ObjectCorrupt: a part is missing, truncated or altered; this version cannot read the description; or the content
            does not match the id.
    """
    committed = _open(store, bundle_id)
    sample, tokenizer = (committed.read(name) if name in committed.parts else None for name in (SAMPLE, TOKENIZER))
    return Bundle(bundle_id, _info(committed), committed.read(GRAPH), sample, tokenizer)


def load_info(store: ObjectStore, bundle_id: str) -> BundleInfo:
    """Loads only the description, without the graph."""
    return _info(_open(store, bundle_id))


def graph_size(store: ObjectStore, bundle_id: str) -> int:
    """Size of the graph in bytes, without reading it. Raises `NotFound`."""
    return _open(store, bundle_id).parts[GRAPH].size


def check_bundle(committed: Committed) -> Iterator[MaasError]:
    """The errors in a bundle whose parts are intact; for `fsck`."""
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


def _identify(meta: Mapping[str, Any], *digests: bytes) -> str:
    """The id of a bundle, from the digests of its graph, sample and tokenizer; that of a missing part is empty."""
    return sha256(b"".join([canonical_json(meta), *digests])).hexdigest()[:32]


def _check_id(committed: Committed) -> None:
    """Checks that the content matches the id: any writer of the store could seal another graph or description.

    The digests of the parts are those in the manifest, which every reader of a part compares with its bytes.
    """
    parts = [committed.parts.get(name) for name in (GRAPH, SAMPLE, TOKENIZER)]
    if parts[0] is None or any(part is not None and part.pieces for part in parts):
        raise ObjectCorrupt(f"the manifest of {committed.prefix} lists no {GRAPH} with one digest; not used")
    try:
        digests = [bytes.fromhex(part.sha256) if part is not None else b"" for part in parts]
        found = _identify(committed.meta, *digests)
    except ValueError:
        found = "none"
    if found != committed.prefix.rpartition("/")[2]:
        raise ObjectCorrupt(
            f"{committed.prefix} contains a bundle whose content has the id {found}: it was changed after its commit; "
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
