"""Small bundle descriptions, for tests in which the graph itself plays no part."""

from maas_ray.bundle.format import BundleInfo, Lineage, Signature, TensorSpec, save_bundle
from maas_ray.store.objects import ObjectStore

LINEAGE = Lineage(run="toy", step=7, checkpoint_digest="c" * 64, data_digest="d" * 64, spec_digest="e" * 64)
SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 4)),),
    outputs=(TensorSpec(name="prediction", datatype="FP32", shape=(-1, 1)),),
)


def toy_info(run: str = "toy") -> BundleInfo:
    return BundleInfo(
        signature=SIGNATURE,
        task="regression",
        parity={"passed": True},
        metrics={"mse": 0.5},
        lineage=LINEAGE.model_copy(update={"run": run}),
    )


def save_toy_bundle(store: ObjectStore, graph: bytes = b"graph", run: str = "toy") -> str:
    """Commits a bundle whose graph is only bytes, and returns its id."""
    return save_bundle(store, toy_info(run), graph)
