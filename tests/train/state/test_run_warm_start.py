"""Runs on Ray Train that start from another one, on other workers and another layout."""

import pytest
import torch

from maas_ray.errors import ModelError, NotFound, SpecError
from maas_ray.store.objects import ObstoreStore, StorageSpec
from maas_ray.train.records.runs import Runs
from maas_ray.train.run import run_training
from maas_ray.train.validation.load_model import load_trained
from tests.conftest import RayCluster
from tests.support.paths import digits_spec


@pytest.mark.fault
def test_a_run_starts_from_the_weights_of_another_one_and_is_resumed_as_such(
    file_store: ObstoreStore, ray_cluster: RayCluster
) -> None:
    storage = StorageSpec(uri=file_store.uri)
    run_training(digits_spec(storage, "first", epochs=None, steps=3, workers={"count": 1}))
    changes = {"epochs": None, "steps": 1, "optimizer": {"lr": 1e-12}, "seed": 8, "parallelism": {"dp_shard": 2}}
    spec = digits_spec(storage, "next", **changes, init={"run": "first"})
    run_training(spec)
    record = Runs(file_store).get("next")
    assert record.start is not None
    assert (record.start["run"], record.start["step"]) == ("first", 3)
    assert record.spec.init is not None
    assert record.spec.init.step == 3
    first, following = (load_trained(file_store, run).net.state_dict() for run in ("first", "next"))
    for name, value in first.items():
        torch.testing.assert_close(following[name], value, atol=1e-9, rtol=0)
    assert run_training(spec, resume=True).step == 1
    with pytest.raises(SpecError, match="other values of init"):
        run_training(spec.model_copy(update={"init": None}), resume=True)


@pytest.mark.fault
def test_a_start_that_does_not_fit_is_refused_before_a_worker_starts(
    file_store: ObstoreStore, ray_cluster: RayCluster
) -> None:
    storage = StorageSpec(uri=file_store.uri)
    with pytest.raises(NotFound, match="runs/nobody/checkpoints has no committed checkpoint"):
        run_training(digits_spec(storage, "next", init={"run": "nobody"}))
    with pytest.raises(ModelError, match="the directory /nowhere does not exist"):
        run_training(digits_spec(storage, "next", init={"hf": "/nowhere"}))
    assert Runs(file_store).all() == []
