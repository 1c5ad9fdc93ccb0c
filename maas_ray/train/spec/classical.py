"""The fields of a training spec that a classical model uses. Independent of their meaning."""

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
"""The used fields, each with its used subfields (None: all)."""


def refuse_unused(spec: BaseModel, model: str) -> None:
    """Refuses every unused field that is not at its default, since it would be ignored.

    Args:
        spec: a TrainSpec.
        model: name of the classical model.

    Raises:
        ValueError: the message lists these fields.
    """
    given = [name for name in _changed(spec) if name not in USED]
    for name, counting in USED.items():
        if counting is not None:
            given += [f"{name}.{inner}" for inner in _changed(getattr(spec, name)) if inner not in counting]
    if given:
        raise ValueError(
            f"{', '.join(sorted(given))} would have no effect: {model} is fitted by scikit-learn in one task, which "
            "uses only model.params, seed and workers.cpus; remove the other fields"
        )


def _changed(spec: BaseModel) -> list[str]:
    """Names of the fields that are not at their default; in a stored spec all fields are set."""
    return [name for name, field in type(spec).model_fields.items() if getattr(spec, name) != _default(field)]


def _default(field: Any) -> Any:
    return field.get_default(call_default_factory=True)
