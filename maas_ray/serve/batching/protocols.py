"""Protocols of the batcher's surroundings: the loop, the runner of the engine, and the receiver of statistics."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from maas_ray.bundle.engine.forms import Form
from maas_ray.errors import MaasError
from maas_ray.serve.batching.item import Item, Tensors


class Loop(Protocol):
    """The methods of asyncio's loop that the batcher uses; tests provide a manual one."""

    def time(self) -> float: ...
    def call_soon(self, callback: Callable[[], object], /) -> object: ...
    def call_at(self, when: float, callback: Callable[[], object], /) -> Any: ...


class Finished(Protocol):
    """Callback at the end of a run, called once, on the loop: the outputs or the error, and the run time in seconds."""

    def __call__(self, outputs: Tensors | None, error: MaasError | None, run_s: float = 0.0, /) -> None: ...


class CancelToken(Protocol):
    """Stops a run early."""

    def set(self) -> None:
        """Requests the stop. The run still ends by its `Finished`, possibly with `RunStopped`."""
        ...


class Runner(Protocol):
    """Runs merged rows, either immediately or in a thread."""

    @property
    def instances(self) -> int:
        """Maximum number of concurrent runs."""
        ...

    @property
    def form_of(self) -> Callable[[Tensors], Form] | None:
        """Function that returns the variable sizes of a run other than its rows; None: only the rows vary."""
        ...

    def start(self, inputs: Tensors, num_rows: int, finished: Finished) -> CancelToken | None:
        """Starts a run; `finished` may be called before this returns. Returns None if the run cannot be stopped."""
        ...

    def estimate_s(self, num_rows: int, form: Form = (), /) -> float:
        """Returns the expected seconds of a run; infinity if unknown. `form`: sizes other than rows, if they vary."""
        ...


class RunStats(Protocol):
    """Receiver of the batcher's statistics; implemented by serve/telemetry/stats.py."""

    def waited(self, items: Sequence[Item], now_s: float) -> None:
        """Records that requests left the queue for their run, at time `now_s` of the finest clock."""
        ...

    def ran(self, num_requests: int, num_rows: int, run_s: float) -> None:
        """Records a run that succeeded."""
        ...

    def checked(self, difference: str) -> None:
        """Records that a merged request was run again alone; `difference` is the reason if merging has ended."""
        ...
