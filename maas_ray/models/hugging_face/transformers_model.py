"""Models of the package transformers, by class name. Downloads nothing and executes no code from a folder.

The package is imported only when such a model is built, because importing it takes seconds.
"""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maas_ray.errors import ModelError
from maas_ray.models.families.images import image_layout
from maas_ray.models.families.transformer import shareable_plan
from maas_ray.models.hugging_face.local import check_folder
from maas_ray.models.params import PREFIX, HuggingFaceSpec
from maas_ray.row import Row
from maas_ray.suggestions import did_you_mean, nearest

_TOKEN_SUFFIXES = ("ForCausalLM", "LMHeadModel", "ForMaskedLM")
_ROW_SUFFIXES = ("ForSequenceClassification",)
_IMAGE_SUFFIXES = ("ForImageClassification",)
_LAYER = re.compile(r"(.*?\.)(\d+)\.")
"""The name of a weight in a numbered layer: what comes before the number, and the number."""
_SUFFIXES = (*_TOKEN_SUFFIXES, *_ROW_SUFFIXES, *_IMAGE_SUFFIXES)


class HuggingFaceModel(nn.Module):
    """Wraps a model of transformers as a module from rows to logits.

    Args:
        model: the model.
        layout: layer from rows to [N, C, H, W], for images.
        pad: id of padding tokens, which are not attended to.
    """

    def __init__(self, model: Any, layout: nn.Module | None, pad: int | None) -> None:
        super().__init__()
        self.model = model
        self.layout = layout
        self.pad = pad
        plan = {f"model.{name}": style for name, style in (getattr(model, "_tp_plan", None) or {}).items()}
        config = model.config.get_text_config()
        heads: int = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None) or 1
        self.tp_plan: dict[str, str] = shareable_plan(self, plan, heads)
        """How tensor parallelism splits the layers: the package's own plan."""
        self.tp_sizes: dict[str, int] = {"heads of keys and values": heads} if plan else {}
        """Other sizes that the number of ranks must divide."""

    def forward(self, rows: Tensor) -> Tensor:
        """From [N, *row.shape] to logits [N, num_outputs], or [N, T, num_outputs] per token."""
        if self.layout is not None:
            logits: Tensor = self.model(pixel_values=self.layout(rows)).logits
            return logits
        mask = None if self.pad is None else (rows != self.pad).to(torch.int64)
        logits = self.model(input_ids=rows, attention_mask=mask).logits
        return logits


def build_hugging_face(
    name: str, spec: HuggingFaceSpec, row: Row, num_outputs: int, *, per_token: bool = False
) -> HuggingFaceModel:
    """Builds a model by class name.

    Args:
        name: `hf:` and the name of a class for causal or masked language modeling, or for the classification of
            sequences or images.
        spec: its parameters.
        row: one preprocessed row.
        num_outputs: logits per row, or per token.
        per_token: whether the model returns logits for each token.

    Raises:
        ModelError: there is no such class, it does not fit the task, the configuration does not fit it, or the folder
            does not contain all of its weights as safetensors.
    """
    kind = find_class(name)
    is_image = kind.__name__.endswith(_IMAGE_SUFFIXES)
    if per_token != kind.__name__.endswith(_TOKEN_SUFFIXES):
        able = ", ".join(f"…{suffix}" for suffix in (_TOKEN_SUFFIXES if per_token else _ROW_SUFFIXES + _IMAGE_SUFFIXES))
        each = "token" if per_token else "row"
        raise ModelError(f"{name} does not return logits per {each}, which this task needs; use a class named {able}")
    if row.is_tokens == is_image:
        takes, given = ("images", "tokens") if is_image else ("tokens", "values")
        raise ModelError(f"{name} takes {takes}, but these rows are {given}; use another class")
    layout = None
    sizes: dict[str, Any] = {"num_labels": num_outputs} if not per_token else {}
    if is_image:
        layout, (channels, height, width) = image_layout(name, "auto", row)
        sizes |= {"num_channels": channels, "image_size": height if height == width else [height, width]}
    else:
        sizes |= {"vocab_size": row.vocab_size, "pad_token_id": row.pad}
    with _quiet():
        if spec.path is not None:
            kept = {key: sizes.get(key) for key in ("num_labels", "pad_token_id")}  # the folder sets the others
            model = _load(name, kind, spec, {key: value for key, value in kept.items() if value is not None})
        else:
            model = _create(name, kind, spec, sizes)
    known = getattr(model.config.get_text_config(), "vocab_size", None)
    if row.vocab_size is not None and not per_token and known is not None and known < row.vocab_size:
        # Logits per token would have another shape; here an id that is too large would fail only in a row with it.
        raise ModelError(
            f"{name} has {known} token ids, but the data's tokenizer has {row.vocab_size}; use the tokenizer that the "
            "model was trained with, or remove vocab_size from model.params.config"
        )
    model.config.use_cache = False  # a key-value cache is only useful for generation
    return HuggingFaceModel(model, layout, row.pad)


def find_class(name: str) -> Any:
    """The class of transformers that `hf:…` names.

    Raises:
        ModelError: there is no such class that can be trained.
    """
    import transformers  # takes seconds

    wanted = name.removeprefix(PREFIX)
    able = [known for known in dir(transformers) if known.endswith(_SUFFIXES)]
    if wanted not in able:
        near = nearest(wanted, able)
        hint = f"did you mean 'hf:{near}'?" if near else f"classes end with {', '.join(_SUFFIXES)}"
        raise ModelError(
            f"transformers {transformers.__version__} has no model {wanted!r} that can be trained here; {hint}"
        )
    return getattr(transformers, wanted)


def _create(name: str, kind: Any, spec: HuggingFaceSpec, sizes: Mapping[str, Any]) -> Any:
    config_class = kind.config_class
    fields = {*inspect.signature(config_class.__init__).parameters, *config_class.attribute_map, "num_labels"} - {
        "self"
    }
    for key in spec.config:
        if key not in fields:  # the package would store it and ignore it
            hint = did_you_mean(key, sorted(fields), f"its fields: {', '.join(sorted(fields))}")
            raise ModelError(f"{name}: {config_class.__name__} has no field {key!r}; {hint}")
    fitting = {key: value for key, value in sizes.items() if key in fields}
    try:
        return kind(config_class(**fitting | spec.config, attn_implementation=spec.attention)).to(torch.float32)
    except Exception as error:  # the package may raise anything about its configuration
        raise ModelError(f"{name} cannot be built: {type(error).__name__}: {' '.join(str(error).split())}") from error


def _load(name: str, kind: Any, spec: HuggingFaceSpec, sizes: Mapping[str, Any]) -> Any:
    folder = Path(spec.path or "").absolute()
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{name}: {spec.path} is not a local folder with config.json and *.safetensors; nothing is downloaded, and "
            "pickled weights (pytorch_model.bin) are not read; convert them with save_pretrained"
        )
    check_folder(folder)
    try:
        model, report = kind.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation=spec.attention,
            output_loading_info=True,
            **sizes,
        )
    except Exception as error:  # the package may raise anything about a folder
        raise ModelError(
            f"{name} cannot be loaded from {spec.path}: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    _refuse_layers(name, spec, model, report["unexpected_keys"])
    is_classifier = not kind.__name__.endswith(_TOKEN_SUFFIXES)
    absent = [
        key
        for key in sorted(report["missing_keys"])
        # A classifier on the body of another model: its last layers are new.
        if not is_classifier or (key.startswith(f"{kind.base_model_prefix}.") and ".pooler." not in key)
    ]
    if absent:
        raise ModelError(
            f"{name}: {spec.path} lacks {len(absent)} of the model's weights, such as {absent[0]}; it contains another "
            "model: see `architectures` in its config.json"
        )
    return model


def _refuse_layers(name: str, spec: HuggingFaceSpec, model: Any, unexpected: Iterable[str]) -> None:
    """Refuses a folder with more layers than its config.json names; other weights, as of another head, are left out."""
    own, theirs = _num_layers(model.state_dict()), _num_layers(unexpected)
    for layers, found in theirs.items():
        if found > own.get(layers, found) and not spec.ignore_layers:
            raise ModelError(
                f"{name}: config.json of {spec.path} names {own[layers]} layers, but its weights contain {found} "
                f"({layers}{found - 1}.…); correct config.json, or set model.params.ignore_layers to leave the others out"
            )


def _num_layers(keys: Iterable[str]) -> dict[str, int]:
    """The number of layers in each list of layers, by the names of weights."""
    found: dict[str, int] = {}
    for match in filter(None, map(_LAYER.match, keys)):
        found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses progress bars and the table of weights that are intentionally new."""
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
