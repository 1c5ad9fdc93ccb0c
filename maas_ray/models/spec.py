"""Which model a run trains, by name and parameters. Knows no torch: models/build.py builds it."""

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
"""The parameters of each family that is known by name."""


class ModelSpec(Spec):
    """Which model, with which parameters."""

    name: str
    """A family (`mlp`, `convnet`, `resnet`, `encoder`, `decoder`), a model of scikit-learn's (`decision_tree`,
    `random_forest`, `gradient_boosting`, `svm`), a class of the package transformers (`hf:LlamaForCausalLM`), or the
    import path `package.module:Class` of any nn.Module. Such a class maps float32 [N, *input_shape] to [N, num_outputs];
    int64 token ids [N, T] where the rows are tokens, and then, if the task is per token, to [N, T, num_outputs]. It is given
    `input_shape`, `num_outputs`, `vocab_size` and `per_token` if its constructor names them."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the family, or arguments of the class's constructor."""
    initialization: Initialization = "default"
    """How the weights are drawn; `default` leaves them as the layers draw them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
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
            hint = f"did you mean {near!r}?" if near else f"families: {', '.join([*PARAMS, *CLASSICAL])}"
            raise ValueError(f"unknown model {self.name!r}; {hint} (or an import path 'package.module:Class')")
        return self

    @property
    def is_classical(self) -> bool:
        """Whether scikit-learn trains it, see `models/classical.py`; it is then no torch module."""
        return self.name in CLASSICAL
