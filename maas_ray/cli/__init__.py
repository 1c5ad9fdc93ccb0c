"""The command `maas-ray`: parses, calls the library, prints. Every command has --json, for machines, and --debug."""


def main() -> None:
    """The entry point of the command."""
    from maas_ray.search_path import leave_out_working_directory

    leave_out_working_directory()
    from maas_ray.garbage import collect_rarely

    collect_rarely()
    from maas_ray.cli.app import app

    app(prog_name="maas-ray")
