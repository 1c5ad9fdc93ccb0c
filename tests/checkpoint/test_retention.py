import pytest

from maas_ray.checkpoint.catalog import describe, list_checkpoints, open_checkpoint, pin, place
from maas_ray.checkpoint.retention import Keep, Retention
from maas_ray.checkpoint.save import save
from maas_ray.errors import NotFound
from maas_ray.store.objects import ObstoreStore
from maas_ray.store.sequence import Sequence
from tests.checkpoint.states import PREFIX, snapshot

LOSSES = {1: 0.9, 2: 0.2, 3: 0.5, 4: float("inf"), 5: 0.3, 6: 0.7}


@pytest.fixture
def saved(file_store: ObstoreStore) -> ObstoreStore:
    """Six checkpoints; the fourth has no loss."""
    for step, loss in LOSSES.items():
        metrics = {} if step == 4 else {"loss": loss}
        save(file_store, PREFIX, snapshot(step, {}, metrics=metrics))
    return file_store


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (Keep(last=2), [5, 6]),
        (Keep(last=0), [6]),
        (Keep(last=9), [1, 2, 3, 4, 5, 6]),
        (Keep(last=1, best=2, metric="loss"), [2, 5, 6]),
        (Keep(last=1, best=2, metric="loss", mode="max"), [1, 6]),
        (Keep(last=1, best=2, metric="accuracy"), [6]),
        (Keep(last=1, every_steps=2), [2, 4, 6]),
        (Keep(last=1, best=1, metric="loss", mode="max", every_steps=3), [1, 3, 6]),
    ],
    ids=str,
)
def test_checkpoints_selected_by_a_rule_are_kept(saved: ObstoreStore, keep: Keep, kept: list[int]) -> None:
    removed = Retention(saved, PREFIX, keep).apply()
    assert list_checkpoints(saved, PREFIX) == kept
    assert sorted([*removed, *kept]) == list(LOSSES)
    assert len(list(saved.scan(""))) == 2 * len(kept), "manifest and history of each: nothing is left of the others"


def test_pinned_checkpoints_are_kept(saved: ObstoreStore) -> None:
    pin(saved, PREFIX, 1, "published")
    Sequence(saved, "runs/r/pins").append(lambda _: {"step": 3, "reason": "published"})
    Retention(saved, PREFIX, Keep(last=1)).apply()
    assert list_checkpoints(saved, PREFIX) == [1, 3, 6]
    assert [each["is_pinned"] for each in describe(saved, PREFIX)] == [True, True, False]
    with pytest.raises(NotFound, match="of step 9"):
        pin(saved, PREFIX, 9, "no such step")


def test_attempts_without_a_manifest_and_damaged_ones_push_no_good_one_out(saved: ObstoreStore) -> None:
    saved.delete([f"{place(PREFIX, 6)}/manifest.json"])
    saved.put(f"{place(PREFIX, 5)}/manifest.json", b"damaged")
    Retention(saved, PREFIX, Keep(last=1)).apply()
    assert list_checkpoints(saved, PREFIX) == [4, 5]
    assert open_checkpoint(saved, PREFIX, 4).meta["step"] == 4


def test_repeated_retention_counts_checkpoints_saved_since(saved: ObstoreStore) -> None:
    retention = Retention(saved, PREFIX, Keep(last=2, best=1, metric="loss"))
    assert retention.apply() == [1, 3, 4]
    save(saved, PREFIX, snapshot(7, {}, metrics={"loss": 0.1}))
    assert retention.apply() == [2, 5]
    assert retention.apply() == []
    assert list_checkpoints(saved, PREFIX) == [6, 7]
