"""What callers have asked a pool to load and unload: an append-only sequence in the store, which all replicas follow.

    pools/<pool>/wanted/log/…    {type: load, model, version, alias, max_batch_size} and {type: unload, model}

The last event of a model counts. Knows no replica.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from maas_ray.registry.models import check_name
from maas_ray.serve.spec import ModelSpec
from maas_ray.store.objects import ObjectStore
from maas_ray.store.sealed import Count, Document, malformed, read_document
from maas_ray.store.sequence import Record, Sequence

PREFIX = "pools"


@dataclass(frozen=True)
class Wish:
    """What was last asked for a model.

    Args:
        number: of the event, from 1; a later wish has a higher one.
        is_load: load, else unload.
        spec: the version or alias to load; None: what the pool's spec says, else the production alias.
        max_batch_size: most rows of one run; None: what the pool's spec says.
    """

    number: int
    is_load: bool
    spec: ModelSpec | None = None
    max_batch_size: int | None = None


class Wanted:
    """The wishes of one pool. Reading is incremental.

    Args:
        store: where the log lies.
        pool: the pool's name.
    """

    def __init__(self, store: ObjectStore, pool: str) -> None:
        check_name(pool, "pool")
        self._sequence = Sequence(store, f"{PREFIX}/{pool}/wanted")
        self._records: list[Record] = []
        self._wishes: dict[str, Wish] = {}

    def wishes(self) -> dict[str, Wish]:
        """The last wish of every model that was ever asked for, by name.

        Raises:
            ObjectCorrupt: a record is altered or malformed; names it.
        """
        new = list(self._sequence.read(after=self._records[-1].seq if self._records else 0))
        found = dict(read_wish(record) for record in new)
        self._records += new
        self._wishes |= found
        return dict(self._wishes)

    def load(self, name: str, spec: ModelSpec | None = None, max_batch_size: int | None = None) -> None:
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
        self.wishes()
        last = next(
            (record.event for record in reversed(self._records) if record.event["model"] == event["model"]), None
        )
        if last != event:
            self._sequence.append(lambda records: event, self._records)


class _Event(Document):
    type: Literal["load", "unload"]
    model: str
    version: Count | None = None
    alias: str | None = None
    max_batch_size: Count | None = None


def read_wish(record: Record) -> tuple[str, Wish]:
    """The model and what is asked of it, as a record says. Raises `ObjectCorrupt`."""
    what = f"the log record {record.key}"
    event = read_document(_Event, record.event, what)
    reference = {key: value for key in ("version", "alias") if (value := getattr(event, key)) is not None}
    try:
        spec = ModelSpec(name=event.model, **reference) if reference else None
    except ValidationError as error:
        raise malformed(what, error) from None
    return event.model, Wish(record.seq, event.type == "load", spec, event.max_batch_size)
