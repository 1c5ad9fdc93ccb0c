"""Callbacks: refusals before a run, calls during it, and the effect of a failing one."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from maas_ray.errors import SpecError, TrainingFailed
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.callbacks.base import RunContext
from maas_ray.train.callbacks.load import CallbackList, build_callbacks, check_callbacks
from maas_ray.train.callbacks.tensorboard import TensorBoard, location
from maas_ray.train.loop.progress import Progress
from maas_ray.train.records.training_log import TrainingLog
from maas_ray.train.spec.callbacks import CallbackSpec
from tests.support.following import Fails, Notes, events
from tests.support.paths import digits_spec

PLACE = "tests.support.following"


def context(store: ObstoreStore, run: str = "r", **more: Any) -> RunContext:
    spec = digits_spec(store.spec, run, tensorboard={"histograms_every": 1}, log_every=4)
    return RunContext(spec, store, 0, **more)


@pytest.mark.parametrize(
    ("path", "params", "message"),
    [
        ("mlfow", {}, "no callback 'mlfow'; did you mean 'mlflow'"),
        ("nowhere.at_all:Class", {}, "cannot be imported: ModuleNotFoundError"),
        (f"{PLACE}:Nobody", {}, "has no attribute 'Nobody'"),
        (f"{PLACE}:NoCallback", {}, "not a subclass of maas_ray.Callback"),
        (f"{PLACE}:Notes", {}, "missing 1 required positional argument: 'file'"),
        (f"{PLACE}:Notes", {"fiel": "a"}, "unexpected keyword argument 'fiel'"),
    ],
)
def test_a_callback_that_cannot_be_created_is_refused(path: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        check_callbacks([CallbackSpec(path=path, params=params)])


def test_callbacks_are_called_in_order_and_end_once(file_store: ObstoreStore, tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    specs = [CallbackSpec(path=f"{PLACE}:Notes", params={"file": str(file)}) for file in files]
    callbacks = build_callbacks(specs)
    callbacks.on_begin(context(file_store))
    callbacks.on_step(Progress(4, 9, 0.1, loss=1.0))
    callbacks.on_end("interrupted")
    callbacks.on_end("failed")
    for file in files:
        assert [one["event"] for one in events(file)] == ["begin", "step", "end"]
        assert events(file)[-1]["reason"] == "interrupted"


@pytest.mark.parametrize("method", ["on_begin", "on_step", "on_validation", "on_checkpoint"])
def test_a_callback_that_fails_is_named(file_store: ObstoreStore, tmp_path: Path, method: str) -> None:
    notes = Notes(str(tmp_path / "notes"))
    callbacks = CallbackList([notes, Fails(method)])
    calls = {
        "on_begin": lambda: callbacks.on_begin(context(file_store)),
        "on_step": lambda: callbacks.on_step(Progress(1, 9, 0.1, loss=1.0)),
        "on_validation": lambda: callbacks.on_validation(Progress(1, 9, 0.1, metrics={"loss": 1.0})),
        "on_checkpoint": lambda: callbacks.on_checkpoint(1, "runs/r"),
    }
    with pytest.raises(
        TrainingFailed, match=rf"{PLACE}:Fails failed in {method}: ZeroDivisionError: as planned"
    ) as caught:
        calls[method]()
    assert not caught.value.retryable, "the run is not tried again"


def test_a_callback_that_fails_at_the_end_leaves_the_others_theirs(file_store: ObstoreStore, tmp_path: Path) -> None:
    notes = Notes(str(tmp_path / "notes"))
    callbacks = CallbackList([Fails("on_end"), notes])
    callbacks.on_begin(context(file_store))
    callbacks.on_end("finished")
    assert [one["event"] for one in events(notes.file)] == ["begin", "end"]


def test_tensorboard_shows_histograms_and_late_metrics_at_their_own_step(file_store: ObstoreStore) -> None:
    def parameters() -> Iterator[tuple[str, Tensor, Tensor | None]]:
        yield "a", torch.tensor([[0.0, 1.0], [math.nan, -math.inf]]), torch.full((2,), math.nan)

    board, log = TensorBoard(), TrainingLog()
    board.on_begin(context(file_store, parameters=parameters))
    step = Progress(4, 9, 0.1, loss=1.0, lr=0.1)
    metrics = {"accuracy": 0.5, "auroc": math.nan}
    validated = Progress(8, 9, 0.2, metrics=metrics, of_step=4, samples="| row |\n| --- |")
    board.on_step(step)
    board.on_validation(validated)
    board.on_end("finished")
    for progress in (step, validated):
        log.add(progress)
    assert log.entries == [{"step": 4, "loss": 1.0, "lr": 0.1}, {"step": 4, "validation": {"accuracy": 0.5}}]
    found = EventAccumulator(location(file_store, "r")).Reload()
    assert found.Tags()["histograms"] == ["weights/a"], "a tensor without a finite value has no histogram"
    (shown,) = found.Histograms("weights/a")
    assert (shown.step, shown.histogram_value.num, shown.histogram_value.max) == (4, 2, 1.0)
    assert [event.step for event in found.Scalars("validation/accuracy")] == [4]
    assert [event.step for event in found.Tensors("validation/samples/text_summary")] == [4]


def follow(callbacks: CallbackList, store: ObstoreStore, first_step: int, reason: Any) -> None:
    spec = digits_spec(store.spec, "tracked")
    callbacks.on_begin(RunContext(spec, store, first_step))
    callbacks.on_step(Progress(first_step + 4, 9, 0.1, loss=1.0, lr=0.1))
    callbacks.on_validation(Progress(first_step + 4, 9, 0.1, metrics={"accuracy": 0.5}))
    callbacks.on_end(reason)


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")  # MLflow's own use of SQLAlchemy
def test_mlflow_continues_its_run(file_store: ObstoreStore, tmp_path: Path) -> None:
    tracking = pytest.importorskip("mlflow.tracking", reason="pip install 'maas-ray[mlflow]'")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for first_step, reason in ((0, "interrupted"), (4, "finished")):
        spec = CallbackSpec(path="mlflow", params={"tracking_uri": uri, "experiment": "e"})
        follow(build_callbacks([spec]), file_store, first_step, reason)
    client = tracking.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert (run.info.status, run.data.params["model.name"]) == ("FINISHED", "mlp")
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")] == [4, 8]
    assert run.data.metrics["validation_accuracy"] == 0.5


def test_wandb_writes_offline(file_store: ObstoreStore, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="pip install 'maas-ray[wandb]'")
    spec = CallbackSpec(path="wandb", params={"directory": str(tmp_path)})
    follow(build_callbacks([spec]), file_store, 0, "finished")
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb")), "wandb sync uploads these files"
    (summary,) = tmp_path.glob("wandb/offline-run-*/files/wandb-summary.json")
    shown = json.loads(summary.read_text())
    assert (shown["train/loss"], shown["validation/accuracy"], shown["validation/step"]) == (1.0, 0.5, 4)
