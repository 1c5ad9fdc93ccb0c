"""Selects the weights among a module's parameters, and initializes them by name. Independent of optimizers."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import init
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from maas_ray.errors import ModelError
from maas_ray.models.params import Initialization

INITIALIZATIONS: dict[str, Callable[[Tensor], Any]] = {
    "xavier_uniform": init.xavier_uniform_,  # Glorot & Bengio 2010
    "xavier_normal": init.xavier_normal_,
    "he_uniform": partial(init.kaiming_uniform_, nonlinearity="relu"),  # He et al. 2015
    "he_normal": partial(init.kaiming_normal_, nonlinearity="relu"),
    "orthogonal": init.orthogonal_,  # Saxe et al. 2013
    "normal": partial(init.normal_, std=0.02),  # as BERT and GPT-2
}

_NORMALIZATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def weights(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that multiply features: two dimensions or more, and not the gain of a normalization.

    The other parameters, biases and gains, are neither penalized nor decayed nor reinitialized: they do not make a
    model more complex, and pulling them to zero only shifts the output.
    """
    gains = {
        id(parameter)
        for layer in module.modules()
        if isinstance(layer, _NORMALIZATIONS)
        for parameter in layer.parameters(recurse=False)
    }
    return [parameter for parameter in module.parameters() if parameter.dim() >= 2 and id(parameter) not in gains]


def initialize(module: nn.Module, name: Initialization) -> None:
    """Reinitializes all weights from torch's global generator and zeroes the biases of their layers.

    `default` keeps the initialization of each layer. Embeddings are reinitialized only by `normal`: the others scale by
    the number of inputs, and a lookup has none.

    Args:
        module: any module, with all parameters materialized.
        name: one of `INITIALIZATIONS`, or `default`.

    Raises:
        ModelError: the module has no weights, or computes its weights from other parameters (such as weight_norm).
    """
    if name == "default":
        return
    drawable = {id(parameter) for parameter in weights(module)}
    num_drawn = 0
    for path, layer in module.named_modules():
        if parametrize.is_parametrized(layer):
            raise ModelError(
                f"the initialization {name!r} cannot be applied to {path or 'the model'}: its weights are computed from "
                "other parameters (torch.nn.utils.parametrize); use the initialization 'default'"
            )
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and name != "normal":
            continue
        own = dict(layer.named_parameters(recurse=False))
        drawn = [parameter for parameter in own.values() if id(parameter) in drawable]
        for parameter in drawn:
            INITIALIZATIONS[name](parameter)
        for key, parameter in own.items():
            if drawn and "bias" in key and id(parameter) not in drawable:
                init.zeros_(parameter)
        num_drawn += len(drawn)
    if not num_drawn:
        raise ModelError(f"the initialization {name!r} found no weights in {type(module).__name__}; use 'default'")
