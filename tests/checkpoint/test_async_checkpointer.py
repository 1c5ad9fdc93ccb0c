import logging
import threading
from collections.abc import Mapping
from unittest.mock import Mock

import pytest
import torch

from maas_ray.checkpoint import upload
from maas_ray.checkpoint.async_checkpointer import AsyncCheckpointer, SteadyCopy
from maas_ray.checkpoint.catalog import list_checkpoints, open_checkpoint, read_saved
from maas_ray.checkpoint.load import read_tensors
from maas_ray.checkpoint.retention import Keep
from maas_ray.checkpoint.save import Snapshot
from maas_ray.errors import MaasError, ObjectCorrupt, SaveFailed
from maas_ray.store.objects import ObstoreStore
from tests.checkpoint.states import PREFIX, is_equal, small_tensors, snapshot
from tests.support.faulty import FaultyStore


class _Gated(FaultyStore):
    """Holds every write back until it is opened."""

    def __init__(self, store: ObstoreStore) -> None:
        super().__init__(store, "503")
        self.gate = threading.Event()

    def put(self, key: str, data: bytes | memoryview) -> None:
        assert self.gate.wait(30)
        super().put(key, data)


def test_the_state_is_that_of_the_call_whatever_changes_while_it_is_written(file_store: ObstoreStore) -> None:
    gated = _Gated(file_store)
    checkpointer = AsyncCheckpointer(gated, PREFIX)
    tensors = small_tensors(3)
    history = [{"step": 1}]
    meta = {"schedule": {"last_epoch": 3}}
    checkpointer.save(Snapshot(3, 24, tensors, meta, history))
    for tensor in tensors.values():
        tensor.zero_()
    history.append({"step": 2})
    meta["schedule"]["last_epoch"] = 4
    assert list_checkpoints(file_store, PREFIX) == [], "save returned before anything was written"
    gated.gate.set()
    assert checkpointer.wait() == 3
    checkpointer.close()
    committed = open_checkpoint(file_store, PREFIX)
    assert is_equal(read_tensors(committed, ""), small_tensors(3))
    assert read_saved(committed).history == [{"step": 1}]
    assert read_saved(committed).meta == {"schedule": {"last_epoch": 3}}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """While it is clear, background copies wait; it is set at first."""
    event = threading.Event()
    event.set()
    run = SteadyCopy.run
    monkeypatch.setattr(SteadyCopy, "run", lambda copy, staging: (event.wait(30), run(copy, staging)))
    return event


def test_steady_tensors_are_copied_while_gradients_are_computed(
    file_store: ObstoreStore, gate: threading.Event
) -> None:
    checkpointer = AsyncCheckpointer(file_store, PREFIX)
    tensors = {"weight": torch.ones(1000), "statistics": torch.ones(3)}
    checkpointer.save(Snapshot(1, 0, tensors), steady=["weight"])  # the first one looks which of them do stay
    checkpointer.staged()
    tensors["weight"].add_(1)
    checkpointer.wait()
    gate.clear()
    checkpointer.save(Snapshot(2, 0, tensors), steady=["weight"])
    tensors["statistics"].add_(5)  # by a forward pass
    update = threading.Thread(target=lambda: (checkpointer.staged(), tensors["weight"].add_(1)))
    update.start()
    update.join(0.05)
    assert update.is_alive()
    assert float(tensors["weight"][0]) == 2, "the update waits for the copy"
    gate.set()
    update.join(30)
    assert checkpointer.wait() == 2
    checkpointer.close()
    saved = read_tensors(open_checkpoint(file_store, PREFIX, 2), "")
    assert is_equal(saved, {"weight": torch.full((1000,), 2.0), "statistics": torch.ones(3)})


def test_a_tensor_that_changes_while_it_is_copied_is_caught_and_then_copied_at_once(
    file_store: ObstoreStore, gate: threading.Event
) -> None:
    checkpointer = AsyncCheckpointer(file_store, PREFIX)
    tensors = {"weight": torch.zeros(10), "other": torch.zeros(10)}
    checkpointer.save(Snapshot(1, 0, tensors), steady=tensors)
    checkpointer.wait()
    gate.clear()
    checkpointer.save(Snapshot(2, 0, tensors), steady=tensors)
    tensors["weight"].add_(1)
    gate.set()
    assert checkpointer.wait() == 1
    assert "weight changed while it was being copied" in str(checkpointer.failure)
    gate.clear()
    checkpointer.save(Snapshot(3, 0, tensors), steady=tensors)
    tensors["weight"].add_(1)
    gate.set()
    assert checkpointer.wait() == 3
    checkpointer.close()
    assert float(read_tensors(open_checkpoint(file_store, PREFIX, 3), "")["weight"][0]) == 1


def test_a_module_that_changes_its_weights_in_the_forward_pass_loses_no_save(file_store: ObstoreStore) -> None:
    checkpointer = AsyncCheckpointer(file_store, PREFIX)
    net = torch.nn.Embedding(6, 4, max_norm=1.0)
    net.weight.data.fill_(1.0)  # rows are too long: each that is looked up is shortened in place
    for step in range(3):
        checkpointer.save(Snapshot(step, 0, net.state_dict()), steady=["weight"])
        expected = net.weight.detach().clone()
        net(torch.tensor([2 * step, 2 * step + 1]))
        checkpointer.staged()
        assert checkpointer.wait() == step
        assert is_equal(read_tensors(open_checkpoint(file_store, PREFIX, step), ""), {"weight": expected})
    checkpointer.close()


def test_saves_follow_each_other_in_the_same_buffers_and_retention_follows_them(
    file_store: ObstoreStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocate = Mock(side_effect=upload.new_buffer)
    monkeypatch.setattr(upload, "new_buffer", allocate)
    committed = []
    checkpointer = AsyncCheckpointer(
        file_store, PREFIX, keep=Keep(last=2), on_commit=lambda each: committed.append(each.meta["step"])
    )
    for step in range(1, 5):
        checkpointer.save(snapshot(step))
        assert checkpointer.committed_step == (step - 1 or None), "one at a time: the one before is done"
    allocate.assert_called_once()
    checkpointer.save(snapshot(5))
    assert checkpointer.wait() == 5
    checkpointer.close()
    assert committed == [1, 2, 3, 4, 5]
    assert list_checkpoints(file_store, PREFIX) == [4, 5]
    for step in (4, 5):
        assert is_equal(read_tensors(open_checkpoint(file_store, PREFIX, step), ""), small_tensors(step))


def test_a_state_with_other_tensors_is_planned_again(file_store: ObstoreStore) -> None:
    checkpointer = AsyncCheckpointer(file_store, PREFIX)
    states: list[Mapping[str, torch.Tensor]] = [
        {"a": torch.ones(3)},
        {"a": torch.ones(3), "moment": torch.ones(2)},
        {"a": torch.ones(4)},
        {"a": torch.ones(4, dtype=torch.float64)},
    ]
    for step, tensors in enumerate(states):
        checkpointer.save(Snapshot(step, 0, tensors))
    checkpointer.wait()
    checkpointer.close()
    for step, tensors in enumerate(states):
        assert is_equal(read_tensors(open_checkpoint(file_store, PREFIX, step), ""), tensors)


@pytest.mark.parametrize("fault", ["503", "no space", "I/O error"])
def test_a_failed_save_is_logged_and_training_continues(
    file_store: ObstoreStore, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = AsyncCheckpointer(FaultyStore(file_store, fault, 1), PREFIX)
    with caplog.at_level(logging.WARNING, "maas_ray"):
        checkpointer.save(snapshot(1))
        checkpointer.save(snapshot(2))
    assert "step 1 was not saved (failure 1 in a row)" in caplog.text
    assert checkpointer.wait() == 2
    assert checkpointer.failure is None
    checkpointer.close()
    assert list_checkpoints(file_store, PREFIX) == [2]
    assert all("0000000002" in info.key for info in file_store.scan("")), "nothing is left of the failed attempt"


def test_failures_in_a_row_are_raised_and_the_last_one_on_request(file_store: ObstoreStore) -> None:
    broken = FaultyStore(file_store, "503", 1, where="safetensors", is_lasting=True)
    checkpointer = AsyncCheckpointer(broken, PREFIX, max_failures=2)
    checkpointer.save(snapshot(1))
    assert checkpointer.wait() is None
    assert isinstance(checkpointer.failure, SaveFailed)
    with pytest.raises(SaveFailed, match="rank 0: .*00000-00000.safetensors.* 503"):
        checkpointer.wait(is_strict=True)
    checkpointer.save(snapshot(2))
    with pytest.raises(SaveFailed) as caught:
        checkpointer.save(snapshot(3))
    assert caught.value.retryable
    checkpointer.close()


def test_a_run_that_is_not_repeatable_is_raised_at_once(file_store: ObstoreStore) -> None:
    checkpointer = AsyncCheckpointer(file_store, PREFIX, max_failures=9)
    checkpointer.save(snapshot(1))
    checkpointer.save(snapshot(1, small_tensors(2)))
    with pytest.raises(ObjectCorrupt, match="committed with weights that differ"):
        checkpointer.save(snapshot(2))
    checkpointer.close()


def test_a_failure_after_the_commit_does_not_undo_it(
    file_store: ObstoreStore, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> None:
        raise MaasError("no actor")

    checkpointer = AsyncCheckpointer(file_store, PREFIX, on_commit=fail)
    checkpointer.save(snapshot(1))
    assert checkpointer.wait(is_strict=True) == 1
    checkpointer.close()
    assert "step 1 is committed, but retention or a callback failed" in caplog.text


def test_a_store_that_hangs_is_not_waited_for_beyond_the_timeout(file_store: ObstoreStore) -> None:
    gated = _Gated(file_store)
    checkpointer = AsyncCheckpointer(gated, PREFIX, timeout_s=0.2)
    checkpointer.save(snapshot(1))
    with pytest.raises(SaveFailed, match="00000-00000.safetensors was not written within 0.2 s"):
        checkpointer.wait(is_strict=True)
    gated.gate.set()
    checkpointer.save(snapshot(2))
    assert checkpointer.wait() == 2
    checkpointer.close()
