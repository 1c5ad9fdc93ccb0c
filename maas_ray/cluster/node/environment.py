"""Environment variables of Ray's processes. Only builds dictionaries: sets no variable and starts no process.

Ray Serve and Ray Train read their variables at import, in every process, so that a runtime environment is too late:
the variables must be in the environment of `ray start` on each node, and of the program that connects.
"""

import errno
import os
import random
import shutil
import socket
import sys
import sysconfig
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from maas_ray.addresses import is_loopback
from maas_ray.errors import ClusterError, SpecError
from maas_ray.haproxy import HOST_FILE_VARIABLE
from maas_ray.suggestions import known_names

Profile = Literal["fast", "portable"]
PROFILES: tuple[Profile, ...] = get_args(Profile)

LOOPBACK = "127.0.0.1"
LAUNCHER = "maas-ray-haproxy"
"""Program that Serve runs as HAProxy: `maas_ray.haproxy`, installed with the package."""
BINARY_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
CONTROLLER_VARIABLE = "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH"
FRONT_LABEL, NO_FRONT = "maas-ray/front", "no"
"""Label of a node without a front (`ray start --labels=maas-ray/front=no`); the head node always has a front."""
MAX_ANSWER_S = 600
"""Upper limit of a pool's request timeout; HAProxy waits slightly longer."""
HARD_STOP_S = 2 * MAX_ANSWER_S + 60
"""Time for a replaced HAProxy to answer its last requests if the limits of the pools are unknown: the longest request
plus the longest drain. The launcher shortens it to what the pools need."""
REPLICA_PORTS = 500
"""Number of ports of one protocol for the replicas of a local cluster. Serve does not reassign a port while a replaced
HAProxy may still send requests to it."""
MAX_PORT = 65535
_NUM_SINGLE = 10

_COMMON = {
    # Without it the dashboard's Train tab is empty.
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    # By default Ray Train's barriers wait forever; a lost rank must end the attempt.
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "60",
    # Between SIGTERM and SIGKILL for a stopped job: 3 s by default, too short to commit a checkpoint.
    "RAY_JOB_STOP_WAIT_TIME_S": "60",
    # By default Train workers change their working directory, which breaks relative paths in specs.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Ray starts workers at nice 15: on a busy machine every other process would have priority.
    "RAY_worker_niceness": "0",
    # 4 MiB by default, which a batch of images between two deployments exceeds.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(256 << 20),
    # If on, replicas listen on a port of every address that unpickles data from anyone.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "0",
    # 2 GiB by default, and it applies before our own checks; replicas lower it to their pool's limit.
    "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(256 << 20),
    # By default the controller of a training run polls its workers every 2 s: up to 4 s of each start and end.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Makes Serve's controller place replicas as their pool specifies, and start a front on each node.
    CONTROLLER_VARIABLE: "maas_ray.serve.controller.install:install",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
}

_BY_PROFILE: dict[Profile, dict[str, str]] = {
    "fast": {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Lets our replicas take over their HTTP server; those of other applications are unchanged.
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "maas_ray.serve.replica.server_hook:middlewares",
        # Every application: retry requests that were not sent. The launcher adds "empty-response" for idempotent pools.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure",
        "RAY_SERVE_HAPROXY_RETRIES": "3",
        # By default HAProxy waits for a silent replica without a limit; pools answer or refuse before this one.
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": str(MAX_ANSWER_S + 60),
        # Applies only while the client must send or read: a long computation does not trigger it. Serve: an hour.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
        # Upper limit: the launcher lowers it on each node to what the limit of open files allows.
        "RAY_SERVE_HAPROXY_MAXCONN": "20000",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(HARD_STOP_S),
        # After three consecutive failures Serve replaces the actor that reloads HAProxy, and the proxy behind sleeping
        # pools. Serve's period is 10 s: a new replica would receive no request for half a minute.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "5",
        # 3 x 5 s by default; Serve then kills a proxy that has just started: too short on a busy machine.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "20",
        # Serve collects HAProxy's metrics in Python from a datagram per request; replicas have their own metrics.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    },
    # Set explicitly: a value from the caller's shell must not enable half of the other profile.
    "portable": {
        "RAY_SERVE_ENABLE_HA_PROXY": "0",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0",
        # Serve's proxy would open its gRPC port on every address of the machine.
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "maas_ray.serve.replica.server_hook:before_proxy",
    },
}

_ONE_MACHINE = {
    # The name is misleading: 0 makes the node's address 127.0.0.1, so that every port of Ray binds to loopback.
    # Ray replaces `--node-ip-address 127.0.0.1` alone by the machine's external address.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
_SEVERAL_MACHINES = {
    # Time for a lost head node to return before the other nodes leave the cluster.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
}


@dataclass(frozen=True)
class Ports:
    """The ports of one local cluster; two clusters on a machine share none."""

    gcs: int
    dashboard: int
    http: int
    """HTTP port for predictions."""
    client: int
    """Port of Ray Client, which Ray 2.60 always starts if gRPC is installed."""
    fallback_http: int
    fallback_grpc: int
    haproxy_stats: int
    haproxy_metrics: int
    autoscaler_metrics: int
    dashboard_metrics: int
    replica_http: int
    """First of `REPLICA_PORTS` ports."""
    replica_grpc: int
    """First of `REPLICA_PORTS` ports."""


def profile_flags(profile: Profile) -> dict[str, str]:
    """The variables of every node of any cluster of this profile, in a data center or on a laptop."""
    return _COMMON | _BY_PROFILE[profile]


def find_launcher() -> str | None:
    """Path of the program that Serve runs as HAProxy; None if it is not installed."""
    beside = Path(sysconfig.get_path("scripts"), LAUNCHER)
    return str(beside) if os.access(beside, os.X_OK) else shutil.which(LAUNCHER)


def default_profile() -> Profile:
    """`fast` where HAProxy exists (Linux), else `portable`."""
    return "fast" if sys.platform == "linux" else "portable"


def environment(
    profile: Profile,
    *,
    ports: Ports,
    temp_dir: Path,
    token_path: Path,
    min_draining_s: int = 5,
    host: str = LOOPBACK,
) -> dict[str, str]:
    """All variables of a node on this machine, for `ray start` and for each program that connects.

    Args:
        profile: `fast` puts HAProxy in front of the replicas (Linux); `portable` uses Serve's Python proxy.
        ports: the cluster's ports.
        temp_dir: directory of sockets, with a short name: a Unix socket's path has at most 107 bytes.
        token_path: file of the token that every RPC and the dashboard require.
        min_draining_s: seconds during which a stopping replica still answers. Ray's default of 30 is for load
            balancers that poll; the one on this machine is notified immediately.
        host: address of the node; loopback for a cluster on this machine only.

    Raises:
        ClusterError: the profile is unknown, unavailable on this platform, or not completely installed.
    """
    if profile not in PROFILES:
        raise ClusterError(f"no profile {profile!r}; {known_names(profile, list(PROFILES), 'profiles')}")
    if profile == "fast" and sys.platform != "linux":
        raise ClusterError("the profile 'fast' needs HAProxy, which Ray ships for Linux only; use --profile portable")
    flags = profile_flags(profile) | {
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        # Ray starts an idle worker per CPU for the first driver. Train workers and replicas have their own environment
        # and cannot use those workers, which would compete with them for this machine's few cores.
        "RAY_prestart_worker_first_driver": "0",
        # It would add a process to each training run; train/ranks/ray_train polls for draining nodes itself.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "AUTOSCALER_METRIC_PORT": str(ports.autoscaler_metrics),
        "DASHBOARD_METRIC_PORT": str(ports.dashboard_metrics),
    }
    flags |= _ONE_MACHINE if is_loopback(host) else _SEVERAL_MACHINES
    if profile == "fast":
        flags |= _haproxy(ports, temp_dir / "h", min_draining_s)
        if is_loopback(host):
            flags[HOST_FILE_VARIABLE] = str(temp_dir / "h" / "host")
    return flags


def _haproxy(ports: Ports, directory: Path, min_draining_s: int) -> dict[str, str]:
    """Paths and ports of the HAProxy of one cluster; two clusters would share Ray's fixed defaults."""
    launcher = find_launcher()
    if launcher is None:
        raise ClusterError(
            f"{LAUNCHER} is not installed; without it HAProxy's statistics and admin socket are open to everyone; "
            "reinstall the package (pip install maas-ray), or use --profile portable"
        )
    return {
        # Measured on 2 cores: a second thread costs 20 % more CPU time per request and adds no throughput.
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, (os.cpu_count() or 1) // 2))),
        BINARY_VARIABLE: launcher,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports.haproxy_stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports.haproxy_metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports.fallback_http),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(ports.fallback_grpc),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports.replica_http),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports.replica_http + REPLICA_PORTS),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(ports.replica_grpc),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(ports.replica_grpc + REPLICA_PORTS),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(min_draining_s),
    }


def choose_ports(http: int | None = None, dashboard: int | None = None) -> Ports:
    """Chooses free ports on this machine and reserves them from all other callers while the result exists.

    Args:
        http: HTTP port; None: 8000 if free, else any free one; 0: any free one.
        dashboard: port of the dashboard, likewise; its default is 8265.

    Raises:
        ClusterError: a requested port is in use, or no block of free ports exists.
        SpecError: a number is not a valid port.
    """
    claim, start = _claim_block(_NUM_SINGLE + 2 * REPLICA_PORTS + 3)
    block = iter(range(start, start + _NUM_SINGLE))
    with ExitStack() as refused:
        refused.callback(claim.close)
        ports = Ports(
            http=_claim(http, 8000, block, "http port"),
            dashboard=_claim(dashboard, 8265, block, "dashboard port"),
            gcs=next(block),
            client=next(block),
            fallback_http=next(block),
            fallback_grpc=next(block),
            haproxy_stats=next(block),
            haproxy_metrics=next(block),
            autoscaler_metrics=next(block),
            dashboard_metrics=next(block),
            replica_http=start + _NUM_SINGLE,
            replica_grpc=start + _NUM_SINGLE + REPLICA_PORTS + 1,
        )
        refused.pop_all()
    weakref.finalize(ports, claim.close)
    return ports


def is_free(port: int) -> bool:
    """Whether nothing on this machine listens on `port`."""
    with ExitStack() as held:
        try:
            _bind(held, port)
        except OSError:
            return False
    return True


def _claim(port: int | None, usual: int, block: Iterator[int], what: str) -> int:
    if port is None:
        return usual if is_free(usual) else next(block)
    if port == 0:
        return next(block)
    if not 0 < port <= MAX_PORT:
        raise SpecError(f"the {what} must be from 1 to {MAX_PORT} (0: any free port), not {port}")
    if not is_free(port):
        raise ClusterError(f"the {what} {port} is in use; end its listener or choose another port (0: any free port)")
    return port


def _bind(held: ExitStack, port: int) -> None:
    # All interfaces: HAProxy cannot use a port with a listener on any of them.
    sock = held.enter_context(socket.socket())
    # Closed connections of the previous cluster do not block the port.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("", port))


def _claim_block(size: int) -> tuple[socket.socket, int]:
    """Reserves `size` consecutive free ports: the socket, which listens on the last one, and the first port.

    The listeners of the other ports start later; until then those ports look free to every program.

    The block is below the kernel's range for outgoing connections (32768 and above on Linux), any of which could take
    a port between the choice and the start of its listener.
    """
    starts = list(range(10_000, 32_000 - size, size))
    random.shuffle(starts)  # the lowest blocks contain the fixed ports of other programs
    for start in starts:
        claim = socket.socket()
        try:
            claim.bind(("", start + size - 1))
            claim.listen(1)
            for port in range(start, start + size - 1):
                with ExitStack() as held:  # one at a time: the limit is often 1,024 open files
                    _bind(held, port)
        except OSError as error:
            claim.close()
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise ClusterError(f"cannot open a socket: {error.strerror}; raise ulimit -n") from error
            continue
        return claim, start
    raise ClusterError(f"no {size} consecutive free ports from 10000 to 32000; stop another cluster on this machine")
