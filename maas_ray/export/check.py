"""Checks before training that the trained model will have a servable graph, by the code that publishes it."""

from collections.abc import Sequence

from torch import nn

from maas_ray.arrays import Array
from maas_ray.data.spec.features import Features
from maas_ray.export.onnx_export import export
from maas_ray.export.parity import ParitySpec, check_parity

NUM_REAL = 8
"""Real rows of the check."""
QUICK = ParitySpec(atol=1e-4, rtol=1e-3, batch_sizes=(1, 5), num_random=16, num_real=NUM_REAL)
"""Few rows, and ten times the tolerance of a publication: activations of untrained weights have other magnitudes."""


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
    check_parity(net, features, graph, rows, QUICK)
