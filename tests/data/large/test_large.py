"""A large table goes through tasks into shards: the same rows, features and report as in memory, one digest, any damage
refused before use."""

import json
import mmap
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from PIL import Image
from pyarrow import csv, feather, parquet

from maas_ray.data.large import clean, count_keys, gather, save, survey, units, write
from maas_ray.data.large import prepare as large
from maas_ray.data.loading import mapped_rows as large_rows
from maas_ray.data.loading.loader import Loader
from maas_ray.data.loading.open import open_rows
from maas_ray.data.prepare import prepare
from maas_ray.data.sources.arrays import tensor_field
from maas_ray.data.sources.files import format_of, list_files
from maas_ray.data.spec.data import DataSpec
from maas_ray.data.spec.features import Features
from maas_ray.data.stored.dataset import Dataset, open_dataset
from maas_ray.data.stored.random_rows import spread_rows
from maas_ray.data.table.split import assign_rows
from maas_ray.data.table.target import scale_target
from maas_ray.errors import DataError, ObjectCorrupt
from maas_ray.spec import parse_spec
from maas_ray.store.manifest import list_committed, verify
from maas_ray.store.objects import ObstoreStore, StorageSpec, open_store

pytestmark = [
    pytest.mark.usefixtures("ray_cluster"),
    # Ray Data 2.60 warns of a default of its own context.
    pytest.mark.filterwarnings("ignore:.use_push_based_shuffle. is deprecated:DeprecationWarning"),
]

CLEANING = {
    "numeric": {"missing": "median"},
    "categorical": {"missing": "most_frequent"},
    "columns": {
        "height": {"missing": "mean"},
        "steps": {"missing": "drop_row", "scaling": "min_max"},
        "digits": {"cast": "category"},
    },
}


def _table(num_rows: int, seed: int = 0) -> pa.Table:
    """Every kind of column, with holes, and a few rows without a target."""
    rng = np.random.default_rng(seed)

    def holes(values: Any, share: float) -> pa.Array:
        return pa.array(values, mask=rng.random(num_rows) < share)

    field, images = tensor_field("image", rng.integers(0, 256, (num_rows, 1, 2, 3)).astype(np.uint8))
    columns = [
        (pa.field("age", pa.float64()), holes(rng.normal(40, 12, num_rows), 0.1)),
        (pa.field("city", pa.string()), holes(rng.choice(["Rome", "Oslo", "Lima", "ü"], num_rows), 0.05)),
        (pa.field("height", pa.float32()), holes(rng.normal(170, 9, num_rows).astype(np.float32), 0.02)),
        (pa.field("steps", pa.int64()), holes(rng.integers(0, 9000, num_rows), 0.03)),
        (pa.field("digits", pa.float64()), pa.array(rng.integers(0, 5, num_rows).astype(np.float64))),
        (field, images),
        (pa.field("label", pa.string()), holes(rng.choice(["no", "yes", "perhaps"], num_rows), 0.01)),
    ]
    return pa.table([array for _, array in columns], schema=pa.schema([one for one, _ in columns]))


def _write_files(folder: Path, table: pa.Table, num_files: int, kind: str = "parquet") -> str:
    folder.mkdir()
    size = -(-table.num_rows // num_files)
    for i in range(num_files):
        part, path = table.slice(i * size, size), folder / f"{i:03d}.{kind}"
        if kind == "parquet":
            parquet.write_table(part, path, row_group_size=max(1, size // 3))
        elif kind == "csv":
            csv.write_csv(part.drop_columns(["image"]), path)
        elif kind == "arrow":
            feather.write_feather(part, str(path), chunksize=max(1, size // 2), compression="uncompressed")
        elif kind == "stream.arrow":
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, part.schema) as writer:
                writer.write_table(part, max(1, size // 2))
        else:
            path.write_text(part.drop_columns(["image"]).to_pandas().to_json(orient="records", lines=True))
    return str(folder)


def _spec(uri: str, **fields: Any) -> DataSpec:
    return parse_spec(
        DataSpec, {"uri": uri, "task": "classification", "target": "label", "cleaning": CLEANING, **fields}
    )


def _same_rows(one: Dataset, two: Dataset) -> None:
    for split in ("train", "validation", "test"):
        a, b = one.read(split), two.read(split)
        for mine, theirs in zip([*a.columns, a.target], [*b.columns, b.target], strict=True):
            assert mine.dtype == theirs.dtype
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("kind", ["parquet", "csv", "arrow", "stream.arrow", "jsonl"])
def test_shards_contain_the_rows_features_and_report_of_in_memory_preparation(
    file_store: ObstoreStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    spec = _spec(_write_files(tmp_path / "files", _table(2000), 9, kind))
    small = prepare(spec, file_store)
    _without_cluster(monkeypatch)
    monkeypatch.setattr(units, "UNIT_BYTES", 30_000)
    sharded = prepare(spec, file_store)
    assert sharded.shards is not None
    assert len(sharded.shards.shards["train"]) > 2
    assert sharded.features == small.features
    assert sharded.report == small.report
    assert sharded.num_rows == small.num_rows
    assert sharded.report["rows_dropped"]["value_missing"] > 30
    _same_rows(sharded, small)
    again = prepare(spec, open_store(f"file://{tmp_path}/other"))
    assert again.digest == sharded.digest
    assert [part.sha256 for part in again.committed.parts.values()] == [
        part.sha256 for part in sharded.committed.parts.values()
    ]
    assert len(list_committed(file_store, "datasets")) == 2


@pytest.mark.parametrize(
    ("split", "fields"),
    [
        ({"stratify": True}, {"rare_classes": {"min_rows": 100, "merge_into": "no"}, "weight": "age"}),
        ({"stratify": "city"}, {}),
        ({"group": "steps"}, {}),
        ({"order_by": "steps"}, {}),
        ({"group": "digits", "fold": {"index": 1, "of": 3}}, {}),
    ],
    ids=["stratify and merge", "stratify by a column", "group", "order", "fold"],
)
@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_shards_have_the_splits_of_in_memory_preparation(
    file_store: ObstoreStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    split: dict[str, Any],
    fields: dict[str, Any],
    kind: str,
) -> None:
    table = _table(2000)
    for name, value in (("age", 40.0), ("steps", 5000)):
        table = table.set_column(table.column_names.index(name), name, table.column(name).fill_null(value))
    table = table.set_column(0, "age", pc.abs(table.column("age")))
    labels = ["rare" if i % 50 == 0 else label for i, label in enumerate(table.column("label").to_pylist())]
    table = table.set_column(table.column_names.index("label"), "label", pa.array(labels))
    unused = [*split.values(), *fields.values()]
    columns = {name: policy for name, policy in CLEANING["columns"].items() if name not in unused}
    spec = _spec(
        _write_files(tmp_path / "files", table, 9, kind),
        split=split,
        cleaning={**CLEANING, "columns": columns},
        **fields,
    )
    small = prepare(spec, file_store)
    _without_cluster(monkeypatch)
    monkeypatch.setattr(units, "UNIT_BYTES", 30_000)
    sharded = prepare(spec, file_store)
    assert sharded.shards is not None
    assert (sharded.features, sharded.report, sharded.num_rows) == (small.features, small.report, small.num_rows)
    _same_rows(sharded, small)


def test_a_split_column_of_a_large_table_that_divides_a_group_is_refused(
    file_store: ObstoreStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 50, 900)
    parts = np.array(["train", "validation", "test"])[groups % 3]
    parts[groups == 7] = rng.choice(["validation", "train"], (groups == 7).sum())
    table = pa.table({"x": rng.normal(size=900), "g": groups, "part": parts, "label": rng.choice(["a", "b"], 900)})
    _without_cluster(monkeypatch)
    monkeypatch.setattr(units, "UNIT_BYTES", 3_000)
    (tmp_path / "files").mkdir()
    for i in range(5):
        parquet.write_table(table.slice(180 * i, 180), tmp_path / f"files/{i}.parquet")
    spec = _spec(str(tmp_path / "files"), split={"column": "part", "group": "g"}, cleaning={})
    with pytest.raises(
        DataError, match="1 of 50 groups of 'g' are in several splits, such as '7' in train and validation"
    ):
        prepare(spec, file_store)


def test_a_stream_of_arrow_is_not_read_to_find_its_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = _spec(_write_files(tmp_path / "files", _table(2000), 1, "stream.arrow"))
    monkeypatch.setattr(units, "read_arrow", None)  # which reads all of a file
    monkeypatch.setattr(units, "MAX_WHOLE_BYTES", 1)
    source = units.open_source(spec, list_files(spec), "arrow")
    assert [table.num_rows for table in units.read_blocks(source, 0)] == [1000, 1000]


def test_many_files_through_tasks_give_the_data_set_that_one_process_gives(
    s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(StorageSpec(uri=f"s3://maas/{tmp_path.name}-{time.time_ns()}", endpoint=s3_endpoint))
    spec = _spec(_write_files(tmp_path / "files", _table(1000), 40))
    monkeypatch.setattr(large, "LARGE_BYTES", 0)
    monkeypatch.setattr(units, "UNIT_BYTES", 20_000)
    dataset = prepare(spec, store)
    _without_cluster(monkeypatch)
    alone = prepare(spec, open_store(f"file://{tmp_path}/alone"))
    assert (dataset.digest, dataset.report) == (alone.digest, alone.report)
    assert _digests(dataset) == _digests(alone)
    assert verify(dataset.committed) == []
    monkeypatch.setenv("MAAS_RAY_HOME", str(tmp_path / "home"))  # where a machine keeps the shards of a remote store
    ids = np.arange(200, dtype=np.int64)[::-1].copy()
    mine, theirs = (open_rows(one, "train").take(ids, ids) for one in (dataset, alone))
    assert torch.equal(mine.columns[0].nan_to_num(-1), theirs.columns[0].nan_to_num(-1))


def test_files_that_did_not_change_are_not_read_again(
    file_store: ObstoreStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_cluster(monkeypatch)
    uri = _write_files(tmp_path / "files", _table(600), 3)
    first = prepare(_spec(uri), file_store)
    monkeypatch.setattr(large, "prepare_files", None)
    assert prepare(_spec(uri), file_store).committed.parts == first.committed.parts
    os.utime(Path(uri) / "001.parquet", ns=(1, 1))
    with pytest.raises(TypeError):  # it would be read
        prepare(_spec(uri), file_store)


def _job(spec: DataSpec, monkeypatch: pytest.MonkeyPatch) -> clean.CleaningJob:
    _without_cluster(monkeypatch)
    files = list_files(spec)
    source, kinds = survey.survey_source(units.open_source(spec, files, format_of(spec, [files[0].path])), 60)
    return clean.CleaningJob(
        source, kinds, tuple(large.plan_unit_column(source, *one) for one in kinds.columns.items())
    )


def _digests(dataset: Dataset) -> dict[str, str]:
    return {name: part.sha256 for name, part in dataset.committed.parts.items()}


def _without_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything counts as large, and what tasks would do is done here."""
    monkeypatch.setattr(large, "LARGE_BYTES", 0)
    for module in (large, survey, count_keys, gather):
        monkeypatch.setattr(module, "run_tasks", _here)


@pytest.fixture(scope="module")
def both(ray_cluster: object, tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Dataset]:
    """The same files prepared in memory and in shards, in a store each."""
    folder = tmp_path_factory.mktemp("both")
    spec = _spec(_write_files(folder / "files", _table(3000), 5))
    small = prepare(spec, open_store(f"file://{folder}/small"))
    with pytest.MonkeyPatch.context() as patch:
        _without_cluster(patch)
        patch.setattr(units, "UNIT_BYTES", 30_000)
        return small, prepare(spec, open_store(f"file://{folder}/large"))


def test_a_loader_gives_the_same_batches_from_shards_as_from_memory(both: tuple[Dataset, Dataset]) -> None:
    assert len(both[1].shards.shards["train"]) > 3
    loaders = [
        Loader.over(open_rows(dataset, "train"), seed=3, global_batch=64, rank=1, world=2, accumulation_steps=2)
        for dataset in both
    ]
    for cursor in range(0, 3 * 64 * 20, 64):
        for mine, theirs in zip(*(loader.load(cursor, 1 << 40) for loader in loaders), strict=True):
            assert torch.equal(mine.target, theirs.target)
            assert torch.equal(mine.positions, theirs.positions)
            for one, two in zip(mine.columns, theirs.columns, strict=True):
                assert one.dtype == two.dtype
                assert torch.equal(one.nan_to_num(-1), two.nan_to_num(-1))
    none = open_rows(both[1], "train").take(np.empty(0, np.int64), np.empty(0, np.int64))
    assert (none.num_rows, none.columns[5].shape) == (0, (0, 1, 2, 3))


def test_some_rows_are_read_without_the_others(both: tuple[Dataset, Dataset]) -> None:
    expected = spread_rows(both[0].read("test").columns, 7)
    for dataset in both:
        for one, two in zip(dataset.spread("test", 7), expected, strict=True):
            np.testing.assert_array_equal(one, two)


def test_pages_that_were_read_are_released(both: tuple[Dataset, Dataset], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = open_rows(both[1], "train")
    ids = np.arange(len(rows), dtype=np.int64)
    before = rows.take(ids, ids)
    monkeypatch.setattr(large_rows, "MAX_MAPPED_BYTES", 0)
    after = rows.take(ids[::-1], ids)
    assert torch.equal(after.target.flip(0), before.target)
    assert rows.resident_bytes == 0


def test_pages_are_released_within_a_large_batch_too(
    both: tuple[Dataset, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    advised: list[int] = []

    class Watched(mmap.mmap):
        def madvise(self, option: int, *span: int) -> None:
            advised.append(option)
            super().madvise(option, *span)

    monkeypatch.setattr(mmap, "mmap", Watched)
    rows = open_rows(both[1], "train")
    ids = np.arange(len(rows), dtype=np.int64)
    rows.take(ids, ids)
    advised.clear()
    monkeypatch.setattr(large_rows, "MAX_MAPPED_BYTES", 0)
    rows.take(ids, ids)
    num_shards = len(both[1].shards.shards["train"])
    assert advised == [mmap.MADV_DONTNEED] * num_shards**2, "all maps after each shard, not after the batch"


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "swap"])
def test_a_damaged_shard_is_refused_before_a_row_of_it_is_used(
    both: tuple[Dataset, Dataset], tmp_path: Path, damage: str
) -> None:
    store = open_store(f"file://{tmp_path}/copy")
    shutil.copytree(both[1].committed.store.root, tmp_path / "copy", dirs_exist_ok=True)
    dataset = open_dataset(store, both[1].digest)
    first, second = (
        tmp_path / "copy" / dataset.committed.parts[shard.name].key for shard in dataset.shards.shards["train"][:2]
    )
    content = bytearray(first.read_bytes())
    if damage == "remove":
        first.unlink()
    elif damage == "swap":
        first.write_bytes(second.read_bytes())
    else:
        content[len(content) // 2] ^= 1
        first.write_bytes(content[: -1 if damage == "truncate" else None])
    ids = np.arange(3, dtype=np.int64)
    with pytest.raises(ObjectCorrupt, match=first.name):
        open_rows(dataset, "train").take(ids, ids)
    with pytest.raises(ObjectCorrupt, match=first.name):
        dataset.read("train")
    assert open_rows(dataset, "test").take(ids, ids).num_rows == 3


def test_a_task_that_runs_twice_writes_the_same_bytes_to_the_same_place(
    file_store: ObstoreStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = _spec(_write_files(tmp_path / "files", _table(600), 3))
    job = _job(spec, monkeypatch)
    found = gather.gather(job, 60)
    features = prepare(spec, file_store).features
    writing = write.Writing(job, features, save.build_dictionaries(features, found.values), "d" * 64, "a" * 32)
    first = write.write_shards(0, writing, file_store)
    before = {one["name"]: file_store.get(one["part"]["key"]) for one in first}
    assert write.write_shards(0, writing, file_store) == first
    assert {one["name"]: file_store.get(one["part"]["key"]) for one in first} == before
    assert len(before) == 3


def test_shards_of_a_limited_size_contain_the_rows_of_one_unit(
    both: tuple[Dataset, Dataset], file_store: ObstoreStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: what a task does with a unit that is larger than a shard."""
    monkeypatch.setattr(write, "MAX_PART_BYTES", 3000)
    monkeypatch.setattr(units, "UNIT_BYTES", 1 << 30)
    monkeypatch.setattr(units, "BLOCK_BYTES", 5000)
    _without_cluster(monkeypatch)
    spec = _spec(_write_files(tmp_path / "files", _table(3000), 5))
    dataset = prepare(spec, file_store)
    assert dataset.features == both[0].features
    assert len(dataset.shards.shards["train"]) > 10
    assert dataset.committed.parts["train/000000-000.shard"].size < 9000
    _same_rows(dataset, both[0])


def test_a_thousand_shards_of_one_unit_are_in_the_order_of_its_rows(
    file_store: ObstoreStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({"x": np.arange(1010.0), "y": np.arange(1010.0)})
    parquet.write_table(table, tmp_path / "rows.parquet")
    split = {"validation": 0, "test": 0}
    spec = _spec(str(tmp_path / "rows.parquet"), target="y", task="regression", cleaning={}, split=split)
    _without_cluster(monkeypatch)
    monkeypatch.setattr(write, "MAX_PART_BYTES", 1)
    dataset = prepare(spec, file_store)
    assert len(dataset.shards.shards["train"]) == 1010
    assert dataset.read("train").target.tolist() == list(range(1010))


def test_large_data_has_the_same_scale_as_data_in_memory(
    file_store: ObstoreStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_cluster(monkeypatch)
    generator = np.random.default_rng(1)
    y = (generator.normal(size=900) * 1e5 + 5e5).astype(np.float32)
    table = pa.table({"a": generator.normal(size=900), "y": y})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=100)
    spec = DataSpec(uri=str(tmp_path / "rows.parquet"), target="y", task="regression")
    dataset = prepare(spec, file_store)
    assert dataset.shards is not None
    train = dataset.read("train").target
    assert dataset.features.target_scaling == scale_target(train, "standard")
    shift, scale = dataset.features.target_scaling.shift[0], dataset.features.target_scaling.scale[0]
    assert (shift, scale) == pytest.approx((train.astype(np.float64).mean(), train.astype(np.float64).std()), rel=1e-12)
    ids = np.arange(train.size)
    loaded = open_rows(dataset, "train").take(ids, ids).target
    assert loaded.dtype == torch.float32
    np.testing.assert_allclose(loaded.numpy(), (train.astype(np.float64) - shift) / scale, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("change", ["grew", "shrank"])
def test_files_that_are_written_to_meanwhile_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    job = _job(_spec(_write_files(tmp_path / "files", _table(90), 3, "csv")), monkeypatch)
    lines = (path := tmp_path / "files" / "001.csv").read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[-1]] if change == "grew" else lines[:-1]))
    assert len(job.source.units) == 1
    with pytest.raises(DataError, match="changed while it was being read"):
        gather.gather_unit(0, job)


def test_a_category_that_the_statistics_have_not_seen_is_not_a_code(both: tuple[Dataset, Dataset]) -> None:
    """The files were written to meanwhile, in a way that left their sizes and times."""
    features = Features(
        columns=tuple(one for one in both[1].features.columns if one.name == "city"), task="regression", target="y"
    )
    target = np.zeros(2, dtype=np.float32)
    cities = pa.table({"city": ["Oslo", "Rome"]})
    assert write.encode_rows(features, {"city": ("Oslo", "Rome")}, cities, target).codes.tolist() == [[0], [1]]
    with pytest.raises(DataError, match="column 'city' changed while it was being read"):
        write.encode_rows(features, {"city": ("Oslo",)}, cities, target)


def _here(function: Any, count: int, arguments: Any, *_: Any) -> Any:
    """Tasks in this process, the last one first and one of them twice."""
    for number in [*range(count)][::-1]:
        function(number, **arguments)
        yield number, json.loads(json.dumps(function(number, **arguments)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cleaning": {**CLEANING, "numeric": {}}}, "column 'age' has .* missing values"),
        ({"cleaning": {**CLEANING, "max_categories": 3}}, "column 'city' has 4 categories; the limit is 3"),
        ({"target": "lable"}, "did you mean 'label'"),
        ({"task": "regression"}, "no row of 600 has a number in the target 'label'"),
        ({"split": {"column": "city"}}, "the split column 'city' contains"),
        ({"split": {"test": 0.0001}}, "600 rows are too few for a test split of 0.0001"),
        ({"cleaning": {**CLEANING, "columns": {"image": {"cast": "number"}}}}, "is a tensor and cannot be cast"),
    ],
)
def test_tasks_raise_the_same_errors_as_in_memory_preparation(
    file_store: ObstoreStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    spec = _spec(_write_files(tmp_path / "files", _table(600), 3), **change)
    with pytest.raises(DataError, match=message) as small:
        prepare(spec, file_store)
    _without_cluster(monkeypatch)
    with pytest.raises(DataError, match=message) as sharded:
        prepare(spec, file_store)
    if "max_categories" in change.get(
        "cleaning", {}
    ):  # tasks end at the first such column, which could fill the memory
        assert str(sharded.value) in str(small.value)
    else:
        assert str(sharded.value) == str(small.value)


@pytest.mark.parametrize("unit_bytes", [1, 1 << 27])
@pytest.mark.parametrize("changed", [{"age": None}, {"age": None, "years": "age"}, {"years": "age"}])
def test_lines_of_json_whose_columns_differ_are_refused_with_the_names_of_both_files(
    file_store: ObstoreStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, str | None],
    unit_bytes: int,
) -> None:
    spec = _spec(_write_files(tmp_path / "files", _table(90), 3, "jsonl"), cleaning={})
    other = tmp_path / "files" / "001.jsonl"
    rows = [json.loads(line) for line in other.read_text().splitlines()]
    for row in rows:
        row.update({name: row[old] for name, old in changed.items() if old is not None})
        for name in [name for name, old in changed.items() if old is None]:
            del row[name]
    other.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="do not have the same columns") as small:
        prepare(spec, file_store)
    _without_cluster(monkeypatch)
    monkeypatch.setattr(units, "UNIT_BYTES", unit_bytes)
    with pytest.raises(DataError, match=r"001\.jsonl and .*00[02]\.jsonl do not have the same columns") as sharded:
        prepare(spec, file_store)
    assert str(sharded.value).partition(":")[2] == str(small.value).partition(":")[2]


def test_the_result_of_a_task_does_not_grow_with_the_rows_of_its_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A csv file is one unit however large it is."""
    cleaning = {**CLEANING, "columns": {**CLEANING["columns"], "digits": {"missing": "most_frequent"}}}
    whole = _table(2000)
    sizes = {}
    for times in (1, 8):
        uri = _write_files(tmp_path / f"{times}", pa.concat_tables([whole] * times), 1, "csv")
        job = _job(_spec(uri, cleaning=cleaning, split={"validation": 0, "test": 0}), monkeypatch)
        monkeypatch.setattr(units, "BLOCK_BYTES", 32 * len(whole.column_names) * 200)
        gathered = gather.gather_unit(0, job)
        assert gathered["counts"]["report"]["rows_read"] == 2000 * times
        buckets = {"age": sorted({bucket for bucket, _ in gathered["high"]["age"]})[:3]}
        sizes[times] = [len(json.dumps(one)) for one in (gathered, gather.count_unit(0, job, buckets))]
    for few, many in zip(*sizes.values(), strict=True):
        assert many < 1.2 * few


def test_an_error_in_a_task_is_raised_as_the_same_class(
    file_store: ObstoreStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large, "LARGE_BYTES", 0)
    uri = _write_files(tmp_path / "files", _table(600), 3)
    broken = Path(uri) / "001.parquet"
    content = bytearray(broken.read_bytes())
    content[4:2000] = bytes(1996)  # the footer, which is looked at first, stays
    broken.write_bytes(content)
    with pytest.raises(DataError, match=f"{broken} as a parquet file"):
        prepare(_spec(uri), file_store)
    assert list_committed(file_store, "datasets") == []


def test_images_in_folders_are_rows_with_the_class_of_their_folder(
    file_store: ObstoreStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    drawn = {}
    for i in range(40):
        folder = tmp_path / "images" / ("cat", "dog")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        drawn[i] = rng.integers(0, 256, (4, 5, 3)).astype(np.uint8)
        Image.fromarray(drawn[i]).save(folder / f"{i:03d}.png")
    fields = {"cleaning": {}, "split": {"validation": 0, "test": 0.25}}
    small = prepare(_spec(str(tmp_path / "images"), **fields), file_store)
    assert small.features.columns[0].shape == (3, 4, 5)
    assert small.features.labels == ("cat", "dog")
    order = [*range(0, 40, 2), *range(1, 40, 2)]
    kept = [i for i, code in zip(order, assign_rows(_spec("x", **fields).split, 40), strict=True) if code == 0]
    train = small.read("train")
    np.testing.assert_array_equal(train.columns[0], np.stack([drawn[i] for i in kept]).transpose(0, 3, 1, 2))
    assert train.target.tolist() == [i % 2 for i in kept]
    _without_cluster(monkeypatch)
    monkeypatch.setattr(units, "UNIT_BYTES", 600)
    sharded = prepare(_spec(str(tmp_path / "images"), **fields), file_store)
    assert len(sharded.shards.shards["train"]) == 4
    assert (sharded.features, sharded.report) == (small.features, small.report)
    np.testing.assert_array_equal(sharded.read("train").columns[0], train.columns[0])
    grey = prepare(
        _spec(str(tmp_path / "images"), image={"height": 2, "width": 2, "channels": 1}, **fields), file_store
    )
    assert grey.read("train").columns[0].shape == (30, 1, 2, 2)
    (tmp_path / "images" / "dog" / "001.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="001.png as an image"):
        prepare(_spec(str(tmp_path / "images"), **fields), file_store)


def test_arrays_of_one_file_become_shards_where_they_are_many(
    file_store: ObstoreStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(2)
    arrays = {"image": rng.integers(0, 256, (300, 1, 3, 3)).astype(np.uint8), "y": rng.normal(size=300)}
    arrays |= {"place": rng.choice(["a", "b", "rare"], 300, p=[0.6, 0.39, 0.01])}
    np.savez(tmp_path / "rows.npz", **arrays)
    spec = _spec(str(tmp_path / "rows.npz"), target="y", task="regression", cleaning={})
    small = prepare(spec, file_store)
    monkeypatch.setattr(large, "LARGE_BYTES", 0)
    monkeypatch.setattr(save, "MAX_PART_BYTES", 1000)
    sharded = prepare(spec, file_store)
    assert len(sharded.shards.shards["train"]) > 3
    assert (sharded.features, sharded.report, sharded.num_rows) == (small.features, small.report, small.num_rows)
    _same_rows(sharded, small)
    ids = np.arange(len(arrays["y"]) // 2, dtype=np.int64)
    mine, theirs = (open_rows(dataset, "train").take(ids, ids) for dataset in (sharded, small))
    assert all(torch.equal(*pair) for pair in zip(mine.columns, theirs.columns, strict=True))
