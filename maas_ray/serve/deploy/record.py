"""What a cluster serves, written down in the store: a cluster that was lost whole is served again from it.

    served/<cluster>/log/…    {type: served, pools: [names], spec: a ServeSpec} and {type: ended, pools: [names]}

Each record has the whole description of its pools; what is in force is a fold over them. Knows no Ray.
"""

import re
from collections.abc import Iterable
from typing import Any, Literal

from maas_ray.serve.spec.pools import ServeSpec
from maas_ray.spec import parse_spec
from maas_ray.store.objects import ObjectStore
from maas_ray.store.sealed import Document, read_document
from maas_ray.store.sequence import Record, Sequence

PREFIX = "served"
RECORDS = re.compile(rf"{PREFIX}/[A-Za-z0-9][A-Za-z0-9._-]*")
"""Prefixes of the records of all clusters of a store."""


class Event(Document):
    """One record."""

    type: Literal["served", "ended"]
    pools: list[str]
    spec: dict[str, Any] | None = None


def record(store: ObjectStore, spec: ServeSpec, pools: Iterable[str]) -> None:
    """Writes down that pools of a spec are in force; each replaces an earlier one of its name.

    Args:
        store: of the spec.
        spec: what was deployed.
        pools: names of those of its pools that run as it says.

    Raises:
        StoreError: it could not be written.
    """
    names = sorted(pools)
    event = {"type": "served", "pools": names, "spec": spec.model_dump(mode="json")}
    _sequence(store, spec.cluster).append(lambda _: event)


def forget(store: ObjectStore, cluster: str, pools: Iterable[str]) -> None:
    """Writes down that pools were ended; those that no record names do not matter."""
    ended = set(pools)
    found = latest(store, cluster)
    if found is not None and ended.intersection(pool.name for pool in found.pools):
        event = {"type": "ended", "pools": sorted(ended)}
        _sequence(store, cluster).append(lambda _: event)


def latest(store: ObjectStore, cluster: str = "default") -> ServeSpec | None:
    """What is in force: the pools of all records, with the addresses and the profile of the newest one.

    Returns:
        None where nothing was ever served, or everything has ended.

    Raises:
        ObjectCorrupt: a record is altered or malformed; names it.
        SpecError: a record is of another version of this library, with fields that this one does not know.
    """
    pools: dict[str, Any] = {}
    newest: dict[str, Any] | None = None
    for found in _sequence(store, cluster).read():
        event = read_event(found)
        for name in event.pools:
            pools.pop(name, None)
        if event.spec is not None:
            newest = event.spec
            described = {pool["name"]: pool for pool in newest["pools"]}
            pools |= {name: described[name] for name in event.pools if name in described}
    if newest is None or not pools:
        return None
    return parse_spec(ServeSpec, {**newest, "pools": list(pools.values())}, source=f"the record {PREFIX}/{cluster}")


def read_event(found: Record) -> Event:
    """What a record says. Raises `ObjectCorrupt`."""
    event: Event = read_document(Event, found.event, found.key)
    return event


def _sequence(store: ObjectStore, cluster: str) -> Sequence:
    return Sequence(store, f"{PREFIX}/{cluster}")
