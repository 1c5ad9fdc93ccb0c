"""Wraps a Keras 3 model on the torch backend as a torch module that owns its weights. Imports Keras only if used.

Keras names variables by per-process counters and initializes them from its own generators. Here the model is only a
function (Keras' `stateless_call`) of weights that the module stores in order, as checkpoints, replicas and copies need.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from maas_ray.row import Row


class KerasNet(nn.Module):
    """Calls a built Keras model with this module's own weights.

    Layers that draw random numbers (such as Keras' Dropout) take them, if they have a seed, from a state that counts
    calls and is saved and restored like a weight, else from torch's generator; either way they depend on the number of
    workers, unlike torch's dropout here. Such a model can only be replicated: it can be neither sharded nor split into
    stages. It was not tested on a GPU.

    Args:
        model: a model with all variables created.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._function = _Shared(model)
        self.weights = nn.ParameterList([_own(variable) for variable in model.trainable_variables])
        self._state_names = [f"state_{i}" for i in range(len(model.non_trainable_variables))]
        for name, variable in zip(self._state_names, model.non_trainable_variables, strict=True):
            self.register_buffer(name, _own(variable))

    def forward(self, rows: Tensor) -> Tensor:
        """From rows [N, ...] to the model's output."""
        state = [getattr(self, name) for name in self._state_names]
        logits: Tensor
        logits, after = self._function.model.stateless_call(list(self.weights), state, rows, training=self.training)
        if self.training:  # running means, and the state of random layers
            with torch.no_grad():
                for before, new in zip(state, after, strict=True):
                    before.copy_(new)
        return logits


def is_keras(kind: type) -> bool:
    """Whether this is a class of Keras models."""
    keras = sys.modules.get("keras")
    return keras is not None and issubclass(kind, keras.Model)


def build_keras(kind: type, arguments: Mapping[str, Any], row: Row) -> KerasNet:
    """Constructs a Keras model. The same state of torch's global generator gives the same weights."""
    import keras

    seed = int(torch.randint(2**31, ()))
    keras.utils.set_random_seed(seed)
    model = kind(**arguments)
    with torch.no_grad():
        model(torch.zeros(2, *row.shape, dtype=torch.int64 if row.is_tokens else torch.float32))  # builds it
    return KerasNet(model)


class _Shared:
    """Hides a Keras model from the module tree; copies of the module share it, because it is only a function."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __deepcopy__(self, memo: Any) -> "_Shared":
        return self


def _own(variable: Any) -> Tensor:
    value: Tensor = variable.value.detach().cpu().clone()
    return value
