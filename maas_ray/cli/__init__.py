"""The command line `maas-ray`: parses options, calls the library, prints. Every command has --json and --debug."""

_TYPERS_CODE = 130
"""Typer's exit code for an interruption outside of a command; Typer does not re-raise the exception."""


def main() -> None:
    """Runs the command line."""
    from maas_ray.process.search_path import leave_out_working_directory

    leave_out_working_directory()
    from maas_ray.console.leaving import has_said, say_left, take_over
    from maas_ray.process.interrupts import last

    try:
        take_over()
        from maas_ray.process.garbage import collect_rarely

        collect_rarely()
        from maas_ray.cli.app import app

        app(prog_name="maas-ray")
    except KeyboardInterrupt:
        raise SystemExit(say_left()) from None
    except SystemExit as end:
        if end.code == _TYPERS_CODE and last() is not None and not has_said():
            raise SystemExit(say_left()) from None
        raise
