"""Prepares a data set in shards from many files, in Ray tasks: survey, statistics, shards, manifest last.

This process reads no rows: the tasks return counts, sums and names. A task keeps one block of one unit and the shard
that it fills in memory, so memory does not grow with the data. The result depends on the files alone: not on the number
of CPUs, the order in which tasks end, or tasks that were lost and run again.
"""

import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from typing import Any

import pyarrow as pa

from maas_ray.data.large.clean import CleaningJob
from maas_ray.data.large.count_keys import count_split
from maas_ray.data.large.gather import Gathered, gather
from maas_ray.data.large.save import build_dictionaries
from maas_ray.data.large.survey import survey_source
from maas_ray.data.large.tasks import run_tasks
from maas_ray.data.large.units import FORMATS, UnitSource, open_source
from maas_ray.data.large.write import Writing, write_unit
from maas_ray.data.sources.cast import Cast, apply_cast
from maas_ray.data.sources.files import File, count_unread, list_files
from maas_ray.data.sources.image_folders import find_images
from maas_ray.data.sources.images import mark_images
from maas_ray.data.spec.data import SPLITS, DataSpec, Format
from maas_ray.data.spec.features import Features
from maas_ray.data.stored.dataset import SHARDED, Dataset, begin_dataset, content_digest, end_dataset, open_dataset
from maas_ray.data.stored.shard_layout import Shard, ShardLayout
from maas_ray.data.table.data_profile import build_profile
from maas_ray.data.table.fit import fit_statistics
from maas_ray.data.table.plan import ColumnPlan, plan_column
from maas_ray.data.table.target import order_classes, target_scaling
from maas_ray.errors import Conflict, DataError, NotFound, StoreError
from maas_ray.spec import canonical_json
from maas_ray.store.manifest import CommitWriter, Part, open_committed
from maas_ray.store.objects import ObjectStore, ObstoreStore
from maas_ray.version import __version__

LARGE_BYTES = 1 << 27
"""Total bytes of the files; below this, reading them here is faster than starting the first task."""
MANY_IMAGES = 2000
"""Images that are decoded in the time in which the first task starts."""
SEEN = "prepared"
"""Kind and prefix of the records that map unchanged files to the data set prepared from them."""


def is_large(files: Sequence[File], kind: Format) -> bool:
    """Whether the files are prepared here; formats without tables, and formats of a single file, are not."""
    is_many = kind == "images" and len(files) > MANY_IMAGES
    return kind in FORMATS and (is_many or sum(file.size for file in files) > LARGE_BYTES)


def prepare_large(
    spec: DataSpec,
    store: ObjectStore,
    files: Sequence[File],
    kind: Format,
    cpu_timeout_s: float,
    about_images: Mapping[str, Any] | None = None,
) -> Dataset:
    """As `prepare`.

    Args:
        spec: what to read and how to clean it.
        store: where to commit; the tasks open it again.
        files: the files that the spec's URI names.
        kind: format of the files.
        cpu_timeout_s: longest wait for a free CPU of the Ray cluster.
        about_images: for images, what to add to the report.

    Raises:
        DataError: the data cannot be read, cleaned or split according to the spec, or changed meanwhile.
        ClusterError: Ray is not connected, no CPU became free in time, or a task failed.
    """
    seen = _seen_prefix(spec, files)
    try:
        return open_dataset(store, str(open_committed(store, seen, SEEN).meta.get("dataset")))
    except NotFound:
        pass  # the first time, or the data set was removed
    dataset = prepare_files(spec, store, files, kind, cpu_timeout_s, about_images)
    with suppress(Conflict):
        CommitWriter(store, seen, SEEN).commit({"dataset": dataset.digest})
    return dataset


def prepare_files(
    spec: DataSpec,
    store: ObjectStore,
    files: Sequence[File],
    kind: Format,
    cpu_timeout_s: float,
    about_images: Mapping[str, Any] | None = None,
) -> Dataset:
    """Cleans files into a data set, in Ray tasks; see `prepare_large` for the arguments and the errors."""
    source, kinds = survey_source(open_source(spec, files, kind), cpu_timeout_s)
    plans = tuple(plan_unit_column(source, name, cast) for name, cast in kinds.columns.items())
    job = CleaningJob(source, kinds, plans, count_split(source, kinds, cpu_timeout_s))
    found = gather(job, cpu_timeout_s)
    labels = (
        None
        if spec.task == "regression"
        else order_classes(spec.target, sorted(found.classes["train"]), spec.task, spec.positive_class)
    )
    columns = fit_statistics(found.statistics, plans, spec.cleaning)
    features = Features(
        columns=columns if about_images is None else mark_images(spec, columns),
        task=spec.task,
        target=spec.target,
        weight=spec.weight,
        labels=labels,
        target_scaling=target_scaling(found.num_rows["train"], *found.target_sums, spec.target_scaling)
        if spec.task == "regression"
        else None,
        reader=spec.reader,
    )
    profile = build_profile(
        spec,
        found.report,
        kinds.columns,
        found.statistics,
        features,
        dict(found.classes["train"]),
        kinds.target_examples,
        {**source.left_out, **({} if about_images is not None else count_unread(spec, files))},
    )
    body = {
        "format": SHARDED,
        "features": features.model_dump(mode="json"),
        "num_rows": found.num_rows,
        "report": {**found.report, **(about_images or {})},
    }
    digest = content_digest(body, found.content)
    try:
        return open_dataset(store, digest)
    except NotFound:
        pass  # the first time
    writing = Writing(job, features, build_dictionaries(features, found.values), digest, uuid.uuid4().hex)
    return _write(store, writing, body, {"profile": profile}, files, found, cpu_timeout_s)


def _write(
    store: ObjectStore,
    writing: Writing,
    body: dict[str, Any],
    about: dict[str, Any],
    files: Sequence[File],
    found: Gathered,
    cpu_timeout_s: float,
) -> Dataset:
    if not isinstance(store, ObstoreStore):
        raise StoreError(
            f"{store.uri} cannot be opened by other processes, but a large table is written by several; use a "
            "directory or S3"
        )
    source = writing.job.source
    units: dict[int, list[dict[str, Any]]] = {}
    writer = begin_dataset(store, writing.digest, writing.attempt)
    arguments = {"writing": writing, "storage": store.spec}
    answers = run_tasks(write_unit, len(source.units), arguments, "the shards", cpu_timeout_s, source.name_of)
    for number, answer in answers:
        units[number] = answer
        for one in answer:
            writer.add(one["name"], Part(**one["part"]))
    shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    for number in sorted(units):  # not by name: the name of a unit's thousandth shard has one more digit
        for one in units[number]:
            shards[one["split"]].append(Shard(name=one["name"], num_rows=one["num_rows"]))
    written = {split: sum(shard.num_rows for shard in shards[split]) for split in SPLITS}
    if written != found.num_rows or _list_again(source.spec) != list(files):
        writer.abandon()
        raise DataError(
            f"{source.spec.uri} changed while it was being read; prepare it again once its files are complete"
        )
    layout = ShardLayout(shards={split: tuple(shards[split]) for split in SPLITS}, dictionaries=writing.dictionaries)
    where = {"uri": source.spec.uri, "spec_digest": source.spec.digest()}
    about |= {"shards": layout.model_dump(mode="json"), "source": where, "class_rows": dict(found.classes["train"])}
    return end_dataset(store, writer, writing.digest, {**body, **about})


def _list_again(spec: DataSpec) -> list[File]:
    images = find_images(spec)
    return list_files(spec) if images is None else images.files


def _seen_prefix(spec: DataSpec, files: Sequence[File]) -> str:
    """Key of the record for these files: reading gigabytes again to compute the same digest takes minutes."""
    of_files = [[file.path, file.size, file.modified_ns] for file in files]
    content = {"spec": spec.model_dump(mode="json"), "files": of_files, "version": __version__}
    if spec.task == "regression":  # an earlier record may name a data set whose target is not scaled
        content["target_scaling"] = spec.target_scaling
    return f"{SEEN}/{sha256(canonical_json(content)).hexdigest()}"


def plan_unit_column(source: UnitSource, name: str, cast: Cast) -> ColumnPlan:
    """How a column's values are cleaned, from its type alone: no value is read."""
    field = source.field(name)
    nothing = pa.chunked_array([pa.array([], field.type)])
    return plan_column(source.spec.cleaning, cast.kind, apply_cast(field, nothing, cast).field)
