"""Models, versions and aliases. The log in the store is the truth; everything here is a fold over it.

Publishing appends `{type: publish, model, version, bundle, run}`; promoting appends `{type: alias, model, alias,
version}`. The version is decided upon the whole log before it, so two publishers at once get different ones.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from maas_ray.bundle.format import BundleInfo, load_info
from maas_ray.errors import NotFound, SpecError
from maas_ray.store.objects import ObjectStore
from maas_ray.store.sequence import Record, Sequence

PREFIX = "registry"
PRODUCTION = "production"
K = TypeVar("K")
V = TypeVar("V")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
ROUTES = frozenset(
    {
        "config", "generate", "generate_stream", "health", "index", "infer", "live", "load", "logging", "metrics", "models",
        "ready", "repository", "stats", "trace", "unload", "v2", "versions",
    }
)  # fmt: skip
"""Words of the protocol's paths: `v2/models/stats` is the statistics of all models, so no model has such a name."""


@dataclass(frozen=True)
class Version:
    """One immutable version of a model."""

    model: str
    version: int
    bundle: str
    """Id of the bundle that is served."""
    run: str
    """Id of the run it was trained by."""
    published_s: float
    """Seconds since 1970."""


@dataclass
class Model:
    """A model: its versions by number and its aliases."""

    name: str
    versions: dict[int, Version] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)


class Registry:
    """The registry of one store. Reading is incremental: what was read once is not read again.

    Args:
        store: where the log lies.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._sequence = Sequence(store, PREFIX)
        self._records: list[Record] = []
        self._models: dict[str, Model] = {}

    def models(self) -> dict[str, Model]:
        """All models by name, as of now; not to be changed."""
        if new := list(self._sequence.read(after=self._records[-1].seq if self._records else 0)):
            self._records += new
            self._models = _fold(self._records)  # a new table: somebody may still hold the last one
        return self._models

    def history(self, name: str) -> list[tuple[float, Mapping[str, Any]]]:
        """All events of a model in order, each with its time in seconds since 1970."""
        self.model(name)
        return [(record.time_s, record.event) for record in self._records if record.event["model"] == name]

    def model(self, name: str) -> Model:
        """One model. Raises `NotFound`, naming the models that exist."""
        return _find(self.models(), name, "model", f"in {self._store.uri}")

    def resolve(self, name: str, ref: int | str = PRODUCTION) -> Version:
        """The version that a number or an alias names.

        Args:
            name: the model.
            ref: a version (`3` or `"3"`) or an alias (`"production"`).

        Raises:
            NotFound: no such model, version or alias; the message lists those that exist.
        """
        model = self.model(name)
        is_alias = isinstance(ref, str) and not ref.isdigit()
        number = _find(model.aliases, str(ref), "alias", f"of model {name!r}") if is_alias else int(ref)
        return _find(model.versions, number, "version", f"of model {name!r}")

    def publish(self, name: str, bundle: str) -> Version:
        """Makes a committed bundle the next version of a model; publishing the same bundle again makes another.

        Raises:
            NotFound: there is no such bundle.
            SpecError: the name is not a valid model name.
        """
        check_name(name, "model")
        run = load_info(self._store, bundle).lineage.run

        def next_version(records: list[Record]) -> Mapping[str, Any]:
            model = _fold(records).get(name)
            version = 1 + max(model.versions, default=0) if model else 1
            return {"type": "publish", "model": name, "version": version, "bundle": bundle, "run": run}

        record = self._append(next_version)
        return self.resolve(name, int(record.event["version"]))

    def promote(self, name: str, version: int, alias: str = PRODUCTION) -> Version:
        """Points an alias at a version; running pools follow it.

        Raises:
            NotFound: no such model or version.
            SpecError: the alias is not a valid name, or is a number.
        """
        check_name(alias, "alias")
        if alias.isdigit():
            raise SpecError(f"alias {alias!r} is a number, which names a version; choose a word such as {PRODUCTION!r}")

        def point(records: list[Record]) -> Mapping[str, Any]:
            model = _find(_fold(records), name, "model", f"in {self._store.uri}")
            _find(model.versions, version, "version", f"of model {name!r}")
            return {"type": "alias", "model": name, "alias": alias, "version": version}

        self._append(point)
        return self.resolve(name, version)

    def info(self, version: Version) -> BundleInfo:
        """The description of a version's bundle."""
        return load_info(self._store, version.bundle)

    def _append(self, make_event: Any) -> Record:
        record = self._sequence.append(make_event, self._records)
        self.models()
        return record


def check_name(name: str, what: str) -> None:
    """Raises `SpecError` unless `name` can stand in a URL and in a store's key; a model's is no word of a route either."""
    if not _NAME.fullmatch(name):
        raise SpecError(f"{what} {name!r} is not a valid name: up to 100 letters, digits, '.', '_' and '-', none first")
    if what == "model" and name in ROUTES:
        raise SpecError(
            f"a model cannot be named {name!r}, which is a word of the protocol's paths; choose another name"
        )


def _fold(records: Iterable[Record]) -> dict[str, Model]:
    models: dict[str, Model] = {}
    for record in records:
        event = record.event
        model = models.setdefault(event["model"], Model(event["model"]))
        if event["type"] == "publish":
            number = event["version"]
            model.versions[number] = Version(model.name, number, event["bundle"], event["run"], record.time_s)
        elif event["type"] == "alias":
            model.aliases[event["alias"]] = event["version"]
    return models


def _find(known: Mapping[K, V], key: K, what: str, where: str) -> V:
    if key not in known:
        names = ", ".join(str(name) for name in sorted(known, key=str)) or "none"
        raise NotFound(f"no {what} {key!r} {where}; there is: {names}")
    return known[key]
