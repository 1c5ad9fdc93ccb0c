"""A cluster of three hosts loses what it is made of, again and again under load: what callers see is counted.

    make test-cluster-fault                                       20 times each: some two hours
    NEMESIS_TIMES=2 make test-cluster-fault PYTEST_ARGS="-s -k haproxy tests/machines/test_nemesis.py"

NEMESIS_TIMES (20) counts kills of each kind; the head is lost a quarter as often, and half as many cables are pulled. Each
kind leaves its line of the table in docs/reliability.md in build/nemesis/.
"""

import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict

import pytest

from tests.support.balancer import Balancer
from tests.support.callers import linear_answer
from tests.support.hosts import Network, ray_cluster
from tests.support.hosts.served import PORT, publish, serve, store_uri, write_spec
from tests.support.hosts.struck import KINDS, RECOVERY_S, Event, Kind, Struck
from tests.support.ledger import Call, Verdict, judge, read_records, save_history
from tests.support.open_loop import OpenLoopCallers, longest_window_s
from tests.support.patient import longest_silence_s
from tests.support.root import ROOT

pytestmark = [pytest.mark.fault, pytest.mark.timeout(6 * 3600)]

TIMES = int(os.environ.get("NEMESIS_TIMES", "20"))
NUM_EVENTS = {"head": max(1, TIMES // 4), "partition": max(1, TIMES // 2)}
LONGEST_WINDOW_S = 2.0
RATE_PER_S = 30.0
DEADLINES_S = (0.5, 2.0, 5.0)
CALM_ANSWERS = 60
POOL = "any"
LOG = "any.jsonl"
"""In the home of each host, which outlives it."""
WRITTEN_S = 3.0
"""Until a busy replica has written down its last calls."""
RESULTS = ROOT / "build" / "nemesis"


@pytest.fixture(scope="module")
def served() -> Iterator[Network]:
    """An idempotent pool of three replicas, one on each host."""
    with Network(3) as network:
        publish(network)
        ray_cluster.start(network, num_cpus=2, head_cpus=2, env={"MAAS_RAY_STORE": store_uri(network)})
        pool = {
            "name": POOL,
            "route_prefix": f"/{POOL}",
            "replicas": 3,
            "idempotent": True,
            "limits": {"timeout_s": 20.0},
            "observability": {
                "access_log": {"enabled": True, "path": f"/home/maas/{LOG}", "flush_every_s": 0.05}
            },
        }  # fmt: skip
        serve(network, write_spec(network, pool))
        yield network


@pytest.mark.parametrize("kind", KINDS)
def test_callers_get_their_answers_whatever_the_cluster_loses(served: Network, kind: Kind) -> None:
    seed, times = random.randrange(1 << 30), NUM_EVENTS.get(kind, TIMES)
    failure = None
    addresses = [host.address for host in served.hosts]
    with Balancer(addresses, PORT) as balancer:
        struck = Struck(served, POOL, balancer, random.Random(seed))
        struck.wait_whole("the start")
        name = f"{kind}{seed}"  # no other kind's ids
        with OpenLoopCallers(balancer, PORT, f"/{POOL}/v2/models/linear/infer", DEADLINES_S, rate_per_s=RATE_PER_S, name=name, seed=seed) as callers:  # fmt: skip
            try:
                for _ in range(times):
                    callers.wait(CALM_ANSWERS, timeout_s=RECOVERY_S)
                    event = struck.strike(kind)
                    print(progress(struck, event, list(callers.calls)), flush=True)  # noqa: T201
                callers.wait(CALM_ANSWERS, timeout_s=RECOVERY_S)
            except AssertionError as error:  # it did not recover: what was seen until then counts
                failure = error
    print(f"longest stall of the callers: {callers.longest_stall_s:.2f} s")  # noqa: T201
    report(struck, kind, name, times, callers.calls, seed, failure)


def progress(struck: Struck, event: Event, calls: list[Call]) -> str:
    """One line about the last event, while the run continues."""
    errors = Counter(call.status for call in calls if call.status != 200)
    each = {host.address: round(longest_window_s(calls, host.address, event.start_s, event.end_s), 2) for host in struck.network.hosts}  # fmt: skip
    return (
        f"{len(struck.events)}: {event.how} of {event.host}, whole after {event.whole_s - event.start_s:.1f} s, longest "
        f"window {longest_silence_s(calls, event.start_s, event.end_s):.2f} s, of each front {each}; so far "
        f"{len(calls)} calls, not 200: {dict(errors)}"
    )


def verdict_of(struck: Struck, name: str, times: int, calls: list[Call]) -> Verdict:
    """What the ledger says; two replicas may have run a call while something was wrong, or that was sent twice."""
    events = struck.events

    def may_repeat(call: Call) -> bool:
        is_near = any(event.start_s - 1 < call.ended_s and call.sent_s < event.end_s + 1 for event in events)
        return len(call.attempts) > 1 or is_near

    records = [record for host in struck.network.hosts for record in read_records(f"{host.home}/{LOG}")]
    return judge(
        calls,
        [record for record in records if record.id.startswith(name)],
        lambda id, version: linear_answer(id, version) if version == 1 else None,
        events={"events": (len(events), times)},
        kills_s=[moment for event in events for moment in (event.start_s, event.back_s)],
        may_repeat=may_repeat,
    )


def report(struck: Struck, kind: Kind, name: str, times: int, calls: list[Call], seed: int, failure: AssertionError | None) -> None:  # fmt: skip
    """Judges the calls, leaves a line of the table, and fails if there is a fault or too long a window."""
    time.sleep(WRITTEN_S)
    finished = [event for event in struck.events if event.end_s]
    verdict = verdict_of(struck, name, 0 if failure else times, calls)
    # A caller of a node that is cut off gives up by itself, so `late` says nothing here.
    faults = {what: ids for what, ids in verdict.faults.items() if what != "late"}
    windows = [longest_silence_s(calls, event.start_s, event.end_s) for event in finished]
    # A node whose replica was killed has a healthy front all the time; any other was struck itself.
    of_fronts = [
        longest_window_s(calls, host.address, event.start_s, event.end_s)
        for event in finished
        for host in struck.network.hosts
        if kind == "replica" or host.address != event.address
    ]
    cells = [kind, len(struck.events), len(calls), len(faults.get("lost", ())) + len(faults.get("failed", ()))]
    cells += [len(faults.get(what, ())) for what in ("duplicated", "wrong")]
    cells += [sum(len(call.attempts) > 1 for call in calls)]
    cells += [f"{statistics.median(windows):.2f}", f"{max(windows):.2f}", f"{max(of_fronts):.2f}"] if windows else ["-"] * 3  # fmt: skip
    line = f"| {' | '.join(map(str, cells))} |"
    print(f"\n{line}  seed {seed}, {verdict}")  # noqa: T201
    others = Counter(f"{call.status} {call.error[:150]}" for call in calls if call.status != 200)
    for what, count in others.most_common(8):
        print(f"{count} x {what}")  # noqa: T201
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"machines-{kind}.md").write_text(line + "\n")
    notes = {"seed": seed, "events": [asdict(event) for event in struck.events], "windows_s": windows}
    save_history(RESULTS / f"machines-{kind}.jsonl", calls, [], notes)
    if failure is not None:
        raise failure
    assert faults == {}, "the history is in build/nemesis"
    assert max(of_fronts) <= LONGEST_WINDOW_S
