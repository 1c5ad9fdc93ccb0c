"""HAProxy configuration as sections of lines, with edits that fail unless the changed line exists exactly once."""

import re
from collections.abc import Callable

Section = list[str]
"""Lines; the first one is the header."""

_HEADER = re.compile(r"(global|defaults|frontend|backend|listen)\b")


class Unexpected(Exception):
    """A line to be changed does not exist exactly once: this version of Serve writes another configuration."""


def split(config: str) -> list[Section]:
    """Splits a configuration into sections."""
    sections: list[Section] = []
    for line in config.splitlines():
        if _HEADER.match(line):
            sections.append([line])
        elif sections:
            sections[-1].append(line)
        elif line.strip():
            raise Unexpected(f"{line!r} is before the first section")
    return sections


def join(sections: list[Section]) -> str:
    """Joins sections to a configuration."""
    return "\n".join(line for section in sections for line in section) + "\n"


def named(sections: list[Section], header: str) -> Section:
    """Returns the only section with this header."""
    found = [section for section in sections if section[0] == header]
    if len(found) != 1:
        raise Unexpected(f"there are {len(found)} sections {header!r} instead of one")
    return found[0]


def replace(section: Section, start: str, change: Callable[[str], str]) -> None:
    """Changes the only line of a section with this beginning; the result may be several lines."""
    found = [index for index, line in enumerate(section) if line.strip().startswith(start)]
    if len(found) != 1:
        raise Unexpected(f"section {section[0]!r} has {len(found)} lines {start!r} instead of one")
    section[found[0] : found[0] + 1] = change(section[found[0]]).splitlines() or [""]


def substitute(line: str, old: str, new: str) -> str:
    """Changes the only occurrence in a line."""
    if line.count(old) != 1:
        raise Unexpected(f"{old!r} is not in {line!r}")
    return line.replace(old, new)
