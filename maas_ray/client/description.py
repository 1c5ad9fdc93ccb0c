"""The description of a model, from its metadata (Open Inference Protocol v2 and our parameters)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from maas_ray.errors import ClusterError


@dataclass(frozen=True)
class Tensor:
    """An input of a model, from its metadata."""

    name: str
    datatype: str
    """Datatype of the protocol, such as FP32 or BYTES."""
    shape: tuple[int, ...]
    """Shape of one row, without the batch dimension; -1 for a size that the request determines."""
    nullable: bool = False
    """Whether a missing value is valid."""
    accepts: tuple[str, ...] = ()
    """Other datatypes in which it may be sent."""
    null_value: int | None = None
    """The integer that represents a missing value."""
    encoding: str = ""
    """`image` or `text`, if BYTES are decoded by the server; empty otherwise."""

    @property
    def is_scalar(self) -> bool:
        """Whether one row is a single value."""
        return prod(self.shape) == 1


@dataclass(frozen=True)
class ModelDescription:
    """The parts of a model's metadata that a client uses."""

    inputs: tuple[Tensor, ...]
    task: str = ""
    """`classification`, `binary`, `regression` or `other`; empty: not known."""
    labels: tuple[str, ...] = ()
    """Class names in the order of the scores; empty if it is not a classifier."""
    reader: Mapping[str, Any] = field(default_factory=dict)
    """How the training data's text was read."""


def read_description(body: bytes) -> ModelDescription:
    """Reads the response to `GET /v2/models/M`.

    Raises:
        ClusterError: the response does not follow the protocol.
    """
    try:
        document = json.loads(body)
        about = document.get("parameters") or {}
        return ModelDescription(
            tuple(_tensor(one) for one in document["inputs"]),
            str(about.get("task") or ""),
            tuple(map(str, about.get("labels") or ())),
            dict(about.get("reader") or {}),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ClusterError(f"the response does not follow the Open Inference Protocol v2: {error!r}") from error


def _tensor(described: Mapping[str, Any]) -> Tensor:
    about = described.get("parameters") or {}
    null_value = about.get("null_value")
    return Tensor(
        described["name"],
        described["datatype"],
        tuple(int(size) for size in described["shape"][1:]),
        bool(about.get("nullable")),
        tuple(map(str, about.get("accepts") or ())),
        None if null_value is None else int(null_value),
        str(about.get("encoding") or ""),
    )
