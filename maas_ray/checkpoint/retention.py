"""Retention of committed checkpoints: keeps the newest, the best, every n-th and the pinned ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from maas_ray.checkpoint.catalog import list_checkpoints, open_step, pinned
from maas_ray.errors import ObjectCorrupt
from maas_ray.store.fetch import in_parallel
from maas_ray.store.objects import ObjectStore


@dataclass(frozen=True)
class Keep:
    """The retention rules; a checkpoint is kept if any rule selects it. Pinned ones and the newest are always kept.

    Attributes:
        last: number of newest checkpoints to keep.
        best: number of best checkpoints by `metric` to keep.
        metric: name of a number in the state's `metrics`.
        mode: whether a smaller or a larger value is better.
        every_steps: keeps checkpoints whose step this number divides.
    """

    last: int = 3
    best: int = 0
    metric: str | None = None
    mode: Literal["min", "max"] = "min"
    every_steps: int | None = None


class Retention:
    """Removes checkpoints that no rule keeps.

    Args:
        store: store with the checkpoints.
        prefix: their prefix, such as `runs/<run>/checkpoints`.
        keep: the rules.
        late: metrics by step that became known after the commit; may grow between calls.
    """

    def __init__(
        self,
        store: ObjectStore,
        prefix: str,
        keep: Keep,
        late: Mapping[int, Mapping[str, float]] | None = None,
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._keep = keep
        self._late = late if late is not None else {}
        self._scores: dict[int, float | None] = {}

    def apply(self) -> list[int]:
        """Removes checkpoints, each with its manifest first; returns their steps.

        A step whose manifest cannot be read does not count toward the rules and is left for inspection, so neither a
        crash nor damage displaces a good checkpoint.
        """
        steps = list_checkpoints(self._store, self._prefix)
        whole = [step for step, is_whole in zip(steps, in_parallel(self._is_whole, steps), strict=True) if is_whole]
        chosen = self._chosen(whole)
        going = [step for step in whole if step not in chosen]
        if going:
            kept = pinned(self._store, self._prefix)  # read last: a pin may have been added meanwhile
            going = [step for step in going if step not in kept]
        for step in going:
            open_step(self._store, self._prefix, step).delete()
            self._scores.pop(step, None)
        return going

    def _chosen(self, steps: list[int]) -> set[int]:
        chosen = set(steps[-max(self._keep.last, 1) :])
        if self._keep.every_steps:
            chosen |= {step for step in steps if step % self._keep.every_steps == 0}
        if self._keep.best and self._keep.metric:
            scored = [(score, step) for step in steps if (score := self._score(step)) is not None]
            sign = 1 if self._keep.mode == "min" else -1
            ranked = sorted(scored, key=lambda pair: (sign * pair[0], -pair[1]))
            chosen |= {step for _, step in ranked[: self._keep.best]}
        return chosen

    def _score(self, step: int) -> float | None:
        return self._late.get(step, {}).get(self._keep.metric or "", self._scores[step])

    def _is_whole(self, step: int) -> bool:
        if step not in self._scores:
            try:
                meta = open_step(self._store, self._prefix, step).meta
            except ObjectCorrupt:
                return False
            score = meta["state"].get("metrics", {}).get(self._keep.metric)
            is_number = isinstance(score, int | float) and score == score  # NaN is not a score
            self._scores[step] = float(score) if is_number else None
        return True
