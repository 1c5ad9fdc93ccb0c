"""JSON of everything but inference, as Triton's clients read it."""

from maas_ray.serve.http import json_documents
from maas_ray.serve.telemetry.model_statistics import model_statistics
from maas_ray.serve.telemetry.stats import ModelStats
from maas_ray.serve.wire.metadata import ServerMetadata, model_config, model_metadata
from tests.support.onnx_models import MIXED, UNBATCHED, make_info
from tests.support.rig import Waits


def test_metadata_states_the_signature_the_labels_and_what_may_be_null() -> None:
    info = make_info(MIXED, labels=("no", "yes"))
    metadata = json_documents.model_metadata(model_metadata("m", [1, 3], info, {"run": "r"}))
    assert metadata["versions"] == ["1", "3"]
    assert metadata["inputs"][1] == {
        "name": "age", "datatype": "FP32", "shape": (-1, 1), "parameters": {"nullable": True},
    }  # fmt: skip
    assert metadata["outputs"][0] == {"name": "code", "datatype": "INT64", "shape": (-1, 1)}
    assert metadata["parameters"] == {"task": "other", "labels": ("no", "yes"), "run": "r"}


def test_the_configuration_is_tritons() -> None:
    config = json_documents.model_config(model_config("m", [3], make_info(MIXED), max_batch_size=64, max_delay_us=100))
    assert config["max_batch_size"] == 64
    assert config["dynamic_batching"]["max_queue_delay_microseconds"] == 100
    assert config["input"][0] == {
        "name": "color",
        "data_type": "TYPE_STRING",
        "dims": [1],
        "format": "FORMAT_NONE",
        "optional": False,
    }
    assert config["output"][0] == {"name": "code", "data_type": "TYPE_INT64", "dims": [1]}
    assert (config["backend"], config["version_policy"]) == ("onnxruntime", {"specific": {"versions": [3]}})
    single = json_documents.model_config(model_config("m", [3], make_info(UNBATCHED), max_batch_size=64))
    assert single["max_batch_size"] == 0
    assert single["input"][0]["dims"] == [4]
    assert "dynamic_batching" not in single


def test_only_extensions_that_are_there_are_claimed() -> None:
    claimed = json_documents.server_metadata(ServerMetadata())["extensions"]
    assert "binary_tensor_data" in claimed
    assert not {"sequence", "system_shared_memory", "cuda_shared_memory", "trace", "logging"} & set(claimed)


def test_the_statistics_extension_has_the_shape_of_triton() -> None:
    stats = ModelStats("m", 3)
    for _ in range(3):
        stats.waited([Waits()], 0.002)
    stats.ran(2, 4, 0.01)
    stats.ran(1, 2, 0.005)
    for _ in range(2):
        stats.served(0.0001, 0.0002, 0.02, 2, 1_700_000_000.1234)
    stats.finished("cancelled", 0.03, 2, 1_700_000_001.5)
    none = {"count": 0, "ns": 0}
    assert json_documents.model_statistics(model_statistics(stats.snapshot())) == {
        "name": "m",
        "version": "3",
        "last_inference": 1_700_000_001_500,
        "inference_count": 4,
        "execution_count": 2,
        "inference_stats": {
            "success": {"count": 2, "ns": 40_000_000},
            "fail": {"count": 1, "ns": 30_000_000},
            "queue": {"count": 3, "ns": 6_000_000},
            "compute_input": {"count": 2, "ns": 200_000},
            "compute_infer": {"count": 3, "ns": 25_000_000},
            "compute_output": {"count": 2, "ns": 400_000},
            "cache_hit": none,
            "cache_miss": none,
        },
        "response_stats": {},
        "batch_stats": [
            {"batch_size": size, **{part: {"count": 1, "ns": ns} for part, ns in parts.items()}}
            for size, parts in (
                (2, {"compute_input": 0, "compute_infer": 5_000_000, "compute_output": 0}),
                (4, {"compute_input": 0, "compute_infer": 10_000_000, "compute_output": 0}),
            )
        ],
        "memory_usage": [],
    }
