"""The commands import, promote, models, fsck, compact and schema, which need at most a store."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Group
from rich.markup import escape

from maas_ray.cli.options import DEFAULT_STORE, Endpoint, Store, Token, open_store
from maas_ray.cli.publishing import begin_publishing, publish_version
from maas_ray.cli.reporting import CommandResult
from maas_ray.console.leaving import leaves
from maas_ray.console.output import facts, say, table
from maas_ray.process.interrupts import held


def import_(
    file: Annotated[Path, typer.Argument(help="ONNX file; external weights are embedded.")],
    name: Annotated[str, typer.Option(help="Name of the model that gets the new version.")],
    alias: Annotated[
        str | None, typer.Option(metavar="ALIAS", help="Also point this alias at the new version.")
    ] = None,
    task: Annotated[
        Literal["classification", "binary", "regression", "other"], typer.Option(help="Meaning of the outputs.")
    ] = "other",
    labels: Annotated[
        str | None, typer.Option(metavar="A,B,C", help="Class names, in the order of the scores.")
    ] = None,
    labels_file: Annotated[Path | None, typer.Option(help="File with one class name per line.")] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SIZES",
            help="Shape of an input that the file leaves open: x=-1,3 or ids=batch,seq; repeatable.",
        ),
    ] = None,
    sample: Annotated[
        Path | None,
        typer.Option(
            help="Valid input values for the test run and the warm-up: .npz, or a v2 request as .json. Stored in the "
            "bundle."
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option(help="Compare several runs on random values; --no-check: only load the model.")
    ] = True,
    batch_axis: Annotated[
        str | None,
        typer.Option(
            metavar="none|NAME",
            help="Batch dimension, the first one of every input: its name in the graph, 'first' if it has no name, "
            "'none' if the model has no batch dimension.",
            show_default="derived from the dimension's name in the graph",
        ),
    ] = None,
    token: Token = None,
    pad: Annotated[
        str | None,
        typer.Option(
            metavar="DIMENSION=MASK",
            help="Batch requests of different sizes in this dimension: shorter ones are padded, and the input MASK is "
            "0 there. Verified at each load.",
        ),
    ] = None,
    pad_value: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Padding value of an input; repeatable.", show_default="0 or ''"),
    ] = None,
    store: Store = DEFAULT_STORE,
    endpoint: Endpoint = None,
) -> CommandResult:
    """Publishes an ONNX file as the next version of a model, after an inspection and a run on random values."""
    from maas_ray.registry.models import PRODUCTION

    begin_publishing(name)
    opened = open_store(store, endpoint)
    from maas_ray.registry.padded import read_pad_values

    with say.status("importing"):
        from maas_ray.registry.adapting import read_shapes
        from maas_ray.registry.importing import import_onnx, read_labels

        imported = import_onnx(
            opened,
            file,
            task=task,
            labels=read_labels(labels, labels_file),
            shapes=read_shapes(shape or []),
            sample=sample,
            is_checked=check,
            batch_axis=batch_axis,
            pad=pad,
            pad_values=read_pad_values(pad_value or []),
        )
    version = publish_version(opened, name, imported.bundle_id, token=token, alias=alias)
    document = {**asdict(version), "promoted": alias, **imported.info.model_dump(mode="json", exclude={"metrics"})}
    origin = imported.info.lineage.imported
    shown = {
        "bundle": version.bundle,
        "run": version.run,
        "sha256 of the file": origin.sha256 if origin else "",
        "written by": (origin.producer if origin else "") or "unknown",
        **{f"input {tensor.name}": _shown(tensor) for tensor in imported.info.signature.inputs},
        **{f"output {tensor.name}": _shown(tensor) for tensor in imported.info.signature.outputs},
        **{f"change {number}": text for number, text in enumerate(imported.info.parity.get("changes", ()), 1)},
        "run on random values": imported.info.parity["run"],
        "warm-up input": imported.info.parity["warm_up"],
        "runs in the process": imported.info.parity["process"],
        "batching of requests": _merged(imported.info.parity),
        "alias": alias or f"none yet: maas-ray promote {name} {version.version} --alias {PRODUCTION}",
    }
    return CommandResult(document, facts(f"imported {name} version {version.version}", shown))


def promote(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    version: Annotated[int, typer.Argument(help="Version that the alias points at.", min=1)],
    alias: Annotated[str, typer.Option(help="Alias to move.")] = "production",
    store: Store = DEFAULT_STORE,
    endpoint: Endpoint = None,
) -> CommandResult:
    """Points an alias at a version; running pools follow it without a failed request."""
    from maas_ray.registry.models import Registry

    registry = Registry(open_store(store, endpoint))
    with held():
        promoted = registry.promote(model, version, alias)
        leaves(f"{alias} of {model} is version {version}; no further step is needed")
    return CommandResult({"alias": alias, **asdict(promoted)}, f"{alias} of {model} is version {version}")


def models(
    model: Annotated[
        str | None, typer.Argument(help="Model whose versions are listed.", show_default="all models")
    ] = None,
    store: Store = DEFAULT_STORE,
    endpoint: Endpoint = None,
) -> CommandResult:
    """Lists the models of a store, or the versions of one."""
    from maas_ray.registry.models import Registry

    registry = Registry(open_store(store, endpoint))
    if model is None:
        found = registry.models()
        newest = [(name, max(each.versions, default=""), _aliases(each)) for name, each in sorted(found.items())]
        document = {name: _document(each) for name, each in found.items()}
        return CommandResult(document, table(store, ("model", "newest version", "aliases"), newest))
    one = registry.model(model)
    rows = [
        (
            version.version,
            ", ".join(alias for alias, number in one.aliases.items() if number == version.version),
            version.run,
            version.bundle,
            datetime.fromtimestamp(version.published_s).strftime("%Y-%m-%d %H:%M:%S"),
        )
        for version in one.versions.values()
    ]
    return CommandResult(_document(one), table(model, ("version", "aliases", "run", "bundle", "published"), rows))


def fsck(
    gc: Annotated[bool, typer.Option("--gc", help="Remove objects of interrupted writes.")] = False,
    grace_hours: Annotated[float, typer.Option(help="Age below which --gc removes nothing, in hours.", min=0)] = 24.0,
    store: Store = DEFAULT_STORE,
    endpoint: Endpoint = None,
) -> CommandResult:
    """Verifies the digest and the content of every committed object; exit code 1 if one is damaged or malformed."""
    from maas_ray.cli.checks import all_checks
    from maas_ray.store.fsck import fsck as check

    if gc:
        leaves("some objects of interrupted writes may have been removed, nothing else; run the command again")
    report = check(open_store(store, endpoint), collect=gc, grace=timedelta(hours=grace_hours), checks=all_checks())
    shown = facts(
        "damaged" if report.problems else "sound",
        {
            "objects": report.num_objects,
            "commits verified": report.num_commits,
            "log records verified": report.num_records,
            "orphans": f"{len(report.orphans)}{'' if gc or not report.orphans else ' (--gc removes old ones)'}",
            "removed": len(report.collected),
            "foreign objects": len(report.foreign),
        },
    )
    remarks = [f"[red]problem[/] {escape(problem)}" for problem in report.problems]
    remarks += [f"[yellow]foreign[/] {escape(key)}" for key in report.foreign]
    view = Group(shown, *remarks)
    return CommandResult(asdict(report), view, int(bool(report.problems)))


def compact(
    remove: Annotated[
        bool,
        typer.Option(
            "--remove",
            help="Also remove records and snapshots whose content two other intact objects contain. Versions of "
            "maas-ray without snapshots can then no longer read these logs.",
        ),
    ] = False,
    grace_hours: Annotated[
        float, typer.Option(help="Age below which --remove removes nothing, in hours.", min=1)
    ] = 24.0,
    store: Store = DEFAULT_STORE,
    endpoint: Endpoint = None,
) -> CommandResult:
    """Speeds up long lists: writes missing or damaged snapshots of logs, and updates the index of runs.

    The logs are those of the registry, of the index of runs and of the load requests for pools. Every writer already
    does this for its own log; use this command for stores of earlier versions, or after `fsck` found damage.
    """
    from maas_ray.registry import models as registry
    from maas_ray.serve.models import desired_state
    from maas_ray.store.log.compact import compact as compact_log
    from maas_ray.train.records import run_index
    from maas_ray.train.records.runs import Runs

    opened = open_store(store, endpoint)
    with say.status("compacting"):
        reindexed = Runs(opened).reindex()
        pools = opened.children(desired_state.PREFIX)
        logs = [registry.PREFIX, run_index.PREFIX, *(f"{desired_state.PREFIX}/{pool}/wanted" for pool in pools)]
        found = [compact_log(opened, log, remove=remove, grace=timedelta(hours=grace_hours)) for log in logs]
    rows = [(each.log, each.num_records, len(each.written), len(each.removed)) for each in found if each.num_records]
    document = {"reindexed_runs": reindexed, "logs": [asdict(each) for each in found if each.num_records]}
    columns = ("log", "records", "snapshots written", "objects removed")
    view = Group(table(store, columns, rows), f"{reindexed} runs were added to the index or corrected in it")
    return CommandResult(document, view)


def schema(
    spec: Annotated[
        Literal["train", "tune", "serve"] | None, typer.Argument(help="Kind of spec.", show_default="all")
    ] = None,
) -> CommandResult:
    """Prints the JSON Schema of specs, for completion and validation in editors."""
    from maas_ray.serve.spec.serve import ServeSpec
    from maas_ray.train.search.spec import TuneSpec
    from maas_ray.train.spec.train import TrainSpec

    kinds: dict[str, Any] = {"train": TrainSpec, "tune": TuneSpec, "serve": ServeSpec}
    schemas = {name: kind.model_json_schema() for name, kind in kinds.items()}
    document = schemas[spec] if spec else schemas
    return CommandResult(document, json.dumps(document, indent=2))


def _merged(parity: Mapping[str, Any]) -> str:
    reason = parity.get("not_merged_because")
    if reason:
        return f"not batched: {reason}"
    unpadded = parity.get("not_padded_because")
    return f"batched; requests of different sizes are not: {unpadded}" if unpadded else "batched"


def _shown(tensor: Any) -> str:
    return f"{tensor.datatype} {list(tensor.shape)}{' (optional)' if tensor.optional else ''}"


def _document(model: Any) -> dict[str, Any]:
    return {
        "name": model.name,
        "aliases": model.aliases,
        "versions": [asdict(version) for version in model.versions.values()],
    }


def _aliases(model: Any) -> str:
    return ", ".join(f"{alias} → {number}" for alias, number in sorted(model.aliases.items()))
