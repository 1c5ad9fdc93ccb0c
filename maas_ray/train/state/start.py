"""The seam for the sources of a run's initial weights: which weights are loaded, and what must fit."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from maas_ray.errors import ModelError
from maas_ray.models.spec import ModelSpec
from maas_ray.train.spec.init import InitSpec

_SHOWN = 3


class Start(ABC):
    """The source of a run's initial weights, see `open_start`.

    Args:
        source: name of the source in messages.
        shapes: shapes of its tensors, by their names in our model.
        init: which of them are loaded, and how strictly.
    """

    def __init__(self, source: str, shapes: Mapping[str, tuple[int, ...]], init: InitSpec) -> None:
        self.source = source
        self.init = init
        self.shapes = {name: shape for name, shape in shapes.items() if self._is_chosen(name)}

    def check(self, model: ModelSpec, weights: Mapping[str, Tensor], *, is_whole: bool = False) -> None:
        """Refuses weights that do not match the model; reads only headers and the index.

        Args:
            model: model of the new run.
            weights: weights of the whole model or of a part, by name.
            is_whole: whether it is the whole model, so that other weights of the source are unused.

        Raises:
            ModelError: weights are missing, unused or have other shapes, or parameters differ; the message lists them.
        """
        if differ := self._differences(model):
            raise ModelError(
                f"the model {model.name} would compute something else with the weights of {self.source}: "
                f"{'; '.join(differ)}; set model.params to the values of their training"
            )
        wrong = [
            f"{name} has shape {list(tensor.shape)} in the model and {list(self.shapes[name])} in the source"
            for name, tensor in sorted(weights.items())
            if self.shapes.get(name, tuple(tensor.shape)) != tuple(tensor.shape)
        ]
        missing = [name for name in sorted(weights) if name not in self.shapes]
        absent = [f"the source has no {name}" for name in missing] if self.init.missing == "refuse" else []
        if problems := absent + wrong:
            raise ModelError(
                f"the model {model.name} cannot start from {self.source}: {_listed(problems, '; ')}; use "
                "the sizes in model.params, and the tokens or classes in data, of the training of these weights, or state "
                "in init.exclude and init.missing which weights start at random"
            )
        if len(missing) == len(weights) and is_whole:
            raise ModelError(
                f"the model {model.name} would start from none of the {len(self.shapes)} weights of {self.source} that "
                f"init.include and init.exclude select ({_listed(sorted(self.shapes))}); correct the patterns or init.rename"
            )
        unused = sorted(self.shapes.keys() - weights.keys())
        if is_whole and unused and self.init.unused == "refuse":
            raise ModelError(
                f"{self.source} contains {len(unused)} of {len(self.shapes)} weights that the model {model.name} does not "
                f"have: {_listed(unused)}; correct model.params, name them in init.exclude, or set init.unused to ignore"
            )

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Fills the chosen tensors in place; of a DTensor, the part of this rank.

        Raises:
            ModelError, ObjectCorrupt: the source is damaged, or has changed since `check`.
        """
        self._load({name: tensor for name, tensor in weights.items() if name in self.shapes})

    @abstractmethod
    def lineage(self) -> dict[str, Any]:
        """The record of the source in the run, with a digest of all weights."""

    @abstractmethod
    def _load(self, weights: Mapping[str, Tensor]) -> None: ...

    @abstractmethod
    def _differences(self, model: ModelSpec) -> list[str]: ...

    def _is_chosen(self, name: str) -> bool:
        return _matches(name, self.init.include) and not _matches(name, self.init.exclude)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _listed(items: list[str], separator: str = ", ") -> str:
    more = f" (and {len(items) - _SHOWN} more)" if len(items) > _SHOWN else ""
    return f"{separator.join(items[:_SHOWN])}{more}"
