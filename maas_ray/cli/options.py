"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

StateDir = Annotated[
    Path | None,
    typer.Option(help="Where the local cluster is recorded.", envvar="MAAS_RAY_HOME", show_default="~/.maas-ray"),
]
Store = Annotated[
    str,
    typer.Option(help="Directory or URI of the store: s3://bucket/prefix, gs://…, az://….", envvar="MAAS_RAY_STORE"),
]
Endpoint = Annotated[
    str | None,
    typer.Option(help="URL of an S3-compatible service other than AWS.", envvar="MAAS_RAY_ENDPOINT"),
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=c", help="Overrides one field of the spec; may be repeated.")
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        "--checkpoint", "--step", metavar="newest|best|STEP", help="Which.", show_default="the spec's checkpoint.use"
    ),
]
Weights = Annotated[
    Literal["ema", "raw"] | None,
    typer.Option(help="The moving average of the weights, or themselves.", show_default="ema if the run keeps one"),
]
Token = Annotated[
    str | None,
    typer.Option(
        help="Says which publish this is: a repeat with the same token finds its version.",
        show_default="derived from model, bundle and run, so a bundle is one version of a model",
    ),
]
DEFAULT_STORE = ".maas-ray/store"
"""That of `StorageSpec`, which is imported late: `maas-ray --help` must not wait for it."""
APP_DIR_VARIABLE = "MAAS_RAY_APP_DIR"
"""That of cluster/connection.py, likewise."""


def open_store(store: str, endpoint: str | None) -> Any:
    """Opens the store that --store and --endpoint name."""
    from maas_ray.store import objects

    return objects.open_store(objects.StorageSpec(uri=store, endpoint=endpoint))
