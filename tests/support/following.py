"""Callbacks for tests, named in specs by import path."""

import json
from pathlib import Path
from typing import Any

from maas_ray import Callback
from maas_ray.train.callbacks.base import EndReason, RunContext
from maas_ray.train.loop.progress import Progress


class Notes(Callback):
    """Appends one JSON line per event to a file."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def note(self, event: str, **values: Any) -> None:
        with self.file.open("a") as out:
            out.write(json.dumps({"event": event, **values}) + "\n")

    def on_begin(self, context: RunContext) -> None:
        self.note("begin", run=context.run, first_step=context.first_step, logged=len(context.history))

    def on_step(self, progress: Progress) -> None:
        self.note("step", step=progress.step, loss=progress.loss)

    def on_validation(self, progress: Progress) -> None:
        self.note("validation", step=progress.of_step or progress.step, names=sorted(progress.metrics))

    def on_checkpoint(self, step: int, prefix: str) -> None:
        self.note("checkpoint", step=step, prefix=prefix)

    def on_end(self, reason: EndReason) -> None:
        self.note("end", reason=reason)


class Fails(Callback):
    """Raises in one method."""

    def __init__(self, method: str = "on_step") -> None:
        setattr(self, method, self.fail)

    def fail(self, *_: object) -> None:
        raise ZeroDivisionError("as planned")


class NoCallback:
    """Not a `Callback`."""


def events(file: Path) -> list[dict[str, Any]]:
    """What `Notes` wrote."""
    return [json.loads(line) for line in file.read_text().splitlines()]
