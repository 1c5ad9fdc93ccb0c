"""Communication of the ranks that save one checkpoint, with bounded waits. Independent of tensors."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist

from maas_ray.errors import SaveFailed

TIMEOUT_S = 120.0
T = TypeVar("T")


def saving_group(timeout_s: float = TIMEOUT_S) -> dist.ProcessGroup | None:
    """A gloo group of all ranks, only for saving; None in a single process. Every rank must call it.

    Saving runs in the background, so it must not share a group with training: two threads would mix their
    messages. `torch.distributed.destroy_process_group` releases it, with or without the group as argument.

    Args:
        timeout_s: longest time for writing, as for `save` and `AsyncCheckpointer`. The wait for another rank is twice
            as long, so that a rank whose store hangs can still report it, and the group remains usable.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    timeout = timedelta(seconds=2 * timeout_s)
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout, group_desc="checkpoint"))


class Collectives:
    """The ranks of a group; rank 0 decides and commits. A message is any picklable object, from the run's ranks only.

    Args:
        group: group with a CPU backend (gloo) and a timeout; None: this process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world = dist.get_world_size(group) if group is not None else 1
        self._broken: SaveFailed | None = None

    def gather_all(self, message: T) -> list[T]:
        """Every rank's message on every rank. Raises `SaveFailed` if a rank does not respond in time."""
        if self._group is None:
            return [message]
        found: list[Any] = [None] * self.world
        self._call(lambda: dist.all_gather_object(found, message, group=self._group))
        return found

    def gather(self, message: T) -> list[T]:
        """Every rank's message on rank 0; an empty list on others. Raises as `gather_all`."""
        if self._group is None:
            return [message]
        found: list[Any] | None = [None] * self.world if self.rank == 0 else None
        self._call(lambda: dist.gather_object(message, found, group=self._group, group_dst=0))
        return found or []

    def scatter(self, messages: list[T]) -> T:
        """The element of rank 0's messages for this rank. Raises as `gather_all`."""
        if self._group is None:
            return messages[0]
        found: list[Any] = [None]
        given = messages if self.rank == 0 else None
        self._call(lambda: dist.scatter_object_list(found, given, group=self._group, group_src=0))
        return cast(T, found[0])

    def broadcast(self, message: T) -> T:
        """Rank 0's message. Raises as `gather_all`."""
        if self._group is None:
            return message
        found: list[Any] = [message]
        self._call(lambda: dist.broadcast_object_list(found, group=self._group, group_src=0))
        return cast(T, found[0])

    def _call(self, collective: Callable[[], Any]) -> None:
        if self._broken is not None:
            raise self._broken
        try:
            collective()
        except (RuntimeError, ValueError) as error:  # torch's errors for a lost or late rank, and for a closed group
            reason = str(error).splitlines()[0]
            self._broken = SaveFailed(
                f"rank {self.rank} lost another rank while saving (it died or exceeded the group's timeout): {reason}; "
                "these processes cannot save further checkpoints; restart them"
            )
            raise self._broken from error
