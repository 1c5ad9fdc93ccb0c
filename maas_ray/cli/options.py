"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from maas_ray.store.location import ENDPOINT_VARIABLE, FALLBACK, STORE_VARIABLE

StateDir = Annotated[
    Path | None,
    typer.Option(help="Directory of the local cluster's state.", envvar="MAAS_RAY_HOME", show_default="~/.maas-ray"),
]
Store = Annotated[
    str,
    typer.Option(help="Directory or URI of the store: s3://bucket/prefix, gs://…, az://….", envvar=STORE_VARIABLE),
]
Endpoint = Annotated[
    str | None,
    typer.Option(help="URL of an S3-compatible service other than AWS.", envvar=ENDPOINT_VARIABLE),
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=c", help="Override one field of the spec; repeatable.")
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        "--step",
        metavar="newest|best|STEP",
        help="Checkpoint to use.",
        show_default="the spec's checkpoint.use",
    ),
]
Weights = Annotated[
    Literal["ema", "raw"] | None,
    typer.Option(
        help="ema: the moving average of the weights; raw: the weights.", show_default="ema if the run keeps it"
    ),
]
Token = Annotated[
    str | None,
    typer.Option(
        help="Idempotency token: a repeated publish with the same token returns the version of the first one.",
        show_default="derived from model, bundle and run, so a bundle is one version of a model",
    ),
]
DEFAULT_STORE = FALLBACK
APP_DIR_VARIABLE = "MAAS_RAY_APP_DIR"
"""Equal to the constant in cluster/connection.py, whose import would slow down `maas-ray --help`."""


def open_store(store: str, endpoint: str | None) -> Any:
    """Opens the store of --store and --endpoint, and says which one it is."""
    from maas_ray.store import objects

    storage = objects.StorageSpec(uri=store, endpoint=endpoint)
    say_store(storage)
    return objects.open_store(storage)


def say_store(storage: Any) -> None:
    """Prints the location of a `StorageSpec` on stderr: the wrong store looks like an empty one."""
    from maas_ray.console.output import say

    say.print(f"store {storage.location}", markup=False, soft_wrap=True)
