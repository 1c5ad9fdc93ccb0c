"""Which checkpoints to keep: the newest, the best, every n-th and the pinned ones. Counts committed ones only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from maas_ray.checkpoint.catalog import list_checkpoints, open_step, pinned
from maas_ray.errors import ObjectCorrupt
from maas_ray.store.fetch import in_parallel
from maas_ray.store.objects import ObjectStore


@dataclass(frozen=True)
class Keep:
    """What retention keeps; whatever one of the rules keeps stays. Pinned ones and the newest always do.

    Attributes:
        last: so many of the newest.
        best: so many of the best by `metric`.
        metric: name of a number in the state's `metrics`.
        mode: whether a smaller or a larger one is better.
        every_steps: those of steps that this number divides.
    """

    last: int = 3
    best: int = 0
    metric: str | None = None
    mode: Literal["min", "max"] = "min"
    every_steps: int | None = None


class Retention:
    """Removes what nobody needs any more.

    Args:
        store: where the checkpoints lie.
        prefix: their place, such as `runs/<run>/checkpoints`.
        keep: the rules.
        late: metrics by step that became known after the commit; may grow from call to call.
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

        A step whose manifest cannot be read keeps nothing else from being kept and is left for whoever looks into it,
        so neither a crash nor damage pushes a good checkpoint out.
        """
        steps = list_checkpoints(self._store, self._prefix)
        whole = [step for step, is_whole in zip(steps, in_parallel(self._is_whole, steps), strict=True) if is_whole]
        chosen = self._chosen(whole)
        going = [step for step in whole if step not in chosen]
        if going:
            kept = pinned(self._store, self._prefix)  # read last: a pin may have been set meanwhile
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
            is_number = isinstance(score, int | float) and score == score  # NaN is no score
            self._scores[step] = float(score) if is_number else None
        return True
