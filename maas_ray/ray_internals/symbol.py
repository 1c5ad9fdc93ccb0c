"""A private name of Ray as maas-ray uses it, and how another version of Ray can differ from that."""

import ast
import importlib
import inspect
import textwrap
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Symbol:
    """One private name of Ray."""

    module: str
    path: str
    """Path of the attribute in the module."""
    why: str
    parameters: tuple[str, ...] | None = None
    """All parameter names of its signature, in order; None: not compared."""
    has: tuple[str, ...] = ()
    """Private parameters that a public name must have."""
    fields: tuple[str, ...] = ()
    """Attributes that a class or its instances must have, including inherited ones."""
    kind: type | None = None
    """Type of a constant; None: not compared."""
    value: object = None
    """Value of a constant; None: not compared."""

    @property
    def name(self) -> str:
        """The qualified name."""
        return f"{self.module}.{self.path}"


@dataclass(frozen=True)
class Broken:
    """A name that has changed."""

    name: str
    problem: str
    why: str
    """Its use in maas-ray."""


def call(module: str, path: str, parameters: str, why: str) -> Symbol:
    """Describes a function that is called or replaced; `parameters` are separated by spaces."""
    return Symbol(module, path, why, parameters=tuple(parameters.split()))


def public(module: str, path: str, has: str, why: str) -> Symbol:
    """Describes a public name with private parameters that are used."""
    return Symbol(module, path, why, has=tuple(has.split()))


def holds(module: str, path: str, fields: str, why: str) -> Symbol:
    """Describes a class with fields that are used."""
    return Symbol(module, path, why, fields=tuple(fields.split()))


def there(module: str, path: str, why: str, kind: type | None = None, value: object = None) -> Symbol:
    """Describes a name that is imported or replaced."""
    return Symbol(module, path, why, kind=kind, value=value)


def problem_of(symbol: Symbol) -> str:
    """The difference of the installed version of Ray; empty if there is none. Imports the module of the symbol."""
    try:
        found = _find(symbol)
    except Exception as error:  # the import of another version can raise anything
        return f"cannot be imported: {type(error).__name__}: {error}"
    if found is _MISSING:
        return "does not exist"
    if symbol.kind is not None and not isinstance(found, symbol.kind):
        return f"is {type(found).__name__}, expected {symbol.kind.__name__}"
    if symbol.value is not None and found != symbol.value:
        return f"is {found!r}, expected {symbol.value!r}"
    if symbol.parameters is not None or symbol.has:
        try:
            named = inspect.signature(found).parameters
            # Ray adds it to the methods of every class that it makes an actor of while tracing is on.
            parameters = tuple(name for name in named if name != "_ray_trace_ctx")
        except (TypeError, ValueError) as error:
            return f"has no signature: {error}"
        if symbol.parameters is not None and parameters != symbol.parameters:
            return f"has parameters ({', '.join(parameters)}), expected ({', '.join(symbol.parameters)})"
        if lost := [name for name in symbol.has if name not in parameters]:
            return f"has no parameter {', '.join(lost)}"
    if lost := [name for name in symbol.fields if name not in _fields(found)]:
        return f"has no attribute {', '.join(lost)}"
    return ""


_MISSING = object()


def _find(symbol: Symbol) -> Any:
    found: Any = importlib.import_module(symbol.module)
    for part in symbol.path.split("."):
        found = getattr(found, part, _MISSING)
        if found is _MISSING:
            break
    return found


@cache
def _fields(found: type) -> set[str]:
    """Attributes of a class and its bases, including those that their code assigns to `self`."""
    names = {name for each in found.__mro__ for name in (*vars(each), *getattr(each, "__annotations__", ()))}
    for each in found.__mro__[:-1]:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(each)))
        except (OSError, TypeError):
            continue  # not written in Python
        names |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        }
    return names
