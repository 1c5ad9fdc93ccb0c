"""Messages of everything but inference: they contain what the JSON of the same values contains."""

from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from tritonclient.grpc import service_pb2

from maas_ray.bundle.format import Signature
from maas_ray.serve.grpc import inference_pb2 as pb
from maas_ray.serve.grpc import metadata
from maas_ray.serve.http import json_documents
from maas_ray.serve.request.pool_operations import IndexEntry
from maas_ray.serve.telemetry.model_statistics import ModelStatistics, model_statistics
from maas_ray.serve.telemetry.stats import ModelStats
from maas_ray.serve.wire.metadata import ServerMetadata, model_config, model_metadata
from tests.support.onnx_models import LINEAR, MIXED, UNBATCHED, make_info
from tests.support.rig import Waits

IMAGE = Signature.model_validate(
    {
        "inputs": [
            {"name": "nchw", "datatype": "UINT8", "shape": [-1, 3, 8, 8]},
            {"name": "nhwc", "datatype": "BF16", "shape": [-1, 8, 8, 1], "nullable": True, "optional": True},
        ],
        "outputs": [{"name": "y", "datatype": "BOOL", "shape": [-1]}],
    }
)
SIGNATURES = {"linear": LINEAR, "mixed": MIXED, "unbatched": UNBATCHED, "image": IMAGE}


def parsed(document: Any, message: Any) -> bytes:
    """Returns a message as protobuf reads it from JSON; keys that the message does not have are left out."""
    return bytes(ParseDict(document, message, ignore_unknown_fields=True).SerializeToString(deterministic=True))


def test_the_server_has_one_description() -> None:
    server = ServerMetadata("mine")
    expected = parsed(json_documents.server_metadata(server), pb.ServerMetadataResponse())
    assert metadata.server_metadata(server).SerializeToString(deterministic=True) == expected


@pytest.mark.parametrize("signature", SIGNATURES.values(), ids=SIGNATURES)
def test_a_model_has_one_description(signature: Signature) -> None:
    model = model_metadata("m", [1, 20], make_info(signature, labels=("a", "b")), {"run": "r", "problems": ["p"]})
    expected = parsed(json_documents.model_metadata(model), pb.ModelMetadataResponse())
    assert metadata.model_metadata(model).SerializeToString(deterministic=True) == expected


@pytest.mark.parametrize("signature", SIGNATURES.values(), ids=SIGNATURES)
@pytest.mark.parametrize("max_delay_us", [0, 100])
def test_a_model_has_one_configuration(signature: Signature, max_delay_us: int) -> None:
    config = model_config("m", [3], make_info(signature), max_batch_size=64, max_delay_us=max_delay_us)
    expected = parsed({"config": json_documents.model_config(config)}, pb.ModelConfigResponse())
    message = metadata.model_config(config)
    assert message.SerializeToString(deterministic=True) == expected
    assert message.config.HasField("dynamic_batching") == signature.is_batched
    assert expected != parsed(
        {"config": json_documents.model_config(config) | {"name": "other"}}, pb.ModelConfigResponse()
    )


def counted() -> ModelStatistics:
    stats = ModelStats("m", 3)
    stats.waited([Waits()], 0.002)
    for rows in (1, 2, 700):
        stats.ran(2, rows, 0.01)
    stats.served(0.0001, 0.0002, 0.02, 2, 1_700_000_000.1234)
    stats.finished("cancelled", 0.03, 2, 1_700_000_001.5)
    return model_statistics(stats.snapshot())


@pytest.mark.parametrize("models", [[], [model_statistics(ModelStats("new", 1).snapshot()), counted()]])
def test_a_model_has_one_set_of_statistics(models: list[ModelStatistics]) -> None:
    document = {"model_stats": [json_documents.model_statistics(model) for model in models]}
    message = metadata.statistics(models).SerializeToString(deterministic=True)
    assert message == parsed(document, pb.ModelStatisticsResponse())
    # Triton's own message has all our fields and more.
    theirs = ParseDict(document, service_pb2.ModelStatisticsResponse())
    assert service_pb2.ModelStatisticsResponse.FromString(message) == theirs


def test_the_index_has_one_form() -> None:
    entries = [IndexEntry("a", "1", "READY", ""), IndexEntry("b", "", "UNAVAILABLE", "not in the registry")]
    expected = parsed({"models": [entry._asdict() for entry in entries]}, pb.RepositoryIndexResponse())
    assert metadata.index(entries).SerializeToString(deterministic=True) == expected
