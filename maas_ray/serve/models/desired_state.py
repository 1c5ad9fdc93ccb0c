"""What callers have asked a pool to load and unload: an append-only sequence in the store, which all replicas follow.

    pools/<pool>/wanted/log/…    {type: load, model, version, alias, max_batch_size} and {type: unload, model}

The last event of a model counts. Knows no replica.
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
    """What was last asked for a model.

    Args:
        number: of the event, from 1; a later one is higher.
        is_load: load, else unload.
        spec: the version or alias to load; None: what the pool's spec says, else the production alias.
        max_batch_size: most rows of one run; None: what the pool's spec says.
    """

    number: int
    is_load: bool
    spec: ServedModelSpec | None = None
    max_batch_size: int | None = None


class DesiredState:
    """The desired models of one pool. Reading is incremental.

    Args:
        store: where the log lies.
        pool: the pool's name.
    """

    def __init__(self, store: ObjectStore, pool: str) -> None:
        check_name(pool, "pool")
        self._place = (store, f"{PREFIX}/{pool}/wanted")
        self._log = Follower(Sequence(*self._place))
        self._models: dict[str, DesiredModel] = {}
        self._events: dict[str, Mapping[str, Any]] = {}

    def models(self) -> dict[str, DesiredModel]:
        """What was last desired of every model that was ever asked for, by name.

        Raises:
            ObjectCorrupt: a record is altered or malformed; names it.
        """
        self._take(self._log.look())
        return dict(self._models)

    def load(self, name: str, spec: ServedModelSpec | None = None, max_batch_size: int | None = None) -> None:
        """Asks for a model; asking again for the same adds nothing."""
        event: dict[str, Any] = {"type": "load", "model": name}
        if spec is not None:
            event |= {"version": spec.version} if spec.version is not None else {"alias": spec.alias}
        if max_batch_size is not None:
            event["max_batch_size"] = max_batch_size
        self._append(event)

    def unload(self, name: str) -> None:
        """Asks that a model be served no longer."""
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
    """There is nothing to append: it was the last that was asked for this model."""


class _DesiredEvent(Document):
    type: Literal["load", "unload"]
    model: str
    version: Count | None = None
    alias: str | None = None
    max_batch_size: Count | None = None


def read_desired(record: Record) -> tuple[str, DesiredModel]:
    """The model and what is asked of it, as a record says. Raises `ObjectCorrupt`."""
    what = f"the log record {record.key}"
    event = read_document(_DesiredEvent, record.event, what)
    reference = {key: value for key in ("version", "alias") if (value := getattr(event, key)) is not None}
    try:
        spec = ServedModelSpec(name=event.model, **reference) if reference else None
    except ValidationError as error:
        raise malformed(what, error) from None
    return event.model, DesiredModel(record.seq, event.type == "load", spec, event.max_batch_size)
