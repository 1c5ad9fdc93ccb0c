"""What a node needs before Ray is started on it: open files, memory, shared memory, room on the disk.

Ray itself starts without most of it and fails later, somewhere else, or says so in a log that nobody reads. The checks are
functions of numbers; `look` takes the numbers of this machine.
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
"""Open files that one process may need. Measured with two replicas: 94 in the raylet, 81 in the GCS, 75 in a replica, to which
connections, models and workers are added; HAProxy does not start with fewer than about 330 (haproxy/config/capacity.py)."""
MIN_MEMORY_BYTES = 1 << 30
"""A head and its agents take most of it before anything is trained or served."""
MIN_OBJECTS_BYTES = 128 << 20
"""Smallest store of objects that training and serving get along with; Ray's own minimum is 75 MB."""
OBJECTS_SHARE = 0.3
"""Of the memory, that Ray takes for its store of objects by default."""
SHM_SHARE = 0.9
"""Of the free shared memory, that the store of objects may take."""
_CAPACITY_VARIABLE = "RAY_local_fs_capacity_threshold"
_SHM = Path("/dev/shm")  # noqa: S108 (the system's shared memory)
_GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """What a node has."""

    num_cpus: int
    open_files: int
    """Hard limit."""
    memory_bytes: int
    """Of this machine or container."""
    available_bytes: int
    """Of them, what nobody uses."""
    shm_bytes: int | None
    """Free shared memory; None where the system has no such file system."""
    disk_free: int
    disk_total: int


def look(temp_dir: Path, num_cpus: int | None = None) -> Machine:
    """This machine.

    Args:
        temp_dir: where Ray is to keep its files; it exists.
        num_cpus: that are to be offered; None: what the machine has.
    """
    total, available = _memory()
    bound, used = _container_memory()
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
    """Everything that a start needs, whether it is there or not."""
    return [
        check_files(machine.open_files, machine.num_cpus),
        check_memory(machine.available_bytes),
        check_shared_memory(machine.shm_bytes),
        check_room(temp_dir, machine.disk_free, machine.disk_total, float(environ.get(_CAPACITY_VARIABLE, "0.95"))),
    ]


def refuse_start(checks: list[Check]) -> None:
    """Raises `ClusterError` with all that is missing."""
    missing = [f"{check.detail}: {check.fix}" for check in checks if not check.ok]
    if missing:
        raise ClusterError(f"Ray cannot work on this machine; {'; '.join(missing)}")


def check_files(open_files: int, num_cpus: int) -> Check:
    """Whether a process may open enough files."""
    needed = FILES + FILES_PER_CPU * num_cpus
    detail = f"a process may have {open_files} open files (hard limit)"
    fix = f"allow at least {needed} for {num_cpus} CPUs: ulimit -Hn, LimitNOFILE of systemd, --ulimit nofile of docker"
    return _check("open files", open_files >= needed, detail, fix)


def check_memory(available_bytes: int) -> Check:
    """Whether Ray's own processes have memory."""
    detail = f"{available_bytes / _GIB:.1f} GiB of memory are available"
    fix = f"free at least {MIN_MEMORY_BYTES / _GIB:g} GiB, or give the container more"
    return _check("memory", available_bytes >= MIN_MEMORY_BYTES, detail, fix)


def check_shared_memory(shm_bytes: int | None) -> Check:
    """Whether the store of objects has room; without it Ray keeps objects on the disk and says so in a log only."""
    if shm_bytes is None:
        return Check("shared memory", True, f"no {_SHM} on this system")
    detail = f"{_SHM} has {shm_bytes / 2**20:.0f} MiB free"
    needed = MIN_OBJECTS_BYTES / SHM_SHARE / 2**20
    fix = f"at least {needed:.0f} MiB are needed: --shm-size=2g of docker, or remove files there"
    return _check("shared memory", shm_bytes * SHM_SHARE >= MIN_OBJECTS_BYTES, detail, fix)


def check_room(temp_dir: Path, free: int, total: int, threshold: float = 0.95) -> Check:
    """Whether Ray will write objects and start workers; it stops when the disk is as full as the threshold says."""
    is_full = free < (1 - threshold) * total
    detail = f"the disk of {temp_dir} has {free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
    fix = f"Ray refuses work above {threshold:.0%}: free some, or set TMPDIR to another disk (a short path)"
    return _check("room for Ray", not is_full, detail, fix)


def object_store_bytes(machine: Machine) -> int | None:
    """What the store of objects is to have; None leaves it to Ray, where its own choice fits into shared memory."""
    if machine.shm_bytes is None:
        return None
    fits = int(machine.shm_bytes * SHM_SHARE)
    return fits if machine.memory_bytes * OBJECTS_SHARE > fits else None


def _check(name: str, ok: bool, detail: str, fix: str) -> Check:
    return Check(name, ok, detail, "" if ok else fix)


def _memory() -> tuple[int, int]:
    """Bytes of the machine, and those that are available; where the system does not say, all are."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        total, available = (int(lines[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
        return total, available
    except (OSError, ValueError, KeyError):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total, total


def _container_memory(root: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """Bytes that this container may use, and uses without what the system would give back; no bound: a very large one."""
    unbounded = 1 << 62
    for bound, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            found = int((root / bound).read_text())
            used = int((root / usage).read_text())
            statistics = dict(line.split() for line in (root / bound).with_name("memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no cgroup of this kind, or `max`
            continue
        reclaimable = int(statistics.get("inactive_file", statistics.get("total_inactive_file", 0)))
        return min(found, unbounded), max(0, used - reclaimable)
    return unbounded, 0
