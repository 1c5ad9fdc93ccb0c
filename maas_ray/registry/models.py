"""Models, versions and aliases: a fold over the log in the store, which is the source of truth.

Publishing appends `{type: publish, model, version, bundle, run, token}`; promoting appends `{type: alias, model, alias,
version}`. The version number depends on the whole log before it, so concurrent publishers get different versions.

A publish whose response was lost can be retried by any process at any time: the token identifies the publish, and a
retry finds its own version. By default it is derived from model, bundle and run, so a bundle is one version of a model.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from maas_ray.bundle.format import BundleInfo, load_info
from maas_ray.errors import NotFound, ObjectCorrupt, SpecError
from maas_ray.spec import canonical_json
from maas_ray.store.objects import ObjectStore
from maas_ray.store.sealed import MAX_COUNT, Document, malformed
from maas_ray.store.sequence import Follower, Record, Sequence
from maas_ray.suggestions import known_names

PREFIX = "registry"
PRODUCTION = "production"
MAX_NAMES = 50
"""Maximum number of names that a message lists."""
K = TypeVar("K")
V = TypeVar("V")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
ROUTES = frozenset(
    {
        "config", "generate", "generate_stream", "health", "index", "infer", "live", "load", "logging", "metrics", "models",
        "ready", "repository", "stats", "trace", "unload", "v2", "versions",
    }
)  # fmt: skip
"""Words of the protocol's paths, which are no model names: `v2/models/stats` is the statistics of all models."""


@dataclass(frozen=True)
class Version:
    """One immutable version of a model."""

    model: str
    version: int
    bundle: str
    """Id of the bundle that is served."""
    run: str
    """Id of the run that trained it."""
    published_s: float
    """Seconds since 1970."""
    token: str = ""
    """Token of the publish; see `Registry.publish`."""


@dataclass
class Model:
    """A model: its versions by number and its aliases."""

    name: str
    versions: dict[int, Version] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)


class Registry:
    """The registry of one store. Reads incrementally: no record is read twice.

    A read costs one request while nothing changes; the first one a few, for any length of the log
    (store/log/snapshot.py).

    Args:
        store: store with the log.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.uri = store.uri
        """URI of the store, for messages."""
        self._log = Follower(Sequence(store, PREFIX))
        self._models: dict[str, Model] = {}
        self._events: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}

    def models(self) -> dict[str, Model]:
        """All current models by name; must not be modified. The same object as before if nothing has changed.

        Raises:
            ObjectCorrupt: a record is altered or malformed; the message names it.
        """
        self._take(self._log.look())
        return self._models

    def history(self, name: str) -> list[tuple[float, Mapping[str, Any]]]:
        """All events of a model in order, each with its time in seconds since 1970."""
        self.model(name)
        return list(self._events[name])

    def model(self, name: str) -> Model:
        """One model. Raises `NotFound`; the message names existing models."""
        return find_model(self.models(), name, self._store.uri)

    def resolve(self, name: str, ref: int | str = PRODUCTION) -> Version:
        """The version with a number or an alias.

        Args:
            name: the model.
            ref: a version (`3` or `"3"`) or an alias (`"production"`).

        Raises:
            NotFound: no such model, version or alias; the message lists existing ones.
        """
        return find_version(self.models(), name, ref, self._store.uri)

    def resolve_all(self, references: Iterable[tuple[str, int | str]]) -> list[Version | NotFound]:
        """As `resolve` for each pair of a model and a reference, with one read for all of them."""
        models = self.models()
        found: list[Version | NotFound] = []
        for name, ref in references:
            try:
                found.append(find_version(models, name, ref, self._store.uri))
            except NotFound as error:
                found.append(error)
        return found

    def publish(self, name: str, bundle: str, *, token: str | None = None) -> Version:
        """Publishes a committed bundle as the next version of a model; a retry returns the version of the first call.

        Args:
            name: the model.
            bundle: the bundle's id.
            token: identifies the publish; a retry passes the same token. By default the same model and bundle are the
                same publish; to publish a bundle again as another version, pass another token.

        Raises:
            NotFound: there is no such bundle.
            SpecError: the name is not a valid model name, or the token belongs to another publish.
            StoreUnavailable: it is unknown whether the version was written; retry to find or to write it.
        """
        check_name(name, "model")
        run = load_info(self._store, bundle).lineage.run
        given, token = token, token or _token(name, bundle, run)

        def next_version() -> Mapping[str, Any]:
            model = self._models.get(name, Model(name))
            if (made := _published(model, bundle, token, by_content=given is None)) is not None:
                raise _Made(made)
            version = 1 + max(model.versions, default=0)
            return {
                "type": "publish", "model": name, "version": version, "bundle": bundle, "run": run, "token": token,
            }  # fmt: skip

        try:
            record = self._append(next_version)
        except _Made as found:
            return found.version
        return self._models[name].versions[int(record.event["version"])]

    def promote(self, name: str, version: int, alias: str = PRODUCTION) -> Version:
        """Points an alias at a version; running pools follow it. Does nothing if it already points at it.

        Raises:
            NotFound: no such model or version.
            SpecError: the alias is not a valid name, or is a number.
        """
        check_name(alias, "alias")
        if alias.isdigit():
            raise SpecError(f"alias {alias!r} is a number, which is a version; choose a word such as {PRODUCTION!r}")

        def point() -> Mapping[str, Any]:
            model = find_model(self._models, name, self._store.uri)
            wanted = find_version({name: model}, name, version, self._store.uri)
            if model.aliases.get(alias) == version:
                raise _Made(wanted)
            return {"type": "alias", "model": name, "alias": alias, "version": version}

        try:
            self._append(point)
        except _Made as found:
            return found.version
        return self._models[name].versions[version]

    def info(self, version: Version) -> BundleInfo:
        """The description of a version's bundle."""
        return load_info(self._store, version.bundle)

    def _append(self, make_event: Callable[[], Mapping[str, Any]]) -> Record:
        """Appends an event that depends on the current `_models`."""

        def decide(new: list[Record]) -> Mapping[str, Any]:
            self._take(new)
            return make_event()

        record = self._log.append(decide)
        self._take([record])
        return record

    def _take(self, new: list[Record]) -> None:
        """Replaces the table by one with the new records: callers may still use the old one."""
        if not new:
            return
        events = [(record, event) for record in new if (event := self._read(record)) is not None]
        self._models = _folded(self._models, events)
        for record, event in events:
            self._events.setdefault(event.model, []).append((record.time_s, record.event))

    def _read(self, record: Record) -> "Event":
        try:
            return read_event(record)
        except ObjectCorrupt:
            self._log, self._models, self._events = Follower(Sequence(self._store, PREFIX)), {}, {}
            raise


def check_name(name: str, what: str) -> None:
    """Raises `SpecError` unless `name` is valid in URLs and store keys; a model must not be a word of a route."""
    if not _NAME.fullmatch(name):
        raise SpecError(
            f"{what} {name!r} is not a valid name; use up to 100 letters, digits, '.', '_' and '-', beginning with a "
            "letter or digit"
        )
    if what == "model" and name in ROUTES:
        raise SpecError(
            f"a model cannot be named {name!r}, which is reserved for the protocol's paths; choose another name"
        )


class _Publish(Document):
    type: Literal["publish"]
    model: str
    version: Annotated[int, Field(ge=1, le=MAX_COUNT)]
    bundle: str
    run: str
    token: str = ""


class _Alias(Document):
    type: Literal["alias"]
    model: str
    alias: str
    version: Annotated[int, Field(ge=1, le=MAX_COUNT)]


Event = _Publish | _Alias | None
"""None: an event of a later version of this library."""
_EVENT: TypeAdapter[_Publish | _Alias] = TypeAdapter(Annotated[_Publish | _Alias, Field(discriminator="type")])


def read_event(record: Record) -> Event:
    """The event in a record of the registry.

    Raises:
        ObjectCorrupt: a field is missing or has another type; the message names the record.
    """
    kind = record.event.get("type")
    if isinstance(kind, str) and kind not in ("publish", "alias"):
        return None
    try:
        event = _EVENT.validate_python(record.event)
        check_name(event.model, "model")
    except ValidationError as error:
        raise malformed(f"the log record {record.key}", error) from None
    except SpecError as error:
        raise ObjectCorrupt(f"the log record {record.key} is malformed: {error}; not used") from None
    return event


class _Made(Exception):
    """Raised instead of appending an event whose effect already exists."""

    def __init__(self, version: Version) -> None:
        super().__init__(version)
        self.version = version


def _token(name: str, bundle: str, run: str) -> str:
    """The default token of a publish."""
    return sha256(canonical_json(["publish", name, bundle, run])).hexdigest()[:32]


def _published(model: Model, bundle: str, token: str, *, by_content: bool) -> Version | None:
    """The version that this publish already created, if any. Records without tokens are identified by their bundle."""
    for version in reversed(model.versions.values()):
        if version.token == token:
            if version.bundle != bundle:
                raise SpecError(
                    f"token {token!r} published version {version.version} of model {model.name!r} from another bundle, "
                    f"{version.bundle}; choose another token"
                )
            return version
        if by_content and not version.token and version.bundle == bundle:
            return version
    return None


def _folded(before: Mapping[str, Model], events: Iterable[tuple[Record, _Publish | _Alias]]) -> dict[str, Model]:
    """The table after more events; unchanged models are the same objects."""
    models = dict(before)
    own: set[str] = set()
    for record, event in events:
        if event.model not in own:
            model = before.get(event.model, Model(event.model))
            models[event.model] = Model(event.model, dict(model.versions), dict(model.aliases))
            own.add(event.model)
        model = models[event.model]
        if isinstance(event, _Publish):
            number = event.version
            model.versions[number] = Version(model.name, number, event.bundle, event.run, record.time_s, event.token)
        else:
            model.aliases[event.alias] = event.version
    return models


def find_model(models: Mapping[str, Model], name: str, uri: str) -> Model:
    """One model of a table that was read. Raises `NotFound`; the message names existing models."""
    return _find(models, name, "model", f"in {uri}", "maas-ray models")


def find_version(models: Mapping[str, Model], name: str, ref: int | str, uri: str) -> Version:
    """The version with a reference in a table that was read; does not access the store. See `Registry.resolve`."""
    model = find_model(models, name, uri)
    is_alias = isinstance(ref, str) and not ref.isdigit()
    number = (
        _find(model.aliases, str(ref), "alias", f"of model {name!r}", f"maas-ray models {name}")
        if is_alias
        else int(ref)
    )
    return _find(model.versions, number, "version", f"of model {name!r}", f"maas-ray models {name}")


def _find(known: Mapping[K, V], key: K, what: str, where: str, command: str) -> V:
    if key not in known:
        names = [str(name) for name in sorted(known)]  # type: ignore[type-var]
        kinds = "aliases" if what == "alias" else f"{what}s"
        raise NotFound(f"no {what} {key!r} {where}; {known_names(str(key), names, kinds, command)}")
    return known[key]
