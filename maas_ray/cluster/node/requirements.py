"""Checks the requirements of a node before Ray starts: open files, memory, shared memory, disk space.

Ray starts without most of them and fails later in another place, or reports the problem only in a log. The checks are
functions of numbers; `look` measures this machine.
"""

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from maas_ray.cluster.check import Check
from maas_ray.errors import ClusterError
from maas_ray.process.open_files import limit

FILES = 512
FILES_PER_CPU = 16
"""Open files that one process may need. Measured with two replicas: 94 in the raylet, 81 in the GCS, 75 in a replica,
plus connections, models and workers; HAProxy does not start with fewer than about 330 (haproxy/config/capacity.py)."""
MIN_MEMORY_BYTES = 1 << 30
"""A head node and its agents use most of it before any training or serving."""
MIN_OBJECTS_BYTES = 128 << 20
"""Smallest object store that suffices for training and serving; Ray's own minimum is 75 MB."""
OBJECTS_SHARE = 0.3
"""Share of the memory that Ray uses for its object store by default."""
SHM_SHARE = 0.9
"""Share of the free shared memory that the object store may use."""
_CAPACITY_VARIABLE = "RAY_local_fs_capacity_threshold"
_SHM = Path("/dev/shm")  # noqa: S108 (the system's shared memory)
_GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """The amounts that a node has."""

    num_cpus: int
    open_files: int
    """Hard limit of one process."""
    memory_bytes: int
    """Memory of this machine or container."""
    available_bytes: int
    """Available part of the memory."""
    shm_bytes: int | None
    """Free shared memory; None if the system has no such file system."""
    disk_free: int
    disk_total: int


def look(temp_dir: Path, num_cpus: int | None = None) -> Machine:
    """Measures this machine.

    Args:
        temp_dir: existing directory for Ray's files.
        num_cpus: logical CPUs that Ray will offer; None: the machine's.
    """
    total, available = _memory()
    bound, used = container_memory()
    disk = shutil.disk_usage(temp_dir)
    return Machine(
        num_cpus=num_cpus if num_cpus is not None else os.cpu_count() or 1,
        open_files=limit(),
        memory_bytes=min(total, bound),
        available_bytes=min(available, max(0, bound - used)),
        shm_bytes=shutil.disk_usage(_SHM).free if sys.platform == "linux" and _SHM.is_dir() else None,
        disk_free=disk.free,
        disk_total=disk.total,
    )


def check_start(machine: Machine, temp_dir: Path, environ: Mapping[str, str] = os.environ) -> list[Check]:
    """All checks of the requirements, passed or failed."""
    return [
        check_files(machine.open_files, machine.num_cpus),
        check_memory(machine.available_bytes),
        check_shared_memory(machine.shm_bytes),
        check_room(temp_dir, machine.disk_free, machine.disk_total, float(environ.get(_CAPACITY_VARIABLE, "0.95"))),
    ]


def refuse_start(checks: list[Check]) -> None:
    """Raises `ClusterError` with all failed checks."""
    missing = [f"{check.detail}: {check.fix}" for check in checks if not check.ok]
    if missing:
        raise ClusterError(f"this machine does not meet Ray's requirements; {'; '.join(missing)}")


def check_files(open_files: int, num_cpus: int) -> Check:
    """Whether the limit of open files is sufficient."""
    needed = FILES + FILES_PER_CPU * num_cpus
    detail = f"the hard limit of open files is {open_files}"
    fix = f"set at least {needed} for {num_cpus} CPUs: ulimit -Hn, systemd LimitNOFILE, docker --ulimit nofile"
    return _check("open files", open_files >= needed, detail, fix)


def check_memory(available_bytes: int) -> Check:
    """Whether the available memory suffices for Ray's own processes."""
    detail = f"{available_bytes / _GIB:.1f} GiB of memory available"
    fix = f"free at least {MIN_MEMORY_BYTES / _GIB:g} GiB, or raise the container's limit"
    return _check("memory", available_bytes >= MIN_MEMORY_BYTES, detail, fix)


def check_shared_memory(shm_bytes: int | None) -> Check:
    """Whether the object store fits into shared memory; else Ray keeps objects on disk and only logs it."""
    if shm_bytes is None:
        return Check("shared memory", True, f"no {_SHM} on this system")
    detail = f"{_SHM} has {shm_bytes / 2**20:.0f} MiB free"
    needed = MIN_OBJECTS_BYTES / SHM_SHARE / 2**20
    fix = f"at least {needed:.0f} MiB are needed: docker --shm-size=2g, or remove files from it"
    return _check("shared memory", shm_bytes * SHM_SHARE >= MIN_OBJECTS_BYTES, detail, fix)


def check_room(temp_dir: Path, free: int, total: int, threshold: float = 0.95) -> Check:
    """Whether the disk is below the threshold above which Ray writes no objects and starts no workers."""
    is_full = free < (1 - threshold) * total
    detail = f"the disk of {temp_dir} has {free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
    fix = f"Ray refuses work above {threshold:.0%} usage: free space, or set TMPDIR to another disk (a short path)"
    return _check("room for Ray", not is_full, detail, fix)


def object_store_bytes(machine: Machine) -> int | None:
    """Size of the object store; None if Ray's own choice fits into shared memory."""
    if machine.shm_bytes is None:
        return None
    fits = int(machine.shm_bytes * SHM_SHARE)
    return fits if machine.memory_bytes * OBJECTS_SHARE > fits else None


def _check(name: str, ok: bool, detail: str, fix: str) -> Check:
    return Check(name, ok, detail, "" if ok else fix)


def _memory() -> tuple[int, int]:
    """Total and available bytes of the machine; all are available if the system does not report it."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        total, available = (int(lines[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
        return total, available
    except (OSError, ValueError, KeyError):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total, total


def container_memory(root: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """Memory limit and usage of this container, without reclaimable caches; without a limit, a very large number."""
    unbounded = 1 << 62
    for bound, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            found = int((root / bound).read_text())
            used = int((root / usage).read_text())
            statistics = dict(line.split() for line in (root / bound).with_name("memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such cgroup, or no limit (`max`)
            continue
        reclaimable = int(statistics.get("inactive_file", statistics.get("total_inactive_file", 0)))
        return min(found, unbounded), max(0, used - reclaimable)
    return unbounded, 0
