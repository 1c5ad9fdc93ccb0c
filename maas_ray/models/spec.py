"""The specification of a model by name and parameters. Independent of torch; models/build.py builds the model."""

import re
from typing import Any, Self

from pydantic import Field, model_validator

from maas_ray.errors import SpecError
from maas_ray.models.classical import CLASSICAL, parse_classical
from maas_ray.models.params import (
    PREFIX,
    ConvnetSpec,
    DecoderSpec,
    EncoderSpec,
    HuggingFaceSpec,
    Initialization,
    MlpSpec,
    ResnetSpec,
)
from maas_ray.spec import Spec, parse_spec
from maas_ray.suggestions import nearest

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")

PARAMS: dict[str, type[Spec]] = {
    "mlp": MlpSpec,
    "convnet": ConvnetSpec,
    "resnet": ResnetSpec,
    "encoder": EncoderSpec,
    "decoder": DecoderSpec,
}
"""The parameter spec of each built-in family."""


class ModelSpec(Spec):
    """A model by name, with its parameters."""

    name: str
    """A family (`mlp`, `convnet`, `resnet`, `encoder`, `decoder`), a scikit-learn model (`decision_tree`,
    `random_forest`, `gradient_boosting`, `svm`), a class of the package transformers (`hf:LlamaForCausalLM`), or the
    import path `package.module:Class` of any nn.Module. Such a class maps float32 [N, *input_shape], or int64 token ids
    [N, T] if the rows are tokens, to [N, num_outputs], or to [N, T, num_outputs] if the task is per token. Its
    constructor receives those of `input_shape`, `num_outputs`, `vocab_size`, `per_token`, `columns` (name, kind, first
    position, width and cardinality of each column in a row of a table) and `cardinalities` (number of codes of each
    ordinal column) that it declares."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the family, or arguments of the class's constructor."""
    inputs: dict[str, str | tuple[str, ...]] = Field(default_factory=dict, exclude_if=lambda value: not value)
    """Columns of each argument of an imported module's forward, by name: names of columns, patterns such as `pixel_*`, or
    `kind:numeric`, `kind:one_hot`, `kind:ordinal`, `kind:tensor`. Ordinal codes are int64 [N, columns], other columns
    float32 [N, width], and a single tensor keeps its shape. Empty: forward takes the row. The constructor may declare
    `input_shapes` and `input_columns`."""
    initialization: Initialization = "default"
    """Initialization of the weights; `default` keeps that of each layer."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.inputs and not _IMPORT_PATH.fullmatch(self.name):
            raise ValueError(f"inputs: {self.name} takes the row as its only argument; remove inputs")
        is_hugging_face = self.name.startswith(PREFIX)
        if self.name in PARAMS or self.is_classical or is_hugging_face:
            try:
                if self.is_classical:
                    parse_classical(self.name, self.params)
                else:
                    params = HuggingFaceSpec if is_hugging_face else PARAMS[self.name]
                    parse_spec(params, self.params, source=f"model {self.name}")
            except SpecError as error:
                raise ValueError(str(error)) from None
        elif not _IMPORT_PATH.fullmatch(self.name):
            near = nearest(self.name, CLASSICAL, cutoff=0.7) or nearest(self.name, PARAMS)
            hint = f"did you mean {near!r}?" if near else f"models: {', '.join([*PARAMS, *CLASSICAL])}"
            raise ValueError(f"unknown model {self.name!r}; {hint} (or an import path 'package.module:Class')")
        return self

    @property
    def is_classical(self) -> bool:
        """Whether scikit-learn trains it, see `models/classical.py`; it is then not a torch module."""
        return self.name in CLASSICAL
