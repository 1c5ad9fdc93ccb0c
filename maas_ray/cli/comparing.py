"""The commands compare and cv, which measure several runs."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType

from maas_ray.cli.options import DEFAULT_STORE, Endpoint, Set, StateDir, Store, open_store, say_store
from maas_ray.cli.reporting import CommandResult, uses_modules
from maas_ray.console.leaving import leaves
from maas_ray.console.output import say, table

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 40
"""Most characters of a curve on the terminal."""


def compare(
    runs: Annotated[list[str], typer.Argument(help="Ids of two or more runs.")],
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Metric whose curve is shown; may be repeated.", show_default="validation_loss and loss"),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Also draw the curves into this PNG file.")] = None,
    store: Store = DEFAULT_STORE,
    endpoint: Endpoint = None,
) -> CommandResult:
    """Compares runs: their newest metrics, the differences of their specs, and their curves."""
    from maas_ray.errors import SpecError
    from maas_ray.train.validation.compare import compare_runs, draw_comparison

    if png is not None and not png.parent.is_dir():
        raise SpecError(f"--png {png}: directory {png.parent.absolute()} does not exist; create it first")
    with say.status("reading the runs"):
        compared = compare_runs(open_store(store, endpoint), runs)
    there = list(dict.fromkeys(name for one in compared.runs for name in one.curves))
    for name in metric or ():
        if name not in there:
            raise SpecError(f"--metric {name}: no run has this curve; curves: {', '.join(there) or 'none'}")
    shown = list(metric or [name for name in ("validation_loss", "loss") if name in there])
    if png is not None:
        png.write_bytes(draw_comparison(compared, shown))
    names = list(dict.fromkeys(name for one in compared.runs for name in one.metrics))
    columns = ("", *(one.run for one in compared.runs))
    values = [(name, *(_number(one.metrics.get(name)) for one in compared.runs)) for name in names]
    facts = [("status", *(one.status for one in compared.runs)), ("step", *(one.step for one in compared.runs))]
    views: list[RenderableType] = [table("metrics", columns, [*facts, *values])]
    if compared.differences:
        rows = [(path, *(_short(value) for value in found)) for path, found in compared.differences.items()]
        views.append(table("differences of the specs", columns, rows))
    else:
        views.append("the specs do not differ")
    for name in shown:
        rows = [(one.run, *_curve(one.curves.get(name, []))) for one in compared.runs]
        views.append(table(name, ("run", "first", "curve", "last"), rows))
    document = {**asdict(compared), "png": str(png) if png else None}
    return CommandResult(document, Group(*views))


@uses_modules
def cv(
    spec: Annotated[Path, typer.Argument(help="YAML file with a TrainSpec; see `maas-ray schema train`.")],
    overrides: Set = None,
    folds: Annotated[int, typer.Option(help="Number of folds.", min=2, max=100)] = 5,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an existing cross-validation.")] = False,
    state_dir: StateDir = None,
) -> CommandResult:
    """Cross-validates a spec: trains a run for each fold, evaluates it on the fold, prints mean and spread.

    The folds are stratified, grouped or in order as `data.split` says. Their runs are `<run>-fold-0` and so on.
    """
    from maas_ray import cluster
    from maas_ray.spec import load_spec

    with say.status("preparing the folds"):
        from maas_ray.console.trial_progress import search_exit_code, trial_progress
        from maas_ray.train.search.cross_validation import cross_validate, fold_rows, fold_search
        from maas_ray.train.spec.train import TrainSpec

        loaded = load_spec(TrainSpec, spec, overrides or ())
        say_store(loaded.storage)
        search = fold_search(loaded, folds)  # errors of the split are reported before a cluster is needed
        cluster.connect(state_dir=state_dir)
    leaves(f"committed checkpoints of the folds of {loaded.run} are kept: continue with --resume")
    with trial_progress(search, folds, "folds") as show:
        result = cross_validate(loaded, folds, resume=resume, on_event=show)
    title = f"{folds}-fold cross-validation of {loaded.run}"
    if not result.is_complete:
        title += "; not all folds have finished: continue with --resume"
    columns, rows = fold_rows(result)
    return CommandResult(asdict(result), table(title, columns, rows), search_exit_code(result.is_complete))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _short(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _curve(pairs: Sequence[Sequence[float]]) -> tuple[str, str, str]:
    """The first value, the curve as bars, and the last value."""
    if not pairs:
        return "", "", ""
    values = [value for _, value in pairs]
    if len(values) > _WIDTH:
        places = [place * (len(values) - 1) // (_WIDTH - 1) for place in range(_WIDTH)]
        values = [values[place] for place in places]
    low, high = min(values), max(values)
    width = (high - low) or 1.0
    bars = "".join(_BARS[min(len(_BARS) - 1, int((value - low) / width * len(_BARS)))] for value in values)
    return f"{values[0]:.4g}", bars, f"{values[-1]:.4g}"
