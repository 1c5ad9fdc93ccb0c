"""How many workers a spec allows, and how each number of them shares the model."""

from typing import Any

import pytest
from pydantic import ValidationError

from maas_ray.errors import SpecError
from maas_ray.store.objects import StorageSpec
from maas_ray.train.ranks.capacity import round_down
from maas_ray.train.spec.train import TrainSpec
from tests.support.paths import digits_spec


def _spec(workers: dict[str, Any], layout: dict[str, Any] | None = None, **changes: Any) -> TrainSpec:
    storage = StorageSpec(uri="file:///nowhere")
    return digits_spec(storage, "r", workers=workers, parallelism=layout or {}, **changes)


@pytest.mark.parametrize(
    ("workers", "layout", "layouts"),
    [
        ({}, {}, ["one process"]),
        ({"count": 4}, {"dp_shard": 2}, ["HSDP 2x2"]),
        ({"min": 1, "max": 3}, {}, ["one process", "DDP 2", "DDP 3"]),
        ({"min": 1, "max": 5}, {"tp": 2}, ["TP 2", "DDP 2 x TP 2"]),
        ({"min": 3, "max": 9}, {"tp": 2, "pp": 2}, ["TP 2 x PP 2 1f1b", "DDP 2 x TP 2 x PP 2 1f1b"]),
        ({"min": 2, "max": 4}, {"dp_shard": None, "dp_replicate": 1}, ["FSDP 2", "FSDP 3", "FSDP 4"]),
        ({"min": 2, "max": 6}, {"dp_shard": None, "dp_replicate": 2}, ["DDP 2", "HSDP 2x2", "HSDP 2x3"]),
        ({"min": 1, "max": 9}, {"dp_shard": 2, "dp_replicate": 2}, ["HSDP 2x2"]),
    ],
)
def test_every_number_of_workers_is_of_whole_models(
    workers: dict[str, Any], layout: dict[str, Any], layouts: list[str]
) -> None:
    spec = _spec(workers, layout)
    assert [str(one) for one in spec.layouts()] == layouts
    assert TrainSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    ("workers", "layout", "message"),
    [
        ({"min": 1}, {}, "workers.min and workers.max together"),
        ({"count": 2, "min": 1, "max": 2}, {}, "either workers.count, or"),
        ({"min": 3, "max": 2}, {}, "workers.min 3 is larger than workers.max 2"),
        ({"min": 3, "max": 3}, {"tp": 2}, "needs a multiple of 2 ranks"),
        ({"min": 5, "max": 9}, {"dp_shard": 2, "dp_replicate": 2}, "needs a multiple of 4 ranks"),
        ({"min": 1, "max": 65}, {}, "smaller than the 65 data-parallel ranks of 65 workers"),
        ({"count": 2}, {"dp_shard": None}, "both open"),
    ],
)
def test_what_can_never_be_arranged_is_refused(workers: dict[str, Any], layout: dict[str, Any], message: str) -> None:
    with pytest.raises((ValidationError, SpecError), match=message):
        _spec(workers, layout)


@pytest.mark.parametrize(("room", "size"), [(0, 0), (1, 0), (2, 2), (3, 2), (5, 4), (99, 8)])
def test_capacity_is_rounded_down_to_a_valid_size(room: int, size: int) -> None:
    assert round_down(room, [2, 4, 8]) == size
