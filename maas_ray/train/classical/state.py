"""The result of a classical training, committed atomically: ONNX, Arrow and JSON, no pickle.

runs/<run>/fitted/manifest.json         step, versions, digests
…/parts-<attempt>/model.onnx            the estimator over preprocessed rows, see graph.py
…/parts-<attempt>/proof.arrow           rows and scikit-learn's predictions, see proof.py
…/parts-<attempt>/history.json          metrics of training and validation
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from maas_ray.errors import Conflict, NotFound, ObjectCorrupt
from maas_ray.spec import canonical_json
from maas_ray.store.manifest import Committed, CommitWriter, open_committed
from maas_ray.store.objects import ObjectStore
from maas_ray.store.sealed import Document, parse_json, read_document
from maas_ray.train.classical.proof import Proof, pack, unpack
from maas_ray.train.records.runs import FITTED, run_prefix

KIND = FITTED
FORMAT = 1
STEP = 1
"""A classical run has one step."""
MODEL, PROOF, HISTORY = "model.onnx", "proof.arrow", "history.json"


@dataclass(frozen=True)
class FittedState:
    """A committed fitted model."""

    graph: bytes
    """Serialized ONNX."""
    proof: Proof
    history: list[dict[str, Any]]
    """`{step, loss, lr}` and `{step, validation: {…}}`, as in other runs' checkpoints."""
    versions: Mapping[str, str]
    """Versions of the libraries that fitted and converted it."""
    step: int = STEP
    digest: str = ""
    """Digest of the manifest; empty before the commit."""


def save_fitted(store: ObjectStore, run: str, state: FittedState) -> Committed:
    """Commits a result. An existing result, of an attempt that was then lost, is kept.

    Raises:
        ObjectCorrupt: the existing result differs, so that the run is not reproducible.
        StoreError: the store failed after a limited number of retries; nothing is committed.
    """
    writer = CommitWriter(store, _prefix(run), KIND)
    part = writer.put(MODEL, state.graph)
    writer.put(PROOF, pack(state.proof))
    writer.put(HISTORY, canonical_json(state.history))
    try:
        return writer.commit({"format": FORMAT, "step": state.step, "versions": dict(state.versions)})
    except Conflict:
        there = open_committed(store, _prefix(run), KIND)
        if MODEL not in there.parts or there.parts[MODEL].sha256 != part.sha256:
            raise ObjectCorrupt(
                f"the fitted model of run {run!r} differs from that of this attempt: the run is not reproducible on "
                "this machine; check hardware and library versions"
            ) from None
        return there


def load_fitted(store: ObjectStore, run: str, step: int | None = None) -> FittedState:
    """Loads a run's result; every byte is verified.

    Raises:
        NotFound: the run has none, or `step` is another one than the first.
        ObjectCorrupt: a part is missing, truncated or altered.
    """
    if step not in (None, STEP):
        raise NotFound(f"run {run!r} has no step {step}: fitting is its one step, {STEP}")
    try:
        committed = open_committed(store, _prefix(run), KIND)
    except NotFound as error:
        raise NotFound(f"run {run!r} has no fitted model yet; train it with --resume") from error
    meta = committed.meta
    if meta.get("format") != FORMAT:
        raise ObjectCorrupt(
            f"{committed.prefix} has format {str(meta.get('format'))[:20]}; this version reads {FORMAT}"
        )
    said = read_document(_FittedMeta, meta, f"the manifest of {committed.prefix}")
    if missing := {MODEL, PROOF, HISTORY} - committed.parts.keys():
        raise ObjectCorrupt(f"{committed.prefix} has no {min(missing)}")
    return FittedState(
        graph=committed.read(MODEL),
        proof=unpack(committed.read(PROOF)),
        history=parse_json(committed.read(HISTORY), f"the history of {committed.prefix}"),
        versions=said.versions,
        step=said.step,
        digest=committed.digest,
    )


class _FittedMeta(Document):
    step: int
    versions: dict[str, str]


def _prefix(run: str) -> str:
    return f"{run_prefix(run)}/{FITTED}"
