"""The commands train, runs, evaluate and publish."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Group

from maas_ray.cli.class_views import class_views
from maas_ray.cli.options import (
    DEFAULT_STORE,
    Checkpoint,
    Endpoint,
    Set,
    StateDir,
    Store,
    Token,
    Weights,
    open_store,
    say_store,
)
from maas_ray.cli.publishing import begin_publishing, publish_version
from maas_ray.cli.reporting import CommandResult, uses_modules
from maas_ray.console.leaving import leaves
from maas_ray.console.output import facts, say, table
from maas_ray.console.training_bar import training_bar


@uses_modules
def train(
    spec: Annotated[Path, typer.Argument(help="YAML file with a TrainSpec; see `maas-ray schema train`.")],
    overrides: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an existing run.")] = False,
    extend: Annotated[
        str | None,
        typer.Option(
            metavar="epochs=N|steps=N",
            help="Continue an existing run, also a finished one, to this larger total length.",
        ),
    ] = None,
    wait_nodes: Annotated[int, typer.Option(help="Number of nodes to wait for before training.")] = 1,
    wait_timeout_s: Annotated[float, typer.Option(help="Timeout of --wait-nodes, in seconds.")] = 300.0,
    state_dir: StateDir = None,
) -> CommandResult:
    """Trains a run on the local cluster, or on the cluster of $RAY_ADDRESS."""
    from maas_ray import cluster
    from maas_ray.console.job import read_length
    from maas_ray.errors import ClusterError
    from maas_ray.spec import load_spec

    longer = None if extend is None else read_length(extend)
    leaves("no run was started; run the command again")
    with say.status("joining the cluster"):
        try:
            cluster.connect(state_dir=state_dir)
        except ClusterError:
            from maas_ray.train.spec.train import TrainSpec

            load_spec(TrainSpec, spec, overrides or ())  # errors of the spec are reported first
            raise
        from maas_ray.train.ranks.run_actor import start_run_actor

        actor = start_run_actor()  # before the spec and the data: its process takes 2 s to import Ray Train
        from maas_ray.train.run import run_training
        from maas_ray.train.spec.train import TrainSpec

        loaded = load_spec(TrainSpec, spec, overrides or ())
        say_store(loaded.storage)
        cluster.wait_for_nodes(wait_nodes, timeout_s=wait_timeout_s)
    leaves(
        f"committed checkpoints of run {loaded.run} are kept: continue with --resume, or without it if `maas-ray runs` "
        "does not list the run"
    )
    with training_bar(loaded.run) as show:
        result = run_training(loaded, resume=resume, extend=longer, on_progress=show, on_data=_say_data, actor=actor)
    shown = {
        "step": result.step,
        **({"ended by": result.reason} if result.reason else {}),
        **_shown(result.metrics),
        "checkpoint": f"step {result.checkpoint_step}",
        "store": loaded.storage.location,
        "TensorBoard": f"tensorboard --logdir {result.tensorboard}",
        **result.report,
        **{f"step {step} not validated": why for step, why in result.unvalidated.items()},
    }
    return CommandResult(asdict(result), facts(f"run {result.run} finished", shown))


def _say_data(lines: Sequence[str]) -> None:
    for line in lines:
        say.print(f"data: {line}", markup=False, soft_wrap=True)


def runs(store: Store = DEFAULT_STORE, endpoint: Endpoint = None) -> CommandResult:
    """Lists the runs of a store, newest first."""
    from maas_ray.train.records.runs import Runs

    found, damaged = Runs(open_store(store, endpoint)).survey()
    document = [
        {
            "run": run.id,
            "status": run.status,
            "step": run.step,
            "metrics": dict(run.metrics),
            "created_s": run.created_s,
            "data_digest": run.data_digest,
            "git_commit": run.git_commit,
            "error": run.error,
            "reason": run.reason,
            "unvalidated": run.unvalidated,
        }
        for run in found
    ]
    document += [{"run": run, "status": "damaged", "error": str(error)} for run, error in damaged.items()]
    rows: list[tuple[object, ...]] = [
        (
            run.id,
            run.status,
            run.step,
            _metrics(dict(run.metrics)),
            _time(run.created_s),
            _trouble(run.error, run.unvalidated),
        )
        for run in found
    ]
    rows += [(run, "damaged", None, "", "", str(error)) for run, error in damaged.items()]
    return CommandResult(document, table(store, ("run", "status", "step", "metrics", "created", "error"), rows))


def _trouble(error: str | None, unvalidated: Mapping[int, str]) -> str | None:
    """The error of a failed run, or the reason why some of its checkpoints have no validation metrics."""
    if error or not unvalidated:
        return error
    step, why = max(unvalidated.items())
    more = f" (nor {len(unvalidated) - 1} more)" if len(unvalidated) > 1 else ""
    return f"step {step} was not validated{more}: {why}"


@uses_modules
def evaluate(
    run: Annotated[str, typer.Argument(help="Id of the run.")],
    split: Annotated[Literal["train", "validation", "test"], typer.Option(help="Split to evaluate on.")] = "test",
    checkpoint: Checkpoint = None,
    weights: Weights = None,
    store: Store = DEFAULT_STORE,
    endpoint: Endpoint = None,
) -> CommandResult:
    """Evaluates a run's checkpoint on one split of its data, in this process."""
    with say.status("evaluating"):
        from maas_ray.train.records.checkpoint_selector import parse_which
        from maas_ray.train.validation.evaluate_run import evaluate_run

        evaluation = evaluate_run(open_store(store, endpoint), run, split, parse_which(checkpoint), weights)
    title = f"run {run}, step {evaluation.step}: {evaluation.num_rows} rows of {split}"
    return CommandResult(asdict(evaluation), Group(*class_views(title, _shown(evaluation.metrics), evaluation.classes)))


@uses_modules
def publish(
    run: Annotated[str, typer.Argument(help="Id of the run.")],
    name: Annotated[str, typer.Option(help="Name of the model that gets the new version.")],
    checkpoint: Checkpoint = None,
    weights: Weights = None,
    promote: Annotated[
        str | None, typer.Option(metavar="ALIAS", help="Also point this alias at the new version.")
    ] = None,
    token: Token = None,
    store: Store = DEFAULT_STORE,
    endpoint: Endpoint = None,
) -> CommandResult:
    """Exports a run's checkpoint to ONNX, compares both in the parity gate, publishes the next version of a model."""
    begin_publishing(name)
    opened = open_store(store, endpoint)
    with say.status("exporting"):
        from maas_ray.optimize.publish import export_run
        from maas_ray.train.records.checkpoint_selector import parse_which

        exported = export_run(opened, run, parse_which(checkpoint), weights=weights)
    version = publish_version(opened, name, exported.bundle_id, token=token, alias=promote)
    document = {
        **asdict(version),
        "promoted": promote,
        "parity": exported.info.parity,
        "metrics": exported.info.metrics,
    }
    shown = {
        "bundle": version.bundle,
        "run": version.run,
        "largest parity error": exported.info.parity.get("max_abs_error"),
        "metrics": _metrics(exported.info.metrics),
        **_remark(exported.info.metrics),
        "alias": promote or f"none yet: maas-ray promote {name} {version.version}",
    }
    return CommandResult(document, facts(f"published {name} version {version.version}", shown))


def _shown(metrics: dict[str, float]) -> dict[str, str]:
    return {**{name: f"{value:.4g}" for name, value in metrics.items()}, **_remark(metrics)}


def _remark(metrics: dict[str, float]) -> dict[str, str]:
    from maas_ray.train.spec.metrics import remark

    said = remark(metrics)
    return {} if said is None else {"note": said}


def _metrics(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
