"""All commands in one list. Importing this starts nothing and needs neither torch nor Ray."""

from collections.abc import Callable

import typer

from maas_ray.cli import checkpoints, cluster, parallel, serving, store, training, tuning
from maas_ray.cli.reporting import Answer, reported

app = typer.Typer(
    help="Model as a Service on Ray: from data to a served HTTP endpoint, each step proven.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

PANELS: dict[str, tuple[Callable[..., Answer], ...]] = {
    "Cluster": (cluster.up, cluster.down, cluster.status, cluster.doctor),
    "Make": (training.train, training.runs, training.evaluate, training.publish, store.import_),
    "Tune": (tuning.tune, tuning.lr_range),
    "Serve": (store.promote, store.models, serving.serve, serving.unserve, serving.predict),
    "Care": (parallel.verify_parallel, store.fsck, store.schema),
}

app.command(rich_help_panel="Start here")(cluster.quickstart)
for panel, commands in PANELS.items():
    for command in commands:
        name = command.__name__.rstrip("_").replace("_", "-")  # `import_`: the word itself belongs to Python
        app.command(name, rich_help_panel=panel)(reported(command))
app.add_typer(checkpoints.app, name="checkpoints", rich_help_panel="Care")
