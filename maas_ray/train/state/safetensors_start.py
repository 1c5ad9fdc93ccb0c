"""Initial weights from any folder of safetensors, by name."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from maas_ray.checkpoint.pieces import piece_of
from maas_ray.errors import ModelError
from maas_ray.models.hugging_face.folder import HfFolder
from maas_ray.models.spec import ModelSpec
from maas_ray.train.spec.init import InitSpec
from maas_ray.train.state.start import Start


class SafetensorsStart(Start):
    """The weights of a folder under the names of the model.

    Args:
        folder: the folder; it needs no config.json.
        init: how its names are changed, and which weights are loaded.

    Raises:
        ModelError: the folder is damaged, or two of its weights get the same name.
    """

    def __init__(self, folder: HfFolder, init: InitSpec) -> None:
        self._names: dict[str, str] = {}
        for theirs in sorted(folder.weights):
            ours = _renamed(theirs, init.rename)
            if ours in self._names:
                raise ModelError(
                    f"init.rename: {self._names[ours]} and {theirs} of {folder.uri} would both be {ours} in the model; "
                    "rename them to different names"
                )
            self._names[ours] = theirs
        if idle := [prefix for prefix in init.rename if not any(name.startswith(prefix) for name in folder.weights)]:
            raise ModelError(
                f"init.rename: no weight of {folder.uri} begins with {idle[0]!r}; its names are such as "
                f"{', '.join(sorted(folder.weights)[:3])}"
            )
        shapes = {ours: folder.weights[theirs].shape for ours, theirs in self._names.items()}
        super().__init__(folder.uri, shapes, init)
        self._folder = folder

    def lineage(self) -> dict[str, Any]:
        return {"safetensors": self._folder.uri, "sha256": self._folder.digest()}

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        for name, tensor in weights.items():
            piece = piece_of(name, tensor)
            if piece is not None and piece.local.numel():
                with torch.no_grad():
                    piece.local.copy_(self._folder.read(self._names[name], *piece.box))

    def _differences(self, model: ModelSpec) -> list[str]:
        return []  # the folder does not contain the parameters of its model


def _renamed(name: str, rename: Mapping[str, str]) -> str:
    best = max((prefix for prefix in rename if name.startswith(prefix)), key=len, default=None)
    return name if best is None else rename[best] + name[len(best) :]
