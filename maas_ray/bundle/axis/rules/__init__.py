"""The reviewed table of operators and their rules. An operator outside it is not known to keep rows apart."""

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
"""Rules by domain. Operators of onnxruntime's domain with a standard name follow the newest version of the standard."""

ACROSS: Mapping[str, str] = {
    "NonZero": "returns indices of elements, counted over all rows",
    "Unique": "compares all elements with each other",
    "NonMaxSuppression": "returns indices of boxes, counted over all rows",
    "MaxUnpool": "takes indices of elements, counted over all rows",
    "EyeLike": "creates a tensor from the index of a row",
    "StringSplit": "returns as many columns as the longest row needs",
    "StringNormalizer": "treats the rows as the words of one row",
}
"""Operators that always compute across rows, with descriptions."""
BY_RANGE: Mapping[str, str] = {
    "DynamicQuantizeLinear": "computes its scale from the smallest and largest value of all rows",
    "DynamicQuantizeMatMul": "computes its scale from the smallest and largest value of all rows",
    "DynamicQuantizeLSTM": "computes its scale from the smallest and largest value of all rows",
}
"""As `ACROSS`, but their outputs still have one entry per row."""
RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
)
"""Operators that draw random numbers: a result then depends on earlier requests."""
