"""The whole path, from data to predictions over HTTP, on one machine: a reader's start, and what `make quickstart` runs.

    data -> train (2 workers) -> checkpoint -> evaluate -> ONNX behind a parity gate -> registry -> HTTP -> predictions

Every step is one call of the library; on a cluster the same steps are jobs/train.py, evaluate.py and publish.py.
"""

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import requests
from rich.console import Console
from rich.table import Table

from maas_ray.cli.job import run_job
from maas_ray.cli.leaving import leaves
from maas_ray.cli.progress import training_bar
from maas_ray.cli.reporting import facts, say
from maas_ray.cluster import ClusterState, connect, disconnect, down, up
from maas_ray.errors import MaasError
from maas_ray.spec import load_spec

SPEC = Path(__file__).parent / "specs" / "digits.yaml"
MODEL = "digits"


def run_path(cluster: ClusterState, state_dir: Path | None, store_uri: str) -> dict[str, Any]:
    """Data, training, evaluation, export, publication, serving and prediction; returns the figures of each."""
    connect(state_dir=state_dir)
    # Only now: Ray reads the cluster's environment when its libraries are imported.
    from maas_ray.bundle.engine.engine import Engine
    from maas_ray.bundle.format import load_bundle
    from maas_ray.data.prepare import open_dataset
    from maas_ray.optimize.publish import export_run
    from maas_ray.registry.models import Registry
    from maas_ray.serve.deploy.pool import deploy
    from maas_ray.serve.spec.pools import ServeSpec
    from maas_ray.store.objects import open_store
    from maas_ray.train.run import run_training
    from maas_ray.train.spec.train import TrainSpec
    from maas_ray.train.validation.load_model import evaluate_run

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    store = open_store(store_uri)
    spec = load_spec(TrainSpec, SPEC, [f"storage.uri={store.uri}"])

    with training_bar(spec.run) as show:
        result = run_training(spec, on_progress=show)
    say.print(f"[green]trained[/] {result.step} steps, checkpoint {result.checkpoint_step} committed")

    evaluation = evaluate_run(store, spec.run)
    say.print(f"[green]evaluated[/] {evaluation.num_rows} held-out rows in PyTorch")

    exported = export_run(store, spec.run)
    say.print(
        f"[green]exported[/] bundle {exported.bundle_id}: ONNX equals PyTorch on {exported.info.parity['num_rows']} rows"
    )

    registry = Registry(store)
    version = registry.publish(MODEL, exported.bundle_id)
    registry.promote(MODEL, version.version)
    say.print(f"[green]published[/] {MODEL} version {version.version} and promoted it to production")

    serve_spec = ServeSpec.model_validate(
        {
            "storage": {"uri": store.uri},
            "profile": cluster.profile,
            "http": {"port": cluster.http_port},
            "pools": [{"models": [{"name": MODEL}]}],
        }
    )
    deploy(serve_spec)
    url = f"http://127.0.0.1:{cluster.http_port}/v2/models/{MODEL}/infer"
    say.print(f"[green]serving[/] {url}")

    held_out = open_dataset(store, result.data_digest).read("test")
    images = held_out.columns[0]
    by_engine = Engine(load_bundle(store, version.bundle)).run({"image": images})["class"]
    by_http, latencies_ms, headers = predict(url, images)
    return {
        "model": MODEL,
        "version": version.version,
        "run": result.run,
        "accuracy_pytorch": evaluation.metrics["accuracy"],
        "accuracy_onnx": float(np.mean(by_engine == held_out.target)),
        "accuracy_http": float(np.mean(by_http == held_out.target)),
        "num_rows": len(images),
        "max_parity_error": exported.info.parity["max_abs_error"],
        "latency_p50_ms": float(np.percentile(latencies_ms, 50)),
        "latency_p99_ms": float(np.percentile(latencies_ms, 99)),
        "header_x_maas_run": headers["x-maas-run"],
        "url": url,
        "store": store.uri,
        "dashboard": cluster.dashboard_url,
        "tensorboard": result.tensorboard,
        "metrics": metrics_file(cluster),
    }


def predict(url: str, images: np.ndarray) -> tuple[np.ndarray, list[float], Any]:
    """Sends each row as one request of its own, with a client that is not ours.

    Args:
        url: the model's infer endpoint (Open Inference Protocol v2).
        images: float32 [N, 1, 8, 8].

    Returns:
        Predicted classes [N], the milliseconds that each request took, and the headers of the last answer.
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
    """Where Ray lists its Prometheus endpoints, for a scraper's file_sd_config."""
    return str(Path(cluster.temp_dir) / "prom_metrics_service_discovery.json")


def table(figures: dict[str, Any]) -> Table:
    """The figures, for people."""
    return facts(
        f"{figures['model']} version {figures['version']}, {figures['num_rows']} held-out rows",
        {
            "accuracy in PyTorch": f"{figures['accuracy_pytorch']:.4f}",
            "accuracy in ONNX": f"{figures['accuracy_onnx']:.4f}",
            "accuracy over HTTP": f"{figures['accuracy_http']:.4f}",
            "largest parity error": f"{figures['max_parity_error']:.1e}",
            "latency p50 / p99, one row": f"{figures['latency_p50_ms']:.2f} / {figures['latency_p99_ms']:.2f} ms",
            "store": figures["store"],
            "Ray dashboard": figures["dashboard"],
            "TensorBoard logs": figures["tensorboard"],
            "Prometheus targets": figures["metrics"],
        },
    )


def call_example(figures: dict[str, Any]) -> str:
    """A shell command that predicts one blank image."""
    body = {"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": [0] * 64}]}
    return f"curl {figures['url']} -d '{json.dumps(body, separators=(',', ':'))}'"


def agree(figures: dict[str, Any]) -> bool:
    """Whether PyTorch, ONNX and HTTP predict equally well: the promise of the whole path."""
    return len({round(figures[f"accuracy_{where}"], 4) for where in ("pytorch", "onnx", "http")}) == 1


def main() -> int:
    """Runs the path on a cluster of its own; ends the cluster unless --keep was given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="leave the model served and say how to call it")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON line")
    arguments = parser.parse_args()
    leaves("the cluster was ended; its store is kept below .maas-ray/quickstart, and can be removed")
    home = Path(".maas-ray", "quickstart", time.strftime("%Y%m%d-%H%M%S")).absolute()
    state_dir = None if arguments.keep else home / "cluster"  # None: the one that `maas-ray` looks at
    try:
        with say.status("starting a local Ray cluster"):
            cluster = up(num_cpus=4, state_dir=state_dir)
        is_kept = False
        try:
            figures = run_path(cluster, state_dir, str(home / "store"))
            is_kept = arguments.keep  # what failed serves nothing: its cluster always ends
        finally:
            disconnect()
            if not is_kept:
                with say.status("stopping the cluster"):
                    down(state_dir=state_dir)
    except MaasError as error:
        say.print(f"[red]error[/]\\[{error.code}]: {error}")
        return 1
    if arguments.json:
        print(json.dumps(figures))
    else:
        Console().print(table(figures))
    if arguments.keep:
        text = (
            f"It goes on serving. Call it with\n  {call_example(figures)}\nand stop it with\n  .venv/bin/maas-ray down"
        )
        say.print(text, markup=False, soft_wrap=True)  # a command that is wrapped cannot be copied
    else:
        say.print("The cluster is stopped; `make quickstart KEEP=1` leaves it serving.")
    return 0 if agree(figures) else 1


if __name__ == "__main__":
    sys.exit(run_job(main))
