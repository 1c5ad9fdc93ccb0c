"""The commands up, down, status, doctor and quickstart."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from maas_ray.cli.options import Endpoint, StateDir
from maas_ray.cli.reporting import CommandResult
from maas_ray.console.leaving import leaves
from maas_ray.console.output import facts, say, table
from maas_ray.store.location import STORE_VARIABLE

NOT_RUNNING = 3
"""Exit code of `status` without a running cluster, the same as that of `systemctl status`."""


def up(
    num_cpus: Annotated[int | None, typer.Option(help="Logical CPUs.", show_default="the machine's")] = None,
    num_gpus: Annotated[int | None, typer.Option(help="Logical GPUs.", show_default="detected by Ray")] = None,
    profile: Annotated[
        Literal["fast", "portable"] | None,
        typer.Option(
            help="fast: HAProxy, Linux only. portable: Ray Serve's Python proxy.", show_default="fast on Linux"
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            help="Address of this machine for worker nodes to join.", show_default="loopback: no other machine can join"
        ),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Join the cluster whose head node is at HOST:PORT.", show_default=False)
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File that contains the token of the cluster to join.", show_default=False)
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(help="Label of the joining node as NAME=VALUE, for placement; repeatable.", show_default=False),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help="HTTP port for predictions; 0: any free port.", show_default="8000, else any free port"),
    ] = None,
    dashboard_port: Annotated[
        int | None,
        typer.Option(help="Port of the Ray dashboard; 0: any free port.", show_default="8265, else any free port"),
    ] = None,
    state_dir: StateDir = None,
) -> CommandResult:
    """Starts a Ray cluster on this machine with the environment that maas-ray needs; --address: joins one instead.

    Fails within seconds if the limit of open files, the memory, the shared memory or the disk is too small for Ray.
    If interrupted (Ctrl-C, SIGTERM), it ends every process that it started.
    """
    from maas_ray import cluster
    from maas_ray.cluster.node.environment import LOOPBACK

    leaves(
        lambda: (
            "a cluster is still running; end it with `maas-ray down`"
            if _has_record(state_dir)
            else "all started processes have ended; run `maas-ray up` again"
        )
    )
    if address is not None:
        return _join(address, token_file, label or [], num_cpus, num_gpus, profile, host, state_dir)
    _refuse_without(address, token_file, label)
    with say.status("starting Ray"):
        ports = cluster.choose_ports(http=port, dashboard=dashboard_port)
        state = cluster.up(
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            profile=profile,
            state_dir=state_dir,
            ports=ports,
            host=host or LOOPBACK,
        )
    script = cluster.state_directory(state_dir) / "env.sh"
    document = {
        "address": state.address,
        "profile": state.profile,
        "dashboard_url": state.dashboard_url,
        "http_url": state.http_url,
        "token_path": state.token_path,
        "environment_script": str(script),
    }
    shown = {
        "Ray": state.address,
        "profile": state.profile,
        "dashboard": f"{state.dashboard_url} (log in with the token in {state.token_path})",
        "predictions": f"{state.http_url} (after `maas-ray serve`)",
        "for ray and serve commands": f". {script}",
        "to stop": "maas-ray down",
    }
    if host is not None:
        shown["join from another machine"] = f"maas-ray up --address {state.address} --token-file FILE"
        shown["token to copy there"] = state.token_path
    return CommandResult(document, facts("the cluster is running", shown))


def _join(
    address: str,
    token_file: Path | None,
    labels: list[str],
    num_cpus: int | None,
    num_gpus: int | None,
    profile: Literal["fast", "portable"] | None,
    host: str | None,
    state_dir: Path | None,
) -> CommandResult:
    from maas_ray import cluster
    from maas_ray.errors import SpecError

    if token_file is None:
        raise SpecError("--address needs --token-file: a copy of the file `token` in the head node's state directory")
    pairs = [label.partition("=") for label in labels]
    if wrong := [label for label, (name, equals, _) in zip(labels, pairs, strict=True) if not name or not equals]:
        raise SpecError(f"--label must be NAME=VALUE, not {wrong[0]!r}")
    try:
        token = token_file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read the token file {token_file}: {error}") from error
    if not token:
        raise SpecError(f"the token file {token_file} is empty")
    with say.status(f"joining {address}"):
        state = cluster.join(
            address,
            token,
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            profile=profile,
            labels={name: value for name, _, value in pairs},
            host=host,
            state_dir=state_dir,
        )
    document = {"address": state.address, "profile": state.profile, "node_id": state.node_id, "role": state.role}
    shown = {"head": state.address, "profile": state.profile, "node": state.node_id, "to leave": "maas-ray down"}
    return CommandResult(document, facts("this machine has joined the cluster", shown))


def _refuse_without(address: str | None, token_file: Path | None, label: list[str] | None) -> None:
    from maas_ray.errors import SpecError

    for name, value in (("--token-file", token_file), ("--label", label)):
        if address is None and value:
            raise SpecError(f"{name} needs --address HOST:PORT of the head node: it applies to a machine that joins")


def down(
    drain_timeout_s: Annotated[
        float, typer.Option(help="Timeout for requests in progress, in seconds; 0: no wait.")
    ] = 60.0,
    state_dir: StateDir = None,
) -> CommandResult:
    """Ends the cluster that `up` started: requests in progress are answered, then all processes end.

    On a worker node, its node leaves the cluster after its work has moved to other nodes. Ctrl-C (or SIGTERM) ends
    that wait; a second one kills the remaining processes. No process remains in either case.
    """
    from maas_ray import cluster

    leaves(
        lambda: (
            "processes of the cluster remain; run `maas-ray down` again"
            if _has_record(state_dir)
            else "no process of the cluster remains; requests in progress may have been cut off"
        )
    )
    with say.status("stopping"):
        was_running = cluster.down(state_dir=state_dir, drain_timeout_s=drain_timeout_s)
    return CommandResult({"stopped": was_running}, "stopped" if was_running else "no cluster to stop")


def _has_record(state_dir: Path | None) -> bool:
    from maas_ray.cluster.node.state import load_state

    return load_state(state_dir) is not None


def status(state_dir: StateDir = None) -> CommandResult:
    """Shows the cluster that `up` started; exit code 3 if none is running."""
    from maas_ray import cluster

    found = cluster.status(state_dir=state_dir)
    if not found.is_running:
        return CommandResult(asdict(found), found.detail, NOT_RUNNING)
    amounts = {name: value for name, value in sorted(found.resources.items()) if "memory" not in name}
    shown = {
        "Ray": found.address,
        "profile": found.profile,
        "nodes": found.num_nodes,
        "resources": ", ".join(f"{value:g} {name}" for name, value in amounts.items()),
        "dashboard": found.dashboard_url,
        "predictions": found.http_url,
        **{f"front {url}": text for url, text in found.fronts.items() if len(found.fronts) > 1 or text != "answers"},
        "served": ", ".join(f"{name} {state}" for name, state in found.applications.items()) or "nothing",
    }
    if found.few_connections:
        shown["connections"] = "; ".join(found.few_connections)
    if found.unavailable:
        shown["not served"] = "; ".join(
            f"{name}: {line}" for name, lines in found.unavailable.items() for line in lines
        )
    return CommandResult(asdict(found), facts("running", shown))


def doctor(
    store: Annotated[
        str | None, typer.Option(help="Also test this store: write and remove one object.", envvar=STORE_VARIABLE)
    ] = None,
    endpoint: Endpoint = None,
    state_dir: StateDir = None,
) -> CommandResult:
    """Checks versions, ports, HAProxy, disk, the cluster's environment and the store; exit code 1 if a check fails."""
    from maas_ray import cluster
    from maas_ray.store.objects import StorageSpec

    storage = StorageSpec(uri=store, endpoint=endpoint) if store else None
    with say.status("checking"):
        checks = cluster.doctor(state_dir=state_dir, storage=storage)
    failed = [check for check in checks if not check.ok]
    rows = [("[green]ok[/]" if check.ok else "[red]FAILED[/]", check.name, check.detail, check.fix) for check in checks]
    title = f"{len(failed)} of {len(checks)} checks failed" if failed else f"all {len(checks)} checks passed"
    document = {"ok": not failed, "checks": [asdict(check) for check in checks]}
    return CommandResult(document, table(title, ("", "check", "found", "fix"), rows), int(bool(failed)))


def quickstart(
    keep: Annotated[bool, typer.Option("--keep", help="Keep the cluster running and the model served.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as one JSON line.")] = False,
) -> None:
    """Runs the complete pipeline on this machine: data, training, ONNX, registry, HTTP predictions."""
    from maas_ray.console.job import run_job
    from maas_ray.quickstart.pipeline import quickstart as run

    raise typer.Exit(run_job(lambda: run(keep, as_json)))
