"""Small real files for the data tests, and the folder of larger ones that only some machines have."""

from pathlib import Path

import pytest

from tests.support.root import ROOT

SHARED = ROOT.parent / "shared" / "data"

ROWS = """age,city,height,member,label
31,Rome,1.80,true,yes
45,Oslo,1.65,false,no
,Rome,1.72,true,yes
28,,1.91,true,no
60,Lima,,false,yes
39,Oslo,1.55,false,no
22,Lima,1.60,true,yes
51,Rome,1.75,true,no
33,Oslo,1.68,false,yes
47,Rome,1.83,true,no
"""
"""Ten rows with three missing values."""


def shared(name: str) -> str:
    """A path in the folder of larger data sets; skips the test where there is none."""
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} exists on the developers' machines only")
    return str(SHARED / name)


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)
