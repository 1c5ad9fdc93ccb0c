"""How every command answers: one JSON document or something readable on stdout, and errors as one line on stderr."""

import contextlib
import functools
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.table import Table

from maas_ray.errors import MaasError

say = Console(stderr=True, highlight=False)
"""Progress and remarks."""

_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, for machines.")]
_DEBUG = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@dataclass(frozen=True)
class Answer:
    """What a command found out."""

    document: Any
    """For --json."""
    view: RenderableType
    """For people."""
    exit_code: int = 0


def reported(command: Callable[..., Answer]) -> Callable[..., None]:
    """Makes a function that returns an `Answer` a command, with the options --json and --debug."""

    @functools.wraps(command)
    def run(*args: Any, as_json: bool, debug: bool, **kwargs: Any) -> None:
        try:
            with _stdout_is_kept() if as_json else contextlib.nullcontext():
                answer = command(*args, **kwargs)
        except Exception as error:
            if debug:
                say.print_exception()
            _fail(error, as_json)
        else:
            if as_json:
                typer.echo(json.dumps(answer.document))
            elif isinstance(answer.view, str):
                typer.echo(answer.view)  # as it is: rich would wrap it
            else:
                Console(highlight=False).print(answer.view)
            raise typer.Exit(answer.exit_code)

    signature = inspect.signature(command)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in (("as_json", _JSON), ("debug", _DEBUG))
    ]
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *added], return_annotation=None
    )
    run.__annotations__ = {**command.__annotations__, "as_json": _JSON, "debug": _DEBUG, "return": None}
    return run


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table of plain values."""
    shown = Table(title=title, title_justify="left")
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*("" if value is None else str(value) for value in row))
    return shown


def facts(title: str, values: Mapping[str, object]) -> Table:
    """A table of names and values."""
    shown = Table(title=title, title_justify="left", show_header=False)
    shown.add_column(no_wrap=True)
    shown.add_column(overflow="fold")  # a path that is cut off is of no use
    for name, value in values.items():
        shown.add_row(name, str(value))
    return shown


def _fail(error: Exception, as_json: bool) -> None:
    code = error.code if isinstance(error, MaasError) else "internal"
    message = str(error) if isinstance(error, MaasError) else f"{type(error).__name__}: {error}"
    hint = "" if isinstance(error, MaasError) else " (--debug shows where)"
    if as_json:
        typer.echo(json.dumps({"error": {"code": code, "message": message}}))
    typer.echo(f"error[{code}]: {message}{hint}", err=True)
    raise typer.Exit(1) from None


@contextlib.contextmanager
def _stdout_is_kept() -> Iterator[None]:
    """Sends what libraries print to stderr: stdout is for the one document."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
