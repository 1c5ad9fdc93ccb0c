"""Adds a generation: `python -m tests.museum.add NAME` writes every format with today's code into a new folder.

Run it in a checkout without changes. Existing generations are never written again.
"""

import argparse
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.store.filling import memory_store
from maas_ray.version import __version__
from tests.museum.exhibits import FORMATS, dump
from tests.support.root import ROOT

MUSEUM = Path(__file__).parent


def add(name: str, commit: str) -> Path:
    """Writes a generation and its line in README.md; raises `FileExistsError` for an existing one."""
    texts = {}
    for kind, each in FORMATS.items():
        store = memory_store()
        each.write(store)
        each.check(store)
        texts[kind] = dump(store)
    folder = MUSEUM / name
    folder.mkdir()
    for kind, text in texts.items():
        (folder / f"{kind}.json").write_text(text)
    with (MUSEUM / "README.md").open("a") as readme:
        readme.write(f"| `{name}` | {datetime.now(UTC):%Y-%m-%d} | {__version__} | {commit} |\n")
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the generation, such as a version")
    name = parser.parse_args().name
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    sys.stdout.write(f"{add(name, commit.stdout.strip())}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
