import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maas_ray.checkpoint.tiles import MIN_TILE_BYTES, TILE_BYTES, cut, grid


@given(
    shape=st.lists(st.integers(1, 3000), min_size=1, max_size=3),
    itemsize=st.sampled_from([1, 2, 4, 8]),
    data=st.data(),
)
def test_tiles_cover_a_box_once(shape: list[int], itemsize: int, data: st.DataObject) -> None:
    offsets = [data.draw(st.integers(0, size - 1)) for size in shape]
    sizes = [data.draw(st.integers(1, size - offset)) for size, offset in zip(shape, offsets, strict=True)]
    tiles = list(cut((tuple(offsets), tuple(sizes)), grid(shape, itemsize)))
    assert sum(math.prod(lengths) for _, lengths in tiles) == math.prod(sizes)
    assert len({start for start, _ in tiles}) == len(tiles)
    for start, lengths in tiles:
        for at, length, offset, size in zip(start, lengths, offsets, sizes, strict=True):
            assert length > 0
            assert offset <= at
            assert at + length <= offset + size


@pytest.mark.parametrize("size", [512, 501, 1003, 50257])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_large_matrix_is_cut_where_ranks_divide_it(size: int, ranks: int, dim: int) -> None:
    shape = [768, 768]
    shape[dim] = size
    starts = [0]
    for piece in torch.empty(size, device="meta").chunk(ranks):
        starts.append(starts[-1] + len(piece))
    assert set(starts) <= set(grid(shape, 4)[dim])


@pytest.mark.parametrize("size", [501, 1003, 50257])
def test_rows_are_also_cut_for_nested_sharding(size: int) -> None:
    starts = [0]
    for outer in torch.empty(size, device="meta").chunk(2):
        for inner in outer.chunk(2):
            starts.append(starts[-1] + len(inner))
    assert set(starts) <= set(grid([size, 768], 4)[0])


@pytest.mark.parametrize(
    ("shape", "num_tiles"),
    [
        ((), 1),
        ((100,), 1),
        ((100, 100), 1),
        ((256, 256), 4),
        ((1024, 1024), 16),
        ((4096, 4096), 64),
        ((8192, 28672), 64),
        ((1 << 20, 8), 32),
    ],
)
def test_small_tensors_stay_whole_and_large_ones_have_a_bounded_number_of_tiles(
    shape: tuple[int, ...], num_tiles: int
) -> None:
    assert len(list(cut(((0,) * len(shape), shape), grid(shape, 4)))) == num_tiles


def test_tiles_grow_with_the_checkpoint_so_that_the_manifest_of_a_large_model_stays_small() -> None:
    shape = (8192, 28672)
    assert MIN_TILE_BYTES < TILE_BYTES
    assert len(list(cut(((0, 0), shape), grid(shape, 4, total_bytes=1 << 42)))) <= 16
