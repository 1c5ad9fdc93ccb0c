"""Each kind of process that serves is killed and stopped again and again under load: what callers see is counted.

    make test-fault PYTEST_ARGS="tests/faults/test_nemesis.py"              30 times each, about an hour and a half
    NEMESIS_TIMES=2 .venv/bin/python -m pytest -m fault tests/faults/test_nemesis.py -k "haproxy and KILL"

Each combination leaves its line of the table in docs/reliability.md in build/nemesis/.
"""

import os
import random
import shutil
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

from maas_ray.cluster.node.state import load_state
from maas_ray.registry.models import Registry
from maas_ray.serve.spec.serve import ServeSpec
from maas_ray.spec import parse_spec
from maas_ray.store.objects import open_store
from tests.conftest import RayCluster
from tests.support.callers import linear_answer
from tests.support.ledger import Call, Verdict, judge, read_records, save_history
from tests.support.onnx_models import commit_bundle, linear
from tests.support.patient import PatientCallers, longest_silence_s
from tests.support.root import ROOT
from tests.support.victims import KINDS, Kind, find, is_stopped, servers_up, started, until

pytestmark = [
    pytest.mark.fault,
    pytest.mark.timeout(4 * 3600),
    # Ray's own use of pydantic, at import, and of the sockets of its clients.
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

TIMES = int(os.environ.get("NEMESIS_TIMES", "30"))
ANY, ONCE = "any", "once"
"""An idempotent pool, and one that is not."""
POOLS = {ANY: True, ONCE: False}
NUM_REPLICAS = 2
DEADLINES_S = (0.5, 2.0, 5.0)
LONGEST_STOP_S = 8.0
"""Every second stop ends after a random time up to this."""
LEFT_S = 12.0
"""The others last until the system has woken or replaced the process, or this long."""
RECOVERY_S = 180.0
CALM_ANSWERS = 40
"""Answers to either pool without anything else between two events."""
RESULTS = ROOT / "build" / "nemesis"


@dataclass
class Event:
    """What was done to one process, and until when the system was not as before; one monotonic clock."""

    start_s: float
    pid: int
    end_s: float = 0.0
    was_noticed: bool = False
    """A process that was stopped was woken or replaced by the system itself."""


@dataclass
class Run:
    """A cluster with both pools, and what has happened to it."""

    cluster: RayCluster
    records: Path
    random: random.Random
    events: list[Event] = field(default_factory=list)

    def deploy(self, store: str) -> None:
        from maas_ray.serve.deploy import pool

        pools = [
            {
                "name": name,
                "route_prefix": f"/{name}",
                "models": [{"name": "linear"}],
                "replicas": NUM_REPLICAS,
                "idempotent": is_idempotent,
                "resources": {"cpus": 0.5},
                "limits": {"timeout_s": 20.0},
                "observability": {
                    "access_log": {"enabled": True, "path": str(self.log_of(name)), "flush_every_s": 0.05}
                },
            }
            for name, is_idempotent in POOLS.items()
        ]
        spec = {"storage": {"uri": store}, "http": {"port": self.cluster.http_port}, "pools": pools}
        pool.deploy(parse_spec(ServeSpec, spec))

    def log_of(self, name: str) -> Path:
        return self.records / f"{name}.jsonl"

    def url(self, name: str) -> str:
        return f"/{name}/v2/models/linear/infer"

    def wait_whole(self, after: str) -> None:
        """Until everything is there that was there at first: each process, and each replica in Serve's and HAProxy's eyes."""
        deadline = time.monotonic() + RECOVERY_S
        while missing := self._missing():
            assert time.monotonic() < deadline, f"no recovery within {RECOVERY_S:g} s after {after}: {missing}"
            time.sleep(0.1)

    def _missing(self) -> str:
        from maas_ray.serve.deploy import pool

        try:
            seen = {status.name: status for status in pool.status(POOLS)}
            found = {
                "replicas": len(find(self.cluster, "replica", list(POOLS))) - NUM_REPLICAS * len(POOLS),
                **{kind: min(0, len(find(self.cluster, kind, ())) - 1) for kind in KINDS if kind != "replica"},
                **{f"replicas of {name} running": seen[name].num_running - NUM_REPLICAS for name in POOLS},
                **{f"replicas of {name} in HAProxy": servers_up(name) - NUM_REPLICAS for name in POOLS},
            }
        except Exception as error:  # the process that is asked may be the missing one
            return repr(error)[:500]
        wrong = {name: number for name, number in found.items() if number}
        wrong |= {name: seen[name].status for name in POOLS if seen[name].status != "RUNNING"}
        return str(wrong) if wrong else ""

    def strike(self, kind: Kind, number: signal.Signals, *, is_left: bool) -> None:
        """One process of a kind, by chance; returns once the system has recovered."""
        time.sleep(self.random.uniform(0.0, 2.0))
        pid = self.random.choice(find(self.cluster, kind, list(POOLS)))
        birth = started(pid)
        event = Event(time.monotonic(), pid)
        os.kill(pid, number)
        if number is signal.SIGSTOP:
            until(lambda: is_stopped(pid) or started(pid) != birth, f"stop of {pid}", timeout_s=5)
            until_s = event.start_s + (LEFT_S if is_left else self.random.uniform(0.5, LONGEST_STOP_S))
            while time.monotonic() < until_s and is_stopped(pid) and started(pid) == birth:
                time.sleep(0.05)
            event.was_noticed = time.monotonic() < until_s
            if is_stopped(pid) and started(pid) == birth:
                os.kill(pid, signal.SIGCONT)
        else:
            until(lambda: started(pid) != birth, f"end of {pid}", timeout_s=5)
        self.events.append(event)
        self.wait_whole(f"{number.name} of {kind} {pid}")
        event.end_s = time.monotonic()

    def progress(self, *callers: PatientCallers) -> str:
        """One line about the last event, while the run continues."""
        event, calls = self.events[-1], [call for some in callers for call in list(some.calls)]
        errors = Counter(call.status for call in calls if call.status != 200)
        late = sum(attempt.is_late for call in calls for attempt in call.attempts)
        silence_s = self.silence_s(event, list(callers[0].calls))
        return (
            f"{len(self.events)}: pid {event.pid}, recovered in {event.end_s - event.start_s:.1f} s, silence "
            f"{silence_s:.2f} s; so far {len(calls)} calls, not 200: {dict(errors)}, late: {late}"
        )

    def silence_s(self, event: Event, calls: list[Call]) -> float:
        return longest_silence_s(calls, event.start_s, event.end_s)

    def overlaps(self, call: Call) -> bool:
        """Whether something was wrong while a call was on its way: two replicas may then have computed it."""
        return any(event.start_s - 1 < call.ended_s and call.sent_s < event.end_s + 1 for event in self.events)

    def judge(self, name: str, calls: list[Call], times: int) -> Verdict:
        is_idempotent = POOLS[name]
        return judge(
            calls,
            read_records(str(self.log_of(name))),
            lambda id, version: linear_answer(id, version) if version == 1 else None,
            events={"events": (len(self.events), times)},
            kills_s=[event.start_s for event in self.events],
            may_repeat=lambda call: is_idempotent and (len(call.attempts) > 1 or self.overlaps(call)),
        )


@pytest.fixture
def nothing_left(ray_cluster: RayCluster) -> Iterator[None]:
    from maas_ray.serve.deploy import pool

    yield
    until(lambda: _is_answered(lambda: pool.status(POOLS)), "controller", timeout_s=RECOVERY_S)
    pool.undeploy([status.name for status in pool.status(POOLS)])


def _is_answered(ask: Callable[[], object]) -> bool:
    with suppress(Exception):  # Ray has many for an actor that is away
        ask()
        return True
    return False


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
@pytest.mark.parametrize("kind", KINDS)
def test_callers_get_their_answers_whatever_dies_or_falls_silent(
    ray_cluster: RayCluster, tmp_path: Path, kind: Kind, number: signal.Signals
) -> None:
    seed = random.randrange(1 << 30)
    run = Run(ray_cluster, tmp_path, random.Random(seed))
    store = open_store(f"file://{tmp_path}/store")
    Registry(store).publish("linear", commit_bundle(store, linear(2.0)))
    Registry(store).promote("linear", 1)
    run.deploy(store.uri)
    run.wait_whole("the deployment")
    port, failure = ray_cluster.http_port, None
    with (
        PatientCallers(port, run.url(ANY), DEADLINES_S, name="any", seed=seed) as callers,
        PatientCallers(port, run.url(ONCE), DEADLINES_S, name="once", seed=seed, repeats=False, num_callers=4) as once,
    ):
        try:
            for index in range(TIMES):
                for some in (callers, once):
                    some.wait(CALM_ANSWERS, timeout_s=RECOVERY_S)
                run.strike(kind, number, is_left=index % 2 == 1)
                print(run.progress(callers, once))  # noqa: T201
            for some in (callers, once):
                some.wait(CALM_ANSWERS, timeout_s=RECOVERY_S)
        except AssertionError as error:  # it did not recover: what was seen until then counts
            failure = error
    print(f"longest stall of the callers: {max(callers.longest_stall_s, once.longest_stall_s):.2f} s")  # noqa: T201
    report(run, kind, number, seed, {ANY: callers.calls, ONCE: once.calls}, failure)


def keep_logs(cluster: RayCluster, directory: Path) -> None:
    """What Serve's own processes and HAProxy's keeper wrote down meanwhile."""
    state = load_state(cluster.state_dir)
    assert state is not None
    directory.mkdir(parents=True, exist_ok=True)
    for pattern in ("session_latest/logs/serve/controller_*.log", "session_latest/logs/serve/proxy_*.log", "h/*/*.log"):
        for path in Path(state.temp_dir).glob(pattern):
            shutil.copy(path, directory)


def report(run: Run, kind: Kind, number: signal.Signals, seed: int, calls: dict[str, list[Call]], failure: AssertionError | None) -> None:  # fmt: skip
    """Judges both pools, leaves a line of the table, and fails if there is a fault."""
    finished = [event for event in run.events if event.end_s]
    verdicts = {name: run.judge(name, calls[name], 0 if failure else TIMES) for name in POOLS}
    faults = {name: dict(verdict.faults) for name, verdict in verdicts.items()}
    # Sent once and to one replica: whether it ran before that fell silent or died, its caller cannot know.
    unknown = len(faults[ONCE].pop("lost", ())) + len(faults[ONCE].pop("failed", ()))
    silences = [run.silence_s(event, calls[ANY]) for event in finished]
    attempts = [attempt for name in POOLS for call in calls[name] for attempt in call.attempts]
    over_s = max(attempt.ended_s - attempt.sent_s - attempt.deadline_s for attempt in attempts)
    counts = {what: sum(len(found.get(what, ())) for found in faults.values()) for what in ("lost", "failed", "duplicated", "wrong", "late")}  # fmt: skip
    noticed = sum(event.was_noticed for event in run.events)
    cells = [kind, number.name, len(run.events), len(calls[ANY]), counts["lost"] + counts["failed"]]
    cells += [counts["duplicated"], counts["wrong"], counts["late"], f"{over_s:+.2f}"]
    cells += [f"{statistics.median(silences):.2f}", f"{max(silences):.2f}"] if silences else ["-", "-"]
    cells += [f"{unknown} of {len(calls[ONCE])}"]
    line = f"| {' | '.join(map(str, cells))} |"
    print(f"\n{line}  seed {seed}, {noticed} noticed, {verdicts[ANY]}, {verdicts[ONCE]}")  # noqa: T201
    for pool, some in calls.items():
        others = Counter(f"{call.status} {call.error[:150]}" for call in some if call.status != 200)
        for what, count in others.most_common(8):
            print(f"{pool}: {count} x {what}")  # noqa: T201
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = f"{kind}-{number.name}"
    (RESULTS / f"{name}.md").write_text(line + "\n")
    notes = {"seed": seed, "events": [asdict(event) for event in run.events], "silences_s": silences}
    for pool in POOLS:
        records = read_records(str(run.log_of(pool)))
        save_history(RESULTS / f"{name}-{pool}.jsonl", calls[pool], records, notes)
    keep_logs(run.cluster, RESULTS / f"{name}-logs")
    if failure is not None:
        raise failure
    assert faults == {name: {} for name in POOLS}, "the history is in build/nemesis"
