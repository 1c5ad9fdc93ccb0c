"""Reads YAML into pydantic specs. Independent of any particular spec."""

import inspect
import json
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from maas_ray.display import masked
from maas_ray.errors import SpecError
from maas_ray.foreign.documents import MAX_DEPTH, Malformed, plain_copy, read_yaml
from maas_ray.foreign.files import Unreadable, read_file
from maas_ray.suggestions import did_you_mean

MAX_SPEC_BYTES = 1 << 20
MAX_SHOWN = 20
"""Largest number of errors of one spec that a message lists."""
MAX_SHOWN_CHARS = 200
"""Largest number of characters of a value or a name in a message."""


class Spec(BaseModel):
    """Base class of specs: frozen, refuses unknown keys; field docstrings become JSON Schema descriptions."""

    # A value may contain a password (in a URL), and errors and representations reach logs.
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        hide_input_in_errors=True,
    )

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, value if isinstance(value, BaseModel) else masked(value)

    def digest(self) -> str:
        """Hex sha256 of the canonical JSON of all fields, including defaults."""
        return sha256(canonical_json(self.model_dump(mode="json"))).hexdigest()


S = TypeVar("S", bound=Spec)


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values have equal bytes, from which digests are computed.

    Raises:
        ValueError: a float is NaN or infinite (JSON has no such value).
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def load_spec(kind: type[S], path: str | Path, overrides: Iterable[str] = ()) -> S:
    """Reads a YAML file, applies `a.b=c` overrides and validates the result.

    Args:
        kind: the spec class.
        path: the YAML file.
        overrides: assignments such as `optimizer.lr=0.1`; the value is parsed as YAML.

    Raises:
        SpecError: unreadable file, malformed YAML, unknown key (with the nearest valid key) or invalid value.
    """
    return parse_spec(kind, read_document(path), overrides, source=str(path))


def read_document(path: str | Path) -> Any:
    """The parsed content of a YAML file, not validated. Raises `SpecError`: unreadable, too large or malformed."""
    try:
        return read_yaml(read_file(path, MAX_SPEC_BYTES).decode())
    except FileNotFoundError as error:
        raise SpecError(f"cannot read the spec {path}: {error.strerror}; give the path of a YAML file") from error
    except Unreadable as error:
        raise SpecError(f"the spec {path} {error}") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"the spec {path} is not UTF-8: {error}") from error
    except Malformed as error:
        raise SpecError(f"the spec {path} {error}") from error


def parse_spec(kind: type[S], document: Any, overrides: Iterable[str] = (), source: str = "spec") -> S:
    """Validates a parsed document; see `load_spec`."""
    if not isinstance(document, Mapping):
        raise SpecError(f"{source}: expected a mapping of fields of {kind.__name__}, got {type(document).__name__}")
    try:
        fields = plain_copy(document)
    except Malformed as error:
        raise SpecError(f"{source} {error}") from error
    for override in overrides:
        _assign(fields, override)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        found = error.errors()
        lines = [_explain(kind, source, detail) for detail in found[:MAX_SHOWN]]
        if len(found) > MAX_SHOWN:
            lines.append(f"{source}: {len(found) - MAX_SHOWN} more errors")
        raise SpecError("\n".join(lines)) from None


def _assign(fields: dict[str, Any], override: str) -> None:
    path, separator, value = override.partition("=")
    if not separator or not path:
        raise SpecError(f"--set {_short(override)} is not an assignment such as --set optimizer.lr=0.1")
    try:
        assign(fields, path, read_yaml(value))
    except Malformed as error:
        raise SpecError(f"--set {_short(override)}: the value {error}") from error


def assign(fields: dict[str, Any], path: str, value: Any) -> None:
    """Sets the value at `a.b.c` in a document; an item of a list is `a.0.c` or, by its `name`, `a.main.c`.

    Raises:
        SpecError: a parent is a scalar value, or a list has no such item.
    """
    *parents, last = path.split(".")
    if len(parents) >= MAX_DEPTH:
        raise SpecError(f"cannot set {_short(path)}: the path has more than {MAX_DEPTH} parts")
    place: Any = fields
    for parent in parents:
        if isinstance(place, list):
            place = place[_item(place, parent, path)]
        elif isinstance(place, dict):
            place = place.setdefault(parent, {})
        if not isinstance(place, dict | list):
            raise SpecError(f"cannot set {_short(path)}: {_short(parent)} is a value, not a section")
    if isinstance(place, list):
        place[_item(place, last, path)] = value
    else:
        place[last] = value


def _item(items: list[Any], part: str, path: str) -> int:
    """The index of the list item that `part` of a path selects."""
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    known = ", ".join(map(str, [*range(len(items)), *filter(None, names)][:MAX_SHOWN])) or "none, the list is empty"
    raise SpecError(f"cannot set {_short(path)}: no item {_short(part)} in the list; items: {known}")


def _explain(kind: type[Spec], source: str, detail: ErrorDetails) -> str:
    location = [str(part) for part in detail["loc"]]
    where = _short(".".join(location) or kind.__name__, str)
    if detail["type"] == "extra_forbidden":
        known = sorted(_names_beside(kind, location))
        hint = did_you_mean(location[-1], known, f"known keys: {', '.join(known)}")
        return f"{source}: unknown key '{where}'; {hint}"
    given = detail.get("input")
    shown = "" if isinstance(given, Mapping | list) or detail["type"] == "missing" else f" (got {_short(given)})"
    return f"{source}: {where}: {detail['msg']}{shown}"


def _short(value: Any, show: Callable[[Any], str] = repr) -> str:
    text = show(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}…"


def _names_beside(kind: type[Spec], location: list[str]) -> set[str]:
    """The valid keys at the position of an unknown key, including those of union branches and list items."""
    kinds = {kind}
    for part in location[:-1]:
        found = {
            model
            for candidate in kinds
            if part in candidate.model_fields
            for model in _models_in(candidate.model_fields[part].annotation)
        }
        named = {candidate for candidate in kinds if candidate.__name__ == part}
        kinds = found or named or kinds
    return {name for candidate in kinds for name in candidate.model_fields}


def _models_in(annotation: Any) -> Iterator[type[Spec]]:
    if inspect.isclass(annotation) and issubclass(annotation, Spec):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)
