"""The doctor: a healthy cluster has no findings, and each injected fault is found."""

import os
from pathlib import Path

import pytest

from maas_ray.cluster import doctor
from maas_ray.cluster.health.doctor import (
    check_environment,
    check_haproxy,
    check_launcher,
    check_package,
    check_store,
    judge_internals,
)
from maas_ray.cluster.node.environment import BINARY_VARIABLE
from maas_ray.haproxy import REASON_FILE
from maas_ray.ray_internals.contract import READ_IN
from maas_ray.ray_internals.symbol import Broken
from maas_ray.store.objects import StorageSpec
from tests.conftest import RayCluster


def test_a_healthy_cluster_has_no_findings(ray_cluster: RayCluster, storage: StorageSpec):
    checks = {check.name: check for check in doctor(state_dir=ray_cluster.state_dir, storage=storage)}
    assert [check for check in checks.values() if not check.ok] == []
    assert {"python", "haproxy", "ray", "dashboard", "resources", "environment of node 127.0.0.1", "store"} <= set(
        checks
    )
    assert "8 CPU" in checks["resources"].detail


def test_a_variable_that_differs_on_a_node_is_found(ray_cluster: RayCluster):
    expected = dict(ray_cluster.env)
    assert check_environment("node", expected, expected).ok
    wrong = check_environment("node", expected, {**expected, "RAY_SERVE_ENABLE_HA_PROXY": "0"})
    assert not wrong.ok
    assert "RAY_SERVE_ENABLE_HA_PROXY='0' instead of '1'" in wrong.detail
    missing = {name: value for name, value in expected.items() if name != "RAY_worker_niceness"}
    assert not check_environment("node", expected, missing).ok
    assert check_environment("this process", expected, missing, may_lack=True).ok


@pytest.mark.parametrize(
    ("package", "floor", "ok"),
    [("ray", "2.56", True), ("ray", "99", False), ("onnxruntime", "1.0", True), ("no-such-package", "1", False)],
)
def test_versions_below_a_floor_are_found(package: str, floor: str, ok: bool):
    assert check_package(package, floor).ok is ok


def test_an_unreachable_store_is_a_finding_and_not_a_crash(tmp_path):
    (tmp_path / "file").touch()
    check = check_store(StorageSpec(uri=f"file://{tmp_path}/file/store"))
    assert not check.ok
    assert "StoreDenied" in check.detail


def test_without_a_cluster_only_the_machine_is_checked(tmp_path):
    checks = {check.name: check for check in doctor(state_dir=tmp_path)}
    assert "ray" not in checks or "RAY_ADDRESS" in os.environ
    assert {"python", "disk", "accelerators"} <= set(checks)
    assert checks["ray internals"].ok, checks["ray internals"].detail


def test_changes_of_another_ray_are_reported_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maas_ray.cluster.health.doctor.version", lambda package: "2.61.0")
    broken = [Broken(f"ray._private.part{number}", "does not exist", "placing replicas") for number in range(7)]
    found = judge_internals(broken)
    assert not found.ok
    assert f"Ray 2.61.0 is installed, and its private API differs from {READ_IN}" in found.detail
    assert "ray._private.part0 does not exist (for placing replicas)" in found.detail
    assert found.detail.endswith("and 2 more")
    assert f"=={READ_IN}" in found.fix


def test_an_haproxy_without_our_launcher_or_hardening_is_found(tmp_path: Path):
    assert check_launcher("node a", {BINARY_VARIABLE: "/venv/bin/maas-ray-haproxy"}).ok
    for path in ("", "/usr/sbin/haproxy"):
        assert not check_launcher("node a", {BINARY_VARIABLE: path}).ok
    (tmp_path / "node").mkdir()
    assert check_haproxy(tmp_path).ok
    (tmp_path / "node" / REASON_FILE).write_text("Unexpected: a line is missing\n")
    found = check_haproxy(tmp_path)
    assert (found.ok, found.detail) == (False, "Unexpected: a line is missing")
