"""Merger: decides which requests may share a run, joins their inputs, and splits the outputs.

Outputs are split by the number of rows that was parsed, not by the number that a caller declared.
"""

from collections.abc import Callable

import numpy as np

from maas_ray.bundle.engine.forms import Form
from maas_ray.bundle.engine.padding import Padding
from maas_ray.display import get_logger
from maas_ray.errors import BadRequest
from maas_ray.serve.batching.item import NOTHING, Item, Tensors
from maas_ray.serve.batching.merge_guard import Guard
from maas_ray.serve.batching.queueing.waiting_items import Key

log = get_logger(__name__)


class Merger:
    """Merges requests of one model version.

    Args:
        can_merge: whether requests may share a run.
        padding: pads requests of different sizes to one size; None: requests of different sizes do not share a run.
        optional: names of optional inputs; a request with any of them runs alone.
        form_of: returns the variable sizes of a run other than its rows; None: only the rows vary.
        guard: takes samples of merged requests; None: none are taken.
        name: name of the model version, for messages.
        problem: why requests do not share runs, if that is known already.
    """

    def __init__(
        self,
        *,
        can_merge: bool,
        padding: Padding | None,
        optional: frozenset[str],
        form_of: Callable[[Tensors], Form] | None,
        guard: Guard | None,
        name: str,
        problem: str = "",
    ) -> None:
        self.can_merge = can_merge
        """Whether requests may share a run; False after `stop`."""
        self.guard = guard if can_merge else None
        """Takes samples of merged requests; None after `stop`."""
        self.problem = problem
        """Why requests no longer share runs; empty if they do, or never did."""
        self._padding = padding if can_merge else None
        self._optional = optional
        self._form_of = form_of
        self._name = name

    def key(self, item: Item) -> Key:
        """Returns the properties that an item must have in common with others to share a run with them.

        Raises:
            BadRequest: a tensor does not have `num_rows` rows; merging it would shift the rows of other requests.
        """
        inputs, num_rows = item.inputs, item.num_rows
        key: Key = ()
        if self._optional and not self._optional.isdisjoint(inputs):
            key = (item,)  # optional inputs apply to the whole run
        elif self._padding is not None:
            return self._padded_key(self._padding, item)
        elif self.can_merge:
            for name, array in inputs.items():
                shape = array.shape
                if shape[0] != num_rows:
                    raise BadRequest(f"input {name!r} has {shape[0]} rows, the request {num_rows}; send equal numbers")
                key = key, name, array.dtype.num, shape[1:]  # by name: inputs may be optional
        if self._form_of is not None:
            key = self._form_of(inputs), key
        return key

    def form(self, key: Key) -> Form:
        """Returns the variable sizes other than rows that `key` stored in a key; empty if only the rows vary."""
        if self._form_of is None:
            return ()
        form: Form = key[0]  # type: ignore[assignment]
        return form

    def join(self, batch: list[Item]) -> Tensors:
        """Returns the inputs of one run for several requests of equal keys."""
        if self._padding is not None:
            return self._padding.merge([item.inputs for item in batch])
        return {name: np.concatenate([item.inputs[name] for item in batch]) for name in batch[0].inputs}

    def split(self, batch: list[Item], num_rows: int, outputs: Tensors) -> bool:
        """Answers each request of a merged run with its own rows, as views.

        Args:
            batch: requests of the run, in order.
            num_rows: sum of their rows.
            outputs: outputs of the run.

        Returns:
            Whether they were answered; False, and merging has ended, if the outputs have another number of rows.
        """
        if any(len(array) != num_rows for array in outputs.values()):
            self.stop(f"a run of {num_rows} rows returned another number of rows")
            return False
        guard, padding = self.guard, self._padding
        if guard is not None:
            guard.left -= len(batch)
            if guard.left <= 0:
                guard.take(batch, outputs, padding)
        (first, first_array), *others = outputs.items()
        start = 0
        for item in batch:
            stop = start + item.num_rows
            done, item.done = item.done, None
            if done is not None:  # same as `Item.deliver`, inlined for speed
                inputs, item.inputs = item.inputs, NOTHING
                if padding is not None:
                    part = padding.own(inputs, outputs, start, stop)
                else:
                    part = {first: first_array[start:stop]}
                    for name, array in others:
                        part[name] = array[start:stop]
                try:
                    done(part, None)
                except Exception:
                    log.exception("the response of %s could not be delivered", self._name)
            start = stop
        return True

    def stop(self, reason: str) -> None:
        """Ends merging: a response must not depend on concurrent requests."""
        self.problem = f"{self._name} mixes the rows of requests: {reason}; requests are no longer merged"
        log.error("%s", self.problem)
        self.can_merge = False
        self.guard = None

    def _padded_key(self, padding: Padding, item: Item) -> Key:
        inputs, num_rows = item.inputs, item.num_rows
        if any(len(array) != num_rows for array in inputs.values()):
            raise BadRequest(f"the inputs do not all have the request's {num_rows} rows; send equal numbers")
        kinds: Key = tuple(array.dtype.num for array in inputs.values())
        is_alike = self.can_merge and padding.agrees(inputs)
        return padding.form(inputs), kinds if is_alike else item
