"""A function over numbered pieces of work, in tasks of Ray; the results are small. Knows no data.

A task that is lost is run again by Ray, so a function must give the same result, and leave the same bytes, every time. Not
without end, as by Ray Data: a file that makes its native parser crash would end one worker after the other.
"""

import json
from collections.abc import Callable, Generator, Mapping
from typing import Any

import ray

from maas_ray import errors
from maas_ray.data.table.column_statistics import require_cpu
from maas_ray.errors import ClusterError, MaasError

NO_PROGRESS_TIMEOUT_S = 1800.0
"""Longest time in which no task ends, before the work is given up."""
MAX_RETRIES = 3
"""How often a task is run again whose process was lost: with its node, for lack of memory, or by a crash."""
_MIN_WINDOW = 16
"""Tasks that are given to Ray at a time: twice the CPUs of the cluster, or so many."""


def run_tasks(
    function: Callable[..., Any],
    count: int,
    arguments: Mapping[str, Any],
    what: str,
    cpu_timeout_s: float,
    name_of: Callable[[int], str] = "piece {}".format,
) -> Generator[tuple[int, Any]]:
    """Calls `function(number, **arguments)` for every number below `count`; whoever closes it ends the tasks.

    Args:
        function: importable by the workers; what it returns goes through JSON.
        count: pieces of work.
        arguments: the same for all.
        what: for messages: `the statistics`.
        cpu_timeout_s: how long to wait for a free CPU of the Ray cluster.
        name_of: what a piece is called in messages.

    Yields:
        The number and the result, in the order in which tasks end.

    Raises:
        MaasError: what the function has raised.
        ClusterError: Ray is not connected, no CPU became free in time, no task ended for too long, or one was lost too
            often.
    """
    require_cpu(cpu_timeout_s)
    # Not in the placement group of who asks, whose CPUs belong to others.
    task = ray.remote(_answer).options(
        name=function.__name__, num_cpus=1, max_retries=MAX_RETRIES, scheduling_strategy="DEFAULT"
    )
    shared, numbers = ray.put((function, dict(arguments))), iter(range(count))
    window = max(_MIN_WINDOW, 2 * int(ray.cluster_resources().get("CPU", 0)))
    running: dict[Any, int] = {}
    try:
        while True:
            while len(running) < window and (number := next(numbers, None)) is not None:
                running[task.remote(number, shared)] = number
            if not running:
                return
            done, _ = ray.wait(list(running), num_returns=1, timeout=NO_PROGRESS_TIMEOUT_S)
            if not done:
                raise ClusterError(
                    f"{what} could not be computed: no task ended within {NO_PROGRESS_TIMEOUT_S:g} s; `ray list tasks` "
                    "and the workers' logs say what they wait for"
                )
            number = running.pop(done[0])
            yield number, _result(done[0], f"{what} could not be computed: {name_of(number)}")
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _result(reference: Any, failed: str) -> Any:
    try:
        answer = json.loads(ray.get(reference))
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError) as error:
        raise ClusterError(
            f"{failed} ended its process {MAX_RETRIES + 1} times ({type(error).__name__}); a damaged file can make its "
            "parser crash or take all memory: check that file, or leave it out"
        ) from error
    except ray.exceptions.RayError as error:
        raise ClusterError(f"{failed}: {error}") from error
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["message"])
    return answer["result"]


def _answer(number: int, shared: tuple[Callable[..., Any], Mapping[str, Any]]) -> str:
    function, arguments = shared
    try:
        return json.dumps({"result": function(number, **arguments)})
    except MaasError as error:  # Ray would print its trace, and wrap it
        return json.dumps({"error": type(error).__name__, "message": str(error)})
