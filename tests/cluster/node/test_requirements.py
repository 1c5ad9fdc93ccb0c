"""Requirements of a node before Ray starts: each check finds its fault, and this machine passes."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from maas_ray.cluster.node.requirements import (
    MIN_MEMORY_BYTES,
    MIN_OBJECTS_BYTES,
    SHM_SHARE,
    Machine,
    check_files,
    check_memory,
    check_room,
    check_shared_memory,
    check_start,
    container_memory,
    look,
    object_store_bytes,
    refuse_start,
)
from maas_ray.errors import ClusterError
from tests.support.root import ROOT

GIB = 1 << 30
FINE = Machine(
    num_cpus=4, open_files=65_536, memory_bytes=16 * GIB, available_bytes=8 * GIB, shm_bytes=8 * GIB,
    disk_free=50 * GIB, disk_total=100 * GIB,
)  # fmt: skip


def machine(**changed: Any) -> Machine:
    return Machine(**{**vars(FINE), **changed})


def test_this_machine_can_start_ray(tmp_path: Path) -> None:
    found = look(tmp_path, 2)
    assert [check for check in check_start(found, tmp_path) if not check.ok] == []
    refuse_start(check_start(found, tmp_path))
    assert 0 < found.available_bytes <= found.memory_bytes
    assert found.open_files == resource.getrlimit(resource.RLIMIT_NOFILE)[1]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"open_files": 256},
            "the hard limit of open files is 256: set at least 576 for 4 CPUs: ulimit -Hn",
        ),
        ({"available_bytes": 300 << 20}, "0.3 GiB of memory available: free at least 1 GiB"),
        ({"shm_bytes": 64 << 20}, "/dev/shm has 64 MiB free: at least 142 MiB are needed: docker --shm-size=2g"),
        ({"disk_free": 4 * GIB}, "has 4.0 of 100.0 GiB free: Ray refuses work above 95%"),
    ],
    ids=["files", "memory", "shared memory", "disk"],
)
def test_an_unmet_requirement_is_refused_with_the_reason_and_the_fix(
    changed: dict[str, int], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ClusterError) as caught:
        refuse_start(check_start(machine(**changed), tmp_path, {}))
    assert words in str(caught.value)


def test_all_unmet_requirements_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="open files.*; .*memory available"):
        refuse_start(check_start(machine(open_files=10, available_bytes=0), tmp_path, {}))


def test_values_equal_to_the_bounds_pass() -> None:
    assert check_memory(MIN_MEMORY_BYTES).ok
    assert check_shared_memory(int(MIN_OBJECTS_BYTES / SHM_SHARE) + 1).ok
    assert check_shared_memory(None).ok
    assert not check_files(575, 4).ok
    assert check_files(576, 4).ok


def test_the_required_disk_space_is_that_of_ray(tmp_path: Path) -> None:
    assert check_room(tmp_path, 2, 100, threshold=0.99).ok
    assert not check_room(tmp_path, 2, 100).ok
    full = machine(disk_free=2 * GIB)
    assert all(check.ok for check in check_start(full, tmp_path, {"RAY_local_fs_capacity_threshold": "0.99"}))


def test_the_object_store_fits_into_shared_memory() -> None:
    assert object_store_bytes(FINE) is None, "Ray's own choice fits"
    assert object_store_bytes(machine(shm_bytes=1 * GIB)) == int(GIB * SHM_SHARE)
    assert object_store_bytes(machine(shm_bytes=None)) is None


def test_the_memory_of_a_container_counts(tmp_path: Path) -> None:
    assert container_memory(tmp_path)[0] > 1 << 60
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 3000\n")
    assert container_memory(tmp_path)[0] > 1 << 60
    (tmp_path / "memory.max").write_text("10000\n")
    assert container_memory(tmp_path) == (10_000, 2_000)


def test_up_refuses_within_seconds_and_leaves_nothing(tmp_path: Path) -> None:
    """Injected fault: a shell with a hard limit of 300 open files."""
    script = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 300)); os.execv(sys.executable, [sys.executable, '-m', 'maas_ray.cli', 'up', '--num-cpus', '2', '--port', '0', '--dashboard-port', '0'])"
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {
        "MAAS_RAY_HOME": str(tmp_path / "state"),
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(tmp_path),
    }
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "error[cluster_invalid]" in done.stderr
    assert "the hard limit of open files is 300" in done.stderr
    assert time.monotonic() - began < 50, "Ray's own start has a limit of two minutes"
    assert {path.name for path in (tmp_path / "state").iterdir()} <= {"lock"}
