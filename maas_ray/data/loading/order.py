"""The order of samples: a stateless permutation of [0, n) for every (seed, epoch). Independent of data and ranks.

Each position is mapped by a Feistel network on the smallest power of two that holds n, and mapped again while the
result is not below n (cycle walking: Black & Rogaway, "Ciphers with arbitrary finite domains", 2002). Integer
arithmetic only, so that the order is the same on every machine and in every release; a cursor is one integer.
"""

from functools import lru_cache
from hashlib import shake_128

import numpy as np
from numpy.typing import NDArray

from maas_ray.errors import DataError

MAX_SAMPLES = 1 << 40
SPLITMIX64_STEP = 0x9E3779B97F4A7C15
"""The increment of SplitMix64 (Steele, Lea & Flood 2014)."""
SPLITMIX64_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""The factors of its finalizer."""
_ROUNDS = 12  # many, because the halves of a small data set have only a few bits
_TAG = b"maas-ray sample order 1"


def permute(seed: int, epoch: int, n: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sample ids at `positions` of one epoch; a bijection of [0, n) onto itself.

    Args:
        seed: in [0, 2**64).
        epoch: in [0, 2**64).
        n: number of samples, in [1, 2**40].
        positions: int64 [K], each in [0, n).

    Returns:
        int64 [K], each in [0, n).

    Raises:
        DataError: an argument is out of its range.
    """
    return _whole_epoch(seed, epoch, n, positions, range(_ROUNDS))


def find_positions(seed: int, epoch: int, n: int, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The inverse of `permute`: the positions of the samples `ids` in the epoch."""
    return _whole_epoch(seed, epoch, n, ids, range(_ROUNDS)[::-1])


def sample_ids(seed: int, n: int, start: int, count: int) -> NDArray[np.int64]:
    """The ids at global positions [start, start + count) of the endless stream of epochs.

    Position p is in epoch p // n, so each epoch contains every sample exactly once.

    Args:
        seed: in [0, 2**64).
        n: number of samples, in [1, 2**40].
        start: first position, not negative.
        count: number of positions, not negative.

    Returns:
        int64 [count].

    Raises:
        DataError: an argument is out of its range.
    """
    _check(seed, n)
    if start < 0 or count < 0:
        raise DataError(f"start {start} and count {count} must not be negative")
    if not count:
        return np.empty(0, dtype=np.int64)
    first_epoch, offset = divmod(start, n)
    stream = np.arange(offset, offset + count, dtype=np.int64)
    which, positions = np.divmod(stream, n)  # epochs counted from the first one, which may be beyond int64
    keys = [_round_keys(seed, first_epoch + i, n) for i in range(int(which[-1]) + 1)]
    return _walk(positions, n, np.concatenate(keys, axis=1), which)


def _whole_epoch(seed: int, epoch: int, n: int, values: NDArray[np.int64], rounds: range) -> NDArray[np.int64]:
    _check(seed, n)
    if not 0 <= epoch < 1 << 64:
        raise DataError(f"epoch {epoch} is not in [0, 2**64)")
    values = np.asarray(values, dtype=np.int64)
    if values.size and not (int(values.min()) >= 0 and int(values.max()) < n):
        raise DataError(f"positions {int(values.min())}..{int(values.max())} are not all in [0, {n})")
    return _walk(values, n, _round_keys(seed, epoch, n), np.zeros(1, dtype=np.int64), rounds)


def _check(seed: int, n: int) -> None:
    if not 1 <= n <= MAX_SAMPLES:
        raise DataError(f"cannot order {n} samples; the number of samples must be in [1, {MAX_SAMPLES}]")
    if not 0 <= seed < 1 << 64:
        raise DataError(f"seed {seed} is not in [0, 2**64)")


@lru_cache(maxsize=256)
def _round_keys(seed: int, epoch: int, n: int) -> NDArray[np.uint64]:
    """uint64 [rounds, 1]."""
    message = _TAG + b"".join(value.to_bytes(8, "little") for value in (seed, epoch, n))
    keys = np.frombuffer(shake_128(message).digest(8 * _ROUNDS), dtype="<u8")
    return keys.astype(np.uint64).reshape(_ROUNDS, 1)


def _walk(
    positions: NDArray[np.int64],
    n: int,
    keys: NDArray[np.uint64],
    which: NDArray[np.int64],
    rounds: range = range(_ROUNDS),
) -> NDArray[np.int64]:
    """Maps positions [K] with the keys' columns `which` ([K], or [1] for all) until every result is below n."""
    num_bits = (n - 1).bit_length()
    ids = _feistel(positions.astype(np.uint64), num_bits, keys[:, which], rounds)
    outside = np.flatnonzero(ids >= n)
    while outside.size:  # ends: a permutation's cycle through a position below n comes back below n
        columns = which if which.size == 1 else which[outside]
        ids[outside] = _feistel(ids[outside], num_bits, keys[:, columns], rounds)
        outside = outside[ids[outside] >= n]
    return ids.astype(np.int64)


def _feistel(values: NDArray[np.uint64], num_bits: int, keys: NDArray[np.uint64], rounds: range) -> NDArray[np.uint64]:
    """A bijection of [0, 2**num_bits): each round changes one part by a function of the other one alone.

    Args:
        values: uint64 [K].
        num_bits: bits of the domain.
        keys: uint64 [rounds, K], or [rounds, 1] for one key for all values.
        rounds: the rounds in order; the reverse order gives the inverse, because each round is its own inverse.
    """
    num_low = (num_bits + 1) // 2
    low_mask = np.uint64((1 << num_low) - 1)
    high_mask = np.uint64((1 << (num_bits - num_low)) - 1)
    low, high = values & low_mask, values >> np.uint64(num_low)
    for i in rounds:
        if i % 2:
            high = high ^ (mix(low, keys[i]) & high_mask)
        else:
            low = low ^ (mix(high, keys[i]) & low_mask)
    return (high << np.uint64(num_low)) | low


def mix(values: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea & Flood 2014) of values + key, modulo 2**64.

    Args:
        values: uint64, any shape.
        key: uint64, a shape that fits; not a scalar, for which NumPy would warn of the overflow.
    """
    z = values + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(SPLITMIX64_FACTORS[0])
    z = (z ^ (z >> np.uint64(27))) * np.uint64(SPLITMIX64_FACTORS[1])
    return z ^ (z >> np.uint64(31))
