"""The list of operators that may run inside a replica: tried with the extreme values of their types and with odd shapes."""

import pytest

from maas_ray import confined
from maas_ray.confined import Limits
from maas_ray.errors import ConfinedKilled

pytestmark = [pytest.mark.fault, pytest.mark.timeout(460)]
LIMITS = Limits(wall_s=400.0, memory_bytes=2 << 30, file_bytes=None)


def fuzz(only: str = "", trusts_divisions: bool = False) -> tuple[int, list[str]]:
    """Runs all cases; how many runs the last child made, and what the children before it died of."""
    start, deaths, last = 0, [], ""
    while True:

        def note(stage: str) -> None:
            nonlocal last
            last = stage

        with confined.start("tests.support.operator_fuzz:fuzz", LIMITS, is_service=True, what="fuzzing") as child:
            child.send({"start": start, "only": only, "trusts_divisions": trusts_divisions})
            try:
                return child.result(note).payload["num_runs"], deaths
            except ConfinedKilled as error:
                if not last:
                    raise
                deaths.append(f"{last}: {error}")
                start = int(last.split()[0]) + 1


def test_no_value_and_no_shape_makes_a_listed_operator_crash() -> None:
    num_runs, deaths = fuzz()
    assert deaths == []
    assert num_runs > 5000


@pytest.mark.parametrize("operator", ["div", "mod"])
def test_a_listed_operator_that_crashes_is_found(operator: str) -> None:
    _, deaths = fuzz(only=f"test_{operator}", trusts_divisions=True)
    assert deaths
