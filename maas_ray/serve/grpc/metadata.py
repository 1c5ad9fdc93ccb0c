"""Messages of everything but inference, written from the values that all protocols share."""

from collections.abc import Iterable
from typing import Any

from maas_ray.bundle.format import TensorSpec
from maas_ray.serve.grpc import inference_pb2 as pb
from maas_ray.serve.request.pool_operations import IndexEntry
from maas_ray.serve.telemetry.model_statistics import Duration, ModelStatistics
from maas_ray.serve.wire.metadata import BACKEND, FILENAME, PLATFORM, ModelConfig, ModelMetadata, ServerMetadata


def server_metadata(server: ServerMetadata) -> Any:
    """Returns a `ServerMetadataResponse`."""
    return pb.ServerMetadataResponse(name=server.name, version=server.version, extensions=server.extensions)


def model_metadata(model: ModelMetadata) -> Any:
    """Returns a `ModelMetadataResponse`, which has no parameters."""

    def described(tensor: TensorSpec) -> Any:
        return pb.ModelMetadataResponse.TensorMetadata(
            name=tensor.name, datatype=tensor.wire_datatype, shape=tensor.shape
        )

    return pb.ModelMetadataResponse(
        name=model.name,
        versions=[str(version) for version in model.versions],
        platform=PLATFORM,
        inputs=[described(tensor) for tensor in model.inputs],
        outputs=[described(tensor) for tensor in model.outputs],
    )


def model_config(config: ModelConfig) -> Any:
    """Returns a `ModelConfigResponse`."""
    message = pb.ModelConfig(
        name=config.name,
        platform=PLATFORM,
        backend=BACKEND,
        version_policy=pb.ModelVersionPolicy(specific=pb.ModelVersionPolicy.Specific(versions=config.versions)),
        max_batch_size=config.max_batch_size,
        input=[
            pb.ModelInput(
                name=tensor.name,
                data_type=tensor.data_type,
                dims=tensor.dims,
                format=tensor.format,
                optional=tensor.optional,
            )
            for tensor in config.inputs
        ],
        output=[
            pb.ModelOutput(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims) for tensor in config.outputs
        ],
        default_model_filename=FILENAME,
    )
    if config.max_delay_us is not None:
        message.dynamic_batching.SetInParent()
        message.dynamic_batching.max_queue_delay_microseconds = config.max_delay_us
    return pb.ModelConfigResponse(config=message)


def statistics(models: Iterable[ModelStatistics]) -> Any:
    """Returns a `ModelStatisticsResponse`."""
    return pb.ModelStatisticsResponse(model_stats=[_model_statistics(model) for model in models])


def index(entries: Iterable[IndexEntry]) -> Any:
    """Returns a `RepositoryIndexResponse`."""
    return pb.RepositoryIndexResponse(
        models=[pb.RepositoryIndexResponse.ModelIndex(**entry._asdict()) for entry in entries]
    )


def _model_statistics(model: ModelStatistics) -> Any:
    return pb.ModelStatistics(
        name=model.name,
        version=str(model.version),
        last_inference=model.last_inference_ms,
        inference_count=model.inference_count,
        execution_count=model.execution_count,
        inference_stats=pb.InferStatistics(
            success=_duration(model.success),
            fail=_duration(model.fail),
            queue=_duration(model.queue),
            compute_input=_duration(model.compute_input),
            compute_infer=_duration(model.compute_infer),
            compute_output=_duration(model.compute_output),
            cache_hit=pb.StatisticDuration(),
            cache_miss=pb.StatisticDuration(),
        ),
        batch_stats=[
            pb.InferBatchStatistics(
                batch_size=batch.batch_size,
                compute_input=pb.StatisticDuration(count=batch.runs.count),
                compute_infer=_duration(batch.runs),
                compute_output=pb.StatisticDuration(count=batch.runs.count),
            )
            for batch in model.batches
        ],
    )


def _duration(duration: Duration) -> Any:
    return pb.StatisticDuration(count=duration.count, ns=duration.ns)
