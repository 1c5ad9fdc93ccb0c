"""The variables that Ray's processes must be born with. Builds dictionaries; sets nothing and starts nothing.

Ray Serve and Ray Train read theirs when they are imported, in every process, so a runtime environment comes too
late: they have to be in the environment of `ray start` on each node, and of the program that connects.
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
"""The program that Serve runs as HAProxy: `maas_ray.haproxy`, installed with the package."""
BINARY_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
CONTROLLER_VARIABLE = "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH"
FRONT_LABEL, NO_FRONT = "maas-ray/front", "no"
"""Label of a node that shall have no front (`ray start --labels=maas-ray/front=no`); the head always has one."""
MAX_ANSWER_S = 600
"""Longest time that a pool may be given for an answer; HAProxy waits a little longer."""
HARD_STOP_S = 2 * MAX_ANSWER_S + 60
"""Longest time that an HAProxy which was replaced answers its last requests, where the limits of a pool are not known:
its longest request and its longest drain. The launcher shortens it to what the pools need."""
REPLICA_PORTS = 500
"""Ports of one protocol that replicas of a local cluster may take. Serve gives none of them to another replica while an
HAProxy that was replaced may still send requests there."""
MAX_PORT = 65535
_NUM_SINGLE = 10

_COMMON = {
    # The dashboard's Train tab is empty without it.
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    # Ray Train's own barriers wait for ever by default; a lost rank must end the attempt.
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "60",
    # Between SIGTERM and SIGKILL for a job that is stopped: 3 s by default, too short to commit a checkpoint.
    "RAY_JOB_STOP_WAIT_TIME_S": "60",
    # Train workers change their directory by default, which breaks relative paths in specs.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Ray starts workers at nice 15: on a busy machine they would lose to everything else.
    "RAY_worker_niceness": "0",
    # 4 MiB by default, which a batch of images between two deployments exceeds.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(256 << 20),
    # With it, replicas are called through a port on every address that unpickles what anybody sends.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "0",
    # 2 GiB by default, before anything of ours is asked; replicas lower it to their pool's limit.
    "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(256 << 20),
    # The controller of a training run looks at its workers every 2 s by default: up to 4 s of each start and end.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Where Serve's controller places replicas as a pool says, and starts a front on each node.
    CONTROLLER_VARIABLE: "maas_ray.serve.controller.install:install",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
}

_BY_PROFILE: dict[Profile, dict[str, str]] = {
    "fast": {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Where our replicas take over their own HTTP server; changes nothing in anybody else's.
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "maas_ray.serve.replica.server_hook:middlewares",
        # Of every application: repeat what was not sent. The launcher adds "empty-response" for idempotent pools.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure",
        "RAY_SERVE_HAPROXY_RETRIES": "3",
        # HAProxy waits without limit for a silent replica by default; pools answer or refuse before this.
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": str(MAX_ANSWER_S + 60),
        # Only counts while the client is to send or to read: a long computation does not end it. Serve: an hour.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
        # At most: the launcher lowers it on each node to what the open files of the process there allow.
        "RAY_SERVE_HAPROXY_MAXCONN": "20000",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(HARD_STOP_S),
        # Three failures in a row replace the actor that reloads HAProxy, and the proxy behind pools that sleep. Serve
        # looks every 10 s: a new replica would get no request for half a minute.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "5",
        # Three times 5 s by default, after which Serve kills what has only just started: too short on a busy machine.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "20",
        # Serve's metrics of HAProxy are read from a datagram per request, in Python; replicas have metrics of their own.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    },
    # Set, not left out: a value from the caller's shell must not turn half of the other profile on.
    "portable": {
        "RAY_SERVE_ENABLE_HA_PROXY": "0",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0",
        # Serve's proxy would open its gRPC port on every address of the machine.
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "maas_ray.serve.replica.server_hook:before_proxy",
    },
}

_ONE_MACHINE = {
    # The name is misleading: 0 makes the node's address 127.0.0.1, so that every port of Ray binds to loopback.
    # `--node-ip-address 127.0.0.1` alone is replaced by the machine's outer address.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
_SEVERAL_MACHINES = {
    # A head that was lost has so long to come back until the other nodes give the cluster up.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
}


@dataclass(frozen=True)
class Ports:
    """The ports of one local cluster; each cluster on a machine needs its own."""

    gcs: int
    dashboard: int
    http: int
    """Where predictions are served."""
    client: int
    """Ray Client; Ray 2.60 offers no way to leave it out where gRPC is installed."""
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
    """What every node of any cluster of this profile needs, in a data center or on a laptop."""
    return _COMMON | _BY_PROFILE[profile]


def find_launcher() -> str | None:
    """Path of the program that Serve is to run as HAProxy; None if it is not installed."""
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
    """All variables of a node on this machine: for `ray start`, and for each program that connects.

    Args:
        profile: `fast` puts HAProxy in front of the replicas (Linux); `portable` uses Serve's Python proxy.
        ports: the cluster's ports.
        temp_dir: short directory for sockets; a Unix socket's path holds 107 bytes.
        token_path: the file with the token that every RPC and the dashboard ask for.
        min_draining_s: seconds that a stopping replica keeps answering. Ray's default of 30 is for load balancers
            that poll; the one on this machine is told at once.
        host: the node's address. Loopback: a cluster on this machine alone.

    Raises:
        ClusterError: the profile is unknown, not available on this platform, or not wholly installed.
    """
    if profile not in PROFILES:
        raise ClusterError(f"no profile {profile!r}; {known_names(profile, list(PROFILES), 'profiles')}")
    if profile == "fast" and sys.platform != "linux":
        raise ClusterError("the profile 'fast' needs HAProxy, which Ray ships for Linux only; use --profile portable")
    flags = profile_flags(profile) | {
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        # Ray starts an idle worker per CPU for whoever connects first. Train workers and replicas bring an environment
        # of their own and cannot use those, which would compete with them for this machine's few cores.
        "RAY_prestart_worker_first_driver": "0",
        # It would be one more process per training run; train/ranks/launch.py looks at drained nodes itself.
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
    """Paths and ports of the HAProxy of one cluster: Ray's defaults are fixed, so two clusters would share them."""
    launcher = find_launcher()
    if launcher is None:
        raise ClusterError(
            f"{LAUNCHER} is not installed, and without it HAProxy's statistics and admin socket are open to everybody; "
            "install the package again (pip install maas-ray), or use --profile portable"
        )
    return {
        # Measured on 2 cores: a second thread adds a fifth of CPU time per request, and no requests.
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
    """Free ports on this machine, kept from every other caller, in any process, for as long as the result lives.

    Args:
        http: the port to serve on; None takes 8000 if that is free, 0 any free one.
        dashboard: likewise; None takes 8265 if that is free.

    Raises:
        ClusterError: a port that was asked for is taken.
        SpecError: it is no port.
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
        raise SpecError(f"the {what} is {port}; a port is a number from 1 to {MAX_PORT} (0: any)")
    if not is_free(port):
        raise ClusterError(f"the {what} {port} is taken; end what listens there, or choose another one (0: any)")
    return port


def _bind(held: ExitStack, port: int) -> None:
    # All interfaces: a listener on any of them makes a port useless to HAProxy.
    sock = held.enter_context(socket.socket())
    # Closed connections of the last cluster do not matter.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("", port))


def _claim_block(size: int) -> tuple[socket.socket, int]:
    """The first of `size` free ports in a row, and the socket that keeps them: it listens on the last of them.

    What is to listen on the others starts later, and until then they look free to everybody.

    Below the range that the kernel gives to outgoing connections (32768 upwards on Linux), any of which could take a
    port between its choice and the start of what listens there.
    """
    starts = list(range(10_000, 32_000 - size, size))
    random.shuffle(starts)  # the first blocks are those that other programs' fixed ports lie in
    for start in starts:
        claim = socket.socket()
        try:
            claim.bind(("", start + size - 1))
            claim.listen(1)
            for port in range(start, start + size - 1):
                with ExitStack() as held:  # one at a time: a process may often have no more than 1,024 open files
                    _bind(held, port)
        except OSError as error:
            claim.close()
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise ClusterError(f"no socket can be opened: {error.strerror}; see ulimit -n") from error
            continue
        return claim, start
    raise ClusterError(f"no {size} free ports in a row between 10000 and 32000; stop another cluster on this machine")
