r"""Snapshots of append-only sequences: many records in one object, so that a long log is read with few requests.

    <prefix>/log/-<10^20 - 1 - last>.jsonl    a sealed header, then the stored records first … last, one per line

A snapshot adds no information to the log: every writer makes the same bytes from the same records and writes them by
create-only put, and a reader that finds one missing or damaged reads other objects. Its key sorts before all records,
the newest first.

There is one after every 8th record. The number of its last record determines which records it contains:

    last is a multiple of    it contains all records since the last multiple of
             8                                  128
           128                                2,048
         2,048                               32,768
        32,768                               32,768, the one before

so three snapshots, each ending where the next one begins, cover a log of up to 32,768 records except for the last
seven, and there is one more for each further 32,768. Each record is written about 25 times in total.
"""

import re
from collections.abc import Collection, Iterator
from hashlib import sha256

from maas_ray.errors import ObjectCorrupt
from maas_ray.store.log.record import Record, parse_records
from maas_ray.store.sealed import Count, Document, read_document, seal, unseal

FORMAT = 1
KIND = "snapshot"
UNIT = 8
FACTOR = 16
MAX_SPAN = UNIT * FACTOR**3
"""Records of the largest snapshot: about 16 MB."""
_MAX = 10**20 - 1
SNAPSHOT = re.compile(r"(.+)/log/-(\d{20})\.jsonl")
"""Keys of snapshots: the sequence's prefix, and 10^20 - 1 minus the number of the last record."""


class _Header(Document):
    format: int
    kind: str
    log: str
    first: Count
    last: Count
    previous: str
    """Digest of the record before the first one; empty: there is no such record."""
    head: str
    """Digest of the last record."""
    sha256: str
    """Sha256 of all bytes after the header's line."""


def snapshot_key(log: str, last: int) -> str:
    """The key of the snapshot that ends with a record."""
    return f"{log}/-{_MAX - last:020d}.jsonl"


def end_of(key: str, log: str) -> int | None:
    """The last record of the snapshot with this key; None: it is not a snapshot of this log."""
    match = SNAPSHOT.fullmatch(key)
    return _MAX - int(match[2]) if match is not None and f"{match[1]}/log" == log else None


def first_of(last: int) -> int:
    """The first record of the snapshot that ends with `last`, a multiple of `UNIT`."""
    span = UNIT * FACTOR
    while span < MAX_SPAN and last % span == 0:
        span *= FACTOR
    return (last - 1) // span * span + 1


def chain(last: int) -> Iterator[int]:
    """The ends of the snapshots that contain all records up to `last`, a multiple of `UNIT`; the newest first."""
    while last > 0:
        yield last
        last = first_of(last) - 1


def plan(first: int, last: int, ends: Collection[int]) -> tuple[list[int], list[int]]:
    """The snapshots, by their ends, and the single records from which to read the records `first` … `last`."""
    snapshots, singles = [], []
    while last >= first:
        if last in ends:
            snapshots.append(last)
            last = first_of(last) - 1
        else:
            singles.append(last)
            last -= 1
    return snapshots, singles


def encode(log: str, first: int, last: int, previous: str, head: str, lines: list[bytes]) -> bytes:
    """The bytes of a snapshot.

    Args:
        log: the sequence's place, `<prefix>/log`.
        first: number of its first record.
        last: number of its last record.
        previous: digest of the record before the first one.
        head: digest of the last record.
        lines: the records, as `seal` writes them.
    """
    body = b"".join(line + b"\n" for line in lines)
    header = _Header.model_construct(
        format=FORMAT, kind=KIND, log=log, first=first, last=last, previous=previous, head=head,
        sha256=sha256(body).hexdigest(),
    )  # fmt: skip
    return seal(header.model_dump()) + b"\n" + body


def decode(log: str, last: int, data: bytes) -> tuple[list[tuple[Record, str]], list[bytes]]:
    """The records of a snapshot, each with the digest of the one before it, and their bytes; everything is verified.

    Raises:
        ObjectCorrupt: it is altered, malformed or of another log, or a record is missing, altered or out of order.
    """
    key = snapshot_key(log, last)
    head, _, body = data.partition(b"\n")
    said = read_document(_Header, unseal(key, head), f"the snapshot {key}")
    first = first_of(last)
    if (said.format, said.kind, said.log, said.first, said.last) != (FORMAT, KIND, log, first, last):
        raise ObjectCorrupt(
            f"the snapshot {key} is a {said.kind[:100]!r} of format {said.format} with the records {said.first} to "
            f"{said.last} of {said.log[:200]}; expected a {KIND!r} of format {FORMAT} with {first} to {last}; not used"
        )
    if sha256(body).hexdigest() != said.sha256:
        raise ObjectCorrupt(f"the records in the snapshot {key} do not match the sha256 in its header; not used")
    lines = body.split(b"\n")
    if lines.pop() != b"" or len(lines) != last - first + 1:
        raise ObjectCorrupt(f"the snapshot {key} contains {len(lines)} records instead of {last - first + 1}; not used")
    records = parse_records(log, first, lines, f"the snapshot {key}")
    expected = said.previous
    for record, follows in records:
        if follows != expected:
            raise ObjectCorrupt(f"the snapshot {key}: record {record.seq} does not follow the one before it; not used")
        expected = record.digest
    if expected != said.head:
        raise ObjectCorrupt(f"the last record of the snapshot {key} does not match its header; not used")
    return records, lines
