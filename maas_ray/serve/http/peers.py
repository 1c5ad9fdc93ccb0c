"""Answers of several replicas to one question; a silent one costs a bounded wait. Knows no Ray."""

import asyncio
from collections.abc import Awaitable, Iterable
from typing import Any


class Answers(list[Any]):
    """What the replicas answered.

    Args:
        answers: one of each replica that answered.
        num_silent: replicas that did not answer in time; one that has ended is not among them.
    """

    def __init__(self, answers: Iterable[Any] = (), num_silent: int = 0) -> None:
        super().__init__(answers)
        self.num_silent = num_silent


async def collect(calls: Iterable[Awaitable[Any]], timeout_s: float) -> Answers:
    """The results of those calls that end in time; one that fails has nothing to say."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    if not tasks:
        return Answers()
    done, late = await asyncio.wait(tasks, timeout=timeout_s)
    for task in late:
        task.cancel()
    return Answers([task.result() for task in tasks if task in done and task.exception() is None], len(late))
