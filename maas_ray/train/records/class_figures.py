"""Draws the confusion matrix and the calibration of a classifier on axes of matplotlib."""

from typing import Any

_MAX_NUMBERS = 12
"""Most classes whose cells contain their numbers."""
_MAX_TICKS = 30
"""Most classes with a tick of their own."""
_MAX_NAME = 20


def draw_calibration(axes: Any, classes: dict[str, Any]) -> None:
    """Predicted probability against frequency, and the share of rows in each bin.

    Args:
        axes: axes of matplotlib.
        classes: see `class_report` in evaluation/class_metrics.py.
    """
    calibration = classes["calibration"]
    bins = [one for one in calibration["bins"] if one["rows"]]
    total = max(1, sum(one["rows"] for one in bins))
    axes.bar(
        [one["from"] for one in bins],
        [one["rows"] / total for one in bins],
        width=[one["to"] - one["from"] for one in bins],
        align="edge",
        alpha=0.25,
        label="share of the rows",
    )
    axes.plot([0, 1], [0, 1], linestyle="--", color="gray", label="perfect calibration")
    axes.plot([one["probability"] for one in bins], [one["frequency"] for one in bins], marker="o", label="measured")
    axes.set_title(f"calibration: expected error {calibration['expected_error']:.4f}", fontsize="medium")
    axes.set_xlabel(f"probability of {_name(calibration['of'])}")
    axes.set_ylabel("frequency")
    axes.legend()


def draw_confusion(axes: Any, classes: dict[str, Any]) -> None:
    """The confusion matrix, with the shares of each true class as colors."""
    confusion = classes["confusion"]
    if confusion is None:
        axes.axis("off")
        axes.text(0.5, 0.5, f"{len(classes['classes'])} classes: too many for a confusion matrix", ha="center")
        return
    labels, rows = [_name(label) for label in confusion["labels"]], confusion["rows"]
    shares = [[number / max(1, sum(row)) for number in row] for row in rows]
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axes.set_title(f"confusion matrix of validation, step {classes['step']}", fontsize="medium")
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    places = range(0, len(labels), -(-len(labels) // _MAX_TICKS))
    axes.set_xticks(list(places), [labels[place] for place in places], rotation=45 if len(labels) > 4 else 0)
    axes.set_yticks(list(places), [labels[place] for place in places])
    if len(labels) <= _MAX_NUMBERS:
        for i, row in enumerate(rows):
            for j, number in enumerate(row):
                color = "white" if shares[i][j] > 0.5 else "black"
                axes.text(j, i, str(number), ha="center", va="center", color=color)


def _name(label: str) -> str:
    """A label for matplotlib, in which `$` begins a formula."""
    short = label if len(label) <= _MAX_NAME else f"{label[: _MAX_NAME - 1]}…"
    return short.replace("$", r"\$")
