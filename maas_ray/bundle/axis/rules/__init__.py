"""The reviewed table: what is known of each operator. One that is not in it is not known to keep rows apart."""

from collections.abc import Mapping

from maas_ray.bundle.axis.nodes import Rule
from maas_ray.bundle.axis.rules import (
    attention,
    classical,
    elementwise,
    linear,
    moving,
    recurrent,
    reducing,
    shaping,
    windows,
)

_STANDARD: Mapping[str, Rule] = {
    **elementwise.RULES,
    **shaping.RULES,
    **moving.RULES,
    **reducing.RULES,
    **linear.RULES,
    **windows.RULES,
    **recurrent.RULES,
    **attention.STANDARD,
    **classical.STANDARD,
}
RULES: Mapping[str, Mapping[str, Rule]] = {
    "": _STANDARD,
    "ai.onnx": _STANDARD,
    "ai.onnx.ml": classical.RULES,
    "com.microsoft": {**_STANDARD, **attention.ONNXRUNTIME},
}
"""By domain. Where onnxruntime's own domain has an operator of a standard name, it follows the standard's newest form."""

ACROSS: Mapping[str, str] = {
    "NonZero": "gives places of elements, counted through all rows",
    "Unique": "compares all elements with each other",
    "NonMaxSuppression": "gives places of boxes, counted through all rows",
    "MaxUnpool": "takes places of elements, counted through all rows",
    "EyeLike": "makes a tensor by the place of a row",
    "StringSplit": "makes as many columns as the longest row needs",
    "StringNormalizer": "takes the rows for the words of one row",
}
"""Operators that no rule can save when they meet rows, and what they do."""
BY_RANGE: Mapping[str, str] = {
    "DynamicQuantizeLinear": "takes its scale from the smallest and largest value of all rows",
    "DynamicQuantizeMatMul": "takes its scale from the smallest and largest value of all rows",
    "DynamicQuantizeLSTM": "takes its scale from the smallest and largest value of all rows",
}
"""As `ACROSS`, but the rows are rows all the same."""
RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
)
"""Operators that draw random numbers: an answer then depends on the requests before it."""
