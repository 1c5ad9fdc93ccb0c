"""Record of the pools that a cluster serves, in the store: a lost cluster can be restored from it.

    served/<cluster>/log/…    {type: served, pools: [names], spec: a ServeSpec} and {type: ended, pools: [names]}

Each record contains the whole description of its pools; a fold over the records gives the current state. Independent
of Ray.
"""

import re
from collections.abc import Iterable
from typing import Any, Literal

from maas_ray.serve.spec.serve import ServeSpec
from maas_ray.spec import parse_spec
from maas_ray.store.objects import ObjectStore
from maas_ray.store.sealed import Document, read_document
from maas_ray.store.sequence import Record, Sequence

PREFIX = "served"
RECORDS = re.compile(rf"{PREFIX}/[A-Za-z0-9][A-Za-z0-9._-]*")
"""Prefixes of the records of all clusters in a store."""


class Event(Document):
    """One record."""

    type: Literal["served", "ended"]
    pools: list[str]
    spec: dict[str, Any] | None = None


def record(store: ObjectStore, spec: ServeSpec, pools: Iterable[str]) -> None:
    """Records that pools of a spec are deployed; each replaces an earlier one of its name.

    Args:
        store: store of the spec.
        spec: spec that was deployed.
        pools: names of its pools that run as specified.

    Raises:
        StoreError: the record could not be written.
    """
    names = sorted(pools)
    event = {"type": "served", "pools": names, "spec": spec.model_dump(mode="json")}
    _sequence(store, spec.cluster).append(lambda _: event)


def forget(store: ObjectStore, cluster: str, pools: Iterable[str]) -> None:
    """Records that pools have ended; names without a record are ignored."""
    ended = set(pools)
    found = latest(store, cluster)
    if found is not None and ended.intersection(pool.name for pool in found.pools):
        event = {"type": "ended", "pools": sorted(ended)}
        _sequence(store, cluster).append(lambda _: event)


def latest(store: ObjectStore, cluster: str = "default") -> ServeSpec | None:
    """Returns the deployed pools: those of all records, with the addresses and the profile of the newest one.

    Returns:
        None if nothing was ever served, or everything has ended.

    Raises:
        ObjectCorrupt: a record was altered or is malformed; the message names it.
        SpecError: a record was written by another version of this library, with fields unknown to this one.
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
    """Parses a record. Raises `ObjectCorrupt`."""
    event: Event = read_document(Event, found.event, found.key)
    return event


def _sequence(store: ObjectStore, cluster: str) -> Sequence:
    return Sequence(store, f"{PREFIX}/{cluster}")
