"""The sample order: a bijection, stable across releases, well mixed, and equal for any number of readers."""

from hashlib import sha256, shake_128

import numpy as np
import pytest

from maas_ray.data.loading.order import MAX_SAMPLES, find_positions, permute, sample_ids
from maas_ray.errors import DataError

M64 = (1 << 64) - 1

# A change here would silently change what every stored cursor means.
GOLDEN_10 = [8, 4, 3, 2, 5, 0, 1, 6, 9, 7]
GOLDEN_1000 = [395, 265, 537, 916, 129, 866, 993, 592, 110, 371]
GOLDEN_MAX = [1078969568218, 38429787342, 403110144392]
GOLDEN_DIGEST = "eaa113db917df7fb10eaa3b745322766735d5705b0aa90c03bdcf0a30054ac67"


def _reference(seed: int, epoch: int, n: int, position: int) -> int:
    """The same network in Python's own integers, written apart from the vectorized one."""
    message = b"maas-ray sample order 1" + b"".join(v.to_bytes(8, "little") for v in (seed, epoch, n))
    digest = shake_128(message).digest(96)
    bits = (n - 1).bit_length()
    low_bits = bits - bits // 2
    high_bits = bits // 2
    value = position
    while True:
        high, low = divmod(value, 2**low_bits)
        for i in range(12):
            key = int.from_bytes(digest[8 * i : 8 * i + 8], "little")
            z = ((low if i % 2 else high) + key) & M64
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
            z ^= z >> 31
            if i % 2:
                high ^= z % 2**high_bits
            else:
                low ^= z % 2**low_bits
        value = high * 2**low_bits + low
        if value < n:
            return value


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 100, 1023, 1024, 1025, 50_000])
def test_every_epoch_contains_every_sample_once(n: int) -> None:
    for epoch in (0, 1, 2**64 - 1):
        ids = permute(7, epoch, n, np.arange(n))
        assert np.array_equal(np.sort(ids), np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100, 1023, 1025, 50_000])
def test_the_position_of_a_sample_is_found_again(n: int) -> None:
    positions = np.arange(n)
    for epoch in (0, 2**64 - 1):
        assert np.array_equal(find_positions(5, epoch, n, permute(5, epoch, n, positions)), positions)


def test_the_order_is_the_one_that_was_released() -> None:
    assert permute(0, 0, 10, np.arange(10)).tolist() == GOLDEN_10
    assert permute(123456789, 5, 1000, np.arange(0, 1000, 100)).tolist() == GOLDEN_1000
    assert permute(2**64 - 1, 2**64 - 1, MAX_SAMPLES, np.array([0, 1, MAX_SAMPLES - 1])).tolist() == GOLDEN_MAX
    everything = permute(1, 2, 60_000, np.arange(60_000)).astype("<i8").tobytes()
    assert sha256(everything).hexdigest() == GOLDEN_DIGEST


@pytest.mark.parametrize("n", [1, 2, 3, 17, 4096, 60_000, 2**31 + 11, MAX_SAMPLES - 1, MAX_SAMPLES])
def test_the_vectorized_network_equals_plain_integer_arithmetic(n: int) -> None:
    rng = np.random.default_rng(n)
    positions = rng.integers(0, n, size=40)
    for seed, epoch in ((0, 0), (2**64 - 1, 3), (42, 2**40)):
        expected = [_reference(seed, epoch, n, int(p)) for p in positions]
        assert permute(seed, epoch, n, positions).tolist() == expected


@pytest.mark.parametrize("n", [2, 3, 5, 6, 10, 37])
def test_over_many_seeds_every_sample_is_equally_likely_at_every_position(n: int) -> None:
    num_seeds = 1000
    counts = np.zeros((n, n))
    for seed in range(num_seeds):
        counts[np.arange(n), permute(seed, 0, n, np.arange(n))] += 1
    expected = num_seeds / n
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    freedom = (n - 1) ** 2
    assert chi_squared < freedom + 5 * np.sqrt(2 * freedom) + 5
    # The same measure sees a rotation by a random amount with one position left out of the mixing.
    counts[0] = 0
    counts[0, 0] = num_seeds
    assert ((counts - expected) ** 2 / expected).sum() > freedom + 5 * np.sqrt(2 * freedom) + 5


def test_neighbours_do_not_stay_neighbours_and_nothing_correlates() -> None:
    n = 20_000
    ids = permute(3, 0, n, np.arange(n))
    steps = np.abs(np.diff(ids))
    assert (steps == 1).sum() < 20  # two are expected
    assert abs(np.corrcoef(ids, np.arange(n))[0, 1]) < 0.03
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.03
    assert len(np.unique(steps)) > n / 3


def test_epochs_seeds_and_sizes_give_unrelated_orders() -> None:
    n = 5000
    base = permute(1, 0, n, np.arange(n))
    for other in (permute(1, 1, n, np.arange(n)), permute(2, 0, n, np.arange(n))):
        assert (base == other).sum() < 10  # one is expected
    assert (base[: n - 1] == permute(1, 0, n - 1, np.arange(n - 1))).sum() < 10


@pytest.mark.parametrize("step", [1, 3, 64, 1000])
def test_the_stream_is_the_same_however_it_is_cut(step: int) -> None:
    n, total = 97, 1000
    whole = sample_ids(5, n, 0, total)
    pieces = [sample_ids(5, n, start, min(step, total - start)) for start in range(0, total, step)]
    assert np.array_equal(np.concatenate(pieces), whole)
    for epoch in range(total // n):
        assert np.array_equal(np.sort(whole[epoch * n : (epoch + 1) * n]), np.arange(n))


def test_an_empty_range_has_no_ids() -> None:
    assert sample_ids(5, 10, 3, 0).shape == (0,)


@pytest.mark.parametrize(
    "call",
    [
        lambda: permute(0, 0, 0, np.arange(0)),
        lambda: permute(0, 0, MAX_SAMPLES + 1, np.arange(1)),
        lambda: permute(-1, 0, 5, np.arange(5)),
        lambda: permute(2**64, 0, 5, np.arange(5)),
        lambda: permute(0, -1, 5, np.arange(5)),
        lambda: permute(0, 0, 5, np.array([5])),
        lambda: permute(0, 0, 5, np.array([-1])),
        lambda: sample_ids(0, 5, -1, 2),
        lambda: sample_ids(0, 5, 0, -2),
    ],
)
def test_numbers_out_of_range_are_refused(call) -> None:
    with pytest.raises(DataError):
        call()
