"""Weights by patterns of their names: those of a parameter group, and frozen ones. Independent of optimizers."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from maas_ray.errors import SpecError
from maas_ray.suggestions import did_you_mean
from maas_ray.train.spec.optim import OptimizerSpec, ParameterGroupSpec


def freeze_weights(spec: OptimizerSpec, net: nn.Module) -> None:
    """Freezes the weights that match `optimizer.freeze`, and refuses patterns without effect.

    Args:
        spec: the optimizer.
        net: the whole model.

    Raises:
        SpecError: a pattern matches no weight, or all weights of a group are frozen or belong to earlier groups.
    """
    names = [name for name, _ in net.named_parameters()]
    _refuse_idle("optimizer.freeze", spec.freeze, names)
    for name, parameter in net.named_parameters():
        if _matches(name, spec.freeze):
            parameter.requires_grad_(False)
    trained = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    used = {group_of(name, spec.groups) for name in trained}
    for number, group in enumerate(spec.groups):
        _refuse_idle(f"optimizer.groups.{number}.match", group.match, names)
        if number not in used:
            raise SpecError(
                f"optimizer.groups.{number}: all weights that match {', '.join(group.match)} are frozen or belong to an earlier "
                "group; remove the group, or move it before the others"
            )


def group_of(name: str, groups: Sequence[ParameterGroupSpec]) -> int | None:
    """The number of the first group that matches the name of a weight, or None."""
    return next((number for number, group in enumerate(groups) if _matches(name, group.match)), None)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_idle(field: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not _matches_any(pattern, names):
            hint = did_you_mean(pattern, names, f"its weights are such as {', '.join(names[:3])}")
            raise SpecError(f"{field}: no weight of the model matches {pattern!r}; {hint}")


def _matches_any(pattern: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)
