"""The specs in the documentation are valid, its links and the tests that it names exist, its tables match the code."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from maas_ray.serve.request.head import LAYERS
from maas_ray.serve.spec.serve import ServeSpec
from maas_ray.spec import Spec, parse_spec
from maas_ray.train.search.spec import TuneSpec
from maas_ray.train.spec.train import TrainSpec
from tests.support.pages import DOCS, PAGES, blocks, generator, name_of
from tests.support.repository import files
from tests.support.root import ROOT

GENERATE = generator()
SPECS = [(name_of(path), block) for path in PAGES for block in blocks(path.read_text(), "yaml")]
KINDS: dict[str, type[Spec]] = {"pools": ServeSpec, "search": TuneSpec, "run": TrainSpec}
"""The kind of a spec, by a field that only this kind has."""
CHANGELOG = ROOT / "CHANGELOG.md"


@pytest.mark.parametrize(("name", "block"), SPECS)
def test_every_yaml_block_is_a_valid_spec(name: str, block: str) -> None:
    document = yaml.safe_load(block)
    kinds = [kind for field, kind in KINDS.items() if field in document]
    assert len(kinds) == 1, f"a yaml block of {name} is not a whole spec: it needs one of {', '.join(KINDS)}"
    parse_spec(kinds[0], document, source=name)


def test_each_kind_of_spec_has_an_example() -> None:
    assert {field for field in KINDS for _, block in SPECS if field in yaml.safe_load(block)} == set(KINDS)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_python_blocks_are_python(path: Path) -> None:
    for block in blocks(path.read_text(), "python"):
        ast.parse(block)


@pytest.mark.parametrize("path", [*PAGES, CHANGELOG], ids=name_of)
def test_links_lead_to_files_and_headings_of_the_repository(path: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(path.read_text())):
        name, _, anchor = target.removeprefix(GENERATE.SOURCE).partition("#")
        if name.startswith("http"):
            continue
        base = ROOT if target.startswith(GENERATE.SOURCE) else path.parent
        found = base / name if name else path
        if not found.exists() or (anchor and anchor not in _anchors(found)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("path", [path for path in PAGES if path.is_relative_to(DOCS)], ids=name_of)
def test_a_page_links_beyond_docs_by_a_whole_url(path: Path) -> None:
    """A relative link out of docs/ works on GitHub and leads nowhere on the site."""
    targets = re.findall(r"\]\((?!http)([^)#\s]+)", _prose(path.read_text()))
    assert [target for target in targets if not (path.parent / target).resolve().is_relative_to(DOCS)] == []


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_tests_that_are_named_exist(path: Path) -> None:
    named = re.findall(r"(?<![\w/])tests/[\w/.]*\w", path.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r'"([\w/-]+\.md)"', (ROOT / "zensical.toml").read_text())
    assert sorted(named) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


@pytest.mark.parametrize("path", GENERATE.pages(), ids=name_of)
def test_a_generated_page_is_current(path: Path) -> None:
    assert path.exists(), f"run `{GENERATE.REFRESH}`"
    assert path.read_text() == GENERATE.pages()[path], f"run `{GENERATE.REFRESH}`"


def test_the_layout_names_every_part_and_nothing_else() -> None:
    block = blocks(_section("layout"), "text")[0]
    top, package = set(), set()
    for line in block.splitlines():
        name = line.split()[0].rstrip("/")
        (package if line.startswith("  ") else top).add(name)
    listed = files()
    assert package == {name.split("/")[1] for name in listed if name.startswith("maas_ray/")} - {
        "__init__.py",
        "py.typed",
    }
    assert top == {name.split("/")[0] for name in listed if not name.startswith(".")} - {
        "README.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "LICENSE",
        "CHANGELOG.md",
        "pyproject.toml",
    }


def test_the_layers_of_a_request_are_in_their_order() -> None:
    assert re.findall(r"\| \d+ \| `(\w+)` \|", _section("layers")) == [layer.__name__ for layer in LAYERS]


def _section(marker: str) -> str:
    text = (DOCS / "architecture.md").read_text()
    return text.split(f"<!-- {marker} -->")[1].split(f"<!-- /{marker} -->")[0]


def _prose(text: str) -> str:
    """The text without code, in which brackets are not links."""
    return re.sub(r"```.*?```|`[^`\n]*`(?!\])", "", text, flags=re.DOTALL)


def _anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
