"""Where the weights of a new run come from, if not from its seed: another run, or a folder in Hugging Face's format.

Only weights and buffers are taken: the optimizer, the schedule and the order of samples begin anew. Every rank reads what
it holds and no more.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from maas_ray.checkpoint.catalog import open_checkpoint, pin
from maas_ray.checkpoint.index import read_index
from maas_ray.checkpoint.load import load_into
from maas_ray.checkpoint.pieces import piece_of
from maas_ray.errors import ModelError
from maas_ray.models.hugging_face.folder import HfFolder
from maas_ray.models.hugging_face.llama_format import decoder_spec_of, is_table_of_angles, our_name, untied
from maas_ray.models.hugging_face.local import CONFIG
from maas_ray.models.params import DecoderSpec, EncoderSpec
from maas_ray.models.spec import PARAMS, ModelSpec
from maas_ray.spec import parse_spec
from maas_ray.store.manifest import Committed
from maas_ray.store.objects import ObjectStore, StorageSpec
from maas_ray.train.records.runs import Runs, checkpoints_prefix
from maas_ray.train.spec.init import InitSpec
from maas_ray.train.state.restore import MODEL

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
        return _different(*({"model.name": each.name, **_params(each)} for each in (model, self._model)))


class _FolderStart(Start):
    def __init__(self, folder: HfFolder) -> None:
        self.source = folder.uri
        self._names: dict[str, str] = {}
        self._unknown: list[str] = []
        for theirs in sorted(folder.weights):
            if (ours := our_name(theirs)) is not None:
                self._names[ours] = theirs
            elif not is_table_of_angles(theirs):
                self._unknown.append(theirs)
        self._is_tied = bool(folder.config.get("tie_word_embeddings"))
        if self._is_tied and "embedding.weight" in self._names:
            self._names.setdefault("head.weight", self._names["embedding.weight"])
        self.shapes = {ours: folder.weights[theirs].shape for ours, theirs in self._names.items()}
        self._folder = folder

    def load(self, weights: Mapping[str, Tensor]) -> None:
        for name, tensor in weights.items():
            piece = piece_of(name, tensor)
            if piece is not None and piece.local.numel():
                read = self._folder.read(self._names[name], *piece.box)
                if name == "head.weight" and self._is_tied:
                    self._refuse_untied(read, *piece.box)
                with torch.no_grad():
                    piece.local.copy_(read)

    def _refuse_untied(self, head: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> None:
        embedding = self._names["embedding.weight"]
        if self._names["head.weight"] != embedding and not torch.equal(
            head, self._folder.read(embedding, offsets, sizes)
        ):
            raise untied(self.source)

    def lineage(self) -> dict[str, Any]:
        return {"hf": self._folder.uri, "sha256": self._folder.digest()}

    def _differences(self, model: ModelSpec) -> list[str]:
        if model.name != "decoder":
            raise ModelError(
                f"init.hf reads weights of the family 'decoder', and this model is {model.name}; a model 'hf:…' starts from "
                "a folder by model.params.path"
            )
        if self._unknown:
            raise ModelError(
                f"{self.source} holds {len(self._unknown)} weights that a decoder has no place for, such as "
                f"{self._unknown[0]}; use the model 'hf:…'"
            )
        theirs, _ = decoder_spec_of(self._folder.config, f"{self._folder.uri}/{CONFIG}")
        mine = parse_spec(DecoderSpec, model.params, source="model.params")
        return _different(_computed(mine), _computed(theirs))


def _params(model: ModelSpec) -> dict[str, Any]:
    """The parameters with their defaults, where these are known: leaving one out is not another model."""
    if model.name not in PARAMS:
        return model.params
    spec = parse_spec(PARAMS[model.name], model.params, source="model.params")
    fields = spec.model_dump()
    if isinstance(spec, DecoderSpec | EncoderSpec):  # what is not given follows from `size`
        del fields["size"]
        fields |= {"layers": spec.num_layers, "width": spec.num_values, "heads": spec.num_heads}
        fields |= {"mlp_width": spec.num_mlp_values}
    if isinstance(spec, DecoderSpec):
        fields |= {"kv_heads": spec.num_kv_heads}
    return fields


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
