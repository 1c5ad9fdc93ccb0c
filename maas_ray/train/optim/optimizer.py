"""Builds optimizers by name. Independent of the loss and the loop."""

import inspect
from collections.abc import Collection, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from maas_ray.errors import ModelError, SpecError
from maas_ray.models.weights import weights
from maas_ray.train.custom.imported import construct, import_object
from maas_ray.train.optim.average import AveragingOptimizer
from maas_ray.train.optim.muon import Muon
from maas_ray.train.optim.parameter_groups import group_of
from maas_ray.train.spec.optim import FUSED, OPTIONS, OptimizerSpec, ParameterGroupSpec

_KINDS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}

LABEL = "maas_ray_label"
"""Key of a parameter group with its label, which is the same on every layout."""


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers of different parameters, with one list of groups and one state.

    Args:
        optimizers: new optimizers, without state.
        lr: the peak learning rate.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
        self._optimizers = list(optimizers)
        super().__init__([group for each in self._optimizers for group in each.param_groups], {"lr": lr})
        self._sizes = [len(each.param_groups) for each in self._optimizers]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # a closure is not supported
        """One step of each."""
        groups = iter(self.param_groups)
        for each, size in zip(self._optimizers, self._sizes, strict=True):
            each.param_groups, each.state = list(islice(groups, size)), self.state  # by parameter: they share no key
            each.step()


def build_optimizer(
    spec: OptimizerSpec, *parts: nn.Module, orthogonal: Collection[str] | None = None
) -> torch.optim.Optimizer:
    """Builds an optimizer of the trained parameters, with separate groups for decayed weights and other parameters.

    Args:
        spec: the optimizer.
        parts: the model, or the parts of it that this rank has, with the names of the whole.
        orthogonal: names of the matrices that `muon` updates; None: those of the only part, see `hidden_matrices`.

    Raises:
        ModelError: the model has no parameter to train.
        SpecError: an imported optimizer cannot be constructed.
    """
    trained = {
        name: parameter for part in parts for name, parameter in part.named_parameters() if parameter.requires_grad
    }
    if not trained:
        raise ModelError(f"{type(parts[0]).__name__} has no parameter to train")
    decayed = {id(weight) for part in parts for weight in weights(part)}
    if spec.name != "muon":
        return _build(spec, _groups(spec, trained, decayed))
    chosen = hidden_matrices(parts[0]) if orthogonal is None else orthogonal
    matrices = {name: parameter for name, parameter in trained.items() if name in chosen}
    others = {name: parameter for name, parameter in trained.items() if name not in chosen}
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(Muon(_groups(spec, matrices, decayed), lr=spec.lr, momentum=spec.muon_momentum))
    if others:
        groups = _groups(spec, others, decayed)
        optimizers.append(torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, **_kernels(spec)))
    return CombinedOptimizer(optimizers, spec.lr)


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the matrices between layers: of two dimensions, without embeddings and the last linear layer.

    Args:
        model: the whole model.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    outer = [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)] + linear[-1:]
    excluded = {id(parameter) for module in outer for parameter in module.parameters(recurse=False)}
    found = {id(weight) for weight in weights(model) if weight.dim() == 2} - excluded
    return {name for name, parameter in model.named_parameters() if id(parameter) in found}


_BUILT_IN: tuple[type[torch.optim.Optimizer], ...] = (CombinedOptimizer, *_KINDS.values())


def is_imported(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer is a user's own."""
    return not isinstance(optimizer, _BUILT_IN)


def _groups(spec: OptimizerSpec, trained: Mapping[str, nn.Parameter], decayed: Collection[int]) -> list[dict[str, Any]]:
    groups: dict[Any, dict[str, Any]] = {}
    for is_decayed in (True, False):
        for name, parameter in trained.items():
            if (id(parameter) in decayed) == is_decayed:
                number = group_of(name, spec.groups)
                # One kernel updates all weights of a group, so that its DTensors must have the same mesh.
                key = (is_decayed, number, parameter.device_mesh if isinstance(parameter, DTensor) else None)
                if key not in groups:
                    groups[key] = _group(spec, is_decayed, number)
                groups[key]["params"].append(parameter)
    return list(groups.values())


def _group(spec: OptimizerSpec, is_decayed: bool, number: int | None) -> dict[str, Any]:
    """An empty group of the parameters of one of the spec's groups, or of none."""
    own = spec.groups[number] if number is not None else ParameterGroupSpec(match=("*",))
    decay = spec.weight_decay if is_decayed else 0.0
    return {
        "params": [],
        "lr": spec.lr * own.lr_factor,
        "weight_decay": decay if own.weight_decay is None else own.weight_decay,
        LABEL: f"{'decayed' if is_decayed else 'plain'} {'' if number is None else number}".strip(),
    }


def _build(spec: OptimizerSpec, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if spec.is_imported:
        return _imported(spec, groups)
    options: dict[str, Any] = {name: getattr(spec, name) for name in OPTIONS[spec.name]} | _kernels(spec)
    kind: Any = _KINDS[spec.name]
    optimizer: torch.optim.Optimizer = kind(groups, lr=spec.lr, **options)
    return optimizer


def _imported(spec: OptimizerSpec, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    field = "optimizer.name"
    kind = import_object(spec.name, field)
    if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)):
        raise SpecError(f"{field}: {spec.name} is {kind!r}, not a subclass of torch.optim.Optimizer")
    if reserved := sorted({"params", "lr", "weight_decay"} & spec.params.keys()):
        raise SpecError(
            f"optimizer.params: {reserved[0]} is set by the spec; use optimizer.lr and optimizer.weight_decay"
        )
    if "weight_decay" not in inspect.signature(kind).parameters:
        if spec.weight_decay or any(group.weight_decay for group in spec.groups):
            raise SpecError(
                f"optimizer.weight_decay: {spec.weight_decay} would have no effect, since the constructor of {spec.name} "
                "has no weight_decay; set it to 0, or use objective.l2"
            )
        for group in groups:
            del group["weight_decay"]
    optimizer: torch.optim.Optimizer = construct(kind, spec.name, field, groups, lr=spec.lr, **spec.params)
    if isinstance(optimizer, AveragingOptimizer):
        optimizer.train()
    return optimizer


def _kernels(spec: OptimizerSpec) -> dict[str, bool]:
    if spec.implementation == "auto":
        return {"fused": True} if spec.name in FUSED else {}
    if spec.implementation == "loop":
        return {"foreach": False}
    return {spec.implementation: True}
