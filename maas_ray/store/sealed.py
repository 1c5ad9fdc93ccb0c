"""Sealed documents: canonical JSON that contains its own sha256, and the validation of its content.

A digest proves only that a document is unchanged since it was written. Any process that can write to the store can seal
anything, so the content of a document is validated once, here, and not again. Independent of keys and meaning.
"""

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from maas_ray.errors import ObjectCorrupt
from maas_ray.spec import canonical_json

MAX_DEPTH = 64
"""Levels of nesting; the deepest document of this library has about ten. Python's parsers fail at about 1,000."""

MAX_COUNT = (1 << 63) - 1
MAX_TIME_S = 253_402_300_799.0
"""The end of the year 9999, the last year of Python's dates."""

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
"""A number or a size in bytes."""
Time = Annotated[float, Field(ge=0, le=MAX_TIME_S)]
"""Seconds since 1970."""


class Document(BaseModel):
    """Base of models of sealed documents: exact types, finite numbers; fields of later versions are ignored."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="ignore",
        allow_inf_nan=False,
        hide_input_in_errors=True,
        protected_namespaces=(),
    )


D = TypeVar("D", bound=BaseModel)


def read_document(kind: type[D], value: Any, what: str) -> D:
    """Validates the content of a sealed document.

    Args:
        kind: its model.
        value: the parsed JSON.
        what: name of the document for the error.

    Raises:
        ObjectCorrupt: a field is missing or has another type; the message names the document and the first such field.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise malformed(what, error) from None


def malformed(what: str, error: ValidationError) -> ObjectCorrupt:
    """The error for a sealed document whose content does not fit its model."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part)[:100] for part in first["loc"]) or "the document"
    return ObjectCorrupt(f"{what} is malformed: {where}: {first['msg'][:200]}; not used")


def seal(body: Mapping[str, Any]) -> bytes:
    """Canonical JSON of `body` with its own sha256 added as `digest`."""
    return canonical_json({**body, "digest": sha256(canonical_json(body)).hexdigest()})


def unseal(key: str, data: bytes) -> dict[str, Any]:
    """The inverse of `seal`; the result keeps `digest`.

    Raises:
        ObjectCorrupt: the data is not JSON, its digest does not match, or it is nested too deeply.
    """
    try:
        body = json.loads(data)
        digest = body.pop("digest")
        found = sha256(canonical_json(body)).hexdigest()
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ObjectCorrupt(f"the committed object {key} is not a sealed document; not used") from error
    if found != digest:
        raise ObjectCorrupt(f"the committed object {key} has digest {found} instead of {str(digest)[:80]}; not used")
    if not is_shallow(body):
        raise ObjectCorrupt(f"the committed object {key} is nested more than {MAX_DEPTH} levels deep; not used")
    return {**body, "digest": digest}


def parse_json(data: bytes, what: str) -> Any:
    """Parses the JSON of a verified part.

    Raises:
        ObjectCorrupt: the data is not JSON, or nested too deeply.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ObjectCorrupt(f"{what} is not valid JSON; not used") from error
    if not is_shallow(value):
        raise ObjectCorrupt(f"{what} is nested more than {MAX_DEPTH} levels deep; not used")
    return value


def is_shallow(body: Any) -> bool:
    """Whether a parsed document is nested at most `MAX_DEPTH` levels deep."""
    level = [body]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return True
    return False
