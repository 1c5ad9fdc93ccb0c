"""Callbacks that follow a run, as its spec names them."""

from typing import Any

from pydantic import Field

from maas_ray.spec import Spec


class CallbackSpec(Spec):
    """A callback: a subclass of `maas_ray.Callback`, created on rank 0 for each attempt of the run."""

    path: str = Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*(:[A-Za-z_][A-Za-z0-9_.]*)?$", max_length=200)
    """`package.module:Class`, or `mlflow` or `wandb`."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Arguments of its constructor."""
