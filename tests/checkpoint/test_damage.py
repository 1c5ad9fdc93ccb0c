"""Damage anywhere in a checkpoint is rejected before a value is used; intact checkpoints are never rejected."""

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maas_ray.checkpoint import load
from maas_ray.checkpoint.catalog import HISTORY, open_checkpoint, place, read_saved, verify
from maas_ray.checkpoint.load import load_into, read_tensors
from maas_ray.checkpoint.save import save
from maas_ray.errors import ObjectCorrupt
from maas_ray.store.fsck import fsck
from maas_ray.store.objects import ObstoreStore
from tests.checkpoint.states import PREFIX, is_equal, small_parts, small_tensors, snapshot

STEP = 3
MANIFEST = f"{place(PREFIX, STEP)}/manifest.json"
Damage = Callable[[random.Random, bytes, bytes], bytes]


def _flip(draw: random.Random, data: bytes, _: bytes) -> bytes:
    bit = draw.randrange(len(data) * 8)
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _truncate(draw: random.Random, data: bytes, _: bytes) -> bytes:
    return data[: draw.randrange(len(data))]


def _zero(draw: random.Random, data: bytes, _: bytes) -> bytes:
    start = draw.randrange(len(data))
    stop = min(len(data), start + draw.choice([1, 512, 4096, len(data)]))
    return data[:start] + bytes(stop - start) + data[stop:]


def _swap(draw: random.Random, data: bytes, other: bytes) -> bytes:
    if draw.random() < 0.5:
        return other  # two objects in each other's place
    half = len(data) // 2
    at, length = draw.randrange(half), draw.randrange(1, half)
    first, second = data[at : at + length], data[half : half + length]
    return (data[:at] + second + data[at + length : half] + first + data[half + length :])[: len(data)]


DAMAGES: dict[str, Damage] = {"flip": _flip, "truncate": _truncate, "zero": _zero, "swap": _swap}


class Untouched(Exception):
    """The change made no difference, such as zeros in place of zeros."""


def _damage(store: ObstoreStore, draw: random.Random, kind: str) -> tuple[str, bytes]:
    """Damages one object of the checkpoint; returns its key and what it held."""
    keys = sorted(info.key for info in store.scan(place(PREFIX, STEP)))
    key = draw.choice(keys)
    other = store.get(draw.choice([each for each in keys if each != key]))
    data = store.get(key)
    changed = DAMAGES[kind](draw, data, other)
    if changed == data:
        raise Untouched
    store.put(key, changed)
    return key, data


def _resume(store: ObstoreStore) -> tuple[dict[str, Tensor], ObjectCorrupt | None]:
    """Loads as a trainer would, into memory full of a value that no tensor has; returns what is there then."""
    tensors = {name: torch.full_like(tensor, 77) for name, tensor in small_tensors(STEP).items()}
    try:
        committed = open_checkpoint(store, PREFIX)
        load_into(committed, tensors)
        read_saved(committed)
    except ObjectCorrupt as error:
        return tensors, error
    return tensors, None


def _wrong_values(tensors: dict[str, Tensor]) -> list[str]:
    """Names of tensors in which a value is neither right nor untouched. (A mask's 77 is True.)"""
    truth = small_tensors(STEP)
    return [
        name
        for name, tensor in tensors.items()
        if name != "model.mask" and not bool(((tensor == truth[name]) | (tensor == 77)).all())
    ]


def _check_damages(store: ObstoreStore, count: int, seed: int = 0) -> int:
    """Damages the checkpoint in `count` ways, one after the other; returns how many were refused when loading."""
    draw = random.Random(seed)
    save(store, PREFIX, snapshot(STEP))
    num_refused = num_done = 0
    while num_done < count:
        try:
            key, data = _damage(store, draw, draw.choice(list(DAMAGES)))
        except Untouched:
            continue
        num_done += 1
        tensors, error = _resume(store)
        assert _wrong_values(tensors) == [], f"values of a damaged {key} were used"
        if error is None:
            # The header of a file of tensors is for other programs: a load reads no byte of it, `verify` does.
            assert is_equal(tensors, small_tensors(STEP))
            (problem,) = verify(open_checkpoint(store, PREFIX))
            assert key in str(problem)
        else:
            num_refused += 1
            assert place(PREFIX, STEP) in str(error)
        if num_done % 10 == 0:
            assert fsck(store).problems != []
        store.put(key, data)
    assert is_equal(read_tensors(open_checkpoint(store, PREFIX), ""), small_tensors(STEP))
    return num_refused


@pytest.mark.parametrize("count", [60, pytest.param(1500, marks=pytest.mark.fault)])
def test_no_damaged_value_is_ever_used(file_store: ObstoreStore, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    small_parts(monkeypatch, 256 << 10)
    assert _check_damages(file_store, count) > 0.9 * count


@pytest.mark.fault
def test_no_damaged_value_is_ever_used_from_s3(store: ObstoreStore, monkeypatch: pytest.MonkeyPatch) -> None:
    small_parts(monkeypatch, 256 << 10)
    _check_damages(store, 100, seed=1)


@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.fault)])
def test_an_intact_checkpoint_is_never_rejected(
    file_store: ObstoreStore, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    small_parts(monkeypatch, 256 << 10)
    save(file_store, PREFIX, snapshot(STEP))
    for _ in range(count):
        tensors, error = _resume(file_store)
        assert error is None
        assert is_equal(tensors, small_tensors(STEP))
    assert verify(open_checkpoint(file_store, PREFIX)) == []


def test_a_load_that_skips_the_digests_is_caught(file_store: ObstoreStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    small_parts(monkeypatch, 256 << 10)
    monkeypatch.setattr(load, "is_intact", lambda values, tile: True)
    with pytest.raises(AssertionError, match="were used"):
        _check_damages(file_store, 60)


class _Malicious:
    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._proof,)


@pytest.mark.parametrize("where", ["part", "history", "manifest", "another program's file"])
def test_a_malicious_pickle_is_never_executed(file_store: ObstoreStore, tmp_path: Path, where: str) -> None:
    committed = save(file_store, PREFIX, snapshot(STEP))
    proof = tmp_path / "executed"
    (part,) = (part for name, part in committed.parts.items() if name != HISTORY)
    keys = {
        "part": part.key,
        "history": committed.parts[HISTORY].key,
        "manifest": MANIFEST,
        "another program's file": f"{committed.prefix}/.metadata",
    }
    torch.save(_Malicious(proof), tmp_path / "bait")
    for bait in (pickle.dumps(_Malicious(proof)), (tmp_path / "bait").read_bytes()):
        # As large as what it replaces, so that its size does not give it away.
        file_store.put(keys[where], bait.ljust(part.size, b"\0") if where == "part" else bait)
        tensors, error = _resume(file_store)
        assert _wrong_values(tensors) == []
        assert (error is None) == (where == "another program's file")
        if where != "manifest":
            verify(open_checkpoint(file_store, PREFIX))
        fsck(file_store)
        assert not proof.exists()
    torch.load(tmp_path / "bait", weights_only=False)
    assert proof.exists(), "the bait is one: torch.load executes it"


def _resealed(store: ObstoreStore, change: Callable[[dict[str, Any]], None]) -> None:
    """A manifest that was changed by somebody who knows how to seal it."""
    from maas_ray.store.sealed import seal, unseal

    body = unseal(MANIFEST, store.get(MANIFEST))
    del body["digest"]
    change(body)
    store.put(MANIFEST, seal(body))


def _first(body: dict[str, Any]) -> dict[str, Any]:
    return body["meta"]["index"]["tensors"]["model.weight"]


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["meta"].pop("index"),
        lambda body: _first(body).update(dtype="object"),
        lambda body: _first(body).update(shape=[1 << 40, 1 << 20]),
        lambda body: _first(body).update(tiles=[]),
        lambda body: _first(body)["tiles"][0].__setitem__(3, -8),
        lambda body: _first(body)["tiles"][0].__setitem__(3, 1 << 40),
        lambda body: _first(body)["tiles"][0].__setitem__(2, 99),
        lambda body: _first(body)["tiles"][0].__setitem__(0, [0, -1]),
        lambda body: body["parts"]["00000-00000.safetensors"].update(key="other/tenant"),
        lambda body: body["meta"].update(index=json.loads("[]")),
    ],
)
def test_a_sealed_index_that_makes_no_sense_is_refused(
    file_store: ObstoreStore, change: Callable[[dict[str, Any]], None]
) -> None:
    save(file_store, PREFIX, snapshot(STEP))
    _resealed(file_store, change)
    with pytest.raises(ObjectCorrupt, match="cannot read the index of"):
        read_tensors(open_checkpoint(file_store, PREFIX))
