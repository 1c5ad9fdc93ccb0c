"""Builds a module from a model spec and checks that it fits the data. Independent of training and export."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maas_ray.errors import ModelError
from maas_ray.models.families.convnet import build_convnet
from maas_ray.models.families.decoder import build_decoder
from maas_ray.models.families.encoder import build_classifier, build_masked
from maas_ray.models.families.mlp import build_mlp
from maas_ray.models.families.resnet import build_resnet
from maas_ray.models.hugging_face.transformers_model import build_hugging_face, find_class
from maas_ray.models.imported import build_imported, import_class
from maas_ray.models.params import PREFIX, HuggingFaceSpec
from maas_ray.models.spec import PARAMS, ModelSpec
from maas_ray.models.weights import initialize
from maas_ray.row import Row
from maas_ray.spec import parse_spec

_PROBE_ROWS = 2


@dataclass(frozen=True)
class ModelFamily:
    """A built-in model: the functions that build it from its parameters, which are declared in `PARAMS`."""

    per_row: Callable[[Any, Row, int], nn.Module] | None = None
    """Builds a module with logits per row from parameters, row and number of outputs; None: not supported."""
    per_token: Callable[[Any, Row, int], nn.Module] | None = None
    """As `per_row`, with logits per token."""


FAMILIES: dict[str, ModelFamily] = {
    "mlp": ModelFamily(build_mlp),
    "convnet": ModelFamily(build_convnet),
    "resnet": ModelFamily(build_resnet),
    "encoder": ModelFamily(build_classifier, build_masked),
    "decoder": ModelFamily(per_token=build_decoder),
}


def build_model(spec: ModelSpec, row: Row, num_outputs: int, *, per_token: bool = False) -> nn.Module:
    """Builds and initializes a model, and checks with a forward pass on zeros that it fits the data.

    All random numbers come from torch's global generator: the same seed before the call gives the same weights.

    Args:
        spec: the model.
        row: one preprocessed row.
        num_outputs: logits per row, or per token.
        per_token: whether the model returns logits for each token.

    Returns:
        A module in training mode, from [N, *row.shape] (float32 values, or int64 token ids) to float32
        [N, num_outputs], or [N, T, num_outputs] per token.

    Raises:
        ModelError: the family does not return such logits, the class cannot be imported or built, does not accept such
            rows, or returns another shape.
    """
    if spec.is_classical:
        raise ModelError(
            f"{spec.name} is trained by scikit-learn and is not a torch module; use one of {', '.join(FAMILIES)}"
        )
    if spec.name in FAMILIES:
        model = _build_family(spec, row, num_outputs, per_token)
    elif spec.name.startswith(PREFIX):
        params = parse_spec(HuggingFaceSpec, spec.params, source=f"model {spec.name}")
        model = build_hugging_face(spec.name, params, row, num_outputs, per_token=per_token)
    else:
        model = build_imported(spec.name, spec.params, row, num_outputs, per_token=per_token, inputs=spec.inputs)
    _check_output(spec.name, model, row, num_outputs, per_token)
    initialize(model, spec.initialization)  # after the forward pass, which materializes lazy layers
    return model.train()


def _build_family(spec: ModelSpec, row: Row, num_outputs: int, per_token: bool) -> nn.Module:
    family = FAMILIES[spec.name]
    build = family.per_token if per_token else family.per_row
    if build is None:
        each = "token" if per_token else "row"
        able = [name for name, other in FAMILIES.items() if (other.per_token if per_token else other.per_row)]
        raise ModelError(
            f"{spec.name} does not return logits per {each}, which this task needs; use one of the models "
            f"{', '.join(able)}"
        )
    return build(parse_spec(PARAMS[spec.name], spec.params, source=f"model {spec.name}"), row, num_outputs)


def import_model(spec: ModelSpec) -> None:
    """Imports the module that building a model would import.

    Raises:
        ModelError: there is no such class.
    """
    if spec.name.startswith(PREFIX):
        find_class(spec.name)
    elif spec.name not in FAMILIES and not spec.is_classical:
        import_class(spec.name)


def is_imported(spec: ModelSpec) -> bool:
    """Whether the model is a user's own class."""
    return spec.name not in FAMILIES and not spec.is_classical and not spec.name.startswith(PREFIX)


def is_read(spec: ModelSpec) -> bool:
    """Whether the weights are read from a folder instead of initialized randomly."""
    return spec.name.startswith(PREFIX) and spec.params.get("path") is not None


def example_rows(row: Row, count: int = _PROBE_ROWS, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros [count, *row.shape] as example input: int64 token ids, else values of `dtype`."""
    return torch.zeros(count, *row.shape, dtype=torch.int64 if row.is_tokens else dtype)


def _check_output(name: str, model: nn.Module, row: Row, num_outputs: int, per_token: bool) -> None:
    fed = [_PROBE_ROWS, *row.shape]
    wanted = [*fed, num_outputs] if per_token else [_PROBE_ROWS, num_outputs]
    try:
        with torch.no_grad():
            logits = model.eval()(example_rows(row))
    except Exception as error:  # the user's code may raise anything
        rows = f"rows of {row.vocab_size} token ids" if row.is_tokens else "float32 rows"
        raise ModelError(
            f"the model {name} fails on {rows} of the shape {list(row.shape)}: {type(error).__name__}: {error}"
        ) from error
    each = "token" if per_token else "row"
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"the model {name} returns a {type(logits).__name__}; it must return one tensor of logits, "
            f"{'[N, T, K]' if per_token else '[N, K]'}"
        )
    if list(logits.shape) != wanted:
        raise ModelError(
            f"the model {name} maps {fed} to {list(logits.shape)}; the data needs {wanted}: {num_outputs} logit(s) per {each}"
        )
    if logits.dtype != torch.float32:
        raise ModelError(f"the model {name} returns logits of {logits.dtype}; they must be torch.float32")
