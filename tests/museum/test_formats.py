"""What earlier versions stored is read by this one, format by format; see README.md."""

import json
from pathlib import Path

import pytest

from benchmarks.store.filling import memory_store
from maas_ray.cli.checks import all_checks
from maas_ray.errors import MaasError
from maas_ray.store.fsck import fsck
from tests.museum.exhibits import FORMATS, dump, load

MUSEUM = Path(__file__).parent
EXHIBITS = sorted(MUSEUM.glob("*/*.json"))


def name_of(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}"


@pytest.mark.parametrize("path", EXHIBITS, ids=name_of)
def test_a_stored_object_is_read(path: Path) -> None:
    store = memory_store()
    load(store, path.read_text())
    FORMATS[path.stem].check(store)
    assert fsck(store, checks=all_checks()).problems == []


@pytest.mark.parametrize("path", EXHIBITS, ids=name_of)
def test_an_altered_object_is_noticed(path: Path) -> None:
    """The negative control: one bit of the longest object."""
    objects = json.loads(path.read_text())
    key = max(objects, key=lambda key: len(str(objects[key])))
    content = bytes.fromhex(objects[key]["hex"]) if isinstance(objects[key], dict) else objects[key].encode()
    middle = len(content) // 2
    objects[key] = {"hex": (content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]).hex()}
    store = memory_store()
    load(store, json.dumps(objects))
    try:
        FORMATS[path.stem].check(store)
    except (MaasError, AssertionError):
        return
    # A record of a log that is also in another object is still read, and reported.
    assert len(fsck(store, checks=all_checks()).problems) == 1


@pytest.mark.parametrize("kind", FORMATS)
def test_todays_code_reads_what_it_writes(kind: str) -> None:
    store, copy = memory_store(), memory_store()
    FORMATS[kind].write(store)
    load(copy, dump(store))
    FORMATS[kind].check(copy)


def test_each_format_has_a_stored_object() -> None:
    assert {path.stem for path in EXHIBITS} == set(FORMATS), "run `python -m tests.museum.add NAME` for a new format"


def test_each_generation_is_in_the_readme() -> None:
    lines = (MUSEUM / "README.md").read_text().splitlines()
    for folder in {path.parent.name for path in EXHIBITS}:
        assert sum(line.startswith(f"| `{folder}` |") for line in lines) == 1
