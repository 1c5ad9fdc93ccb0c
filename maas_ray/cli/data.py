"""The command data, which shows a data set before any training."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType

from maas_ray.cli.options import Set
from maas_ray.cli.reporting import CommandResult
from maas_ray.console.output import say, table


def data(
    spec: Annotated[Path, typer.Argument(help="YAML file with a TrainSpec; see `maas-ray schema train`.")],
    overrides: Set = None,
    html: Annotated[Path | None, typer.Option(help="Also write the overview as one HTML page to this file.")] = None,
) -> CommandResult:
    """Shows the data of a spec as a training would read it; exit code 1 if a training would refuse it.

    By column: its kind and how that was decided, missing values, distribution, outliers, identifiers and constants, and
    whether it may contain the target. Reads the first 256 MiB of a large data set; needs no cluster and stores nothing.
    """
    from maas_ray.errors import SpecError
    from maas_ray.spec import load_spec
    from maas_ray.train.spec.train import TrainSpec

    if html is not None and not html.parent.is_dir():
        raise SpecError(f"--html {html}: directory {html.parent.absolute()} does not exist; create it first")
    loaded = load_spec(TrainSpec, spec, overrides or ())
    with say.status("reading the data"):
        from maas_ray.data.overview.examine import examine
        from maas_ray.data.overview.page import write_page

        found = examine(loaded.data)
    if html is not None:
        html.write_text(write_page(found), encoding="utf-8")
    document: dict[str, Any] = {**asdict(found), "html": str(html) if html else None}
    return CommandResult(document, _view(found), int(bool(found.problems)), holds_data=True)


def _view(found: Any) -> RenderableType:
    rows = [
        (
            one.name,
            one.kind or "refused",
            one.reason if one.kind else "",
            one.missing + one.unconvertible,
            "" if one.figures is None else one.figures.distinct,
            "" if one.figures is None else one.figures.summary,
            "; ".join([*one.notes, *([f"may contain the target: {one.leak}"] if one.leak else [])]),
        )
        for one in found.columns
    ]
    scope = "rows" if found.is_whole else "rows at the beginning"
    title = f"{found.uri}: {found.num_rows} {scope}, task {found.task}"
    views: list[RenderableType] = [
        table(title, ("column", "kind", "because", "missing", "distinct", "values", "notes"), rows)
    ]
    if found.target_figures is not None:
        lost = found.target_missing + found.target_unconvertible
        target = [(found.target, found.target_figures.distinct, lost, found.target_figures.summary)]
        views.append(table("target", ("column", "distinct", "missing", "values"), target))
    if found.left_out:
        views.append(table("left out", ("what", "because"), list(found.left_out.items())))
    if found.problems:
        views.append(table("a training refuses this data", ("why",), [(problem,) for problem in found.problems]))
    return Group(*views)
