"""Imports the losses, metrics, optimizers and schedules that a spec names by import path.

Runs the user's code, and converts every exception in it into one `SpecError` with the field of the spec.
"""

import importlib
import inspect
import platform
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from maas_ray.errors import SpecError
from maas_ray.suggestions import did_you_mean


def import_object(path: str, field: str) -> Any:
    """The object at `package.module:name`.

    Args:
        path: the import path.
        field: field of the spec, for messages.

    Raises:
        SpecError: it cannot be imported; with the nearest name if the module has no such name.
    """
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's code may raise anything
        raise SpecError(
            f"{field}: {path} cannot be imported on {platform.node()}: {type(error).__name__}: {error}; its package must "
            "be installed, or be in the working directory (or in `maas-ray --app-dir DIR`), on every node"
        ) from error
    if not hasattr(module, name):
        public = sorted(other for other in vars(module) if not other.startswith("_"))
        hint = did_you_mean(name, public, "check its spelling")
        raise SpecError(f"{field}: {path} cannot be imported: {module_name} has no attribute {name!r}; {hint}")
    return getattr(module, name)


def construct(kind: Callable[..., Any], path: str, field: str, *given: Any, **params: Any) -> Any:
    """Calls a constructor with a user's parameters.

    Raises:
        SpecError: it raised; with the parameters.
    """
    try:
        return kind(*given, **params)
    except SpecError:
        raise
    except Exception as error:  # a user's code may raise anything
        shown = ", ".join(f"{key}={value!r}" for key, value in sorted(params.items()))
        raise SpecError(f"{field}: {path}({shown}) failed: {type(error).__name__}: {error}") from error


def import_callable(path: str, params: Mapping[str, Any], field: str, arguments: int) -> Callable[..., Any]:
    """A function with its further arguments bound, or an object of a class that can be called.

    Args:
        path: the import path of a function or a class.
        params: further arguments of the function, or arguments of the constructor.
        field: field of the spec, for messages.
        arguments: number of positional arguments of each call.

    Raises:
        SpecError: it cannot be imported, constructed or called with these arguments.
    """
    found = import_object(path, field)
    if inspect.isclass(found):
        called, bound = construct(found, path, field, **params), {}
    else:
        called, bound = found, dict(params)
    if not callable(called):
        raise SpecError(
            f"{field}: {path} is {found!r}, which cannot be called; name a function or a class with __call__"
        )
    try:
        inspect.signature(called).bind(*range(arguments), **bound)
    except ValueError:  # a function in C has no signature
        pass
    except TypeError as error:
        raise SpecError(
            f"{field}: {path} cannot be called with {arguments} arguments and the params "
            f"{', '.join(sorted(bound)) or 'none'}: {error}; its signature is {inspect.signature(called)}"
        ) from error
    return partial(called, **bound) if bound else called
