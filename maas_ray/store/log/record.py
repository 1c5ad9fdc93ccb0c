"""The format, the key and the digest check of one record of an append-only sequence. Independent of stores."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from pydantic import TypeAdapter, ValidationError

from maas_ray.errors import ObjectCorrupt
from maas_ray.spec import canonical_json
from maas_ray.store.manifest import FORMAT
from maas_ray.store.sealed import MAX_DEPTH, Count, Document, Time, is_shallow, malformed, read_document, unseal

RECORD = re.compile(r"(.+)/log/(\d{20})\.json")
"""Keys of records: the sequence's prefix and the number."""


@dataclass(frozen=True)
class Record:
    """One record: its number (from 1), its event and the time at which it was written (seconds since 1970)."""

    seq: int
    event: Mapping[str, Any]
    time_s: float
    digest: str
    key: str = ""
    """Its key, for messages about its event."""


class _LogRecord(Document):
    format: int
    seq: Count
    previous: str
    time_s: Time
    event: dict[str, Any]
    digest: str
    token: str = ""


_RECORDS: TypeAdapter[list[_LogRecord]] = TypeAdapter(list[_LogRecord])


def record_key(log: str, seq: int) -> str:
    """The key of a record.

    Args:
        log: the sequence's place, `<prefix>/log`.
        seq: its number.
    """
    return f"{log}/{seq:020d}.json"


def parse_record(log: str, seq: int, data: bytes) -> tuple[Record, str]:
    """Parses a record; returns it and the digest of the record before it.

    Raises:
        ObjectCorrupt: it is altered, malformed or has another number.
    """
    key = record_key(log, seq)
    said = read_document(_LogRecord, unseal(key, data), f"the log record {key}")
    return _checked(log, seq, said, f"the log record {key}")


def parse_records(log: str, first: int, lines: Sequence[bytes], what: str) -> list[tuple[Record, str]]:
    """Parses many records at once, each checked as by `parse_record`.

    Args:
        log: the sequence's place.
        first: number of the first record; the others follow it without a gap.
        lines: bytes of each record, as `seal` writes them.
        what: name of the object with the records, for errors.

    Raises:
        ObjectCorrupt: a record is altered, malformed or has another number.
    """
    try:
        values = json.loads(b"[" + b",".join(lines) + b"]")
    except (ValueError, RecursionError) as error:
        raise ObjectCorrupt(f"{what} does not contain one record in each line; not used") from error
    if len(values) != len(lines):
        raise ObjectCorrupt(f"{what} does not contain one record in each line; not used")
    for number, (line, value) in enumerate(zip(lines, values, strict=True), start=first):
        if not isinstance(value, dict) or not _has_digest(line, value):
            raise ObjectCorrupt(f"{what} contains record {number}, whose digest does not match; not used")
        # The number of brackets bounds the depth and is counted faster.
        if line.count(b"{") + line.count(b"[") > MAX_DEPTH and not is_shallow(value):
            raise ObjectCorrupt(f"{what} contains record {number}, nested more than {MAX_DEPTH} levels deep; not used")
    try:
        said = _RECORDS.validate_python(values)
    except ValidationError as error:
        raise malformed(what, error) from None
    return [_checked(log, number, record, what) for number, record in enumerate(said, start=first)]


def _has_digest(line: bytes, value: dict[str, Any]) -> bool:
    """Whether a record's digest is correct.

    `seal` writes the digest first, because no other field's name sorts before it. Cutting it out of the bytes is many
    times faster than serializing the other fields again, which matters for thousands of records.
    """
    digest = value.get("digest")
    if not isinstance(digest, str):
        return False
    head = b'{"digest":"' + digest.encode(errors="replace") + b'",'
    if line.startswith(head):
        return sha256(b"{" + line[len(head) :]).hexdigest() == digest
    rest = {name: each for name, each in value.items() if name != "digest"}
    return sha256(canonical_json(rest)).hexdigest() == digest


def _checked(log: str, seq: int, said: _LogRecord, what: str) -> tuple[Record, str]:
    if said.format != FORMAT or said.seq != seq:
        raise ObjectCorrupt(
            f"{what} contains a record of format {_short(said.format)} with number {_short(said.seq)}; expected format "
            f"{FORMAT} and number {seq}; not used"
        )
    return Record(said.seq, said.event, said.time_s, said.digest, record_key(log, seq)), said.previous


def _short(number: int) -> str:
    text = str(number)
    return text if len(text) <= 20 else f"{text[:20]}… ({len(text)} digits)"
