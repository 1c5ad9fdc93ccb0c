"""The tables of `maas-ray evaluate`: metrics, metrics of each class, and the confusion matrix of a few classes."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from maas_ray.console.output import facts, table

_MAX_MATRIX = 10
"""Most classes whose confusion matrix fits on a terminal."""
_MAX_ROWS = 50
"""Most classes in the table: those with the lowest F1."""


def class_views(title: str, metrics: Mapping[str, str], classes: Mapping[str, Any] | None) -> list[Table]:
    """The tables of an evaluation.

    Args:
        title: title of the first table.
        metrics: values of the metrics.
        classes: see `class_report` in train/evaluation/class_metrics.py; None: not a classifier.
    """
    if classes is None:
        return [facts(title, metrics)]
    shown = dict(metrics)
    if classes["positive_class"] is not None:
        shown["positive class"] = f"{classes['positive_class']} (data.positive_class)"
        shown["threshold"] = f"{classes['threshold']:.4g}"
    shown["calibration error"] = f"{classes['calibration']['expected_error']:.4g}"
    ordered = list(classes["classes"].items())
    name = "per class"
    if len(ordered) > _MAX_ROWS:
        name = f"the {_MAX_ROWS} of {len(ordered)} classes with the lowest f1 (--json shows all)"
        ordered = sorted(ordered, key=lambda pair: pair[1]["f1"])[:_MAX_ROWS]
    rows = [
        (label, *(f"{found[score]:.4f}" for score in ("precision", "recall", "f1")), found["support"])
        for label, found in ordered
    ]
    views = [facts(title, shown), table(name, ("class", "precision", "recall", "f1", "rows"), rows)]
    confusion = classes["confusion"]
    if confusion is not None and len(confusion["labels"]) <= _MAX_MATRIX:
        labels = confusion["labels"]
        matrix = [(label, *counts) for label, counts in zip(labels, confusion["rows"], strict=True)]
        views.append(table("confusion matrix", ("true \\ predicted", *labels), matrix))
    return views
