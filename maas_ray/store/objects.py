"""The object store: keys and bytes in a local directory or any S3-compatible service. Independent of commits."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore, S3Store, from_url
from pydantic import Field

from maas_ray.display import mask
from maas_ray.errors import Conflict, NotFound, SpecError, StoreDenied, StoreError, StoreUnavailable
from maas_ray.spec import Spec
from maas_ray.store.directory import STAGED, Directory
from maas_ray.store.location import FALLBACK, default_endpoint, default_uri

SCHEMES = ("file", "s3", "gs", "az")

# Bounded: an unreachable store is reported after about half a minute instead of blocking a run.
_CLIENT = {"connect_timeout": timedelta(seconds=5), "timeout": timedelta(seconds=120)}
RETRY = {
    "max_retries": 4,
    "retry_timeout": timedelta(seconds=30),
    "backoff": {"base": 2, "init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=3)},
}

_PAGE = 1000
"""Number of objects that S3 lists per request."""

T = TypeVar("T")


class StorageSpec(Spec):
    """The object store of runs, checkpoints, bundles and the registry.

    Credentials are never part of a spec: they come from the environment of each process
    (`AWS_ACCESS_KEY_ID`, … or the machine's role).
    """

    uri: str = Field(default_factory=default_uri, json_schema_extra={"default": FALLBACK})
    """A directory, `file:///path`, `s3://bucket/prefix`, `gs://…` or `az://…`; by default $MAAS_RAY_STORE where it is
    set, else `.maas-ray/store`."""
    endpoint: str | None = Field(default_factory=default_endpoint, json_schema_extra={"default": None})
    """URL of an S3-compatible service other than AWS, such as `http://127.0.0.1:9000`; by default $MAAS_RAY_ENDPOINT."""
    region: str | None = None
    """S3 region; by default that of the environment, else `us-east-1`."""

    @property
    def location(self) -> str:
        """The location to show: a directory as an absolute URI, passwords masked."""
        scheme, separator, rest = self.uri.partition("://")
        if not separator or scheme == "file":
            return f"file://{Path(rest if separator else self.uri).expanduser().absolute()}"
        return mask(self.uri) if self.endpoint is None else f"{mask(self.uri)} at {mask(self.endpoint)}"


@dataclass(frozen=True)
class ObjectInfo:
    """One stored object: its key, its size in bytes and the time of its last write."""

    key: str
    size: int
    modified: datetime


class ObjectStore(Protocol):
    """The interface on which commits and sequences are built; a fault-injecting test store implements it too."""

    uri: str
    """Shown in messages; holds no secret."""
    root: Path | None
    """The directory of a local store; None for a service, and where files must not be read past this surface."""

    def create(self, key: str, data: bytes) -> None:
        """Creates `key` atomically. Raises `Conflict` if it exists: the primitive on which everything is built."""
        ...

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Writes a key that is unique (it contains a random id); durable, or uploaded in parts, when it returns."""
        ...

    def get(self, key: str) -> bytes:
        """The bytes of `key`. Raises `NotFound`."""
        ...

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of `key` in [`start`, `stop`) for each range; nothing between the ranges is fetched.

        For a range beyond the object's end, returns fewer bytes or raises `StoreError`. Raises `NotFound`.
        """
        ...

    def scan(self, prefix: str, after: str | None = None) -> Iterator[ObjectInfo]:
        """All objects below `prefix/` with keys above `after`, sorted by key.

        Listed lazily, up to a thousand at a time, so that reading only the first object costs one listing.
        """
        ...

    def children(self, prefix: str) -> list[str]:
        """Names directly below `prefix/` that have objects below them, sorted."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Removes keys; ignores keys that do not exist."""
        ...

    def staged(self) -> Iterator[ObjectInfo]:
        """Leftovers of interrupted writes that no listing contains (temporary files of a local directory)."""
        ...

    def delete_staged(self, info: ObjectInfo) -> None:
        """Removes one of those."""
        ...

    def odd(self) -> list[str]:
        """Files of a local directory that cannot be objects, which no listing shows."""
        ...


class ObstoreStore:
    """An `ObjectStore` on the `obstore` library (Rust's object_store); a local one writes with `Directory`.

    Args:
        uri: shown in messages; contains no secret.
        backend: the obstore object.
        directory: writer of a local store.
        spec: spec with which another process opens the same store.
    """

    def __init__(
        self, uri: str, backend: Any, directory: Directory | None = None, spec: StorageSpec | None = None
    ) -> None:
        self.uri = uri
        self.root = directory.root if directory is not None else None
        """The directory of a local store."""
        self._backend = backend
        self._directory = directory
        self.spec = (spec or StorageSpec()).model_copy(update={"uri": uri})

    def create(self, key: str, data: bytes) -> None:
        if self._directory is not None:
            return self._call(key, partial(self._directory.create, key, data))
        self._call(key, lambda: obstore.put(self._backend, key, data, mode="create"))

    def put(self, key: str, data: bytes | memoryview) -> None:
        if self._directory is not None:
            return self._call(key, partial(self._directory.put, key, data))
        self._call(key, lambda: obstore.put(self._backend, key, data))

    def get(self, key: str) -> bytes:
        if self._directory is not None and not self._call(key, partial(self._directory.is_object, key)):
            raise NotFound(f"no object {self.uri.rstrip('/')}/{key}")
        return self._call(key, lambda: bytes(obstore.get(self._backend, key).bytes()))

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        starts, stops = zip(*ranges, strict=True)
        found = self._call(key, lambda: obstore.get_ranges(self._backend, key, starts=starts, ends=stops, coalesce=0))
        return [bytes(data) for data in found]

    def scan(self, prefix: str, after: str | None = None) -> Iterator[ObjectInfo]:
        directory = self._directory
        if directory is not None:
            found = directory.scan(prefix, after)
            while (entry := self._call(prefix, partial(next, found, None))) is not None:
                key, size, at = entry
                yield ObjectInfo(key, size, datetime.fromtimestamp(at, UTC))
            return
        pages = obstore.list(self._backend, prefix or None, offset=after, chunk_size=_PAGE)
        # S3, GCS and Azure list in key order; a directory marker, without its slash, is out of order by one.
        while (page := self._call(prefix, partial(next, pages, None))) is not None:
            for meta in sorted(page, key=lambda meta: meta["path"]):
                yield ObjectInfo(meta["path"], meta["size"], meta["last_modified"])

    def children(self, prefix: str) -> list[str]:
        if self._directory is not None:
            return self._call(prefix, partial(self._directory.children, prefix))
        listing = self._call(prefix, lambda: obstore.list_with_delimiter(self._backend, prefix or None))
        return sorted(path.rsplit("/", 1)[-1] for path in listing["common_prefixes"])

    def delete(self, keys: Iterable[str]) -> None:
        if self._directory is not None:
            names = list(keys)
            return self._call(", ".join(names[:1]), partial(self._directory.delete, names))
        for key in keys:
            with contextlib.suppress(NotFound):
                self._call(key, partial(obstore.delete, self._backend, key))

    def staged(self) -> Iterator[ObjectInfo]:
        for path in self._directory.staged() if self._directory is not None else ():
            with contextlib.suppress(FileNotFoundError):  # it became an object in the meantime
                stat = path.stat()
                key = str(path.relative_to(self._directory.root))  # type: ignore[union-attr]
                yield ObjectInfo(key, stat.st_size, datetime.fromtimestamp(stat.st_mtime, UTC))

    def odd(self) -> list[str]:
        """Files of a local directory that cannot be objects and that no listing contains."""
        return sorted(self._call("", lambda: list(self._directory.odd() if self._directory is not None else ())))

    def delete_staged(self, info: ObjectInfo) -> None:
        """Removes one file that `staged` listed."""
        if self.root and STAGED.search(info.key):
            (self.root / info.key).unlink(missing_ok=True)

    def _call(self, key: str, operation: Callable[[], T]) -> T:
        where = f"{self.uri.rstrip('/')}/{key}"
        try:
            return operation()
        except FileNotFoundError as error:
            raise NotFound(f"no object {where}") from error
        except (AlreadyExistsError, FileExistsError) as error:
            raise Conflict(f"the object {where} already exists") from error
        except (PermissionDeniedError, UnauthenticatedError, PermissionError) as error:
            raise StoreDenied(
                f"the store refused access to {where}; check the credentials in the environment and their permissions"
            ) from error
        except (BaseError, OSError, ValueError) as error:
            raise self._classify(where, error) from error

    def _classify(self, where: str, error: Exception) -> StoreError:
        # obstore reports most transport faults as GenericError; only the first line is readable.
        text = str(error).splitlines()[0]
        if "Access Denied" in text or "InvalidAccessKeyId" in str(error) or "SignatureDoesNotMatch" in str(error):
            return StoreDenied(f"the store refused access to {where}; check the credentials in the environment")
        if "No space left" in str(error) or "quota exceeded" in str(error):
            return StoreError(f"no space is left for {where}; free space, or choose another directory")
        if isinstance(error, ValueError):
            return StoreError(f"{where} is not a valid object key: {text}")
        if self.root is not None:
            return StoreDenied(f"cannot use {where}: {text}; choose a directory that this user can write")
        return StoreUnavailable(f"the store did not respond for {where} within the retry limit: {text}")


def open_store(spec: StorageSpec | str) -> ObstoreStore:
    """Opens the store that a spec or a bare URI names; at most creates a local directory.

    Raises:
        SpecError: the URI's scheme is unknown.
        StoreDenied: a local directory cannot be created.
    """
    spec = StorageSpec(uri=spec) if isinstance(spec, str) else spec
    scheme, separator, rest = spec.uri.partition("://")
    if not separator or scheme == "file":
        root = Path(rest if separator else spec.uri).expanduser().absolute()
        try:
            directory = Directory(root)
            backend = LocalStore(root)
        except OSError as error:
            raise StoreDenied(
                f"cannot create the store directory {root}: {error}; choose a directory that this user can write"
            ) from error
        return ObstoreStore(f"file://{root}", backend, directory, spec)
    if scheme not in SCHEMES:
        raise SpecError(f"storage.uri {spec.uri!r}: unknown scheme {scheme!r}; use one of {', '.join(SCHEMES)}")
    if ":" in (user := rest.partition("/")[0].rpartition("@")[0]) or (user and scheme != "az"):
        raise SpecError(
            f"storage.uri {spec.uri!r} names a user; write {scheme}://bucket/prefix: credentials come from the environment"
        )
    options: dict[str, Any] = {"client_options": dict(_CLIENT), "retry_config": dict(RETRY)}
    if scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        if not bucket:
            raise SpecError(f"storage.uri {spec.uri!r} names no bucket; write s3://bucket/prefix")
        if spec.endpoint:
            options["endpoint"] = spec.endpoint
            options["client_options"]["allow_http"] = spec.endpoint.startswith("http://")
        region = spec.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        return ObstoreStore(spec.uri, S3Store(bucket, prefix=prefix or None, region=region, **options), spec=spec)
    try:
        return ObstoreStore(spec.uri, from_url(spec.uri, **options), spec=spec)
    except (BaseError, ValueError) as error:  # such as az:// without an account in the environment
        reason = str(error).splitlines()[0]
        raise SpecError(f"storage.uri {spec.uri!r} cannot be opened with this environment: {reason}") from error
