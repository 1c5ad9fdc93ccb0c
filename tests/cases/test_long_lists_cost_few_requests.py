"""2,301 records of the registry cost 2,303 gets for each publish, promote, listing and start of a replica; 300
listed models without an alias cost 600 requests at each refresh."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from benchmarks.store.filling import Sizes, fill, fill_registry, memory_store, run_name
from benchmarks.store.slow import Counts, SlowStore
from maas_ray.checkpoint.catalog import describe, open_checkpoint, pin
from maas_ray.cli.checks import all_checks
from maas_ray.errors import MaasError
from maas_ray.registry.models import Registry
from maas_ray.serve.models.desired_state import DesiredState
from maas_ray.serve.models.manager import ModelManager
from maas_ray.serve.models.references import resolve_all
from maas_ray.serve.spec.pools import ServedModelSpec, ServingSpec
from maas_ray.store.fsck import fsck
from maas_ray.store.log.compact import compact
from maas_ray.store.objects import ObstoreStore, StorageSpec, open_store
from maas_ray.train.records.checkpoint_selector import choose_step
from maas_ray.train.records.runs import Runs
from tests.support.bundles import save_toy_bundle

LONG = Sizes(versions=10_000, models=1000, runs=5000, checkpoints=500, unfinished=500)
MAX_GETS = 20
MAX_LISTS = 30


@pytest.fixture(scope="module")
def long_store() -> tuple[ObstoreStore, str]:
    store = memory_store()
    return store, fill(store, LONG)


COMMANDS: dict[str, Callable[[ObstoreStore, str], object]] = {
    "models": lambda store, bundle: Registry(store).models(),
    "one model": lambda store, bundle: Registry(store).model("model-7"),
    "resolve": lambda store, bundle: Registry(store).resolve("model-7"),
    "history": lambda store, bundle: Registry(store).history("model-7"),
    "promote": lambda store, bundle: Registry(store).promote("model-7", 3),
    "publish": lambda store, bundle: Registry(store).publish("model-7", bundle, token="new"),
    "publish again": lambda store, bundle: Registry(store).publish("model-7", bundle, token="token-7"),
    "runs": lambda store, bundle: Runs(store).survey(),
    "one run": lambda store, bundle: Runs(store).get(run_name(4999)),
    "record": lambda store, bundle: Runs(store).record(run_name(4998), {"type": "failed", "error": "e"}),
    "no such run": lambda store, bundle: _refused(lambda: Runs(store).get("nope")),
    "no such model": lambda store, bundle: _refused(lambda: Registry(store).resolve("nope")),
    "newest checkpoint": lambda store, bundle: open_checkpoint(store, f"runs/{run_name(0)}/checkpoints"),
    "one checkpoint": lambda store, bundle: open_checkpoint(store, f"runs/{run_name(0)}/checkpoints", 77),
    "the checkpoint to publish": lambda store, bundle: choose_step(store, Runs(store).get(run_name(0)), "newest"),
    "pin": lambda store, bundle: pin(store, f"runs/{run_name(0)}/checkpoints", 77, "published"),
    "a replica's first look": lambda store, bundle: (
        resolve_all(Registry(store), _listed("production")),
        DesiredState(store, "pool").models(),
    ),
}


def _refused(work: Callable[[], object]) -> None:
    with pytest.raises(MaasError) as failure:
        work()
    assert len(str(failure.value)) < 2000, "not all names are listed"


def _listed(alias: str) -> list[ServedModelSpec]:
    return [ServedModelSpec(name=f"model-{number}", alias=alias) for number in range(300)]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_asks_the_store_a_few_times_however_long_its_lists_are(
    long_store: tuple[ObstoreStore, str], command: str
) -> None:
    store, bundle = long_store
    counting = SlowStore(store)
    COMMANDS[command](counting, bundle)
    counts = counting.taken()
    assert counts.gets <= MAX_GETS
    assert counts.lists <= MAX_LISTS
    assert counts.puts <= 4


def test_all_that_is_listed_is_there(long_store: tuple[ObstoreStore, str]) -> None:
    store, _ = long_store
    models = Registry(store).models()
    assert sum(len(model.versions) for model in models.values()) >= LONG.versions
    assert len(models) == LONG.models
    found, damaged = Runs(store).survey()
    assert (len(found), damaged) == (LONG.runs, {})
    assert {run.id: run.step for run in found if run.id != run_name(4998)} == {
        run_name(number): number for number in range(LONG.runs) if number != 4998
    }
    assert len(describe(store, f"runs/{run_name(0)}/checkpoints")) == LONG.checkpoints


@pytest.mark.parametrize("alias", ["production", "nowhere"])
@pytest.mark.parametrize("num_listed", [1, 300])
def test_a_look_costs_the_same_whatever_is_listed(
    long_store: tuple[ObstoreStore, str], alias: str, num_listed: int
) -> None:
    store = SlowStore(long_store[0])
    registry, specs = Registry(store), _listed(alias)[:num_listed]
    resolve_all(registry, specs)
    for _ in range(3):
        store.taken()
        names = [isinstance(reference.names, MaasError) for reference in resolve_all(registry, specs)]
        counts = store.taken()
        assert names == [alias == "nowhere"] * num_listed
        assert (counts.gets, counts.lists) == (2, 0)


async def _looks(store: SlowStore, spec: ServingSpec) -> list[Counts]:
    manager = ModelManager(store, spec)
    found = []
    for _ in range(3):
        await manager.refresh()
        found.append(store.taken())
    await manager.close()
    return found


def test_a_replica_that_follows_1000_models_asks_twice_at_each_look(long_store: tuple[ObstoreStore, str]) -> None:
    store = SlowStore(long_store[0])
    models = [*_listed("production"), *_listed("nowhere"), ServedModelSpec(name="*")]
    spec = ServingSpec(models=tuple(models), model_control="explicit")
    first, *others = asyncio.run(_looks(store, spec))
    assert first.gets <= MAX_GETS
    assert [(counts.gets, counts.lists) for counts in others] == [(3, 0)] * 2, "the log of desired models is empty: one"


def test_a_long_list_is_short_on_s3_too(s3_endpoint: str) -> None:
    store = open_store(StorageSpec(uri=f"s3://maas/n6-{id(s3_endpoint)}", endpoint=s3_endpoint))
    bundle = save_toy_bundle(store)
    fill_registry(store, bundle, 150, 10)
    counting = SlowStore(store)
    Registry(counting).publish("model-1", bundle, token="new")
    counts = counting.taken()
    assert counts.gets <= MAX_GETS
    assert counts.lists == 2
    models = Registry(store).models()
    later = datetime.now(UTC) + timedelta(days=2)
    assert len(compact(store, "registry", remove=True, now=later).removed) > 100
    assert Registry(store).models() == models
    assert fsck(store, checks=all_checks()).problems == []


def test_a_long_list_is_sound(long_store: tuple[ObstoreStore, str]) -> None:
    store, _ = long_store
    assert list(fsck(_only(store, "registry"), checks=all_checks()).problems) == []


def _only(store: ObstoreStore, prefix: str) -> ObstoreStore:
    """A copy of the objects below one prefix."""
    copy = memory_store()
    for info in store.scan(prefix):
        copy.put(info.key, store.get(info.key))
    return copy
