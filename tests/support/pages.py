"""The pages of the documentation, the blocks in them, and the program that generates some of them."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

from tests.support.root import ROOT

DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY"))])


def blocks(text: str, language: str) -> list[str]:
    """The code blocks in a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def name_of(path: Path) -> str:
    """A page's path in the repository."""
    return str(path.relative_to(ROOT))


def generator() -> ModuleType:
    """docs/generate.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
