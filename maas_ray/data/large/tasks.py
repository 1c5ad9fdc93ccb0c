"""A function over numbered pieces of work, in tasks of Ray Data; the results are small. Knows no data.

A task that is lost is run again by Ray, so a function must give the same result, and leave the same bytes, every time.
"""

import json
from collections.abc import Callable, Generator, Mapping
from typing import Any

import pyarrow as pa

from maas_ray import errors
from maas_ray.data.statistics import quiet, require_cpu
from maas_ray.errors import ClusterError, MaasError

NO_PROGRESS_TIMEOUT_S = 1800
"""Longest time in which no task ends, before an execution is given up."""


def run_tasks(
    function: Callable[..., Any], count: int, arguments: Mapping[str, Any], what: str, cpu_timeout_s: float
) -> Generator[tuple[int, Any]]:
    """Calls `function(number, **arguments)` for every number below `count`; whoever closes it ends the tasks.

    Args:
        function: importable by the workers; what it returns goes through JSON.
        count: pieces of work.
        arguments: the same for all.
        what: for messages: `the statistics`.
        cpu_timeout_s: how long to wait for a free CPU of the Ray cluster.

    Yields:
        The number and the result, in the order in which tasks end.

    Raises:
        MaasError: what the function has raised.
        ClusterError: Ray is not connected, no CPU became free in time, or a task was lost too often.
    """
    require_cpu(cpu_timeout_s)
    import ray.data  # late: it takes 0.9 s, with pandas

    work = ray.data.range(count, override_num_blocks=count)
    work.context.enable_progress_bars = False
    work.context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_S
    results = work.map_batches(
        _call, batch_size=None, batch_format="pyarrow", fn_kwargs={"function": function, "arguments": dict(arguments)}
    )
    found = 0
    try:
        with quiet():
            for row in results.iter_rows():
                answer = json.loads(row["answer"])
                if "error" in answer:
                    raise getattr(errors, answer["error"])(answer["message"])
                found += 1
                yield answer["number"], answer["result"]
    except (ray.exceptions.RayError, TimeoutError) as error:
        raise ClusterError(f"{what} could not be computed: {error}") from error
    if found != count:
        raise ClusterError(f"{what} could not be computed: {found} of {count} tasks answered")


def _call(block: pa.Table, function: Callable[..., Any], arguments: Mapping[str, Any]) -> pa.Table:
    return pa.table({"answer": [_answer(number, function, arguments) for number in block["id"].to_pylist()]})


def _answer(number: int, function: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    try:
        return json.dumps({"number": number, "result": function(number, **arguments)})
    except MaasError as error:  # Ray would print its trace, and wrap it
        return json.dumps({"error": type(error).__name__, "message": str(error)})
