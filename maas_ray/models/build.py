"""From a model's name and parameters to a module that fits the data. Knows nothing of training or export."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from maas_ray.errors import ModelError, SpecError
from maas_ray.models.classical import CLASSICAL, parse_classical
from maas_ray.models.convnet import ConvnetSpec, build_convnet
from maas_ray.models.decoder import DecoderSpec, build_decoder
from maas_ray.models.encoder import EncoderSpec, build_classifier, build_masked
from maas_ray.models.hugging_face import PREFIX, HuggingFaceSpec, build_hugging_face
from maas_ray.models.imported import build_imported
from maas_ray.models.mlp import MlpSpec, build_mlp
from maas_ray.models.resnet import ResnetSpec, build_resnet
from maas_ray.models.row import Row
from maas_ray.models.weights import Initialization, initialize
from maas_ray.spec import Spec, parse_spec

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_PROBE_ROWS = 2


@dataclass(frozen=True)
class Family:
    """A model known by name: the spec of its parameters, and how it is built from them."""

    params: type[Spec]
    per_row: Callable[[Any, Row, int], nn.Module] | None = None
    """From the parameters, the row and the number of outputs to a module with scores per row; None: it gives none."""
    per_token: Callable[[Any, Row, int], nn.Module] | None = None
    """The same with scores per token."""


FAMILIES: dict[str, Family] = {
    "mlp": Family(MlpSpec, build_mlp),
    "convnet": Family(ConvnetSpec, build_convnet),
    "resnet": Family(ResnetSpec, build_resnet),
    "encoder": Family(EncoderSpec, build_classifier, build_masked),
    "decoder": Family(DecoderSpec, per_token=build_decoder),
}


class ModelSpec(Spec):
    """Which model, with which parameters."""

    name: str
    """A family (`mlp`, `convnet`, `resnet`, `encoder`, `decoder`), a model of scikit-learn's (`decision_tree`,
    `random_forest`, `gradient_boosting`, `svm`), a class of the package transformers (`hf:LlamaForCausalLM`), or the
    import path `package.module:Class` of any nn.Module. Such a class maps float32 [N, *input_shape] to [N, num_outputs];
    int64 codes [N, T] where the rows are tokens, and then, if the task is per token, to [N, T, num_outputs]. It is given
    `input_shape`, `num_outputs`, `vocab_size` and `per_token` if its constructor names them."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the family, or arguments of the class's constructor."""
    initialization: Initialization = "default"
    """How the weights are drawn; `default` leaves them as the layers draw them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        is_hugging_face = self.name.startswith(PREFIX)
        if self.name in FAMILIES or self.is_classical or is_hugging_face:
            try:
                if self.is_classical:
                    parse_classical(self.name, self.params)
                else:
                    params = HuggingFaceSpec if is_hugging_face else FAMILIES[self.name].params
                    parse_spec(params, self.params, source=f"model {self.name}")
            except SpecError as error:
                raise ValueError(str(error)) from None
        elif not _IMPORT_PATH.fullmatch(self.name):
            near = difflib.get_close_matches(self.name, CLASSICAL, n=1, cutoff=0.7)
            near = near or difflib.get_close_matches(self.name, FAMILIES, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"families: {', '.join([*FAMILIES, *CLASSICAL])}"
            raise ValueError(f"unknown model {self.name!r}; {hint} (or an import path 'package.module:Class')")
        return self

    @property
    def is_classical(self) -> bool:
        """Whether scikit-learn trains it, see `models/classical.py`; it is then no torch module."""
        return self.name in CLASSICAL


def build_model(spec: ModelSpec, row: Row, num_outputs: int, *, per_token: bool = False) -> nn.Module:
    """Builds and initializes a model, and proves with a run on zeros that it fits the data.

    All random draws come from torch's global generator: the same seed before the call gives the same weights.

    Args:
        spec: the model.
        row: one preprocessed row.
        num_outputs: scores per row, or per token.
        per_token: whether each token of a row has scores of its own.

    Returns:
        A module in training mode, from [N, *row.shape] (float32 values, or int64 codes of tokens) to float32
        [N, num_outputs], or [N, T, num_outputs] per token.

    Raises:
        ModelError: the family has no such scores, the class cannot be imported or built, cannot be fed with such rows,
            or gives another shape.
    """
    if spec.is_classical:
        raise ModelError(
            f"{spec.name} is trained by scikit-learn and is no torch module; here one of {', '.join(FAMILIES)}"
        )
    if spec.name in FAMILIES:
        model = _build_family(spec, row, num_outputs, per_token)
    elif spec.name.startswith(PREFIX):
        params = parse_spec(HuggingFaceSpec, spec.params, source=f"model {spec.name}")
        model = build_hugging_face(spec.name, params, row, num_outputs, per_token=per_token)
    else:
        model = build_imported(spec.name, spec.params, row, num_outputs, per_token=per_token)
    _check_output(spec.name, model, row, num_outputs, per_token)
    initialize(model, spec.initialization)  # after the run, which materializes lazy layers
    return model.train()


def _build_family(spec: ModelSpec, row: Row, num_outputs: int, per_token: bool) -> nn.Module:
    family = FAMILIES[spec.name]
    build = family.per_token if per_token else family.per_row
    if build is None:
        each = "token" if per_token else "row"
        able = [name for name, other in FAMILIES.items() if (other.per_token if per_token else other.per_row)]
        raise ModelError(
            f"{spec.name} gives no scores per {each}, which this task needs; use one of the models {', '.join(able)}"
        )
    return build(parse_spec(family.params, spec.params, source=f"model {spec.name}"), row, num_outputs)


def example_rows(row: Row, count: int = _PROBE_ROWS, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros [count, *row.shape] that a model for such rows takes: int64 codes of tokens, else values of `dtype`."""
    return torch.zeros(count, *row.shape, dtype=torch.int64 if row.is_tokens else dtype)


def _check_output(name: str, model: nn.Module, row: Row, num_outputs: int, per_token: bool) -> None:
    fed = [_PROBE_ROWS, *row.shape]
    wanted = [*fed, num_outputs] if per_token else [_PROBE_ROWS, num_outputs]
    try:
        with torch.no_grad():
            scores = model.eval()(example_rows(row))
    except Exception as error:  # the user's code may raise anything
        rows = f"rows of {row.vocab_size} token codes" if row.is_tokens else "float32 rows"
        raise ModelError(
            f"the model {name} cannot be fed with {rows} of the shape {list(row.shape)}: {type(error).__name__}: {error}"
        ) from error
    each = "token" if per_token else "row"
    if not isinstance(scores, Tensor):
        raise ModelError(
            f"the model {name} gives a {type(scores).__name__}; it has to give one tensor of scores, "
            f"{'[N, T, K]' if per_token else '[N, K]'}"
        )
    if list(scores.shape) != wanted:
        raise ModelError(
            f"the model {name} maps {fed} to {list(scores.shape)}; the data needs {wanted}: {num_outputs} score(s) per {each}"
        )
    if scores.dtype != torch.float32:
        raise ModelError(f"the model {name} gives scores of {scores.dtype}; they have to be torch.float32")
