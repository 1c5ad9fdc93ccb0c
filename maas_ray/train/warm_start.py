"""Where the weights of a new run come from, if not from its seed: another run, or a folder in Hugging Face's format.

Only weights and buffers are taken: the optimizer, the schedule and the order of samples begin anew. Every rank reads what
it holds and no more.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from maas_ray.checkpoint.catalog import open_checkpoint, pin
from maas_ray.checkpoint.index import read_index
from maas_ray.checkpoint.load import load_into
from maas_ray.checkpoint.pieces import piece_of
from maas_ray.errors import ModelError
from maas_ray.models.hf_folder import CONFIG, HfFolder
from maas_ray.models.hf_format import decoder_spec_of, our_name
from maas_ray.models.params import DecoderSpec
from maas_ray.models.spec import ModelSpec
from maas_ray.spec import parse_spec
from maas_ray.store.manifest import Committed
from maas_ray.store.objects import ObjectStore, StorageSpec
from maas_ray.train.init_spec import InitSpec
from maas_ray.train.runs import Runs, checkpoints_prefix
from maas_ray.train.state import MODEL

_SHOWN = 3
_FREE = {"dropout", "max_length"}
"""Parameters of a model that may differ from those that its weights were trained with."""


def settle_init(init: InitSpec, store: ObjectStore) -> InitSpec:
    """Says exactly what is meant, so that every attempt starts from the same: a step that is kept, an absolute folder.

    Raises:
        NotFound: the run has no such checkpoint.
    """
    if init.run is not None:
        prefix = checkpoints_prefix(init.run)
        step = int(open_checkpoint(store, prefix, init.step).meta["step"])
        pin(store, prefix, step, "another run starts from it")
        return init.model_copy(update={"step": step})
    return init.absolute()


class Start(ABC):
    """What a run starts from, see `open_start`.

    Attributes:
        source: its name in messages.
        shapes: of the tensors that it has, by the names that they have in our model.
    """

    source: str
    shapes: Mapping[str, tuple[int, ...]]

    def check(self, model: ModelSpec, weights: Mapping[str, Tensor]) -> None:
        """Refuses what does not fit, by headers and the index alone.

        Args:
            model: the new run's.
            weights: of the whole model or of a part, by their names in it.

        Raises:
            ModelError: names what is missing, has another shape, or makes another model of the same weights.
        """
        if differ := self._differences(model):
            raise ModelError(
                f"the model {model.name} would compute something else with the weights of {self.source}: "
                f"{'; '.join(differ)}; set model.params to what they were trained with"
            )
        missing = [f"it has no {name}" for name in sorted(weights) if name not in self.shapes]
        wrong = [
            f"{name} is {list(tensor.shape)} here and {list(self.shapes[name])} there"
            for name, tensor in sorted(weights.items())
            if self.shapes.get(name, tuple(tensor.shape)) != tuple(tensor.shape)
        ]
        if problems := missing + wrong:
            more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
            raise ModelError(
                f"the model {model.name} cannot start from {self.source}: {'; '.join(problems[:_SHOWN])}{more}; give "
                "model.params the sizes, and data the tokens or classes, that these weights were trained with"
            )

    @abstractmethod
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Fills tensors in place, of a DTensor this rank's piece.

        Raises:
            ModelError, ObjectCorrupt: it is damaged, or not what `check` has seen.
        """

    @abstractmethod
    def lineage(self) -> dict[str, Any]:
        """What the run records of its start, with a digest that stands for all weights."""

    @abstractmethod
    def _differences(self, model: ModelSpec) -> list[str]: ...


def open_start(init: InitSpec, store: ObjectStore, storage: StorageSpec) -> Start:
    """Opens what a run starts from.

    Args:
        init: settled by `settle_init`.
        store: of both runs.
        storage: how a folder with a URI is reached.

    Raises:
        ModelError: the folder is not there or damaged.
        NotFound, ObjectCorrupt: the same of a checkpoint.
    """
    if init.run is None:
        return _FolderStart(HfFolder(init.hf or "", storage.endpoint))
    model = Runs(store).get(init.run).spec.model
    return _RunStart(init.run, model, open_checkpoint(store, checkpoints_prefix(init.run), init.step))


class _RunStart(Start):
    def __init__(self, run: str, model: ModelSpec, committed: Committed) -> None:
        self.source = f"run {run!r}, step {committed.meta['step']}"
        self.shapes = {
            name.removeprefix(MODEL): stored.shape
            for name, stored in read_index(committed).items()
            if name.startswith(MODEL)
        }
        self._run = run
        self._model = model
        self._committed = committed

    def load(self, weights: Mapping[str, Tensor]) -> None:
        load_into(self._committed, {f"{MODEL}{name}": tensor for name, tensor in weights.items()})

    def lineage(self) -> dict[str, Any]:
        return {"run": self._run, "step": self._committed.meta["step"], "checkpoint": self._committed.digest}

    def _differences(self, model: ModelSpec) -> list[str]:
        mine, theirs = ({"model.name": each.name, **each.params} for each in (model, self._model))
        return _different(mine, theirs)


class _FolderStart(Start):
    def __init__(self, folder: HfFolder) -> None:
        self.source = folder.uri
        self._names = {our_name(theirs): theirs for theirs in folder.weights if our_name(theirs) is not None}
        if "head.weight" not in self._names and "embedding.weight" in self._names:
            self._names["head.weight"] = self._names["embedding.weight"]  # tied
        self.shapes = {str(ours): folder.weights[theirs].shape for ours, theirs in self._names.items()}
        self._folder = folder

    def load(self, weights: Mapping[str, Tensor]) -> None:
        for name, tensor in weights.items():
            piece = piece_of(name, tensor)
            if piece is not None and piece.local.numel():
                with torch.no_grad():
                    piece.local.copy_(self._folder.read(self._names[name], *piece.box))

    def lineage(self) -> dict[str, Any]:
        return {"hf": self._folder.uri, "sha256": self._folder.digest()}

    def _differences(self, model: ModelSpec) -> list[str]:
        if model.name != "decoder":
            raise ModelError(
                f"init.hf reads weights of the family 'decoder', and this model is {model.name}; a model 'hf:…' starts from "
                "a folder by model.params.path"
            )
        theirs, _ = decoder_spec_of(self._folder.config, f"{self._folder.uri}/{CONFIG}")
        mine = parse_spec(DecoderSpec, model.params, source="model.params")
        return _different(_computed(mine), _computed(theirs))


def _computed(spec: DecoderSpec) -> dict[str, Any]:
    """What decides about a decoder's function; shapes alone do not tell heads apart, for instance."""
    return {
        "layers": spec.num_layers,
        "width": spec.num_values,
        "heads": spec.num_heads,
        "kv_heads": spec.num_kv_heads,
        "rope_theta": spec.rope_theta,
        "norm_eps": spec.norm_eps,
        "tied": spec.tied,
    }


def _different(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} is {mine.get(name)!r} here and {theirs.get(name)!r} there"
        for name in sorted({*mine, *theirs} - _FREE)
        if mine.get(name) != theirs.get(name)
    ]
