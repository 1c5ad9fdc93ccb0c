"""Sealed documents without `parts` or `meta`, of wrong types or with deep nesting ended in KeyError, TypeError and
RecursionError, and one foreign file in the log's directory made every model unresolvable."""

import json
import os
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from obstore.store import MemoryStore

from maas_ray.bundle.format import load_bundle, load_info
from maas_ray.checkpoint.catalog import describe, open_checkpoint, pin, pinned, read_saved, verify
from maas_ray.checkpoint.index import read_index
from maas_ray.checkpoint.retention import Keep, Retention
from maas_ray.checkpoint.save import save
from maas_ray.cli.checks import all_checks
from maas_ray.display import shown
from maas_ray.errors import MaasError, ObjectCorrupt
from maas_ray.registry.models import Registry
from maas_ray.serve.models.desired_state import DesiredState
from maas_ray.spec import canonical_json
from maas_ray.store.fsck import fsck
from maas_ray.store.objects import ObstoreStore, open_store
from maas_ray.store.sealed import seal, unseal
from maas_ray.store.sequence import Sequence
from maas_ray.train.records.runs import Runs
from maas_ray.train.search.log import MetricValue, SearchLog, TrialEnded
from maas_ray.train.spec.train import TrainSpec
from tests.checkpoint.states import snapshot
from tests.support.bundles import save_toy_bundle

CHECKPOINTS = "runs/r/checkpoints"
HUGE = 10**4000
BAD_VALUES: list[Any] = [None, True, -1, 1.5, "x", [], {"x": 1}, HUGE]
Reader = Callable[[ObstoreStore], object]


@pytest.fixture
def memory_store() -> ObstoreStore:
    """Thousands of small writes to a disk would take most of the time."""
    return ObstoreStore("memory://", MemoryStore())


def _fill(store: ObstoreStore) -> str:
    """One of everything; returns the id of the bundle."""
    bundle = save_toy_bundle(store)
    registry = Registry(store)
    registry.publish("digits", bundle)
    registry.promote("digits", 1)
    data = {"uri": "sklearn:digits", "task": "classification"}
    fields = {"run": "r", "model": {"name": "mlp"}, "data": data, "storage": {"uri": store.uri}}
    runs = Runs(store)
    runs.create(TrainSpec.model_validate(fields), "d" * 64, None)
    attempt = {"number": 1, "workers": 2, "first_step": None, "reached": 3, "committed": 7, "reason": "over"}
    for event in (
        {"type": "started", "workers": 2},
        {"type": "attempt", **attempt},
        {"type": "validated", "step": 7, "metrics": {"validation_loss": 0.5}},
        {"type": "unvalidated", "step": 7, "error": "no room"},
        {"type": "evaluated", "metrics": {"loss": 0.5}},
        {"type": "finished", "step": 7, "reason": None},
    ):
        runs.record("r", event)
    save(store, CHECKPOINTS, snapshot(7, metrics={"loss": 0.5}))
    pin(store, CHECKPOINTS, 7, "exported")
    wanted = DesiredState(store, "pool")
    wanted.load("digits")
    wanted.unload("digits")
    search = SearchLog(store, "s")
    search.record(0, TrialEnded("finished", (MetricValue(1, 0.5, 2.0),)))
    return bundle


READERS: dict[str, tuple[str, Reader]] = {
    # what: (its key, what reads it)
    "a bundle": ("bundles/{bundle}/manifest.json", lambda store: load_info(store, store.bundle)),  # type: ignore[attr-defined]
    "a run": ("runs/r/manifest.json", lambda store: Runs(store).get("r")),
    "a checkpoint": (
        f"{CHECKPOINTS}/0000000007/manifest.json",
        lambda store: (
            read_index(open_checkpoint(store, CHECKPOINTS)),
            read_saved(open_checkpoint(store, CHECKPOINTS)),
        ),
    ),
    "a publish": ("registry/log/{1:020d}.json", lambda store: Registry(store).models()),
    "an alias": ("registry/log/{2:020d}.json", lambda store: Registry(store).models()),
    **{
        f"event {number} of a run": (f"runs/r/log/{{{number}:020d}}.json", lambda store: Runs(store).get("r"))
        for number in range(1, 7)
    },
    "a pin": ("runs/r/pins/log/{1:020d}.json", lambda store: pinned(store, CHECKPOINTS)),
    "a desired model": ("pools/pool/wanted/log/{1:020d}.json", lambda store: DesiredState(store, "pool").models()),
    "a trial": ("searches/s/log/{1:020d}.json", lambda store: SearchLog(store, "s").ended()),
}


def _paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a document, but only a few of a long list and of a spec, which are not tested here."""
    yield at
    if isinstance(value, dict) and (not at or at[-1] not in ("spec", "optimizer")):
        for key in list(value)[:12]:
            yield from _paths(value[key], (*at, key))
    if isinstance(value, list):
        for number in range(min(len(value), 1)):
            yield from _paths(value[number], (*at, number))


def _changed(body: Any, path: tuple[Any, ...], value: Any) -> Any:
    copy = json.loads(json.dumps(body))
    *parents, last = path
    place = copy
    for parent in parents:
        place = place[parent]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return copy


def _reseal(store: ObstoreStore, key: str, body: dict[str, Any]) -> None:
    store.put(key, seal({name: value for name, value in body.items() if name != "digest"}))


@pytest.mark.parametrize("what", READERS)
def test_no_sealed_document_is_read_as_anything_but_itself_or_corrupt(memory_store: ObstoreStore, what: str) -> None:
    store = memory_store
    store.bundle = _fill(store)  # type: ignore[attr-defined]
    template, read = READERS[what]
    key = template.format(*range(10), bundle=store.bundle)  # type: ignore[attr-defined]
    whole = store.get(key)
    body = unseal(key, whole)
    if "event" in body:  # the last of its log: what follows a changed record breaks the chain in any case
        store.delete([info.key for info in store.scan(key.rpartition("/")[0]) if info.key > key])
    read(store)
    refusals: list[tuple[str, Any, Any]] = []
    for path in _paths(body):
        if not path or path == ("digest",):
            continue
        for value in (..., *BAD_VALUES):
            _reseal(store, key, _changed(body, path, value))
            try:
                read(store)
            except ObjectCorrupt as error:
                refusals.append((str(error), path, value))
            Runs(store).survey()
            if what != "a pin":
                describe(store, CHECKPOINTS)
    place = key.removesuffix("/manifest.json")
    assert [refusal for refusal in refusals if place not in refusal[0] or len(refusal[0]) > 1000] == []
    assert len(refusals) > 30, "the fault was planted"
    store.put(key, whole)
    read(store)


def _nested(levels: int) -> bytes:
    inner = b'{"a":' * levels + b"1" + b"}" * levels
    body = b'{"deep":' + inner + b"}"
    return body[:-1] + b',"digest":"' + sha256(body).hexdigest().encode() + b'"}'


@pytest.mark.parametrize("levels", [70, 900, 5_000, 100_000])
@pytest.mark.parametrize("what", ["a run", "a publish", "a checkpoint", "a bundle"])
def test_deep_nesting_is_refused_by_name(memory_store: ObstoreStore, what: str, levels: int) -> None:
    memory_store.bundle = _fill(memory_store)  # type: ignore[attr-defined]
    template, read = READERS[what]
    key = template.format(*range(10), bundle=memory_store.bundle)  # type: ignore[attr-defined]
    memory_store.put(key, _nested(levels))
    with pytest.raises(ObjectCorrupt, match=key):
        read(memory_store)


def test_fsck_reports_each_malformed_document_and_continues(file_store: ObstoreStore) -> None:
    bundle = _fill(file_store)
    assert fsck(file_store, checks=all_checks()).problems == []
    keys = [template.format(*range(10), bundle=bundle) for template, _ in READERS.values()]
    for key in keys:
        body = unseal(key, file_store.get(key))
        if "event" in body:
            # Only the content is damaged: the chain of digests is kept, as by an author who can seal documents.
            file_store.delete([key])
        else:
            _reseal(file_store, key, {**body, "meta": {}})
    for prefix in ("registry", "runs/r", "runs/r/pins", "pools/pool/wanted", "searches/s"):
        file_store.delete([info.key for info in file_store.scan(f"{prefix}/log")])
        for event in ({"type": 5}, {"type": "publish"}, {}):
            Sequence(file_store, prefix).append(lambda _, event=event: event)  # type: ignore[misc]
    problems = fsck(file_store, checks=all_checks()).problems
    text = "\n".join(problems)
    for prefix in ("registry", "runs/r", "runs/r/pins", "pools/pool/wanted", "searches/s"):
        assert f"{prefix}/log/{1:020d}.json" in text
        assert f"{prefix}/log/{3:020d}.json" in text
    for place in (f"bundles/{bundle}", "runs/r/manifest.json", f"{CHECKPOINTS}/0000000007"):
        assert place in text
    assert len(problems) >= 13


@pytest.mark.parametrize("damage", ["no parts", "no meta", "a list", "not JSON", "of another digest"])
def test_fsck_continues_after_an_unreadable_manifest(file_store: ObstoreStore, damage: str) -> None:
    bundle = _fill(file_store)
    key, other = f"bundles/{bundle}/manifest.json", f"{CHECKPOINTS}/0000000007/manifest.json"
    body = {name: value for name, value in unseal(key, file_store.get(key)).items() if name != "digest"}
    bad = {
        "no parts": lambda: seal({name: value for name, value in body.items() if name != "parts"}),
        "no meta": lambda: seal({name: value for name, value in body.items() if name != "meta"}),
        "a list": lambda: b"[]",
        "not JSON": lambda: b"\xff{",
        "of another digest": lambda: canonical_json({**body, "digest": "0" * 64}),
    }[damage]()
    file_store.put(key, bad)
    file_store.put(other, bad)
    problems = fsck(file_store, checks=all_checks()).problems
    assert len([problem for problem in problems if bundle in problem or CHECKPOINTS in problem]) == 2


FOREIGN = (
    "foo",
    ".DS_Store",
    "Thumbs.db",
    "desktop.ini",
    f"{1:020d}.json~",
    f".{1:020d}.json.swp",
    f"{1:020d}.json.bak",
    f"{1:020d}.json.part",
    f"{1:020d}",
    "1.json",
    f"copy of {1:020d}.json",
    f"old/{1:020d}.json",
    f"old/log/{1:020d}.json/x",
    "ünïcode \U0001f600.txt",
    "manifest.json.orig",
)


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_harmless_everywhere_and_reported(file_store: ObstoreStore, name: str) -> None:
    bundle = _fill(file_store)
    places = [
        *("registry/log", "registry", "runs", "runs/r", "runs/r/log", CHECKPOINTS, f"{CHECKPOINTS}/0000000007"),
        *("runs/r/pins/log", "pools/pool/wanted/log", "searches/s/log", "bundles", f"bundles/{bundle}"),
    ]
    for place in places:
        path = Path(str(file_store.root), place, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not ours")
    store = open_store(file_store.uri)
    assert Registry(store).resolve("digits").bundle == bundle
    assert load_bundle(store, bundle).graph == b"graph"
    assert [run.id for run in Runs(store).all()] == ["r"]
    assert verify(open_checkpoint(store, CHECKPOINTS)) == []
    assert pinned(store, CHECKPOINTS) == {7}
    assert set(DesiredState(store, "pool").models()) == {"digits"}
    assert list(SearchLog(store, "s").ended()) == [0]
    assert Retention(store, CHECKPOINTS, Keep(last=1)).apply() == []
    assert Registry(store).promote("digits", 1, "canary").version == 1
    report = fsck(store, checks=all_checks())
    assert report.problems == []
    assert {f"{place}/{name}" for place in places} <= set(report.foreign)


ODD: dict[str, Callable[[bytes], object]] = {
    "a line end": lambda place: Path(os.fsdecode(place + b"/a\nb")).write_bytes(b"x"),
    "an escape": lambda place: Path(os.fsdecode(place + b"/a\x1b[31m")).write_bytes(b"x"),
    "not UTF-8": lambda place: Path(os.fsdecode(place + b"/a\xff\xfe")).write_bytes(b"x"),
    "a link to nowhere": lambda place: os.symlink(b"/nowhere", place + b"/link"),
    "a link to itself": lambda place: os.symlink(b"loop", place + b"/loop"),
    "a circle": lambda place: os.symlink(place, place + b"/circle"),
    "a pipe": lambda place: os.mkfifo(place + b"/pipe"),
    "a pipe with the name of a record": lambda place: os.mkfifo(place + b"/%020d.json" % 99),
    "a directory with the name of a record": lambda place: os.mkdir(place + b"/%020d.json" % 99),
}


@pytest.mark.parametrize("kind", ODD)
def test_files_that_can_be_no_objects_are_passed_over_and_reported(file_store: ObstoreStore, kind: str) -> None:
    bundle = _fill(file_store)
    places = ("registry/log", "runs", "runs/r/log", CHECKPOINTS, "bundles", "")
    for place in places:
        ODD[kind](os.fsencode(f"{file_store.root}/{place}".rstrip("/")))
    assert Registry(file_store).resolve("digits").bundle == bundle
    assert Registry(file_store).promote("digits", 1, "canary").version == 1
    assert [run.id for run in Runs(file_store).all()] == ["r"]
    assert verify(open_checkpoint(file_store, CHECKPOINTS)) == []
    report = fsck(file_store, checks=all_checks())
    assert report.problems == []
    assert len(report.foreign) == (0 if kind == "a circle" else len(places))
    assert "\x1b" not in shown("\n".join(report.foreign))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["a pipe", "a directory"])
def test_a_foreign_object_with_the_name_of_the_next_record_is_named(
    file_store: ObstoreStore, make: Callable[[str], None]
) -> None:
    _fill(file_store)
    make(f"{file_store.root}/registry/log/{3:020d}.json")
    with pytest.raises(ObjectCorrupt, match=f"{3:020d}.json exists but is not an object; move it away"):
        Registry(file_store).promote("digits", 1, "canary")


def test_a_checkpoint_directory_of_another_name_is_not_a_checkpoint(file_store: ObstoreStore) -> None:
    _fill(file_store)
    manifest = file_store.get(f"{CHECKPOINTS}/0000000007/manifest.json")
    for name in ("latest", "8", "-000000001", "0000000008"):
        file_store.put(f"{CHECKPOINTS}/{name}/manifest.json", manifest)
    with pytest.raises(ObjectCorrupt, match="0000000008 contains step 7"):
        open_checkpoint(file_store, CHECKPOINTS)
    assert read_saved(open_checkpoint(file_store, CHECKPOINTS, 7)).step == 7
    assert [about["error"] is None for about in describe(file_store, CHECKPOINTS)] == [True, False]


@pytest.mark.parametrize("changed", ["graph", "description", "parts"])
def test_a_bundle_that_was_changed_and_sealed_again_is_refused(file_store: ObstoreStore, changed: str) -> None:
    bundle = save_toy_bundle(file_store)
    key = f"bundles/{bundle}/manifest.json"
    body = unseal(key, file_store.get(key))
    part = body["parts"]["model.onnx"]
    if changed == "graph":
        file_store.put(part["key"], b"other")
        part.update(size=5, sha256=sha256(b"other").hexdigest())
    elif changed == "description":
        body["meta"]["info"]["lineage"]["run"] = "another"
    else:
        part["pieces"] = [5]
    _reseal(file_store, key, body)
    for read in (load_bundle, load_info):
        with pytest.raises(ObjectCorrupt, match=bundle):
            read(file_store, bundle)
    with pytest.raises(ObjectCorrupt, match=bundle):
        Registry(file_store).publish("digits", bundle)
    assert any(bundle in problem for problem in fsck(file_store, checks=all_checks()).problems)


def test_a_manifest_that_names_another_s_objects_neither_reads_nor_removes_them(file_store: ObstoreStore) -> None:
    _fill(file_store)
    save(file_store, CHECKPOINTS, snapshot(8))
    theirs = open_checkpoint(file_store, CHECKPOINTS, 7)
    key = f"{CHECKPOINTS}/0000000008/manifest.json"
    body = unseal(key, file_store.get(key))
    body["parts"]["history.json"] = vars(theirs.parts["history.json"]) | {"pieces": []}
    _reseal(file_store, key, body)
    ours = open_checkpoint(file_store, CHECKPOINTS, 8)
    with pytest.raises(MaasError, match="belongs to another commit"):
        ours.read("history.json")
    ours.delete()
    assert verify(open_checkpoint(file_store, CHECKPOINTS, 7)) == []
