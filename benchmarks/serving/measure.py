"""Runs the measurements and collects plain values. Two servers take turns, so that a change of the machine hits both.

While one is measured, the other one's processes are stopped: an idle Ray cluster uses about a tenth of a core, which
would be taken from whoever is compared with it.
"""

import contextlib
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.serving import commits, environments, graphs, ours, overload, workloads
from benchmarks.serving.load.closed import measure, wait_until_right, write_bodies
from benchmarks.serving.peers import APPS, PEERS, Job, Peer
from benchmarks.serving.processes import Running, psutil, run
from benchmarks.serving.workloads import WORKLOADS, Request, Workload

Figures = dict[str, Any]
RAW = "raw"
"""Stands for onnxruntime in a loop, without any server."""
BARE_SKETCH = "sketch"
_NUM_CPUS = 4
"""That Ray may hand out; replicas ask for one."""
RAW_BATCHES = (1, 2, 4, 8, 16, 32, 64)


class DeadlinePassed(Exception):
    """The whole run took longer than allowed; what was measured so far is kept."""


@dataclass(frozen=True)
class Settings:
    """What is measured, and for how long."""

    workloads: tuple[str, ...]
    peers: tuple[str, ...]
    """Other servers, and other commits of ours by `commits.PREFIX`."""
    clients: tuple[int, ...]
    """Empty: each workload's own."""
    pairs: int
    seconds: int
    """Of one measurement; 0: each workload's own."""
    sections: tuple[str, ...]
    cache: Path
    deadline_s: float
    pauses: bool = True
    pool: dict[str, object] = field(default_factory=dict)
    """Settings of our pool other than its defaults."""


@dataclass(frozen=True)
class Case:
    """A workload with its files."""

    workload: Workload
    model: Path
    requests: list[Request]
    directory: Path

    def arguments(self, peer: Peer) -> tuple[list[Request], list[str]]:
        """Requests as a peer wants them, and wrk's arguments for them."""
        wrapped = workloads.wrap(self.requests, *peer.around)
        directory = self.directory / re.sub(r"\W", "-", f"bodies-{self.workload.name}-{peer.name}")
        directory.mkdir(exist_ok=True)
        return wrapped, write_bodies(wrapped, directory)


class Bench:
    """One run of the benchmark.

    Args:
        settings: what is measured.
        directory: short, empty, removed by the caller.
        results: filled while measuring, so that an interrupted run leaves what it has.
    """

    def __init__(self, settings: Settings, directory: Path, results: dict[str, Any]) -> None:
        self._settings = settings
        self._directory = directory
        self._results = results
        self._deadline = time.monotonic() + settings.deadline_s
        self._num_launched = 0

    def run(self) -> None:
        """Everything that the settings ask for.

        Raises:
            DeadlinePassed: not all of it was measured.
            RuntimeError: a server did not start, or answers wrongly.
        """
        settings = self._settings
        pythons = self._build()
        if "direct" in settings.sections:
            self._direct(pythons)
        if not set(settings.sections) - {"direct"}:
            return
        with contextlib.ExitStack() as stack:
            cluster = stack.enter_context(ours.cluster(self._directory, _NUM_CPUS, commits.here()))
            self._results["revisions"] = {"maas": cluster.code.revision}
            others = self._other_commits(stack)
            for name in settings.workloads:
                case = self._case(WORKLOADS[name])
                server = cluster.deploy(case.model, settings.pool)
                self._results["starts_s"].setdefault("maas", server.start_s)
                if "pairs" in settings.sections:
                    self._against_commits(case, server, others)
                    self._against_peers(case, server, pythons)
                if "duties" in settings.sections and name == "tiny":
                    self._against_sketch(case, server, cluster)
                if "raw" in settings.sections and name == "encoder":
                    self._against_raw(case, server)
                if "memory" in settings.sections and name == "tiny":
                    self._results["memory"] = server.memory()
                if "overload" in settings.sections and name == "small-encoder":
                    self._overload(case, server)

    def _build(self) -> dict[str, Path]:
        sections = self._settings.sections
        names = [name for name in self._settings.peers if name in PEERS] if "pairs" in sections else []
        names += [BARE_SKETCH] if "direct" in sections else []
        wanted = {name: PEERS[name] for name in dict.fromkeys(names)}
        pythons = {}
        for name, peer in wanted.items():
            pythons[name] = environments.build(self._settings.cache, peer.environment, peer.packages)
            names = tuple(package.split("==")[0].split("[")[0] for package in peer.packages)
            self._results["versions"][peer.environment] = environments.versions(pythons[name], names)
        return pythons

    def _case(self, workload: Workload) -> Case:
        model = workloads.make_model(workload, self._directory)
        return Case(workload, model, workloads.make_requests(workload, model), self._directory)

    @contextlib.contextmanager
    def _peer(self, peer: Peer, case: Case, python: Path) -> Iterator[Running]:
        self._num_launched += 1
        directory = self._directory / f"p{self._num_launched}"
        directory.mkdir()
        first = case.requests[0]
        kind = workloads.KINDS[str(first.rows.dtype)]
        job = Job(python, case.model, first.rows.shape[1:], kind, first.expected.shape[1], directory)
        with run(peer.name, peer.launch(job), directory.with_suffix(".log")) as server:
            self._results["starts_s"].setdefault(peer.name, server.start_s)
            yield replace(server, can_pause=peer.can_pause)

    def _other_commits(self, stack: contextlib.ExitStack) -> list[ours.Cluster]:
        """A cluster for each commit that we are compared with, beside ours; stopped until it is asked."""
        found: list[ours.Cluster] = []
        wanted = [name for name in self._settings.peers if name.startswith(commits.PREFIX)]
        for number, name in enumerate(wanted if "pairs" in self._settings.sections else ()):
            directory = self._directory / f"c{number}"
            directory.mkdir()
            code = commits.other(name, directory, self._settings.cache)
            found.append(stack.enter_context(ours.cluster(directory, _NUM_CPUS, code)))
            self._results["revisions"][name] = code.revision
            self._pause_all(found[-1].running())
        return found

    def _against_commits(self, case: Case, server: Running, others: Sequence[ours.Cluster]) -> None:
        for cluster in others:
            peer = ours.another_commit(cluster.code.name)
            cluster.running().resume()
            other = cluster.deploy(case.model, self._settings.pool)
            self._results["starts_s"].setdefault(peer.name, other.start_s)
            self._point(case, ours.CLUSTER, server, peer, other, self._settings.clients or case.workload.clients)
            self._pause_all(other)

    def _against_peers(self, case: Case, server: Running, pythons: dict[str, Path]) -> None:
        for name in self._settings.peers:
            if name not in PEERS:
                continue  # another commit
            peer = PEERS[name]
            is_left_out = case.workload.is_binary and not peer.has_binary
            is_asked_for = case.workload.peers is None or name in case.workload.peers
            if is_left_out or not (is_asked_for or self._settings.peers != tuple(PEERS)):
                continue
            server.pause()
            with self._peer(peer, case, pythons[name]) as other:
                self._point(case, ours.CLUSTER, server, peer, other, self._settings.clients or case.workload.clients)

    def _against_sketch(self, case: Case, server: Running, cluster: ours.Cluster) -> None:
        """What a server owes against a sketch that owes nothing: both in replicas of one cluster, behind HAProxy."""
        with ours.sketch(cluster, case.model) as other:
            self._point(case, ours.CLUSTER, server, ours.SKETCH, other, self._settings.clients or (1, 32, 128))

    def _direct(self, pythons: dict[str, Path]) -> None:
        """The same where it is hardest: both alone in a uvicorn process, nothing before it."""
        case = self._case(WORKLOADS["tiny"])
        sketch = PEERS[BARE_SKETCH]
        with (
            self._peer(ours.DIRECT, case, Path(sys.executable)) as server,
            self._peer(sketch, case, pythons[BARE_SKETCH]) as other,
        ):
            self._point(case, ours.DIRECT, server, sketch, other, self._settings.clients or (1, 32, 128))

    def _point(
        self, case: Case, our: Peer, server: Running, peer: Peer, other: Running, clients: Sequence[int]
    ) -> None:
        sides = [(our, server), (peer, other)]
        bodies = {one.name: case.arguments(one) for one, _ in sides}
        for count in clients:
            point: dict[str, Any] = {
                "workload": case.workload.name,
                "ours": our.name,
                "peer": peer.name,
                "clients": count,
                "pairs": [],
            }
            self._results["points"].append(point)
            self._pause_all(server, other)
            point["foreign_cpus"] = foreign_cpus()
            for index in range(self._settings.pairs):
                pair: dict[str, Figures] = {}
                # Who goes first alternates.
                for one, running in sides if index % 2 == 0 else sides[::-1]:
                    self._check_deadline()
                    with self._turn(running):
                        wait_until_right(running.port, running.path, bodies[one.name][0])
                        pair[one.name] = self._load(running, *bodies[one.name], count, self._seconds(case))
                point["pairs"].append(pair)
                _say(case.workload.name, count, pair)
            if case.workload.name == "tiny" and count == 1 and our is ours.CLUSTER:
                self._results["engine_run_s"] = _engine_run_s(case)
        server.resume()

    def _load(
        self, server: Running, requests: list[Request], arguments: list[str], clients: int, seconds: int
    ) -> Figures:
        """One measurement, with the CPU time that all processes of the server took for each request."""
        cpu_s, stolen_s = server.cpu_s(), psutil.cpu_times().steal
        figures = measure(server.port, server.path, requests, arguments, clients=clients, seconds=seconds)
        num_requests = max(1.0, figures["per_s"] * seconds)
        figures["cpu_us"] = 1e6 * (server.cpu_s() - cpu_s) / num_requests
        figures["stolen_cpus"] = (psutil.cpu_times().steal - stolen_s) / seconds
        return figures

    def _against_raw(self, case: Case, server: Running) -> None:
        """Rows a second through the server against onnxruntime in a loop at its best batch, one thread each."""
        server.pause()
        found = {batch: self._raw(case, batch, 2.0) for batch in RAW_BATCHES}
        best = max(found, key=lambda batch: found[batch])
        self._results["raw_batches"] = {str(batch): value for batch, value in found.items()}
        requests, arguments = case.arguments(ours.CLUSTER)
        for count in self._settings.clients or case.workload.clients:
            point: dict[str, Any] = {
                "workload": case.workload.name,
                "ours": "maas",
                "peer": RAW,
                "clients": count,
                "pairs": [],
            }
            self._results["points"].append(point)
            for _ in range(self._settings.pairs):
                self._check_deadline()
                pair: dict[str, Figures] = {RAW: {"per_s": self._raw(case, best, float(self._seconds(case)))}}
                with self._turn(server):
                    wait_until_right(server.port, server.path, requests)
                    pair["maas"] = self._load(server, requests, arguments, count, self._seconds(case))
                point["pairs"].append(pair)
                _say(case.workload.name, count, pair)
        server.resume()

    def _raw(self, case: Case, batch: int, seconds: float) -> float:
        command = [sys.executable, str(APPS / "raw_rows.py"), str(case.model), str(batch), str(seconds)]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=True)
        return float(json.loads(finished.stdout)["rows_per_s"])

    def _seconds(self, case: Case) -> int:
        return self._settings.seconds or case.workload.seconds

    def _overload(self, case: Case, server: Running) -> None:
        rounds: list[Figures] = []
        self._results["overload"] = {"workload": case.workload.name, "rounds": rounds}
        for _ in range(self._settings.pairs):
            self._check_deadline()
            wait_until_right(server.port, server.path, case.requests)
            rounds.append(overload.one_round(server, case.requests, self._seconds(case)))
            print(f"overload: {json.dumps(rounds[-1])}", file=sys.stderr, flush=True)

    def _pause_all(self, *servers: Running) -> None:
        if self._settings.pauses:
            for server in servers:
                server.pause()

    @contextlib.contextmanager
    def _turn(self, server: Running) -> Iterator[None]:
        server.resume()
        try:
            yield
        finally:
            if self._settings.pauses:
                server.pause()

    def _check_deadline(self) -> None:
        if time.monotonic() > self._deadline:
            raise DeadlinePassed(f"not finished within {self._settings.deadline_s:g} s; choose fewer pairs or peers")


def new_results() -> dict[str, Any]:
    """What `Bench` fills."""
    return {"format": 1, "versions": {}, "starts_s": {}, "points": []}


def foreign_cpus(seconds: float = 1.0) -> float:
    """CPUs that the rest of the machine uses while our servers are stopped: what makes figures worthless."""
    return float(psutil.cpu_percent(seconds) / 100 * psutil.cpu_count())


def _engine_run_s(case: Case) -> float:
    """Median time of one onnxruntime run for one request, without any server."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(case.model), options, providers=["CPUExecutionProvider"])
    once: Callable[[], object] = lambda: session.run([graphs.OUTPUT], {graphs.INPUT: case.requests[0].rows})  # noqa: E731
    times = []
    for _ in range(3000):
        begin = time.perf_counter()
        once()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _say(workload: str, clients: int, pair: dict[str, Figures]) -> None:
    shown = []
    for name, figures in pair.items():
        p99 = f" p99 {1000 * figures['p99_s']:.1f} ms" if figures.get("p99_s") else ""
        bad = figures.get("failed", 0) + figures.get("wrong", 0)
        shown.append(f"{name} {figures['per_s']:,.0f}/s{p99}{f' BAD {bad}' if bad else ''}")
    print(f"{workload} {clients}: {', '.join(shown)}", file=sys.stderr, flush=True)
