"""Weights of rows and classes in the training loss: torch's and scikit-learn's definitions, normalized over the batch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn

from maas_ray.data.stored.dataset import Dataset
from maas_ray.errors import SpecError
from maas_ray.models.spec import ModelSpec
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.loop.assemble import build_loader, build_plan, build_train_state, count_class_rows
from maas_ray.train.loop.loss import build_loss
from maas_ray.train.loop.step import mean_loss, train_step
from maas_ray.train.parallel.mesh import RankCoordinates
from maas_ray.train.spec.class_weights import resolve_weights
from maas_ray.train.spec.optim import ObjectiveSpec, loss_name
from maas_ray.train.spec.parallelism import MeshLayout
from maas_ray.train.spec.train import TrainSpec
from tests.support.small_runs import make_run

PLAIN = ModelSpec(name="mlp", params={"size": 1, "dropout": 0.0})
LABELS = ["0", "1", "2", "3"]
WEIGHTED = {"uri": "rows.csv", "task": "classification", "weight": "w"}


def _first_losses(spec: TrainSpec, dataset: Dataset, steps: int) -> tuple[list[float], list[float]]:
    """The losses of the first steps, and those that torch computes from the same weights and rows."""
    spec = spec.model_copy(update={"model": PLAIN})
    coordinates, num_rows = RankCoordinates(MeshLayout(), None), dataset.num_rows["train"]
    state = build_train_state(
        spec,
        dataset.features,
        num_rows,
        coordinates,
        torch.device("cpu"),
        torch.float64,
        count_class_rows(spec, dataset),
    )
    plan, loader = build_plan(spec, num_rows), build_loader(spec, dataset, coordinates)
    counts = dataset.count_classes().tolist()
    weights = resolve_weights(spec.objective.class_weights, LABELS, counts) or [1.0] * 4
    of_class = torch.tensor(weights, dtype=torch.float64)
    ours, theirs = [], []
    for step in range(steps):
        batch = loader.load(step * plan.global_size, plan.stop)[0]
        with torch.no_grad():
            losses = nn.functional.cross_entropy(
                state.model(state.rows(batch)), batch.target, weight=of_class, reduction="none"
            )
        row = torch.ones(batch.num_rows) if batch.weight is None else batch.weight
        theirs.append(float((losses * row).sum() / (of_class[batch.target] * row).sum()))
        share, _ = train_step(plan, state, loader, step)
        ours.append(mean_loss(state, share, step))
    return ours, theirs


@pytest.mark.parametrize("class_weights", [None, "balanced", {"0": 1, "1": 0, "2": 5, "3": 0.25}])
@pytest.mark.parametrize("data", [WEIGHTED, {"uri": "rows.csv", "task": "classification"}])
def test_the_loss_is_the_weighted_mean_of_the_batch_also_of_the_short_last_one(
    file_store: ObstoreStore, tmp_path: Path, data: dict[str, Any], class_weights: Any
) -> None:
    spec, dataset = make_run(
        file_store, tmp_path, "mlp", data=data, objective={"class_weights": class_weights}, steps=None,
        epochs=1,
    )  # fmt: skip
    ours, theirs = _first_losses(spec, dataset, 6)
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_equal_weights_are_no_weights(file_store: ObstoreStore, tmp_path: Path) -> None:
    losses = []
    for class_weights in (None, dict.fromkeys(LABELS, 7.0)):
        spec, dataset = make_run(file_store, tmp_path, "mlp", objective={"class_weights": class_weights})
        losses.append(_first_losses(spec, dataset, 3)[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_a_batch_whose_weights_are_all_zero_changes_no_weight(file_store: ObstoreStore, tmp_path: Path) -> None:
    spec, dataset = make_run(
        file_store, tmp_path, "mlp", data=WEIGHTED, objective={"class_weights": {"0": 1e-300, "1": 0, "2": 0, "3": 0}}
    )
    coordinates = RankCoordinates(MeshLayout(), None)
    state = build_train_state(spec, dataset.features, 62, coordinates, torch.device("cpu"))

    class Nothing:
        def load(self, cursor: int, stop: int) -> list[Any]:
            batches = build_loader(spec, dataset, coordinates).load(cursor, stop)
            for batch in batches:
                batch.weight.zero_()
            return batches

    before = [weight.detach().clone() for weight in state.weights]
    share, _ = train_step(build_plan(spec, 62), state, Nothing(), 0)
    assert float(share) == 0.0
    assert all(torch.isfinite(weight).all() for weight in state.weights)
    assert all(torch.equal(one, two) for one, two in zip(before, state.weights, strict=True))


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    target = np.repeat([0, 1, 2], [5, 90, 30])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=target)
    assert resolve_weights("balanced", ["a", "b", "c"], [5, 90, 30]) == pytest.approx(expected.tolist())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_pos_weight_is_that_of_torch_and_no_part_of_metrics(smoothing: float) -> None:
    spec = ObjectiveSpec(pos_weight=3.5, label_smoothing=smoothing)
    logits, target = torch.randn(20, 1, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2

    def torch_loss(pos_weight: Tensor | None) -> Tensor:
        wanted = target * (1 - smoothing) + smoothing / 2
        return nn.BCEWithLogitsLoss(pos_weight=pos_weight, reduction="none")(logits[:, 0], wanted)

    torch.testing.assert_close(
        build_loss(spec, "binary", is_training=True)(logits, target), torch_loss(torch.tensor(3.5))
    )
    torch.testing.assert_close(build_loss(spec, "binary")(logits, target), torch_loss(None))


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"a": 1.0}, "has a class 'b' without a weight; give one weight for each of 'a', 'b'"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "has no class 'c'"),
        ({"a": -1.0, "b": 1.0}, "at least 0"),
        ({"a": 0.0, "b": 0.0}, "not all 0"),
        ({"a": float("nan"), "b": 1.0}, "finite"),
        ("balanced", "at least one training row of each class"),
    ],
)
def test_weights_that_do_not_fit_the_classes_are_refused(weights: Any, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        resolve_weights(weights, ["a", "b"], [3, 0])


@pytest.mark.parametrize(
    ("spec", "task", "says"),
    [
        ({"class_weights": "balanced"}, "regression", "needs classes, but the task is regression"),
        ({"class_weights": "balanced"}, "language_modeling", "needs classes"),
        ({"pos_weight": 2.0}, "classification", "is for the task binary"),
        ({"pos_weight": 2.0, "class_weights": {"a": 1}}, "binary", "keep one of them"),
    ],
)
def test_weights_that_the_task_does_not_have_are_refused(spec: dict[str, Any], task: Any, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        loss_name(ObjectiveSpec(**spec), task)
