"""Terminal output: tables, and progress on stderr; control characters in foreign text are escaped."""

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from maas_ray.display import shown


class SafeConsole(Console):
    """A console that prints only its own control codes: those in texts are escaped."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=shown(segment.text))


say = SafeConsole(stderr=True, highlight=False)
"""Console for progress and remarks."""


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table of plain values."""
    found = Table(title=_plain(title), title_justify="left")
    for column in columns:
        found.add_column(_plain(column), overflow="fold")
    for row in rows:
        found.add_row(*("" if value is None else _plain(value) for value in row))
    return found


def facts(title: str, values: Mapping[str, object]) -> Table:
    """A table of names and values."""
    found = Table(title=_plain(title), title_justify="left", show_header=False)
    found.add_column(no_wrap=True)
    found.add_column(overflow="fold")  # a truncated path is useless
    for name, value in values.items():
        found.add_row(_plain(name), _plain(value))
    return found


def _plain(value: object) -> Text:
    """A text that rich does not parse as markup: a name can be `[/red]`."""
    return Text(shown(str(value)))
