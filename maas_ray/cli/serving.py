"""The commands serve, unserve and predict."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.markup import escape
from rich.text import Text

from maas_ray.cli.options import DEFAULT_STORE, Endpoint, Set, StateDir, Store, say_store
from maas_ray.cli.reporting import CommandResult
from maas_ray.console.leaving import leaves
from maas_ray.console.output import say, table

NOTHING_RECORDED = 3
"""Exit code of `serve --restore` if no pool is recorded: a retry does not help."""


def serve(
    spec: Annotated[
        Path | None,
        typer.Argument(help="YAML file with a ServeSpec; see `maas-ray schema serve`.", show_default=False),
    ] = None,
    overrides: Set = None,
    timeout_s: Annotated[
        float | None,
        typer.Option(
            help="Timeout without a further ready replica, in seconds; the pool is then rolled back.",
            show_default="rollout.timeout_s of each pool",
        ),
    ] = None,
    restore: Annotated[
        bool, typer.Option("--restore", help="Deploy the pools recorded in --store instead of a spec file.")
    ] = False,
    store: Store = DEFAULT_STORE,
    endpoint: Endpoint = None,
    cluster_name: Annotated[
        str, typer.Option("--cluster", help="With --restore: the field `cluster` of the recorded specs.")
    ] = "default",
    state_dir: StateDir = None,
) -> CommandResult:
    """Deploys the pools of a spec and returns once each answers over HTTP; repeating it changes nothing.

    First prints the resources that each pool needs, the free resources and the kind of update. The cluster rolls back
    an update that fails or stalls, even if this command has ended. If some models of a pool cannot be loaded, the pool
    serves the others, the command lists the failed ones, and the exit code is 1.
    """
    from maas_ray import cluster
    from maas_ray.addresses import http_url, reachable_host
    from maas_ray.errors import SpecError
    from maas_ray.spec import load_spec

    if (spec is None) != restore:
        raise SpecError("give exactly one of: a ServeSpec file, --restore")
    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        say.print(Text(line))

    leaves("nothing was deployed; run the command again")
    with say.status("deploying"):
        from maas_ray.serve.spec.serve import ServeSpec

        loaded = (
            _recorded(store, endpoint, cluster_name) if spec is None else load_spec(ServeSpec, spec, overrides or ())
        )
        if loaded is None:
            text = f"nothing to restore: {store} contains no record of pools of cluster {cluster_name!r}"
            return CommandResult({"pools": [], "done": []}, escape(text), NOTHING_RECORDED)
        if spec is not None:
            say_store(loaded.storage)
        cluster.connect(state_dir=state_dir)
        from maas_ray.ray_internals.serve import log_only_warnings
        from maas_ray.serve.deploy.pool import deploy

        log_only_warnings()

        state = cluster.load_state(state_dir)
        if state is not None and (restore or "port" not in loaded.http.model_fields_set):
            http = loaded.http.model_copy(update={"port": state.http_port})
            loaded = loaded.model_copy(update={"http": http})
        names = " ".join(pool.name for pool in loaded.pools)
        leaves(
            f"the cluster continues to deploy {names}, and rolls back what does not become ready: `maas-ray status` "
            "shows it, and the same command waits for it"
        )
        pools = deploy(loaded, timeout_s, tell)
    url = http_url(reachable_host(loaded.http.host), loaded.http.port)
    if loaded.http.tls is not None:
        url = url.replace("http://", "https://", 1)
    rows = [(pool.name, pool.status, f"{url}{pool.route_prefix.rstrip('/')}", pool.num_running) for pool in pools]
    document = {"url": url, "pools": [asdict(pool) for pool in pools], "done": lines}
    shown = table("serving", ("pool", "status", "url", "replicas"), rows)
    unserved = [f"pool {pool.name}: {text}" for pool in pools for text in pool.unserved]
    view = Group(shown, *(f"not served: {escape(text)}" for text in unserved))
    return CommandResult(document, view, int(bool(unserved)))


def _recorded(store: str, endpoint: str | None, cluster_name: str) -> Any:
    from maas_ray.cli.options import open_store
    from maas_ray.serve.deploy.record import latest

    return latest(open_store(store, endpoint), cluster_name)


def unserve(
    pools: Annotated[list[str] | None, typer.Argument(help="Names of the pools.", show_default="all")] = None,
    timeout_s: Annotated[float, typer.Option(help="Timeout until the pools have ended, in seconds.")] = 120.0,
    state_dir: StateDir = None,
) -> CommandResult:
    """Ends pools; requests in progress are answered first."""
    from maas_ray import cluster

    with say.status("ending"):
        cluster.connect(state_dir=state_dir)
        from maas_ray.ray_internals.serve import log_only_warnings
        from maas_ray.serve.deploy.pool import status, undeploy

        log_only_warnings()

        names = pools or [pool.name for pool in status()]
        leaves(
            f"Ray Serve ends {' '.join(names)} once their requests are answered; `maas-ray status` shows what remains"
        )
        undeploy(names, timeout_s=timeout_s)
    return CommandResult({"ended": names}, f"ended {', '.join(names)}" if names else "nothing was served")


def predict(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    input: Annotated[
        Path,
        typer.Option(
            help="File of raw rows in a format that training reads (.csv, .tsv, .parquet, .jsonl, …), .json list of "
            "objects, .npy array, image file, or directory of image files."
        ),
    ],
    url: Annotated[
        str | None, typer.Option(help="URL of the pool.", show_default="the local cluster's", envvar="MAAS_RAY_URL")
    ] = None,
    version: Annotated[
        int | None, typer.Option(help="Version of the model.", show_default="chosen by the pool")
    ] = None,
    batch_rows: Annotated[int, typer.Option(help="Rows per request.", min=1)] = 64,
    timeout_s: Annotated[float, typer.Option(help="Timeout of one request, in seconds.")] = 30.0,
    state_dir: StateDir = None,
) -> CommandResult:
    """Sends raw rows to a served model over HTTP (Open Inference Protocol v2) and prints the predictions.

    Tables are read as the model's training data was: with its delimiter, missing values and other options.
    """
    from maas_ray.client import Client
    from maas_ray.client.files import read_input_file
    from maas_ray.client.prediction import join_predictions
    from maas_ray.cluster.health.front import front_url
    from maas_ray.cluster.node.state import load_state
    from maas_ray.display import mask
    from maas_ray.errors import ClusterError

    if is_own := url is None:
        state = load_state(state_dir)
        if state is None:
            raise ClusterError("no local cluster is running; give --url, such as http://127.0.0.1:8000")
        url = front_url(state)
    with Client(url, timeout_s=timeout_s, through_proxy=not is_own) as client:
        rows = read_input_file(input, client.describe(model, version))
        batches = rows.batches(batch_rows)
        answer = join_predictions([client.predict(model, batch, version=version) for batch in batches])
    predictions = list(answer.named_rows())
    lineage = {"x-maas-run": answer.run, "x-maas-version": answer.version}
    names = rows.names or range(len(predictions))
    view = Group(
        table(
            f"{model}, {len(predictions)} rows",
            ("file" if rows.names else "row", *predictions[0]),
            [(name, *map(_shown, row.values())) for name, row in zip(names, predictions, strict=True)],
        ),
        *(
            f"{number} values of {escape(name)} are no numbers; they were sent as missing values, as in training"
            for name, number in (rows.num_unconvertible or {}).items()
        ),
    )
    document = {"model": model, "url": mask(url), "headers": lineage, "predictions": predictions}
    if rows.names:
        document["files"] = list(rows.names)
    if rows.num_unconvertible:
        document["unconvertible"] = dict(rows.num_unconvertible)
    return CommandResult(document, view, holds_data=True)


MAX_SHOWN = 5
"""Scores of a row that the table shows, the largest first."""


def _shown(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    best = sorted(value.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{label} {score:.4g}" for label, score in best[:MAX_SHOWN]) + (
        "…" if len(best) > MAX_SHOWN else ""
    )
