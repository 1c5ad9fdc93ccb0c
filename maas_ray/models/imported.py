"""Builds any nn.Module by import path, and any Keras model on torch.

Runs the user's code, and converts every exception in it into one clear error.
"""

import importlib
import inspect
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from maas_ray.errors import ModelError
from maas_ray.models.keras_net import build_keras, is_keras
from maas_ray.models.named_inputs import refuse_arguments, resolve_inputs, with_named_inputs
from maas_ray.row import Row
from maas_ray.suggestions import did_you_mean


def build_imported(
    path: str,
    params: Mapping[str, Any],
    row: Row,
    num_outputs: int,
    *,
    per_token: bool = False,
    inputs: Mapping[str, str | Sequence[str]] | None = None,
) -> nn.Module:
    """Imports a class and constructs it.

    Args:
        path: `package.module:Class`.
        params: arguments of the constructor.
        row: its shape is passed as `input_shape` if the constructor has this parameter and `params` does not set it;
            likewise its `vocab_size`, which is None for rows of values, its `columns` and its `cardinalities`.
        num_outputs: passed as `num_outputs` likewise.
        per_token: passed as `per_token` likewise.
        inputs: see `resolve_inputs`; its shapes and columns are passed as `input_shapes` and `input_columns` likewise.
            None: forward takes the row.

    Raises:
        ModelError: the class cannot be imported, is not an nn.Module, or does not accept the parameters.
    """
    kind = import_class(path)
    arguments_of = resolve_inputs(path, inputs, row) if inputs else []
    if inputs:
        if is_keras(kind):
            raise ModelError(f"model.inputs: the Keras model {path} takes the row as its only argument; remove inputs")
        refuse_arguments(path, kind, list(inputs))
    accepted = inspect.signature(kind).parameters
    named = {
        name for name, given in accepted.items() if given.kind in (given.POSITIONAL_OR_KEYWORD, given.KEYWORD_ONLY)
    }
    offered = {
        "input_shape": row.shape,
        "num_outputs": num_outputs,
        "vocab_size": row.vocab_size,
        "per_token": per_token,
        "columns": row.columns,
        "cardinalities": row.cardinalities,
        "input_shapes": {one.name: one.shape for one in arguments_of},
        "input_columns": {one.name: one.columns for one in arguments_of},
    }
    arguments = {name: value for name, value in offered.items() if name in named} | dict(params)
    if not any(given.kind is given.VAR_KEYWORD for given in accepted.values()):
        _refuse_unknown(path, set(params), named)
    required = {name for name in named if accepted[name].default is inspect.Parameter.empty}
    if missing := sorted(required - arguments.keys()):
        raise ModelError(f"the model {path} needs the parameters {', '.join(missing)}; set them in model.params")
    try:
        if is_keras(kind):
            return build_keras(kind, arguments, row)
        return (with_named_inputs(kind, arguments_of) if arguments_of else kind)(**arguments)
    except Exception as error:  # the user's code may raise anything
        shown = ", ".join(f"{name}={value!r}" for name, value in sorted(arguments.items()))
        raise ModelError(
            f"the model {path} could not be built with {shown}: {type(error).__name__}: {error}"
        ) from error


def import_class(path: str) -> type[nn.Module]:
    """The class at `package.module:Class`.

    Raises:
        ModelError: it cannot be imported, or is not an nn.Module.
    """
    os.environ.setdefault("KERAS_BACKEND", "torch")  # Keras reads it once, and its own default is TensorFlow
    module_name, _, class_name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's code may raise anything
        raise ModelError(
            f"the model {path} cannot be imported on {platform.node()}: {type(error).__name__}: {error}; install the "
            "package on every node, or have it in the working directory (or in `maas-ray --app-dir DIR`, or send it "
            "with a job)"
        ) from error
    found = getattr(module, class_name, None)
    if found is None:
        classes = sorted(name for name, value in vars(module).items() if _is_module_class(value))
        hint = did_you_mean(class_name, classes, f"its models: {', '.join(classes) or 'none'}")
        raise ModelError(f"the model {path} cannot be imported: {module_name} has no {class_name!r}; {hint}")
    if not _is_module_class(found):
        raise ModelError(
            f"the model {path} is {found!r}, not a subclass of torch.nn.Module (Keras models are with "
            "KERAS_BACKEND=torch)"
        )
    kind: type[nn.Module] = found
    return kind


def _is_module_class(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, nn.Module)


def _refuse_unknown(path: str, given: set[str], named: set[str]) -> None:
    for name in sorted(given - named):
        hint = did_you_mean(name, sorted(named), f"its parameters: {', '.join(sorted(named)) or 'none'}")
        raise ModelError(f"the model {path} has no parameter {name!r}; {hint}")
