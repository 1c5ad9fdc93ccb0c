"""Desired state of a pool's models: a log of load and unload requests in the store, which all replicas follow.

    pools/<pool>/wanted/log/…    {type: load, model, version, alias, max_batch_size} and {type: unload, model}

The last event of a model is in force. Independent of replicas.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from maas_ray.errors import ObjectCorrupt
from maas_ray.registry.models import check_name
from maas_ray.serve.spec.pools import ServedModelSpec
from maas_ray.store.objects import ObjectStore
from maas_ray.store.sealed import Count, Document, malformed, read_document
from maas_ray.store.sequence import Follower, Record, Sequence

PREFIX = "pools"


@dataclass(frozen=True)
class DesiredModel:
    """Latest load or unload request for a model.

    Args:
        number: number of the event, from 1; later events have higher numbers.
        is_load: True: load; False: unload.
        spec: version or alias to load; None: as the pool's spec says, else the production alias.
        max_batch_size: maximum rows of one run; None: as the pool's spec says.
    """

    number: int
    is_load: bool
    spec: ServedModelSpec | None = None
    max_batch_size: int | None = None


class DesiredState:
    """Desired models of one pool. Reads are incremental.

    Args:
        store: store of the log.
        pool: name of the pool.
    """

    def __init__(self, store: ObjectStore, pool: str) -> None:
        check_name(pool, "pool")
        self._place = (store, f"{PREFIX}/{pool}/wanted")
        self._log = Follower(Sequence(*self._place))
        self._models: dict[str, DesiredModel] = {}
        self._events: dict[str, Mapping[str, Any]] = {}

    def models(self) -> dict[str, DesiredModel]:
        """Returns the latest request for every model that has one, by name.

        Raises:
            ObjectCorrupt: a record was altered or is malformed; the message names it.
        """
        self._take(self._log.look())
        return dict(self._models)

    def load(self, name: str, spec: ServedModelSpec | None = None, max_batch_size: int | None = None) -> None:
        """Requests a model; a repeated equal request adds no record."""
        event: dict[str, Any] = {"type": "load", "model": name}
        if spec is not None:
            event |= {"version": spec.version} if spec.version is not None else {"alias": spec.alias}
        if max_batch_size is not None:
            event["max_batch_size"] = max_batch_size
        self._append(event)

    def unload(self, name: str) -> None:
        """Requests that a model is no longer served."""
        self._append({"type": "unload", "model": name})

    def _append(self, event: Mapping[str, Any]) -> None:
        def decide(new: list[Record]) -> Mapping[str, Any]:
            self._take(new)
            if self._events.get(event["model"]) == event:
                raise _Asked
            return event

        with suppress(_Asked):
            self._take([self._log.append(decide)])

    def _take(self, new: list[Record]) -> None:
        try:
            found = {record.seq: read_desired(record) for record in new}
        except ObjectCorrupt:
            self._log, self._models, self._events = Follower(Sequence(*self._place)), {}, {}
            raise
        for record in new:
            name, desired_model = found[record.seq]
            self._models[name], self._events[name] = desired_model, record.event


class _Asked(Exception):
    """Raised if there is nothing to append: the latest request for this model is equal."""


class _DesiredEvent(Document):
    type: Literal["load", "unload"]
    model: str
    version: Count | None = None
    alias: str | None = None
    max_batch_size: Count | None = None


def read_desired(record: Record) -> tuple[str, DesiredModel]:
    """Returns the model and the request in a record. Raises `ObjectCorrupt`."""
    what = f"the log record {record.key}"
    event = read_document(_DesiredEvent, record.event, what)
    reference = {key: value for key in ("version", "alias") if (value := getattr(event, key)) is not None}
    try:
        spec = ServedModelSpec(name=event.model, **reference) if reference else None
    except ValidationError as error:
        raise malformed(what, error) from None
    return event.model, DesiredModel(record.seq, event.type == "load", spec, event.max_batch_size)
