"""Writes an overview as one HTML page without scripts or references; every text of the data is escaped."""

from html import escape

from maas_ray.data.overview.examine import ColumnOverview, Overview
from maas_ray.data.overview.figures import Figures
from maas_ray.display import shown

_STYLE = (
    "body{font:15px system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#1b1b1b}"
    "table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;padding:.4em .6em;"
    "border-bottom:1px solid #ddd}.bad{color:#a40000}.note{color:#805500}svg{display:block}rect{fill:#4878a8}"
    "td.name{font-weight:600;overflow-wrap:anywhere}"
)
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_WIDTH, _HEIGHT = 200, 40


def write_page(overview: Overview) -> str:
    """The page."""
    rows = "".join(map(_row, overview.columns))
    scope = "rows" if overview.is_whole else "rows at the beginning of the data"
    left_out = "".join(
        f"<li>{_text(name or '(no name)')}: {_text(why)}</li>" for name, why in overview.left_out.items()
    )
    problems = "".join(f"<li class=bad>{_text(problem)}</li>" for problem in overview.problems)
    leaks = "".join(
        f"<li class=bad>{_text(one.name)}: {_text(one.leak)}</li>" for one in overview.columns if one.leak is not None
    )
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{_text(overview.uri)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{_text(overview.uri)}</h1><p>{overview.num_rows} {scope}, task {_text(overview.task)}.</p>"
        + _section("Training refuses this data", problems)
        + _section("These columns may contain the target", leaks)
        + f"<h2>Target {_text(overview.target)}</h2>{_target(overview)}"
        + "<h2>Columns</h2><table><tr><th>column<th>kind<th>values<th>distribution<th>missing<th>notes</tr>"
        + f"{rows}</table>{_section('Left out', left_out)}</body></html>\n"
    )


def _section(title: str, items: str) -> str:
    return f"<h2>{title}</h2><ul>{items}</ul>" if items else ""


def _target(overview: Overview) -> str:
    found = overview.target_figures
    lost = f"{overview.target_missing} missing, {overview.target_unconvertible} not convertible"
    if found is None:
        return f"<p>{lost}</p>"
    return f"<p>{_text(found.summary)}; {found.distinct} distinct; {lost}</p>{_bars(found)}"


def _row(column: ColumnOverview) -> str:
    if column.kind is None:
        return f"<tr><td class=name>{_text(column.name)}<td class=bad colspan=5>refused: {_text(column.reason)}</tr>"
    figures = column.figures
    notes = list(column.notes)
    if column.unconvertible:
        notes.append(f"{column.unconvertible} not convertible, such as {', '.join(map(repr, column.examples))}")
    if column.leak is not None:
        notes.append(f"may contain the target: {column.leak}")
    values = f"{figures.distinct} distinct; {figures.summary}" if figures is not None else ""
    return (
        f"<tr><td class=name>{_text(column.name)}<td>{_text(column.kind)}<br><small>{_text(column.reason)}</small>"
        f"<td>{_text(values)}<td>{_bars(figures)}<td>{column.missing}<td class=note>{_text('; '.join(notes))}</tr>"
    )


def _bars(figures: Figures | None) -> str:
    if figures is None or not figures.bars:
        return ""
    most = max(number for _, number in figures.bars) or 1
    width = _WIDTH / len(figures.bars)
    drawn = "".join(
        f'<rect x="{i * width:.1f}" y="{_HEIGHT * (1 - number / most):.1f}" width="{width * 0.9:.1f}" '
        f'height="{_HEIGHT * number / most:.1f}"><title>{_text(label)}: {number}</title></rect>'
        for i, (label, number) in enumerate(figures.bars)
    )
    return f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img">{drawn}</svg>'


def _text(text: object) -> str:
    return escape(shown(str(text)))
