"""Server and model metadata of the Open Inference Protocol v2, as values from which every protocol writes its own form.

Sources: inference_rest.md of the protocol, and triton-inference-server's model_config.proto for the configuration.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maas_ray.bundle.format import BundleInfo, Datatype, TensorSpec
from maas_ray.version import __version__

_CHANNELS = (1, 3)
PLATFORM = "onnxruntime_onnx"
BACKEND = "onnxruntime"
FILENAME = "model.onnx"
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


@dataclass(frozen=True, slots=True)
class ServerMetadata:
    """Name, version and extensions of the server."""

    name: str = "maas-ray"
    version: str = __version__
    extensions: tuple[str, ...] = EXTENSIONS


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """Name, versions and signature of a model."""

    name: str
    versions: tuple[int, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: Mapping[str, Any]
    """Our addition to the protocol: task, labels, run, problems."""


@dataclass(frozen=True, slots=True)
class TensorConfig:
    """One input or output in a `ModelConfig`."""

    name: str
    data_type: str
    """Name in the enum `DataType` of model_config.proto."""
    dims: tuple[int, ...]
    """Shape without the batch dimension."""
    format: str
    """Position of an image's channels, as in the enum `ModelInput.Format`; Triton's image clients read it."""
    optional: bool


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The parts of Triton's ModelConfig that apply here."""

    name: str
    versions: tuple[int, ...]
    """Served versions."""
    max_batch_size: int
    """Maximum rows of one run; 0 for a model without a batch dimension."""
    max_delay_us: int | None
    """How long a run waits for more rows, in microseconds; None: there is no batch dimension."""
    inputs: tuple[TensorConfig, ...]
    outputs: tuple[TensorConfig, ...]


def model_metadata(
    name: str, versions: Sequence[int], info: BundleInfo, parameters: Mapping[str, Any]
) -> ModelMetadata:
    """Returns the metadata of a model.

    Args:
        name: name of the model.
        versions: versions to name.
        info: description of the version.
        parameters: added to the task and the labels.
    """
    labels: dict[str, Any] = {"labels": info.labels} if info.labels is not None else {}
    if info.reader is not None:
        labels["reader"] = info.reader
    signature = info.signature
    about = {"task": info.task, **labels, **_decision(info), **parameters}
    return ModelMetadata(name, tuple(versions), signature.inputs, signature.outputs, about)


def _decision(info: BundleInfo) -> dict[str, Any]:
    """The positive class of a binary classifier, and its decision threshold if it has one of its own."""
    if info.task != "binary" or not info.labels:
        return {}
    value = 0.5 if info.threshold is None else info.threshold.value
    return {"positive_class": info.labels[-1], "threshold": value}


def model_config(
    name: str, versions: Sequence[int], info: BundleInfo, *, max_batch_size: int, max_delay_us: int = 0
) -> ModelConfig:
    """Returns the configuration of a model.

    Args:
        name: name of the model.
        versions: served versions.
        info: description of the version.
        max_batch_size: maximum rows of one run; ignored for a model without a batch dimension.
        max_delay_us: how long a run waits for more rows, in microseconds; likewise.
    """
    signature = info.signature
    is_batched = signature.is_batched
    return ModelConfig(
        name=name,
        versions=tuple(versions),
        max_batch_size=max_batch_size if is_batched else 0,
        max_delay_us=max_delay_us if is_batched else None,
        inputs=tuple(_configure(tensor, is_batched) for tensor in signature.inputs),
        outputs=tuple(_configure(tensor, is_batched) for tensor in signature.outputs),
    )


def _configure(tensor: TensorSpec, is_batched: bool) -> TensorConfig:
    dims = tuple(tensor.shape[1:] if is_batched else tensor.shape)
    return TensorConfig(tensor.name, _config_type(tensor.wire_datatype), dims, _format(dims), tensor.optional)


def _format(dims: Sequence[int]) -> str:
    if len(dims) == 3 and dims[0] in _CHANNELS:
        return "FORMAT_NCHW"
    return "FORMAT_NHWC" if len(dims) == 3 and dims[2] in _CHANNELS else "FORMAT_NONE"


def _config_type(datatype: Datatype) -> str:
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
