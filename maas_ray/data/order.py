"""The order of samples: a stateless permutation of [0, n) for every (seed, epoch). Knows neither data nor ranks.

Each position is mapped by a Feistel network on the smallest power of two that holds n, and mapped again while the
result is not below n (cycle walking: Black & Rogaway, "Ciphers with arbitrary finite domains", 2002). Integer
arithmetic only, so that the order is the same on every machine and for ever; a cursor is one integer.
"""

from functools import lru_cache
from hashlib import shake_128

import numpy as np
from numpy.typing import NDArray

from maas_ray.errors import DataError

MAX_SAMPLES = 1 << 40
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
    _check(seed, n)
    if not 0 <= epoch < 1 << 64:
        raise DataError(f"epoch {epoch} is not in [0, 2**64)")
    positions = np.asarray(positions, dtype=np.int64)
    if positions.size and not (int(positions.min()) >= 0 and int(positions.max()) < n):
        raise DataError(f"positions {int(positions.min())}..{int(positions.max())} are not all in [0, {n})")
    keys = _round_keys(seed, epoch, n)
    num_bits = (n - 1).bit_length()
    ids = _feistel(positions.astype(np.uint64), num_bits, keys)
    outside = np.flatnonzero(ids >= n)
    while outside.size:  # ends: a permutation's cycle through a position below n comes back below n
        ids[outside] = _feistel(ids[outside], num_bits, keys)
        outside = outside[ids[outside] >= n]
    return ids.astype(np.int64)


def sample_ids(seed: int, n: int, start: int, count: int) -> NDArray[np.int64]:
    """The ids at global positions [start, start + count) of the endless stream of epochs.

    Position p lies in epoch p // n, so each epoch holds every sample exactly once.

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
        raise DataError(f"positions from {start}, {count} of them: both must not be negative")
    pieces = []
    position, stop = start, start + count
    while position < stop:
        epoch, offset = divmod(position, n)
        length = min(n - offset, stop - position)
        pieces.append(permute(seed, epoch, n, np.arange(offset, offset + length, dtype=np.int64)))
        position += length
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)


def _check(seed: int, n: int) -> None:
    if not 1 <= n <= MAX_SAMPLES:
        raise DataError(f"{n} samples cannot be ordered; the number must be in [1, {MAX_SAMPLES}]")
    if not 0 <= seed < 1 << 64:
        raise DataError(f"seed {seed} is not in [0, 2**64)")


@lru_cache(maxsize=256)
def _round_keys(seed: int, epoch: int, n: int) -> tuple[int, ...]:
    message = _TAG + b"".join(value.to_bytes(8, "little") for value in (seed, epoch, n))
    digest = shake_128(message).digest(8 * _ROUNDS)
    return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8))


def _feistel(values: NDArray[np.uint64], num_bits: int, keys: tuple[int, ...]) -> NDArray[np.uint64]:
    """A bijection of [0, 2**num_bits): each round changes one part by a function of the other one alone."""
    num_low = (num_bits + 1) // 2
    low_mask = np.uint64((1 << num_low) - 1)
    high_mask = np.uint64((1 << (num_bits - num_low)) - 1)
    low, high = values & low_mask, values >> np.uint64(num_low)
    for i, key in enumerate(keys):
        if i % 2:
            high = high ^ (_mix(low, key) & high_mask)
        else:
            low = low ^ (_mix(high, key) & low_mask)
    return (high << np.uint64(num_low)) | low


def _mix(values: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea & Flood 2014) of values + key, modulo 2**64."""
    z = values + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
