"""A run that starts from weights of another one, or of a folder in Hugging Face's format; and how such a folder is written."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from maas_ray.checkpoint.catalog import pinned
from maas_ray.checkpoint.save import Snapshot, save
from maas_ray.cli.app import app
from maas_ray.data.stored.dataset import Dataset
from maas_ray.errors import Conflict, ModelError, NotFound, SpecError
from maas_ray.models.hugging_face.folder import HfFolder
from maas_ray.models.spec import ModelSpec
from maas_ray.spec import parse_spec
from maas_ray.store.objects import ObstoreStore, StorageSpec, open_store
from maas_ray.train.loop.assemble import build_loader, build_net, build_plan, build_train_state
from maas_ray.train.loop.step import train_step
from maas_ray.train.parallel.mesh import rank_coordinates
from maas_ray.train.records.runs import Runs, checkpoints_prefix
from maas_ray.train.spec.init import InitSpec
from maas_ray.train.spec.parallelism import MeshLayout
from maas_ray.train.spec.train import TrainSpec
from maas_ray.train.state.restore import MODEL, tensors_of
from maas_ray.train.state.warm_start import open_start, settle_init
from maas_ray.train.validation.hf_export import export_hf
from maas_ray.train.validation.load_model import load_trained
from tests.support.hf_folders import decoder_from
from tests.support.ranks import run_ranks
from tests.support.small_runs import MODELS, make_run


def _trained_run(store: ObstoreStore, directory: Path, model: str = "decoder") -> tuple[TrainSpec, Dataset]:
    """A run with two checkpoints, of which the second one is of other weights."""
    spec, dataset = make_run(store, directory, model)
    Runs(store).create(spec, dataset.digest, None)
    for step in (1, 2):
        net = build_net(spec.model_copy(update={"seed": step}), dataset.features)
        weights = {f"{MODEL}{name}": value for name, value in net.state_dict().items()}
        save(store, checkpoints_prefix("r"), Snapshot(step, 12, weights))
    return spec, dataset


def _run_of(store: ObstoreStore, directory: Path, model: dict[str, Any]) -> tuple[TrainSpec, Dataset, torch.nn.Module]:
    """A run of another model with one checkpoint, and the network in it."""
    spec, dataset = make_run(store, directory, "decoder")
    spec = spec.model_copy(update={"model": ModelSpec.model_validate(model)})
    Runs(store).create(spec, dataset.digest, None)
    net = build_net(spec, dataset.features)
    weights = {f"{MODEL}{name}": value for name, value in net.state_dict().items()}
    save(store, checkpoints_prefix("r"), Snapshot(1, 12, weights))
    return spec, dataset, net


@pytest.fixture
def trained(file_store: ObstoreStore, tmp_path: Path) -> tuple[TrainSpec, Dataset]:
    return _trained_run(file_store, tmp_path)


@pytest.fixture
def folder(file_store: ObstoreStore, trained: object, tmp_path: Path) -> Path:
    """The run's model in Llama's format, in several files."""
    export_hf(load_trained(file_store, "r"), open_store(str(tmp_path / "hf")), shard_bytes=20_000)
    return tmp_path / "hf"


def _weights(spec: TrainSpec, dataset: Dataset) -> dict[str, torch.Tensor]:
    net = build_net(spec.model_copy(update={"seed": 9}), dataset.features)
    return {name: torch.full_like(value, 7) for name, value in net.state_dict().items()}


def test_a_folder_holds_all_that_others_need_and_gives_the_same_model_back(
    file_store: ObstoreStore, folder: Path
) -> None:
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"} < names
    assert sum(name.endswith(".safetensors") for name in names) > 2
    net = load_trained(file_store, "r").net
    back = decoder_from(folder).state_dict()
    assert all(torch.equal(back[name], value) for name, value in net.state_dict().items())
    with pytest.raises(Conflict, match="already contains a model"):
        export_hf(load_trained(file_store, "r"), open_store(str(folder)))


@pytest.mark.fault
def test_transformers_loads_model_and_tokenizer_of_a_folder(
    file_store: ObstoreStore, trained: tuple[TrainSpec, Dataset], folder: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    net = load_trained(file_store, "r").net
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    token_ids = AutoTokenizer.from_pretrained(folder)("the 5th line of", return_tensors="pt")["input_ids"][:, :8]
    assert token_ids.shape == (1, 8)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(token_ids).logits, net(token_ids), atol=1e-5, rtol=1e-5)


@pytest.mark.fault
def test_a_model_of_transformers_is_written_in_its_own_format(file_store: ObstoreStore, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = {"name": "hf:LlamaForCausalLM", "params": {"config": sizes}}
    _, _, net = _run_of(file_store, tmp_path, model)
    export_hf(load_trained(file_store, "r"), open_store(str(tmp_path / "hf")), shard_bytes=20_000)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    token_ids = torch.randint(0, 20, (2, 8))
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(token_ids).logits, net.eval()(token_ids), atol=1e-5, rtol=1e-5)


def test_the_command_exports_a_step_and_refuses_what_has_no_such_format(
    file_store: ObstoreStore, trained: object, tmp_path: Path
) -> None:
    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        done = CliRunner().invoke(app, ["checkpoints", "export", *arguments, "--store", file_store.uri, "--json"])
        return done.exit_code, json.loads(done.stdout)

    code, found = run("r", "--to", str(tmp_path / "out"), "--format", "hf", "--step", "1")
    assert (code, found["step"], found["weights"]) == (0, 1, "raw")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == found["files"]
    code, found = run("r", "--to", str(tmp_path / "out"))
    assert (code, found["error"]["code"]) == (1, "conflict")
    assert run("other", "--to", str(tmp_path / "new"))[1]["error"]["code"] == "not_found"


@pytest.mark.parametrize("changes", [{}, {"tied": True}], ids=["plain", "tied"])
def test_the_moving_average_is_exported_where_a_run_keeps_one_and_the_weights_themselves_if_asked_for(
    file_store: ObstoreStore, tmp_path: Path, changes: dict[str, Any]
) -> None:
    spec, dataset = make_run(file_store, tmp_path, "decoder", ema={"decay": 0.5})
    model = ModelSpec(name="decoder", params={**MODELS["decoder"]["params"], **changes})
    spec = spec.model_copy(update={"model": model})
    Runs(file_store).create(spec, dataset.digest, None)
    state = build_train_state(
        spec, dataset.features, dataset.num_rows["train"], rank_coordinates(MeshLayout(), "cpu"), torch.device("cpu")
    )
    plan, loader = build_plan(spec, dataset.num_rows["train"]), build_loader(spec, dataset, state.coordinates)
    state.train()
    for step in range(3):
        train_step(plan, state, loader, step)
    save(file_store, checkpoints_prefix("r"), Snapshot(3, 36, tensors_of(state)))
    assert state.average is not None
    expected = {"ema": state.average.averages, "raw": dict(state.parts[0].named_parameters())}
    for number, weights in enumerate((None, "ema", "raw")):
        folder = tmp_path / str(number)
        chosen = ["--weights", weights] if weights else []
        command = ["checkpoints", "export", "r", "--to", str(folder), "--checkpoint", "newest", *chosen]
        done = CliRunner().invoke(app, [*command, "--store", file_store.uri, "--json"])
        assert (done.exit_code, json.loads(done.stdout)["weights"]) == (0, weights or "ema")
        written = decoder_from(folder).state_dict()
        assert all(torch.equal(written[name], value) for name, value in expected[weights or "ema"].items())
        assert not any(
            torch.equal(written[name], value) for name, value in expected["ema" if weights == "raw" else "raw"].items()
        )


def test_only_decoders_are_exported(file_store: ObstoreStore, tmp_path: Path) -> None:
    _trained_run(file_store, tmp_path, "mlp")
    with pytest.raises(ModelError, match="has no Hugging Face format.*reshard"):
        export_hf(load_trained(file_store, "r"), open_store(str(tmp_path / "out")))


@pytest.mark.parametrize("how", ["hf", "run"])
def test_weights_are_those_of_the_source_that_the_run_records(
    file_store: ObstoreStore, trained: tuple[TrainSpec, Dataset], folder: Path, how: str
) -> None:
    spec, dataset = trained
    init = settle_init(InitSpec(hf=str(folder)) if how == "hf" else InitSpec(run="r", step=1), file_store)
    start = open_start(init, file_store, spec.storage)
    weights = _weights(spec, dataset)
    start.check(spec.model, weights)
    start.load(weights)
    expected = load_trained(file_store, "r", 2 if how == "hf" else 1).net.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    run = Runs(file_store).create(
        spec.model_copy(update={"run": "next", "init": init}), dataset.digest, None, start.lineage()
    )
    assert run.start == start.lineage()
    assert len(start.lineage()["sha256" if how == "hf" else "checkpoint"]) == 64
    assert pinned(file_store, checkpoints_prefix("r")) == (set() if how == "hf" else {1})


def test_the_newest_step_is_settled_once_and_resuming_keeps_it(
    file_store: ObstoreStore, trained: tuple[TrainSpec, Dataset]
) -> None:
    spec, _ = trained
    given = spec.model_copy(update={"init": InitSpec(run="r")})
    settled = spec.model_copy(update={"init": settle_init(InitSpec(run="r"), file_store)})
    assert settled.init == InitSpec(run="r", step=2)
    assert given.init is not None
    assert settled.same_training(given.model_copy(update={"init": given.init.as_settled(settled.init)})) == []
    for other in (None, InitSpec(run="r", step=1), InitSpec(hf="elsewhere")):
        assert settled.same_training(spec.model_copy(update={"init": other})) == ["init"]
    with pytest.raises(NotFound, match="of step 9"):
        settle_init(InitSpec(run="r", step=9), file_store)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give exactly one of hf, safetensors and run"),
        ({"hf": "a", "run": "b"}, "give exactly one of hf, safetensors and run"),
        ({"hf": "a", "rename": {"a": "b"}}, "rename needs safetensors"),
        ({"hf": "a", "step": 3}, "step needs run"),
        ({"path": "a"}, "unknown key 'path'"),
    ],
)
def test_an_init_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec(InitSpec, fields)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"layers": 5}, "layers is 5 in the model and 4 in the source"),
        ({"rope_theta": 500.0}, "rope_theta is 500.0 in the model and 10000.0 in the source"),
        ({"heads": 2}, "heads is 2 in the model and 4 in the source"),
        (
            {"mlp_width": 64},
            r"mlp.down.weight has shape \[32, 64\] in the model and \[32, 48\] in the source.*and 9 more",
        ),
    ],
)
@pytest.mark.parametrize("how", ["hf", "run"])
def test_a_model_that_the_weights_do_not_fit_is_refused_by_name(
    file_store: ObstoreStore,
    trained: tuple[TrainSpec, Dataset],
    folder: Path,
    how: str,
    params: dict[str, Any],
    message: str,
) -> None:
    spec, dataset = trained
    init = InitSpec(hf=str(folder)) if how == "hf" else InitSpec(run="r", step=2)
    start = open_start(init, file_store, spec.storage)
    changed = {**MODELS["decoder"], "params": MODELS["decoder"]["params"] | params}
    spec = spec.model_copy(update={"model": ModelSpec.model_validate(changed)})
    if how == "run" and "mlp_width" in params:
        message = "mlp_width is 64 in the model and 48 in the source"
    with pytest.raises(ModelError, match=message):
        start.check(spec.model, _weights(spec, dataset))


@pytest.mark.parametrize(
    ("params", "changes"),
    [
        ({"size": 2}, {"size": 2, "activation": "relu", "norm": "none"}),
        ({"size": 2}, {}),
    ],
)
def test_a_parameter_that_is_left_out_has_its_default_and_makes_no_other_model(
    file_store: ObstoreStore, tmp_path: Path, params: dict[str, Any], changes: dict[str, Any]
) -> None:
    spec, dataset = make_run(file_store, tmp_path, "mlp")
    spec = spec.model_copy(update={"model": ModelSpec(name="mlp", params=params)})
    Runs(file_store).create(spec, dataset.digest, None)
    weights = {f"{MODEL}{name}": value for name, value in build_net(spec, dataset.features).state_dict().items()}
    save(file_store, checkpoints_prefix("r"), Snapshot(1, 12, weights))
    start = open_start(InitSpec(run="r", step=1), file_store, spec.storage)
    start.check(ModelSpec(name="mlp", params=changes), _weights(spec, dataset))
    with pytest.raises(ModelError, match="activation is 'gelu' in the model and 'relu' in the source"):
        start.check(ModelSpec(name="mlp", params={**changes, "activation": "gelu"}), _weights(spec, dataset))


def test_sizes_of_a_decoder_are_the_same_however_they_are_given(
    file_store: ObstoreStore, trained: tuple[TrainSpec, Dataset]
) -> None:
    spec, dataset = trained
    start = open_start(InitSpec(run="r", step=2), file_store, spec.storage)
    given = MODELS["decoder"]["params"]
    same = ModelSpec(name="decoder", params={**given, "size": 4, "rope_theta": 10_000.0, "tied": False})
    start.check(same, _weights(spec, dataset))


def test_weights_that_a_decoder_lacks_are_not_dropped_silently(
    file_store: ObstoreStore, trained: tuple[TrainSpec, Dataset], folder: Path
) -> None:
    spec, dataset = trained
    path = min(folder.glob("*.safetensors"))
    whole = load_file(path)
    save_file({**whole, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, path)
    open_start(InitSpec(hf=str(folder)), file_store, spec.storage).check(spec.model, _weights(spec, dataset))
    save_file({**whole, "model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, path)
    with pytest.raises(ModelError, match=r"contains 1 weights that a decoder does not have, such as .*q_proj\.bias"):
        open_start(InitSpec(hf=str(folder)), file_store, spec.storage).check(spec.model, _weights(spec, dataset))


def test_layers_beyond_those_of_config_json_are_refused_with_both_numbers_or_ignored_on_request(
    file_store: ObstoreStore, trained: tuple[TrainSpec, Dataset], folder: Path
) -> None:
    spec, dataset = trained
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    two = ModelSpec(name="decoder", params=MODELS["decoder"]["params"] | {"layers": 2})
    weights = _weights(spec.model_copy(update={"model": two}), dataset)
    with pytest.raises(ModelError, match=r"names 2 layers .* contain 4, of which the layers 2 to 3 would be left out"):
        open_start(InitSpec(hf=str(folder)), file_store, spec.storage).check(two, weights, is_whole=True)
    start = open_start(InitSpec(hf=str(folder), unused="ignore"), file_store, spec.storage)
    start.check(two, weights, is_whole=True)
    start.load(weights)
    expected = load_trained(file_store, "r").net.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"contains 2 of \d+ weights that the model decoder does not have: extra.bias, extra.weight"),
        ({"exclude": ("extra.*", "head.*")}, "the source has no head.weight"),
        ({"exclude": ("*",)}, "the source has no block_0"),
        ({"exclude": ("*",), "missing": "random"}, "would start from none of the 0 weights"),
        ({"rename": {"net": "b"}}, "no weight of .* begins with 'net'; its names are such as backbone"),
        ({"rename": {"backbone.": "", "backbone.head.": "norm."}}, "would both be norm.weight in the model"),
        ({"include": ("block_*",)}, "the source has no embedding.weight"),
    ],
)
def test_safetensors_of_any_model_are_loaded_by_name_as_strictly_as_the_spec_says(
    file_store: ObstoreStore,
    trained: tuple[TrainSpec, Dataset],
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    spec, dataset = trained
    source = load_trained(file_store, "r").net.state_dict()
    theirs = {f"backbone.{name}": value.clone() for name, value in source.items()}
    (tmp_path / "weights").mkdir()
    save_file(
        {**theirs, "extra.weight": torch.ones(2), "extra.bias": torch.ones(2)}, tmp_path / "weights/any.safetensors"
    )
    given = {"safetensors": str(tmp_path / "weights"), "rename": {"backbone.": ""}}
    with pytest.raises(ModelError, match=message):
        open_start(InitSpec(**given | changes), file_store, spec.storage).check(
            spec.model, _weights(spec, dataset), is_whole=True
        )

    weights = _weights(spec, dataset)
    lax = InitSpec(**given, exclude=("head.*",), missing="random", unused="ignore")
    start = open_start(lax, file_store, spec.storage)
    start.check(spec.model, weights, is_whole=True)
    start.load(weights)
    assert torch.equal(weights.pop("head.weight"), torch.full_like(source["head.weight"], 7)), "it keeps its values"
    assert all(torch.equal(value, source[name]) for name, value in weights.items())
    assert start.lineage()["safetensors"] == str(tmp_path / "weights")
    assert len(start.lineage()["sha256"]) == 64


def test_a_run_starts_from_another_one_without_its_last_layer(
    file_store: ObstoreStore, trained: tuple[TrainSpec, Dataset]
) -> None:
    spec, dataset = trained
    weights = _weights(spec, dataset)
    weights["head.weight"] = torch.zeros(3, 32)
    with pytest.raises(ModelError, match=r"head.weight has shape \[3, 32\] .* init.exclude and init.missing"):
        open_start(InitSpec(run="r"), file_store, spec.storage).check(spec.model, weights, is_whole=True)
    partly = InitSpec(run="r", exclude=("head.*",), missing="random")
    open_start(partly, file_store, spec.storage).check(spec.model, weights, is_whole=True)
    del weights["norm.weight"]
    with pytest.raises(ModelError, match="weights that the model decoder does not have: norm.weight"):
        open_start(partly, file_store, spec.storage).check(spec.model, weights, is_whole=True)


def test_an_output_layer_that_is_missing_is_not_the_embedding(
    file_store: ObstoreStore, trained: tuple[TrainSpec, Dataset], folder: Path
) -> None:
    spec, dataset = trained
    for path in folder.glob("*.safetensors"):
        save_file({name: value for name, value in load_file(path).items() if name != "lm_head.weight"}, path)
    with pytest.raises(ModelError, match=r"the source has no head\.weight"):
        open_start(InitSpec(hf=str(folder)), file_store, spec.storage).check(spec.model, _weights(spec, dataset))


def test_files_that_the_index_does_not_name_are_not_part_of_the_model(
    file_store: ObstoreStore, trained: tuple[TrainSpec, Dataset], folder: Path
) -> None:
    spec, dataset = trained
    shard = min(folder.glob("*.safetensors"))
    (folder / "adapter_model.safetensors").write_bytes(shard.read_bytes())  # the same names once more
    weights = _weights(spec, dataset)
    start = open_start(InitSpec(hf=str(folder)), file_store, spec.storage)
    start.check(spec.model, weights)
    start.load(weights)
    expected = load_trained(file_store, "r").net.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    shard.unlink()
    with pytest.raises(
        ModelError, match=rf"does not contain {shard.name}, which its model.safetensors.index.json names"
    ):
        open_start(InitSpec(hf=str(folder)), file_store, spec.storage).check(spec.model, weights)


def test_an_export_does_not_add_to_the_files_of_another_one(
    file_store: ObstoreStore, trained: tuple[TrainSpec, Dataset], folder: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    half.mkdir()
    (half / "README.md").write_text("mine")
    (half / "model.safetensors").write_bytes(min(folder.glob("*.safetensors")).read_bytes())
    # transformers would take that file, and not the several that are named by the index.
    with pytest.raises(Conflict, match=r"contains other weights \(model.safetensors\).*interrupted export"):
        export_hf(load_trained(file_store, "r"), open_store(str(half)), shard_bytes=20_000)
    export_hf(load_trained(file_store, "r"), open_store(str(half)))  # writes that very file again
    written = decoder_from(half).state_dict()
    assert all(torch.equal(written[name], value) for name, value in decoder_from(folder).state_dict().items())


def _cut(folder: Path, name: str) -> None:
    path = next(path for path in sorted(folder.iterdir()) if path.suffix == ".safetensors")
    {
        "truncated": lambda: path.write_bytes(path.read_bytes()[:-8]),
        "huge header": lambda: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
        "no weights": lambda: [each.unlink() for each in folder.glob("*.safetensors")],
        "pickle": lambda: [each.rename(each.with_suffix(".bin")) for each in folder.glob("*.safetensors")],
        "no config": lambda: (folder / "config.json").unlink(),
        "missing weight": lambda: save_file(dict(list(load_file(path).items())[1:]), path),
        "not there": lambda: folder.rename(folder.with_name("moved")),
    }[name]()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated", "is outside the file"),
        ("huge header", "its header has .* bytes, but the file has"),
        ("no weights", "contains no .*safetensors"),
        ("pickle", "pickled weights .* are not read"),
        ("no config", "config.json does not exist"),
        ("missing weight", "cannot start from .*: the source has no"),
        ("not there", "the directory .* does not exist"),
    ],
)
def test_a_folder_that_is_damaged_is_refused(
    file_store: ObstoreStore, trained: tuple[TrainSpec, Dataset], folder: Path, what: str, message: str
) -> None:
    spec, dataset = trained
    _cut(folder, what)
    with pytest.raises(ModelError, match=message):
        open_start(InitSpec(hf=str(folder)), file_store, spec.storage).check(spec.model, _weights(spec, dataset))


def test_the_output_layer_of_tied_weights_is_the_embedding(file_store: ObstoreStore, tmp_path: Path) -> None:
    model = {**MODELS["decoder"], "params": {**MODELS["decoder"]["params"], "tied": True}}
    spec, dataset, net = _run_of(file_store, tmp_path, model)
    export_hf(load_trained(file_store, "r"), open_store(str(tmp_path / "hf")))
    start = open_start(InitSpec(hf=str(tmp_path / "hf")), file_store, spec.storage)
    found = _weights(spec, dataset)
    start.check(spec.model, found)
    start.load(found)
    assert torch.equal(found["head.weight"], net.state_dict()["embedding.weight"])
    file = tmp_path / "hf" / "model.safetensors"
    whole = load_file(file)
    save_file({**whole, "lm_head.weight": whole["model.embed_tokens.weight"].clone()}, file)
    open_start(InitSpec(hf=str(tmp_path / "hf")), file_store, spec.storage).load(found)
    save_file({**whole, "lm_head.weight": whole["model.embed_tokens.weight"] + 1}, file)
    with pytest.raises(ModelError, match=r"sets tie_word_embeddings, but lm_head.weight differs"):
        open_start(InitSpec(hf=str(tmp_path / "hf")), file_store, spec.storage).load(found)


def _start_on_ranks(rank: int, root: str, folder: str, layout: dict[str, int]) -> float:
    """Starts a layout's rank from a folder; returns the share of the weights' bytes that it read."""
    store = open_store(root)
    dataset = Runs(store).get("r").data_digest
    from maas_ray.data.stored.dataset import open_dataset

    spec, features = Runs(store).get("r").spec, open_dataset(store, dataset)
    batch = spec.batch.model_copy(update={"accumulation_steps": 2 * layout.get("pp", 1)})
    spec = spec.model_copy(update={"seed": 5, "batch": batch})
    state = build_train_state(
        spec,
        features.features,
        features.num_rows["train"],
        rank_coordinates(MeshLayout(**layout), "cpu"),
        torch.device("cpu"),
    )
    start = open_start(InitSpec(hf=folder), store, StorageSpec(uri=root))
    counted = 0
    real = ObstoreStore.get_ranges

    def counting(self: ObstoreStore, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        nonlocal counted
        counted += sum(stop - begin for begin, stop in ranges)
        return real(self, key, ranges)

    weights = {name.removeprefix(MODEL): value for name, value in tensors_of(state).items() if name.startswith(MODEL)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ObstoreStore, "get_ranges", counting)
        start.check(spec.model, weights)
        start.load(weights)
    expected = load_trained(store, "r").net.state_dict()
    for name, tensor in weights.items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        assert torch.equal(whole, expected[name]), name
    return counted / sum(value.nbytes for value in expected.values())


@pytest.mark.fault
@pytest.mark.parametrize("layout", [{"dp_shard": 2}, {"tp": 2}, {"pp": 2}, {"dp_replicate": 2}], ids=str)
def test_every_rank_of_a_layout_reads_what_it_holds(
    file_store: ObstoreStore, trained: object, folder: Path, layout: dict[str, int]
) -> None:
    shares = run_ranks(_start_on_ranks, 2, str(file_store.root), str(folder), layout)
    limit = {"dp_shard": 0.6, "pp": 0.7, "tp": 0.9, "dp_replicate": 1.0}[next(iter(layout))]
    assert max(shares) <= limit, shares


def test_a_folder_is_read_in_any_store(store: ObstoreStore, storage: StorageSpec) -> None:
    from safetensors.torch import save as to_bytes

    weights = {"a": torch.arange(24.0).view(6, 4), "b": torch.tensor(3.0), "c": torch.empty(0, 3)}
    store.put("model.safetensors", to_bytes(weights))
    store.put("config.json", b"{}")
    found = HfFolder(store.uri, storage.endpoint)
    assert torch.equal(found.read("a", (2, 1), (3, 2)), weights["a"][2:5, 1:3])
    assert torch.equal(found.read("b", (), ()), weights["b"])
    assert found.read("c", (0, 0), (0, 3)).shape == (0, 3)
