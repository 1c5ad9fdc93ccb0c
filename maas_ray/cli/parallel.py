"""The command verify-parallel, which tests whether a model trains the same on every layout."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from maas_ray.cli.options import Set, StateDir, say_store
from maas_ray.cli.reporting import CommandResult, uses_modules
from maas_ray.console.leaving import leaves
from maas_ray.console.output import say, table


@uses_modules
def verify_parallel(
    spec: Annotated[Path, typer.Argument(help="YAML file with a TrainSpec.")],
    overrides: Set = None,
    max_ranks: Annotated[
        int, typer.Option(min=2, max=64, help="Largest number of ranks of a layout; they share this machine's CPUs.")
    ] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Number of optimizer steps to compare.")] = 4,
    state_dir: StateDir = None,
) -> CommandResult:
    """Trains a few steps in float64, in one process and on every layout, and compares; exit code 1 if they differ or fail.

    It compares losses, gradient norms and all weights; a difference above 1e-8 is an error, not rounding.
    """
    from maas_ray import cluster
    from maas_ray.spec import load_spec

    leaves("no run was created; run the command again")
    with say.status("preparing the data"):
        from maas_ray.data.prepare import prepare
        from maas_ray.store.objects import open_store
        from maas_ray.train.spec.train import TrainSpec

        loaded = load_spec(TrainSpec, spec, overrides or ())
        say_store(loaded.storage)
        store = open_store(loaded.storage)
        loaded = loaded.model_copy(update={"storage": loaded.storage.model_copy(update={"uri": store.uri})})
        cluster.connect(state_dir=state_dir)
        dataset = prepare(loaded.data, store)
        from maas_ray.train.verify import TOLERANCE, Compared, failures, layouts_for, verify_layouts

        layouts = layouts_for(loaded, dataset, max_ranks)

    def show(one: Compared) -> None:
        outcome = f"not supported: {one.refused}" if one.refused else "equal" if one.is_equal else "DIFFERS"
        say.print(f"{one.layout}: {f'FAILED: {one.error}' if one.error else outcome}")

    with say.status(f"comparing {len(layouts)} layouts"):
        compared = verify_layouts(loaded, dataset.digest, layouts, steps=steps, on_compared=show)
    wrong = failures(compared)
    rows = [
        (
            one.layout,
            *map(_figure, (one.loss, one.gradient_norm, one.parameters)),
            one.refused or one.error or _verdict(one.is_equal),
        )
        for one in compared
    ]
    document: dict[str, Any] = {
        "tolerance": TOLERANCE,
        "steps": steps,
        "layouts": [{**asdict(one), "is_equal": one.is_equal} for one in compared],
        "num_different": sum(one.error is None for one in wrong),
        "num_failed": sum(one.error is not None for one in wrong),
    }
    title = f"{loaded.model.name}, {steps} steps in float64: largest differences from the training in one process"
    return CommandResult(
        document, table(title, ("layout", "loss", "gradient norm", "weights", ""), rows), int(bool(wrong))
    )


def _figure(value: float) -> str:
    return "" if value != value else f"{value:.1e}"


def _verdict(is_equal: bool) -> str:
    return "equal" if is_equal else "differs"
