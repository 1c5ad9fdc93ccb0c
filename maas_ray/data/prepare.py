"""Prepares a data set from a DataSpec: read, cast, split, clean, fit, encode the target, commit. Start reading here.

Statistics are fitted on the training split alone. A small table is prepared in memory here; a large one is prepared in
Ray tasks and stored as shards (large/prepare.py), with the same rows, features and report.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from maas_ray.data.large import prepare as large
from maas_ray.data.large.save import save_shards
from maas_ray.data.sources.cast import Cast, CastColumn, CastLimits, cast_column
from maas_ray.data.sources.files import count_unread, format_of, list_files
from maas_ray.data.sources.image_folders import find_images
from maas_ray.data.sources.images import mark_images, settle_images
from maas_ray.data.sources.table import SKLEARN, read_table
from maas_ray.data.spec.cleaning import ColumnPolicy
from maas_ray.data.spec.data import SPLITS, DataSpec
from maas_ray.data.spec.features import TOKEN_TASKS, Features
from maas_ray.data.stored.dataset import TARGET, WEIGHT, Dataset, Split, open_dataset, save_dataset
from maas_ray.data.table.column_statistics import gather_statistics, require_ray
from maas_ray.data.table.data_profile import build_profile
from maas_ray.data.table.fit import fit_statistics
from maas_ray.data.table.plan import ColumnPlan, plan_column
from maas_ray.data.table.rare_classes import count_merged, find_rare, merge_rare
from maas_ray.data.table.refusals import Refusals
from maas_ray.data.table.report import drop_rows, refuse_dropped, refuse_empty, refuse_missing, refuse_without_value
from maas_ray.data.table.split import assign_table
from maas_ray.data.table.split_rules import count_keys
from maas_ray.data.table.target import cast_target, class_names, encode_target, scale_target
from maas_ray.data.table.weight import read_weight
from maas_ray.data.text.prepare import prepare_text
from maas_ray.data.text.table import prepare_labelled_texts
from maas_ray.store.objects import ObjectStore

__all__ = ["Dataset", "Split", "open_dataset", "prepare"]


def prepare(spec: DataSpec, store: ObjectStore, *, cpu_timeout_s: float = 300.0) -> Dataset:
    """Prepares a data set, or opens it if the same content was prepared before.

    The report counts `rows_read`, `rows_dropped` (`target_missing`, `value_missing` by `drop_row`), and per column
    `missing` (as read) and `unconvertible` values (treated as missing from then on).

    Args:
        spec: what to read and how to clean it.
        store: where to commit.
        cpu_timeout_s: longest wait for a free CPU of the Ray cluster, if the data needs tasks.

    Raises:
        DataError: the data cannot be read, cleaned or split according to the spec.
        ClusterError: Ray is not connected, or no CPU of the cluster became free in time.
    """
    if spec.text is not None:
        if spec.task in TOKEN_TASKS:
            return prepare_text(spec, spec.text, store, cpu_timeout_s)
        return prepare_labelled_texts(spec, spec.text, store)
    require_ray()
    paths: list[str] | None = None
    source = {"uri": spec.uri, "spec_digest": spec.digest()}
    about_images: dict[str, Any] | None = None
    unread: dict[str, str] = {}
    if not spec.uri.startswith(SKLEARN):
        images = find_images(spec)
        if images is not None:
            spec, about_images = settle_images(spec, images)
        files = list_files(spec) if images is None else images.files
        paths = [file.path for file in files]
        if large.is_large(files, kind := format_of(spec, paths)):
            return large.prepare_large(spec, store, files, kind, cpu_timeout_s, about_images)
        unread = {} if images is not None else count_unread(spec, files)
    raw_table = read_table(spec, paths)
    raw = raw_table.table
    target = cast_target(spec.target, raw.column(spec.target), spec.task, spec.reader)
    rare = find_rare(spec, count_keys(target.values)) if spec.rare_classes is not None else frozenset()
    assigned = assign_table(spec, raw)
    refusals = Refusals()
    columns, plans, casts = _cast(spec, raw, raw_table.is_typed, refusals)
    if not columns:
        refusals.refuse()
    kept, report = drop_rows(columns, plans, target, raw.num_rows)
    refuse_dropped(spec, report, target.examples)
    if spec.rare_classes is not None:
        report["rare_classes"] = count_merged(target, rare)
        target = merge_rare(spec, target, rare)
    for column, plan in zip(columns, plans, strict=True):
        with refusals.collect():
            refuse_missing(plan, int((column.missing & kept).sum()), int(kept.sum()))
    cast = pa.table([column.values for column in columns], schema=pa.schema([column.field for column in columns]))
    rows = {split: np.flatnonzero(kept & (assigned == code)) for code, split in enumerate(SPLITS)}
    before = {split: int((assigned == code).sum()) for code, split in enumerate(SPLITS)}
    refuse_empty(spec, before, {split: len(rows[split]) for split in SPLITS})
    tables = {split: cast.take(pa.array(rows[split])) for split in SPLITS}
    weight = read_weight(spec, raw, rows["train"])
    targets = {split: target.values.take(pa.array(rows[split])) for split in SPLITS}
    labels = (
        None
        if spec.task == "regression"
        else class_names(spec.target, targets["train"], spec.task, spec.positive_class)
    )
    statistics = gather_statistics(tables["train"], plans, cpu_timeout_s=cpu_timeout_s)
    fitted = fit_statistics(statistics, plans, spec.cleaning, refusals)
    if about_images is not None:
        report |= about_images
        fitted = mark_images(spec, fitted)
    features = Features(
        columns=fitted,
        task=spec.task,
        target=spec.target,
        weight=spec.weight,
        labels=labels,
        target_scaling=scale_target(targets["train"].to_numpy(), spec.target_scaling)
        if spec.task == "regression"
        else None,
        reader=spec.reader,
    )
    class_rows = {} if labels is None else count_keys(targets["train"])
    profile = build_profile(
        spec, report, casts, statistics, features, class_rows, target.examples, {**raw_table.left_out, **unread}
    )
    for split in SPLITS:
        codes = encode_target(spec.target, targets[split], labels, split)
        encoded = codes.astype(np.float32) if spec.task == "binary" else codes
        tables[split] = tables[split].append_column(TARGET, pa.array(encoded))
        if weight is not None:
            tables[split] = tables[split].append_column(WEIGHT, weight.take(pa.array(rows[split])))
    is_heavy = sum(table.nbytes for table in tables.values()) > large.LARGE_BYTES
    save = save_shards if is_heavy else save_dataset
    return save(store, tables, features, report, source, profile=profile)


def _cast(
    spec: DataSpec, raw: pa.Table, is_typed: bool, refusals: Refusals
) -> tuple[list[CastColumn], list[ColumnPlan], dict[str, Cast]]:
    """Casts the features; those that cannot be cast are left out and in `refusals`."""
    columns, plans, casts = [], [], {}
    limits = CastLimits(spec.max_unconvertible, spec.max_numbers_in_text)
    for name in raw.column_names[: raw.column_names.index(spec.target)]:
        own = spec.cleaning.columns.get(name, ColumnPolicy())
        field = raw.schema.field(name)
        with refusals.collect():
            column, casts[name] = cast_column(field, raw.column(name), own, is_typed, spec.reader, limits)
            if column.missing.all():
                refuse_without_value(name, raw.num_rows, column.num_unconvertible)
            plans.append(plan_column(spec.cleaning, column.kind, column.field))
            columns.append(column)
    return columns, plans, casts
