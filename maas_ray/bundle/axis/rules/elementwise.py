"""Rules for elementwise operators: rows stay in their dimension."""

from collections.abc import Callable
from dataclasses import replace
from math import ceil, floor, isfinite

from maas_ray.bundle.axis.nodes import GraphNode, plain, typed
from maas_ray.bundle.axis.sizes import ONE, Number, Size, Unknown, unknown
from maas_ray.bundle.axis.values import Refusal, Value, held, unsure

_BOOL = 9
_FRACTIONS = (1, 10, 11, 16)
"""`TensorProto.DataType` of floats."""

UNARY = [
    "Abs",
    "Acos",
    "Acosh",
    "Asin",
    "Asinh",
    "Atan",
    "Atanh",
    "BitwiseNot",
    "Ceil",
    "Celu",
    "Cos",
    "Cosh",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "LeakyRelu",
    "Log",
    "Mish",
    "Neg",
    "Not",
    "Reciprocal",
    "RegexFullMatch",
    "Relu",
    "Round",
    "Selu",
    "Shrink",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sinh",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Swish",
    "Tan",
    "Tanh",
    "ThresholdedRelu",
]
BINARY = [
    "Add",
    "And",
    "BitShift",
    "BitwiseAnd",
    "BitwiseOr",
    "BitwiseXor",
    "Clip",
    "Div",
    "Max",
    "Mean",
    "Min",
    "Mod",
    "Mul",
    "Or",
    "PRelu",
    "Pow",
    "StringConcat",
    "Sub",
    "Sum",
    "Xor",
]
COMPARISONS = ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "IsInf", "IsNaN"]
_NUMPY_RULE = 7
"""Operator set since which binary operators broadcast as NumPy does, without attributes."""


def elementwise(node: GraphNode) -> list[Value]:
    """Elementwise operators with any number of broadcast inputs."""
    values = [value for value in node.inputs if value is not None]
    if (node.attributes.get("broadcast") or node.attributes.get("axis")) and node.opset < _NUMPY_RULE:
        raise unsure("uses the broadcasting of an operator set before 7")
    number = _content(node, values)
    if number is not None:
        return [number]
    if node.op == "Identity":
        return [values[0]]
    if all(value.axis is None for value in values) and any(value.by_rows for value in values):
        return [Value(by_rows=True)]
    result = node.broadcast(*values)
    dtype = _BOOL if node.op in COMPARISONS or node.op in ("And", "Or", "Xor", "Not") else values[0].dtype
    return [typed(result, dtype)]


def where(node: GraphNode) -> list[Value]:
    """Where: selects from two tensors."""
    values = [node.input(0), node.input(1), node.input(2)]
    number = _content(node, values)
    if number is not None:
        return [number]
    if all(value.axis is None for value in values) and any(value.by_rows for value in values):
        return [Value(by_rows=True)]
    return [typed(node.broadcast(*values), values[1].dtype)]


def cast(node: GraphNode) -> list[Value]:
    """Cast: another datatype; small integers remain known."""
    value = node.input(0)
    dtype = node.whole("to", 0) if node.op != "CastLike" else node.input(1).dtype
    if node.op == "BitCast":
        return [typed(plain(node.data(0)), dtype)]
    if value.content is not None and dtype not in _FRACTIONS:
        content = [Size(int(each)) if isinstance(each, float) and isfinite(each) else each for each in value.content]
        value = replace(value, content=tuple(content))
    return [typed(value, dtype)]


def quantize(node: GraphNode) -> list[Value]:
    """QuantizeLinear and DequantizeLinear: scales and zero points per tensor, per axis, or per block of an axis."""
    value = node.data(0)
    node.common(1, 2)
    scale = node.input(1)
    if scale.rank == 1 and scale.sizes[0] != ONE:
        node.apart(value, node.whole("axis", 1))
    elif scale.rank > 1:
        node.apart(value, node.whole("axis", 1))
        if value.axis is not None and scale.rank == value.rank and scale.sizes[value.axis].number != 1:
            raise Refusal("scales each row by its index")
    zero = node.maybe(2)
    dtype = scale.dtype if node.op == "DequantizeLinear" else (zero.dtype if zero else 2)
    return [typed(plain(value), dtype)]


def dropout(node: GraphNode) -> list[Value]:
    """Dropout: no effect at inference."""
    value = node.data(0)
    training = node.numbers(2)
    if training is not None and (not training or training[0] != Size(0)):
        raise Refusal("may draw random numbers")
    if node.opset < _NUMPY_RULE and not node.whole("is_test", 0):
        raise Refusal("may draw random numbers")
    return [value, typed(plain(value), _BOOL)]


def _content(node: GraphNode, values: list[Value]) -> Value | None:
    """The result's elements, if all inputs are small, without rows, and at most vectors."""
    if any(value.axis is not None or value.shape is None or len(value.shape) > 1 for value in values):
        return None
    numbers = [value.numbers for value in values]
    lengths = {len(each) for each in numbers if each is not None}
    lengths.discard(1)
    if any(each is None for each in numbers) or len(lengths) > 1:
        return None
    count = lengths.pop() if lengths else 1
    rows = [each if len(each) == count else each * count for each in numbers if each is not None]
    compute = _COMPUTE.get(node.op)
    content: list[Number] = []
    for operands in zip(*rows, strict=True):
        found = compute(*operands) if compute is not None and len(operands) in (1, 2, 3) else None
        content.append(unknown(*operands) if found is None else found)
    widest = max(values, key=lambda value: value.rank)
    shape = (Size(count),) if widest.rank else ()
    return held(shape, content, _BOOL if node.op in COMPARISONS else values[-1].dtype)


def _plain(number: Number) -> float | int | None:
    if isinstance(number, Size):
        return number.number if number.is_number else None
    return number if isinstance(number, float) else None


def _number(value: float | int) -> Number:
    return Size(int(value)) if float(value).is_integer() else float(value)


def _both(compute: Callable[[float, float], float]) -> Callable[..., Number | None]:
    def run(*operands: Number) -> Number | None:
        known = [each for each in map(_plain, operands) if each is not None]
        if len(known) != len(operands) or len(known) != 2:
            return None
        try:
            return _number(compute(known[0], known[1]))
        except (ArithmeticError, ValueError):
            return None

    return run


def _one(compute: Callable[[float], float]) -> Callable[..., Number | None]:
    def run(operand: Number) -> Number | None:
        known = _plain(operand)
        if known is None:
            return operand if isinstance(operand, Size) and compute in (floor, ceil, abs) else None
        return _number(compute(known))

    return run


def _multiply(first: Number, second: Number) -> Number | None:
    if isinstance(first, Size) and isinstance(second, Size):
        return first.times(second)
    return _both(lambda a, b: a * b)(first, second)


def _divide(first: Number, second: Number) -> Number | None:
    if isinstance(first, Size) and isinstance(second, Size):
        return first.over(second)  # a remainder depends on the datatype
    return _both(lambda a, b: a / b)(first, second)


def _add(first: Number, second: Number) -> Number | None:
    if Size(0) in (first, second):
        return second if first == Size(0) else first
    return _both(lambda a, b: a + b)(first, second)


def _subtract(first: Number, second: Number) -> Number | None:
    if second == Size(0):
        return first
    return _both(lambda a, b: a - b)(first, second)


def _equal(first: Number, second: Number) -> Number | None:
    if isinstance(first, Unknown) or isinstance(second, Unknown):
        return None
    if first == second:
        return Size(1)
    known = [_plain(first), _plain(second)]
    if None not in known:
        return Size(int(known[0] == known[1]))
    # A size is not negative; whether it equals any other number is unknown.
    return Size(0) if any(each is not None and each < 0 for each in known) else None


def _where(chosen: Number, first: Number, second: Number) -> Number | None:
    known = _plain(chosen)
    if known is None:
        return first if first == second and not isinstance(first, Unknown) else None
    return first if known else second


def _identity(operand: Number) -> Number:
    return operand


_COMPUTE: dict[str, Callable[..., Number | None]] = {
    "Add": _add, "Sub": _subtract, "Mul": _multiply, "Div": _divide, "Equal": _equal, "Where": _where,
    "Identity": _identity, "Floor": _one(floor), "Ceil": _one(ceil), "Abs": _one(abs), "Neg": _one(lambda a: -a),
    "Not": _one(lambda a: float(not a)), "Sqrt": _one(lambda a: a**0.5 if a >= 0 else float("nan")),
    "Max": _both(max), "Min": _both(min), "Greater": _both(lambda a, b: float(a > b)),
    "Less": _both(lambda a, b: float(a < b)), "GreaterOrEqual": _both(lambda a, b: float(a >= b)),
    "LessOrEqual": _both(lambda a, b: float(a <= b)), "And": _both(lambda a, b: float(bool(a and b))),
    "Or": _both(lambda a, b: float(bool(a or b))), "Mod": _both(lambda a, b: a % b),
}  # fmt: skip

RULES = {
    **dict.fromkeys([*UNARY, *BINARY, *COMPARISONS], elementwise),
    "Where": where,
    "Cast": cast,
    "CastLike": cast,
    "BitCast": cast,
    "QuantizeLinear": quantize,
    "DequantizeLinear": quantize,
    "Dropout": dropout,
}
