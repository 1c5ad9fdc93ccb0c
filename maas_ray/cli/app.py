"""The commands of `maas-ray`, in groups. Importing this module starts nothing and needs neither torch nor Ray."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from maas_ray.addresses import exempt_from_proxies
from maas_ray.cli import checkpoints, cluster, comparing, data, parallel, serving, store, training, tuning
from maas_ray.cli.options import APP_DIR_VARIABLE
from maas_ray.cli.reporting import CommandResult, reported

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def find_modules(
    app_dir: Annotated[
        Path,
        typer.Option(
            envvar=APP_DIR_VARIABLE,
            help="Directory of the modules that specs name by import path (`model: {name: my_nets:Net}`).",
            show_default="the working directory",
            exists=True,
            file_okay=False,
        ),
    ] = Path("."),
) -> None:
    """Model as a Service on Ray: from data to a served HTTP endpoint; every step is verified."""
    exempt_from_proxies(os.environ)
    # Only the commands that need it search it, after every other directory: see `uses_modules`.
    os.environ[APP_DIR_VARIABLE] = str(app_dir.resolve())


PANELS: dict[str, tuple[Callable[..., CommandResult], ...]] = {
    "Cluster": (cluster.up, cluster.down, cluster.status, cluster.doctor),
    "Train": (
        data.data,
        training.train,
        tuning.tune,
        tuning.lr_range,
        comparing.cv,
        training.runs,
        training.evaluate,
        comparing.compare,
    ),
    "Publish": (training.publish, store.import_, store.promote, store.models),
    "Serve": (serving.serve, serving.unserve, serving.predict),
    "Verify": (parallel.verify_parallel, store.fsck, store.compact, store.schema),
}

app.command(rich_help_panel="Cluster")(cluster.quickstart)
for panel, commands in PANELS.items():
    for command in commands:
        name = command.__name__.rstrip("_").replace("_", "-")  # `import_`: `import` is a Python keyword
        app.command(name, rich_help_panel=panel)(reported(command))
app.add_typer(checkpoints.app, name="checkpoints", rich_help_panel="Train")
