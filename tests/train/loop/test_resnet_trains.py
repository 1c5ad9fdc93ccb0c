"""resnet 50, a network of 23 million weights, learns a batch by heart: in one process, and the same on two replicas."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from maas_ray.data.sources.arrays import tensor_field
from maas_ray.data.spec.features import Features
from maas_ray.data.stored.dataset import TARGET, Dataset, open_dataset, save_dataset
from maas_ray.store.objects import ObstoreStore, open_store
from maas_ray.train.loop.assemble import build_loader, build_plan, build_train_state
from maas_ray.train.loop.step import mean_loss, train_step, warm_up_buckets
from maas_ray.train.parallel.mesh import rank_coordinates
from maas_ray.train.spec.parallelism import MeshLayout
from maas_ray.train.spec.train import TrainSpec
from tests.support.ranks import run_ranks

# A replica gets 8 rows: statistics of 4, as a batch normalization has them, are mostly noise.
BATCH, STEPS, SHAPE, NUM_CLASSES = 16, 16, (16, 16, 3), 4


def _images(store: ObstoreStore, norm: str) -> tuple[TrainSpec, Dataset]:
    """As many images as a batch has, so that each step sees the same ones."""
    rng = np.random.default_rng(0)
    tables = {}
    for split, count in (("train", BATCH), ("validation", 0), ("test", 0)):
        field, array = tensor_field("image", rng.normal(size=(count, *SHAPE)).astype(np.float32))
        labels = pa.array(rng.integers(0, NUM_CLASSES, count))
        tables[split] = pa.table([array, labels], schema=pa.schema([field, (TARGET, labels.type)]))
    features = {
        "columns": [{"kind": "tensor", "name": "image", "shape": SHAPE}],
        "task": "classification",
        "target": "t",
        "labels": [str(number) for number in range(NUM_CLASSES)],
    }
    spec = TrainSpec.model_validate(
        {
            "run": "r",
            "model": {"name": "resnet", "params": {"depth": 50, "norm": norm}},
            "data": {"uri": "images", "task": "classification"},
            "batch": {"global_size": BATCH},
            # Ten times as much throws a network of group normalizations off at first.
            "optimizer": {"lr": 3e-5},
            "steps": STEPS,
            "storage": {"uri": store.uri},
        }
    )
    return spec, save_dataset(store, tables, Features.model_validate(features), {}, {})


def _losses(spec: TrainSpec, dataset: Dataset, layout: MeshLayout) -> list[float]:
    coordinates, num_rows = rank_coordinates(layout, "cpu"), dataset.num_rows["train"]
    state = build_train_state(spec, dataset.features, num_rows, coordinates, torch.device("cpu"))
    plan, loader = build_plan(spec, num_rows), build_loader(spec, dataset, coordinates)
    warm_up_buckets(plan, state, loader)
    state.train()
    return [mean_loss(state, train_step(plan, state, loader, step)[0], step) for step in range(STEPS)]


def _on_replicas(rank: int, spec_json: str, digest: str) -> list[float]:
    spec = TrainSpec.model_validate_json(spec_json)
    return _losses(spec, open_dataset(open_store(spec.storage), digest), MeshLayout(dp_replicate=2))


@pytest.mark.fault
@pytest.mark.timeout(600)
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_resnet_50_learns_a_batch_by_heart_alone_and_on_two_replicas(
    file_store: ObstoreStore, tmp_path: Path, norm: str
) -> None:
    spec, dataset = _images(file_store, norm)
    alone = _losses(spec, dataset, MeshLayout())
    both = run_ranks(_on_replicas, 2, spec.model_dump_json(), dataset.digest)
    print(f"{norm}: {alone}; on two replicas: {both[0]}")  # noqa: T201
    assert both[0] == both[1]
    for losses in (alone, both[0]):
        assert losses[0] > 1.0, "four classes, and nothing learned yet"
        assert losses[-1] < 0.2 * losses[0]
    if norm == "group":  # a batch normalization sees the rows of one replica
        assert both[0][:3] == pytest.approx(alone[:3], rel=1e-3)
