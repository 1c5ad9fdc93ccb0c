"""What it costs to protect the way from the front to a replica: the front's secret header, or TLS, against nothing.

    python -m benchmarks.serving.between [--pairs 9] [--seconds 2]

One HAProxy with a front for each way, before one replica for each, without Ray. The ways take turns under the same load,
so that a change of the machine hits all of them; figures are medians (least–greatest) of the ratios within a round, and CPU
microseconds of a request, of HAProxy and of the replica. What `haproxy.config.secret` says rests on this.
"""

import argparse
import secrets
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from benchmarks.serving import ours, workloads
from benchmarks.serving.load import closed
from benchmarks.serving.peers import APPS
from benchmarks.serving.processes import Launch, Running, free_port, run
from maas_ray.haproxy.binary import find_binary
from maas_ray.haproxy.config.secret import HEADER, front_secret

WAYS = ("open", "secret", "tls")
CASES = (("tiny", 1), ("tiny", 32), ("tiny", 128), ("image", 8))
_PATH = "/v2/models/bench/infer"
_CONFIG = """\
global
    maxconn 4000
    nbthread 1
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    http-reuse always
"""
_WAY = """\
frontend {way}
    bind 127.0.0.1:{front}
    monitor-uri /alive
{sign}    default_backend {way}
backend {way}
    server one 127.0.0.1:{replica}{tls}
"""


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.between", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--pairs", type=int, default=9, help="rounds")
    parser.add_argument("--seconds", type=int, default=2, help="of load for each way in a round")
    options = parser.parse_args()
    print("| | clients | way | req/s of open | CPU of open | CPU µs: HAProxy + replica |\n|---|---|---|---|---|---|")
    for name in dict.fromkeys(name for name, _ in CASES):
        with ExitStack() as stack:
            directory = stack.enter_context(ours.short_directory())
            _measure(name, directory, stack, options)
    return 0


def _measure(name: str, directory: Path, stack: ExitStack, options: argparse.Namespace) -> None:
    workload = workloads.WORKLOADS[name]
    model = workloads.make_model(workload, directory)
    requests = workloads.make_requests(workload, model)
    arguments = closed.write_bodies(requests, directory)
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_SERVE_ENABLE_HA_PROXY": "1"}
    certificate = _certificate(directory)
    replicas, fronts = {way: free_port() for way in WAYS}, {}
    text = _CONFIG
    taken = set(replicas.values())
    for way in WAYS:
        fronts[way] = next(port for port in iter(free_port, None) if port not in taken)
        taken.add(fronts[way])
        sign = f"    http-request set-header {HEADER} {front_secret(env)}\n" if way == "secret" else ""
        tls = f" ssl verify required ca-file {certificate}" if way == "tls" else ""
        text += _WAY.format(way=way, front=fronts[way], replica=replicas[way], sign=sign, tls=tls)
    (directory / "haproxy.cfg").write_text(text)
    argv = [find_binary(), "-db", "-f", str(directory / "haproxy.cfg")]
    running: dict[str, Running] = {}
    with ExitStack() as inner:
        haproxy = inner.enter_context(
            run("haproxy", Launch(argv, fronts["open"], _PATH, "/alive", {}, directory), directory / "haproxy.log")
        )
        for way in WAYS:
            app = [
                sys.executable,
                str(APPS / "between_app.py"),
                str(model),
                str(directory / way),
                str(replicas[way]),
                way,
            ]
            app += [str(certificate), str(certificate)]
            launch = Launch(app, fronts[way], _PATH, "/v2/health/ready", env, directory)
            running[way] = inner.enter_context(run(way, launch, directory / f"{way}.log"))
        for clients in [clients for case, clients in CASES if case == name]:
            rounds: list[dict[str, tuple[float, float, float]]] = []
            for number in range(options.pairs):
                found = {}
                for way in WAYS if number % 2 == 0 else WAYS[::-1]:
                    used = haproxy.cpu_s(), running[way].cpu_s()
                    figures = closed.measure(
                        fronts[way], _PATH, requests, arguments, clients=clients, seconds=options.seconds
                    )
                    if figures["failed"] or figures["wrong"]:
                        raise RuntimeError(f"{way}: {figures}")
                    per_s = float(str(figures["per_s"]))
                    count = per_s * options.seconds / 1e6
                    found[way] = per_s, (haproxy.cpu_s() - used[0]) / count, (running[way].cpu_s() - used[1]) / count
                rounds.append(found)
            for way in WAYS[1:]:
                speeds = [one[way][0] / one["open"][0] for one in rounds]
                cpus = [sum(one[way][1:]) / sum(one["open"][1:]) for one in rounds]
                parts = [statistics.median(one[way][part] for one in rounds) for part in (1, 2)]
                shown = f"{_shown(speeds)} | {_shown(cpus)} | {parts[0]:.0f} + {parts[1]:.0f}"
                print(f"| {name} | {clients} | {way} | {shown} |", flush=True)


def _shown(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def _certificate(directory: Path) -> Path:
    """A certificate of its own with its key, in one file."""
    path, key = directory / "cert.pem", directory / "key.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "1",
    ]
    command += [
        "-subj",
        "/CN=127.0.0.1",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-keyout",
        str(key),
        "-out",
        str(path),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    path.write_text(path.read_text() + key.read_text())
    return path


if __name__ == "__main__":
    sys.exit(main())
