"""Counts the values that decide the split, and the classes, of a large table, before its statistics are gathered.

One pass over two columns, and only for specs that need it; the result depends on the files alone.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from maas_ray.data.large.survey import Kinds
from maas_ray.data.large.tasks import run_tasks
from maas_ray.data.large.units import UnitSource, read_blocks
from maas_ray.data.spec.data import DataSpec
from maas_ray.data.spec.split import SPLITS
from maas_ray.data.table.rare_classes import find_rare
from maas_ray.data.table.split import assign_rows
from maas_ray.data.table.split_rules import SplitRule, count_keys, make_rule, refuse_leaks, split_keys
from maas_ray.data.table.target import cast_part_of_target
from maas_ray.errors import DataError

MAX_KEYS = 1 << 20
"""Maximum number of distinct values of the column that decides the split."""


@dataclass(frozen=True)
class KeyedSplit:
    """How the rows of a large table are split by a column."""

    rule: SplitRule | None = None
    """None: by the row's index, or by the column that names the split."""
    before: tuple[Mapping[str, int], ...] = ()
    """By unit: the number of rows with each value in earlier units; empty: the rule does not need it."""
    rare: frozenset[str] = frozenset()
    """Classes that are merged."""


def count_split(source: UnitSource, kinds: Kinds, cpu_timeout_s: float) -> KeyedSplit:
    """Reads the columns that decide splits and classes; reads nothing if no field of the spec needs them.

    Raises:
        DataError: the values do not allow the split, or have too many distinct values.
        ClusterError: a task could not run.
    """
    spec = source.spec
    key = spec.split.key(spec.target)
    if key is None and spec.rare_classes is None:
        return KeyedSplit()
    units: list[Counter[str]] = [Counter() for _ in source.units]
    total: Counter[str] = Counter()
    classes: Counter[str] = Counter()
    masks: Counter[str] = Counter()
    arguments = {"source": source, "is_whole_target": kinds.is_whole_target}
    answers = run_tasks(
        count_unit_keys, len(source.units), arguments, "the split of the rows", cpu_timeout_s, source.name_of
    )
    for number, answer in answers:
        units[number] = Counter(answer["keys"]) if spec.split.stratify else Counter()
        total.update(answer["keys"])
        classes.update(answer["classes"])
        for group, mask in answer["masks"].items():
            masks[group] |= mask
        _refuse_many(spec, len(total) + len(masks))
    rare = find_rare(spec, classes)
    if key is None:
        return KeyedSplit(rare=rare)
    if spec.split.column is not None:
        refuse_leaks(key, masks)
        return KeyedSplit(rare=rare)
    before: list[Mapping[str, int]] = []
    if spec.split.stratify:
        seen: Counter[str] = Counter()
        for unit in units:
            before.append(dict(seen))
            seen.update(unit)
    return KeyedSplit(make_rule(spec.split, key, total), tuple(before), rare)


def count_unit_keys(number: int, source: UnitSource, is_whole_target: bool) -> dict[str, Any]:
    """The counts of one unit: `keys` by value, `classes` by class, `masks`: by group, the bits of its splits."""
    spec = source.spec
    key = spec.split.key(spec.target)
    keys: Counter[str] = Counter()
    classes: Counter[str] = Counter()
    masks: Counter[str] = Counter()
    for block in read_blocks(source, number):
        if key is not None:
            found = split_keys(key, block.column(key))
            if spec.split.column is None:
                keys.update(count_keys(found))
            else:
                assigned = assign_rows(spec.split, block.num_rows, block.column(spec.split.column))
                for code in range(len(SPLITS)):
                    for group in pc.unique(found.filter(pa.array(assigned == code))).to_pylist():
                        masks[group] |= 1 << code
            _refuse_many(spec, len(keys) + len(masks))
        if spec.rare_classes is not None:
            target = cast_part_of_target(
                spec.target, block.column(spec.target), spec.task, is_whole_target, spec.reader
            )
            classes.update(count_keys(target.values))
            _refuse_many(spec, len(classes))
    return {"keys": dict(keys), "classes": dict(classes), "masks": dict(masks)}


def _refuse_many(spec: DataSpec, number: int) -> None:
    if number > MAX_KEYS:
        raise DataError(
            f"the split of {spec.uri} depends on more than {MAX_KEYS} distinct values; use a coarser column, or write "
            "the split into a column and set data.split.column"
        )
