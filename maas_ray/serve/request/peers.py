"""Results of one call to several replicas; waiting for a silent one has a time limit. Independent of Ray."""

import asyncio
from collections.abc import Awaitable, Iterable
from typing import Any


class Answers(list[Any]):
    """Results of the replicas.

    Args:
        answers: one result of each replica that answered.
        num_silent: number of replicas that did not answer in time; one that has ended is not counted.
    """

    def __init__(self, answers: Iterable[Any] = (), num_silent: int = 0) -> None:
        super().__init__(answers)
        self.num_silent = num_silent


async def collect(calls: Iterable[Awaitable[Any]], timeout_s: float) -> Answers:
    """Returns the results of the calls that end in time; a failed call has no result."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    if not tasks:
        return Answers()
    done, late = await asyncio.wait(tasks, timeout=timeout_s)
    for task in late:
        task.cancel()
    return Answers([task.result() for task in tasks if task in done and task.exception() is None], len(late))
