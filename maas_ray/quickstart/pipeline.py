"""The complete pipeline on one machine, from data to predictions over HTTP, as run by `maas-ray quickstart`.

    data -> train (2 workers) -> checkpoint -> evaluate -> ONNX behind a parity gate -> registry -> HTTP -> predictions

Every step is one call of the Python API; on a cluster the same steps are jobs/train.py, evaluate.py and publish.py.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import requests
from rich.console import Console
from rich.table import Table

import maas_ray
from maas_ray.cluster import ClusterState, down, up
from maas_ray.console.leaving import leaves
from maas_ray.console.output import facts, say
from maas_ray.console.training_bar import training_bar
from maas_ray.errors import MaasError

MODEL = "digits"
RUN: dict[str, Any] = {
    "run": "digits",
    "model": {"name": "convnet", "params": {"size": 2, "dropout": 0.1}},
    "data": {
        "uri": "sklearn:digits",
        "task": "classification",
        "split": {"validation": 0.1, "test": 0.2},
        "cleaning": {"tensor": {"scaling": "min_max"}},
    },
    "optimizer": {"name": "adamw", "lr": 0.003},
    "schedule": {"name": "cosine", "warmup_steps": 20},
    "batch": {"global_size": 64},
    "epochs": 12,
    "workers": {"count": 2},
    "checkpoint": {"keep_last": 2},
}
"""Scikit-learn's 1,797 scans of handwritten digits, 8 x 8 pixels each."""


def run_path(cluster: ClusterState, state_dir: Path | None, store_uri: str) -> dict[str, Any]:
    """Runs all steps, from data and training to serving and prediction; returns the metrics of each step."""
    maas_ray.connect(state_dir=state_dir)
    # Imported late: Ray's libraries read the cluster's environment at import.
    from maas_ray.bundle.engine.engine import Engine
    from maas_ray.bundle.format import load_bundle
    from maas_ray.data.prepare import open_dataset
    from maas_ray.ray_internals.serve import log_only_warnings
    from maas_ray.registry.models import Registry

    log_only_warnings()
    store = maas_ray.open_store(store_uri)

    with training_bar(RUN["run"]) as show:
        run = maas_ray.train({**RUN, "storage": {"uri": store.uri}}, on_progress=show)
    say.print(f"[green]trained[/] {run.step} steps, checkpoint {run.checkpoints[-1].step} committed")

    evaluation = run.evaluate()
    say.print(f"[green]evaluated[/] {evaluation.num_rows} held-out rows in PyTorch")

    version = run.publish(MODEL, alias="production")
    info = Registry(store).info(version)
    say.print(f"[green]exported[/] bundle {version.bundle}: ONNX equals PyTorch on {info.parity['num_rows']} rows")
    say.print(f"[green]published[/] {MODEL} version {version.version} and promoted it to production")

    pool = maas_ray.serve(
        {
            "storage": {"uri": store.uri},
            "profile": cluster.profile,
            "http": {"port": cluster.http_port},
            "pools": [{"models": [{"name": MODEL}]}],
        }
    )
    url = f"{pool.url}/v2/models/{MODEL}/infer"
    say.print(f"[green]serving[/] {url}")

    held_out = open_dataset(store, info.lineage.data_digest).read("test")
    images = held_out.columns[0]
    by_engine = Engine(load_bundle(store, version.bundle)).run({"image": images})["class"]
    by_http, latencies_ms, headers = predict(url, images)
    return {
        "model": MODEL,
        "version": version.version,
        "run": run.id,
        "accuracy_pytorch": evaluation.metrics["accuracy"],
        "accuracy_onnx": float(np.mean(by_engine == held_out.target)),
        "accuracy_http": float(np.mean(by_http == held_out.target)),
        "num_rows": len(images),
        "max_parity_error": info.parity["max_abs_error"],
        "latency_p50_ms": float(np.percentile(latencies_ms, 50)),
        "latency_p99_ms": float(np.percentile(latencies_ms, 99)),
        "header_x_maas_run": headers["x-maas-run"],
        "url": url,
        "store": store.uri,
        "dashboard": cluster.dashboard_url,
        "tensorboard": run.tensorboard,
        "metrics": metrics_file(cluster),
    }


def predict(url: str, images: np.ndarray) -> tuple[np.ndarray, list[float], Any]:
    """Sends each row as a separate request, with a client other than ours.

    Args:
        url: the model's infer endpoint (Open Inference Protocol v2).
        images: float32 [N, 1, 8, 8].

    Returns:
        Predicted classes [N], the latency of each request in milliseconds, and the headers of the last response.
    """
    classes, latencies_ms = [], []
    with requests.Session() as session:
        for image in images:
            tensor = {"name": "image", "datatype": "FP32", "shape": [1, *image.shape], "data": image.ravel().tolist()}
            started = time.perf_counter()
            answer = session.post(url, json={"inputs": [tensor]}, timeout=30)
            latencies_ms.append(1000 * (time.perf_counter() - started))
            answer.raise_for_status()
            outputs = {output["name"]: output["data"] for output in answer.json()["outputs"]}
            classes.append(outputs["class"][0])
    return np.array(classes), latencies_ms, answer.headers


def metrics_file(cluster: ClusterState) -> str:
    """Path of the file in which Ray lists its Prometheus endpoints, for `file_sd_config` of Prometheus."""
    return str(Path(cluster.temp_dir) / "prom_metrics_service_discovery.json")


def table(metrics: dict[str, Any]) -> Table:
    """A readable table of the metrics."""
    return facts(
        f"{metrics['model']} version {metrics['version']}, {metrics['num_rows']} held-out rows",
        {
            "accuracy in PyTorch": f"{metrics['accuracy_pytorch']:.4f}",
            "accuracy in ONNX": f"{metrics['accuracy_onnx']:.4f}",
            "accuracy over HTTP": f"{metrics['accuracy_http']:.4f}",
            "largest parity error": f"{metrics['max_parity_error']:.1e}",
            "latency p50 / p99, one row": f"{metrics['latency_p50_ms']:.2f} / {metrics['latency_p99_ms']:.2f} ms",
            "store": metrics["store"],
            "Ray dashboard": metrics["dashboard"],
            "TensorBoard logs": metrics["tensorboard"],
            "Prometheus targets": metrics["metrics"],
        },
    )


def call_example(metrics: dict[str, Any]) -> str:
    """A shell command that requests the prediction for one blank image."""
    body = {"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": [0] * 64}]}
    return f"curl {metrics['url']} -d '{json.dumps(body, separators=(',', ':'))}'"


def agree(metrics: dict[str, Any]) -> bool:
    """Whether the accuracies in PyTorch, in ONNX and over HTTP are equal."""
    return len({round(metrics[f"accuracy_{where}"], 4) for where in ("pytorch", "onnx", "http")}) == 1


def quickstart(keep: bool, as_json: bool) -> int:
    """Runs the pipeline on a new local cluster, which ends afterwards unless `keep` is set.

    Args:
        keep: keep the cluster running and the model served; print how to call it.
        as_json: print the metrics as one JSON line.

    Returns:
        The exit code.
    """
    leaves("the cluster has ended; its store remains in .maas-ray/quickstart and can be removed")
    home = Path(".maas-ray", "quickstart", time.strftime("%Y%m%d-%H%M%S")).absolute()
    state_dir = None if keep else home / "cluster"  # None: the default directory of `maas-ray`
    try:
        with say.status("starting a local Ray cluster"):
            cluster = up(num_cpus=4, state_dir=state_dir)
        is_kept = False
        try:
            metrics = run_path(cluster, state_dir, str(home / "store"))
            is_kept = keep  # after a failure nothing is served: the cluster always ends
        finally:
            maas_ray.disconnect()
            if not is_kept:
                with say.status("stopping the cluster"):
                    down(state_dir=state_dir)
    except MaasError as error:
        say.print(f"[red]error[/]\\[{error.code}]: {error}")
        return 1
    if as_json:
        sys.stdout.write(f"{json.dumps(metrics)}\n")
    else:
        Console().print(table(metrics))
    program = os.path.relpath(Path(sys.executable).with_name("maas-ray"))
    if keep:
        text = f"The model is served. Call it with\n  {call_example(metrics)}\nStop the cluster with\n  {program} down"
        say.print(text, markup=False, soft_wrap=True)  # a wrapped command cannot be copied
    else:
        say.print(f"The cluster has stopped; `{program} quickstart --keep` keeps it running.")
    return 0 if agree(metrics) else 1


def main() -> int:
    """Parses the options of jobs/pipeline.py and runs the pipeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="keep the model served and print how to call it")
    parser.add_argument("--json", action="store_true", help="print the metrics as one JSON line")
    arguments = parser.parse_args()
    return quickstart(arguments.keep, arguments.json)
