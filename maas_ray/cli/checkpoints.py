"""The commands `checkpoints list`, `verify`, `reshard` and `export`, which need a store but no cluster."""

from datetime import datetime
from typing import Annotated, Literal

import typer
from rich.console import Group
from rich.markup import escape

from maas_ray.cli.options import DEFAULT_STORE, Checkpoint, Endpoint, Store, Weights, open_store
from maas_ray.cli.reporting import CommandResult, reported, uses_modules
from maas_ray.console.leaving import leaves
from maas_ray.console.output import facts, say, table

Run = Annotated[str, typer.Argument(help="Id of the run.")]
Step = Annotated[int | None, typer.Option(help="Step of the checkpoint.", show_default="newest")]

app = typer.Typer(help="Lists, verifies, reshards and exports the checkpoints of a run.", no_args_is_help=True)


def list_(run: Run, store: Store = DEFAULT_STORE, endpoint: Endpoint = None) -> CommandResult:
    """Lists the committed checkpoints of a run, oldest first."""
    from maas_ray.checkpoint.catalog import describe

    found = describe(open_store(store, endpoint), _prefix(run))
    rows = [
        (
            each["step"],
            each["error"] or datetime.fromtimestamp(each["committed_s"]).strftime("%Y-%m-%d %H:%M:%S"),
            f"{each['num_bytes'] / 1e6:.1f} MB",
            each["num_tensors"],
            each["num_parts"],
            each["num_ranks"],
            each["layout"],
            "yes" if each["is_pinned"] else "",
        )
        for each in found
    ]
    columns = ("step", "committed", "size", "tensors", "parts", "ranks", "layout", "pinned")
    return CommandResult(found, table(run, columns, rows))


def verify(
    run: Run,
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint.", show_default="all")] = None,
    store: Store = DEFAULT_STORE,
    endpoint: Endpoint = None,
) -> CommandResult:
    """Reads checkpoints and compares every byte with its digest; exit code 1 if one is damaged."""
    from maas_ray.checkpoint.catalog import list_checkpoints, open_checkpoint
    from maas_ray.checkpoint.catalog import verify as check
    from maas_ray.errors import ObjectCorrupt

    opened = open_store(store, endpoint)
    steps = list_checkpoints(opened, _prefix(run)) if step is None else [step]
    if not steps:
        open_checkpoint(opened, _prefix(run))  # raises the exact error
    problems: dict[int, list[str]] = {}
    with say.status("verifying"):
        for each in steps:
            try:
                problems[each] = [str(problem) for problem in check(open_checkpoint(opened, _prefix(run), each))]
            except ObjectCorrupt as error:
                problems[each] = [str(error)]
    damaged = {each: found for each, found in problems.items() if found}
    document = {"run": run, "verified": sorted(problems), "problems": damaged}
    shown = facts("damaged" if damaged else "intact", {"verified": len(problems), "damaged": len(damaged)})
    lines = [f"[red]step {each}[/] {escape(line)}" for each, found in damaged.items() for line in found]
    return CommandResult(document, Group(shown, *lines), int(bool(damaged)))


def reshard(
    run: Run,
    to: Annotated[str, typer.Option(help="Target store: a directory or URI; the checkpoint keeps its path.")],
    step: Step = None,
    parts: Annotated[
        int | None, typer.Option(help="Largest number of tensor files.", show_default="files of 1 GiB", min=1)
    ] = None,
    store: Store = DEFAULT_STORE,
    endpoint: Endpoint = None,
) -> CommandResult:
    """Rewrites a checkpoint with every tensor unsharded, as safetensors files that other programs can read."""
    from maas_ray.checkpoint.catalog import HISTORY, open_checkpoint

    leaves(f"{to} contains no complete copy of the checkpoint; run the command again")
    with say.status("writing"):
        committed = open_checkpoint(open_store(store, endpoint), _prefix(run), step)
        from maas_ray.checkpoint.reshard import reshard as write

        opened = open_store(to, endpoint if to.startswith("s3://") else None)
        written = write(committed, opened, _prefix(run), parts)
    files = [part.key for name, part in written.parts.items() if name != HISTORY]
    document = {"run": run, "step": written.meta["step"], "store": opened.uri, "files": files}
    return CommandResult(
        document, facts(f"step {written.meta['step']} of {run}", {"store": opened.uri, "files": "\n".join(files)})
    )


@uses_modules
def export(
    run: Run,
    to: Annotated[str, typer.Option(help="Target folder: a directory or URI.")],
    checkpoint: Checkpoint = None,
    weights: Weights = None,
    format_: Annotated[
        Literal["hf"], typer.Option("--format", help="hf: config.json, safetensors and tokenizer for Transformers.")
    ] = "hf",
    shard_mb: Annotated[int, typer.Option(help="Largest size of a weight file, in MB.", min=1)] = 5000,
    store: Store = DEFAULT_STORE,
    endpoint: Endpoint = None,
) -> CommandResult:
    """Exports the model of a checkpoint for other programs: `from_pretrained` of Transformers can read it.

    --checkpoint and --weights select the same as in `maas-ray publish`.
    """
    leaves(f"{to} may contain an incomplete model; run the command again to rewrite it")
    with say.status("writing"):
        from maas_ray.train.records.checkpoint_selector import parse_which
        from maas_ray.train.validation.hf_export import export_hf
        from maas_ray.train.validation.load_model import load_trained

        trained = load_trained(open_store(store, endpoint), run, parse_which(checkpoint), weights=weights)
        opened = open_store(to, endpoint if to.startswith("s3://") else None)
        files = export_hf(trained, opened, shard_mb * 1_000_000)
    document = {"run": run, "step": trained.step, "weights": trained.weights, "folder": opened.uri, "files": files}
    shown = {"folder": opened.uri, "weights": trained.weights, "files": "\n".join(files)}
    return CommandResult(document, facts(f"step {trained.step} of {run}", shown))


def _prefix(run: str) -> str:
    from maas_ray.train.records.runs import checkpoints_prefix

    return checkpoints_prefix(run)


for command in (list_, verify, reshard, export):
    app.command(command.__name__.rstrip("_"))(reported(command))
