"""Checks before training that the trained model will have a servable graph, by the code that publishes it."""

from collections.abc import Sequence

from torch import nn

from maas_ray.arrays import Array
from maas_ray.data.spec.features import Features
from maas_ray.export.onnx_export import export
from maas_ray.export.parity import ParitySpec, check_parity

_TABLE = ParitySpec(atol=1e-4, rtol=1e-3, batch_sizes=(1, 5), num_random=16, num_real=8)
_TENSORS = ParitySpec(atol=1e-4, rtol=1e-3, batch_sizes=(1, 3), num_random=2, num_real=1)
"""Few rows, fewer of images and texts, and ten times the tolerance of a publication: activations of untrained weights
have other magnitudes."""


def quick_parity(features: Features) -> ParitySpec:
    """The rows and tolerances of the check before training."""
    return _TABLE if all(column.kind in ("numeric", "categorical") for column in features.columns) else _TENSORS


def check_export(net: nn.Module, features: Features, rows: Sequence[Array]) -> None:
    """Exports an untrained network as `publish` does, and compares the graph with it on a few rows.

    Args:
        net: the network; it is not changed.
        features: the fitted features.
        rows: some real raw rows, as `Dataset.read` returns them.

    Raises:
        BundleError: it has no graph; the message contains the line of the module and the usual fix.
        GateError: the graph computes something else, or the model mixes the rows of a batch.
        ModelError: the model fails on rows that a client could send.
    """
    graph, _ = export(net, features)
    check_parity(net, features, graph, rows, quick_parity(features))
