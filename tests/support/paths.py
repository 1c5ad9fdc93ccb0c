"""Steps of the whole path that several tests share: a small spec, serving a model, asking it over HTTP."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from maas_ray.serve.deploy.pool import deploy, undeploy
from maas_ray.serve.spec.serve import ServeSpec
from maas_ray.store.objects import ObstoreStore, StorageSpec
from maas_ray.train.loop.progress import Progress
from maas_ray.train.run import RunResult
from maas_ray.train.spec.train import TrainSpec
from tests.support.table import Table


def digits_spec(storage: StorageSpec, run: str, **changes: Any) -> TrainSpec:
    """Half a minute of training on real scans, two workers, dropout on."""
    fields: dict[str, Any] = {
        "run": run,
        "model": {"name": "mlp", "params": {"size": 1, "dropout": 0.2}},
        "data": {"uri": "sklearn:digits", "task": "classification", "cleaning": {"tensor": {"scaling": "min_max"}}},
        "optimizer": {"lr": 0.01},
        "epochs": 8,
        "workers": {"count": 2},
        "export_check": "off",
        "storage": storage.model_dump(),
    }
    return TrainSpec.model_validate({**fields, **changes})


STEPS = 240


def table_spec(storage: StorageSpec, run: str, table: Table, **changes: Any) -> TrainSpec:
    """A run of `STEPS` steps whose every loss is logged: two workers, dropout on, an average of its weights."""
    fields: dict[str, Any] = {
        "data": table.data,
        "epochs": None,
        "steps": STEPS,
        "log_every": 1,
        "checkpoint": {"every_steps": 80},
        "ema": {"decay": 0.9},
        "seed": 5,
    }
    return digits_spec(storage, run, **{**fields, **changes})


@dataclass(frozen=True)
class FinishedRun:
    """A run of `table_spec` on a real cluster that nothing disturbed."""

    table: Table
    spec: TrainSpec
    store: ObstoreStore
    result: RunResult
    reports: Sequence[Progress]
    notes: Path
    """The file of the callback `Notes`."""


@contextmanager
def served(storage: StorageSpec, model: str, http_port: int) -> Iterator[str]:
    """Deploys a pool with one model; gives its infer URL, and removes the pool afterwards."""
    spec = ServeSpec.model_validate(
        {
            "storage": storage.model_dump(),
            "http": {"port": http_port},
            "pools": [{"name": f"pool-{model}", "route_prefix": f"/{model}", "models": [{"name": model}]}],
        }
    )
    deploy(spec)
    try:
        yield f"http://127.0.0.1:{http_port}/{model}/v2/models/{model}/infer"
    finally:
        undeploy([f"pool-{model}"])


def infer(url: str, inputs: list[Mapping[str, Any]]) -> tuple[dict[str, list[Any]], Mapping[str, str]]:
    """One request; returns each output's flat data and the headers."""
    answer = requests.post(url, json={"inputs": inputs}, timeout=60)
    assert answer.status_code == 200, answer.text
    return {output["name"]: output["data"] for output in answer.json()["outputs"]}, answer.headers
