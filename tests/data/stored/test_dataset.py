"""A prepared data set is verified on every read, has one digest per content, and tolerates concurrent writers."""

import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from maas_ray.data.sources.arrays import tensor_field
from maas_ray.data.spec.features import CategoricalColumn, Features, NumericColumn, TensorColumn
from maas_ray.data.stored import dataset as module
from maas_ray.data.stored.dataset import TARGET, Dataset, open_dataset, save_dataset
from maas_ray.errors import DataError, NotFound, ObjectCorrupt
from maas_ray.store.manifest import list_committed
from maas_ray.store.objects import ObstoreStore

FEATURES = Features(
    columns=(
        NumericColumn(name="age", fill=3.0),
        CategoricalColumn(name="city", categories=("a", "ü"), fill=0),
        CategoricalColumn(name="rank", datatype="INT64", categories=(1, 2)),
        TensorColumn(name="image", datatype="UINT8", shape=(1, 2, 2)),
    ),
    task="classification",
    target="y",
    labels=("no", "yes"),
)


def _tables(num_train: int = 6, first_age: float = 1.5) -> dict[str, pa.Table]:
    tables = {}
    for split, n in (("train", num_train), ("validation", 0), ("test", 2)):
        ages = np.arange(n, dtype=np.float32)
        ages[:1] = first_age
        ages[1:2] = np.nan
        field, images = tensor_field("image", np.arange(n * 4, dtype=np.uint8).reshape(n, 1, 2, 2))
        arrays = [ages, pa.array(["", "a", "ü", "a", "a", "a"][:n], pa.string()), np.arange(n) % 2 + 1, images]
        fields = [pa.field("age", pa.float32()), pa.field("city", pa.string()), pa.field("rank", pa.int64()), field]
        table = pa.table([pa.array(array) for array in arrays], schema=pa.schema(fields))
        tables[split] = table.append_column(TARGET, pa.array(np.arange(n) % 2))
    return tables


def _save(store: ObstoreStore, **change: float) -> Dataset:
    return save_dataset(store, _tables(**change), FEATURES, {"rows_read": 8}, {"uri": "x"})


def test_a_saved_data_set_is_read_back_exactly(store: ObstoreStore) -> None:
    dataset = open_dataset(store, _save(store).digest)
    assert dataset.features == FEATURES
    assert dataset.num_rows == {"train": 6, "validation": 0, "test": 2}
    assert dataset.report == {"rows_read": 8}
    split = dataset.read("train")
    age, city, rank, image = split.columns
    np.testing.assert_array_equal(age, np.float32([[1.5], [np.nan], [2], [3], [4], [5]]))
    assert city.dtype == object
    assert city.reshape(-1).tolist() == ["", "a", "ü", "a", "a", "a"]
    assert (rank.dtype, rank.shape) == (np.int64, (6, 1))
    assert (image.dtype, image.shape) == (np.uint8, (6, 1, 2, 2))
    assert image.reshape(-1).tolist() == list(range(24))
    assert (split.target.dtype, split.target.tolist()) == (np.int64, [0, 1, 0, 1, 0, 1])
    assert all(values.flags.writeable for values in (*split.columns, split.target))


def test_parts_of_several_sizes_give_the_same_data_set(
    file_store: ObstoreStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from maas_ray.store.objects import open_store

    whole = _save(file_store)
    monkeypatch.setattr(module, "MAX_PART_BYTES", 60)
    pieces = _save(open_store(f"file://{tmp_path}/other"))
    assert pieces.digest == whole.digest
    assert len(pieces.committed.parts) > len(whole.committed.parts)
    for one, two in zip(pieces.read("train").columns, whole.read("train").columns, strict=True):
        np.testing.assert_array_equal(one, two)


def test_the_same_content_is_kept_once_and_other_content_apart(file_store: ObstoreStore) -> None:
    first = _save(file_store)
    parts = first.committed.parts
    again = _save(file_store)
    assert (again.digest, again.committed.parts) == (first.digest, parts)
    other = _save(file_store, first_age=1.25)
    fewer = _save(file_store, num_train=5)
    assert list_committed(file_store, "datasets") == sorted({first.digest, other.digest, fewer.digest})


class _Overtaken:
    """A store in which another writer commits the same content just before our manifest."""

    def __init__(self, store: ObstoreStore) -> None:
        self._store = store
        self.winner: Dataset | None = None

    def __getattr__(self, name: str):
        return getattr(self._store, name)

    def create(self, key: str, data: bytes) -> None:
        if self.winner is None:
            self.winner = _save(self._store)
        self._store.create(key, data)


def test_a_slower_writer_uses_the_data_set_of_the_faster_one(store: ObstoreStore) -> None:
    overtaken = _Overtaken(store)
    ours = _save(overtaken)
    assert overtaken.winner is not None
    assert ours.committed.parts == overtaken.winner.committed.parts
    keys = {info.key for info in store.scan("datasets")}
    assert keys == {f"{ours.committed.prefix}/manifest.json", *(part.key for part in ours.committed.parts.values())}


def test_many_writers_at_once_end_with_one_data_set(file_store: ObstoreStore) -> None:
    barrier = threading.Barrier(6)
    found: list[Dataset] = []

    def work() -> None:
        barrier.wait(timeout=30)
        found.append(_save(file_store))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(found) == 6
    assert len({tuple(part.key for part in one.committed.parts.values()) for one in found}) == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_part_is_refused_with_its_name(file_store: ObstoreStore, tmp_path: Path, damage: str) -> None:
    dataset = _save(file_store)
    key = dataset.committed.parts["train/00000.arrow"].key
    path = tmp_path / "store" / key
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(ObjectCorrupt, match=key):
        dataset.read("train")
    assert dataset.read("test").target.tolist() == [0, 1]


def test_a_missing_data_set_or_split_is_reported_with_existing_ones(file_store: ObstoreStore) -> None:
    with pytest.raises(NotFound, match="there are no data sets yet"):
        open_dataset(file_store, "abc")
    dataset = _save(file_store)
    with pytest.raises(NotFound, match=dataset.digest):
        open_dataset(file_store, "abc")
    for split in ("validation", "training"):
        with pytest.raises(DataError, match="use one of train, test"):
            dataset.read(split)
