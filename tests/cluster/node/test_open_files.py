"""Open files of nodes: the reported limit of each node, and the limits that are a problem."""

from pathlib import Path

import pytest

from maas_ray.cluster.health.status import fronts_with_few_connections
from maas_ray.cluster.node.open_files import check_front, check_node_files
from maas_ray.haproxy.config.capacity import Capacity, read_capacities, write_capacity
from maas_ray.haproxy.names import CAPACITY_FILE, REFUSED_FILE
from tests.conftest import RayCluster

FULL = Capacity(20_000, 20_000, 65_536, 128)
HALF = Capacity(9_823, 20_000, 20_000, 128)
FEW = Capacity(412, 20_000, 1_024, 48)


def test_each_node_reports_the_limit_of_its_processes(ray_cluster: RayCluster) -> None:
    (check,) = check_node_files()
    assert check.ok
    assert "open files" in check.detail


@pytest.mark.parametrize(
    ("capacities", "refused", "is_fine", "words"),
    [
        ([], [], True, "no HAProxy has been started"),
        ([FULL], [], True, "up to 20000"),
        ([HALF], [], True, "accepts 9823 connections instead of 20000, because it may have 20000 open files"),
        ([FEW], [], False, "accepts 412 connections"),
        ([FULL], ["HAProxy may have 200 open files"], False, "HAProxy may have 200 open files"),
    ],
)
def test_a_front_with_few_connections_is_a_problem(
    capacities: list[Capacity], refused: list[str], is_fine: bool, words: str
) -> None:
    check = check_front("10.0.0.2", capacities, refused)
    assert (check.ok, bool(check.fix)) == (is_fine, not is_fine)
    assert words in check.detail


def test_status_shows_only_numbers_smaller_than_configured(tmp_path: Path) -> None:
    for name, capacity in (("full", FULL), ("few", FEW)):
        (tmp_path / name).mkdir()
        write_capacity(tmp_path / name, capacity)
    assert fronts_with_few_connections(tmp_path) == (str(FEW),)
    (tmp_path / "full" / REFUSED_FILE).write_text("too few\n")
    assert fronts_with_few_connections(tmp_path) == ("too few", str(FEW))
    (tmp_path / "few" / CAPACITY_FILE).write_text('{"max_connections": ')
    assert read_capacities(tmp_path) == [FULL]
