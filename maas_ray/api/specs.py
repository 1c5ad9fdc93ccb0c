"""Reads the spec arguments of the API: a spec, a mapping of fields, or the path of a YAML file, with overrides."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from maas_ray.spec import Spec, assign, parse_spec, read_document

S = TypeVar("S", bound=Spec)


def read_spec(kind: type[S], given: Any, overrides: Mapping[str, Any] | None) -> S:
    """Validates a spec.

    Args:
        kind: class of the spec.
        given: a spec of this kind, a mapping of its fields, or the path of a YAML file.
        overrides: values by field path, such as `{"optimizer.lr": 0.1}`.

    Raises:
        SpecError: unreadable file, unknown key (with the nearest valid key) or invalid value.
    """
    source = "spec"
    if isinstance(given, kind):
        if not overrides:
            return given
        document: Any = given.model_dump(mode="json", exclude_unset=True)
    elif isinstance(given, str | Path):
        document, source = read_document(given), str(given)
    else:
        document = given
    if overrides and isinstance(document, Mapping):
        document = _copy(document)
        for path, value in overrides.items():
            assign(document, path, value)
    return parse_spec(kind, document, source=source)


def _copy(document: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _copy(value) if isinstance(value, Mapping) else value for name, value in document.items()}
