"""Runs a function over numbered pieces of work in Ray tasks with small results. Independent of data.

Ray runs a lost task again, so a function must return the same result, and write the same bytes, every time. Retries are
limited, unlike Ray Data's: a file that crashes its native parser would otherwise end one worker after another.
"""

import json
from collections.abc import Callable, Generator, Mapping
from typing import Any

import ray

from maas_ray import errors
from maas_ray.data.table.column_statistics import require_cpu
from maas_ray.errors import ClusterError, MaasError

NO_PROGRESS_TIMEOUT_S = 1800.0
"""Longest time in which no task ends before the work fails."""
MAX_RETRIES = 3
"""Retries of a task whose process was lost: with its node, because of too little memory, or by a crash."""
_MIN_WINDOW = 16
"""Minimum number of tasks submitted at a time; otherwise twice the CPUs of the cluster."""


def run_tasks(
    function: Callable[..., Any],
    count: int,
    arguments: Mapping[str, Any],
    what: str,
    cpu_timeout_s: float,
    name_of: Callable[[int], str] = "piece {}".format,
) -> Generator[tuple[int, Any]]:
    """Calls `function(number, **arguments)` for every number below `count`; closing the generator cancels the tasks.

    Args:
        function: importable by the workers; its result is passed as JSON.
        count: number of pieces of work.
        arguments: arguments of every call.
        what: name of the work for messages: `the statistics`.
        cpu_timeout_s: longest wait for a free CPU of the Ray cluster.
        name_of: name of a piece in messages.

    Yields:
        The number and the result, in the order in which tasks end.

    Raises:
        MaasError: the function raised it.
        ClusterError: Ray is not connected, no CPU became free in time, no task ended for too long, or one was lost too
            often.
    """
    require_cpu(cpu_timeout_s)
    # Not in the caller's placement group, whose CPUs are reserved for others.
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
                    "and the workers' logs show the cause"
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
            f"{failed} ended its process {MAX_RETRIES + 1} times ({type(error).__name__}); a damaged file can crash "
            "its parser or exhaust the memory: check that file, or leave it out"
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
    except MaasError as error:  # Ray would print its traceback and wrap it
        return json.dumps({"error": type(error).__name__, "message": str(error)})
