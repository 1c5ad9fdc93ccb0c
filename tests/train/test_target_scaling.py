"""Numbers of any unit are learned on a scale of their own; metrics, predictions and graphs are in the units of the data."""

import numpy as np
import onnxruntime
import pyarrow as pa
import pytest
import torch

from maas_ray.bundle.format import load_bundle
from maas_ray.checkpoint.save import Snapshot, save
from maas_ray.data.loading import open as opening
from maas_ray.data.loading.open import open_rows
from maas_ray.data.loading.target_units import TargetUnits, scaled_target
from maas_ray.data.spec.data import DataSpec
from maas_ray.data.spec.features import Features, NumericColumn, TargetScaling
from maas_ray.data.stored.dataset import TARGET, Dataset, save_dataset
from maas_ray.data.table.target import scale_target
from maas_ray.errors import GateError, ModelError
from maas_ray.export import onnx_export as exporting
from maas_ray.models.spec import ModelSpec
from maas_ray.optimize.publish import export_run
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.classical import fit as classical_fit
from maas_ray.train.classical.fit import train_classical
from maas_ray.train.loop.assemble import build_loader, build_plan, build_train_state
from maas_ray.train.loop.step import mean_loss, train_step
from maas_ray.train.parallel.mesh import RankCoordinates
from maas_ray.train.ranks.preflight import check_run
from maas_ray.train.records.runs import Runs, checkpoints_prefix
from maas_ray.train.spec.metrics import remark
from maas_ray.train.spec.parallelism import MeshLayout
from maas_ray.train.spec.train import TrainSpec
from maas_ray.train.state.restore import tensors_of
from maas_ray.train.validation.evaluate_run import evaluate_run
from maas_ray.train.validation.hf_export import export_hf
from maas_ray.train.validation.load_model import load_trained
from maas_ray.train.verify import verify_layouts

STEPS = 80
UNITS = {"prices": (1e5, 5e5), "fractions": (1e-6, 3e-5), "a constant": (0.0, 7e6)}
"""Scale and shift of the target."""


def _data(store: ObstoreStore, unit: str, method: str = "standard") -> Dataset:
    generator, (scale, shift) = np.random.default_rng(0), UNITS[unit]
    tables = {}
    for split, num_rows in (("train", 200), ("validation", 40), ("test", 60)):
        x = generator.normal(size=(num_rows, 4)).astype(np.float32)
        y = x @ np.array([1, -2, 0.5, 0]) + 0.3 * generator.normal(size=num_rows)
        columns = {name: x[:, i] for i, name in enumerate("abcd")}
        tables[split] = pa.table({**columns, TARGET: (y * scale + shift).astype(np.float32)})
    features = Features(
        columns=tuple(NumericColumn(name=name) for name in "abcd"),
        task="regression",
        target="y",
        target_scaling=scale_target(tables["train"].column(TARGET).to_numpy(), method),
    )
    return save_dataset(store, tables, features, {}, {})


def _spec(store: ObstoreStore, model: str = "mlp", **changes: object) -> TrainSpec:
    params = {"size": 1} if model == "mlp" else {}
    fields = {
        "run": "r",
        "model": {"name": model, "params": params},
        "data": {"uri": "rows.csv", "target": "y", "task": "regression"},
        "steps": STEPS,
        "storage": {"uri": store.uri},
    }
    if model == "mlp":
        fields["optimizer"] = {"lr": 0.01}
    else:
        del fields["steps"]
    return TrainSpec.model_validate({**fields, **changes})


def _train(store: ObstoreStore, dataset: Dataset, spec: TrainSpec) -> list[float]:
    """Trains and commits the run in this process; the losses."""
    Runs(store).create(spec, dataset.digest, None)
    if spec.model.is_classical:
        return [train_classical(spec, dataset.digest).loss or 0.0]
    coordinates, num_rows = RankCoordinates(MeshLayout(), None), dataset.num_rows["train"]
    state = build_train_state(spec, dataset.features, num_rows, coordinates, torch.device("cpu"))
    plan, loader = build_plan(spec, num_rows), build_loader(spec, dataset, coordinates)
    losses = []
    for step in range(plan.total_steps):
        losses.append(mean_loss(state, train_step(plan, state, loader, step)[0], step))
    save(store, checkpoints_prefix(spec.run), Snapshot(plan.total_steps, plan.stop, tensors_of(state)))
    return losses


def _served(store: ObstoreStore, dataset: Dataset, run: str = "r") -> np.ndarray:
    """Predictions of the published graph for raw rows of the test split."""
    graph = load_bundle(store, export_run(store, run).bundle_id).graph
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    columns = dataset.read("test").columns
    names = [one.name for one in session.get_inputs()]
    (values,) = session.run(None, dict(zip(names, columns, strict=True)))
    return values[:, 0]


def _disagreement(store: ObstoreStore, dataset: Dataset) -> float:
    """Largest relative difference between the metrics of `evaluate` and those computed by hand from served values."""
    found = evaluate_run(store, "r").metrics
    target, served = dataset.read("test").target.astype(np.float64), _served(store, dataset).astype(np.float64)
    mse, mae = np.mean((served - target) ** 2), np.mean(np.abs(served - target))
    by_hand = {"mse": mse, "mae": mae, "r2": 1 - mse / max(target.var(), 1e-300)}
    return max(abs(found[name] - value) / max(abs(value), 1e-12) for name, value in by_hand.items())


@pytest.mark.parametrize(
    ("unit", "model"),
    [
        ("prices", "mlp"),
        ("fractions", "svm"),
        *(
            pytest.param(unit, model, marks=pytest.mark.fault)
            for unit in ("prices", "fractions")
            for model in ("gradient_boosting", "decision_tree", "random_forest")
        ),
    ],
)
def test_a_target_of_any_unit_is_learned_evaluated_and_served_in_its_unit(
    file_store: ObstoreStore, unit: str, model: str
) -> None:
    dataset = _data(file_store, unit)
    _train(file_store, dataset, _spec(file_store, model))
    metrics = evaluate_run(file_store, "r").metrics
    assert metrics["r2"] > 0.6
    assert _disagreement(file_store, dataset) < 1e-3
    scale, _ = UNITS[unit]
    assert 0.05 < metrics["mae"] / scale < 1.5
    assert metrics["loss"] == pytest.approx(metrics["mse"] / dataset.features.target_scaling.scale[0] ** 2, rel=1e-4)


def test_losses_do_not_depend_on_the_unit(file_store: ObstoreStore) -> None:
    losses = [
        _train(file_store, _data(file_store, unit), _spec(file_store, run=unit)) for unit in ("prices", "fractions")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_without_scaling_a_price_is_not_learned(file_store: ObstoreStore) -> None:
    """The negative control of the test above, and the switch."""
    dataset = _data(file_store, "prices", "none")
    assert dataset.features.target_scaling is None
    _train(file_store, dataset, _spec(file_store))
    metrics = evaluate_run(file_store, "r").metrics
    assert metrics["r2"] < 0
    assert remark(metrics) == "r2 is below 0: worse than predicting the mean of the target"
    assert remark({"validation_r2": -0.1}) is not None
    assert remark({"r2": 0.0, "mse": 1.0}) is None
    assert _disagreement(file_store, dataset) < 1e-3
    assert load_bundle(file_store, export_run(file_store, "r").bundle_id).info.units is None


def test_a_constant_target_is_only_shifted(file_store: ObstoreStore) -> None:
    dataset = _data(file_store, "a constant")
    assert dataset.features.target_scaling == TargetScaling(shift=(7e6,), scale=(1.0,))
    _train(file_store, dataset, _spec(file_store))
    np.testing.assert_allclose(_served(file_store, dataset), 7e6, rtol=1e-5)


def _twice(scaling: TargetScaling | None, target: np.ndarray) -> np.ndarray:
    return scaled_target(scaling, scaled_target(scaling, target))


class _ConvertsTwice(TargetUnits):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return super().forward(super().forward(values))


@pytest.mark.parametrize("model", ["mlp", "svm"])
def test_a_target_that_is_scaled_twice_is_noticed(
    file_store: ObstoreStore, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    dataset = _data(file_store, "prices")
    monkeypatch.setattr(opening, "scaled_target", _twice)
    monkeypatch.setattr(classical_fit, "scaled_target", _twice)
    _train(file_store, dataset, _spec(file_store, model))
    assert _disagreement(file_store, dataset) > 0.1


@pytest.mark.parametrize("planted", [_ConvertsTwice, lambda scaling: torch.nn.Identity()])
def test_a_graph_that_converts_twice_or_never_does_not_pass_the_gate(
    file_store: ObstoreStore, monkeypatch: pytest.MonkeyPatch, planted: type[TargetUnits]
) -> None:
    dataset = _data(file_store, "prices")
    _train(file_store, dataset, _spec(file_store))
    monkeypatch.setattr(exporting, "TargetUnits", planted)
    with pytest.raises(GateError, match="the graph differs|The graph differs"):
        export_run(file_store, "r")


def test_the_bundle_names_the_conversion(file_store: ObstoreStore) -> None:
    dataset = _data(file_store, "prices")
    _train(file_store, dataset, _spec(file_store))
    units = load_bundle(file_store, export_run(file_store, "r").bundle_id).info.units
    assert units is not None
    assert units.model_dump() == dataset.features.target_scaling.model_dump()
    assert 2e5 < units.scale[0] < 3e5


def test_a_data_set_without_a_scale_is_read_as_it_was_stored(file_store: ObstoreStore) -> None:
    stored = Features(columns=(NumericColumn(name="a"),), task="regression", target="y")
    assert "target_scaling" not in stored.model_dump(mode="json"), "the digests of older data sets do not change"
    assert "target_scaling" not in DataSpec(uri="x", task="regression").model_dump(mode="json")
    dataset = _data(file_store, "prices", "none")
    ids = np.arange(3)
    assert (
        open_rows(dataset, "train").take(ids, ids).target.numpy().tolist() == dataset.read("train").target[:3].tolist()
    )


@pytest.mark.fault
def test_scaled_targets_train_the_same_on_every_layout(file_store: ObstoreStore) -> None:
    dataset = _data(file_store, "prices")
    spec = _spec(file_store).model_copy(update={"model": ModelSpec(name="mlp", params={"size": 4})})
    layouts = [MeshLayout(dp_replicate=2), MeshLayout(dp_shard=2), MeshLayout(pp=2), MeshLayout(tp=2)]
    compared = verify_layouts(spec, dataset.digest, layouts, steps=4)
    assert all(one.is_equal for one in compared), compared


@pytest.mark.parametrize(("unit", "is_warned"), [("prices", False), ("fractions", True)])
def test_initial_weights_of_another_scale_are_named(
    file_store: ObstoreStore, caplog: pytest.LogCaptureFixture, unit: str, is_warned: bool
) -> None:
    _train(file_store, _data(file_store, "prices"), _spec(file_store))
    check_run(_spec(file_store, run="next", init={"run": "r"}), _data(file_store, unit), file_store)
    assert ("the first predictions are in other units" in caplog.text) == is_warned


def test_a_folder_in_hugging_faces_format_has_no_place_for_the_conversion(
    file_store: ObstoreStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = _data(file_store, "prices")
    _train(file_store, dataset, _spec(file_store))
    monkeypatch.setattr("maas_ray.train.validation.hf_export.refuse_other", lambda net: None)
    with pytest.raises(ModelError, match="target_scaling: none"):
        export_hf(load_trained(file_store, "r"), file_store)
