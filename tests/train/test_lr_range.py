"""The learning-rate range test: what it proposes trains well, and what it says of rates that do not."""

import math
from pathlib import Path

import pytest
import torch

from maas_ray.checkpoint.save import Snapshot, save
from maas_ray.data.stored.dataset import Dataset
from maas_ray.errors import SpecError
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.loop.assemble import build_train_state
from maas_ray.train.lr_range import LrRange, Point, conclude, find_learning_rates
from maas_ray.train.parallel.mesh import RankCoordinates
from maas_ray.train.records.runs import Runs, checkpoints_prefix
from maas_ray.train.spec.parallelism import MeshLayout
from maas_ray.train.spec.train import TrainSpec
from maas_ray.train.state.restore import tensors_of
from tests.support.small_runs import make_digits, make_run, train_here

PLAIN_SGD = {"name": "sgd"}


def _find(spec: TrainSpec, dataset: Dataset, **options: float) -> LrRange:
    return find_learning_rates(spec, dataset.digest, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_proposed_rate_trains_well_and_the_one_that_diverged_does_not(
    file_store: ObstoreStore, optimizer: str
) -> None:
    spec, dataset = make_digits(file_store, optimizer={"name": optimizer})
    found = _find(spec, dataset, low=1e-5, high=1e4)
    assert found.below_minimum is not None
    assert found.steepest is not None
    assert found.diverged_at is not None
    good, bad = (train_here(spec, dataset, lr, steps=80) for lr in (found.below_minimum, found.diverged_at))
    first = found.points[0].loss
    assert good < 0.5 * first < first < bad
    assert good < train_here(spec, dataset, found.below_minimum / 30, steps=80), "far below it is slow"


def test_the_course_is_that_of_training_and_the_same_every_time(file_store: ObstoreStore, tmp_path: Path) -> None:
    spec, dataset = make_run(file_store, tmp_path, "mlp")
    options = {"low": 1e-4, "high": 1e-2, "steps": 11}
    seen: list[Point] = []
    found = find_learning_rates(spec, dataset.digest, low=1e-4, high=1e-2, steps=11, on_point=seen.append)
    assert _find(spec, dataset, **options) == found
    assert seen == found.points
    assert [point.lr for point in found.points] == pytest.approx([1e-4 * 10 ** (i / 5) for i in range(11)])
    first = train_here(spec, dataset, 1e-4, steps=1)
    assert found.points[0].loss == found.points[0].smoothed == first, "before the first update no rate plays a part"


def test_a_run_that_starts_from_another_one_is_tested_from_there(file_store: ObstoreStore, tmp_path: Path) -> None:
    spec, dataset = make_run(file_store, tmp_path, "mlp", run="first", objective={})
    state = build_train_state(spec, dataset.features, 62, RankCoordinates(MeshLayout(), None), torch.device("cpu"))
    nothing = {name: tensor * 0 for name, tensor in tensors_of(state).items()}
    Runs(file_store).create(spec, dataset.digest, None)
    save(file_store, checkpoints_prefix("first"), Snapshot(1, 12, nothing, {}, []))
    spec, _ = make_run(file_store, tmp_path, "mlp", run="next", objective={}, init={"run": "first"})
    assert _find(spec, dataset, steps=10).points[0].loss == pytest.approx(math.log(len(dataset.features.labels or ())))


def test_a_loss_that_is_not_finite_ends_the_test(file_store: ObstoreStore, tmp_path: Path) -> None:
    spec, dataset = make_run(file_store, tmp_path, "tests.support.nets:TurnsToNan")
    found = _find(spec, dataset)
    assert (found.points, found.diverged_at, found.below_minimum) == ([], pytest.approx(1e-6), None)
    assert "start with a lower rate" in found.remark


def _course(losses: list[float]) -> list[Point]:
    return [Point(step + 1, 1e-4 * 10**step, loss, loss) for step, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "diverged_at", "steepest", "below_minimum", "says"),
    [
        ([2.0, 1.9, 1.0, 0.5, 9.0], 1.0, 1e-2, 1e-2, "lowest at 0.1 and diverges at 1"),
        ([2.0, 1.9, 1.0, 0.5, 0.6], None, 1e-2, 1e-2, "did not diverge at higher rates"),
        ([2.0, 1.9, 1.5, 0.5], None, 1e-1, 1e-2, "was still falling: raise the highest rate"),
        ([2.0, 2.0, 1.99, 2.0], None, None, None, "raise the highest rate"),
        ([2.0, 2.1, 9.0], 1e-2, None, None, "start with a lower rate"),
        ([], 1e-4, None, None, "start with a lower rate"),
    ],
)
def test_the_proposal_of_a_course(
    losses: list[float], diverged_at: float | None, steepest: float | None, below_minimum: float | None, says: str
) -> None:
    found = conclude(_course(losses), diverged_at)
    assert (found.steepest, found.below_minimum) == (steepest, below_minimum)
    assert says in found.remark


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"low": 0.0}, "positive and at least a factor of 10 apart"),
        ({"low": 1.0, "high": 5.0}, "at least a factor of 10 apart"),
        ({"high": float("nan")}, "at least a factor of 10 apart"),
        ({"steps": 3}, "must be at least 10, not 3"),
        ({"smoothing": 1.0}, "below 1, not 1.0"),
    ],
)
def test_numbers_out_of_range_are_refused(
    file_store: ObstoreStore, tmp_path: Path, options: dict[str, float], says: str
) -> None:
    spec, dataset = make_run(file_store, tmp_path, "mlp")
    with pytest.raises(SpecError, match=says):
        _find(spec, dataset, **options)
