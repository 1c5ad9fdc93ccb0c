"""A file that crashed its native parser was read again endlessly, each time by another worker of the cluster."""

import os
import signal
from pathlib import Path

import pytest

from maas_ray.data.large.tasks import MAX_RETRIES, run_tasks
from maas_ray.errors import ClusterError, DataError

pytestmark = pytest.mark.usefixtures("ray_cluster")


def _crash(number: int, marks: str, bad: int) -> int:
    if number == bad:
        os.close(os.open(f"{marks}/{len(os.listdir(marks))}", os.O_CREAT | os.O_EXCL))
        os.kill(os.getpid(), signal.SIGSEGV)
    return number * number


def _crash_once(number: int, marks: str, bad: int) -> int:
    return _crash(number, marks, bad if not os.listdir(marks) else -1)


def _refuse(number: int) -> int:
    raise DataError(f"piece {number} is not a table")


def _name(number: int) -> str:
    return f"'part-{number}.parquet'"


def test_a_file_that_always_ends_its_reader_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ClusterError, match=r"^the survey could not be computed: 'part-2.parquet' ended its process 4 times"
    ):
        list(run_tasks(_crash, 4, {"marks": str(tmp_path), "bad": 2}, "the survey", 60, _name))
    assert len(list(tmp_path.iterdir())) == MAX_RETRIES + 1


def test_a_task_that_is_lost_once_is_run_again(tmp_path: Path) -> None:
    found = dict(run_tasks(_crash_once, 4, {"marks": str(tmp_path), "bad": 2}, "the survey", 60, _name))
    assert found == {0: 0, 1: 1, 2: 4, 3: 9}
    assert len(list(tmp_path.iterdir())) == 1


def test_more_pieces_than_are_given_to_ray_at_a_time_all_come(tmp_path: Path) -> None:
    found = dict(run_tasks(_crash, 50, {"marks": str(tmp_path), "bad": -1}, "the survey", 60))
    assert found == {number: number * number for number in range(50)}


def test_an_error_of_a_function_arrives_unchanged() -> None:
    with pytest.raises(DataError, match="^piece [0-7] is not a table$"):
        list(run_tasks(_refuse, 8, {}, "the survey", 60, _name))
