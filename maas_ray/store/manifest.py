"""Commits: parts first, each with its sha256, then one manifest by create-only put, which makes the commit visible.

    <prefix>/parts-<attempt>/<name>     parts of one attempt; no other attempt writes there
    <prefix>/manifest.json              lists every part with size and sha256, and contains its own digest

A reader that finds no manifest finds no commit; one that finds it can verify every part. Nothing is ever overwritten.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from typing import Any

from blake3 import blake3
from pydantic import Field

from maas_ray.errors import Conflict, MaasError, NotFound, ObjectCorrupt, StoreUnavailable
from maas_ray.store.objects import ObjectStore
from maas_ray.store.sealed import Count, Document, read_document, seal, unseal

FORMAT = 1
NAME = "manifest.json"
POINTERS = "index/newest"
"""Prefix of empty objects whose remaining key is the prefix of a committed object, so that one listing finds it."""


@dataclass(frozen=True)
class Part:
    """One committed part: its key, its size in bytes and its digest, see `part_digest`."""

    key: str
    size: int
    sha256: str
    pieces: tuple[int, ...] = ()
    """Sizes of the pieces that were hashed separately, in order; empty: the part was hashed as a whole."""


@dataclass(frozen=True)
class Committed:
    """A committed object; every read of a part is verified against the manifest."""

    store: ObjectStore
    prefix: str
    kind: str
    parts: Mapping[str, Part]
    meta: Mapping[str, Any]
    digest: str
    """Hex sha256 of the manifest, which identifies the entire content."""
    attempt: str = ""
    """Id of the attempt that committed it, unique to this commit. Empty: written before manifests contained it."""

    def read(self, name: str) -> bytes:
        """The bytes of one part.

        Raises:
            NotFound: the manifest lists no such part.
            ObjectCorrupt: the part is missing, truncated or altered.
        """
        part = self.parts.get(name)
        if part is None:
            raise NotFound(f"{self.prefix} has no part {name!r}; its parts are {', '.join(sorted(self.parts))}")
        if not self._owns(part):
            raise ObjectCorrupt(f"{self.prefix}/{NAME} lists {part.key}, which belongs to another commit; not used")
        try:
            data = self.store.get(part.key)
        except NotFound as error:
            raise ObjectCorrupt(
                f"the committed object {part.key} is missing; restore it or remove {self.prefix}"
            ) from error
        if len(data) != part.size:
            raise ObjectCorrupt(
                f"the committed object {part.key} has {len(data)} bytes instead of {part.size}; not used"
            )
        found = part_digest(data, part.pieces)
        if found != part.sha256:
            raise ObjectCorrupt(
                f"the committed object {part.key} has sha256 {found} instead of {part.sha256}; not used"
            )
        return data

    def delete(self) -> None:
        """Removes the manifest first, then the parts: a reader never sees a manifest without its parts."""
        self.store.delete([f"{self.prefix}/{NAME}"])
        self.store.delete(part.key for part in self.parts.values() if self._owns(part))

    def _owns(self, part: Part) -> bool:
        """Whether a part belongs to this commit; otherwise one manifest could list, and remove, another's objects."""
        return part.key.startswith(f"{self.prefix}/") and ".." not in part.key.split("/")


class CommitWriter:
    """A commit in progress. Parts are invisible to readers until `commit` returns.

    Args:
        store: where to write.
        prefix: prefix of the committed object, without a trailing slash.
        kind: kind of the object (`checkpoint`, `bundle`, …); checked when it is opened.
        attempt: 32 unique hex digits, given if several processes write the parts of one commit.
    """

    def __init__(self, store: ObjectStore, prefix: str, kind: str, attempt: str | None = None) -> None:
        self._store = store
        self._prefix = prefix
        self._kind = kind
        self._attempt = attempt or uuid.uuid4().hex
        self._parts: dict[str, Part] = {}

    @property
    def attempt(self) -> str:
        """The unique id of this commit."""
        return self._attempt

    def put(self, name: str, data: bytes) -> Part:
        """Writes one part; `name` may contain slashes."""
        key = part_key(self._prefix, self._attempt, name)
        self._store.put(key, data)
        return self.add(name, Part(key, len(data), sha256(data).hexdigest()))

    def add(self, name: str, part: Part) -> Part:
        """Adds a part that another process has written at `part_key`."""
        self._parts[name] = part
        return part

    def commit(self, meta: Mapping[str, Any]) -> Committed:
        """Writes the manifest, which makes the whole commit visible atomically.

        A put whose response was lost is recognized by this attempt's id in the manifest, never by equal contents: two
        writers may write the same contents.

        Raises:
            Conflict: another attempt committed this prefix first; this attempt's parts are removed.
            StoreUnavailable: it is unknown whether the manifest was written; calling this again resolves it.
        """
        key = f"{self._prefix}/{NAME}"
        data = seal(
            {
                "format": FORMAT,
                "kind": self._kind,
                "attempt": self._attempt,
                "parts": {name: _plain(part) for name, part in sorted(self._parts.items())},
                "meta": dict(meta),
            }
        )
        try:
            self._store.create(key, data)
        except Conflict as error:
            winner = open_committed(self._store, self._prefix, self._kind)
            if winner.attempt != self._attempt:
                self.abandon()
                raise Conflict(f"{self._prefix} was committed by another writer") from error
            if winner.digest != unseal(key, data)["digest"]:
                raise Conflict(f"{self._prefix} was already committed by this attempt, with other contents") from error
            return winner
        except StoreUnavailable:
            try:
                found = open_committed(self._store, self._prefix, self._kind)
            except MaasError:
                found = None
            if found is None or found.attempt != self._attempt:
                raise
            return found
        return open_committed(self._store, self._prefix, self._kind)

    def abandon(self) -> None:
        """Removes the parts of this attempt. Optional: fsck collects orphans."""
        self._store.delete(part.key for part in self._parts.values())
        self._parts = {}


def part_key(prefix: str, attempt: str, name: str) -> str:
    """The key under which an attempt writes one part."""
    return f"{prefix}/parts-{attempt}/{name}"


def part_digest(data: bytes | memoryview, pieces: Sequence[int] = ()) -> str:
    """Hex sha256 of a part; for a part in pieces, the sha256 of the concatenated digests of its pieces.

    A reader can then verify one piece of a large part, and the writer hashes every byte only once. See `piece_digest`.
    """
    if not pieces:
        return sha256(data).hexdigest()
    if sum(pieces) != len(data):
        return f"of {sum(pieces)} bytes in {len(pieces)} pieces"  # equals no digest
    starts = accumulate(pieces, initial=0)
    view = memoryview(data)
    digests = [piece_digest(view[start : start + size]) for start, size in zip(starts, pieces, strict=False)]
    return sha256(b"".join(digests)).hexdigest()


def piece_digest(data: bytes | memoryview) -> bytes:
    """The BLAKE3 digest of one piece, 32 bytes: as strong as sha256 and several times as fast, for large parts."""
    return blake3(data).digest()


def open_committed(store: ObjectStore, prefix: str, kind: str) -> Committed:
    """Opens a committed object; its parts are verified when they are read.

    Raises:
        NotFound: nothing is committed under the prefix.
        ObjectCorrupt: the manifest is altered, malformed, of another kind or of an unknown format.
    """
    key = f"{prefix}/{NAME}"
    return parse_manifest(store, prefix, kind, unseal(key, store.get(key)))


def parse_manifest(store: ObjectStore, prefix: str, kind: str | None, body: Mapping[str, Any]) -> Committed:
    """Parses a committed object from its unsealed manifest; see `open_committed`. `kind` None: any kind."""
    key = f"{prefix}/{NAME}"
    if body.get("format") != FORMAT or (kind is not None and body.get("kind") != kind):
        raise ObjectCorrupt(
            f"{key} is a {str(body.get('kind'))[:100]!r} of format {str(body.get('format'))[:20]}; "
            f"expected {f'a {kind!r}' if kind else 'any kind'} of format {FORMAT}; not used"
        )
    manifest = read_document(_Manifest, body, key)
    parts = {name: Part(part.key, part.size, part.sha256, tuple(part.pieces)) for name, part in manifest.parts.items()}
    return Committed(store, prefix, manifest.kind, parts, manifest.meta, manifest.digest, manifest.attempt)


def list_committed(store: ObjectStore, prefix: str) -> list[str]:
    """Committed names directly below `prefix/`, sorted. Partial attempts are not listed."""
    depth = len(prefix.split("/"))
    keys = (info.key.split("/") for info in store.scan(prefix))
    return sorted(segments[depth] for segments in keys if len(segments) == depth + 2 and segments[-1] == NAME)


def is_committed(store: ObjectStore, prefix: str) -> bool:
    """Whether a commit exists under a prefix; one listing for any number of parts."""
    key = f"{prefix}/{NAME}"
    # Listed before its parts, because `manifest` sorts before `parts`.
    return next((info.key == key for info in store.scan(prefix) if info.key >= key), False)


def verify(committed: Committed) -> list[MaasError]:
    """Reads every part; returns the errors (empty: the commit is sound)."""
    problems: list[MaasError] = []
    for name in committed.parts:
        try:
            committed.read(name)
        except MaasError as error:
            problems.append(error)
    return problems


class _PartEntry(Document):
    key: str
    size: Count
    sha256: str
    pieces: list[Count] = Field(default_factory=list)


class _Manifest(Document):
    format: int
    kind: str
    parts: dict[str, _PartEntry]
    meta: dict[str, Any]
    digest: str
    attempt: str = ""


def _plain(part: Part) -> dict[str, Any]:
    return {name: value for name, value in vars(part).items() if value != ()}
