"""Before its first step, a run learns that its model cannot be published."""

import logging

import pytest

from maas_ray.data.spec.features import Features, NumericColumn
from maas_ray.errors import BundleError, NotFound
from maas_ray.store.objects import ObstoreStore, StorageSpec
from maas_ray.train.records.runs import Runs
from maas_ray.train.run import run_training
from maas_ray.train.spec.train import TrainSpec
from maas_ray.train.validation.export_check import check_names
from tests.conftest import RayCluster
from tests.support.paths import digits_spec

TWICE = Features(columns=(NumericColumn(name="a"), NumericColumn(name="a")), task="regression", target="y")
EARLY_EXIT = {"name": "tests.support.unexportable:EarlyExit"}


def spec(store: ObstoreStore, **changes: object) -> TrainSpec:
    fields = {"data": {"uri": "sklearn:wine", "task": "classification"}, "epochs": None, "steps": 1}
    return digits_spec(StorageSpec(uri=store.uri), "r", **{**fields, "workers": {"count": 1}, **changes})


def test_the_spec_decides_what_an_obstacle_means(file_store: ObstoreStore, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(BundleError, match="can be trained, but not published: 'a' is the name.*export_check: warn"):
        check_names(spec(file_store, export_check="refuse"), TWICE)
    with caplog.at_level(logging.WARNING):
        check_names(spec(file_store, export_check="off"), TWICE)
        assert not caplog.records
        check_names(spec(file_store, export_check="warn"), TWICE)
    assert "'a' is the name of several columns" in caplog.text


def test_the_check_is_no_part_of_what_a_run_computes(file_store: ObstoreStore) -> None:
    default = spec(file_store, export_check="refuse")
    assert "export_check" not in default.model_dump(mode="json"), "old runs and their digests are unchanged"
    assert not default.same_training(spec(file_store, export_check="off"))


def test_a_model_without_a_graph_is_refused_before_the_run_exists(
    ray_cluster: RayCluster, file_store: ObstoreStore, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"model": EARLY_EXIT, "epochs": None, "steps": 1}
    with pytest.raises(BundleError, match=r'EarlyExit cannot be exported to ONNX at unexportable.py:\d+ "if x.abs'):
        run_training(spec(file_store, **changes, export_check="refuse"))
    with pytest.raises(NotFound):
        Runs(file_store).get("r")
    with caplog.at_level(logging.WARNING):
        assert run_training(spec(file_store, **changes, export_check="warn")).step == 1
    assert "the model can be trained, but not published: EarlyExit" in caplog.text
