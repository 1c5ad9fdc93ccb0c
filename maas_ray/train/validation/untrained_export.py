"""Exports the untrained model of a spec: the work of the child process of train/validation/export_check.py."""

import importlib
import os
import sys
from typing import Any

import torch
from torch import nn

from maas_ray.data.spec.features import Features
from maas_ray.data.stored.dataset import Dataset, open_dataset
from maas_ray.errors import BundleError, GateError, MaasError, ModelError
from maas_ray.export.check import check_export, quick_parity
from maas_ray.export.onnx_export import explain_per_token, refuse_size
from maas_ray.models.hugging_face.formats import has_hf_format
from maas_ray.store.objects import open_store
from maas_ray.train.loop.assemble import build_net, build_or_defer
from maas_ray.train.spec.train import TrainSpec

_IMPORTED_LATE = (
    "torch.export._trace",
    "torch.onnx._internal.exporter._compat",
    "onnxscript.function_libs.torch_lib.ops",
    "onnxruntime",
    "sympy",
)
"""What the exporter imports at its first use."""


def prepare() -> None:
    """Imports everything before a child is forked."""
    for name in _IMPORTED_LATE:
        importlib.import_module(name)


def check(payload: dict[str, Any], blobs: list[bytearray]) -> tuple[dict[str, Any], list[bytes]]:
    """The fields of an `ExportVerdict` for a spec and its data.

    Args:
        payload: see `run_check`.
        blobs: none.
    """
    os.environ.update(payload["environ"])
    sys.path += [path for path in payload["path"] if path not in sys.path]
    torch.set_num_threads(1)
    spec = TrainSpec.model_validate_json(payload["spec"])
    try:
        dataset = open_dataset(open_store(spec.storage), payload["data_digest"])
        net = _build(spec, dataset.features)
    except BundleError as error:
        return {"obstacle": str(error), "code": error.code}, []
    except MaasError as error:  # a rank reports it, or it is true for this node only
        return {"note": f"whether the model can be published was not checked: {error}"}, []
    return judge(net, dataset), []


def judge(net: nn.Module, dataset: Dataset) -> dict[str, Any]:
    """The fields of an `ExportVerdict` for a network."""
    features = dataset.features
    if features.is_per_token:
        if has_hf_format(net):
            return {}
        return {"note": f"the model can be trained, but not published: {explain_per_token(net, features.task)}"}
    try:
        check_export(net, features, dataset.spread("train", quick_parity(features).num_real))
    except (BundleError, GateError, ModelError) as error:
        return {"obstacle": str(error), "code": error.code}
    return {}


def _build(spec: TrainSpec, features: Features) -> nn.Module:
    """The whole network; one that is too large for a graph is not given memory."""
    net, deferred = build_or_defer(spec, features, spec.layouts())
    if deferred is not None and not features.is_per_token:
        refuse_size(net)
        return build_net(spec, features)
    return net
