"""Splits that depend on the values of a column: by stratum, by group, in order. Independent of how rows are read.

The values of all rows are counted first, in any number of blocks of rows (`count_keys`); a rule is made of the counts,
and then gives every block its rows' splits. So a table in memory and one that is read in tasks have the same split.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from maas_ray.data.loading.order import find_positions
from maas_ray.data.sources.text import to_text
from maas_ray.data.spec.split import SPLITS, SplitSpec
from maas_ray.data.table.order_rule import OrderRule
from maas_ray.errors import DataError

MAX_STRATA = 1000
TRAIN, VALIDATION, TEST = (SPLITS.index(name) for name in ("train", "validation", "test"))
_SPLIT_EPOCH = (1 << 64) - 1
"""The split uses a permutation that no training run reaches, so the two are unrelated even with the same seed."""


class SplitRule(Protocol):
    """Gives rows their splits."""

    def assign(self, keys: pa.Array, before: Mapping[str, int]) -> NDArray[np.int8]:
        """The split of each row of a block, as an index in `SPLITS` or `UNUSED`.

        Args:
            keys: values of the column, see `split_keys`.
            before: number of rows with each value in earlier blocks.
        """
        ...


def split_keys(name: str, column: pa.ChunkedArray) -> pa.Array:
    """The values of a column as text, the same in any block of its rows; "" is missing.

    Raises:
        DataError: the column's type has no text.
    """
    if pa.types.is_temporal(column.type) and not pa.types.is_duration(column.type):
        kind = pa.timestamp("us", tz=getattr(column.type, "tz", None))
        column = pc.cast(column, kind, safe=False).cast(pa.int64())
    return to_text(name, column, is_whole=False)


def count_keys(keys: pa.Array) -> Counter[str]:
    """The number of rows with each value."""
    counted = pc.value_counts(keys)
    return Counter(dict(zip(counted.field("values").to_pylist(), counted.field("counts").to_pylist(), strict=True)))


def make_rule(spec: SplitSpec, name: str, counts: Mapping[str, int]) -> SplitRule:
    """The rule of a split by the values of a column.

    Args:
        spec: the split.
        name: name of the column.
        counts: number of rows with each value, over the whole data set.

    Raises:
        DataError: the values do not allow this split.
    """
    if spec.stratify:
        return StratifiedRule.of(spec, name, counts)
    return GroupRule.of(spec, name, counts) if spec.group is not None else OrderRule.of(spec, name, counts)


def hold_out(
    places: NDArray[np.int64], num_test: int, num_validation: int, fold: tuple[int, int] | None = None, offset: int = 0
) -> NDArray[np.int8]:
    """The splits of rows at `places` of a shuffled sequence.

    Args:
        places: int64 [N].
        num_test: rows of the test split; unused with a fold.
        num_validation: rows of the validation split.
        fold: index and number of folds; the row at place p is in fold (p + offset) % number.
        offset: see `fold`.

    Returns:
        int8 [N], indices in `SPLITS`.
    """
    if fold is None:
        is_test, rank = places < num_test, places - num_test
    else:
        index, of = fold
        is_test = (places + offset) % of == index
        rank = places - (_count_fold(places + offset, index, of) - _count_fold(np.int64(offset), index, of))
    return np.select([is_test, rank < num_validation], [TEST, VALIDATION], TRAIN).astype(np.int8)


def _count_fold(end: Any, index: int, of: int) -> Any:
    """The number of integers in [0, end) that are `index` modulo `of`."""
    return (end - index + of - 1) // of


def fold_size(start: int, stop: int, index: int, of: int) -> int:
    """The number of integers in [start, stop) that are `index` modulo `of`."""
    return int(_count_fold(stop, index, of) - _count_fold(start, index, of))


@dataclass(frozen=True)
class StratifiedRule:
    """Every stratum has the same share of each split, as far as whole rows allow."""

    seed: int
    fold: tuple[int, int] | None
    strata: Mapping[str, tuple[int, int, int, int]]
    """By value: rows, test rows, validation rows, and the rows of the strata before it."""

    @classmethod
    def of(cls, spec: SplitSpec, name: str, counts: Mapping[str, int]) -> "StratifiedRule":
        """See `make_rule`."""
        if len(counts) > MAX_STRATA:
            raise DataError(
                f"data.split.stratify: {name!r} has {len(counts)} values; the limit is {MAX_STRATA}; stratify by a "
                "column with few values, such as a class"
            )
        values = sorted(counts)
        sizes = [counts[value] for value in values]
        offsets = np.cumsum([0, *sizes])[:-1].tolist()
        fold = (spec.fold.index, spec.fold.of) if spec.fold is not None else None
        if fold is None:
            tests = _shares(sizes, spec.test, [size - 1 for size in sizes])
        else:
            tests = [fold_size(start, start + size, *fold) for start, size in zip(offsets, sizes, strict=True)]
        rest = [max(0, size - test - 1) for size, test in zip(sizes, tests, strict=True)]
        validations = _shares(sizes, spec.validation, rest)
        wanted = {
            "test": (spec.test if fold is None else 1.0, sum(tests)),
            "validation": (spec.validation, sum(validations)),
        }
        for split, (fraction, number) in wanted.items():
            if fraction and not number:
                raise DataError(
                    f"{sum(sizes)} rows with {len(values)} values of {name!r} are too few for a stratified {split} "
                    f"split; add rows, or change data.split"
                )
        return cls(
            spec.seed, fold, dict(zip(values, zip(sizes, tests, validations, offsets, strict=True), strict=True))
        )

    def assign(self, keys: pa.Array, before: Mapping[str, int]) -> NDArray[np.int8]:
        result = np.full(len(keys), TRAIN, dtype=np.int8)
        encoded = pc.dictionary_encode(keys)
        codes = encoded.indices.to_numpy(zero_copy_only=False)
        for code, value in enumerate(encoded.dictionary.to_pylist()):
            size, test, validation, offset = self.strata[value]
            rows = np.flatnonzero(codes == code)
            own = np.arange(before.get(value, 0), before.get(value, 0) + len(rows), dtype=np.int64)
            # Each stratum is shuffled by itself: another stratum's rows do not change it.
            seed = int.from_bytes(_digest(self.seed, value)[:8], "little")
            places = find_positions(seed, _SPLIT_EPOCH, size, own)
            result[rows] = hold_out(places, test, validation, self.fold, offset)
        return result


@dataclass(frozen=True)
class GroupRule:
    """All rows of a group are in one split."""

    name: str
    splits: Mapping[str, int]
    """By group, its split."""

    @classmethod
    def of(cls, spec: SplitSpec, name: str, counts: Mapping[str, int]) -> "GroupRule":
        """See `make_rule`. Groups are taken in the order of a digest of (seed, value)."""
        if "" in counts:
            raise DataError(f"data.split.group: {counts['']} rows have no value in {name!r}; give every row a group")
        ordered = sorted(counts, key=lambda value: _digest(spec.seed, value))
        sizes = np.array([counts[value] for value in ordered], dtype=np.int64)
        splits = np.full(len(sizes), TRAIN, dtype=np.int8)
        num_splits = 1 + bool(spec.validation) + bool(spec.test or spec.fold)
        needed = max(num_splits, spec.fold.of if spec.fold is not None else 0)
        if len(sizes) < needed:
            raise DataError(
                f"data.split.group: {name!r} has {len(sizes)} groups, too few for {needed} parts; choose another "
                "column, or change data.split"
            )
        if spec.fold is not None:
            splits[_deal(sizes, spec.fold.of) == spec.fold.index] = TEST
        elif spec.test:
            _fill(splits, sizes, TEST, spec.test, reserve=1 + bool(spec.validation))
        if spec.validation:
            _fill(splits, sizes, VALIDATION, spec.validation, reserve=1)
        if not (splits == TRAIN).any():
            raise DataError(
                f"data.split.group: none of the {len(sizes)} groups of {name!r} is left for training; choose another "
                "column, or change data.split"
            )
        return cls(name, dict(zip(ordered, splits.tolist(), strict=True)))

    def assign(self, keys: pa.Array, before: Mapping[str, int]) -> NDArray[np.int8]:
        encoded = pc.dictionary_encode(keys)
        table = np.array([self.splits[value] for value in encoded.dictionary.to_pylist()], dtype=np.int8)
        splits: NDArray[np.int8] = table[encoded.indices.to_numpy(zero_copy_only=False)]
        return splits


def refuse_leak(name: str, keys: pa.Array, assigned: NDArray[np.int8]) -> None:
    """Rejects a split in which a group is in several splits.

    Args:
        name: name of the group column.
        keys: the groups, see `split_keys`.
        assigned: index of each row's split.

    Raises:
        DataError: the message names a group and its splits.
    """
    masks: dict[str, int] = {}
    for code in range(len(SPLITS)):
        for group in pc.unique(keys.filter(pa.array(assigned == code))).to_pylist():
            masks[group] = masks.get(group, 0) | 1 << code
    refuse_leaks(name, masks)


def refuse_leaks(name: str, masks: Mapping[str, int]) -> None:
    """As `refuse_leak`, from the splits of each group, as the bits of their indices in `SPLITS`."""
    leaking = sorted(group for group, mask in masks.items() if mask.bit_count() > 1)
    if leaking:
        mask = masks[leaking[0]]
        named = " and ".join(split for code, split in enumerate(SPLITS) if mask >> code & 1)
        raise DataError(
            f"data.split: {len(leaking)} of {len(masks)} groups of {name!r} are in several splits, such as "
            f"{leaking[0]!r} in {named}; correct the split column, or remove it to split by the group alone"
        )


def _digest(seed: int, value: str) -> bytes:
    return sha256(f"maas-ray split 1/{seed}/{value}".encode()).digest()


def _shares(sizes: Sequence[int], fraction: float, limits: Sequence[int]) -> list[int]:
    """Whole shares of `sizes` with the rounded total, by largest remainder; each at most its limit."""
    exact = [size * fraction for size in sizes]
    shares = [min(int(value + 1e-9), limit) for value, limit in zip(exact, limits, strict=True)]
    left = round(sum(sizes) * fraction) - sum(shares)
    by_remainder = sorted(range(len(sizes)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder:
        if left > 0 and shares[i] < limits[i] and shares[i] < exact[i]:
            shares[i] += 1
            left -= 1
    return shares


def _fill(splits: NDArray[np.int8], sizes: NDArray[np.int64], code: int, fraction: float, reserve: int) -> None:
    """Moves groups from the training split to a held-out split until it has about its fraction of the rows.

    Args:
        splits: the split of each group.
        sizes: the rows of each group.
        code: the held-out split.
        fraction: its fraction of all rows.
        reserve: number of groups that remain in any case.
    """
    left = round(int(sizes.sum()) * fraction)
    free = np.flatnonzero(splits == TRAIN)
    num_free = len(free)
    for place in free:
        if sizes[place] <= left and num_free > reserve:
            splits[place] = code
            left -= int(sizes[place])
            num_free -= 1
    # One more group, if that is nearer to the fraction than too few rows; and never none.
    free = np.flatnonzero(splits == TRAIN)
    if num_free > reserve and left:
        nearest = int(free[np.argmin(np.abs(sizes[free] - left))])
        if abs(int(sizes[nearest]) - left) < left or not (splits == code).any():
            splits[nearest] = code


def _deal(sizes: NDArray[np.int64], of: int) -> NDArray[np.int64]:
    """A fold for every group: the largest group first, each to the fold with the fewest rows."""
    folds = np.zeros(len(sizes), dtype=np.int64)
    rows = np.zeros(of, dtype=np.int64)
    for place in np.argsort(-sizes, kind="stable"):
        folds[place] = np.argmin(rows)
        rows[folds[place]] += sizes[place]
    return folds
