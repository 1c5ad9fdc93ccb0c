"""The specs in docs/ are valid, and the links in it lead somewhere."""

import re
from pathlib import Path

import pytest
import yaml

from maas_ray.serve.spec.pools import ServeSpec
from maas_ray.spec import parse_spec
from tests.support.root import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
SPECS = [
    (path.name, block)
    for path in DOCS
    for block in re.findall(r"```yaml\n(.*?)```", path.read_text(), re.DOTALL)
    if block.startswith("pools:")
]


@pytest.mark.parametrize(("name", "block"), SPECS)
def test_a_spec_is_valid(name: str, block: str) -> None:
    parse_spec(ServeSpec, yaml.safe_load(block), source=name)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_to_files_of_the_repository(path: Path) -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_there_are_specs() -> None:
    assert SPECS
