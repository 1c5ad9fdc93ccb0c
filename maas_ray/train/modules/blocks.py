"""Finds the blocks of a model, which are gathered, recomputed or compiled together. Independent of layouts."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from torch import nn

Forward = Callable[..., Any]
"""A module's `forward`, with the module as its first argument."""


def layers(part: nn.Module) -> list[nn.Module]:
    """The outermost layers with weights of sequences and lists, in order."""
    return [layer for _, layer in _owned_layers(part)]


def blocks(net: nn.Module) -> list[nn.Module]:
    """The layers that consist of other layers, such as the blocks of a decoder, but not its embedding."""
    return [layer for layer in layers(net) if any(True for _ in layer.children())]


def replace_forward(module: nn.Module, change: Callable[[Forward], Forward]) -> None:
    """Replaces the `forward` of a module by a subclass of its class: names of weights remain, and copies keep it.

    Args:
        module: changed in place.
        change: maps the class's `forward` to the new one; modules with the same function share a subclass.
    """
    module.__class__ = _subclass(type(module), change)  # type: ignore[arg-type]  # classes are hashable


@cache
def _subclass(kind: type[nn.Module], change: Callable[[Forward], Forward]) -> type[nn.Module]:
    return type(kind.__name__, (kind,), {"forward": change(kind.forward), "__module__": kind.__module__})


def neighbours(part: nn.Module, least_bytes: float) -> list[list[nn.Module]]:
    """Groups of adjacent layers with at least `least_bytes` of weights each.

    A smaller remainder of a sequence is in no group, nor are layers that share a weight.
    """
    uses: dict[int, int] = {}
    for module in part.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    groups: list[list[nn.Module]] = []
    group: list[nn.Module] = []
    size, owner = 0, None
    for parent, layer in _owned_layers(part):
        own = list(layer.parameters())
        # A layer whose weight is also used elsewhere belongs to the module that contains all of its users.
        inside = sum(len(list(module.parameters(recurse=False))) for module in layer.modules())
        if inside != sum(uses[id(parameter)] for parameter in own):
            continue
        if parent is not owner:
            group, size, owner = [], 0, parent
        group.append(layer)
        size += sum(parameter.numel() * parameter.element_size() for parameter in own)
        if size >= least_bytes:
            groups.append(group)
            group, size = [], 0
    return groups


def _owned_layers(part: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    pairs = [
        (module, child)
        for module in part.modules()
        if isinstance(module, nn.ModuleList) or (module is part and isinstance(part, nn.Sequential))
        for child in module.children()
        if any(True for _ in child.parameters())
    ]
    inside = {id(below) for _, layer in pairs for below in layer.modules() if below is not layer}
    return ((parent, layer) for parent, layer in pairs if id(layer) not in inside)
