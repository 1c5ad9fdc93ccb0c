"""Server and model metadata of the Open Inference Protocol v2, as plain JSON values.

Sources: inference_rest.md of the protocol, and triton-inference-server's model_config.proto for the configuration.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from maas_ray.bundle.format import BundleInfo, Datatype, TensorSpec
from maas_ray.version import __version__

_CHANNELS = (1, 3)
PLATFORM = "onnxruntime_onnx"
BACKEND = "onnxruntime"
EXTENSIONS = (
    "classification",
    "generate",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
)
"""Names used by Triton; only extensions that are supported here."""


def server_metadata(name: str = "maas-ray") -> dict[str, Any]:
    """Returns the response of `GET v2`."""
    return {"name": name, "version": __version__, "extensions": list(EXTENSIONS)}


def model_metadata(
    name: str, versions: Sequence[int], info: BundleInfo, parameters: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the response of `GET v2/models/{name}`; `parameters` is our addition to the protocol."""
    labels = {"labels": info.labels} if info.labels is not None else {}
    return {
        "name": name,
        "versions": [str(version) for version in versions],
        "platform": PLATFORM,
        "inputs": [_describe(tensor) for tensor in info.signature.inputs],
        "outputs": [_describe(tensor) for tensor in info.signature.outputs],
        "parameters": {"task": info.task, **labels, **_decision(info), **parameters},
    }


def _decision(info: BundleInfo) -> dict[str, Any]:
    """The positive class of a binary classifier, and its decision threshold if it has one of its own."""
    if info.task != "binary" or not info.labels:
        return {}
    value = 0.5 if info.threshold is None else info.threshold.value
    return {"positive_class": info.labels[-1], "threshold": value}


def model_config(
    name: str, versions: Sequence[int], info: BundleInfo, *, max_batch_size: int, max_delay_us: int = 0
) -> dict[str, Any]:
    """Returns the response of `GET v2/models/{name}/config`: the parts of Triton's ModelConfig that apply here.

    Args:
        name: name of the model.
        versions: served versions.
        info: description of the version.
        max_batch_size: maximum rows of one run; 0 is sent for a model without a batch dimension.
        max_delay_us: how long a run waits for more rows, in microseconds.
    """
    is_batched = info.signature.is_batched
    config: dict[str, Any] = {
        "name": name,
        "platform": PLATFORM,
        "backend": BACKEND,
        "version_policy": {"specific": {"versions": list(versions)}},
        "max_batch_size": max_batch_size if is_batched else 0,
        "input": [
            {**_configure(tensor, is_batched), "format": _format(tensor, is_batched), "optional": tensor.optional}
            for tensor in info.signature.inputs
        ],
        "output": [_configure(tensor, is_batched) for tensor in info.signature.outputs],
        "default_model_filename": "model.onnx",
    }
    if is_batched:
        config["dynamic_batching"] = {"max_queue_delay_microseconds": max_delay_us, "preserve_ordering": False}
    return config


def _describe(tensor: TensorSpec) -> dict[str, Any]:
    described: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
    flags = {name: True for name in ("nullable", "optional") if getattr(tensor, name)}
    if flags:
        described["parameters"] = flags
    return described


def _configure(tensor: TensorSpec, is_batched: bool) -> dict[str, Any]:
    shape = tensor.shape[1:] if is_batched else tensor.shape
    return {"name": tensor.name, "data_type": _config_type(tensor.datatype), "dims": list(shape)}


def _format(tensor: TensorSpec, is_batched: bool) -> str:
    """Returns the position of an image's channels; Triton's image clients read it."""
    dims = tensor.shape[1:] if is_batched else tensor.shape
    if len(dims) == 3 and dims[0] in _CHANNELS:
        return "FORMAT_NCHW"
    return "FORMAT_NHWC" if len(dims) == 3 and dims[2] in _CHANNELS else "FORMAT_NONE"


def _config_type(datatype: Datatype) -> str:
    """Returns the name in model_config.proto."""
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
