"""Global batches do not depend on the number of ranks; each sample occurs once per epoch; the state is the cursor."""

import numpy as np
import pytest
import torch

from maas_ray.data.loading.loader import Loader
from maas_ray.data.loading.order import sample_ids
from maas_ray.errors import DataError

N = 103


def _columns() -> list[np.ndarray]:
    ids = np.arange(N)
    return [
        ids.astype(np.float32).reshape(-1, 1),
        (ids * 2).astype(np.int64).reshape(-1, 1),
        np.tile(ids.astype(np.uint8)[:, None, None, None], (1, 1, 3, 2)),
        (ids * 3).astype(np.float32).reshape(-1, 1),
        np.stack([ids, ids], axis=1).astype(np.float32),
    ]


def _loader(rank: int = 0, world: int = 1, accumulation_steps: int = 1, global_batch: int = 10) -> Loader:
    return Loader(
        _columns(),
        np.arange(N),
        seed=4,
        global_batch=global_batch,
        rank=rank,
        world=world,
        accumulation_steps=accumulation_steps,
    )


def _global_batch(world: int, accumulation_steps: int, cursor: int, stop: int, global_batch: int = 10) -> list[int]:
    """The ids of one global batch in global order, put together again from all ranks."""
    by_rank = []
    for rank in range(world):
        batches = _loader(rank, world, accumulation_steps, global_batch).load(cursor, stop)
        assert len(batches) == accumulation_steps
        by_rank.append([int(i) for batch in batches for i in batch.target])
    total = sum(map(len, by_rank))
    return [by_rank[p % world][p // world] for p in range(total)]


@pytest.mark.parametrize("world", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_ids_and_order_of_a_global_batch_do_not_depend_on_the_number_of_ranks(
    world: int, accumulation_steps: int
) -> None:
    for cursor, stop in ((0, 10**9), (95, N), (100, N), (95, 10**9), (5 * N + 3, 10**9)):
        length = min(10, stop - cursor)
        assert _global_batch(world, accumulation_steps, cursor, stop) == sample_ids(4, N, cursor, length).tolist()


@pytest.mark.parametrize("world", [1, 3, 16])
def test_every_row_knows_its_position_in_the_endless_stream(world: int) -> None:
    for cursor, stop in ((0, 10**9), (95, 100), (5 * N + 3, 10**9)):
        batches = [b for rank in range(world) for b in _loader(rank, world, accumulation_steps=2).load(cursor, stop)]
        positions = torch.cat([batch.positions for batch in batches])
        ids = torch.cat([batch.target for batch in batches])
        assert sorted(positions.tolist()) == list(range(cursor, min(cursor + 10, stop)))
        assert ids.tolist() == [int(sample_ids(4, N, int(p), 1)[0]) for p in positions]


@pytest.mark.parametrize("world", [1, 2, 5])
def test_every_sample_occurs_exactly_once_per_epoch(world: int) -> None:
    for epoch in range(2):
        seen = []
        for cursor in range(epoch * N, (epoch + 1) * N, 25):
            seen += _global_batch(world, 1, cursor, (epoch + 1) * N, global_batch=25)
        assert sorted(seen) == list(range(N))


def test_every_column_holds_the_rows_of_its_target() -> None:
    raw = _columns()
    for batch in _loader(accumulation_steps=3, global_batch=64).load(7, 10**9):
        ids = batch.target.numpy()
        assert batch.num_rows == len(ids)
        for column, values in zip(batch.columns, raw, strict=True):
            assert column.dtype == torch.from_numpy(values).dtype
            assert column.shape == (len(ids), *values.shape[1:])
            assert np.array_equal(column.numpy(), values[ids])


def test_a_rank_without_rows_gets_empty_micro_batches() -> None:
    batches = _loader(rank=3, world=8, accumulation_steps=2).load(0, 2)
    assert [batch.num_rows for batch in batches] == [0, 0]
    assert [tuple(column.shape) for column in batches[0].columns] == [(0, 1), (0, 1), (0, 1, 3, 2), (0, 1), (0, 2)]


def test_micro_batches_differ_by_at_most_one_row() -> None:
    sizes = [batch.num_rows for batch in _loader(accumulation_steps=3, global_batch=10).load(0, 10**9)]
    assert sorted(sizes) == [3, 3, 4]


def test_jumping_to_any_cursor_equals_reading_up_to_it() -> None:
    reader = _loader(global_batch=9)
    cursor = 0
    for _ in range(600):  # beyond several of the stretches that are permuted at once
        here = reader.load(cursor, 10**9)[0].target.tolist()
        if cursor % 63 == 0:
            assert here == _loader(global_batch=9).load(cursor, 10**9)[0].target.tolist()
        cursor += 9


def test_read_only_arrays_are_taken_without_a_warning() -> None:
    columns, target = _columns(), np.arange(N)
    for values in (*columns, target):
        values.flags.writeable = False
    Loader(columns, target, seed=0, global_batch=4, rank=0, world=1).load(0, 4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"target": np.arange(0)}, "no rows"),
        ({"target": np.arange(N - 1)}, "rows"),
        ({"columns": []}, "columns"),
        ({"global_batch": 0}, "global_batch 0"),
        ({"accumulation_steps": 0}, "accumulation_steps 0"),
        ({"rank": 2, "world": 2}, "rank 2"),
        ({"rank": -1}, "rank -1"),
    ],
)
def test_invalid_arguments_of_a_loader_are_rejected(change: dict, says: str) -> None:
    arguments = {"columns": _columns(), "target": np.arange(N), "seed": 0, "global_batch": 4, "rank": 0, "world": 1}
    arguments.update(change)
    with pytest.raises(DataError, match=says):
        Loader(arguments.pop("columns"), arguments.pop("target"), **arguments)


@pytest.mark.parametrize(("cursor", "stop"), [(-1, 5), (5, 5), (6, 5)])
def test_an_empty_stretch_is_refused(cursor: int, stop: int) -> None:
    with pytest.raises(DataError, match="range of positions"):
        _loader().load(cursor, stop)
