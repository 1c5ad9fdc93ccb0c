import json
from pathlib import Path

import pytest
import torch

from maas_ray.errors import ModelError, SpecError
from maas_ray.models.build import build_model
from maas_ray.models.spec import ModelSpec
from maas_ray.row import Row
from maas_ray.spec import parse_spec

TOKENS, IMAGES = Row((6,), 12), Row((16, 16))
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BERT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VIT = BERT | {"patch_size": 8}


def hugging_face(name: str, params: dict, row: Row = TOKENS, *, per_token: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(ModelSpec(name=f"hf:{name}", params=params), row, 12 if per_token else 3, per_token=per_token)


def token_ids() -> torch.Tensor:
    return torch.randint(1, 12, (4, 6), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "config", "row", "per_token"),
    [
        ("LlamaForCausalLM", LLAMA, TOKENS, True),
        ("GPT2LMHeadModel", {"n_embd": 16, "num_hidden_layers": 1, "n_head": 2}, TOKENS, True),
        ("BertForMaskedLM", BERT, TOKENS, True),
        ("BertForSequenceClassification", BERT, TOKENS, False),
        ("ViTForImageClassification", VIT, IMAGES, False),
        ("ViTForImageClassification", VIT, Row((16, 16, 3)), False),
    ],
)
def test_a_class_is_built_from_its_configuration_and_the_sizes_of_the_data(
    name: str, config: dict, row: Row, per_token: bool
) -> None:
    model = hugging_face(name, {"config": config}, row, per_token=per_token)
    rows = token_ids() if row.is_tokens else torch.randn(4, *row.shape)
    model(rows).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_the_packages_plan_names_layers_of_the_model() -> None:
    model = hugging_face("LlamaForCausalLM", {"config": LLAMA}, per_token=True)
    assert model.tp_plan["model.model.layers.*.self_attn.q_proj"] == "colwise"
    assert model.tp_plan["model.lm_head"] == "colwise_gather_output"
    for pattern in model.tp_plan:
        assert isinstance(model.get_submodule(pattern.replace("*", "0")), torch.nn.Module)
    assert model.tp_sizes == {"heads of keys and values": 2}


def test_padding_changes_no_logit() -> None:
    model = hugging_face("BertForSequenceClassification", {"config": BERT}, Row((6,), 12, pad=0)).eval()
    rows = token_ids()
    rows[:, 4:] = 0
    torch.testing.assert_close(model(rows), model(rows[:, :4]), atol=1e-5, rtol=1e-5)


def test_training_starts_from_the_weights_of_a_local_folder(tmp_path: Path) -> None:
    first = hugging_face("BertForMaskedLM", {"config": BERT | {"num_hidden_layers": 2}}, per_token=True).eval()
    first.model.save_pretrained(tmp_path)
    second = hugging_face("BertForMaskedLM", {"path": str(tmp_path)}, per_token=True).eval()
    assert torch.equal(first(token_ids()), second(token_ids()))
    classifier = hugging_face("BertForSequenceClassification", {"path": str(tmp_path)})
    body = {key: value for key, value in first.model.bert.state_dict().items() if "pooler" not in key}
    assert all(torch.equal(value, classifier.model.bert.state_dict()[key]) for key, value in body.items())
    with pytest.raises(ModelError, match=r"lacks \d+ of the model's weights, such as .*it contains another model"):
        hugging_face("DistilBertForMaskedLM", {"path": str(tmp_path)}, per_token=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(ModelError, match=r"names 1 layers, but its weights contain 2 \(bert\.encoder\.layer\.1\."):
        hugging_face("BertForMaskedLM", {"path": str(tmp_path)}, per_token=True)
    hugging_face("BertForMaskedLM", {"path": str(tmp_path), "ignore_layers": True}, per_token=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    torch.save(first.model.state_dict(), tmp_path / "pytorch_model.bin")
    assert config["model_type"] == "bert"
    with pytest.raises(ModelError, match="pickled weights"):
        hugging_face("BertForMaskedLM", {"path": str(tmp_path)}, per_token=True)


@pytest.mark.parametrize(
    ("name", "params", "row", "per_token", "message"),
    [
        ("LamaForCausalLM", {}, TOKENS, True, "has no model 'LamaForCausalLM' .* did you mean 'hf:LlamaForCausalLM'"),
        ("os", {}, TOKENS, True, "classes end with ForCausalLM"),
        ("LlamaForCausalLM", {}, TOKENS, False, "does not return logits per row"),
        ("BertForSequenceClassification", {}, TOKENS, True, "does not return logits per token"),
        ("ViTForImageClassification", {}, TOKENS, False, "takes images, but these rows are tokens"),
        ("BertForSequenceClassification", {}, IMAGES, False, "takes tokens, but these rows are values"),
        ("LlamaForCausalLM", {"config": {"hidden_sise": 3}}, TOKENS, True, "did you mean 'hidden_size'"),
        (
            "LlamaForCausalLM",
            {"config": LLAMA | {"hidden_size": "big"}},
            TOKENS,
            True,
            "cannot be built: .*hidden_size",
        ),
        (
            "BertForSequenceClassification",
            {"config": BERT | {"vocab_size": 5}},
            TOKENS,
            False,
            "has 5 token ids, but the data's tokenizer has 12",
        ),
        ("LlamaForCausalLM", {"config": LLAMA | {"vocab_size": 5}}, TOKENS, True, r"the data needs \[2, 6, 12\]"),
        (
            "LlamaForCausalLM",
            {"path": "meta-llama/Llama-3.2-1B"},
            TOKENS,
            True,
            "not a local folder .* nothing is downl",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    name: str, params: dict, row: Row, per_token: bool, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        hugging_face(name, params, row, per_token=per_token)


def test_parameters_are_checked_when_the_spec_is_read() -> None:
    with pytest.raises(SpecError, match="unknown key 'confg'; did you mean 'config'"):
        parse_spec(ModelSpec, {"name": "hf:LlamaForCausalLM", "params": {"confg": {}}})
    with pytest.raises(SpecError, match="config and path exclude each other"):
        parse_spec(ModelSpec, {"name": "hf:LlamaForCausalLM", "params": {"config": LLAMA, "path": "x"}})
