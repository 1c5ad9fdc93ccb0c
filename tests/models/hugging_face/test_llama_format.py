import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from maas_ray.errors import ModelError
from maas_ray.models.build import build_model
from maas_ray.models.families.decoder import Decoder
from maas_ray.models.hugging_face.llama_format import to_hf
from maas_ray.models.spec import ModelSpec
from maas_ray.row import Row
from tests.support.hf_folders import decoder_from

SMALL = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48, "rope_theta": 5000.0, "norm_eps": 1e-5}


def decoder(**params: object) -> nn.Module:
    torch.manual_seed(0)
    net = build_model(ModelSpec(name="decoder", params=SMALL | params), Row((20,), 12), 12, per_token=True)
    for parameter in net.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return net.eval()


def token_ids() -> torch.Tensor:
    return torch.randint(0, 12, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("params", [{}, {"kv_heads": 4}, {"kv_heads": 1}, {"tied": True}])
def test_transformers_gives_the_same_logits_from_what_is_written(params: dict, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    net = decoder(**params)
    to_hf(net, tmp_path)
    theirs, report = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(token_ids()).logits, net(token_ids()), atol=1e-5, rtol=1e-5)


def test_what_transformers_writes_is_read_with_the_same_logits(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = decoder_from(tmp_path)
    assert ours.training
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(token_ids()), theirs(token_ids()).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("params", [{}, {"tied": True}])
def test_a_decoder_is_restored_bit_for_bit(params: dict, tmp_path: Path) -> None:
    net = decoder(**params)
    to_hf(net, tmp_path / "made" / "here")
    back = decoder_from(tmp_path / "made" / "here")
    assert isinstance(back, Decoder)
    assert (back.head.weight is back.embedding.weight) == bool(params)
    assert torch.equal(back.eval()(token_ids()), net(token_ids()))


def test_another_model_has_no_such_format(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot write a Linear in Llama's format"):
        to_hf(nn.Linear(1, 1), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type to 'mistral'; decoder supports only 'llama'"),
        ({"attention_bias": True}, "attention_bias to True"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "scales its rotary embedding"),
        ({"head_dim": 16}, "head_dim to 16"),
        ({"hidden_size": 33}, "not a configuration of a Llama model: .*does not divide"),
        ({"vocab_size": None}, "not a configuration of a Llama model"),
        ({"hidden_size": 64, "head_dim": None}, r"has shape \[64, 64\] in the model and \[32, 32\] in the source"),
        ({"num_hidden_layers": 3}, r"the source has no block_2\.attention\.key\.weight; .* \(and 6 more\)"),
    ],
)
def test_a_folder_that_describes_another_model_is_refused(changes: dict, message: str, tmp_path: Path) -> None:
    to_hf(decoder(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match=message):
        decoder_from(tmp_path)


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="config.json does not exist"):
        decoder_from(tmp_path)
    to_hf(decoder(), tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ModelError, match="as safetensors"):
        decoder_from(tmp_path)
    weights.write_bytes(whole)
    state = load_file(weights)
    del state["model.norm.weight"]
    save_file(state, weights)
    with pytest.raises(ModelError, match=r"the source has no norm\.weight; use"):
        decoder_from(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="contains a list; expected an object"):
        decoder_from(tmp_path)
