"""The commands tune and lr-range, which find values for fields of a spec."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Group

from maas_ray.cli.options import Set, StateDir, say_store
from maas_ray.cli.reporting import CommandResult, uses_modules
from maas_ray.console.leaving import leaves
from maas_ray.console.output import say, table
from maas_ray.errors import SpecError

_ROWS = 20
"""Approximate number of steps of a range test that are shown."""


@uses_modules
def tune(
    spec: Annotated[Path, typer.Argument(help="YAML file with a TuneSpec; see `maas-ray schema tune`.")],
    overrides: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an existing search.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="File for the best spec, for `maas-ray train`.", show_default="<search>-best.yaml"),
    ] = None,
    state_dir: StateDir = None,
) -> CommandResult:
    """Searches for the best values of fields of a training spec; each trial is a run that the cluster trains."""
    from maas_ray import cluster
    from maas_ray.train.search.spec import load_tune_spec

    loaded = load_tune_spec(spec, overrides or ())
    target = output or Path(f"{loaded.name}-best.yaml")
    _refuse_nowhere(target)
    with say.status("preparing the search"):
        from maas_ray.console.trial_progress import search_exit_code, trial_progress
        from maas_ray.train.search.run import run_search
        from maas_ray.train.search.space import draw_trials

        trials = draw_trials(loaded)  # errors of the space are reported before a cluster is needed
        num_trials = len(trials)
        say_store(trials[0].spec.storage)
        cluster.connect(state_dir=state_dir)
    leaves(f"committed checkpoints of the trials of {loaded.name} are kept: continue with --resume")
    with trial_progress(loaded, num_trials, "trials") as show:
        result = run_search(loaded, resume=resume, on_event=show)
    written = None
    if result.best_spec is not None and result.best is not None:
        written = target
        written.write_text(
            f"# Values of {result.best.run}: {result.metric} {result.best.value:.6g} after {result.best.step} steps.\n"
            + yaml.safe_dump(result.best_spec, sort_keys=False)
        )
    names = list(loaded.search)
    rows = [
        (
            one.run,
            *(one.fields[name] for name in names),
            "" if one.value is None else f"{one.value:.4g}",
            one.step,
            one.error or one.status,
        )
        for one in result.trials
    ]
    title = f"search {result.search}: "
    if result.best is None:
        title += "no trial has finished"
    else:
        title += f"best {result.best.run} by {result.metric}, see {written}"
    if result.num_waiting:
        title += f"; {result.num_waiting} of {num_trials} trials are unfinished: continue with --resume"
    document = {**asdict(result), "best_spec_path": str(written) if written else None}
    columns = ("run", *_short(names), result.metric.removeprefix("validation_"), "step", "")
    return CommandResult(document, table(title, columns, rows), search_exit_code(result.is_complete))


def _short(paths: list[str]) -> list[str]:
    """Shortens `optimizer.lr` to `lr` if no other field has the same last part: a terminal is narrow."""
    last = [path.rpartition(".")[2] for path in paths]
    return [name if last.count(name) == 1 else path for name, path in zip(last, paths, strict=True)]


@uses_modules
def lr_range(
    spec: Annotated[Path, typer.Argument(help="YAML file with a TrainSpec.")],
    overrides: Set = None,
    low: Annotated[float, typer.Option(help="First learning rate.")] = 1e-6,
    high: Annotated[float, typer.Option(help="Last learning rate.")] = 10.0,
    steps: Annotated[int, typer.Option(help="Number of optimizer steps.")] = 100,
    smoothing: Annotated[
        float, typer.Option(help="Weight of the earlier steps in the smoothed loss, in [0, 1).")
    ] = 0.9,
    output: Annotated[
        Path | None, typer.Option(help="Also write all steps to this file: as CSV if it ends in .csv, else as JSON.")
    ] = None,
    state_dir: StateDir = None,
) -> CommandResult:
    """Proposes a learning rate after a few steps with a rising one (Smith 2015); exit code 1 if none is found.

    One process on this machine trains from the initial weights of the run; no run is created.
    """
    from maas_ray import cluster
    from maas_ray.spec import load_spec

    leaves("no run was created; run the command again")
    if output is not None:
        _refuse_nowhere(output)
    with say.status("preparing the data"):
        from maas_ray.data.prepare import prepare
        from maas_ray.store.objects import open_store
        from maas_ray.train.spec.train import TrainSpec

        loaded = load_spec(TrainSpec, spec, overrides or ())
        say_store(loaded.storage)
        cluster.connect(state_dir=state_dir)
        dataset = prepare(loaded.data, open_store(loaded.storage))
        from maas_ray.train.lr_range import Point, find_learning_rates

    with say.status("training") as status:

        def show(point: Point) -> None:
            status.update(f"step {point.step} of {steps}: rate {point.lr:.2g}, loss {point.smoothed:.4g}")

        found = find_learning_rates(
            loaded, dataset.digest, low=low, high=high, steps=steps, smoothing=smoothing, on_point=show
        )
    document = {"proposed": found.below_minimum, **asdict(found)}
    if output is not None:
        output.write_text(_csv(document["points"]) if output.suffix == ".csv" else json.dumps(document))
    every = max(1, len(found.points) // _ROWS)
    rows = [
        (point.step, f"{point.lr:.2e}", f"{point.loss:.4g}", f"{point.smoothed:.4g}") for point in found.points[::every]
    ]
    proposal = (
        "no learning rate is proposed"
        if found.below_minimum is None
        else f"proposed: optimizer.lr {found.below_minimum}"
    )
    view = Group(
        table("learning-rate range test (Smith 2015)", ("step", "rate", "loss", "smoothed"), rows),
        f"{proposal}, a tenth of the rate with the lowest loss; the loss falls fastest at {found.steepest}"
        if found.steepest is not None
        else proposal,
        found.remark,
    )
    return CommandResult(document, view, int(found.below_minimum is None))


def _refuse_nowhere(output: Path) -> None:
    """Raises `SpecError` if the directory of `output` does not exist; called before the training, not after it."""
    if not output.parent.is_dir():
        raise SpecError(f"--output {output}: directory {output.parent.absolute()} does not exist; create it first")


def _csv(points: list[dict[str, Any]]) -> str:
    names = ("step", "lr", "loss", "smoothed")
    return "\n".join([",".join(names), *(",".join(str(point[name]) for name in names) for point in points), ""])
