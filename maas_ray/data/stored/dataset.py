"""The format of a prepared data set in the store, and how it is read and written. Independent of sources and cleaning.

    datasets/<digest>/manifest.json                     features, report, counts, source
    datasets/<digest>/parts-<attempt>/<split>/00000.arrow     Arrow IPC: raw columns in order, then the encoded target
    datasets/<digest>/parts-<attempt>/<split>/00000.tokens    or, for the token tasks, token ids as raw integers
    datasets/<digest>/parts-<attempt>/<split>/000000-000.shard    or, for large tables, rows to be mapped: shard.py
    datasets/<digest>/parts-<attempt>/tokenizer.json          if rows are tokens

`digest` is the digest of the content, so preparing the same data twice gives the same data set.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import ValidationError

from maas_ray.arrays import Array
from maas_ray.data.sources.arrays import tensor_shape, tensor_values
from maas_ray.data.spec.data import SPLITS
from maas_ray.data.spec.features import Features
from maas_ray.data.stored.random_rows import spread_ids, spread_rows
from maas_ray.data.stored.shard import raw_columns, unpack
from maas_ray.data.stored.shard_layout import ShardLayout
from maas_ray.data.stored.token_layout import TokenLayout
from maas_ray.errors import Conflict, DataError, NotFound, ObjectCorrupt
from maas_ray.spec import canonical_json
from maas_ray.store.manifest import Committed, CommitWriter, open_committed, part_key
from maas_ray.store.objects import ObjectStore
from maas_ray.store.sealed import malformed
from maas_ray.suggestions import known_names

PREFIX = "datasets"
KIND = "dataset"
MAX_NAMES = 50
"""Maximum number of names that a message lists."""
PLAIN, SHARDED = FORMATS = (1, 2)
"""Format numbers in a manifest; SHARDED: a table in shards."""
MAX_PART_BYTES = 1 << 26
TARGET, WEIGHT = "\0target", "\0weight"
"""Names of the columns of the target and of the weight in a part; no feature can have these names."""
TOKENIZER = "tokenizer.json"
"""Name of the part with the tokenizer."""


@dataclass(frozen=True)
class Split:
    """All rows of one split.

    Args:
        columns: raw columns in the order of the features: numeric float32 [N, 1] (NaN is missing), categorical
            object-str [N, 1] ("" is missing) or int64 [N, 1], tensors float32 or uint8 [N, *shape].
        target: [N]: int64 class codes, float32 0 or 1 (binary), or float32 (regression).
        weight: float32 [N]; None: every row has the weight 1.
    """

    columns: list[Array]
    target: Array
    weight: Array | None = None


@dataclass(frozen=True)
class Dataset:
    """A prepared data set."""

    digest: str
    """Hex sha256 of the content: its id in the store."""
    features: Features
    report: Mapping[str, Any]
    """Counts of rows and values that were read, dropped or not convertible; see `prepare`."""
    num_rows: Mapping[str, int]
    """Rows of `train`, `validation` and `test`; 0 for a split that the spec does not have."""
    source: Mapping[str, Any]
    """URI and digest of the spec from which it was first prepared."""
    committed: Committed
    tokens: TokenLayout | None = None
    """Layout of the token streams; None: the rows are a table."""
    shards: ShardLayout | None = None
    """Layout of the shards of a large table; None: a table that is read into memory."""
    class_rows: Mapping[str, int] | None = None
    """Training rows of each class; None: prepared by a version that did not count them."""
    profile: Mapping[str, Any] | None = None
    """How the rows were read and the columns cast, see table/data_profile.py; None: prepared without one. Not part of the
    digest."""

    def tokenizer(self) -> bytes:
        """The tokenizer.json that produced the tokens.

        Raises:
            DataError: the rows are not tokens.
            ObjectCorrupt: the part is missing, truncated or altered.
        """
        if self.features.tokens is None:
            raise DataError(f"the data set {self.digest[:12]} has no tokenizer: its rows are not tokens")
        return self.committed.read(TOKENIZER)

    def require_rows(self, split: str) -> None:
        """Rejects a split without rows.

        Raises:
            DataError: there is no such split, or it has no rows.
        """
        if not self.num_rows.get(split):
            known = [name for name, num in self.num_rows.items() if num]
            raise DataError(
                f"the data set {self.digest[:12]} has no rows in the split {split!r}; use one of {', '.join(known)}"
            )

    def read(self, split: str) -> Split:
        """Reads one split into memory; every byte is verified.

        Raises:
            DataError: there is no such split, it has no rows, or the rows are windows on a token stream.
            ObjectCorrupt: a part is missing, truncated or altered.
        """
        self.require_rows(split)
        if self.tokens is not None:
            raise DataError(f"the data set {self.digest[:12]} is a token stream and cannot be read as a table of rows")
        if self.shards is not None:
            return self._read_shards(self.shards, split, None)
        names = sorted(name for name in self.committed.parts if name.startswith(f"{split}/"))
        table = pa.concat_tables([pa.ipc.open_file(self.committed.read(name)).read_all() for name in names])
        if table.num_rows != self.num_rows[split]:
            raise ObjectCorrupt(
                f"{self.committed.prefix} contains {table.num_rows} rows in {split}; its manifest lists "
                f"{self.num_rows[split]}; restore it from a backup"
            )
        columns = [_to_numpy(table.schema.field(i), table.column(i)) for i in range(len(self.features.columns))]
        # Writable, because torch.from_numpy warns about read-only arrays, and Arrow's memory is read-only.
        last = [table.column(TARGET).to_numpy()]
        if self.features.weight is not None:
            last.append(table.column(WEIGHT).to_numpy())
        arrays = [np.require(values, requirements=["C", "W"]) for values in (*columns, *last)]
        return Split(arrays[: len(columns)], *arrays[len(columns) :])

    def count_classes(self) -> NDArray[np.int64]:
        """Training rows of each class, int64 [classes], in the order of the labels.

        Raises:
            DataError: the target has no classes.
            ObjectCorrupt: a part is missing, truncated or altered.
        """
        labels = self.features.labels
        if labels is None:
            raise DataError(f"the data set {self.digest[:12]} has no classes: its task is {self.features.task}")
        counted = self.class_rows or count_classes(self.features, self.read("train").target)
        return np.array([counted.get(label, 0) for label in labels], dtype=np.int64)

    def spread(self, split: str, num_rows: int) -> list[Array]:
        """Raw columns of at most `num_rows` rows of a split, evenly spread over it; of a large table, only the shards
        with these rows are read.

        Raises:
            As `read`.
        """
        self.require_rows(split)
        if self.shards is None:
            return spread_rows(self.read(split).columns, num_rows)
        return self._read_shards(self.shards, split, spread_ids(self.num_rows[split], num_rows)).columns

    def _read_shards(self, layout: ShardLayout, split: str, ids: NDArray[np.int64] | None) -> Split:
        """The rows `ids` (ascending), or all."""
        blocks, first = [], 0
        for shard in layout.shards[split]:
            own = None if ids is None else ids[(ids >= first) & (ids < first + shard.num_rows)] - first
            first += shard.num_rows
            if own is None or len(own):
                block = unpack(self.features, self.committed.read(shard.name))
                blocks.append(block if own is None else block.take(own))
        return Split(*raw_columns(self.features, layout.dictionaries, blocks))


def save_dataset(
    store: ObjectStore,
    tables: Mapping[str, pa.Table],
    features: Features,
    report: Mapping[str, Any],
    source: Mapping[str, Any],
    tokenizer: bytes | None = None,
    profile: Mapping[str, Any] | None = None,
) -> Dataset:
    """Commits a data set, or opens it if the same content is already committed.

    Args:
        store: where to commit.
        tables: by split, the cast columns in order, the encoded target as `TARGET` and the weight, if any, as `WEIGHT`.
        features: the fitted features.
        report: JSON-able.
        source: JSON-able; not part of the digest.
        tokenizer: its JSON file, if a column contains tokens.
        profile: JSON-able; not part of the digest.
    """
    content = {split: _fingerprint(tables[split]) for split in SPLITS}
    num_rows = {split: tables[split].num_rows for split in SPLITS}

    def parts() -> Iterator[tuple[str, bytes]]:
        if tokenizer is not None:
            yield TOKENIZER, tokenizer
        for split in SPLITS:
            yield from ((f"{split}/{i:05d}.arrow", part) for i, part in enumerate(_parts(tables[split])))

    about = {
        "source": dict(source),
        "class_rows": count_classes(features, tables["train"].column(TARGET).to_numpy()),
        **({"profile": dict(profile)} if profile is not None else {}),
    }
    return commit_dataset(store, {"num_rows": num_rows, "report": dict(report)}, features, content, about, parts())


def count_classes(features: Features, target: Array) -> dict[str, int]:
    """Rows of each class in an encoded target; empty without classes."""
    if features.labels is None:
        return {}
    counted = np.bincount(target.astype(np.int64), minlength=len(features.labels))
    return dict(zip(features.labels, counted.tolist(), strict=True))


def commit_dataset(
    store: ObjectStore,
    meta: Mapping[str, Any],
    features: Features,
    content: Mapping[str, str],
    about: Mapping[str, Any],
    parts: Iterable[tuple[str, bytes]],
) -> Dataset:
    """Commits parts as a data set, or opens it if the same content is already committed; then `parts` is not consumed.

    Args:
        store: where to commit.
        meta: JSON-able: `num_rows`, `report`, and `tokens` for token streams.
        features: the fitted features.
        content: hex sha256 of each split's values, independent of the parts.
        about: JSON-able: `source`; not part of the digest.
        parts: names and bytes.
    """
    body = {"format": PLAIN, "features": features.model_dump(mode="json"), **meta}
    digest = content_digest(body, content)
    try:
        return open_dataset(store, digest)
    except NotFound:
        pass  # the first time
    writer = begin_dataset(store, digest)
    for name, part in parts:
        writer.put(name, part)
    return end_dataset(store, writer, digest, {**body, **about})


def content_digest(body: Mapping[str, Any], content: Mapping[str, str]) -> str:
    """The id of a data set: hex sha256 of its description and of the values in its splits."""
    return sha256(canonical_json({**body, "content": dict(content)})).hexdigest()


def begin_dataset(store: ObjectStore, digest: str, attempt: str | None = None) -> CommitWriter:
    """Begins a commit; this or other processes write its parts (see `CommitWriter`)."""
    return CommitWriter(store, f"{PREFIX}/{digest}", KIND, attempt)


def dataset_part_key(digest: str, attempt: str, name: str) -> str:
    """The key under which an attempt writes one part of a data set."""
    return part_key(f"{PREFIX}/{digest}", attempt, name)


def end_dataset(store: ObjectStore, writer: CommitWriter, digest: str, meta: Mapping[str, Any]) -> Dataset:
    """Completes the commit that `begin_dataset` began."""
    # On a conflict, another process has prepared the same content at the same time; its data set is equal to this one.
    with suppress(Conflict):
        writer.commit(meta)
    return open_dataset(store, digest)


def open_dataset(store: ObjectStore, digest: str) -> Dataset:
    """Opens a prepared data set; its parts are verified when they are read.

    Raises:
        NotFound: there is no such data set.
        ObjectCorrupt: the manifest is altered or has an unknown format.
    """
    try:
        committed = open_committed(store, f"{PREFIX}/{digest}", KIND)
    except NotFound as error:
        there = known_names(digest, store.children(PREFIX), "data sets")
        raise NotFound(f"no data set {digest!r} in {store.uri}; {there}") from error
    meta = committed.meta
    try:
        if meta["format"] not in FORMATS:
            raise ObjectCorrupt(
                f"the data set {digest} has format {str(meta['format'])[:20]}; this version reads "
                f"{' and '.join(map(str, FORMATS))}; read it with the version that wrote it, or prepare it again"
            )
        features = Features.model_validate(meta["features"])
        num_rows = {split: int(meta["num_rows"][split]) for split in SPLITS}
        tokens = TokenLayout.model_validate(meta["tokens"]) if "tokens" in meta else None
        shards = ShardLayout.model_validate(meta["shards"]) if "shards" in meta else None
        return Dataset(
            digest,
            features,
            meta["report"],
            num_rows,
            meta["source"],
            committed,
            tokens,
            shards,
            _class_rows(meta),
            meta.get("profile"),
        )
    except ValidationError as error:
        raise malformed(f"the manifest of data set {digest}", error) from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ObjectCorrupt(f"the manifest of the data set {digest} is malformed; restore it from a backup") from error


def _class_rows(meta: Mapping[str, Any]) -> dict[str, int] | None:
    found = meta.get("class_rows")
    return None if found is None else {str(label): int(rows) for label, rows in found.items()}


def _parts(table: pa.Table) -> list[bytes]:
    rows_per_part = max(1, MAX_PART_BYTES * table.num_rows // max(table.nbytes, 1))
    parts = []
    for start in range(0, table.num_rows, rows_per_part):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table.slice(start, rows_per_part))
        parts.append(sink.getvalue().to_pybytes())
    return parts


def _fingerprint(table: pa.Table) -> str:
    """Hex sha256 of the values, not of their Arrow encoding, which may differ between Arrow releases."""
    total = sha256()
    for i, name in enumerate(table.column_names):
        values = _to_numpy(table.schema.field(i), table.column(i))
        if values.dtype == object:
            encoded = [str(value).encode() for value in values.reshape(-1)]
            lengths = np.array([len(value) for value in encoded], dtype="<i8")
            content = lengths.tobytes() + b"".join(encoded)
        else:
            content = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).tobytes()
        head = canonical_json([name, values.dtype.kind, values.dtype.itemsize, list(values.shape)])
        total.update(sha256(head).digest() + sha256(content).digest())
    return total.hexdigest()


def _to_numpy(field: pa.Field, column: pa.ChunkedArray) -> Array:
    if tensor_shape(field) is not None:
        return tensor_values(field, column)
    values: Array = column.to_numpy()
    return values.reshape(-1, 1)
