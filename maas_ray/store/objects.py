"""The object store: keys to bytes on a local directory or any S3-compatible service. Knows no commit and no format."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore, S3Store, from_url

from maas_ray.errors import Conflict, NotFound, SpecError, StoreDenied, StoreError, StoreUnavailable
from maas_ray.spec import Spec

SCHEMES = ("file", "s3", "gs", "az")

# Bounded: a dead store is reported after about half a minute instead of hanging a run.
_CLIENT = {"connect_timeout": timedelta(seconds=5), "timeout": timedelta(seconds=120)}
_RETRY = {
    "max_retries": 4,
    "retry_timeout": timedelta(seconds=30),
    "backoff": {"base": 2, "init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=3)},
}

_STAGED = re.compile(r"#\d+$")
T = TypeVar("T")


class StorageSpec(Spec):
    """Where runs, checkpoints, bundles and the registry live.

    Credentials never stand in a spec: they come from the environment of each process
    (`AWS_ACCESS_KEY_ID`, … or the machine's role).
    """

    uri: str = ".maas-ray/store"
    """A directory, `file:///path`, `s3://bucket/prefix`, `gs://…` or `az://…`."""
    endpoint: str | None = None
    """URL of an S3-compatible service other than AWS, such as `http://127.0.0.1:9000`."""
    region: str | None = None
    """S3 region; by default what the environment says, else `us-east-1`."""


@dataclass(frozen=True)
class ObjectInfo:
    """One stored object: its key, size in bytes and time of its last write."""

    key: str
    size: int
    modified: datetime


class ObjectStore(Protocol):
    """The whole surface that commits and sequences are built on; a fault-injecting test store implements it too."""

    uri: str

    def put_new(self, key: str, data: bytes) -> None:
        """Creates `key` atomically. Raises `Conflict` if it exists: the one primitive that everything rests on."""
        ...

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Writes a key that nobody else can name (it holds a random id); large data goes up in parts."""
        ...

    def get(self, key: str) -> bytes:
        """The bytes of `key`. Raises `NotFound`."""
        ...

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of `key` from `start` up to before `stop`, for each range; nothing between them is fetched.

        Less than asked for, or `StoreError`, where a range reaches beyond the object's end. Raises `NotFound`.
        """
        ...

    def scan(self, prefix: str, after: str | None = None) -> Iterator[ObjectInfo]:
        """All objects below `prefix/`, sorted by key, those above the key `after` only."""
        ...

    def children(self, prefix: str) -> list[str]:
        """Names directly below `prefix/` that have objects below them, sorted."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Removes keys; a key that is already gone is fine."""
        ...

    def staged(self) -> Iterator[ObjectInfo]:
        """What interrupted writes left behind that no listing shows (a local directory's temporary files)."""
        ...


class ObstoreStore:
    """An `ObjectStore` on the `obstore` library (object_store from Rust).

    Args:
        uri: shown in messages; holds no secret.
        backend: the obstore object.
        root: the directory, if the store is a local one; written objects are then fsynced.
    """

    def __init__(self, uri: str, backend: Any, root: Path | None = None) -> None:
        self.uri = uri
        self._backend = backend
        self.root = root

    def put_new(self, key: str, data: bytes) -> None:
        self._call(key, lambda: obstore.put(self._backend, key, data, mode="create"))
        self._sync(key)

    def put(self, key: str, data: bytes | memoryview) -> None:
        self._call(key, lambda: obstore.put(self._backend, key, data))
        self._sync(key)

    def get(self, key: str) -> bytes:
        return self._call(key, lambda: bytes(obstore.get(self._backend, key).bytes()))

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        starts, stops = zip(*ranges, strict=True)
        found = self._call(key, lambda: obstore.get_ranges(self._backend, key, starts=starts, ends=stops, coalesce=0))
        return [bytes(data) for data in found]

    def scan(self, prefix: str, after: str | None = None) -> Iterator[ObjectInfo]:
        def collect() -> list[ObjectInfo]:
            found = obstore.list(self._backend, prefix or None, offset=after).collect()
            return [ObjectInfo(meta["path"], meta["size"], meta["last_modified"]) for meta in found]

        return iter(sorted(self._call(prefix, collect), key=lambda info: info.key))

    def children(self, prefix: str) -> list[str]:
        listing = self._call(prefix, lambda: obstore.list_with_delimiter(self._backend, prefix or None))
        return sorted(path.rsplit("/", 1)[-1] for path in listing["common_prefixes"])

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            try:
                self._call(key, lambda key=key: obstore.delete(self._backend, key))  # type: ignore[misc]
            except NotFound:
                continue
            self._drop_empty_directories(key)

    def staged(self) -> Iterator[ObjectInfo]:
        # object_store writes a local object as `name#1` and links it into place; a kill leaves that file.
        for path in self.root.rglob("*#*") if self.root else ():
            if _STAGED.search(path.name) and path.is_file():
                stat = path.stat()
                key = str(path.relative_to(self.root))  # type: ignore[arg-type]
                yield ObjectInfo(key, stat.st_size, datetime.fromtimestamp(stat.st_mtime, UTC))

    def delete_staged(self, info: ObjectInfo) -> None:
        """Removes one file that `staged` listed."""
        if self.root and _STAGED.search(info.key):
            (self.root / info.key).unlink(missing_ok=True)

    def _call(self, key: str, operation: Callable[[], T]) -> T:
        where = f"{self.uri.rstrip('/')}/{key}"
        try:
            return operation()
        except FileNotFoundError as error:
            raise NotFound(f"no object {where}") from error
        except AlreadyExistsError as error:
            raise Conflict(f"the object {where} exists already") from error
        except (PermissionDeniedError, UnauthenticatedError, PermissionError) as error:
            raise StoreDenied(
                f"the store refused access to {where}; check the credentials in the environment and their permissions"
            ) from error
        except (BaseError, OSError, ValueError) as error:
            raise self._classify(where, error) from error

    def _classify(self, where: str, error: Exception) -> StoreError:
        # obstore reports most transport faults as GenericError; only the first line is for people.
        text = str(error).splitlines()[0]
        if "Access Denied" in text or "InvalidAccessKeyId" in str(error) or "SignatureDoesNotMatch" in str(error):
            return StoreDenied(f"the store refused access to {where}; check the credentials in the environment")
        if "No space left" in str(error) or "quota exceeded" in str(error):
            return StoreError(f"no space is left for {where}; free some, or choose another directory")
        if self.root is not None:
            return StoreDenied(f"cannot use {where}: {text}; choose a directory that this user can write")
        if isinstance(error, ValueError):
            return StoreError(f"{where} is not a valid object key: {text}")
        return StoreUnavailable(f"the store did not serve {where} within the bounded retries: {text}")

    def _sync(self, key: str) -> None:
        # object_store does not fsync; without it a power cut could keep a manifest and lose its parts.
        if self.root is None:
            return
        path = self.root / key
        for target in (path, path.parent):
            descriptor = os.open(target, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _drop_empty_directories(self, key: str) -> None:
        if self.root is None:
            return
        for parent in (self.root / key).parents:
            if parent == self.root:
                return
            try:
                parent.rmdir()
            except OSError:
                return  # not empty, or another writer put something there


def open_store(spec: StorageSpec | str) -> ObstoreStore:
    """Opens the store that a spec or a bare URI names; touches nothing yet except creating a local directory.

    Raises:
        SpecError: the URI's scheme is unknown.
        StoreDenied: a local directory cannot be created.
    """
    spec = StorageSpec(uri=spec) if isinstance(spec, str) else spec
    scheme, separator, rest = spec.uri.partition("://")
    if not separator or scheme == "file":
        root = Path(rest if separator else spec.uri).expanduser().absolute()
        try:
            backend = LocalStore(root, mkdir=True)
        except OSError as error:
            raise StoreDenied(
                f"cannot create the store directory {root}: {error}; choose a directory that this user can write"
            ) from error
        return ObstoreStore(f"file://{root}", backend, root)
    if scheme not in SCHEMES:
        raise SpecError(f"storage.uri {spec.uri!r}: unknown scheme {scheme!r}; use one of {', '.join(SCHEMES)}")
    options: dict[str, Any] = {"client_options": dict(_CLIENT), "retry_config": dict(_RETRY)}
    if scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        if not bucket:
            raise SpecError(f"storage.uri {spec.uri!r} names no bucket; write s3://bucket/prefix")
        if spec.endpoint:
            options["endpoint"] = spec.endpoint
            options["client_options"]["allow_http"] = spec.endpoint.startswith("http://")
        region = spec.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        return ObstoreStore(spec.uri, S3Store(bucket, prefix=prefix or None, region=region, **options))
    try:
        return ObstoreStore(spec.uri, from_url(spec.uri, **options))
    except (BaseError, ValueError) as error:  # such as az:// without an account in the environment
        reason = str(error).splitlines()[0]
        raise SpecError(f"storage.uri {spec.uri!r} cannot be opened with this environment: {reason}") from error
