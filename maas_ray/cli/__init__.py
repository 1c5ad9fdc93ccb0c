"""The command `maas-ray`: parses, calls the library, prints. Every command has --json, for machines, and --debug."""

_TYPERS_CODE = 130
"""Typer's own for an interruption outside of a command, which it does not let through."""


def main() -> None:
    """The entry point of the command."""
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
