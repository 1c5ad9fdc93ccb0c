"""All commands in one list. Importing this starts nothing and needs neither torch nor Ray."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from maas_ray.addresses import exempt_from_proxies
from maas_ray.cli import checkpoints, cluster, parallel, serving, store, training, tuning
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
            help="Where modules lie that specs name by import path (`model: {name: my_nets:Net}`).",
            show_default="the working directory",
            exists=True,
            file_okay=False,
        ),
    ] = Path("."),
) -> None:
    """Model as a Service on Ray: from data to a served HTTP endpoint, each step proven."""
    exempt_from_proxies(os.environ)
    # Looked into by the commands that need it alone, and last: see `uses_modules`.
    os.environ[APP_DIR_VARIABLE] = str(app_dir.resolve())


PANELS: dict[str, tuple[Callable[..., CommandResult], ...]] = {
    "Cluster": (cluster.up, cluster.down, cluster.status, cluster.doctor),
    "Make": (training.train, training.runs, training.evaluate, training.publish, store.import_),
    "Tune": (tuning.tune, tuning.lr_range),
    "Serve": (store.promote, store.models, serving.serve, serving.unserve, serving.predict),
    "Care": (parallel.verify_parallel, store.fsck, store.compact, store.schema),
}

app.command(rich_help_panel="Start here")(cluster.quickstart)
for panel, commands in PANELS.items():
    for command in commands:
        name = command.__name__.rstrip("_").replace("_", "-")  # `import_`: the word itself belongs to Python
        app.command(name, rich_help_panel=panel)(reported(command))
app.add_typer(checkpoints.app, name="checkpoints", rich_help_panel="Care")
