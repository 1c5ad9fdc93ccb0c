"""Placement spec: the nodes on which the replicas of a pool may run.

Serve's controller applies it (serve/controller), and the plan of an update uses it to compute free resources
(serve/deploy/plan.py). Independent of Ray.
"""

import re
from typing import Any, Literal

from pydantic import Field, GetJsonSchemaHandler, field_validator, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from maas_ray.spec import Spec

Strategy = Literal["spread", "pack", "one_per_node"]
_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_KEY = re.compile(rf"(?:[a-z0-9](?:[a-z0-9.-]{{0,251}}[a-z0-9])?/)?{_WORD}")
_VALUE = re.compile(rf"!?(?:{_WORD}|in\({_WORD}(?:,\s?{_WORD})*\))")


class PlacementSpec(Spec):
    """Nodes that may run replicas, and how many replicas each; `placement: pack` is short for `{strategy: pack}`."""

    strategy: Strategy = "spread"
    """`spread`: as evenly over the nodes as their free resources allow; when a node returns or is added, replicas move
    to it within a minute, each started before another one ends. `pack`: on as few nodes as possible, for clusters whose
    autoscaler removes idle nodes. `one_per_node`: at most one on each node, even during an update."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Required labels of a node (`ray start --labels`), with Ray's operators: `A`, `!A`, `in(A,B)`, `!in(A,B)`. A pool
    that fits on no such node is refused."""
    accelerator: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Required accelerator type of a node, by Ray's name (`H100`, `L4`); None: no requirement."""

    @model_validator(mode="before")
    @classmethod
    def _strategy_alone(cls, value: Any) -> Any:
        return {"strategy": value} if isinstance(value, str) else value

    @field_validator("labels")
    @classmethod
    def _are_labels(cls, value: dict[str, str]) -> dict[str, str]:
        for key, wanted in value.items():
            if not _KEY.fullmatch(key):
                raise ValueError(
                    f"{key!r} is not the name of a node label; one looks like 'zone' or 'example.com/zone'"
                )
            if not _VALUE.fullmatch(wanted):
                raise ValueError(
                    f"label {key!r} has the value {wanted!r}; use one value ('a'), or '!a', 'in(a,b)', '!in(a,b)'"
                )
        return value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        described = handler.resolve_ref_schema(handler(schema))
        strategy = described["properties"]["strategy"]
        return {"anyOf": [described, {"type": "string", "enum": strategy["enum"]}]}
