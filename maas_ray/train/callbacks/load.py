"""From the callbacks of a spec to objects that follow the run."""

import inspect
from collections.abc import Sequence
from typing import Any

from maas_ray.display import get_logger
from maas_ray.errors import SpecError, TrainingFailed
from maas_ray.suggestions import known_names
from maas_ray.train.callbacks.base import Callback, EndReason, RunContext
from maas_ray.train.callbacks.tensorboard import TensorBoard
from maas_ray.train.custom.imported import construct, import_object
from maas_ray.train.loop.progress import Progress
from maas_ray.train.spec.callbacks import CallbackSpec

BUILT_IN = {
    "mlflow": "maas_ray.train.callbacks.mlflow:MLflow",
    "wandb": "maas_ray.train.callbacks.wandb:WandB",
}
"""Short names of the callbacks that come with the package."""

log = get_logger(__name__)


def check_callbacks(specs: Sequence[CallbackSpec]) -> None:
    """Refuses callbacks that cannot be created, before a run is recorded.

    Raises:
        SpecError: a class cannot be imported, is no `Callback`, or does not take its parameters.
    """
    for spec in specs:
        _create(spec)


def build_callbacks(specs: Sequence[CallbackSpec]) -> "CallbackList":
    """TensorBoard and the callbacks of a spec, in this order."""
    return CallbackList([TensorBoard(), *(_create(spec) for spec in specs)])


class CallbackList(Callback):
    """Calls several callbacks in order; an exception of one names it."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = list(callbacks)
        self._begun: list[Callback] = []

    def on_begin(self, context: RunContext) -> None:
        for callback in self._callbacks:
            self._call(callback, "on_begin", context)
            self._begun.append(callback)

    def on_step(self, progress: Progress) -> None:
        for callback in self._callbacks:
            self._call(callback, "on_step", progress)

    def on_validation(self, progress: Progress) -> None:
        for callback in self._callbacks:
            self._call(callback, "on_validation", progress)

    def on_checkpoint(self, step: int, prefix: str) -> None:
        for callback in self._callbacks:
            self._call(callback, "on_checkpoint", step, prefix)

    def on_end(self, reason: EndReason) -> None:
        """Ends all that have begun. An exception is logged: the run itself is over."""
        for callback in self._begun:
            try:
                self._call(callback, "on_end", reason)
            except TrainingFailed as error:
                log.warning("%s", error)
        self._begun = []

    def _call(self, callback: Callback, method: str, *arguments: Any) -> None:
        try:
            getattr(callback, method)(*arguments)
        except Exception as error:  # a user's code may raise anything
            kind = type(callback)
            raise TrainingFailed(
                f"the callback {kind.__module__}:{kind.__qualname__} failed in {method}: {type(error).__name__}: {error}; "
                "correct it or remove it from `callbacks`, and continue with --resume"
            ) from error


def _create(spec: CallbackSpec) -> Callback:
    path = BUILT_IN.get(spec.path, spec.path)
    if ":" not in path:
        known = known_names(spec.path, sorted(BUILT_IN), "callbacks of the package")
        raise SpecError(f"callbacks: no callback {spec.path!r}; {known}; your own is named as package.module:Class")
    found = import_object(path, "callbacks")
    if not (inspect.isclass(found) and issubclass(found, Callback)):
        raise SpecError(f"callbacks: {path} is {found!r}, not a subclass of maas_ray.Callback")
    created: Callback = construct(found, path, "callbacks", **spec.params)
    return created
