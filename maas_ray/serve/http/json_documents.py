"""JSON of everything but inference, written from the values that all protocols share.

Source: github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md, and Triton's extensions.
"""

from typing import Any

from maas_ray.bundle.format import TensorSpec
from maas_ray.serve.telemetry.model_statistics import Duration, ModelStatistics
from maas_ray.serve.wire.metadata import (
    BACKEND,
    FILENAME,
    PLATFORM,
    ModelConfig,
    ModelMetadata,
    ServerMetadata,
    TensorConfig,
)


def server_metadata(server: ServerMetadata) -> dict[str, Any]:
    """Returns the response of `GET v2`."""
    return {"name": server.name, "version": server.version, "extensions": list(server.extensions)}


def model_metadata(model: ModelMetadata) -> dict[str, Any]:
    """Returns the response of `GET v2/models/{name}`."""
    return {
        "name": model.name,
        "versions": [str(version) for version in model.versions],
        "platform": PLATFORM,
        "inputs": [_tensor(tensor) for tensor in model.inputs],
        "outputs": [_tensor(tensor) for tensor in model.outputs],
        "parameters": dict(model.parameters),
    }


def model_config(config: ModelConfig) -> dict[str, Any]:
    """Returns the response of `GET v2/models/{name}/config`."""
    document: dict[str, Any] = {
        "name": config.name,
        "platform": PLATFORM,
        "backend": BACKEND,
        "version_policy": {"specific": {"versions": list(config.versions)}},
        "max_batch_size": config.max_batch_size,
        "input": [
            {**_tensor_config(tensor), "format": tensor.format, "optional": tensor.optional} for tensor in config.inputs
        ],
        "output": [_tensor_config(tensor) for tensor in config.outputs],
        "default_model_filename": FILENAME,
    }
    if config.max_delay_us is not None:
        document["dynamic_batching"] = {
            "max_queue_delay_microseconds": config.max_delay_us,
            "preserve_ordering": False,
        }
    return document


def model_statistics(model: ModelStatistics) -> dict[str, Any]:
    """Returns an entry of `model_stats` in the response of `GET v2/models/stats`."""
    none = {"count": 0, "ns": 0}
    return {
        "name": model.name,
        "version": str(model.version),
        "last_inference": model.last_inference_ms,
        "inference_count": model.inference_count,
        "execution_count": model.execution_count,
        "inference_stats": {
            "success": _duration(model.success),
            "fail": _duration(model.fail),
            "queue": _duration(model.queue),
            "compute_input": _duration(model.compute_input),
            "compute_infer": _duration(model.compute_infer),
            "compute_output": _duration(model.compute_output),
            "cache_hit": none,
            "cache_miss": none,
        },
        "response_stats": {},
        "batch_stats": [
            {
                "batch_size": batch.batch_size,
                "compute_input": {"count": batch.runs.count, "ns": 0},
                "compute_infer": _duration(batch.runs),
                "compute_output": {"count": batch.runs.count, "ns": 0},
            }
            for batch in model.batches
        ],
        "memory_usage": [],
    }


def _tensor(tensor: TensorSpec) -> dict[str, Any]:
    described: dict[str, Any] = {"name": tensor.name, "datatype": tensor.wire_datatype, "shape": tensor.shape}
    flags: dict[str, Any] = {name: True for name in ("nullable", "optional") if getattr(tensor, name)}
    if tensor.accepts:
        flags["accepts"] = list(tensor.accepts)
    if tensor.null_value is not None:
        flags["null_value"] = tensor.null_value
    if tensor.encoding is not None:
        flags["encoding"] = tensor.encoding.kind
    if flags:
        described["parameters"] = flags
    return described


def _tensor_config(tensor: TensorConfig) -> dict[str, Any]:
    return {"name": tensor.name, "data_type": tensor.data_type, "dims": list(tensor.dims)}


def _duration(duration: Duration) -> dict[str, int]:
    return {"count": duration.count, "ns": duration.ns}
