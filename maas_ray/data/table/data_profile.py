"""Describes a prepared data set: what was read, dropped and converted, and how the kind of each column was decided.

Stored with the data set, but not part of its digest: the same rows and features are the same data set.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from maas_ray.data.sources.cast import Cast
from maas_ray.data.sources.number_text import named
from maas_ray.data.spec.data import DataSpec
from maas_ray.data.spec.features import CategoricalColumn, Features
from maas_ray.data.table.column_statistics import Statistics

_NEARLY_UNIQUE = 0.1
"""Share of distinct categories among the training rows above which a column is noted."""
_FEW = 20
_RARE = 0.05
"""Share of the training rows below which a class is noted."""
MAX_LINES = 12


def build_profile(
    spec: DataSpec,
    report: Mapping[str, Any],
    casts: Mapping[str, Cast],
    statistics: Mapping[str, Statistics],
    features: Features,
    class_rows: Mapping[str, int],
    target_examples: Sequence[str] = (),
    left_out: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The profile of a data set as plain JSON.

    Args:
        spec: the data spec.
        report: see `prepare`.
        casts: by feature, its cast.
        statistics: by feature, its statistics over the training split.
        features: the fitted features.
        class_rows: training rows of each class; empty without classes.
        target_examples: some values of the target that are not convertible.
        left_out: columns and files that are not read, and why.
    """
    columns = {}
    for column in features.columns:
        cast, found, counts = casts[column.name], statistics[column.name], report["columns"][column.name]
        about: dict[str, Any] = {"kind": cast.kind, "reason": cast.reason, **counts}
        if isinstance(column, CategoricalColumn):
            about["categories"] = len(column.categories)
        about["examples"] = list(cast.unconvertible)
        about["notes"] = _notes(cast, found, about.get("categories"))
        columns[column.name] = about
    target = {"name": spec.target, **report["target"], "examples": list(target_examples), "classes": dict(class_rows)}
    return {
        "rows_read": report["rows_read"],
        "rows_dropped": dict(report["rows_dropped"]),
        "columns": columns,
        "target": target,
        "left_out": {**dict.fromkeys(spec.cleaning.drop, "cleaning.drop"), **(left_out or {})},
    }


def data_lines(profile: Mapping[str, Any] | None, report: Mapping[str, Any]) -> list[str]:
    """The profile as at most `MAX_LINES` lines; without one, the counts of a data set of texts."""
    if profile is not None:
        lines = profile_lines(profile)
        more = f"and {len(lines) - MAX_LINES + 1} more lines in report.json"
        return lines if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 1], more]
    dropped = report.get("rows_dropped", {})
    cut = f", {report['texts_cut']} texts cut" if report.get("texts_cut") else ""
    return [f"{report['rows_read']} rows read, {sum(dropped.values())} dropped{cut}"] if dropped else []


def profile_lines(profile: Mapping[str, Any]) -> list[str]:
    """The profile as short lines: counts, and everything that was dropped, converted or needs attention."""
    target, dropped = profile["target"], profile["rows_dropped"]
    lines = [_rows_line(profile["rows_read"], dropped, target)]
    for name, about in profile["columns"].items():
        parts = []
        if about["unconvertible"]:
            parts.append(f"{about['unconvertible']} values not convertible, such as {named(about['examples'])}")
        if about["missing"]:
            parts.append(f"{about['missing']} values missing")
        is_told = about["kind"] == "date" or (
            about["kind"] == "categorical" and about["reason"] not in ("cast: category", "the values are text")
        )
        if about["notes"] or parts or is_told:
            kind = f"{about['kind']} ({about['reason']})" if about["reason"] else about["kind"]
            lines.append(f"column {name}: " + "; ".join([kind, *parts, *about["notes"]]))
    lines += [f"left out {name or 'a column without a name'}: {why}" for name, why in profile["left_out"].items()]
    lines += _class_lines(target["classes"])
    return lines


def _rows_line(num_rows: int, dropped: Mapping[str, int], target: Mapping[str, Any]) -> str:
    reasons = []
    if target["missing"]:
        reasons.append(f"{target['missing']} without a target")
    if target["unconvertible"]:
        such = f", such as {named(target['examples'])}" if target["examples"] else ""
        reasons.append(f"{target['unconvertible']} whose target is not a number{such}")
    if dropped["value_missing"]:
        reasons.append(f"{dropped['value_missing']} with a missing value")
    return f"{num_rows} rows read, {', '.join(reasons) if reasons else 'none'} dropped"


def _notes(cast: Cast, found: Statistics, num_categories: int | None) -> list[str]:
    notes = []
    if cast.is_counting:
        notes.append("counts the rows: an identifier tells nothing about new rows")
    bounds = list(zip(found.minima, found.maxima, strict=True))
    is_constant = num_categories == 1 or (bool(bounds) and all(low == high for low, high in bounds))
    if is_constant:
        notes.append("constant in the training split")
    if num_categories is not None and num_categories > max(_FEW, _NEARLY_UNIQUE * found.num_present):
        notes.append(f"{num_categories} categories in {found.num_present} rows")
    if cast.offset is not None:
        notes.append(f"kept as float64 up to the difference from {cast.offset:.0f}")
    return notes


def _class_lines(classes: Mapping[str, int]) -> list[str]:
    total = sum(classes.values())
    if not total:
        return []
    by_rows = sorted(classes.items(), key=lambda pair: -pair[1])
    shown = [f"{name} {number / total:.1%}" for name, number in by_rows[:5]]
    more = f" and {len(by_rows) - 5} more" if len(by_rows) > 5 else ""
    rare = [name for name, number in by_rows if number < _RARE * total]
    lines = [f"classes of {total} training rows: {', '.join(shown)}{more}"]
    if rare:
        lines.append(f"{len(rare)} classes have fewer than {_RARE:.0%} of the training rows, such as {rare[-1]}")
    return lines
