"""Converts the family `decoder` to and from Hugging Face's Llama format. Independent of transformers and stores.

A folder contains config.json and model.safetensors, or several files and their index if it is large, as
`transformers.LlamaForCausalLM.from_pretrained` reads them. Both implementations rotate the same halves of each head by
the same angles, so only the names of the weights differ.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from maas_ray.errors import ModelError, SpecError
from maas_ray.models.families.decoder import Decoder, RotaryAttention, SwiGLU
from maas_ray.models.hugging_face.local import CONFIG
from maas_ray.models.params import DecoderSpec
from maas_ray.spec import parse_spec

SHARD_BYTES = 5_000_000_000
"""Maximum size of a weight file, as in transformers."""

_BLOCK_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_NAMES = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
# Fields that change the computation in ways that `decoder` does not support: rejected unless they have this value.
_FIXED: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
}


def to_hf(net: nn.Module, directory: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a decoder's weights and configuration in Llama's format.

    Args:
        net: a model of the family `decoder`, on any device; its floating-point type is kept.
        directory: target directory; created if it does not exist.
        shard_bytes: maximum size of a weight file; several files are listed in model.safetensors.index.json.

    Raises:
        ModelError: the model is not of this family.
    """
    if not isinstance(net, Decoder):
        raise ModelError(
            f"cannot write a {type(net).__name__} in Llama's format; only models of the family 'decoder' are supported"
        )
    config = _config(net)
    state = net.state_dict()
    if config["tie_word_embeddings"]:
        del state["head.weight"]
    names = _names(config["num_hidden_layers"])
    # Copies: safetensors rejects tensors that share memory or are not contiguous.
    weights = {
        f"{names[key.removesuffix('.weight')]}.weight": value.detach().cpu().clone() for key, value in state.items()
    }
    from huggingface_hub import save_torch_state_dict  # a dependency of transformers; imported late because it is slow

    directory.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(weights, directory, max_shard_size=shard_bytes)
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def untied(source: str) -> ModelError:
    """The error for a folder with two different weights that its configuration declares to be tied."""
    return ModelError(
        f"{source}: {CONFIG} sets tie_word_embeddings, but lm_head.weight differs from model.embed_tokens.weight; set "
        "tie_word_embeddings to false to use both, or remove lm_head.weight"
    )


def is_table_of_angles(weight: str) -> bool:
    """Whether a name in Llama's format is the rotary table of older checkpoints, which is computed here."""
    return weight.endswith("rotary_emb.inv_freq")


def decoder_spec_of(config: Mapping[str, Any], source: str) -> tuple[DecoderSpec, int]:
    """The parameters of `decoder` and the number of token ids that a Llama configuration describes.

    Args:
        config: content of config.json.
        source: name of the file for messages.

    Raises:
        ModelError: it is damaged, or describes a model that `decoder` does not support.
    """
    for key, wanted in _FIXED.items():
        found = config.get(key, wanted)
        if found != wanted:
            raise ModelError(
                f"{source} sets {key} to {found!r}; decoder supports only {wanted!r}; use the model 'hf:…'"
            )
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ModelError(f"{source} is not a configuration of a Llama model: rope_parameters is not an object")
    if rope.get("rope_type", "default") != "default":
        raise ModelError(
            f"{source} scales its rotary embedding ({rope['rope_type']}), which decoder does not support; use the "
            "model 'hf:…'"
        )
    try:
        width, heads = config["hidden_size"], config["num_attention_heads"]
        if config.get("head_dim") not in (None, width // heads):
            raise ModelError(
                f"{source} sets head_dim to {config['head_dim']}; decoder supports only width / heads; use the model "
                "'hf:…'"
            )
        params = {
            "layers": config["num_hidden_layers"],
            "width": width,
            "heads": heads,
            "kv_heads": config.get("num_key_value_heads") or heads,
            "mlp_width": config["intermediate_size"],
            "max_length": config["max_position_embeddings"],
            "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
            "norm_eps": config.get("rms_norm_eps", 1e-6),
            "tied": config.get("tie_word_embeddings", False),
        }
        return parse_spec(DecoderSpec, params, source=source), int(config["vocab_size"])
    except (KeyError, TypeError, ValueError, ArithmeticError, SpecError) as error:
        raise ModelError(f"{source} is not a configuration of a Llama model: {error}") from error


def _config(net: Decoder) -> dict[str, Any]:
    blocks = [layer for name, layer in net.named_children() if name.startswith("block_")]
    attention, mlp = blocks[0].get_submodule("attention"), blocks[0].get_submodule("mlp")
    embedding, head = net.get_parameter("embedding.weight"), net.get_parameter("head.weight")
    norm = net.get_submodule("norm")
    if not (isinstance(attention, RotaryAttention) and isinstance(mlp, SwiGLU) and isinstance(norm, nn.RMSNorm)):
        raise ModelError("the decoder's layers were replaced by other layers, which Llama's format cannot represent")
    if head.shape != embedding.shape:
        raise ModelError(
            f"the decoder returns {len(head)} logits for {len(embedding)} token ids; Llama's format needs equal numbers"
        )
    width = attention.head_width
    return {
        "architectures": ["LlamaForCausalLM"],
        **_FIXED,
        "vocab_size": len(embedding),
        "hidden_size": embedding.shape[1],
        "intermediate_size": mlp.gate.out_features,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": attention.query.out_features // width,
        "num_key_value_heads": attention.key.out_features // width,
        "head_dim": width,
        "max_position_embeddings": len(attention.cos),
        "rms_norm_eps": norm.eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": attention.rope_theta},
        "rope_theta": attention.rope_theta,  # read by transformers before 5
        "tie_word_embeddings": head is embedding,
        "dtype": str(embedding.dtype).removeprefix("torch."),
        # A decoder's rows are whole texts: the tokenizer defines the token that ends a text.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _names(num_layers: int) -> dict[str, str]:
    """Names of layers, from ours to Llama's."""
    names = dict(_NAMES)
    for i in range(num_layers):
        names |= {f"block_{i}.{ours}": f"model.layers.{i}.{theirs}" for ours, theirs in _BLOCK_NAMES.items()}
    return names


def our_name(weight: str) -> str | None:
    """The name in `decoder` of a weight in Llama's format; None: a decoder has no such weight."""
    layer = weight.removesuffix(".weight")
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", layer)
    names = _BLOCK_NAMES if block else _NAMES
    ours = {theirs: ours for ours, theirs in names.items()}.get(block[2] if block else layer)
    return ours and f"{f'block_{block[1]}.' if block else ''}{ours}.weight"
