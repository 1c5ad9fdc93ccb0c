"""Preparing texts: every token exactly once, equal content gives equal digests, altered bytes are rejected."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from maas_ray.data.loading import mmap_cache
from maas_ray.data.loading.loader import Loader
from maas_ray.data.loading.mmap_cache import map_part
from maas_ray.data.loading.open import open_rows
from maas_ray.data.prepare import prepare
from maas_ray.data.spec.data import DataSpec
from maas_ray.data.spec.text import TokenizerSpec
from maas_ray.data.stored.dataset import Dataset
from maas_ray.data.text import encoding, source
from maas_ray.data.text import prepare as preparing
from maas_ray.data.text.tokenizer import learn_tokenizer
from maas_ray.decoding.tokenizer import Tokenizer
from maas_ray.errors import ClusterError, DataError, ObjectCorrupt, SpecError
from maas_ray.spec import parse_spec
from maas_ray.store.manifest import list_committed
from maas_ray.store.objects import ObstoreStore, StorageSpec, open_store
from tests.data.files import shared

TEXT = "".join(f"line {i} of the text\n" for i in range(200))


@pytest.fixture
def store(tmp_path: Path) -> ObstoreStore:
    return open_store(str(tmp_path / "store"))


def _spec(uri: Any, text: dict[str, Any] | None = None, **fields: Any) -> DataSpec:
    characters = {"seq_len": 16, "tokenizer": {"kind": "characters"}}
    split = {"validation": 0.1, "test": 0}
    return parse_spec(
        DataSpec,
        {
            "uri": str(uri),
            "task": "language_modeling",
            "split": split,
            "text": {**characters, **(text or {})},
            **fields,
        },
    )


def _write(folder: Path, *texts: str) -> Path:
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text, newline="")
    return folder


def _stream(dataset: Dataset, split: str) -> list[int]:
    parts = sorted(name for name in dataset.committed.parts if name.startswith(f"{split}/"))
    datatype = "<u2" if dataset.tokens and dataset.tokens.datatype == "uint16" else "<u4"
    return [int(token) for name in parts for token in np.frombuffer(dataset.committed.read(name), datatype)]


def _all(dataset: Dataset, split: str = "train", seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rows = open_rows(dataset, split, seed=seed)
    ids = np.arange(len(rows))
    batch = rows.take(ids, ids)
    return batch.columns[0], batch.target


def test_the_first_characters_train_and_the_last_ones_are_held_out(store: ObstoreStore, tmp_path: Path) -> None:
    dataset = prepare(_spec(_write(tmp_path / "a", TEXT)), store)
    border = int(len(TEXT) * 0.9)
    tokenizer = Tokenizer(dataset.tokenizer())
    assert tokenizer.decode(_stream(dataset, "train")) == TEXT[:border]
    assert tokenizer.decode(_stream(dataset, "validation")) == TEXT[border:]
    assert dataset.features.row.vocab_size == dataset.features.num_outputs == len(set(TEXT))
    assert dataset.report["documents"] == 1


@pytest.mark.parametrize("piece", [5, 64, 1 << 16])
@pytest.mark.parametrize("split_by", ["position", "document"])
def test_documents_are_followed_by_the_end_of_text_however_they_are_cut(
    monkeypatch: pytest.MonkeyPatch, store: ObstoreStore, tmp_path: Path, piece: int, split_by: str
) -> None:
    monkeypatch.setattr(source, "PIECE", piece)
    texts = [f"document {i} " * (i + 1) for i in range(12)]
    spec = _spec(
        _write(tmp_path / "a", "#".join(texts[:5]), "#".join(texts[5:])), {"separator": "#", "split_by": split_by}
    )
    dataset = prepare(spec, store)
    tokenizer = Tokenizer(dataset.tokenizer())
    whole = [tokenizer.decode(_stream(dataset, split)) for split in ("train", "validation")]
    if split_by == "position":
        assert "".join(whole) == "<|endoftext|>".join([*texts, ""])
    else:
        assert sorted("".join(whole).split("<|endoftext|>")) == sorted([*texts, ""])
        assert all(text.endswith("<|endoftext|>") for text in whole)
        assert whole[1].count("<|endoftext|>") == 1


@pytest.mark.parametrize("stride", [1, 5, 16, 23])
def test_row_i_is_the_window_from_place_i_times_stride_on(store: ObstoreStore, tmp_path: Path, stride: int) -> None:
    dataset = prepare(_spec(_write(tmp_path / "a", TEXT), {"stride": stride}), store)
    seen, target = _all(dataset)
    stream = torch.tensor(_stream(dataset, "train"))
    expected = stream.unfold(0, 17, stride)
    assert dataset.num_rows["train"] == len(expected)
    assert torch.equal(seen, expected[:, :-1])
    assert torch.equal(target, expected[:, 1:])
    assert seen.dtype == target.dtype == torch.int64
    assert dataset.num_rows["validation"] == (len(_stream(dataset, "validation")) - 1) // 16  # they never overlap


def test_rows_across_several_parts_are_whole(
    monkeypatch: pytest.MonkeyPatch, store: ObstoreStore, tmp_path: Path
) -> None:
    spec = _spec(_write(tmp_path / "a", TEXT), {"stride": 3})
    whole = _all(prepare(spec, open_store(str(tmp_path / "other"))))
    monkeypatch.setattr(preparing, "MAX_PART_BYTES", 50)
    dataset = prepare(spec, store)
    assert len(dataset.committed.parts) > 60
    for one, other in zip(_all(dataset), whole, strict=True):
        assert torch.equal(one, other)


def test_a_vocabulary_beyond_16_bits_is_stored_in_32(store: ObstoreStore, tmp_path: Path) -> None:
    text = "".join(map(chr, range(0x10000, 0x10000 + 70_000)))
    dataset = prepare(_spec(_write(tmp_path / "a", text), split={"validation": 0, "test": 0}), store)
    assert dataset.tokens is not None
    assert dataset.tokens.datatype == "uint32"
    assert _all(dataset)[0].flatten().tolist() == list(range(70_000 - 70_000 % 16))[: dataset.num_rows["train"] * 16]


def test_a_tokenizer_that_exists_is_used_unchanged(store: ObstoreStore, tmp_path: Path) -> None:
    folder = _write(tmp_path / "a", TEXT, TEXT)
    own = learn_tokenizer(TokenizerSpec(vocab_size=300), [TEXT], ["</s>"])
    path = tmp_path / "tokenizer.json"
    path.write_bytes(own.content)
    given = {"kind": "file", "uri": str(path)}
    with pytest.raises(DataError, match=r"no token '<\|endoftext\|>'"):
        prepare(_spec(folder, {"tokenizer": given}), store)
    dataset = prepare(_spec(folder, {"tokenizer": {**given, "end_of_text": "</s>"}}), store)
    assert dataset.tokenizer() == own.content
    assert dataset.features.num_outputs == 300
    assert own.decode([*_stream(dataset, "train"), *_stream(dataset, "validation")]) == f"{TEXT}</s>{TEXT}</s>"


def test_the_same_texts_give_the_same_data_set_and_other_ones_another(store: ObstoreStore, tmp_path: Path) -> None:
    folder = _write(tmp_path / "a", TEXT)
    first, again = prepare(_spec(folder), store), prepare(_spec(folder), store)
    assert first.digest == again.digest
    assert first.committed.digest == again.committed.digest
    (folder / "0.txt").write_text(TEXT.replace("line 199", "line 991"))
    assert prepare(_spec(folder), store).digest != first.digest
    others = [_spec(folder, {"seq_len": 8}), _spec(folder, {"tokenizer": {"kind": "bytes"}})]
    assert len({first.digest, *(prepare(spec, store).digest for spec in others)}) == 3
    assert first.digest in list_committed(store, "datasets")


def test_masks_depend_on_seed_and_position_alone_and_hide_as_bert_does(store: ObstoreStore, tmp_path: Path) -> None:
    folder = _write(tmp_path / "a", TEXT * 8, TEXT)
    dataset = prepare(_spec(folder, {"seq_len": 64}, task="masked_language_modeling"), store)
    mask = dataset.tokens.mask if dataset.tokens else None
    assert mask is not None
    plain = torch.tensor(_stream(dataset, "train")).unfold(0, 64, 64)
    rows = open_rows(dataset, "train", seed=3)
    ids = np.arange(len(rows))
    batches = [rows.take(ids, ids + epoch * len(rows)) for epoch in range(6)]
    seen = torch.stack([batch.columns[0] for batch in batches])
    target = torch.stack([batch.target for batch in batches])
    chosen = target != -100
    assert torch.equal(torch.where(chosen, target, plain), plain.expand_as(target))
    assert torch.equal(torch.where(chosen, plain, seen), plain.expand_as(target))
    assert not chosen[plain.expand_as(target) == mask.never[0]].any()
    num = int(chosen.sum())
    assert abs(num / chosen.numel() - 0.15) < 0.005
    assert abs(int((seen == mask.code)[chosen].sum()) / num - 0.8) < 0.02
    assert abs(int((seen == target)[chosen].sum()) / num - 0.1) < 0.02
    assert len({tuple(one.flatten().tolist()) for one in chosen}) == 6  # every epoch hides others
    # In any order, in any company: a row hides the same.
    some = np.array([40, 3, 17])
    alone = open_rows(dataset, "train", seed=3).take(some, some + 2 * len(rows))
    assert torch.equal(alone.columns[0], seen[2][some])
    assert not torch.equal(open_rows(dataset, "train", seed=4).take(some, some).columns[0], seen[0][some])


@pytest.mark.parametrize(("world", "accumulation_steps", "global_batch"), [(3, 2, 12), (7, 1, 40)])
def test_masks_do_not_depend_on_rank_world_or_batch(
    store: ObstoreStore, tmp_path: Path, world: int, accumulation_steps: int, global_batch: int
) -> None:
    dataset = prepare(_spec(_write(tmp_path / "a", TEXT), task="masked_language_modeling"), store)

    def stream(world: int, accumulation_steps: int, global_batch: int) -> dict[int, list[int]]:
        sizes = {"seed": 5, "global_batch": global_batch, "world": world, "accumulation_steps": accumulation_steps}
        rows = open_rows(dataset, "train", seed=9)
        batches = [
            batch
            for rank in range(world)
            for cursor in range(0, 240, global_batch)
            for batch in Loader.over(rows, rank=rank, **sizes).load(cursor, 240)
        ]
        return {
            int(position): [*seen.tolist(), *target.tolist()]
            for batch in batches
            for position, seen, target in zip(batch.positions, batch.columns[0], batch.target, strict=True)
        }

    expected = stream(1, 1, 12)
    assert sorted(expected) == list(range(240))
    assert stream(world, accumulation_steps, global_batch) == expected


@pytest.mark.parametrize("fault", ["flip", "cut", "gone"])
def test_an_altered_stream_is_refused(store: ObstoreStore, tmp_path: Path, fault: str) -> None:
    dataset = prepare(_spec(_write(tmp_path / "a", TEXT)), store)
    open_rows(dataset, "train")
    assert store.root is not None
    path = store.root / dataset.committed.parts["train/00000.tokens"].key
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes({"flip": bytes(content), "cut": bytes(content[:-1]), "gone": b""}[fault])
    if fault == "gone":
        path.unlink()
    with pytest.raises(ObjectCorrupt, match=r"train/00000\.tokens"):
        open_rows(dataset, "train")


def test_parts_of_a_remote_store_are_fetched_once_and_again_if_their_copy_is_altered(
    s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAAS_RAY_HOME", str(tmp_path / "home"))
    store = open_store(StorageSpec(uri=f"s3://maas/{tmp_path.name}", endpoint=s3_endpoint))
    dataset = prepare(_spec(_write(tmp_path / "a", TEXT)), store)
    part = dataset.committed.parts["train/00000.tokens"]
    map_part(dataset.committed, "train/00000.tokens", "<u2")
    copy = tmp_path / "home" / "parts" / part.sha256
    written = copy.stat().st_ino
    map_part(dataset.committed, "train/00000.tokens", "<u2")
    assert copy.stat().st_ino == written
    copy.write_bytes(bytes(part.size))
    again = map_part(dataset.committed, "train/00000.tokens", "<u2")
    assert again.tolist() == _stream(dataset, "train")
    assert np.fromfile(copy, "<u2").tolist() == again.tolist()
    monkeypatch.setattr(mmap_cache, "MAX_CACHE_BYTES", 1)
    map_part(dataset.committed, "validation/00000.tokens", "<u2")
    assert [path.name for path in copy.parent.iterdir() if path.name != ".lock"] == [
        dataset.committed.parts["validation/00000.tokens"].sha256
    ]


@pytest.mark.parametrize(
    ("text", "content", "says"),
    [
        ({}, "", "contains no text"),
        ({}, "too short", "the train split of .* has 8 tokens; a row needs 17"),
        ({"seq_len": 100}, TEXT[:500], "the validation split"),
        ({"split_by": "document"}, TEXT, "1 rows are too few"),
        ({"tokenizer": {"kind": "file", "uri": "nowhere.json"}}, TEXT, "does not exist"),
    ],
)
def test_texts_that_do_not_fit_are_refused(
    store: ObstoreStore, tmp_path: Path, text: dict[str, Any], content: str, says: str
) -> None:
    with pytest.raises(DataError, match=says):
        prepare(_spec(_write(tmp_path / "a", content), text), store)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"text": None}, "needs `text`"),
        ({"format": "csv"}, "not csv"),
        ({"features": ["a"]}, "features cannot be used"),
        ({"split": {"column": "a"}}, r"split\.column cannot be used"),
        (
            {"text": {"seq_len": 4, "tokenizer": {"kind": "bytes", "vocab_size": 400}}},
            "vocab_size is only for byte_bpe",
        ),
        ({"text": {"seq_len": 4, "tokenizer": {"kind": "file"}}}, "belong together"),
        ({"task": "classification", "format": "text"}, "has no target"),
    ],
)
def test_fields_without_effect_are_rejected(fields: dict[str, Any], says: str) -> None:
    whole = {"uri": "a.txt", "task": "language_modeling", "text": {"seq_len": 4}, **fields}
    with pytest.raises(SpecError, match=says):
        parse_spec(DataSpec, whole)


def test_a_spec_that_was_stored_reads_back() -> None:
    spec = _spec("a.txt")
    assert parse_spec(DataSpec, spec.model_dump(mode="json")) == spec


def test_shakespeare_is_cut_as_nanogpt_cuts_it(store: ObstoreStore) -> None:
    dataset = prepare(_spec(shared("tinyshakespeare.txt"), {"seq_len": 64, "stride": 1}), store)
    assert dataset.features.num_outputs == 65
    assert dataset.report["tokens"] == {"train": 1_003_854, "validation": 111_540, "test": 0}
    assert dataset.num_rows["train"] == 1_003_854 - 64
    assert sum(part.size for part in dataset.committed.parts.values()) < 2.3e6


def test_a_stream_with_fewer_tokens_than_its_manifest_lists_is_refused(store: ObstoreStore, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    dataset = prepare(_spec(tmp_path / "a.txt"), store)
    tokens = dataset.tokens
    more = tokens.model_copy(update={"num_tokens": {name: num + 1 for name, num in tokens.num_tokens.items()}})
    with pytest.raises(ObjectCorrupt, match="the parts of train contain .* tokens; their manifest lists"):
        open_rows(replace(dataset, tokens=more), "train")


@pytest.mark.usefixtures("ray_cluster")
def test_tasks_encode_to_the_same_data_set(
    file_store: ObstoreStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "".join(f"line {i}, {i * i} \u00e9\n" for i in range(12_000))
    (tmp_path / "a.txt").write_text(lines)
    spec = _spec(tmp_path / "a.txt", text={"seq_len": 16, "tokenizer": {"vocab_size": 400}})
    here = prepare(spec, file_store)
    monkeypatch.setattr(preparing, "TASKS_FROM", 0)
    monkeypatch.setattr(preparing, "encode_here", None)
    monkeypatch.setattr(encoding, "TEXTS_AT_ONCE", 2)
    assert prepare(spec, open_store(f"file://{tmp_path}/other")).digest == here.digest
    holder = ray.remote(_Holder).options(num_cpus=ray.cluster_resources()["CPU"]).remote()
    try:
        ray.get(holder.ready.remote(), timeout=60)
        with pytest.raises(ClusterError, match="no CPU .* within 0.5 s"):
            prepare(spec, open_store(f"file://{tmp_path}/third"), cpu_timeout_s=0.5)
    finally:
        ray.kill(holder)


class _Holder:
    def ready(self) -> bool:
        return True
