"""The output of every command: a JSON document or readable text on stdout, and each error as one line on stderr."""

import contextlib
import functools
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import typer
from rich.console import RenderableType

from maas_ray.cli.options import APP_DIR_VARIABLE
from maas_ray.console.leaving import end_at_closed_pipe, say_left
from maas_ray.console.output import SafeConsole
from maas_ray.display import masked, shown
from maas_ray.errors import MaasError, Preempted
from maas_ray.process import interrupts, search_path

F = TypeVar("F", bound=Callable[..., Any])


_WIDEST = 10_000
"""Characters of a line in a file or a pipe."""


class _Output(SafeConsole):
    """Tables are as wide as a terminal; in a file or a pipe as wide as their content, so that no cell is wrapped."""

    def print_view(self, view: RenderableType) -> None:
        """Prints the result of a command."""
        if not self.is_terminal and "COLUMNS" not in os.environ:
            needed = self.measure(view, options=self.options.update(width=_WIDEST)).maximum
            self.width = max(self.width, needed)
        self.print(view)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
_DEBUG = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@dataclass(frozen=True)
class CommandResult:
    """The result of a command."""

    document: Any
    """Printed with --json."""
    view: RenderableType
    """Printed without --json."""
    exit_code: int = 0
    holds_data: bool = False
    """Whether the document contains values of the user's data, in which nothing is masked."""


def uses_modules(command: F) -> F:
    """Marks a command that builds models, which specs may name by import path: it also searches --app-dir, last."""
    command.uses_modules = True  # type: ignore[attr-defined]
    return command


def reported(command: Callable[..., CommandResult]) -> Callable[..., None]:
    """Makes a command of a function that returns a `CommandResult`: adds the options --json and --debug."""

    @functools.wraps(command)
    def run(*args: Any, as_json: bool, debug: bool, **kwargs: Any) -> None:
        try:
            if getattr(command, "uses_modules", False):
                search_path.append(os.environ.get(APP_DIR_VARIABLE) or os.getcwd())
            else:
                os.environ.pop(APP_DIR_VARIABLE, None)  # workers of this command do not need it either
            with _stdout_is_kept() if as_json else contextlib.nullcontext():
                result = command(*args, **kwargs)
        except KeyboardInterrupt:
            raise typer.Exit(say_left()) from None
        except Exception as error:
            if debug:
                typer.echo(shown("".join(traceback.format_exception(error))), err=True)
            _fail(error, as_json)
        else:
            interrupts.let_go()  # the work is done
            raise typer.Exit(_print(result, as_json))

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


def _print(result: CommandResult, as_json: bool) -> int:
    """Writes the result to stdout; returns the exit code."""
    try:
        if as_json:
            typer.echo(json.dumps(result.document if result.holds_data else masked(result.document)))
        elif isinstance(result.view, str):
            typer.echo(shown(result.view))  # rich would wrap it
        else:
            _Output(highlight=False).print_view(result.view)
        sys.stdout.flush()
    except BrokenPipeError:
        return end_at_closed_pipe()
    return result.exit_code


def _fail(error: Exception, as_json: bool) -> None:
    code = error.code if isinstance(error, MaasError) else "internal"
    message = shown(str(error) if isinstance(error, MaasError) else f"{type(error).__name__}: {error}")
    hint = "" if isinstance(error, MaasError) else " (--debug shows the traceback)"
    if as_json:
        typer.echo(json.dumps({"error": {"code": code, "message": message}}))
    typer.echo(f"error[{code}]: {message}{hint}", err=True)
    number = interrupts.last() if isinstance(error, Preempted) else None
    interrupts.let_go()
    raise typer.Exit(1 if number is None else interrupts.exit_code(number)) from None


@contextlib.contextmanager
def _stdout_is_kept() -> Iterator[None]:
    """Redirects the output of libraries to stderr: stdout contains the JSON document alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
