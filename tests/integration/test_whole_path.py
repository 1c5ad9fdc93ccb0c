"""Data to HTTP predictions with every real part, on an S3 store: Ray Train, ONNX, the registry, Ray Serve.

tests/test_readme.py runs the same on a directory by `make quickstart`, tests/integration/test_commands.py a table.
"""

import numpy as np
import pytest

from maas_ray.data.prepare import open_dataset
from maas_ray.optimize.publish import export_run
from maas_ray.registry.models import Registry
from maas_ray.store.fsck import fsck
from maas_ray.train.checkpoint import list_checkpoints
from maas_ray.train.runs import Runs
from maas_ray.train.trained import evaluate_run
from tests.conftest import RayCluster
from tests.support.paths import FinishedRun, infer, served


def test_digits_go_through_an_s3_store_and_are_predicted_over_http_as_well_as_in_torch(
    finished_run: FinishedRun, ray_cluster: RayCluster
) -> None:
    store, result, reports = finished_run.store, finished_run.result, finished_run.reports
    assert reports[-1].step == reports[-1].total_steps == result.step
    assert list_checkpoints(store, "digits")[-1] == result.step
    evaluation = evaluate_run(store, "digits")
    assert evaluation.metrics["accuracy"] > 0.9

    registry = Registry(store)
    version = registry.publish("digits", export_run(store, "digits").bundle_id)
    registry.promote("digits", version.version)
    lineage = registry.info(version).lineage
    assert (lineage.run, lineage.step, lineage.data_digest) == ("digits", result.step, result.data_digest)
    assert lineage.spec_digest == Runs(store).get("digits").spec.digest()

    test = open_dataset(store, result.data_digest).read("test")
    images = test.columns[0]
    with served(finished_run.spec.storage, "digits", ray_cluster.http_port) as url:
        tensor = {"name": "image", "datatype": "FP32", "shape": list(images.shape), "data": images.ravel().tolist()}
        outputs, headers = infer(url, [tensor])
    assert (headers["x-maas-run"], headers["x-maas-version"]) == ("digits", str(version.version))
    assert np.mean(np.array(outputs["class"]) == test.target) == pytest.approx(evaluation.metrics["accuracy"])
    checked = fsck(store)
    assert (checked.problems, checked.orphans, checked.foreign) == ([], [], [])
