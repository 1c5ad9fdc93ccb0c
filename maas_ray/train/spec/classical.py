"""Which fields of a training spec mean something for a classical model. Knows no field's meaning."""

from typing import Any

from pydantic import BaseModel

USED: dict[str, tuple[str, ...] | None] = {
    "run": None,
    "model": ("name", "params"),
    "data": None,
    "seed": None,
    "callbacks": None,
    "workers": ("cpus", "max_restarts"),
    "storage": None,
}
"""The fields that count, and which of their own fields do (None: all)."""


def refuse_unused(spec: BaseModel, model: str) -> None:
    """Refuses what would be ignored: any other field that is not at its default.

    Args:
        spec: a TrainSpec.
        model: the classical model's name.

    Raises:
        ValueError: with the names of these fields.
    """
    given = [name for name in _changed(spec) if name not in USED]
    for name, counting in USED.items():
        if counting is not None:
            given += [f"{name}.{inner}" for inner in _changed(getattr(spec, name)) if inner not in counting]
    if given:
        raise ValueError(
            f"{', '.join(sorted(given))} would do nothing: {model} is fitted by scikit-learn in one task, with "
            "model.params, seed and workers.cpus alone; remove what is not of these"
        )


def _changed(spec: BaseModel) -> list[str]:
    """Names of the fields that are not at their default; a stored spec has all of them, so being set says nothing."""
    return [name for name, field in type(spec).model_fields.items() if getattr(spec, name) != _default(field)]


def _default(field: Any) -> Any:
    return field.get_default(call_default_factory=True)
