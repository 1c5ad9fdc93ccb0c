"""Exports a trained model as a folder in Hugging Face's format. Independent of the checkpoint format."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from maas_ray.errors import Conflict, ModelError
from maas_ray.models.hugging_face.formats import has_hf_format
from maas_ray.models.hugging_face.llama_format import SHARD_BYTES, to_hf
from maas_ray.models.hugging_face.local import CONFIG, INDEX
from maas_ray.models.hugging_face.transformers_model import HuggingFaceModel
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.validation.load_model import Trained

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


def export_hf(trained: Trained, to: ObstoreStore, shard_bytes: int = SHARD_BYTES) -> list[str]:
    """Writes config.json, the weights as safetensors and, if rows are tokens, the tokenizer.

    Transformers loads the folder with `from_pretrained`. config.json is written last: without it there is no model.

    Args:
        trained: a model of the family `decoder`, or of Transformers (`hf:…`).
        to: the folder. Other files in it remain, but other weights are refused: a reader of the folder could load
            them.
        shard_bytes: largest size of a weight file; several files get an index.

    Returns:
        The names of the files.

    Raises:
        Conflict: the folder already contains a model, or other weights.
        ModelError: the model has no Hugging Face format, or was trained on a scaled target.
    """
    refuse_other(trained.net)
    if trained.dataset.features.target_scaling is not None:
        raise ModelError(
            f"run {trained.run.id!r} was trained on a scaled target, but a model in Hugging Face's format returns its "
            "outputs without a conversion to the units of the data; train it with data.target_scaling: none, or publish "
            "it as a bundle"
        )
    there = {info.key for info in to.scan("")}
    if CONFIG in there:
        raise Conflict(f"{to.uri} already contains a model ({CONFIG}); choose another folder")
    with tempfile.TemporaryDirectory(prefix="maas-hf-") as scratch:
        directory = Path(scratch)
        if isinstance(trained.net, HuggingFaceModel):
            trained.net.model.save_pretrained(directory, max_shard_size=shard_bytes)
        else:
            to_hf(trained.net, directory, shard_bytes)
        for name, content in _tokenizer(trained).items():
            (directory / name).write_bytes(content)
        names = sorted(path.name for path in directory.iterdir())
        if other := sorted(key for key in there - {*names} if key.endswith((".safetensors", INDEX)) and "/" not in key):
            raise Conflict(
                f"{to.uri} contains other weights ({other[0]}), possibly of an interrupted export; remove them, or "
                "choose another folder"
            )
        for name in names:
            if name != CONFIG:
                to.put(name, (directory / name).read_bytes())
        to.create(CONFIG, (directory / CONFIG).read_bytes())
    return names


def refuse_other(net: nn.Module) -> None:
    """Raises `ModelError` for a model without a Hugging Face format."""
    if not has_hf_format(net):
        raise ModelError(
            f"{type(net).__name__} has no Hugging Face format, only models of the family 'decoder' and of Transformers "
            "('hf:…') have; `maas-ray checkpoints reshard` writes any model as plain safetensors"
        )


def _tokenizer(trained: Trained) -> Mapping[str, bytes]:
    tokens = trained.dataset.features.tokens
    if tokens is None:
        return {}
    document = trained.dataset.tokenizer()
    about: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": tokens.length}
    if tokens.pad is not None:
        from tokenizers import Tokenizer

        about["pad_token"] = Tokenizer.from_str(document.decode()).id_to_token(tokens.pad)
    return {TOKENIZER: document, TOKENIZER_CONFIG: json.dumps(about, indent=2).encode() + b"\n"}
