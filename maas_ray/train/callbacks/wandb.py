"""Weights & Biases: metrics and configuration of a run, offline by default."""

from typing import Any, Literal

from maas_ray.errors import SpecError
from maas_ray.train.callbacks.base import Callback, EndReason, RunContext
from maas_ray.train.loop.progress import Progress


class WandB(Callback):
    """Logs to Weights & Biases (`pip install 'maas-ray[wandb]'`). A run that is resumed continues its W&B run.

    Args:
        project: name of the project.
        mode: `offline` writes files that `wandb sync` uploads later; `online` needs WANDB_API_KEY in the environment.
        directory: directory of the offline files; by default the working directory.
    """

    def __init__(
        self, project: str = "maas-ray", mode: Literal["offline", "online"] = "offline", directory: str | None = None
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise SpecError(f"callbacks: wandb is not installed ({error}); pip install 'maas-ray[wandb]'") from error
        self._wandb: Any = wandb
        self._options = {"project": project, "mode": mode, "dir": directory}

    def on_begin(self, context: RunContext) -> None:
        self._run = self._wandb.init(
            **self._options,
            id=context.run.replace(".", "-"),
            name=context.run,
            config=context.spec.model_dump(mode="json"),
            resume="allow",
            reinit="create_new",
        )
        self._run.define_metric(
            "validation/*", step_metric="validation/step"
        )  # a late result is plotted at its own step

    def on_step(self, progress: Progress) -> None:
        names = ("loss", "lr", "samples_per_s", "tokens_per_s", "mfu", "epoch")
        values = {f"train/{name}": getattr(progress, name) for name in names if getattr(progress, name) is not None}
        self._run.log(values, step=progress.step)

    def on_validation(self, progress: Progress) -> None:
        step = progress.step if progress.of_step is None else progress.of_step
        values = {f"validation/{name}": value for name, value in progress.metrics.items()}
        self._run.log({**values, "validation/step": step})

    def on_end(self, reason: EndReason) -> None:
        self._run.finish(exit_code=0 if reason != "failed" else 1)
