"""Two concurrent `train` commands of one run name both exited with 0, with each other's attempts in one log."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from maas_ray.checkpoint.async_checkpointer import AsyncCheckpointer
from maas_ray.checkpoint.catalog import list_checkpoints
from maas_ray.checkpoint.save import finish, save
from maas_ray.errors import Conflict, NotFound
from maas_ray.store.fsck import fsck
from maas_ray.store.lease import Claim, LeaseOwner, holder_of, is_dead, machine_id, take
from maas_ray.store.objects import ObstoreStore, StorageSpec, open_store
from maas_ray.store.sequence import Sequence
from tests.checkpoint.states import PREFIX, snapshot
from tests.support.faulty import FaultyStore
from tests.support.root import ROOT

RUN = "runs/r"
OWNER = """
import json, sys, time
from maas_ray.store.lease import take
from maas_ray.store.objects import StorageSpec, open_store
spec = StorageSpec.model_validate_json(sys.argv[1])
lease = take(open_store(spec), "runs/r", "run 'r'", waits=False, beat_s=0.2)
print(json.dumps({"number": lease.claim.number}), flush=True)
while lease.lost is None:
    time.sleep(0.05)
print(json.dumps({"lost": str(lease.lost)}), flush=True)
"""


class Process:
    """A program that owns the run until it is killed or finds out that it does not any more."""

    def __init__(self, storage: StorageSpec) -> None:
        command = [sys.executable, "-c", OWNER, storage.model_dump_json()]
        self.popen = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.number = self.said()["number"]

    def said(self) -> dict[str, object]:
        assert self.popen.stdout is not None
        return dict(json.loads(self.popen.stdout.readline()))

    def end(self) -> None:
        self.popen.kill()
        self.popen.wait(timeout=30)
        if self.popen.stdout is not None:
            self.popen.stdout.close()


def _taken(store: ObstoreStore, **options: object) -> Claim:
    with take(store, RUN, "run 'r'", **{"waits": False, "beat_s": 0.1, **options}) as lease:  # type: ignore[arg-type]
        return lease.claim


def test_of_many_takers_at_once_one_gets_the_lease(storage: StorageSpec) -> None:
    start, leases, refused = threading.Barrier(6), [], []

    def run() -> None:
        store = open_store(storage)
        start.wait(timeout=60)
        try:
            leases.append(take(store, RUN, "run 'r'", waits=False, hint="wait for it"))
        except Conflict as error:
            refused.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    (lease,) = leases
    lease.close()
    assert len(refused) == 5
    assert all(f"process {os.getpid()} on " in text and ", since 2" in text for text in refused)
    assert all(text.endswith("; wait for it") for text in refused)


def test_a_released_lease_is_free_at_once_and_leaves_only_its_record(store: ObstoreStore) -> None:
    assert [_taken(store).number for _ in range(3)] == [1, 3, 5]
    assert holder_of(store, RUN) is None
    assert [info.key for info in store.scan(f"{RUN}/owners") if "/log/" not in info.key] == []
    assert fsck(store).problems == []


def test_a_living_owner_is_named_immediately_and_a_wait_for_it_is_short(storage: StorageSpec) -> None:
    owner, store = Process(storage), open_store(storage)
    try:
        for waits in (False, True):
            began = time.monotonic()
            with pytest.raises(Conflict, match=rf"run 'r' is held by process {owner.popen.pid} on \S+, since "):
                _taken(store, waits=waits, bound_s=60)
            assert time.monotonic() - began < 30
    finally:
        owner.end()


def test_a_killed_owner_of_this_machine_is_followed_at_once(storage: StorageSpec) -> None:
    owner, store = Process(storage), open_store(storage)
    owner.end()
    for waits in (False, True):
        assert _taken(store, waits=waits, bound_s=10_000).number > owner.number


def test_a_frozen_owner_is_followed_after_the_bound_and_then_ends(file_store: ObstoreStore) -> None:
    owner = Process(file_store.spec)
    try:
        owner.popen.send_signal(signal.SIGSTOP)
        with pytest.raises(Conflict, match="is held by"):
            _taken(file_store)
        said: list[str] = []
        with take(file_store, RUN, "run 'r'", waits=True, bound_s=2, on_wait=said.append):
            owner.popen.send_signal(signal.SIGCONT)
            assert f"was taken over by process {os.getpid()} on " in str(owner.said()["lost"])
        assert "waiting up to 2 s for a heartbeat" in said[0]
    finally:
        owner.end()


def _elsewhere(store: ObstoreStore) -> LeaseOwner:
    """An owner on another machine, whose clock is a day ahead: of it nothing is known but its signs of life."""
    owner = LeaseOwner(
        type="take",
        owner="e" * 32,
        host="elsewhere",
        pid=os.getpid(),
        machine="another",
        process="1",
        since_s=time.time() + 86_400,
    )
    Sequence(store, f"{RUN}/owners").append(lambda _: owner.model_dump())
    return owner


def test_an_owner_on_another_machine_is_judged_by_its_signs_of_life(store: ObstoreStore) -> None:
    owner = _elsewhere(store)
    assert not is_dead(owner)
    beats, ended = 0, threading.Event()

    def beat() -> None:
        nonlocal beats
        while not ended.wait(0.2):
            beats += 1
            store.put(f"{RUN}/owners/beat-{owner.owner}", str(beats).encode())

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(Conflict, match=f"is held by process {os.getpid()} on elsewhere"):
            _taken(store, waits=True, bound_s=60)
    finally:
        ended.set()
        thread.join()
    assert _taken(store, waits=True, bound_s=1).number == 2
    assert [info.key for info in store.scan(f"{RUN}/owners") if "/beat-" in info.key] == []


def test_a_process_id_that_was_given_again_is_another_process() -> None:
    me = {"type": "take", "owner": "o", "host": "h", "pid": os.getpid(), "machine": machine_id()}
    stat = Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[19]
    assert not is_dead(LeaseOwner(**me, process=stat))
    assert is_dead(LeaseOwner(**me, process=str(int(stat) - 1)))
    assert not is_dead(LeaseOwner(**{**me, "machine": "another"}, process="1"))
    assert not is_dead(LeaseOwner(**{**me, "machine": ""}, process="1")), "it cannot be determined"


def test_an_owner_that_lost_the_lease_commits_nothing_and_leaves_nothing(file_store: ObstoreStore) -> None:
    claim = _taken(file_store)
    checkpointer = AsyncCheckpointer(file_store, PREFIX, fence=partial(claim.check, file_store))
    try:
        checkpointer.save(snapshot(10))
        with pytest.raises(Conflict, match="the lease of run 'r' has ended; this process stops committing"):
            checkpointer.wait()
    finally:
        checkpointer.close()
    assert list_checkpoints(file_store, PREFIX) == []
    assert list(file_store.scan(PREFIX)) == []
    with take(file_store, RUN, "run 'r'", waits=False) as lease:
        checkpointer = AsyncCheckpointer(file_store, PREFIX, fence=lease.check)
        checkpointer.save(snapshot(10))
        assert checkpointer.wait() == 10
        checkpointer.close()


def test_a_commit_after_the_loss_of_the_lease_is_undone(
    file_store: ObstoreStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with take(file_store, RUN, "run 'r'", waits=False) as lease:
        stalled = FaultyStore(file_store, "503")
        create = stalled.create

        def put_late(key: str, data: bytes) -> None:
            if key.endswith("manifest.json"):  # the network stalls, and another owner takes over
                Sequence(file_store, f"{RUN}/owners").append(lambda _: _other().model_dump())
            create(key, data)

        monkeypatch.setattr(stalled, "create", put_late)
        from maas_ray.checkpoint.collectives import Collectives
        from maas_ray.checkpoint.plan import Planner
        from maas_ray.checkpoint.upload import Filled

        collectives, state = Collectives(None), snapshot(10)
        attempt = Planner(collectives).prepare(10, state.tensors)
        with pytest.raises(Conflict, match="was taken over by process 7 on elsewhere"):
            finish(stalled, PREFIX, collectives, attempt, state, Filled(attempt.pieces), 60, fence=lease.check)
    assert list_checkpoints(file_store, PREFIX) == []
    assert list(file_store.scan(PREFIX)) == []
    assert (holder_of(file_store, RUN) or _other()).owner == "f" * 32, "the release of the loser takes nothing away"
    save(file_store, PREFIX, snapshot(10))


def _other() -> LeaseOwner:
    return LeaseOwner(type="take", owner="f" * 32, host="elsewhere", pid=7, machine="m", process="1", since_s=1.0)


def test_a_store_that_is_away_does_not_end_a_lease(file_store: ObstoreStore) -> None:
    away = FaultyStore(file_store, "503", 1, where="/beat-", is_lasting=True)
    with take(away, RUN, "run 'r'", waits=False, beat_s=0.05) as lease:
        time.sleep(0.3)
        assert lease.lost is None
        lease.check()
    assert holder_of(file_store, RUN) is None


def test_heartbeats_are_not_leftovers_until_they_are_old(file_store: ObstoreStore) -> None:
    from datetime import UTC, datetime, timedelta

    _elsewhere(file_store)
    file_store.put(f"{RUN}/owners/beat-{'e' * 32}", b"1")
    assert (fsck(file_store).orphans, fsck(file_store).foreign) == ([], [])
    later = datetime.now(UTC) + timedelta(days=2)
    assert fsck(file_store, collect=True, now=later).collected == [f"{RUN}/owners/beat-{'e' * 32}"]
    with pytest.raises(NotFound):
        file_store.get(f"{RUN}/owners/beat-{'e' * 32}")
