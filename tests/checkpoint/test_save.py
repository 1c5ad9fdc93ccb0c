import json

import pytest
import safetensors.torch
import torch

from maas_ray.checkpoint.catalog import HISTORY, list_checkpoints, open_checkpoint, read_saved, verify
from maas_ray.checkpoint.load import load_into, read_tensors
from maas_ray.checkpoint.reshard import reshard
from maas_ray.checkpoint.save import Snapshot, save
from maas_ray.errors import Conflict, ModelError, NotFound, ObjectCorrupt, SaveFailed
from maas_ray.store.fsck import fsck
from maas_ray.store.objects import ObstoreStore
from tests.checkpoint.states import PREFIX, is_equal, small_parts, small_tensors, snapshot, zeros


def test_everything_is_restored_bit_for_bit(store: ObstoreStore) -> None:
    written = save(store, PREFIX, snapshot(3))
    committed = open_checkpoint(store, PREFIX)
    assert committed.digest == written.digest
    assert is_equal(read_tensors(committed, ""), small_tensors(3))
    saved = read_saved(committed)
    assert (saved.step, saved.cursor, saved.meta) == (3, 24, {"seed": 5})
    assert saved.history == [{"step": 1, "loss": 0.25}]
    report = fsck(store)
    assert (report.num_commits, report.problems, report.orphans, report.foreign) == (1, [], [], [])


def test_weights_are_read_without_the_optimizer_and_without_their_prefix(file_store: ObstoreStore) -> None:
    weights = read_tensors(save(file_store, PREFIX, snapshot(3)))
    assert sorted(weights) == ["bias", "half", "mask", "nothing", "steps", "weight"]
    assert torch.equal(weights["weight"], small_tensors(3)["model.weight"])


def test_parameters_that_require_gradients_are_saved_and_filled_in_place(file_store: ObstoreStore) -> None:
    net, fresh = torch.nn.Linear(300, 200), torch.nn.Linear(300, 200)
    committed = save(file_store, PREFIX, Snapshot(1, 8, dict(net.named_parameters())))
    before = fresh.weight
    num_bytes = load_into(committed, dict(fresh.named_parameters()))
    assert num_bytes == 4 * (300 * 200 + 200)
    assert fresh.weight is before
    assert torch.equal(fresh.weight, net.weight)
    assert fresh.weight.requires_grad


def test_tied_and_strided_tensors_are_saved_as_their_values(file_store: ObstoreStore) -> None:
    weight = torch.randn(300, 200)
    tensors = {"a": weight, "tied": weight, "turned": weight.t(), "part": weight[::3, 5:50]}
    assert is_equal(read_tensors(save(file_store, PREFIX, Snapshot(1, 0, tensors)), ""), tensors)


def test_parts_are_bounded_safetensors_files(file_store: ObstoreStore, monkeypatch: pytest.MonkeyPatch) -> None:
    small_parts(monkeypatch)
    committed = save(file_store, PREFIX, snapshot(3))
    files = [part for name, part in committed.parts.items() if name != HISTORY]
    assert len(files) > 5
    assert max(part.size for part in files) < 130 << 10  # the largest tile, and a header
    found = {name for part in files for name in safetensors.torch.load(file_store.get(part.key))}
    assert {"model.bias", "model.weight[0:100,0:150]"} <= found


def test_a_step_committed_again_with_the_same_values_is_kept_and_with_others_refused(file_store: ObstoreStore) -> None:
    first = save(file_store, PREFIX, snapshot(3))
    assert save(file_store, PREFIX, snapshot(3)).digest == first.digest
    num_objects = len(list(file_store.scan("")))
    other = {**small_tensors(3), "model.bias": torch.zeros(7)}
    with pytest.raises(ObjectCorrupt, match="committed with weights that differ"):
        save(file_store, PREFIX, snapshot(3, other))
    assert open_checkpoint(file_store, PREFIX).digest == first.digest
    assert len(list(file_store.scan(""))) == num_objects, "the second attempt cleans up after itself"


def test_another_layout_may_differ_in_the_last_bits_and_the_committed_step_is_kept(file_store: ObstoreStore) -> None:
    first = save(file_store, PREFIX, snapshot(3, layout="dp 2"))
    other = {**small_tensors(3), "model.bias": torch.zeros(7)}
    assert save(file_store, PREFIX, snapshot(3, other, layout="dp 4")).digest == first.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.other": torch.zeros(2)}, "does not contain 'model.other'"),
        ({"model.bias": torch.zeros(8)}, r"contains 'model.bias' as torch.float32 of shape \[7\]; requested .* \[8\]"),
        ({"model.bias": torch.zeros(7, dtype=torch.bfloat16)}, "requested torch.bfloat16"),
        ({"model.bias": torch.zeros(7, device="meta")}, "device meta"),
    ],
    ids=["name", "shape", "type", "meta"],
)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_filled(
    file_store: ObstoreStore, change: dict[str, torch.Tensor], message: str
) -> None:
    committed = save(file_store, PREFIX, snapshot(3))
    tensors = {**zeros(small_tensors(3)), **change}
    with pytest.raises(ModelError, match=message):
        load_into(committed, tensors)
    assert not tensors["model.weight"].any()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (snapshot(3, {"model.z": torch.zeros(2, dtype=torch.complex128)}), "rank 0: tensor 'model.z' has type"),
        (snapshot(3, loss=float("nan")), "rank 0, runs/r/checkpoints/0000000003: .*not JSON compliant"),
    ],
    ids=["type", "NaN"],
)
def test_a_state_that_cannot_be_saved_is_reported_and_leaves_nothing(
    file_store: ObstoreStore, bad: Snapshot, message: str
) -> None:
    with pytest.raises(SaveFailed, match=message) as caught:
        save(file_store, PREFIX, bad)
    assert caught.value.retryable
    assert list(file_store.scan("")) == []


def test_a_missing_name_is_reported_with_existing_names(file_store: ObstoreStore) -> None:
    with pytest.raises(NotFound, match="no committed checkpoint yet"):
        open_checkpoint(file_store, PREFIX)
    save(file_store, PREFIX, snapshot(2))
    with pytest.raises(NotFound, match="no committed checkpoint of step 9; steps: 2"):
        open_checkpoint(file_store, PREFIX, 9)


def test_the_index_of_another_format_is_refused(file_store: ObstoreStore) -> None:
    from maas_ray.store.manifest import CommitWriter

    committed = CommitWriter(file_store, f"{PREFIX}/0000000001", "checkpoint").commit({"format": 1, "step": 1})
    with pytest.raises(ObjectCorrupt, match="has format 1; this version reads 3"):
        load_into(committed, {})
    assert [str(problem) for problem in verify(committed)]


@pytest.mark.parametrize("num_parts", [None, 3])
def test_a_checkpoint_is_resharded_into_whole_tensors(
    file_store: ObstoreStore, monkeypatch: pytest.MonkeyPatch, num_parts: int | None
) -> None:
    small_parts(monkeypatch)
    committed = save(file_store, PREFIX, snapshot(3))
    written = reshard(committed, file_store, "elsewhere", num_parts)
    files = [part.key for name, part in written.parts.items() if name != HISTORY]
    assert len(files) == (num_parts or 1)
    assert verify(written) == []
    assert is_equal(read_tensors(written, ""), small_tensors(3))
    assert read_saved(written) == read_saved(committed)
    by_others = {name: value for key in files for name, value in safetensors.torch.load(file_store.get(key)).items()}
    assert is_equal(by_others, small_tensors(3))
    with pytest.raises(Conflict, match="step 3 is already committed at elsewhere"):
        reshard(committed, file_store, "elsewhere")


def test_partial_attempts_are_not_listed(file_store: ObstoreStore) -> None:
    save(file_store, PREFIX, snapshot(1))
    save(file_store, PREFIX, snapshot(2))
    file_store.delete([f"{PREFIX}/0000000002/manifest.json"])
    assert list_checkpoints(file_store, PREFIX) == [1]
    assert json.loads(open_checkpoint(file_store, PREFIX).read(HISTORY))
