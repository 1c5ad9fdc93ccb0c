"""Initial weights of a run from another run, from a folder in Hugging Face's format, or from any safetensors.

Loads only weights and buffers: the optimizer, the schedule and the order of samples start from the beginning. Every
rank reads only its own part.
"""

import re
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
from maas_ray.train.state.safetensors_start import SafetensorsStart
from maas_ray.train.state.start import Start

_FREE = {"dropout", "max_length"}
"""Parameters of a model that can differ from those of the training of its weights."""
_BLOCK = re.compile(r"block_(\d+)\.")


def settle_init(init: InitSpec, store: ObjectStore) -> InitSpec:
    """Fixes the exact source, so that every attempt starts from the same weights: a pinned step, or an absolute folder.

    Raises:
        NotFound: the checkpoint does not exist.
    """
    if init.run is not None:
        prefix = checkpoints_prefix(init.run)
        step = int(open_checkpoint(store, prefix, init.step).meta["step"])
        pin(store, prefix, step, "another run starts from it")
        return init.model_copy(update={"step": step})
    return init.absolute()


def open_start(init: InitSpec, store: ObjectStore, storage: StorageSpec) -> Start:
    """Opens the source of a run's initial weights.

    Args:
        init: result of `settle_init`.
        store: the store of both runs.
        storage: access to a folder with a URI.

    Raises:
        ModelError: the folder does not exist or is damaged.
        NotFound, ObjectCorrupt: the checkpoint does not exist or is damaged.
    """
    if init.safetensors is not None:
        return SafetensorsStart(HfFolder(init.safetensors, storage.endpoint), init)
    if init.run is None:
        return _FolderStart(HfFolder(init.hf or "", storage.endpoint), init)
    model = Runs(store).get(init.run).spec.model
    return _RunStart(init, model, open_checkpoint(store, checkpoints_prefix(init.run), init.step))


class _RunStart(Start):
    def __init__(self, init: InitSpec, model: ModelSpec, committed: Committed) -> None:
        shapes = {
            name.removeprefix(MODEL): stored.shape
            for name, stored in read_index(committed).items()
            if name.startswith(MODEL)
        }
        super().__init__(f"run {init.run!r}, step {committed.meta['step']}", shapes, init)
        self._run = init.run
        self._model = model
        self._committed = committed

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        load_into(self._committed, {f"{MODEL}{name}": tensor for name, tensor in weights.items()})

    def lineage(self) -> dict[str, Any]:
        return {"run": self._run, "step": self._committed.meta["step"], "checkpoint": self._committed.digest}

    def _differences(self, model: ModelSpec) -> list[str]:
        return _different(*({"model.name": each.name, **_params(each)} for each in (model, self._model)))


class _FolderStart(Start):
    def __init__(self, folder: HfFolder, init: InitSpec) -> None:
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
        super().__init__(folder.uri, {ours: folder.weights[theirs].shape for ours, theirs in self._names.items()}, init)
        self._folder = folder

    def _load(self, weights: Mapping[str, Tensor]) -> None:
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

    def _refuse_layers(self, named: int) -> None:
        """Refuses weights of more layers than config.json names, unless the spec ignores them."""
        found = 1 + max((int(block[1]) for name in self._names if (block := _BLOCK.match(name))), default=-1)
        if found > named and self.init.unused == "refuse":
            raise ModelError(
                f"{self.source}/{CONFIG} names {named} layers (num_hidden_layers), but the weights contain {found}, of which "
                f"the layers {named} to {found - 1} would be left out; correct config.json and model.params.layers, or set "
                "init.unused to ignore"
            )

    def lineage(self) -> dict[str, Any]:
        return {"hf": self._folder.uri, "sha256": self._folder.digest()}

    def _differences(self, model: ModelSpec) -> list[str]:
        if model.name != "decoder":
            raise ModelError(
                f"init.hf needs a model of the family 'decoder', not {model.name}; a model 'hf:…' loads a folder by "
                "model.params.path"
            )
        if self._unknown:
            raise ModelError(
                f"{self.source} contains {len(self._unknown)} weights that a decoder does not have, such as "
                f"{self._unknown[0]}; use the model 'hf:…'"
            )
        theirs, _ = decoder_spec_of(self._folder.config, f"{self._folder.uri}/{CONFIG}")
        self._refuse_layers(theirs.num_layers)
        mine = parse_spec(DecoderSpec, model.params, source="model.params")
        return _different(_computed(mine), _computed(theirs))


def _params(model: ModelSpec) -> dict[str, Any]:
    """The parameters including known defaults: an omitted default is the same model."""
    if model.name not in PARAMS:
        return model.params
    spec = parse_spec(PARAMS[model.name], model.params, source="model.params")
    fields = spec.model_dump()
    if isinstance(spec, DecoderSpec | EncoderSpec):  # omitted sizes follow from `size`
        del fields["size"]
        fields |= {"layers": spec.num_layers, "width": spec.num_values, "heads": spec.num_heads}
        fields |= {"mlp_width": spec.num_mlp_values}
    if isinstance(spec, DecoderSpec):
        fields |= {"kv_heads": spec.num_kv_heads}
    return fields


def _computed(spec: DecoderSpec) -> dict[str, Any]:
    """The parameters that determine a decoder's function; shapes alone do not show the number of heads, for example."""
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
        f"{name} is {mine.get(name)!r} in the model and {theirs.get(name)!r} in the source"
        for name in sorted({*mine, *theirs} - _FREE)
        if mine.get(name) != theirs.get(name)
    ]
