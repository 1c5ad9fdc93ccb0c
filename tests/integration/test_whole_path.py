"""Data to HTTP predictions with every real part, on an S3 store: Ray Train, ONNX, the registry, Ray Serve.

tests/docs/test_readme.py runs the same on a directory by `make quickstart`, tests/integration/test_commands.py a table on
S3, so this test need not run each time.
"""

import numpy as np
import pytest

from maas_ray.data.prepare import open_dataset
from maas_ray.optimize.publish import export_run
from maas_ray.registry.models import Registry
from maas_ray.store.fsck import fsck
from maas_ray.store.objects import StorageSpec, open_store
from maas_ray.train.loop.progress import Progress
from maas_ray.train.run import run_training
from maas_ray.train.validation.evaluate_run import evaluate_run
from tests.conftest import RayCluster
from tests.support.paths import digits_spec, infer, served


@pytest.mark.fault
def test_digits_are_trained_on_an_s3_store_and_predicted_over_http_as_well_as_in_torch(
    ray_cluster: RayCluster, s3_endpoint: str
) -> None:
    storage = StorageSpec(uri="s3://maas/whole-path", endpoint=s3_endpoint)
    store = open_store(storage)
    reports: list[Progress] = []
    result = run_training(digits_spec(storage, "digits"), on_progress=reports.append)
    assert reports[-1].step == reports[-1].total_steps == result.step
    evaluation = evaluate_run(store, "digits")
    assert evaluation.metrics["accuracy"] > 0.9

    registry = Registry(store)
    version = registry.publish("digits", export_run(store, "digits").bundle_id)
    registry.promote("digits", version.version)

    test = open_dataset(store, result.data_digest).read("test")
    images = test.columns[0]
    with served(storage, "digits", ray_cluster.http_port) as url:
        tensor = {"name": "image", "datatype": "FP32", "shape": list(images.shape), "data": images.ravel().tolist()}
        outputs, headers = infer(url, [tensor])
    assert (headers["x-maas-run"], headers["x-maas-version"]) == ("digits", str(version.version))
    assert np.mean(np.array(outputs["class"]) == test.target) == pytest.approx(evaluation.metrics["accuracy"])
    checked = fsck(store)
    assert (checked.problems, checked.orphans, checked.foreign) == ([], [], [])
