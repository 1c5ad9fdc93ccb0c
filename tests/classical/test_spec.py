"""What a spec of a classical model may say, and what is refused instead of ignored."""

from typing import Any

import pytest

from maas_ray.errors import ModelError, SpecError
from maas_ray.models.build import build_model
from maas_ray.models.classical import CLASSICAL
from maas_ray.models.spec import ModelSpec
from maas_ray.row import Row
from maas_ray.spec import parse_spec
from maas_ray.train.spec.train import TrainSpec


def _spec(task: str = "classification", model: dict[str, Any] | None = None, **fields: Any) -> TrainSpec:
    document = {"run": "r", "model": model or {"name": "svm"}, "data": {"uri": "sklearn:iris", "task": task}}
    return parse_spec(TrainSpec, {**document, **fields})


@pytest.mark.parametrize("name", CLASSICAL)
def test_a_spec_outlives_its_way_through_the_store(name: str) -> None:
    spec = _spec(model={"name": name}, seed=7, workers={"cpus": 2, "max_restarts": 0})
    assert TrainSpec.model_validate(spec.model_dump(mode="json")) == spec
    assert spec.same_training(_spec(model={"name": name}, seed=7)) == []
    assert spec.same_training(_spec(model={"name": name}, seed=8)) == ["seed"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"optimizer": {"lr": 0.5}}, "optimizer"),
        ({"schedule": {"warmup_steps": 5}}, "schedule"),
        ({"batch": {"global_size": 8}}, "batch"),
        ({"epochs": 3}, "epochs"),
        ({"steps": 3}, "steps"),
        ({"precision": "bf16", "max_grad_norm": 1.0}, "max_grad_norm, precision"),
        ({"objective": {"l2": 0.1}}, "objective"),
        ({"checkpoint": {"every_steps": 5}}, "checkpoint"),
        ({"workers": {"count": 2}}, "workers.count"),
        ({"workers": {"gpus": 1}}, "workers.gpus"),
        ({"model": {"name": "svm", "initialization": "normal"}}, "model.initialization"),
    ],
)
def test_fields_that_would_do_nothing_are_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(SpecError, match=f"{named} would have no effect: svm is fitted by scikit-learn in one task"):
        _spec(**fields)


@pytest.mark.parametrize(
    ("task", "model", "message"),
    [
        ("regression", {"name": "random_forest", "params": {"class_weight": "balanced"}}, "the task is regression"),
        ("binary", {"name": "svm", "params": {"epsilon": 0.2}}, "epsilon 0.2 is only for regression"),
        ("binary", {"name": "gradient_boosting", "params": {"max_bins": 256}}, "max_bins.* less than or equal to 255"),
        ("binary", {"name": "svm", "params": {"gama": 1}}, "unknown key 'gama'; did you mean 'gamma'"),
        ("binary", {"name": "decision_tree", "params": {"max_depth": 3}}, "max_depth is called size here; use size: 3"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(task: str, model: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        _spec(task, model)


def test_a_classical_model_is_not_a_torch_module() -> None:
    with pytest.raises(ModelError, match="svm is trained by scikit-learn and is not a torch module"):
        build_model(ModelSpec(name="svm"), Row((4,)), 3)
