"""The result of classical training, committed or not there at all: ONNX, Arrow and JSON, no pickle.

runs/<run>/fitted/manifest.json         step, versions, digests
…/parts-<attempt>/model.onnx            the estimator over preprocessed rows, see graph.py
…/parts-<attempt>/proof.arrow           rows and what scikit-learn says to them, see proof.py
…/parts-<attempt>/history.json          figures of training and validation
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from maas_ray.errors import Conflict, NotFound, ObjectCorrupt
from maas_ray.spec import canonical_json
from maas_ray.store.manifest import Committed, Draft, open_committed
from maas_ray.store.objects import ObjectStore
from maas_ray.train.classical.proof import Proof, pack, unpack
from maas_ray.train.runs import run_prefix

KIND = "fitted"
FORMAT = 1
STEP = 1
"""Fitting is the one step of such a run."""
MODEL, PROOF, HISTORY = "model.onnx", "proof.arrow", "history.json"


@dataclass(frozen=True)
class FittedState:
    """A fitted model as it was committed."""

    graph: bytes
    """Serialized ONNX."""
    proof: Proof
    history: list[dict[str, Any]]
    """`{step, loss, lr}` and `{step, validation: {…}}`, as in other runs' checkpoints."""
    versions: Mapping[str, str]
    """Of what has fitted and converted it."""
    step: int = STEP
    digest: str = ""
    """Of the manifest; empty before it is committed."""


def save_fitted(store: ObjectStore, run: str, state: FittedState) -> Committed:
    """Commits a result. If the run has one already (of an attempt that was then lost), that one is kept.

    Raises:
        ObjectCorrupt: the run has another model, so this is not the same run.
        StoreError: the store failed after bounded retries; nothing is committed.
    """
    draft = Draft(store, _prefix(run), KIND)
    part = draft.put(MODEL, state.graph)
    draft.put(PROOF, pack(state.proof))
    draft.put(HISTORY, canonical_json(state.history))
    try:
        return draft.commit({"format": FORMAT, "step": state.step, "versions": dict(state.versions)})
    except Conflict:
        there = open_committed(store, _prefix(run), KIND)
        if there.parts[MODEL].sha256 != part.sha256:
            raise ObjectCorrupt(
                f"run {run!r} has another fitted model than this attempt computed; the run is not repeatable on this "
                "machine (other hardware or library versions?)"
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
        raise NotFound(f"run {run!r} has no fitted model yet; give --resume to train it") from error
    meta = committed.meta
    if meta.get("format") != FORMAT:
        raise ObjectCorrupt(f"{committed.prefix} has format {meta.get('format')!r}; this version reads {FORMAT}")
    return FittedState(
        graph=committed.read(MODEL),
        proof=unpack(committed.read(PROOF)),
        history=json.loads(committed.read(HISTORY)),
        versions=meta["versions"],
        step=meta["step"],
        digest=committed.digest,
    )


def _prefix(run: str) -> str:
    return f"{run_prefix(run)}/fitted"
